//! Checkpoints in a folder and in S3: resuming on other machines and with other configurations, and places that refuse writes.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use coffey::models::unet::WEIGHTS_STEM;
use tempfile::TempDir;

use crate::support::cloud::Cloud;
use crate::support::cloud::proxy::{Fault, chance_writing, clean};
use crate::support::{
    NO_PICTURES, args, command, copy, damage, messages, quickstart, refused, run, says, steps_made,
    student, teacher, text, timeless,
};

/// A small `train` without pictures into `output`.
fn train(config: &Path, output: &str, more: &[&str]) -> Command {
    let output = format!("train.output={output}");
    let small = [output.as_str(), "train.batch_size=2"];
    let settings = [&small[..], &NO_PICTURES, more].concat();
    command(&args("train", text(config), settings))
}

fn checkpoints(run: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("state.json").is_file())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn s3_run_resumes_on_other_machines() {
    let cloud = Cloud::start(chance_writing(1, 0.1, 1 << 20));
    let folder = TempDir::new().unwrap();
    let local = folder.path().join("local");
    messages(train(&quickstart(), text(&local), &["train.max_steps=6"]));
    let place = "s3://out/runs/first";
    let audit = format!("audit.dir={place}/audit");
    let on = |machine: &str, more: &[&str]| {
        let scratch = format!("train.scratch={}", folder.path().join(machine).display());
        let all = [&[scratch.as_str(), "s3.max_attempts=20"], more].concat();
        train(&cloud.config, place, &all)
    };
    let said = messages(on(
        "one",
        &[
            "train.max_steps=4",
            "checkpoint.every=1",
            "checkpoint.keep=2",
            &audit,
            "audit.steps=1",
        ],
    ));
    let remote = cloud.out().join("runs/first");
    says(&said, &["saved s3://out/runs/first/checkpoint-4"]);
    assert_eq!(checkpoints(&remote), ["checkpoint-3", "checkpoint-4"]);
    for name in [
        "run.json",
        "config.toml",
        "metrics.jsonl",
        "skipped.jsonl",
        "loss.png",
        "unet/config.json",
        "audit/meta.json",
        "audit/step-000001.00.safetensors",
        "audit/unet_final/config.json",
    ] {
        assert!(remote.join(name).is_file(), "{name}");
    }
    // Another machine resumes; one checkpoint is damaged and another is partial.
    damage(&remote.join("checkpoint-4/optimizer.safetensors"));
    copy(&remote.join("checkpoint-3"), &remote.join("checkpoint-5"));
    std::fs::remove_file(remote.join("checkpoint-5/state.json")).unwrap();
    let said = messages(on("two", &["train.max_steps=5"]));
    says(
        &said,
        &[
            "passed over: s3://out/runs/first/checkpoint-4: damaged checkpoint: optimizer.safetensors",
            "going on from s3://out/runs/first/checkpoint-3 (step 3)",
        ],
    );
    assert_eq!(timeless(&remote).len(), 5);
    // Resumes from a checkpoint by name, and runs to the end.
    let named = format!("checkpoint.resume={place}/checkpoint-5/");
    let said = messages(on("three", &[&named, "train.max_steps=6"]));
    assert!(said.contains("checkpoint-5 (step 5)"), "{said}");
    assert_eq!(timeless(&remote), timeless(&local));
    assert!(student(&remote) == student(&local));
    let elsewhere = folder.path().join("elsewhere");
    let said = messages(train(
        &cloud.config,
        text(&elsewhere),
        &[&named, "train.max_steps=6"],
    ));
    says(&said, &["going on from s3://out/"]);
    assert!(student(&elsewhere) == student(&local));
    // The next start removes an upload whose first answer was lost.
    cloud.proxy.follow(clean());
    refused(on("four", &["checkpoint.resume=never"]), 2, &[]);
    assert_eq!(cloud.uploads(), 0);
}

#[test]
fn background_and_foreground_saves_are_equal() {
    let folder = TempDir::new().unwrap();
    let made = |name: &str, more: &[&str]| {
        let place = folder.path().join(name);
        let all = [&["train.max_steps=4", "checkpoint.every=2"], more].concat();
        let said = messages(train(&quickstart(), text(&place), &all));
        assert_eq!(said.matches("saved ").count(), 2, "{said}");
        place
    };
    let background = made("background", &[]);
    let foreground = made("foreground", &["checkpoint.background=false"]);
    for name in [
        "checkpoint-2/unet/diffusion_pytorch_model.safetensors",
        "checkpoint-2/unet_target/diffusion_pytorch_model.safetensors",
        "checkpoint-2/optimizer.safetensors",
        "checkpoint-4/optimizer.safetensors",
    ] {
        let read = |run: &Path| std::fs::read(run.join(name)).unwrap();
        assert!(read(&background) == read(&foreground), "{name}");
    }
    assert_eq!(timeless(&background), timeless(&foreground));
}

#[test]
fn changed_configuration_is_refused_with_both_values() {
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("run");
    let go = |more: &[&str]| train(&quickstart(), text(&place), more);
    messages(go(&["train.max_steps=1"]));
    let said = run(
        go(&[
            "train.max_steps=2",
            "image.resolution=32",
            "train.seed=7",
            "optimizer.beta2=0.99",
        ]),
        2,
    )
    .1;
    says(
        &said,
        &[
            "checkpoint-1 is of a run with another configuration",
            "image.resolution was 64 and is 32",
            "train.seed was 453645634 and is 7",
            "optimizer.beta2 was 0.999 and is 0.99",
        ],
    );
    let said = messages(go(&[
        "train.max_steps=2",
        "data.decode_threads=1",
        "checkpoint.every=7",
        "validation.prompts=[\"red apple\"]",
        "optimizer.learning_rate=1e-5",
    ]));
    says(
        &said,
        &["warning: optimizer.learning_rate was 0.0003 and is 0.00001"],
    );
}

/// A teacher in a folder of its own, to be changed.
fn own_teacher(folder: &TempDir) -> (PathBuf, String) {
    let path = folder.path().join("teacher");
    copy(&teacher(), &path);
    let set = format!("model.teacher={}", path.display());
    (path, set)
}

/// Replaces text in a JSON file.
fn replace(path: &Path, old: &str, new: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(old), "{text}");
    std::fs::write(path, text.replacen(old, new, 1)).unwrap();
}

#[test]
fn moved_models_are_taken_and_changed_ones_refused() {
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("run");
    let (models, set) = own_teacher(&folder);
    let go = |set: &str, steps: &str| train(&quickstart(), text(&place), &[set, steps]);
    messages(go(&set, "train.max_steps=1"));
    let run = format!("checkpoint.resume={}", place.display());
    let named = format!(
        "is no checkpoint; name one of its checkpoints, as {}/checkpoint-1",
        place.display()
    );
    refused(go(&set, &run), 2, &[&named]);
    let moved = folder.path().join("moved");
    std::fs::rename(&models, &moved).unwrap();
    let set = format!("model.teacher={}", moved.display());
    let said = messages(go(&set, "train.max_steps=2"));
    assert!(!said.contains("warning"), "{said}");
    let spare = folder.path().join("spare");
    let changed = |change: &dyn Fn(), words: &[&str]| {
        std::fs::remove_dir_all(&spare).ok();
        copy(&moved, &spare);
        change();
        let said = refused(go(&set, "train.max_steps=3"), 2, words);
        says(
            &said,
            &["checkpoint-2 is of a run with other models", "restore that"],
        );
        std::fs::remove_dir_all(&moved).unwrap();
        std::fs::rename(&spare, &moved).unwrap();
    };
    let weights = |part: &str, stem: &str| {
        let name = format!("{part}/{stem}.safetensors");
        (moved.join(&name), name)
    };
    for (part, stem, words) in [
        ("unet", WEIGHTS_STEM, "the UNet ("),
        ("vae", WEIGHTS_STEM, "the VAE ("),
        ("text_encoder", "model", "the text encoder ("),
    ] {
        let (file, name) = weights(part, stem);
        let change = || damage(&file);
        changed(&change, &[words, &name, "was sha256:", "and is sha256:"]);
    }
    let file = |name: &str| moved.join(name);
    changed(
        &|| replace(&file("vae/config.json"), "0.43", "0.44"),
        &[
            "scaling_factor of the VAE",
            "vae/config.json",
            "and is 0.44",
        ],
    );
    changed(
        &|| replace(&file("text_encoder/config.json"), "quick_gelu", "gelu"),
        &[
            "hidden_act of the text encoder",
            r#"was "quick_gelu" and is "gelu""#,
        ],
    );
    changed(
        &|| {
            replace(
                &file("scheduler/scheduler_config.json"),
                "epsilon",
                "sample",
            )
        },
        &[
            "prediction_type of the noise schedule",
            "scheduler_config.json",
        ],
    );
    changed(
        &|| {
            replace(
                &file("unet/config.json"),
                r#""flip_sin_to_cos": true"#,
                r#""flip_sin_to_cos": false"#,
            )
        },
        &[
            "network of the UNet",
            "flip_sin_to_cos was true and is false",
        ],
    );
    changed(
        &|| {
            let merges = file("tokenizer/merges.txt");
            let text = std::fs::read_to_string(&merges).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            let (head, last) = lines.split_at(lines.len() - 2);
            let swapped = [head, &[last[1], last[0]]].concat().join("\n");
            std::fs::write(&merges, swapped).unwrap();
        },
        &["the tokenizer (", "tokenizer) was sha256:"],
    );
    // The models as they were.
    messages(go(&set, "train.max_steps=3"));
}

#[test]
fn checkpoint_without_fingerprint_knows_models_by_name() {
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("run");
    let (models, set) = own_teacher(&folder);
    let go = |set: &str, steps: &str| train(&quickstart(), text(&place), &[set, steps]);
    messages(go(&set, "train.max_steps=1"));
    let state = place.join("checkpoint-1/state.json");
    let mut old: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&state).unwrap()).unwrap();
    for field in ["models", "sha256"] {
        assert!(old.as_object_mut().unwrap().remove(field).is_some());
    }
    std::fs::write(&state, old.to_string()).unwrap();
    let moved = format!("model.teacher={}", teacher().display());
    refused(
        go(&moved, "train.max_steps=2"),
        2,
        &["another configuration", "model.teacher was"],
    );
    let config = models.join("unet/config.json");
    replace(
        &config,
        r#""flip_sin_to_cos": true"#,
        r#""flip_sin_to_cos": false"#,
    );
    refused(
        go(&set, "train.max_steps=2"),
        2,
        &["other models", "network of the UNet"],
    );
    replace(
        &config,
        r#""flip_sin_to_cos": false"#,
        r#""flip_sin_to_cos": true"#,
    );
    let said = messages(go(&set, "train.max_steps=2"));
    says(&said, &["warning: ", "holds no fingerprint of the models"]);
    let said = messages(go(&set, "train.max_steps=3"));
    assert!(!said.contains("no fingerprint"), "{said}");
}

#[test]
fn refused_save_to_s3_costs_one_checkpoint() {
    let cloud = Cloud::start(Box::new(|head, _| {
        let refused = head.starts_with("put ") && head.contains("/checkpoint-2/");
        refused.then_some(Fault::Status(403, "AccessDenied"))
    }));
    let place = "s3://out/run";
    let more = ["train.max_steps=6", "checkpoint.every=2"];
    let said = messages(train(&cloud.config, place, &more));
    says(
        &said,
        &["warning: checkpoint-2 could not be saved: s3://out/run/checkpoint-2/"],
    );
    says(&said, &["s3:PutObject", "none has been saved yet"]);
    let remote = cloud.out().join("run");
    assert_eq!(checkpoints(&remote), ["checkpoint-4", "checkpoint-6"]);
    assert_eq!(timeless(&remote).len(), 6);

    // S3 refuses until the end of the run, from the first file of a checkpoint on.
    cloud.proxy.follow(Box::new(|head, _| {
        let at_start = head.contains("/.coffey-check") || head.contains("/.lock");
        let refused = head.starts_with("put ") && !at_start;
        refused.then_some(Fault::Status(403, "AccessDenied"))
    }));
    let more = ["train.max_steps=8", "checkpoint.every=2"];
    let said = run(train(&cloud.config, place, &more), 1).1;
    says(
        &said,
        &[
            "error: the state of step 8 could not be saved",
            "the newest checkpoint is checkpoint-6",
        ],
    );
    cloud.proxy.follow(clean());
    let said = messages(train(&cloud.config, place, &more));
    assert!(said.contains("checkpoint-6 (step 6)"), "{said}");
    assert_eq!(timeless(&remote).len(), 8);
    // A bucket that does not exist.
    let said = run(train(&cloud.config, "s3://nobody/run", &more), 1).1;
    says(&said, &["s3://nobody/run"]);
}

/// The same command under a limit on the size of files, which fails writes as a full disk does.
fn limited(command: &Command, kilobytes: u32) -> Command {
    let mut shell = Command::new("bash");
    let limit = format!("trap '' XFSZ; ulimit -f {kilobytes}; exec \"$0\" \"$@\"");
    shell.args(["-c", &limit]);
    wrapped(shell, command)
}

/// `command` as the arguments of `wrapper`, in the same environment.
fn wrapped(mut wrapper: Command, command: &Command) -> Command {
    wrapper
        .arg(command.get_program())
        .args(command.get_args())
        .current_dir(command.get_current_dir().unwrap());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapper.env(name, value),
            None => wrapper.env_remove(name),
        };
    }
    wrapper
}

#[test]
fn full_disk_ends_run_only_at_last_save() {
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("run");
    let more = ["train.max_steps=4", "checkpoint.every=2"];
    let whole = train(&quickstart(), text(&place), &more);
    let said = run(limited(&whole, 3000), 1).1;
    says(
        &said,
        &["warning: checkpoint-2 could not be saved", "ulimit -f"],
    );
    says(
        &said,
        &[
            "error: the state of step 4 could not be saved",
            "no checkpoint has been saved",
        ],
    );
    assert_eq!(timeless(&place).len(), 4);
    let names: Vec<String> = std::fs::read_dir(&place)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("checkpoint") || name.starts_with(".writing"))
        .collect();
    assert_eq!(names, [""; 0]);
    messages(whole);
    assert_eq!(timeless(&place).len(), 4);
}

/// The same command with the permissions of files enforced for root as well.
fn without_root_rights(command: &Command) -> Command {
    let mut wrapper = Command::new("setpriv");
    wrapper.args(["--bounding-set", "-dac_override,-dac_read_search"]);
    wrapped(wrapper, command)
}

#[test]
fn read_only_folder_is_reported_and_harmless() {
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("run");
    std::fs::create_dir(&place).unwrap();
    let mode = |mode: u32| {
        std::fs::set_permissions(&place, PermissionsExt::from_mode(mode)).unwrap();
    };
    let more = ["train.max_steps=24", "checkpoint.every=7"];
    let whole = || train(&quickstart(), text(&place), &more);
    let mut command = whole();
    if std::fs::metadata(folder.path()).unwrap().uid() == 0 {
        command = without_root_rights(&command);
    }
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    while steps_made(&place) == 0 {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    mode(0o555);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    says(
        &said,
        &[
            "could not be saved",
            "Permission denied",
            "error: the state of step 24",
        ],
    );
    assert_eq!(timeless(&place).len(), 24);
    mode(0o755);
    let half = std::fs::read_dir(&place).unwrap().flatten();
    let half = half.filter(|entry| entry.file_name().to_string_lossy().starts_with(".writing"));
    assert_eq!(half.count(), 0);
    messages(whole());
    assert_eq!(timeless(&place).len(), 24);
}

#[test]
fn records_refused_by_full_disk_are_written_later() {
    // The limit is below the size of six lines and above that of the files that are written before the first checkpoint.
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("run");
    let more = ["train.max_steps=30", "checkpoint.every=1000"];
    let whole = train(&quickstart(), text(&place), &more);
    let said = run(limited(&whole, 4), 1).1;
    says(&said, &["metrics.jsonl", "the lines are kept"]);
    // Every line is whole.
    let text = std::fs::read_to_string(place.join("metrics.jsonl")).unwrap();
    assert!(text.ends_with('\n') && text.lines().count() > 5, "{text}");
    assert_eq!(timeless(&place).len(), text.lines().count());
}
