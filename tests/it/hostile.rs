//! Shards that are made to take all memory, read by the real binary.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;
use tar::{EntryType, Header};
use tempfile::TempDir;

use crate::support::{QUICKSTART, command, repository, texts};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// More than the binary takes for the shards below; less than any one of them holds. Bytes.
const MOST_MEMORY: u64 = 400 * MIB;
const SHARD: &str = "assets/quickstart/emoji/00000.tar";

/// A tar being written. Zeros are holes of the file.
struct Tar(File);

impl Tar {
    /// Begins a tar with the samples of a shard of the quickstart.
    fn new(path: &Path) -> Self {
        let mut tar = Self(File::create(path).unwrap());
        let mut archive = tar::Archive::new(File::open(repository(SHARD)).unwrap());
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            tar.header(
                EntryType::Regular,
                &entry.path_bytes(),
                content.len() as u64,
            );
            tar.content(&content);
        }
        tar
    }

    fn header(&mut self, kind: EntryType, path: &[u8], size: u64) {
        let mut header = Header::new_gnu();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path);
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_cksum();
        self.0.write_all(header.as_bytes()).unwrap();
    }

    fn content(&mut self, content: &[u8]) {
        self.0.write_all(content).unwrap();
        self.pad();
    }

    /// Skips to the next block.
    fn pad(&mut self) {
        let at = self.0.stream_position().unwrap();
        self.0
            .seek(SeekFrom::Start(at.next_multiple_of(512)))
            .unwrap();
    }

    fn member(&mut self, path: &str, content: &[u8]) {
        self.header(EntryType::Regular, path.as_bytes(), content.len() as u64);
        self.content(content);
    }

    /// A member of zeros.
    fn zeros(&mut self, path: &str, size: u64) {
        self.header(EntryType::Regular, path.as_bytes(), size);
        self.0
            .seek(SeekFrom::Current(i64::try_from(size).unwrap()))
            .unwrap();
        self.pad();
    }

    fn end(mut self) {
        let end = self.0.stream_position().unwrap();
        self.0.set_len(end + 1024).unwrap();
    }
}

/// A gzip of `start` and then zeros, in members of 64 MiB that are compressed once.
fn gzip_bomb(path: &Path, start: &[u8], zeros: u64) {
    let packed = |content: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    };
    let mut file = File::create(path).unwrap();
    file.write_all(&packed(start)).unwrap();
    let piece = packed(&vec![0; 64 << 20]);
    for _ in 0..zeros / (64 * MIB) {
        file.write_all(&piece).unwrap();
    }
}

/// The samples of the quickstart, and a header of `kind` that announces `size` bytes.
fn headed(folder: &Path, kind: EntryType, size: u64) -> Vec<u8> {
    let path = folder.join("start.tar");
    let mut tar = Tar::new(&path);
    tar.header(kind, b"header", size);
    std::fs::read(path).unwrap()
}

/// Standard output of a command that must succeed, and its peak memory.
fn measured(args: &[&str]) -> (Value, u64) {
    let mut child = command(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let watch = std::thread::spawn(move || {
        let mut peak = 0;
        while let Ok(status) = std::fs::read_to_string(&status)
            && let Some(line) = status.lines().find(|line| line.starts_with("VmHWM"))
        {
            let kib = line.split_whitespace().nth(1).unwrap();
            peak = kib.parse::<u64>().unwrap() << 10;
            std::thread::sleep(Duration::from_millis(5));
        }
        peak
    });
    let mut out = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut out).unwrap();
    let output = child.wait_with_output().unwrap();
    let (_, err) = texts(&output);
    assert!(output.status.success(), "{args:?}: {err}");
    (serde_json::from_slice(&out).unwrap(), watch.join().unwrap())
}

/// Inspects a shard and streams it, in bounded memory. Returns its report.
fn report(shard: &Path) -> Value {
    let shard = shard.to_str().unwrap();
    let (mut report, peak) = measured(&["inspect", "--json", shard]);
    assert!(peak < MOST_MEMORY, "inspect {shard}: {} MiB", peak / MIB);
    let shards = format!("data.shards={shard}");
    let (benched, peak) = measured(&[
        "bench",
        "-c",
        QUICKSTART,
        "-s",
        &shards,
        "-s",
        "data.max_bad_fraction=1",
        "-s",
        "data.open_shards=1",
        "--samples",
        "130",
        "--json",
    ]);
    assert!(peak < MOST_MEMORY, "bench {shard}: {} MiB", peak / MIB);
    assert!(benched["samples"].as_u64().unwrap() >= 130);
    println!("{shard}: {} MiB", peak / MIB);
    report["shards"][0].take()
}

fn says(report: &Value, key: &str, words: &str) {
    let text = report[key].to_string();
    assert!(text.contains(words), "{key}: {text}");
}

#[test]
fn hostile_headers_break_the_shard() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("0.tar.gz");
    for kind in [
        EntryType::XHeader,
        EntryType::XGlobalHeader,
        EntryType::GNULongName,
        EntryType::GNULongLink,
    ] {
        gzip_bomb(&path, &headed(folder.path(), kind, 2 * GIB), 2 * GIB);
        let report = report(&path);
        assert!(report["samples"].as_u64().unwrap() > 10, "{kind:?}");
        says(&report, "broken", "more than 1048576");
        says(&report, "broken", "after member");
    }
    let mut start = headed(folder.path(), EntryType::GNUSparse, 0);
    let header = start.len() - 512;
    // The map goes on in the next block, which says the same.
    start[header + 482] = 1;
    let mut sparse = Header::from_byte_slice(&start[header..]).clone();
    sparse.set_cksum();
    start.truncate(header);
    start.extend_from_slice(sparse.as_bytes());
    let mut block = [0; 512];
    block[504] = 1;
    start.extend(block.repeat(4096));
    gzip_bomb(&path, &start, 0);
    says(&report(&path), "broken", "more than 1048576 bytes");
}

#[test]
fn hostile_members_are_not_held() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("0.tar");
    let mut tar = Tar::new(&path);
    for n in 0..4 {
        tar.zeros(&format!("large.unwanted{n}"), 256 * MIB);
    }
    tar.member("large.txt", b"the image is missing");
    tar.zeros("image.jpg", GIB);
    tar.zeros("caption.txt", 30 * MIB);
    tar.zeros("json.json", 300 * MIB);
    tar.member("last.txt", b"no image");
    tar.end();
    let report = report(&path);
    assert_eq!(report["broken"], Value::Null);
    assert_eq!(report["members"]["unwanted3"], 1);
    says(&report, "problems", "jpg is too large (1073741824 bytes)");
    says(
        &report,
        "problems",
        "txt is too long (31457280 bytes, at most 65536)",
    );
    says(&report, "problems", "json is too large (314572800 bytes)");
}

#[test]
fn hostile_samples_are_skipped() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("0.tar");
    let mut tar = Tar::new(&path);
    for n in 0..100_000 {
        tar.member(&format!("many.{n}"), b"");
    }
    for _ in 0..50_000 {
        tar.member("again.cls", b"1");
    }
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    tar.member("deep.json", deep.as_bytes());
    let many = (0..100_000)
        .map(|n| format!("\"{n}\":1"))
        .collect::<Vec<_>>();
    tar.member("keys.json", format!("{{{}}}", many.join(",")).as_bytes());
    tar.member("last.txt", b"no image");
    tar.end();
    let report = report(&path);
    assert_eq!(report["broken"], Value::Null);
    says(&report, "problems", "has more than 4096 members");
    says(&report, "problems", "json does not parse");
}

#[test]
fn hostile_gzip_ends_at_a_ratio() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("0.tar.gz");
    // A member of a terabyte, and zeros after the end of the tar.
    let member = headed(folder.path(), EntryType::Regular, 1 << 40);
    gzip_bomb(&path, &member, 4 * GIB);
    says(&report(&path), "broken", "the gzip expands");
    gzip_bomb(&path, &member[..member.len() - 512], 4 * GIB);
    says(&report(&path), "broken", "the gzip expands");
}
