//! Atomic writes to a folder and to S3, under faults.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use crate::child::is_alone;
use crate::support::proxy::{Fault, chance_writing, clean, script};
use crate::support::{Bench, Faulty};
use coffey_pipeline::SourceError;
use coffey_pipeline::destination::{Destination, ObjectMeta, ObjectWriter, PartOptions};
use sha2::{Digest, Sha256};

/// The smallest parts that S3 takes.
const PARTS: PartOptions = PartOptions {
    bytes: 5 << 20,
    in_flight: 2,
};

fn to(bench: &Bench, target: &str) -> Destination {
    let runtime = bench.runtime.handle();
    bench
        .sources
        .destination_with(target, runtime, PARTS)
        .unwrap()
}

fn content(seed: u64, size: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut content = vec![0; size];
    random.fill(&mut content);
    content
}

fn digest(content: &[u8]) -> String {
    let hash = Sha256::digest(content);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes `content` in pieces of random size.
fn fill(writer: &mut ObjectWriter, content: &[u8]) -> Result<(), SourceError> {
    let mut random = fastrand::Rng::with_seed(content.len() as u64);
    let mut rest = content;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(rest.len().min(random.usize(1..700_000)));
        writer.append(now)?;
        rest = later;
    }
    Ok(())
}

fn put(place: &Destination, name: &str, content: &[u8]) -> Result<String, SourceError> {
    let mut writer = place.create(name)?;
    fill(&mut writer, content)?;
    let written = writer.finish()?;
    assert_eq!(written.bytes, content.len() as u64);
    Ok(written.sha256)
}

/// Files of unfinished uploads in the server's root.
fn leftovers(server: &Faulty) -> Vec<String> {
    let entries = std::fs::read_dir(server.root.path()).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("upload"))
        .collect()
}

#[test]
fn written_objects_read_back_from_folder_and_s3() {
    let server = Faulty::start(clean());
    let bench = server.bench(4);
    let folder = tempfile::tempdir().unwrap();
    let local = folder.path().join("made/anew");
    for place in [
        to(&bench, local.to_str().unwrap()),
        to(&bench, "s3://data/runs/first"),
    ] {
        assert_eq!(place.list("").unwrap(), []);
        let sizes = [0, 1, 5 << 20, (5 << 20) + 1, 15 << 20, (16 << 20) + 77];
        for (index, size) in sizes.into_iter().enumerate() {
            let content = content(index as u64, size);
            let name = format!("some/{index}.bin");
            assert_eq!(put(&place, &name, &content).unwrap(), digest(&content));
            assert!(place.read(&name).unwrap() == content, "{name}");
            let mut begin = vec![0; size.min(10)];
            place.open(&name).unwrap().read_exact(&mut begin).unwrap();
            assert_eq!(begin, content[..begin.len()]);
        }
        let listed = place.list("some/").unwrap();
        let found: Vec<usize> = listed.iter().map(|entry| entry.size as usize).collect();
        assert_eq!(found, sizes);
        assert_eq!(listed[1].name, "some/1.bin");
        assert_eq!(place.list("some/4").unwrap().len(), 1);
        // A write replaces the object.
        place.write("some/0.bin", b"second").unwrap();
        assert_eq!(place.read("some/0.bin").unwrap(), b"second");
        place.remove("some/0.bin").unwrap();
        place.remove("some/0.bin").unwrap();
        let error = place.read("some/0.bin").unwrap_err();
        assert!(matches!(error, SourceError::NotFound { .. }), "{error}");
        assert_eq!(place.head("some/0.bin").unwrap(), None);
        for name in ["", "/x", "a//b", "../x", "a/."] {
            let error = place.write(name, b"").unwrap_err();
            assert!(matches!(error, SourceError::Unsupported { .. }), "{error}");
        }
    }
    assert_eq!(leftovers(&server), [""; 0]);
    let inside = bench.read("s3://data/runs/first/some/1.bin").unwrap();
    assert_eq!(inside, content(1, 1));
}

#[test]
fn object_metadata_is_stored() {
    let server = Faulty::start(clean());
    let bench = server.bench(4);
    let place = to(&bench, "s3://data/");
    let metadata = BTreeMap::from([("recipe".to_owned(), "abc".to_owned())]);
    for size in [3, 11 << 20] {
        let mut writer = place.create_with("x.tar", metadata.clone()).unwrap();
        fill(&mut writer, &content(1, size)).unwrap();
        writer.finish().unwrap();
        let ObjectMeta {
            size: found,
            metadata,
        } = place.head("x.tar").unwrap().unwrap();
        assert_eq!((found, metadata["recipe"].as_str()), (size as u64, "abc"));
    }
}

#[test]
fn dropped_writer_leaves_nothing() {
    let server = Faulty::start(clean());
    let bench = server.bench(4);
    let folder = tempfile::tempdir().unwrap();
    for place in [
        to(&bench, folder.path().to_str().unwrap()),
        to(&bench, "s3://data"),
    ] {
        place.write("object", b"the one before").unwrap();
        let mut writer = place.create("object").unwrap();
        fill(&mut writer, &content(3, 11 << 20)).unwrap();
        writer.flush().unwrap();
        assert_eq!(place.list("").unwrap().len(), 1);
        assert_eq!(place.read("object").unwrap(), b"the one before");
        drop(writer);
        assert_eq!(place.list("").unwrap().len(), 1);
        assert_eq!(place.read("object").unwrap(), b"the one before");
    }
    assert_eq!(leftovers(&server), [""; 0]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn writes_survive_faults_on_one_request_in_five() {
    let mut retries = 0;
    for seed in 0..4 {
        let server = Faulty::start(chance_writing(seed, 0.2, 3 << 20));
        let bench = server.bench(30);
        let place = to(&bench, "s3://data/run");
        for n in 0..12 {
            let size = [100, 900_000, 11 << 20][n % 3];
            let content = content(n as u64, size);
            let name = format!("{n}.bin");
            put(&place, &name, &content).unwrap();
            assert!(place.read(&name).unwrap() == content, "{name}");
        }
        assert_eq!(place.list("").unwrap().len(), 12);
        place.remove("3.bin").unwrap();
        assert_eq!(place.list("").unwrap().len(), 11);
        retries += bench
            .sources
            .s3_server()
            .counts()
            .retries
            .values()
            .sum::<u64>();
        // An upload whose first answer was lost is left over; the next start clears it.
        place.abort_incomplete_uploads(|_| true).unwrap();
        server.proxy.follow(clean());
        place.abort_incomplete_uploads(|_| true).unwrap();
        assert_eq!(leftovers(&server), [""; 0], "seed {seed}");
    }
    assert!(retries > 20, "{retries} retries");
}

#[test]
fn upload_survives_lost_completion_answer() {
    let server = Faulty::start(Box::new(|head, nth| {
        let completes = head.starts_with("post ") && head.contains("uploadid=");
        (completes && nth == 0).then_some(Fault::Unanswered)
    }));
    let bench = server.bench(4);
    let place = to(&bench, "s3://data/run");
    let whole = content(5, 11 << 20);
    put(&place, "x", &whole).unwrap();
    assert!(place.read("x").unwrap() == whole);
    assert_eq!(leftovers(&server), [""; 0]);
}

#[test]
fn failed_upload_is_not_confused_with_old_object() {
    let server = Faulty::start(clean());
    let bench = server.bench(2);
    let place = to(&bench, "s3://data/run");
    let before = content(6, 11 << 20);
    put(&place, "x", &before).unwrap();
    server.proxy.follow(Box::new(|head, _| {
        let completes = head.starts_with("post ") && head.contains("uploadid=");
        completes.then_some(Fault::Status(403, "AccessDenied"))
    }));
    let error = put(&place, "x", &content(7, 11 << 20)).unwrap_err();
    assert!(matches!(error, SourceError::Forbidden { .. }), "{error}");
    assert!(place.read("x").unwrap() == before);
    assert_eq!(leftovers(&server), [""; 0]);
}

#[test]
fn put_retries_cut_bodies_and_stalls() {
    for fault in [
        Fault::CutOff(1000),
        Fault::Stall(0),
        Fault::Unanswered,
        Fault::Reset(10),
        Fault::Status(400, "BadDigest"),
    ] {
        let server = Faulty::start(script([Some(fault.clone()), Some(fault.clone())]));
        let bench = server.bench(4);
        let place = to(&bench, "s3://data");
        let whole = content(8, 50_000);
        put(&place, "x", &whole).unwrap();
        assert!(place.read("x").unwrap() == whole, "{fault:?}");
    }
}

#[test]
fn write_refusals_say_what_to_do() {
    let server = Faulty::start(clean());
    let bench = server.bench(3);
    let place = to(&bench, "s3://data/run");
    for size in [100, 11 << 20] {
        let fails = |status, code| {
            server.proxy.follow(Box::new(move |head, _| {
                let writes = head.starts_with("put ") || head.starts_with("post ");
                writes.then_some(Fault::Status(status, code))
            }));
            let error = put(&place, "x", &content(1, size)).unwrap_err().to_string();
            assert!(error.starts_with("s3://data/run/x: "), "{error}");
            error
        };
        let error = fails(403, "AccessDenied");
        assert!(error.contains("access denied"), "{error}");
        assert!(error.contains("s3:PutObject"), "{error}");
        let error = fails(503, "SlowDown");
        assert!(error.contains("not written, gave up after 3"), "{error}");
        let error = fails(405, "MethodNotAllowed");
        assert!(error.contains("takes no writes"), "{error}");
        server.proxy.follow(clean());
        assert_eq!(place.list("").unwrap(), []);
        assert_eq!(leftovers(&server), [""; 0]);
    }
    let nowhere = to(&bench, "s3://nobody/run");
    let error = nowhere.list("").unwrap_err();
    assert!(matches!(error, SourceError::NotFound { .. }), "{error}");
    let error = bench
        .sources
        .destination("https://host/x", bench.runtime.handle())
        .unwrap_err();
    assert!(error.to_string().contains("s3://bucket/prefix/"), "{error}");
    // A file has the name of the folder.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = Destination::folder(&file).write("x", b"").unwrap_err();
    assert!(error.to_string().contains("file"), "{error}");
}

#[test]
fn abort_incomplete_uploads_removes_only_selected() {
    let server = Faulty::start(clean());
    let bench = server.bench(4);
    let folder = tempfile::tempdir().unwrap();
    for place in [
        to(&bench, folder.path().to_str().unwrap()),
        to(&bench, "s3://data/run"),
    ] {
        for name in ["mine/1", "mine/2", "theirs/1"] {
            let mut writer = place.create(name).unwrap();
            fill(&mut writer, &content(1, 6 << 20)).unwrap();
            std::mem::forget(writer); // as kill -9 would
        }
        assert_eq!(place.list("").unwrap(), []);
        let mine = |name: &str| name.starts_with("mine/");
        assert_eq!(place.abort_incomplete_uploads(mine).unwrap(), 2);
        assert_eq!(place.abort_incomplete_uploads(mine).unwrap(), 0);
        assert_eq!(place.abort_incomplete_uploads(|_| true).unwrap(), 1);
    }
    assert_eq!(leftovers(&server), [""; 0]);
    // Some servers do not list uploads.
    server.proxy.follow(Box::new(|head, _| {
        head.contains("?uploads")
            .then_some(Fault::Status(501, "NotImplemented"))
    }));
    let place = to(&bench, "s3://data/run");
    assert_eq!(place.abort_incomplete_uploads(|_| true).unwrap(), 0);
}

#[test]
fn embedded_server_takes_writes() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("out")).unwrap();
    let bench = Bench::embedded(root.path());
    let place = to(&bench, "s3://out/run");
    put(&place, "a/b", &content(1, 6 << 20)).unwrap();
    assert_eq!(
        std::fs::metadata(root.path().join("out/run/a/b"))
            .unwrap()
            .len(),
        6 << 20
    );
}

/// A figure of `/proc/self/status`, in bytes.
fn memory(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap();
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().unwrap();
    kilobytes << 10
}

#[test]
fn upload_memory_stays_flat() {
    if !is_alone("destination::upload_memory_stays_flat") {
        return;
    }
    let server = Faulty::start(clean());
    let bench = server.bench(4);
    let runtime = bench.runtime.handle();
    let place = bench.sources.destination("s3://data/run", runtime).unwrap();
    let piece = content(9, 1 << 20);
    place.write("warm", &piece).unwrap();
    let before = memory("VmRSS:");
    let begun = std::time::Instant::now();
    let mut writer = place.create("large").unwrap();
    for _ in 0..400 {
        writer.append(&piece).unwrap();
    }
    let written = writer.finish().unwrap();
    let (seconds, grown) = (begun.elapsed().as_secs_f64(), memory("VmHWM:") - before);
    eprintln!(
        "400 MiB in {seconds:.1} s, {} MiB more at most",
        grown >> 20
    );
    assert_eq!(written.bytes, 400 << 20);
    // Four parts of 8 MiB, and what the client and the server in this process hold of them.
    assert!(grown < 128 << 20, "{} MiB", grown >> 20);
}
