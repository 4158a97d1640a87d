//! Files that a run reads back: latents beside their manifest, checkpoints, and files that are none.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    NO_PICTURES, PRECOMPUTE, QUICKSTART, args, command, copy, messages, refuse, refused, run, says,
    succeed, teacher, text,
};

/// Settings of a small run on the latents in `latents`, which are read in order.
fn train(run: &Path, latents: &Path, more: &[&str]) -> Vec<String> {
    let settings = [
        &format!("train.output={}", run.display()),
        &format!("data.shards={}/", latents.display()),
        "data.kind=latents",
        "data.shuffle_buffer=1",
        "train.batch_size=2",
    ];
    args(
        "train",
        QUICKSTART,
        [&settings[..], &NO_PICTURES, more].concat(),
    )
}

/// The arguments that write six samples of the quickstart as the shard `00000.tar` in `output`.
fn precompute(output: &Path) -> Vec<String> {
    let output = format!("latents.output={}", output.display());
    args(
        "precompute",
        PRECOMPUTE,
        [output.as_str(), "data.max_samples=6"],
    )
}

/// Changes a byte in the first array of a latent shard.
fn change_number(shard: &Path) {
    let mut bytes = fs::read(shard).unwrap();
    let array = bytes.windows(6).position(|w| w == b"\x93NUMPY").unwrap();
    bytes[array + 200] ^= 1;
    fs::write(shard, bytes).unwrap();
}

#[test]
fn latents_that_differ_from_their_manifest_are_not_trained_on() {
    let folder = TempDir::new().unwrap();
    let (latents, output) = (folder.path().join("latents"), folder.path().join("run"));
    succeed(&precompute(&latents));
    let shard = latents.join("00000.tar");
    let whole = fs::read(&shard).unwrap();
    let train = train(&output, &latents, &["train.max_steps=9"]);
    let inspect = ["inspect", "--json", text(&shard)];

    change_number(&shard);
    let words = ["00000.tar: its SHA-256 is ", "in the manifest beside it"];
    refuse(1, &train, &words);
    let (report, said) = run(command(&inspect), 1);
    says(&said, &["shards that differ from the manifest: 1 of 1"]);
    let report: Value = serde_json::from_str(&report).unwrap();
    let problems = report["shards"][0]["problems"].as_array().unwrap();
    assert_eq!(problems.len(), 1, "{report}");
    says(
        problems[0]["what"].as_str().unwrap(),
        &["SHA-256 ", "in the manifest"],
    );

    // Once it is removed, the shard is written again.
    fs::remove_file(&shard).unwrap();
    let said = messages(command(&precompute(&latents)));
    says(&said, &["1 of them new"]);
    assert!(fs::read(&shard).unwrap() == whole);
    let said = messages(command(&precompute(&latents)));
    says(&said, &["1 shard already in", "0 of them new"]);

    fs::remove_dir_all(&output).unwrap();
    fs::write(&shard, &whole[..whole.len() - 512]).unwrap();
    refuse(1, &train, &["00000.tar: its size in bytes is "]);
    assert_eq!(
        fs::read_to_string(output.join("metrics.jsonl")).unwrap(),
        ""
    );
    fs::write(&shard, &whole).unwrap();

    let manifest = latents.join("manifest.json");
    let original = fs::read_to_string(&manifest).unwrap();
    let entry = &serde_json::from_str::<Value>(&original).unwrap()["shards"]["00000.tar"];
    let samples = entry["samples"].as_u64().unwrap();
    let with = |name: &str, entry: &Value| {
        let added = format!("\"shards\": {{\n{}: {entry},", json!(name));
        original.replacen("\"shards\": {", &added, 1)
    };
    let more = original.replace(
        &format!("\"samples\": {samples}"),
        &format!("\"samples\": {}", samples + 1),
    );
    assert_ne!(more, original);
    fs::write(&manifest, more).unwrap();
    refuse(
        1,
        &train,
        &["00000.tar: its number of samples is 6, and 7 in the manifest"],
    );
    let mut many = entry.clone();
    many["samples"] = json!(u64::MAX);
    let mut short = entry.clone();
    short["sha256"] = json!("abc");
    for (text, words) in [
        (
            with("00000.tar", entry),
            "shard \"00000.tar\" is listed twice",
        ),
        (
            with("../x.tar", entry),
            "shard \"../x.tar\" is no file name",
        ),
        (with("/x.tar", entry), "shard \"/x.tar\" is no file name"),
        (
            with("s3://b/x.tar", entry),
            "shard \"s3://b/x.tar\" is no file name",
        ),
        (with("", entry), "shard \"\" is no file name"),
        (with("x.tar", &many), "fewer than their tar headers take"),
        (with("x.tar", &short), "not 64 hexadecimal digits"),
        (with("x.tar", &json!({})), "missing field"),
        ("[]".to_owned(), "not a manifest of latent shards"),
        (original[..original.len() / 2].to_owned(), "EOF"),
    ] {
        fs::write(&manifest, text).unwrap();
        refuse(2, &train, &["manifest.json: ", words]);
    }
}

fn pipe(path: &Path) {
    fs::remove_file(path).ok();
    rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::RWXU).unwrap();
}

#[test]
fn named_pipes_and_devices_are_refused_at_once() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let named = at("pipe");
    pipe(&named);
    let (named, words) = (text(&named), "it is a named pipe, not a file");
    let here = |message: &str| message.contains(named).then_some(());
    let said = refuse(2, &["check", "-c", named], &[words]);
    here(&said).unwrap();
    refuse(
        2,
        &["check", "-c", "/dev/zero"],
        &["it is a device, not a file"],
    );
    refuse(
        2,
        &["check", "-c", text(folder.path())],
        &["it is a folder, not a file"],
    );
    for urls in [named.to_owned(), format!("@{named}")] {
        let (_, said) = run(command(&["inspect", &urls]), 1);
        says(&said, &[words, named]);
    }
    let image = at("image.png");
    let model = ["sample", "--model", "assets/quickstart/teacher"];
    let options = [
        "--prompt",
        "a",
        "--out",
        text(&image),
        "--init-latents",
        named,
    ];
    refuse(2, &[&model[..], &options].concat(), &[words, named]);
    // The look at the model's folder takes what is no file for missing.
    for file in [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
    ] {
        let models = at("models");
        copy(&teacher(), &models);
        pipe(&models.join(file));
        let settings = [
            format!("model.teacher={}", models.display()),
            format!("train.output={}", at("run").display()),
        ];
        let (_, said) = run(command(&args("train", QUICKSTART, settings)), 1);
        says(&said, &["it has no ", file.split('/').next().unwrap()]);
        fs::remove_dir_all(models).unwrap();
    }
    refuse(
        2,
        &["inspect", "--log-file", named, "x.tar"],
        &["--log-file", words],
    );
    for record in ["config.toml", "skipped.jsonl"] {
        let run = at("piped");
        fs::create_dir(&run).unwrap();
        pipe(&run.join(record));
        let output = format!("train.output={}", text(&run));
        refuse(2, &args("train", QUICKSTART, [output]), &[record, words]);
        fs::remove_dir_all(run).unwrap();
    }
    let latents = at("latents");
    fs::create_dir(&latents).unwrap();
    fs::write(latents.join("00000.tar"), "").unwrap();
    pipe(&latents.join("manifest.json"));
    refuse(
        1,
        &train(&at("run"), &latents, &[]),
        &["manifest.json", words],
    );
}

#[test]
fn configuration_is_read_from_redirected_input() {
    let mut check = command(&["bench", "-c", "/dev/stdin", "--samples", "1"]);
    check.stdin(fs::File::open(QUICKSTART).unwrap());
    run(check, 0);
}

/// Changes the `state.json` of a checkpoint to that of a version without its own checksum.
fn edit(checkpoint: &Path, change: impl FnOnce(&mut Value)) {
    let path = checkpoint.join("state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(state.as_object_mut().unwrap().remove("sha256").is_some());
    change(&mut state);
    fs::write(path, state.to_string()).unwrap();
}

#[test]
fn changed_positions_and_optimisers_are_refused_without_a_panic() {
    let folder = TempDir::new().unwrap();
    let (output, kept) = (folder.path().join("run"), folder.path().join("kept"));
    let go = |steps: &str| {
        let output = format!("train.output={}", output.display());
        let settings = [
            output.as_str(),
            steps,
            "train.batch_size=2",
            "data.shuffle_buffer=9",
        ];
        command(&args(
            "train",
            QUICKSTART,
            [&settings[..], &NO_PICTURES].concat(),
        ))
    };
    messages(go("train.max_steps=1"));
    let checkpoint: PathBuf = output.join("checkpoint-1");
    copy(&checkpoint, &kept);
    let large = 1_u64 << 62;
    let position = "the saved position in the data";
    for (pointer, value, code, words) in [
        (
            "/cursor/lanes/0/place/open/0/shard",
            json!(large),
            2,
            "it names shard",
        ),
        (
            "/cursor/lanes/0/place/open/0/id",
            json!(large),
            2,
            "it names shard pass",
        ),
        (
            "/cursor/lanes/0/place/open/0/taken",
            json!(large),
            1,
            position,
        ),
        (
            "/cursor/lanes/0/place/visits",
            json!(0),
            2,
            "it names shard pass",
        ),
        ("/cursor/lanes/0/buffer/0", json!([0, large]), 1, position),
        (
            "/cursor/lanes/0/buffer/0",
            json!([large, 0]),
            2,
            "does not name the shard",
        ),
        ("/cursor/identity/seed", json!(7), 2, "seed"),
        ("/cursor/version", json!(0), 1, "cursor of version 0"),
        ("/optimizer/steps", json!(large), 1, "updates in 1 steps"),
        (
            "/optimizer/loss_scale",
            json!({"factor": 2.0, "steps": 1}),
            1,
            "only fp16",
        ),
    ] {
        edit(&checkpoint, |state| {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            match state.pointer_mut(parent).unwrap() {
                Value::Object(object) => drop(object.insert(key.to_owned(), value)),
                array => array[key.parse::<usize>().unwrap()] = value,
            }
        });
        refused(go("train.max_steps=2"), code, &[words]);
        fs::remove_dir_all(&checkpoint).unwrap();
        copy(&kept, &checkpoint);
    }
    edit(&checkpoint, |_| {});
    messages(go("train.max_steps=2"));
}
