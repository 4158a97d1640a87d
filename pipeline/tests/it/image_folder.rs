//! Folders of images as sources, and the shards that are packed of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::support::{Bench, config, keys, picture, pixels, sequential, urls};
use coffey_pipeline::pack::{PackError, Packed, pack};
use coffey_pipeline::{Batch, CropMode, S3Options, ShardUrl, StreamConfig};

/// A folder of `count` images with captions, below one another.
fn folder(count: u32) -> TempDir {
    let root = TempDir::new().unwrap();
    for n in 0..count {
        let at = root.path().join(format!("part {}", n % 3));
        fs::create_dir_all(&at).unwrap();
        fs::write(at.join(format!("v1.{n}.PNG")), picture(n, 20 + n % 5, 24)).unwrap();
        fs::write(at.join(format!("v1.{n}.txt")), format!("picture {n}\r\n")).unwrap();
    }
    root
}

fn listed(bench: &Bench, root: &Path) -> Vec<ShardUrl> {
    let url = urls(&format!("{}/", root.display()));
    bench.runtime.block_on(bench.sources.list(&url)).unwrap()
}

fn packed(
    bench: &Bench,
    root: &Path,
    out: &str,
    samples_per_shard: usize,
) -> Result<Packed, PackError> {
    let runtime = bench.runtime.handle();
    let place = bench.sources.destination(out, runtime).unwrap();
    let cancel = CancellationToken::new();
    let folder = ShardUrl::file(root);
    pack(
        &bench.sources,
        &folder,
        &place,
        samples_per_shard,
        (runtime, &cancel),
        |_, _| {},
    )
}

/// The captions and pixels of all samples, in order.
fn content(bench: &Bench, shards: Vec<ShardUrl>) -> Vec<(String, Vec<u8>)> {
    let mut whole = sequential(shards);
    whole.image.crop = CropMode::Center;
    whole.image.flip = false;
    whole.batch_size = 1;
    let batches = bench.all(whole).unwrap();
    let pair = |batch: &Batch| (batch.samples[0].caption.clone(), pixels(batch).to_vec());
    batches.iter().map(pair).collect()
}

fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(root).unwrap().map(|entry| entry.unwrap());
    let pair = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        (name, fs::read(entry.path()).unwrap())
    };
    entries.map(pair).collect()
}

#[test]
fn stream_of_a_folder_is_the_stream_of_its_packed_shards() {
    let root = folder(50);
    let bucket = TempDir::new().unwrap();
    fs::create_dir(bucket.path().join("data")).unwrap();
    let bench = Bench::embedded(bucket.path());
    let shards = listed(&bench, root.path());
    assert_eq!(shards.len(), 7);
    let of_folder = content(&bench, shards);
    assert_eq!(of_folder.len(), 50);
    assert_eq!(of_folder[0].0, "picture 0\r\n");

    let local = TempDir::new().unwrap();
    let out = local.path().join("packed");
    let counts = packed(&bench, root.path(), out.to_str().unwrap(), 20).unwrap();
    assert_eq!((counts.samples, counts.shards, counts.seen), (50, 3, 50));
    assert_eq!(content(&bench, listed(&bench, &out)), of_folder);

    packed(&bench, root.path(), "s3://data/packed", 20).unwrap();
    assert_eq!(files(&bucket.path().join("data/packed")), files(&out));
}

#[test]
fn packed_sample_has_the_keys_of_img2dataset() {
    let root = TempDir::new().unwrap();
    let image = picture(1, 30, 20);
    fs::write(root.path().join("a.png"), &image).unwrap();
    fs::write(root.path().join("a.caption"), "a \"cat\"").unwrap();
    let json =
        r#"{"similarity": 0.25, "original_width": 900, "key": "old", "url": null, "x": NaN}"#;
    fs::write(root.path().join("a.json"), json).unwrap();
    let bench = Bench::new(S3Options::default());
    let out = TempDir::new().unwrap();
    packed(&bench, root.path(), out.path().to_str().unwrap(), 10).unwrap();
    let tar = fs::read(out.path().join("00000.tar")).unwrap();
    let mut archive = tar::Archive::new(tar.as_slice());
    let mut members = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
        members.push((name, content));
    }
    let names: Vec<&str> = members.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["000000000.json", "000000000.png", "000000000.txt"]);
    assert_eq!(members[1].1, image);
    assert_eq!(members[2].1, b"a \"cat\"");
    let json = String::from_utf8(members[0].1.clone()).unwrap();
    let (before, after) = json.split_once(r#""sha256":""#).unwrap();
    assert_eq!(
        before,
        r#"{"key":"000000000","url":"a.png","caption":"a \"cat\"","status":"success","error_message":null,"width":30,"height":20,"original_width":900,"original_height":20,"#
    );
    assert_eq!(&after[64..], r#"","similarity":0.25,"x":NaN}"#);
}

#[test]
fn pack_goes_on_and_refuses_other_files() {
    let root = folder(12);
    let bench = Bench::new(S3Options::default());
    let out = TempDir::new().unwrap();
    let target = out.path().to_str().unwrap();
    let first = packed(&bench, root.path(), target, 5).unwrap();
    assert_eq!((first.samples, first.shards, first.kept), (12, 3, 0));
    let made = files(out.path());

    // A shard without its counts was not finished.
    fs::remove_file(out.path().join("00001_stats.json")).unwrap();
    fs::write(out.path().join("00001.tar"), "half").unwrap();
    fs::remove_file(out.path().join("00002.tar")).unwrap();
    let again = packed(&bench, root.path(), target, 5).unwrap();
    assert_eq!(
        (again.samples, again.shards, again.kept, again.bytes),
        (12, 3, 1, first.bytes)
    );
    assert_eq!(files(out.path()), made);

    let refused = |bench: &Bench, samples_per_shard, words: &str| {
        let error = packed(bench, root.path(), target, samples_per_shard);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains(words) && error.ends_with("another --out"),
            "{error}"
        );
    };
    refused(&bench, 6, "--samples-per-shard 5");
    fs::write(root.path().join("part 0/v1.0.txt"), "another").unwrap();
    refused(&bench, 5, "00000.tar was made of other files");
    fs::remove_dir_all(root.path().join("part 2")).unwrap();
    // Each of the sources lists a folder once.
    refused(
        &Bench::new(S3Options::default()),
        5,
        "00002.tar was made of other files",
    );
    assert_eq!(files(out.path()), made);

    let foreign = TempDir::new().unwrap();
    fs::write(foreign.path().join("00000.tar"), "").unwrap();
    let error = packed(&bench, root.path(), foreign.path().to_str().unwrap(), 5).unwrap_err();
    assert!(
        error.to_string().contains("was not made by coffey pack"),
        "{error}"
    );
}

#[test]
fn pack_finishes_no_shard_of_files_it_could_not_read() {
    let root = folder(6);
    let out = TempDir::new().unwrap();
    let target = out.path().to_str().unwrap();
    let after_listing = |change: &dyn Fn()| {
        let bench = Bench::new(S3Options::default());
        let url = ShardUrl::file(root.path());
        let listing = bench.sources.image_shards(&url, 10);
        bench.runtime.block_on(listing).unwrap();
        change();
        packed(&bench, root.path(), target, 10)
    };
    let (part, aside) = (root.path().join("part 0"), root.path().join(".aside"));
    let error = after_listing(&|| {
        fs::rename(&part, &aside).unwrap();
        fs::write(&part, "").unwrap();
    });
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("part 0/v1.0.PNG: Not a directory"),
        "{error}"
    );
    assert!(files(out.path()).keys().eq(["pack.json"]));

    fs::remove_file(&part).unwrap();
    fs::rename(&aside, &part).unwrap();
    let caption = part.join("v1.0.txt");
    let counts = after_listing(&|| fs::remove_file(&caption).unwrap()).unwrap();
    assert_eq!(counts.samples, 5);
    assert_eq!(counts.gone, Some((1, caption.display().to_string())));
    assert!(files(out.path()).keys().eq(["00000.tar", "pack.json"]));

    fs::write(&caption, "again").unwrap();
    let counts = after_listing(&|| {}).unwrap();
    assert_eq!((counts.samples, counts.kept, counts.gone), (6, 0, None));
    let shard = &files(out.path())["00000.tar"];
    let url = br#""url":"part 0/v1.0.PNG""#;
    assert!(shard.windows(url.len()).any(|bytes| bytes == url));
}

#[test]
fn pack_counts_what_it_leaves_out() {
    let root = folder(3);
    let at = |name: &str| root.path().join(name);
    fs::write(at("lonely.jpg"), picture(9, 8, 8)).unwrap();
    fs::write(at("photo.heic"), b"\0\0\0\x18ftypheic\0\0\0\0mif1heic").unwrap();
    fs::write(at("photo.txt"), "a photo").unwrap();
    fs::write(at("empty.png"), "").unwrap();
    fs::write(at("empty.txt"), "empty").unwrap();
    fs::write(at("blank.png"), picture(8, 8, 8)).unwrap();
    fs::write(at("blank.txt"), "").unwrap();
    let bench = Bench::new(S3Options::default());
    let out = TempDir::new().unwrap();
    let target = out.path().to_str().unwrap();
    let counts = packed(&bench, root.path(), target, 100).unwrap();
    assert_eq!((counts.samples, counts.seen), (4, 7));
    let text = counts.describe_left_out();
    for words in [
        "decode_error 1 (the first is \"empty\"",
        "no_caption 1 (the first is \"lonely\"",
        "no_image 1 (the first is \"photo\"",
    ] {
        assert!(text.contains(words), "{text}");
    }
    let kept = packed(&bench, root.path(), target, 100).unwrap();
    assert_eq!(
        (kept.kept, kept.seen, &kept.left_out),
        (1, 7, &counts.left_out)
    );

    let nothing = TempDir::new().unwrap();
    fs::write(nothing.path().join("a.jpg"), picture(1, 8, 8)).unwrap();
    let error = packed(
        &bench,
        nothing.path(),
        out.path().join("n").to_str().unwrap(),
        9,
    );
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("no image can be packed: no_caption 1"),
        "{error}"
    );
}

#[test]
fn folder_error_says_where_a_caption_goes() {
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("my.cat.png"), picture(1, 8, 8)).unwrap();
    let bench = Bench::new(S3Options::default());
    let text = bench
        .error(sequential(listed(&bench, root.path())))
        .to_string();
    let file = root.path().join("my.cat.txt");
    let words = format!(
        "write its caption to {}, or to metadata.jsonl",
        file.display()
    );
    assert!(text.contains(&words), "{text}");
}

#[test]
fn folder_without_images_is_refused_with_the_remedy() {
    let root = TempDir::new().unwrap();
    let bench = Bench::embedded(root.path());
    let refused = |url: &str| {
        let listed = bench.runtime.block_on(bench.sources.list(&urls(url)));
        listed.unwrap_err().to_string()
    };
    let local = format!("{}/", root.path().display());
    let text = refused(&local);
    assert!(text.contains("no .tar, .tar.gz or .tgz files in it, and no images (data.image_keys = [\"jpg\", \"png\", \"jpeg\", \"webp\"])"), "{text}");
    fs::create_dir_all(root.path().join("data/loose")).unwrap();
    fs::write(root.path().join("data/0.tar"), "").unwrap();
    fs::write(root.path().join("data/loose/a.jpg"), "").unwrap();
    let text = refused("s3://data/loose/");
    assert!(
        text.contains("but 1 image, the first of them s3://data/loose/a.jpg")
            && text.contains("coffey pack FOLDER --out s3://data/"),
        "{text}"
    );
    assert_eq!(listed(&bench, &root.path().join("data")).len(), 1);
}

#[test]
fn folder_stream_resumes_and_notices_new_files() {
    let root = folder(40);
    let bench = Bench::new(S3Options::default());
    let shards = listed(&bench, root.path());
    let whole = bench.batches(config(shards.clone()), 20).unwrap();
    let resumed = |bench: &Bench, shards| {
        let resume = Some(whole[6].cursor.clone());
        bench.batches(
            StreamConfig {
                resume,
                ..config(shards)
            },
            13,
        )
    };
    assert_eq!(keys(&resumed(&bench, shards).unwrap()), keys(&whole[7..]));

    // An image that went away is a broken sample in its place.
    let later = &whole[9].samples[0];
    let file = later.key.replace("%2E", ".");
    fs::remove_file(root.path().join(format!("{file}.PNG"))).unwrap();
    let seen = Bench::new(S3Options::default());
    let before = listed(&bench, root.path());
    let rest = bench
        .batches(
            StreamConfig {
                resume: Some(whole[6].cursor.clone()),
                max_bad_fraction: 1.0,
                ..config(before)
            },
            3,
        )
        .unwrap();
    let without: Vec<String> = keys(&whole[7..])
        .into_iter()
        .filter(|key| **key != *later.key)
        .collect();
    assert_eq!(keys(&rest), without[..12]);

    fs::write(root.path().join("new.png"), picture(1, 8, 8)).unwrap();
    let error = resumed(&seen, listed(&seen, root.path())).unwrap_err();
    assert!(error.is_config(), "{error:?}");
    assert!(error.to_string().contains("shards"), "{error}");
}
