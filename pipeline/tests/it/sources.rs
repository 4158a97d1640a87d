//! Listing and reading from every kind of source.

use std::collections::BTreeMap;
use std::path::Path;

use crate::support::{Bench, bucket, config, shard, urls};
use coffey_pipeline::{Batch, Order, S3Options, SourceError, Sources, StreamConfig};

fn tree(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(tree(&path));
        } else {
            all.insert(
                path.to_string_lossy().into_owned(),
                std::fs::read(&path).unwrap(),
            );
        }
    }
    all
}

fn listed(bench: &Bench, url: &str) -> Result<Vec<String>, SourceError> {
    let found = bench.runtime.block_on(bench.sources.list(&urls(url)))?;
    Ok(found.iter().map(ToString::to_string).collect())
}

#[test]
fn listing_continues_past_one_page() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("data/deep")).unwrap();
    for n in 0..1234 {
        std::fs::write(root.path().join(format!("data/deep/{n:05}.tar")), b"").unwrap();
    }
    std::fs::write(root.path().join("data/deep/stats.json"), b"{}").unwrap();
    std::fs::write(root.path().join("data/deep/x.tar.gz"), b"").unwrap();
    std::fs::write(root.path().join("data/deep/y.tgz"), b"").unwrap();
    std::fs::create_dir(root.path().join("data/empty")).unwrap();
    let before = tree(root.path());
    let bench = Bench::embedded(root.path());
    let found = listed(&bench, "s3://data/deep/").unwrap();
    assert_eq!(found.len(), 1236);
    assert_eq!(found[0], "s3://data/deep/00000.tar");
    assert_eq!(found[1233], "s3://data/deep/01233.tar");
    assert_eq!(found[1235], "s3://data/deep/y.tgz");
    let error = listed(&bench, "s3://data/empty/").unwrap_err();
    assert_eq!(
        error.to_string(),
        "s3://data/empty/: no .tar, .tar.gz or .tgz files in it\n  name a folder or prefix that has shards"
    );
    let error = listed(&bench, "s3://absent/").unwrap_err();
    assert!(matches!(error, SourceError::NotFound { .. }), "{error:?}");
    drop(bench);
    assert_eq!(tree(root.path()), before, "serving must leave no trace");
}

#[test]
fn prefix_objects_are_listed_with_sizes() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("models/a/vae")).unwrap();
    std::fs::create_dir_all(root.path().join("models/ab")).unwrap();
    for (name, text) in [
        ("a/vae/config.json", "{}"),
        ("a/x.bin", "123"),
        ("ab/y", ""),
    ] {
        std::fs::write(root.path().join("models").join(name), text).unwrap();
    }
    let bench = Bench::embedded(root.path());
    let objects = |url: &str| {
        let url = url.parse().unwrap();
        bench.runtime.block_on(bench.sources.objects(&url))
    };
    let found = objects("s3://models/a/").unwrap();
    let short: Vec<_> = found.iter().map(|o| (o.name.as_str(), o.size)).collect();
    assert_eq!(short, [("vae/config.json", 2), ("x.bin", 3)]);
    assert_eq!(found[0].url.to_string(), "s3://models/a/vae/config.json");
    assert!(found[0].etag.is_some() || found[0].modified.is_some());
    assert!(objects("s3://models/none/").unwrap().is_empty());
    for url in ["s3://models/a/x.bin", "models/", "https://host/a/"] {
        let error = objects(url).unwrap_err();
        assert!(
            error.is_config() && error.to_string().contains("no prefix in S3"),
            "{error}"
        );
    }
}

#[test]
fn listing_expands_folders_and_keeps_urls() {
    let root = tempfile::tempdir().unwrap();
    bucket(root.path(), 2, |_| 1);
    std::fs::write(root.path().join("data/readme.txt"), b"").unwrap();
    let bench = Bench::new(S3Options::default());
    let folder = root.path().join("data").display().to_string();
    assert_eq!(
        listed(&bench, &format!("{folder}/")).unwrap(),
        [format!("{folder}/00000.tar"), format!("{folder}/00001.tar")]
    );
    assert_eq!(
        listed(&bench, "a/{0..1}.tar").unwrap(),
        ["a/0.tar", "a/1.tar"]
    );
    let error = listed(&bench, "https://host/folder/")
        .unwrap_err()
        .to_string();
    assert!(error.contains("can't be listed over HTTP"), "{error}");
}

#[test]
fn all_source_kinds_give_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    bucket(root.path(), 1, |_| 40);
    let expected = shard(0, 40);
    let bench = Bench::embedded(root.path());
    let path = root.path().join("data/00000.tar").display().to_string();
    let server = crate::support::server::serve(bench.runtime.handle(), root.path(), &[]);
    for url in [
        "s3://data/00000.tar".to_owned(),
        path.clone(),
        format!("file://{path}"),
        format!("http://{server}/data/00000.tar"),
    ] {
        let read = bench.runtime.block_on(async {
            let mut reader = bench.sources.open(&urls(&url)[0]).await?;
            assert_eq!(reader.size(), Some(expected.len() as u64));
            let mut bytes = Vec::new();
            while let Some(chunk) = reader.next().await? {
                bytes.extend_from_slice(&chunk);
            }
            Ok::<_, SourceError>(bytes)
        });
        assert!(read.unwrap() == expected, "{url}");
    }
}

#[test]
fn embedded_root_must_be_a_folder() {
    let bench = Bench::new(S3Options::default());
    let options = S3Options {
        embedded_root: Some("/nowhere".into()),
        ..S3Options::default()
    };
    let made = bench.runtime.block_on(Sources::new(options));
    let text = made.unwrap_err().to_string();
    assert!(
        text.starts_with("[s3] embedded_root = \"/nowhere\": is not a folder"),
        "{text}"
    );
}

#[test]
fn list_file_stands_for_its_shards() {
    let root = tempfile::tempdir().unwrap();
    bucket(root.path(), 2, |_| 1);
    let list = root.path().join("data/train.txt");
    let text = "\u{feff}# the training set\r\n\r\ns3://data/{00000..00001}.tar\r\n  # more\npipe:aws s3 cp s3://x/y.tar -\n\
                relative/a.tar::relative/b.tar\ns3://data/\n";
    std::fs::write(&list, text).unwrap();
    let bench = Bench::embedded(root.path());
    let shards = |pattern: &str| {
        let found = bench
            .runtime
            .block_on(bench.sources.shards(&[pattern.into()]))?;
        let shards = found.shards.iter();
        Ok::<Vec<String>, SourceError>(shards.map(ToString::to_string).collect())
    };
    let expected = [
        "s3://data/00000.tar",
        "s3://data/00001.tar",
        "s3://x/y.tar",
        "relative/a.tar",
        "relative/b.tar",
        "s3://data/00000.tar",
        "s3://data/00001.tar",
    ];
    // The list may be a file or an object.
    let here = format!("@{}", list.display());
    assert_eq!(shards(&here).unwrap(), expected);
    assert_eq!(shards("@s3://data/train.txt").unwrap(), expected);
    assert_eq!(
        shards("first.tar::@s3://data/train.txt").unwrap()[..2],
        ["first.tar", expected[0]]
    );
    let refused = |text: &[u8]| {
        std::fs::write(&list, text).unwrap();
        let error = shards(&here).unwrap_err();
        assert!(error.is_config(), "{error}");
        error.to_string()
    };
    let at = |line: usize| format!("{}:{line}: shard URL ", list.display());
    let text = refused(b"a.tar\n\n@other.txt\n");
    assert!(
        text.starts_with(&at(3)) && text.contains("not in another list"),
        "{text}"
    );
    assert!(refused(b"a.tar\nb{0..1.tar\n").starts_with(&at(2)));
    assert!(refused(b"# nothing\n").ends_with("names no shard"));
    assert!(refused(b"\xff\xfe").contains("one URL a line"));
    assert!(refused(&shard(0, 1)).contains("one URL a line"));
    let error = shards("@nowhere.txt").unwrap_err();
    assert!(matches!(error, SourceError::NotFound { .. }), "{error:?}");
    assert!(matches!(shards("").unwrap_err(), SourceError::Url(_)));
}

#[test]
fn gzip_shard_gives_same_batches() {
    let root = tempfile::tempdir().unwrap();
    bucket(root.path(), 1, |_| 9);
    let whole = shard(0, 9);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, &whole).unwrap();
    let gzip = encoder.finish().unwrap();
    std::fs::write(root.path().join("data/cut.tgz"), &gzip[..gzip.len() / 2]).unwrap();
    let bench = Bench::embedded(root.path());
    let stream = |url: &str| {
        bench.all(StreamConfig {
            order: Order::Sequential,
            max_bad_fraction: 1.0,
            ..config(urls(url))
        })
    };
    let pixels = |batches: Vec<Batch>| {
        let batches = batches.into_iter();
        batches
            .flat_map(|batch| crate::support::pixels(&batch).to_vec())
            .collect::<Vec<_>>()
    };
    let plain = pixels(stream("s3://data/00000.tar").unwrap());
    // gzip is told by content, not by name.
    std::fs::write(root.path().join("data/00000.tar"), &gzip).unwrap();
    assert!(pixels(stream("s3://data/00000.tar").unwrap()) == plain);
    let cut = stream("s3://data/cut.tgz").unwrap();
    let end = &cut.last().unwrap().finished_shards[0];
    assert!(end.samples > 0 && end.samples < 9, "{end:?}");
    let cause = end.broken.as_deref().unwrap();
    assert!(cause.starts_with("the gzip is cut off"), "{cause}");
}
