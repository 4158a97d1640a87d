//! `coffey pack`, and the other commands on a folder of images.

use std::fs;
use std::io::Read;
use std::path::Path;

use serde_json::json;
use tempfile::TempDir;

use crate::support::{
    QUICKSTART, args, command, messages, python, refuse, repository, run, says, succeed,
    succeed_json, text,
};

/// The first `count` samples of a shard of the quickstart, as files below `folder`.
fn unpack(folder: &Path, count: usize) {
    let shard = fs::File::open(repository("assets/quickstart/emoji/00000.tar")).unwrap();
    let mut archive = tar::Archive::new(shard);
    // A sample has three members.
    for entry in archive.entries().unwrap().take(3 * count) {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().into_owned();
        let at = folder.join(format!("set {}", name.to_string_lossy().as_bytes()[4] % 2));
        fs::create_dir_all(&at).unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        if name
            .extension()
            .is_some_and(|extension| extension != "json")
        {
            fs::write(at.join(name), content).unwrap();
        }
    }
}

#[test]
fn packed_folder_is_inspected_as_the_folder() {
    let root = TempDir::new().unwrap();
    let (folder, out) = (root.path().join("photos"), root.path().join("out"));
    unpack(&folder, 20);
    fs::write(folder.join("lonely.png"), "").unwrap();
    let pack = [
        "pack",
        text(&folder),
        "--out",
        text(&out),
        "--samples-per-shard",
        "8",
    ];
    let (printed, said) = run(command(&pack), 0);
    assert_eq!(printed, format!("{}/\n", out.display()));
    says(
        &said,
        &[
            "20 samples in 3 shards",
            "left out: no_caption 1 (the first is \"lonely\"",
        ],
    );
    says(&messages(command(&pack)), &["3 shards already in"]);

    let inspected = |path: &Path| {
        let totals =
            succeed_json(&["inspect", &format!("{}/", path.display()), "--json"])["totals"].take();
        let keys = ["width", "height", "caption_chars", "formats"];
        (
            totals["samples"].as_u64(),
            keys.map(|key| totals[key].clone()),
        )
    };
    fs::remove_file(folder.join("lonely.png")).unwrap();
    let (of_folder, of_shards) = (inspected(&folder), inspected(&out));
    assert_eq!(of_folder, of_shards);
    assert_eq!(of_folder.0, Some(20));

    let data = format!("data.shards={}/", folder.display());
    let bench = args("bench", QUICKSTART, [&*data, "data.resample_shards=false"]);
    let extra = ["--samples", "16", "--json"].map(str::to_owned);
    let report = succeed_json(&[bench, extra.to_vec()].concat());
    assert_eq!(report["samples"], json!(16));
}

#[test]
fn pack_writes_to_s3() {
    let root = TempDir::new().unwrap();
    let folder = root.path().join("photos");
    unpack(&folder, 9);
    fs::create_dir_all(root.path().join("cloud/bucket")).unwrap();
    let embedded = format!("s3.embedded_root={}", root.path().join("cloud").display());
    let printed = succeed(&[
        "pack",
        text(&folder),
        "-o",
        "s3://bucket/x",
        "-s",
        &embedded,
    ]);
    assert_eq!(printed, "s3://bucket/x/\n");
    let report = succeed_json(&["inspect", "s3://bucket/x/", "-s", &embedded, "--json"]);
    assert_eq!(report["totals"]["samples"], json!(9));
    assert_eq!(report["totals"]["problems"], json!(0));
}

#[test]
fn pack_refuses_what_it_cannot_do() {
    let root = TempDir::new().unwrap();
    let (out, photos) = (root.path().join("out"), root.path().join("photos"));
    let into =
        |folder: &Path, out: &Path| ["pack", text(folder), "--out", text(out)].map(str::to_owned);
    let pack = |folder: &Path| into(folder, &out);
    fs::create_dir(&photos).unwrap();
    refuse(
        1,
        &pack(&root.path().join("nowhere")),
        &["nowhere", "No such file"],
    );
    refuse(
        1,
        &pack(&photos),
        &["no images (data.image_keys = ", "but no files"],
    );
    fs::write(photos.join("a.pdf"), "").unwrap();
    refuse(1, &pack(&photos), &["but 1 other file", "a.pdf"]);
    fs::write(photos.join("0.tar"), "").unwrap();
    refuse(
        1,
        &pack(&photos),
        &["pack takes a folder of images; this one holds shards"],
    );
    fs::remove_file(photos.join("0.tar")).unwrap();
    let image = photos.join("a.jpg");
    fs::write(&image, "").unwrap();
    refuse(1, &pack(&photos), &["no image can be packed: no_caption 1"]);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    refuse(2, &pack(&image), &["is a file"]);
    refuse(
        2,
        &pack(Path::new("s3://bucket/photos/")),
        &["pack reads local folders only; copy it first"],
    );
    refuse(2, &into(&photos, &photos), &["is in the folder of images"]);
    refuse(
        2,
        &into(&photos, &photos.join("new")),
        &["is in the folder of images"],
    );
    refuse(2, &into(&photos, &image), &["is a file, not a folder"]);
    let (_, said) = run(
        command(&["pack", "x", "--out", "y", "--samples-per-shard", "0"]),
        2,
    );
    says(&said, &["--samples-per-shard"]);
    fs::write(out.join("0.tar"), "").unwrap();
    refuse(2, &pack(&photos), &["0.tar was not made by coffey pack"]);
}

#[test]
fn output_in_the_folder_of_images_is_refused() {
    let root = TempDir::new().unwrap();
    let folder = root.path().join("photos");
    unpack(&folder, 2);
    let shards = format!("data.shards={}/", text(&folder));
    for (command, key, place) in [
        ("train", "train.output", ""),
        ("train", "train.output", "runs/a"),
        ("precompute", "latents.output", "latents"),
    ] {
        let output = format!("{key}={}", text(&folder.join(place)));
        refuse(
            2,
            &args(command, QUICKSTART, [&shards, &output]),
            &[key, "is in the folder of images"],
        );
    }
}

mod needs_python {
    use super::*;

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with webdataset"]
    fn webdataset_reads_packed_shards() {
        let root = TempDir::new().unwrap();
        let (folder, out) = (root.path().join("photos"), root.path().join("out"));
        unpack(&folder, 30);
        fs::write(folder.join("lonely.png"), "").unwrap();
        succeed(&[
            "pack",
            text(&folder),
            "--out",
            text(&out),
            "--samples-per-shard",
            "11",
        ]);
        python("read_packed.py", &[&folder, &out]);
    }
}
