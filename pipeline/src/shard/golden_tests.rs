//! Tars of several writers, compared with webdataset's samples (`tests/golden/make_tars.py`).

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::ops::ControlFlow;

use serde::Deserialize;

use super::limits::HeldMembers;
use super::tar::{TAIL_BYTES, TarError, TarItem, TarOptions, read_samples};

const TARS: &[u8] = include_bytes!("../../tests/golden/tars.tar.gz");
const WEBDATASET: &str = include_str!("../../tests/golden/tars.json");

/// Keys with their members' extensions and sizes, in order.
type Samples = Vec<(String, BTreeMap<String, usize>)>;

#[derive(Deserialize)]
struct Expected {
    samples: Samples,
    raised: Option<String>,
}

fn tars() -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(TARS));
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        (
            String::from_utf8(entry.path_bytes().into_owned()).unwrap(),
            content,
        )
    });
    entries.collect()
}

fn webdataset() -> BTreeMap<String, Expected> {
    serde_json::from_str(WEBDATASET).unwrap()
}

/// The extensions of all members.
fn extensions(tar: &[u8]) -> BTreeSet<String> {
    let options = TarOptions {
        held: HeldMembers::default(),
        max_tail_bytes: TAIL_BYTES,
    };
    let mut found = BTreeSet::new();
    read_samples(tar, &options, |item| {
        if let TarItem::Sample(sample) = item {
            found.extend(sample.others.into_keys());
        }
        ControlFlow::Continue(())
    })
    .ok();
    found
}

fn read(tar: &[u8]) -> (Samples, Result<(), TarError>) {
    let mut samples = Vec::new();
    let options = TarOptions {
        held: HeldMembers::default().with(extensions(tar), 1 << 20),
        max_tail_bytes: TAIL_BYTES,
    };
    let result = read_samples(tar, &options, |item| {
        let TarItem::Sample(sample) = item else {
            return ControlFlow::Continue(());
        };
        let members = sample.members.into_iter();
        samples.push((
            sample.key.to_string(),
            members
                .map(|(name, content)| (name, content.len()))
                .collect(),
        ));
        ControlFlow::Continue(())
    });
    (samples, result)
}

/// The tars of which coffey makes something else, each below with its reason.
const ON_PURPOSE: [&str; 10] = [
    "hidden",
    "unicode-gnu",
    "unicode-pax",
    "duplicate",
    "pax-sparse",
    "cut-member",
    "cut-header",
    "bad-header",
    "gzip-two-members",
    "gzip-cut",
];

#[test]
fn tar_samples_equal_webdatasets() {
    let (tars, expected) = (tars(), webdataset());
    assert!(tars.len() > 25 && tars.len() == expected.len());
    for (name, expected) in expected {
        if ON_PURPOSE.contains(&name.as_str()) {
            continue;
        }
        let (samples, result) = read(&tars[&name]);
        assert_eq!(samples, expected.samples, "{name}");
        assert_eq!(expected.raised, None, "{name}");
        assert!(result.is_ok(), "{name}: {result:?}");
    }
}

fn both(name: &str) -> (Samples, Result<(), TarError>, Expected) {
    let (samples, result) = read(&tars()[name]);
    (samples, result, webdataset().remove(name).unwrap())
}

fn keys(samples: &Samples) -> Vec<&str> {
    samples.iter().map(|(key, _)| key.as_str()).collect()
}

/// webdataset takes hidden files (the `._x.jpg` of macOS among them) and names that end in a dot for
/// members of odd samples, and keeps a leading `./`, which is only one way to spell a path.
#[test]
fn tar_hidden_files_are_no_samples() {
    let (samples, result, reference) = both("hidden");
    result.unwrap();
    assert_eq!(keys(&reference.samples), ["a/", "a", "b", "./c"]);
    assert_eq!(keys(&samples), ["a", "c"]);
    assert_eq!(samples[1].1, reference.samples[3].1);
}

/// The reference's own loader begins a new sample at a repeated extension, where webdataset raises.
#[test]
fn tar_repeated_extension_begins_a_new_sample() {
    let (samples, result, reference) = both("duplicate");
    result.unwrap();
    assert_eq!(reference.raised.as_deref(), Some("ValueError"));
    assert_eq!(keys(&samples), ["000", "000", "001"]);
    assert_eq!(samples[1].1, BTreeMap::from([("jpg".to_owned(), 5)]));
}

/// No tool makes sparse members of images by itself, and the tar reader does not know the PAX form of
/// them: they are passed over. GNU tar's own form is read.
#[test]
fn tar_pax_sparse_members_are_passed_over() {
    let (samples, result, reference) = both("pax-sparse");
    result.unwrap();
    assert_eq!(keys(&samples), keys(&reference.samples));
    assert_eq!(samples[0].1, BTreeMap::from([("txt".to_owned(), 1)]));
    assert_eq!(samples[1], reference.samples[1]);
    let (sparse, ..) = both("sparse");
    assert_eq!(sparse[0].1["jpg"], 4101);
}

/// Python's tarfile ends at a bad header as if the tar ended there, and gives a sample that was cut in
/// two; at a cut member it raises. Here both are a broken shard, used up to the sample before.
#[test]
fn tar_damage_drops_the_last_sample() {
    for (name, whole, cause) in [
        (
            "cut-member",
            1,
            "ends inside member \"001.jpg\", after 300 of 600 bytes",
        ),
        ("cut-header", 1, "after member \"001.jpg\""),
        ("bad-header", 0, "after member \"000.txt\""),
    ] {
        let (samples, result, _) = both(name);
        assert_eq!(keys(&samples), &["000"][..whole], "{name}");
        match result {
            Err(TarError::Broken(text)) => assert!(text.contains(cause), "{name}: {text}"),
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// Python reads a tar from the first member of a gzip only, and of one that is cut nothing.
#[test]
fn tar_gzip_is_read_to_its_end_or_cut() {
    let (samples, result, reference) = both("gzip-two-members");
    result.unwrap();
    assert_eq!(reference.raised.as_deref(), Some("ReadError"));
    assert_eq!(keys(&samples), ["000", "001"]);
    let (_, result, reference) = both("gzip-cut");
    assert_eq!(reference.raised.as_deref(), Some("ReadError"));
    assert!(matches!(result, Err(TarError::Broken(_))), "{result:?}");
}
