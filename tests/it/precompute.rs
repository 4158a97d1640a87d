//! `coffey precompute`: shards from the embedded S3 server, latent shards into a folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    NO_PICTURES, PRECOMPUTE, QUICKSTART, args, command, messages, python, refused, run, says,
    succeed_json, terminate, text,
};

/// `coffey precompute` into `output`.
fn precompute(output: &Path, args: &[&str]) -> Command {
    let output = format!("latents.output={}", output.display());
    let mut command = command(&["precompute", "-c", PRECOMPUTE, "-s", &output]);
    command.args(args);
    command
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
fn precompute_writes_each_latent_shard_once() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("latents");
    let (out, err) = run(precompute(&output, &["-s", "latents.text=both"]), 0);
    assert_eq!(out.trim(), text(&output));
    says(&err, &["4 shards, 4 of them new", "459 samples"]);
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
    let said = messages(precompute(
        &output,
        &["-s", "latents.text=both", "-s", "encode.batch_size=7"],
    ));
    says(&said, &["3 shards already in", "1 of them new"]);
    assert!(files(&output) == first);
    let said = messages(precompute(&output, &["-s", "latents.text=both"]));
    says(&said, &["0 of them new"]);

    refused(
        precompute(&output, &["-s", "latents.text=embeds"]),
        2,
        &[
            "text = \"both\", and now it is \"embeds\"",
            "latents.output",
        ],
    );
    assert!(files(&output) == first);
    check_inspect(&output);
    check_estimate(&output, &manifest);
}

/// Writes latents with four crops of each image of a shard of three; returns the shard and the latents' folder.
fn precompute_crops(folder: &TempDir) -> (PathBuf, PathBuf) {
    let at = |name: &str| folder.path().join(name);
    let (shard, output) = (at("wide.tar"), at("latents"));
    wide_images(&shard, 3);
    let data = format!("data.shards={}", shard.display());
    let settings = ["latents.crops=4", "image.crop=random", "image.flip=true"];
    let settings = std::iter::once(data.as_str()).chain(settings);
    let args: Vec<&str> = settings.flat_map(|setting| ["-s", setting]).collect();
    messages(precompute(&output, &args));
    (shard, output)
}

#[test]
fn crops_of_one_image_share_a_sample() {
    let folder = TempDir::new().unwrap();
    let (_, output) = precompute_crops(&folder);
    let report = inspect(&output);
    assert_eq!(report["shards"][0]["latents"]["samples"], 3, "{report}");

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
        // The resized image is 128 pixels wide and 64 high.
        assert!(lefts.iter().any(|left| left != &lefts[0]), "{json}");
        assert_eq!(json["coffey"]["flipped"].as_array().unwrap().len(), 4);
        crops += lefts.len();
    }
    assert_eq!(crops, 12);
}

#[test]
fn repeated_keys_are_written_once_and_counted() {
    let folder = TempDir::new().unwrap();
    let (shard, output) = (
        folder.path().join("twice.tar"),
        folder.path().join("latents"),
    );
    wide_images_of(&shard, [0, 0, 1, 2, 2, 2, 0], "png");
    let data = format!("data.shards={}", shard.display());
    messages(precompute(&output, &["-s", &data]));
    let mut written = tar::Archive::new(fs::File::open(output.join("twice.tar")).unwrap());
    let mut keys: Vec<String> = Vec::new();
    for entry in written.entries().unwrap() {
        let entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        if name.ends_with(".txt") {
            keys.push(name);
        }
    }
    assert_eq!(keys, ["00000.txt", "00001.txt", "00002.txt", "00000.txt"]);
    let manifest: Value = serde_json::from_slice(&files(&output)["manifest.json"]).unwrap();
    let entry = &manifest["shards"]["twice.tar"];
    assert_eq!(entry["samples"], 4, "{entry}");
    assert_eq!(entry["skipped"], serde_json::json!({"duplicate_key": 3}));
    let list = fs::read_to_string(output.join("skipped/twice.tar.jsonl")).unwrap();
    assert_eq!(list.lines().count(), 3, "{list}");
}

#[test]
fn failed_precompute_lists_skipped_samples_and_takes_the_right_key() {
    let folder = TempDir::new().unwrap();
    let (shard, output) = (folder.path().join("odd.tar"), folder.path().join("latents"));
    wide_images_of(&shard, 0..3, "Photo");
    let data = format!("data.shards={}", shard.display());
    let list = output.join("skipped/odd.tar.jsonl");
    let said = refused(
        precompute(&output, &["-s", &data]),
        1,
        &[
            "no_image 3",
            "sample \"00000\"",
            "odd.tar, which has the members photo, txt",
            "add \"photo\" to data.image_keys",
        ],
    );
    says(&said, &["skipped samples are listed in", text(&list)]);
    let listed = fs::read_to_string(&list).unwrap();
    assert_eq!(
        listed.matches("\"reason\":\"no_image\"").count(),
        3,
        "{listed}"
    );
    // Nothing was written by the other keys, so that the place takes these.
    messages(precompute(
        &output,
        &["-s", &data, "-s", "data.image_keys=[\"photo\"]"],
    ));
    assert!(output.join("odd.tar").is_file() && !list.exists());
}

mod needs_python {
    use super::*;

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with webdataset, PyTorch and diffusers"]
    fn webdataset_reads_latents_of_repeated_keys() {
        let folder = TempDir::new().unwrap();
        let (shard, output) = (
            folder.path().join("twice.tar"),
            folder.path().join("latents"),
        );
        wide_images_of(&shard, [0, 0, 1, 1], "png");
        let data = format!("data.shards={}", shard.display());
        messages(precompute(&output, &["-s", &data]));
        let unique = folder.path().join("unique.tar");
        wide_images_of(&unique, [0, 1], "png");
        std::fs::rename(unique, &shard).unwrap();
        read_with_webdataset(&output, &[shard]);
    }

    /// Reads latent shards with webdataset and, where installed, compares them with diffusers' encoders.
    fn read_with_webdataset(latents: &Path, images: &[PathBuf]) {
        let mut args = vec![latents, Path::new("--images")];
        args.extend(images.iter().map(PathBuf::as_path));
        let teacher = Path::new("assets/quickstart/teacher");
        args.extend([Path::new("--pipeline"), teacher]);
        python("read_latents.py", &args);
    }

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with webdataset, PyTorch and diffusers"]
    fn latent_shards_equal_diffusers_encoders() {
        let folder = TempDir::new().unwrap();
        let output = folder.path().join("latents");
        messages(precompute(&output, &["-s", "latents.text=both"]));
        let shards = (0..4).map(|n| format!("assets/quickstart/emoji/0000{n}.tar"));
        let shards: Vec<_> = shards.map(PathBuf::from).collect();
        read_with_webdataset(&output, &shards);
    }

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with webdataset, PyTorch and diffusers"]
    fn latent_crops_equal_diffusers_encoders() {
        let folder = TempDir::new().unwrap();
        let (shard, output) = precompute_crops(&folder);
        read_with_webdataset(&output, &[shard]);
    }
}

/// A captioned image of 160 by 80 pixels in a shard, with a gradient of colours.
struct WideImage<'a> {
    key: u32,
    extension: &'a str,
    caption: String,
    json: Option<&'a [u8]>,
}

impl WideImage<'_> {
    fn new(key: u32) -> Self {
        Self {
            key,
            extension: "png",
            caption: format!("wide picture {key}"),
            json: None,
        }
    }
}

/// A shard of `count` images.
fn wide_images(shard: &Path, count: u32) {
    write_wide_images(shard, (0..count).map(WideImage::new));
}

/// As [`wide_images`], with captions by the image's number.
fn captioned_images(shard: &Path, count: u32, caption: impl Fn(u32) -> String) {
    let image = |key| WideImage {
        caption: caption(key),
        ..WideImage::new(key)
    };
    write_wide_images(shard, (0..count).map(image));
}

/// A shard with one image for each of `keys`, under names that end in `extension`.
fn wide_images_of(shard: &Path, keys: impl IntoIterator<Item = u32>, extension: &str) {
    let image = |key| WideImage {
        extension,
        ..WideImage::new(key)
    };
    write_wide_images(shard, keys.into_iter().map(image));
}

/// A shard with one image for each of `jsons`.
fn wide_images_with(shard: &Path, jsons: &[Option<&[u8]>]) {
    let image = |(key, &json)| WideImage {
        json,
        ..WideImage::new(key)
    };
    write_wide_images(shard, (0..).zip(jsons).map(image));
}

fn write_wide_images<'a>(shard: &Path, images: impl Iterator<Item = WideImage<'a>>) {
    let mut tar = tar::Builder::new(fs::File::create(shard).unwrap());
    for WideImage {
        key,
        extension,
        caption,
        json,
    } in images
    {
        let colour =
            |x, y| image::Rgb([(3 * x + 40 * key) as u8, (2 * y) as u8, (x * y / 50) as u8]);
        let mut png = std::io::Cursor::new(Vec::new());
        image::RgbImage::from_fn(160, 80, colour)
            .write_to(&mut png, image::ImageFormat::Png)
            .unwrap();
        let members = [(extension, png.into_inner()), ("txt", caption.into_bytes())];
        let json = json.map(|json| ("json", json.to_vec()));
        for (extension, content) in members.into_iter().chain(json) {
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

#[test]
fn captions_with_too_many_tokens_are_counted() {
    let folder = TempDir::new().unwrap();
    let shard = folder.path().join("long.tar");
    // 75 tokens fit; each exclamation mark is one.
    captioned_images(&shard, 3, |key| match key {
        0 => format!("wide picture {key}{}", " !".repeat(60)),
        _ => format!("wide picture {key}{}", " !".repeat(76)),
    });
    let data = format!("data.shards={}", shard.display());
    let printed = messages(precompute(&folder.path().join("latents"), &["-s", &data]));
    assert!(
        printed.contains("2 captions of this process cut"),
        "{printed}"
    );
    let run = format!("train.output={}", folder.path().join("run").display());
    let own = [
        data.as_str(),
        run.as_str(),
        "train.batch_size=3",
        "train.max_steps=1",
    ];
    let printed = messages(command(&args(
        "train",
        QUICKSTART,
        own.iter().chain(NO_PICTURES.iter()),
    )));
    assert!(
        printed.contains("captions cut, with too many tokens: "),
        "{printed}"
    );
}

/// Compares the estimate of `coffey check` with the latents that were written.
fn check_estimate(latents: &Path, manifest: &Value) {
    let output = format!("latents.output={}", latents.display());
    let report = succeed_json(&["check", "-c", PRECOMPUTE, "--json", "-s", &output]);
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
    succeed_json(&["inspect", "--json", &format!("{}/", latents.display())])
}

/// Checks the report of `coffey inspect` on sound latent shards and on damaged ones.
fn check_inspect(latents: &Path) {
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

    // The first array gets a NaN and the second another type; the tar itself stays sound.
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
    let shards = format!("{}/", copy.path().display());
    let (report, said) = run(command(&["inspect", "--json", &shards]), 1);
    says(&said, &["shards that differ from the manifest: 2 of 4"]);
    let report: Value = serde_json::from_str(&report).unwrap();
    let totals = &report["totals"];
    let kinds = &totals["problems_by_kind"];
    assert_eq!(kinds["not_finite"], 1, "{kinds}");
    assert_eq!(kinds["bad_array"], 1, "{kinds}");
    // One array of 00000.tar, and the replaced 00001.tar.
    assert!(
        kinds["other_than_manifest"].as_u64().unwrap() >= 2,
        "{kinds}"
    );
    let mean = &totals["latents"]["channels"][0]["mean"];
    assert!(mean.as_f64().unwrap().is_finite());
}

#[test]
fn precompute_keeps_every_json() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let jsons: [(&[u8], &str); 6] = [
        (
            br#"{"a": NaN, "b": -Infinity, "c": 1e400, "d": 12345678901234567890, "e": 0.10}"#,
            r#"{"a":NaN,"b":-Infinity,"c":1e400,"d":12345678901234567890,"e":0.10,"#,
        ),
        (b"\xEF\xBB\xBF{\"a\": \"\\ud800\"}", r#"{"a":"\ud800","#),
        (b"\xFF\xFE{\0\"\0a\0\"\0:\x001\0}\0", r#"{"a":1,"#),
        (br#"{"a": 1, "a": 2}"#, r#"{"a":1,"a":2,"#),
        (b"[NaN]", r#"{"json":[NaN],"#),
        (b"{\"a\": \xFF", r#"{"unreadable_json":"{\"a\": \udcff","#),
    ];
    let contents: Vec<_> = jsons.iter().map(|(json, _)| Some(*json)).collect();
    wide_images_with(&at("odd.tar"), &contents);
    let data = format!("data.shards={}", at("odd.tar").display());
    let output = at("latents");
    messages(precompute(&output, &["-s", &data]));

    let mut written = tar::Archive::new(fs::File::open(output.join("odd.tar")).unwrap());
    let mut texts = Vec::new();
    for entry in written.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().extension().unwrap() == "json" {
            texts.push(std::io::read_to_string(&mut entry).unwrap());
        }
    }
    assert_eq!(texts.len(), jsons.len());
    for (text, (_, kept)) in texts.iter().zip(jsons) {
        let expected = format!("{kept}\"coffey\":{{\"original_width\":160,");
        assert!(text.starts_with(&expected), "{text}");
    }
}

#[test]
fn precompute_ranks_share_shards() {
    let folder = TempDir::new().unwrap();
    let shards = ["-s", "data.shards=s3://emoji/{00000..00002}.tar"];
    messages(precompute(
        folder.path(),
        &[&shards[..], &["--rank", "0", "--world", "2"]].concat(),
    ));
    let names: Vec<String> = files(folder.path()).into_keys().collect();
    assert_eq!(names, ["00000.tar", "00002.tar", "manifest-0-of-2.json"]);
    let finish = [&shards[..], &["--finish"]].concat();
    refused(
        precompute(folder.path(), &finish),
        1,
        &["1 of 3 shards missing: 00001.tar;"],
    );
    let last = [&shards[..], &["--rank", "1", "--world", "2"]].concat();
    messages(precompute(folder.path(), &last));
    let names: Vec<String> = files(folder.path()).into_keys().collect();
    assert_eq!(
        names,
        ["00000.tar", "00001.tar", "00002.tar", "manifest.json"]
    );
    let said = messages(precompute(folder.path(), &finish));
    says(&said, &["all 3 shards there"]);
    let empty = TempDir::new().unwrap();
    refused(
        precompute(empty.path(), &finish),
        2,
        &["holds no manifest", "latents.output"],
    );
    refused(
        precompute(folder.path(), &["--rank", "0", "--world", "5"]),
        2,
        &["4 shards", "5 ranks"],
    );
    refused(
        precompute(folder.path(), &["--rank", "2", "--world", "2"]),
        2,
        &["rank 2 of 2"],
    );
    refused(precompute(folder.path(), &["--rank", "0"]), 2, &["--world"]);
}

#[test]
fn precompute_refuses_bad_input() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let missing = ["-s", "data.shards=s3://emoji/none.tar"];
    refused(precompute(&out, &missing), 1, &["s3://emoji/none.tar"]);
    // All at once, and only those of the rank.
    let gaps = ["-s", "data.shards=s3://emoji/{00002..00006}.tar"];
    refused(
        precompute(&out, &gaps),
        1,
        &["3 of 5 shards", "00004.tar", "00005.tar", "00006.tar"],
    );
    let share = [&gaps[..], &["--rank", "0", "--world", "2"]].concat();
    let said = refused(
        precompute(&out, &share),
        1,
        &["2 of 3 shards", "00004.tar", "00006.tar"],
    );
    assert!(!said.contains("00005.tar"), "{said}");
    fs::write(folder.path().join("text.tar"), "not a tar at all").unwrap();
    let shard = format!("data.shards={}", folder.path().join("text.tar").display());
    let text = ["text.tar", "is not a tar: it is text (not a tar at all)"];
    refused(precompute(&out, &["-s", &shard]), 1, &text);
    assert!(
        !files(&out)
            .keys()
            .any(|name| name.ends_with(".tar") || name.starts_with('.'))
    );
    refused(
        precompute(&out, &["-s", "model.teacher=nowhere"]),
        2,
        &["model.teacher", "nowhere"],
    );
    fs::create_dir(folder.path().join("empty")).unwrap();
    let teacher = format!("model.teacher={}", folder.path().join("empty").display());
    refused(
        precompute(&out, &["-s", &teacher]),
        1,
        &["no folder tokenizer", "no folder vae", "diffusers layout"],
    );
}

#[test]
fn sigterm_leaves_no_partial_latent_shard() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let args = ["--rank", "0", "--world", "1", "-s", "encode.batch_size=1"];
    let mut child: Child = precompute(&out, &args)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let writes = || fs::read_dir(&out).is_ok_and(|files| files.count() > 1);
    while !writes() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    terminate(&child);
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(143), "{err}");
    let manifest: Value = serde_json::from_slice(&files(&out)["manifest.json"]).unwrap();
    let listed: Vec<&String> = manifest["shards"].as_object().unwrap().keys().collect();
    let written: Vec<String> = files(&out)
        .into_keys()
        .filter(|name| name != "manifest.json")
        .collect();
    assert_eq!(written.iter().collect::<Vec<_>>(), listed);
}
