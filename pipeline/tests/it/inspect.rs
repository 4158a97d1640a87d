//! The report on one shard, for shards with every kind of problem.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::support::{Bench, picture, sample, shard, tar_of, urls};
use coffey_pipeline::inspect::{self, InspectOptions, ProblemKind, ShardReport};
use coffey_pipeline::stages::Stage;
use coffey_pipeline::{FlowMetrics, S3Options, StreamError};
use tempfile::TempDir;

fn report(path: &Path, resolution: Option<u32>) -> Result<ShardReport, StreamError> {
    let bench = Bench::new(S3Options::default());
    let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect();
    let wanted = InspectOptions {
        image_keys: keys(&["jpg", "png"]),
        caption_keys: keys(&["txt"]),
        resolution,
        statistics: false,
        tokens: None,
    };
    let url = urls(path.to_str().unwrap()).remove(0);
    let metrics = FlowMetrics::private();
    let report = bench
        .runtime
        .block_on(inspect::shard(&bench.sources, &url, &wanted, &metrics))?;
    assert_eq!(metrics.snapshot().stage(Stage::Untar).items, report.samples);
    Ok(report)
}

fn written(folder: &TempDir, tar: &[u8]) -> PathBuf {
    let path = folder.path().join("0.tar");
    std::fs::write(&path, tar).unwrap();
    path
}

fn said(report: &ShardReport) -> Vec<String> {
    let line = |p: &inspect::Problem| format!("{} {}: {}", p.kind.name(), p.key, p.what);
    report.problems.iter().map(line).collect()
}

#[test]
fn report_lists_every_problem_of_a_sample() {
    let mut members: Vec<_> = (0..4).flat_map(|n| sample(0, n)).collect();
    members[3].1.truncate(70);
    members.remove(7);
    members.extend(sample(0, 0));
    let named = |name: &str, content: &[u8]| (name.to_owned(), content.to_vec());
    members.extend([
        named("lonely.txt", b"words"),
        named("lonely.json", b"{"),
        named("latin.png", &picture(1, 30, 30)),
        named("latin.txt", b"caf\xe9"),
        named("liar.jpg", &picture(2, 30, 30)),
        named("liar.txt", b" \n"),
    ]);
    let tar = tar_of(&members);
    let folder = TempDir::new().unwrap();
    let report = report(&written(&folder, &tar), Some(22)).unwrap();
    assert_eq!((report.bytes, report.samples), (tar.len() as u64, 8));
    assert_eq!((report.members["png"], report.members["jpg"]), (6, 1));
    assert_eq!(report.formats, BTreeMap::from([("png".to_owned(), 6)]));
    assert_eq!(
        (report.width.min, report.width.max, report.width.count),
        (20, 30, 6)
    );
    let counts = [
        report.missing_images,
        report.missing_captions,
        report.undecodable,
        report.duplicate_keys,
    ];
    assert_eq!(counts, [1; 4]);
    let said = said(&report);
    let expected = [
        "below_resolution 000000000: png is 20x24, and enlarged to 22",
        "decode_error 000000001: png can't be decoded",
        "no_caption 000000002: has no caption",
        "duplicate_key 000000000: has the key of an earlier sample",
        "below_resolution 000000000: png is 20x24, and enlarged to 22",
        "no_image lonely: has no image",
        "bad_json lonely: json does not parse",
        "caption_not_utf8 latin: txt is not UTF-8 at byte 3; replaced by U+FFFD",
        "wrong_extension liar: jpg is a PNG",
        "empty_caption liar: txt is empty",
    ];
    assert_eq!(said.len(), expected.len(), "{said:#?}");
    for (said, expected) in said.iter().zip(expected) {
        assert!(said.starts_with(expected), "{said}: {expected}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["missing_images"], 1);
    for (problem, listed) in report
        .problems
        .iter()
        .zip(json["problems"].as_array().unwrap())
    {
        assert_eq!(listed["kind"], problem.kind.name());
    }
}

#[test]
fn report_names_members_that_are_no_sample() {
    let mut builder = tar::Builder::new(Vec::new());
    let mut member = |kind: tar::EntryType, path: &[u8], content: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append(&header, content).unwrap();
    };
    member(tar::EntryType::Directory, b"data/", b"");
    member(tar::EntryType::Regular, b"README", b"hello");
    member(tar::EntryType::Regular, b"data/.DS_Store", b"junk");
    member(tar::EntryType::Symlink, b"data/b.png", b"");
    member(tar::EntryType::Fifo, b"data/pipe.png", b"");
    member(
        tar::EntryType::Regular,
        b"data/\xff.png",
        &picture(1, 20, 20),
    );
    member(tar::EntryType::Regular, b"data/\xff.txt", b"a picture");
    let first = builder.into_inner().unwrap();
    // Two joined tars: a reader stops at the end of the first.
    let joined = [first.as_slice(), &shard(0, 1)].concat();
    let folder = TempDir::new().unwrap();
    let found = report(&written(&folder, &joined), None).unwrap();
    assert_eq!((found.samples, found.problems.len()), (1, 4));
    let passed_over: Vec<_> = found.passed_over.into_iter().collect();
    assert_eq!(
        passed_over,
        [
            ("file without an extension, or hidden", 2),
            ("folder", 1),
            ("link", 1),
            ("special file", 1)
        ]
    );
    let kinds: Vec<_> = found
        .problems
        .iter()
        .map(|p| (p.kind, p.key.as_str()))
        .collect();
    assert_eq!(
        kinds,
        [
            (ProblemKind::UnreadableName, "data/\u{fffd}"),
            (ProblemKind::Link, "data/b.png"),
            (ProblemKind::Special, "data/pipe.png"),
            (ProblemKind::TrailingData, "")
        ]
    );
    // Zeros after the end are padding.
    let padded = [first.as_slice(), &[0; 20_480]].concat();
    let padded = report(&written(&folder, &padded), None).unwrap();
    assert_eq!(padded.problems.len(), 3, "{:?}", padded.problems);
}

#[test]
fn report_tells_cut_shard_from_missing_one() {
    let folder = TempDir::new().unwrap();
    let whole = shard(0, 3);
    let cut = report(&written(&folder, &whole[..whole.len() / 2]), None).unwrap();
    assert!(cut.broken.is_some() && cut.samples > 0, "{cut:?}");
    assert!(matches!(
        report(&folder.path().join("1.tar"), None),
        Err(StreamError::Source(_))
    ));
}
