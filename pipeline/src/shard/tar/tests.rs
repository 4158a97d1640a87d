use super::*;

fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append_data(&mut header, path, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn options() -> TarOptions {
    TarOptions {
        held: HeldMembers::default().with(["jpg", "json", "txt"], 1000),
        max_tail_bytes: TAIL_BYTES,
    }
}

fn read(tar: &[u8]) -> (Vec<Sample>, Result<(), TarError>) {
    let mut samples = Vec::new();
    let result = read_samples(tar, &options(), |found| {
        if let TarItem::Sample(sample) = found {
            samples.push(sample);
        }
        ControlFlow::Continue(())
    });
    (samples, result)
}

fn shape(samples: &[Sample]) -> Vec<String> {
    samples
        .iter()
        .map(|s| {
            format!(
                "{}:{}",
                s.key,
                s.members.keys().cloned().collect::<Vec<_>>().join(",")
            )
        })
        .collect()
}

#[test]
fn tar_reader_groups_members_by_key() {
    let long = format!("{}/x.jpg", "folder".repeat(30));
    let (samples, result) = read(&tar_of(&[
        ("a.jpg", b"1"),
        ("a.json", b"{}"),
        ("README", b"ignored"),
        ("a.TXT", b"t"),
        ("b.jpg", b"2"),
        ("b.jpg", b"3"),
        (&long, b"4"),
    ]));
    result.unwrap();
    let long_key = long.trim_end_matches(".jpg");
    assert_eq!(
        shape(&samples),
        [
            "a:jpg,json,txt",
            "b:jpg",
            "b:jpg",
            &format!("{long_key}:jpg")
        ]
    );
}

#[test]
fn tar_reader_passes_over_folders_links_and_odd_names() {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, path) in [
        (tar::EntryType::Directory, "a.jpg/"),
        (tar::EntryType::Symlink, "b.jpg"),
        (tar::EntryType::Link, "c.jpg"),
        (tar::EntryType::Regular, "README"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        if !matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link) {
            header.set_cksum();
            builder.append_data(&mut header, path, &b""[..]).unwrap();
        } else {
            builder
                .append_link(&mut header, path, "/etc/passwd")
                .unwrap();
        }
    }
    let mut passed_over = Vec::new();
    let tar = builder.into_inner().unwrap();
    read_samples(tar.as_slice(), &options(), |found| {
        match found {
            TarItem::Sample(sample) => panic!("{sample:?}"),
            TarItem::Trailing(_) => {}
            TarItem::PassedOver(PassedOver { path, kind }) => passed_over.push((path, kind)),
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(
        passed_over,
        [
            ("a.jpg/".to_owned(), PassedOverKind::Folder),
            ("b.jpg".to_owned(), PassedOverKind::Link),
            ("c.jpg".to_owned(), PassedOverKind::Link),
            ("README".to_owned(), PassedOverKind::Name),
        ]
    );
}

#[test]
fn tar_reader_keeps_samples_before_a_cut() {
    let tar = tar_of(&[
        ("a.jpg", &[1; 600]),
        ("b.jpg", &[2; 600]),
        ("c.jpg", &[3; 600]),
    ]);
    let (samples, result) = read(&tar[..512 + 1024 + 512 + 100]);
    let message = result.unwrap_err().to_string();
    assert_eq!(
        message,
        "ends inside member \"b.jpg\", after 100 of 600 bytes"
    );
    assert_eq!(shape(&samples), ["a:jpg"]);
    // Inside c's header: b might have had more members.
    let (samples, result) = read(&tar[..2 * 1536 + 100]);
    assert!(matches!(result, Err(TarError::Broken(_))), "{result:?}");
    assert_eq!(shape(&samples), ["a:jpg"]);
}

#[test]
fn tar_reader_accepts_missing_end_blocks() {
    let tar = tar_of(&[("a.jpg", &[1; 600])]);
    let (samples, result) = read(&tar[..1536]);
    result.unwrap();
    assert_eq!(shape(&samples), ["a:jpg"]);
}

#[test]
fn tar_reader_tells_other_files_from_broken_tars() {
    let page = [
        b"<html><body>403 Forbidden</body></html>".as_slice(),
        &[b' '; 600],
    ]
    .concat();
    for content in [page.as_slice(), b"short", &[7; 5000], b"BZh91AY&SY"] {
        let (_, result) = read(content);
        assert!(matches!(result, Err(TarError::NotATar(_))), "{result:?}");
    }
    let message = |content: &[u8]| read(content).1.unwrap_err().to_string();
    let html = "it is an HTML page, such as a login page or an error page";
    assert_eq!(message(&page), format!("is not a tar: {html}"));
    assert_eq!(
        message(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "is not a tar: it is a git-lfs pointer; run `git lfs pull` in its repository"
    );
    assert_eq!(
        message(&gzip(b"{\"error\": \"expired\"}")),
        "is not a tar: it is JSON ({\"error\": \"expired\"}) in gzip"
    );
    assert_eq!(message(b"short"), "is not a tar: it is text (short)");
    // A tar may begin like another file.
    let (samples, result) = read(&tar_of(&[("BZh91.jpg", b"1"), ("{}.jpg", b"2")]));
    result.unwrap();
    assert_eq!(shape(&samples), ["BZh91:jpg", "{}:jpg"]);
}

#[test]
fn tar_reader_names_oversized_members() {
    let (samples, result) = read(&tar_of(&[("a.jpg", &[1; 2000]), ("a.txt", b"t")]));
    result.unwrap();
    assert_eq!(shape(&samples), ["a:txt"]);
    assert_eq!(samples[0].oversized["jpg"], 2000);
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, content).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn tar_reader_reads_gzip() {
    let tar = tar_of(&[("a.jpg", &[1; 600]), ("a.txt", b"t"), ("b.jpg", &[2; 600])]);
    let (samples, result) = read(&gzip(&tar));
    result.unwrap();
    assert_eq!(samples, read(&tar).0);
    // In two members, cut anywhere.
    let (samples, result) = read(&[gzip(&tar[..700]), gzip(&tar[700..])].concat());
    result.unwrap();
    assert_eq!(samples, read(&tar).0);
}

#[test]
fn tar_reader_reports_faulty_gzip_as_broken() {
    let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
        .take(600)
        .collect();
    let tar = tar_of(&[
        ("a.jpg", &noise),
        ("b.jpg", &noise[..500]),
        ("c.jpg", &noise[..90]),
    ]);
    let whole = gzip(&tar);
    let broken = |gzip: &[u8]| {
        let (samples, result) = read(gzip);
        match result.unwrap_err() {
            TarError::Broken(cause) => (samples.len(), cause),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(broken(&whole[..20]), (0, "the gzip is cut off".to_owned()));
    let (samples, cause) = broken(&whole[..whole.len() - 4]);
    assert_eq!(
        (samples, cause.as_str()),
        (3, "the gzip is cut off after member \"c.jpg\"")
    );
    // The checksum at the very end, after the tar's own end.
    let mut damaged = whole.clone();
    damaged[whole.len() - 8] ^= 1;
    let (samples, cause) = broken(&damaged);
    assert!(
        samples == 3 && cause.starts_with("the gzip is damaged"),
        "{cause}"
    );
    // A gzip without a tar is not a shard.
    let (_, result) = read(&gzip(&[7; 5000]));
    assert!(matches!(result, Err(TarError::NotATar(_))), "{result:?}");
    assert_eq!(broken(b""), (0, "is empty: 0 bytes".to_owned()));
}

#[test]
fn tar_reader_never_panics() {
    let whole = tar_of(&[("a.jpg", &[1; 600]), ("a.txt", b"t"), ("b.jpg", &[2; 600])]);
    let mut generator = fastrand::Rng::with_seed(3);
    for _ in 0..2000 {
        let mut damaged = whole.clone();
        for _ in 0..generator.usize(1..4) {
            let at = generator.usize(0..damaged.len());
            damaged[at] = generator.u8(..);
        }
        damaged.truncate(generator.usize(0..=damaged.len()));
        // Must not panic.
        let _ = read(&damaged);
        let mut damaged = gzip(&whole);
        let at = generator.usize(0..damaged.len());
        damaged[at] = generator.u8(..);
        damaged.truncate(generator.usize(0..=damaged.len()));
        let _ = read(&damaged);
    }
}

/// A tar with a member `a.jpg`, a header of `kind` with `content`, and a member `b.jpg`.
fn tar_with(kind: tar::EntryType, path: &str, size: u64, content: &[u8]) -> Vec<u8> {
    let mut tar = tar_of(&[("a.jpg", b"1")]);
    tar.truncate(1024);
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_cksum();
    tar.extend(header.as_bytes());
    tar.extend(content);
    tar.resize(tar.len().next_multiple_of(512), 0);
    tar.extend(tar_of(&[("b.jpg", b"2")]));
    tar
}

#[test]
fn tar_reader_limits_headers() {
    use tar::EntryType::{GNULongLink, GNULongName, XGlobalHeader, XHeader};
    for kind in [XHeader, XGlobalHeader, GNULongName, GNULongLink] {
        let size = 2 << 20;
        let tar = tar_with(kind, "header", size, &vec![0; 2 << 20]);
        // The fault is found without the bytes beyond the limit.
        for tar in [tar.as_slice(), &tar[..(1 << 20) + 2048]] {
            let (samples, result) = read(tar);
            assert_eq!(shape(&samples), [] as [&str; 0]);
            let message = result.unwrap_err().to_string();
            assert!(
                message.contains("at byte 1024")
                    && message.contains("more than 1048576")
                    && message.ends_with("after member \"a.jpg\""),
                "{kind:?}: {message}"
            );
        }
    }
    let global = b"19 comment=a comment\n";
    let tar = tar_with(XGlobalHeader, "header", global.len() as u64, global);
    let (samples, result) = read(&tar);
    result.unwrap();
    assert_eq!(shape(&samples), ["a:jpg", "b:jpg"]);
}

#[test]
fn tar_reader_passes_over_long_paths_and_holes() {
    let long = "x".repeat(5000) + ".jpg\0";
    let tar = tar_with(
        tar::EntryType::GNULongName,
        "././@LongLink",
        long.len() as u64,
        long.as_bytes(),
    );
    let mut passed_over = Vec::new();
    let mut note = |found| {
        if let TarItem::PassedOver(PassedOver { path, kind }) = found {
            passed_over.push((path.len(), kind));
        }
        ControlFlow::Continue(())
    };
    read_samples(tar.as_slice(), &options(), &mut note).unwrap();
    let mut sparse = tar_with(tar::EntryType::GNUSparse, "hole.jpg", 0, b"");
    let header: &mut [u8] = &mut sparse[1024..1536];
    // One block without content at the end of the file, which has 1 GiB.
    header[386..398].copy_from_slice(b"10000000000\0");
    header[398..410].copy_from_slice(b"00000000000\0");
    header[483..495].copy_from_slice(b"10000000000\0");
    let mut checked = tar::Header::from_byte_slice(header).clone();
    checked.set_cksum();
    header.copy_from_slice(checked.as_bytes());
    read_samples(sparse.as_slice(), &options(), &mut note).unwrap();
    let expected = [
        (SHOWN_PATH_BYTES, PassedOverKind::LongPath),
        ("hole.jpg".len(), PassedOverKind::Special),
    ];
    assert_eq!(passed_over, expected);
}

#[test]
fn tar_reader_keeps_the_start_of_other_members() {
    let (samples, result) = read(&tar_of(&[("a.png", &[1; 2000]), ("a.cls", b"7")]));
    result.unwrap();
    assert_eq!(samples[0].members.len(), 0);
    assert_eq!(samples[0].others["png"], [1; 64].as_slice());
    assert_eq!(samples[0].others["cls"], b"7".as_slice());
}

#[test]
fn tar_reader_limits_samples() {
    let names: Vec<String> = (0..=MAX_SAMPLE_MEMBERS)
        .map(|n| format!("many.{n}"))
        .collect();
    let mut members: Vec<(&str, &[u8])> = names
        .iter()
        .map(|name| (name.as_str(), b"".as_slice()))
        .collect();
    members.extend([("many.jpg", b"1".as_slice()), ("next.jpg", b"2")]);
    let (samples, result) = read(&tar_of(&members));
    result.unwrap();
    assert_eq!(samples[0].excess, Some(Excess::Members));
    assert_eq!(shape(&samples), ["many:", "next:jpg"]);
    let (samples, _) = read(&tar_of(&members[1..]));
    assert_eq!(samples[0].excess, Some(Excess::Members));
    let (samples, _) = read(&tar_of(&members[2..]));
    assert_eq!(samples[0].excess, None);
    let half = vec![0; usize::try_from(MAX_SAMPLE_BYTES / 2).unwrap()];
    let held = HeldMembers::default().with(["jpg", "png"], MAX_SAMPLE_BYTES);
    let options = TarOptions { held, ..options() };
    let tar = tar_of(&[("a.jpg", &half), ("a.png", &half), ("b.jpg", b"1")]);
    let mut found = Vec::new();
    read_samples(tar.as_slice(), &options, |item| {
        if let TarItem::Sample(sample) = item {
            found.push((sample.excess, sample.bytes()));
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(found, [(Some(Excess::Bytes), 0), (None, 1)]);
}
