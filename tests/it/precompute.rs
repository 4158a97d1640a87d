//! `coffey precompute` as a user runs it: the quickstart's shards out of the embedded S3 server, latent shards into a folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

const CONFIG: &str = "configs/precompute-quickstart.toml";

/// Runs `coffey precompute` in the repository's root, with no scheduler around it.
fn precompute(output: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coffey"));
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["precompute", "-c", CONFIG, "-s"])
        .arg(format!("latents.output={}", output.display()))
        .args(args);
    for variable in [
        "RANK",
        "OMPI_COMM_WORLD_RANK",
        "SLURM_PROCID",
        "SLURM_ARRAY_TASK_ID",
        "JOB_COMPLETION_INDEX",
    ] {
        command.env_remove(variable);
    }
    command.output().unwrap()
}

fn succeeded(output: Output) -> String {
    let messages = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{messages}");
    messages
}

fn refused(output: &Output, code: i32, words: &[&str]) {
    let messages = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{messages}");
    for word in words {
        assert!(messages.contains(word), "{word:?} is not in: {messages}");
    }
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().flatten();
    files
        .filter(|file| file.path().is_file())
        .map(|file| {
            let name = file.file_name().to_str().unwrap().to_owned();
            (name, fs::read(file.path()).unwrap())
        })
        .collect()
}

#[test]
fn shards_become_latent_shards_and_are_not_made_twice() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("latents");
    let result = precompute(&output, &["-s", "latents.text=both"]);
    assert_eq!(
        String::from_utf8_lossy(&result.stdout).trim(),
        output.to_str().unwrap()
    );
    let messages = succeeded(result);
    assert!(
        messages.contains("4 shards, 4 of them new") && messages.contains("459 samples"),
        "{messages}"
    );
    let first = files(&output);
    let names: Vec<&str> = first.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "00000.tar",
            "00001.tar",
            "00002.tar",
            "00003.tar",
            "manifest.json"
        ]
    );
    let manifest: Value = serde_json::from_slice(&first["manifest.json"]).unwrap();
    assert_eq!(manifest["latent"]["shape"], serde_json::json!([8, 16, 16]));
    assert_eq!(
        manifest["shards"]["00003.tar"]["source"],
        "s3://emoji/00003.tar"
    );
    assert_eq!(manifest["shards"]["00003.tar"]["samples"], 114);

    fs::remove_file(output.join("00002.tar")).unwrap();
    let messages = succeeded(precompute(
        &output,
        &["-s", "latents.text=both", "-s", "encode.batch_size=7"],
    ));
    assert!(
        messages.contains("3 shards already in") && messages.contains("1 of them new"),
        "{messages}"
    );
    assert!(files(&output) == first);
    let messages = succeeded(precompute(&output, &["-s", "latents.text=both"]));
    assert!(messages.contains("0 of them new"), "{messages}");

    let other = precompute(&output, &["-s", "latents.text=embeds"]);
    refused(
        &other,
        2,
        &[
            "text = \"both\", and now it is \"embeds\"",
            "latents.output",
        ],
    );
    assert!(files(&output) == first);
    inspected(&output);
    estimated(&output, &manifest);
    let shards = (0..4).map(|n| format!("assets/quickstart/emoji/0000{n}.tar"));
    read_with_python(&output, shards.map(PathBuf::from));
}

#[test]
fn several_crops_of_an_image_lie_together() {
    let folder = TempDir::new().unwrap();
    let (shard, output) = (
        folder.path().join("wide.tar"),
        folder.path().join("latents"),
    );
    wide_images(&shard, 3);
    let data = format!("data.shards={}", shard.display());
    let settings = ["latents.crops=4", "image.crop=random", "image.flip=true"];
    let settings = std::iter::once(data.as_str()).chain(settings);
    let args: Vec<&str> = settings.flat_map(|setting| ["-s", setting]).collect();
    succeeded(precompute(&output, &args));
    let seen = inspect(&output);
    assert_eq!(seen["shards"][0]["latents"]["samples"], 3, "{seen}");

    let mut written = tar::Archive::new(fs::File::open(output.join("wide.tar")).unwrap());
    let mut crops = 0;
    for entry in written.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().extension().unwrap() != "json" {
            continue;
        }
        let json: Value = serde_json::from_reader(&mut entry).unwrap();
        let lefts = json["coffey"]["crop_left"].as_array().unwrap();
        assert_eq!(lefts.len(), 4);
        // 128 pixels wide once 64 are high.
        assert!(lefts.iter().any(|left| left != &lefts[0]), "{json}");
        assert_eq!(json["coffey"]["flipped"].as_array().unwrap().len(), 4);
        crops += lefts.len();
    }
    assert_eq!(crops, 12);
    read_with_python(&output, [shard]);
}

/// A shard of `count` captioned images, 160 by 80 pixels, each pixel another colour.
fn wide_images(shard: &Path, count: u32) {
    let mut tar = tar::Builder::new(fs::File::create(shard).unwrap());
    for key in 0..count {
        let colour =
            |x, y| image::Rgb([(3 * x + 40 * key) as u8, (2 * y) as u8, (x * y / 50) as u8]);
        let mut png = std::io::Cursor::new(Vec::new());
        image::RgbImage::from_fn(160, 80, colour)
            .write_to(&mut png, image::ImageFormat::Png)
            .unwrap();
        let caption = format!("wide picture {key}").into_bytes();
        for (extension, content) in [("png", png.into_inner()), ("txt", caption)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            let name = format!("{key:05}.{extension}");
            tar.append_data(&mut header, name, content.as_slice())
                .unwrap();
        }
    }
    tar.finish().unwrap();
}

/// What `coffey check` says beforehand, against what there is.
fn estimated(latents: &Path, manifest: &Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coffey"));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args(["check", "-c", CONFIG, "--json", "-s"]);
    command.arg(format!("latents.output={}", latents.display()));
    let report: Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
    let cost = &report["cost"];
    assert_eq!(
        (&cost["shards"], &cost["reads"]),
        (&4.into(), &4.into()),
        "{report}"
    );
    assert_eq!((&cost["writes"], &cost["lists"]), (&0.into(), &1.into()));
    let sum = |what: &str| -> f64 {
        let shards = manifest["shards"].as_object().unwrap().values();
        shards.map(|shard| shard[what].as_f64().unwrap()).sum()
    };
    for (estimate, what) in [("samples", "samples"), ("output_bytes", "bytes")] {
        let (estimate, real) = (cost[estimate].as_f64().unwrap(), sum(what));
        assert!(
            (estimate / real - 1.0).abs() < 0.15,
            "{what}: {estimate} for {real}"
        );
    }
}

fn inspect(latents: &Path) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coffey"));
    let shards = format!("{}/", latents.display());
    let output = command
        .args(["inspect", "--json", &shards])
        .output()
        .unwrap();
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What `coffey inspect` says of latent shards, sound and damaged.
fn inspected(latents: &Path) {
    let report = inspect(latents);
    let totals = &report["totals"];
    assert_eq!(totals["problems"], 0, "{totals}");
    assert_eq!(totals["latents"]["samples"], 459);
    let arrays = &totals["latents"]["arrays"];
    assert_eq!(arrays["latent.npy <f2 [8, 16, 16]"], 459);
    assert_eq!(arrays["prompt_embeds.npy <f2 [77, 64]"], 459);
    let channels = totals["latents"]["channels"].as_array().unwrap();
    assert_eq!(channels.len(), 8);
    assert!(
        channels
            .iter()
            .all(|channel| channel["std"].as_f64().unwrap() > 0.0)
    );
    let (_, manifest) = report["manifests"]
        .as_object()
        .unwrap()
        .iter()
        .next()
        .unwrap();
    assert!(
        manifest["fingerprint"]["vae"]
            .as_str()
            .unwrap()
            .starts_with("sha256:")
    );

    // A number of the first array becomes NaN, the second array another type; the tar itself stays sound.
    let copy = TempDir::new().unwrap();
    for (name, content) in files(latents) {
        fs::write(copy.path().join(name), content).unwrap();
    }
    let shard = copy.path().join("00000.tar");
    let mut bytes = fs::read(&shard).unwrap();
    let header = b"\x93NUMPY";
    let mut arrays = (0..bytes.len()).filter(|&at| bytes[at..].starts_with(header));
    let (first, second) = (arrays.next().unwrap(), arrays.nth(1).unwrap());
    bytes[first + 128..first + 130].copy_from_slice(&[0, 0x7e]);
    let dtype = bytes[second..]
        .windows(3)
        .position(|word| word == b"<f2")
        .unwrap();
    bytes[second + dtype..][..3].copy_from_slice(b"<i2");
    fs::write(&shard, bytes).unwrap();
    fs::remove_file(copy.path().join("00001.tar")).unwrap();
    fs::copy(copy.path().join("00003.tar"), copy.path().join("00001.tar")).unwrap();
    let totals = &inspect(copy.path())["totals"];
    let kinds = &totals["problems_by_kind"];
    assert_eq!(kinds["not_finite"], 1, "{kinds}");
    assert_eq!(kinds["bad_array"], 1, "{kinds}");
    // One array of 00000.tar, and 00001.tar is not what it was.
    assert!(
        kinds["other_than_manifest"].as_u64().unwrap() >= 2,
        "{kinds}"
    );
    let mean = &totals["latents"]["channels"][0]["mean"];
    assert!(mean.as_f64().unwrap().is_finite());
}

/// With the Python that `COFFEY_PYTHON` names, which has webdataset and perhaps PyTorch and diffusers.
fn read_with_python(latents: &Path, images: impl IntoIterator<Item = PathBuf>) {
    let Some(python) = std::env::var_os("COFFEY_PYTHON") else {
        eprintln!("COFFEY_PYTHON is not set: not read with webdataset");
        return;
    };
    let status = Command::new(python)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .arg("tests/reference/read_latents.py")
        .arg(latents)
        .arg("--images")
        .args(images)
        .arg("--pipeline")
        .arg("assets/quickstart/teacher")
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn ranks_share_the_shards() {
    let folder = TempDir::new().unwrap();
    let shards = ["-s", "data.shards=s3://emoji/{00000..00002}.tar"];
    succeeded(precompute(
        folder.path(),
        &[&shards[..], &["--rank", "0", "--world", "2"]].concat(),
    ));
    let names: Vec<String> = files(folder.path()).into_keys().collect();
    assert_eq!(names, ["00000.tar", "00002.tar", "manifest-0-of-2.json"]);
    let finish = [&shards[..], &["--finish"]].concat();
    refused(
        &precompute(folder.path(), &finish),
        1,
        &["1 of 3 shards missing: 00001.tar;"],
    );
    let last = [&shards[..], &["--rank", "1", "--world", "2"]].concat();
    succeeded(precompute(folder.path(), &last));
    let names: Vec<String> = files(folder.path()).into_keys().collect();
    assert_eq!(
        names,
        ["00000.tar", "00001.tar", "00002.tar", "manifest.json"]
    );
    let said = succeeded(precompute(folder.path(), &finish));
    assert!(said.contains("all 3 shards there"), "{said}");
    let empty = TempDir::new().unwrap();
    refused(
        &precompute(empty.path(), &finish),
        2,
        &["holds no manifest", "latents.output"],
    );
    let result = precompute(folder.path(), &["--rank", "0", "--world", "5"]);
    refused(&result, 2, &["4 shards", "5 ranks"]);
    refused(
        &precompute(folder.path(), &["--rank", "2", "--world", "2"]),
        2,
        &["rank 2 of 2"],
    );
    refused(
        &precompute(folder.path(), &["--rank", "0"]),
        2,
        &["--world"],
    );
}

#[test]
fn mistakes_end_with_one_clear_message() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let missing = ["-s", "data.shards=s3://emoji/none.tar"];
    let result = precompute(&out, &missing);
    assert!(!result.status.success());
    let messages = String::from_utf8_lossy(&result.stderr);
    assert!(messages.contains("s3://emoji/none.tar"), "{messages}");
    fs::write(folder.path().join("text.tar"), "not a tar at all").unwrap();
    let shard = format!("data.shards={}", folder.path().join("text.tar").display());
    refused(&precompute(&out, &["-s", &shard]), 1, &["text.tar", "tar"]);
    assert!(
        !files(&out)
            .keys()
            .any(|name| name.ends_with(".tar") || name.starts_with('.'))
    );
    refused(
        &precompute(&out, &["-s", "model.teacher=nowhere"]),
        2,
        &["model.teacher", "nowhere"],
    );
    fs::create_dir(folder.path().join("empty")).unwrap();
    let teacher = format!("model.teacher={}", folder.path().join("empty").display());
    refused(
        &precompute(&out, &["-s", &teacher]),
        1,
        &["vae", "no weights found"],
    );
}

#[cfg(unix)]
#[test]
fn a_signal_stops_it_without_half_shards() {
    let folder = TempDir::new().unwrap();
    let log = fs::File::create(folder.path().join("log")).unwrap();
    let out = folder.path().join("out");
    let mut child = Command::new(env!("CARGO_BIN_EXE_coffey"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args([
            "precompute",
            "-c",
            CONFIG,
            "--rank",
            "0",
            "--world",
            "1",
            "-s",
            "encode.batch_size=1",
        ])
        .args(["-s", &format!("latents.output={}", out.display())])
        .stderr(log)
        .spawn()
        .unwrap();
    let begun = || fs::read_dir(&out).is_ok_and(|files| files.count() > 1);
    while !begun() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let killed = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    let status = child.wait().unwrap();
    let messages = fs::read_to_string(folder.path().join("log")).unwrap();
    assert_eq!(status.code(), Some(143), "{messages}");
    let manifest: Value = serde_json::from_slice(&files(&out)["manifest.json"]).unwrap();
    let listed: Vec<&String> = manifest["shards"].as_object().unwrap().keys().collect();
    let there: Vec<String> = files(&out)
        .into_keys()
        .filter(|name| name != "manifest.json")
        .collect();
    assert_eq!(there.iter().collect::<Vec<_>>(), listed);
}
