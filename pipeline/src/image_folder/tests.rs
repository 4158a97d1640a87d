use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;
use crate::shard::{HeldMembers, TarItem, TarOptions, read_samples};

fn write(root: &TempDir, name: impl AsRef<Path>, content: impl AsRef<[u8]>) {
    let path = root.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn list(root: &TempDir) -> ImageFolder {
    ImageFolder::list(root.path(), &MemberKeys::default()).unwrap()
}

fn tar(folder: &ImageFolder) -> (Vec<u8>, Option<String>) {
    let mut bytes = Vec::new();
    let unread = folder.write_tar(0..folder.len(), &mut bytes).unwrap();
    (bytes, unread)
}

/// Each sample as `key: extension=content …`.
fn samples(folder: &ImageFolder) -> Vec<String> {
    let keys = MemberKeys::default();
    let options = TarOptions {
        held: HeldMembers::of_images(&keys.images, &keys.captions, 1000),
        max_tail_bytes: 0,
    };
    let mut found = Vec::new();
    let read = read_samples(tar(folder).0.as_slice(), &options, |item| {
        let TarItem::Sample(sample) = item else {
            panic!("{item:?}");
        };
        let members = sample.members.iter();
        let members = members.map(|(extension, content)| {
            format!(" {extension}={}", String::from_utf8_lossy(content))
        });
        found.push(format!("{}:{}", sample.key, members.collect::<String>()));
        std::ops::ControlFlow::Continue(())
    });
    read.unwrap();
    found
}

#[test]
fn folder_is_read_in_the_order_of_keys() {
    let root = TempDir::new().unwrap();
    for name in [
        "b.txt",
        "a-b.jpg",
        "a.b.jpg",
        "a.b.txt",
        "a.jpg",
        "a.txt",
        "b.JPG",
        "sub/deep/c d.png",
        "sub/deep/c d.json",
        ".hidden.jpg",
        ".git/x.jpg",
        "__MACOSX/a.jpg",
        "@eaDir/a.jpg",
        "Thumbs.db",
        "LICENSE",
        "sub/.DS_Store",
        "empty/readme.md",
        "\u{e9}\nx.webp",
    ] {
        write(&root, name, name);
    }
    write(&root, OsStr::from_bytes(b"\xff.jpg"), "odd");
    let folder = list(&root);
    assert_eq!(folder.len(), 7);
    assert_eq!(
        samples(&folder),
        [
            "a: jpg=a.jpg txt=a.txt",
            "a-b: jpg=a-b.jpg",
            "a%2Eb: jpg=a.b.jpg txt=a.b.txt",
            "b: jpg=b.JPG txt=b.txt",
            "sub/deep/c d: json=sub/deep/c d.json png=sub/deep/c d.png",
            "\u{e9}%0Ax: webp=\u{e9}\nx.webp",
            "%FF: jpg=odd",
        ]
    );
    assert_eq!(folder.warnings(), Vec::<String>::new());
    let (bytes, unread) = tar(&folder);
    assert_eq!((&bytes, &unread), (&tar(&list(&root)).0, &None));
    assert_eq!(folder.tar_bytes(0..7), bytes.len() as u64);
}

#[test]
fn folder_says_what_it_passes_over() {
    let root = TempDir::new().unwrap();
    write(&root, "a.jpg", "a");
    write(&root, "notes.txt", "");
    write(&root, "other.txt", "");
    write(&root, "info.json", "{}");
    write(&root, "below/0.tar", "");
    write(&root, "a.JPEG", "other");
    symlink("nowhere", root.path().join("broken.jpg")).unwrap();
    let folder = list(&root);
    let warnings = folder.warnings();
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert!(
        warnings[0].starts_with("2 captions passed over"),
        "{warnings:?}"
    );
    assert!(warnings[1].starts_with("1 image passed over") && warnings[1].ends_with("a.JPEG"));
    assert!(warnings[2].starts_with("1 link passed over") && warnings[2].ends_with("broken.jpg"));
    assert_eq!(
        folder.shard_below(),
        Some(&*root.path().join("below/0.tar"))
    );
}

#[test]
fn folder_follows_links_and_no_cycle() {
    let (root, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    write(&other, "far/x.jpg", "x");
    write(&root, "a/b.jpg", "b");
    symlink(root.path().join("a/b.jpg"), root.path().join("c.jpg")).unwrap();
    symlink(other.path().join("far"), root.path().join("far")).unwrap();
    symlink(root.path(), root.path().join("a/up")).unwrap();
    let folder = list(&root);
    assert_eq!(samples(&folder), ["a/b: jpg=b", "c: jpg=b", "far/x: jpg=x"]);
    assert!(folder.warnings()[0].starts_with("1 link passed over"));
}

#[test]
fn folder_is_cut_into_shards_by_names_alone() {
    let root = TempDir::new().unwrap();
    for n in 0..21 {
        write(&root, format!("{n:02}.jpg"), "");
    }
    let folder = list(&root);
    let shards: Vec<_> = folder.shards(folder.shard_size()).collect();
    assert_eq!(shards.len(), 3);
    let ranges = shards.iter().map(|shard| folder.samples_of(shard).unwrap());
    assert_eq!(ranges.collect::<Vec<_>>(), [0..8, 8..16, 16..21]);
    write(&root, "00.jpg", "other content");
    assert!(list(&root).shards(8).eq(shards.clone()));
    write(&root, "20b.jpg", "");
    let grown = list(&root);
    assert_eq!(grown.samples_of(&shards[0]).unwrap(), 0..8);
    let error = grown.samples_of(&shards[2]).unwrap_err().to_string();
    assert!(error.contains("since it was listed"), "{error}");
    assert_eq!(
        [0, 1, 512, 640, 64_001].map(|len| {
            let folder = ImageFolder {
                starts: vec![0; len + 1],
                ..list(&root)
            };
            folder.shard_size()
        }),
        [8, 8, 8, 10, 1000]
    );
}

#[test]
fn folder_takes_captions_from_metadata() {
    let root = TempDir::new().unwrap();
    for name in ["a.jpg", "b.jpg", "c.jpg", "t/d.jpg", "t/e.jpg"] {
        write(&root, name, "");
    }
    write(&root, "b.txt", "beside");
    let lines = [
        r#"{"file_name": "a.jpg", "text": "A", "width": 7}"#,
        "",
        r#"{"file_name": "b.jpg", "text": "B"}"#,
        r#"{"file_name": "./t/d.jpg", "text": "D"}"#,
        r#"{"file_name": "gone.jpg", "text": "?"}"#,
        r#"{"file_name": "c.jpg", "text": null}"#,
    ];
    write(&root, "metadata.jsonl", lines.join("\r\n"));
    write(
        &root,
        "t/metadata.csv",
        "file_name,caption,note\r\ne.jpg,\"two\nlines, \"\"quoted\"\"\",x\r\n",
    );
    let folder = list(&root);
    assert_eq!(
        samples(&folder),
        [
            r#"a: jpg= json={"file_name":"a.jpg","text":"A","width":7} text=A"#,
            r#"b: jpg= json={"file_name":"b.jpg","text":"B"} txt=beside"#,
            r#"c: jpg= json={"file_name":"c.jpg","text":null}"#,
            r#"t/d: jpg= json={"file_name":"./t/d.jpg","text":"D"} text=D"#,
            "t/e: caption=two\nlines, \"quoted\" jpg= json={\"file_name\":\"e.jpg\",\"caption\":\"two\\nlines, \\\"quoted\\\"\",\"note\":\"x\"}",
        ]
    );
    let warnings = folder.warnings();
    assert!(
        warnings.len() == 1
            && warnings[0].contains("\"gone.jpg\" in")
            && warnings[0].ends_with("metadata.jsonl line 5"),
        "{warnings:?}"
    );
}

#[test]
fn metadata_error_names_the_line() {
    let root = TempDir::new().unwrap();
    write(&root, "a.jpg", "");
    let refused = |name: &str, text: &str| {
        write(&root, name, text);
        let error = ImageFolder::list(root.path(), &MemberKeys::default());
        let error = error.map(drop).unwrap_err().to_string();
        fs::remove_file(root.path().join(name)).unwrap();
        error
    };
    let row = r#"{"file_name": "a.jpg", "text": "A"}"#;
    for (name, text, words) in [
        (
            "metadata.jsonl",
            format!("{row}\n{{\"text\": 1}}"),
            "metadata.jsonl: line 2 has no \"file_name\"",
        ),
        (
            "metadata.jsonl",
            format!("{row}\n{row}"),
            "line 2 names \"a.jpg\", as another row does",
        ),
        ("metadata.jsonl", "{".to_owned(), "metadata.jsonl: line 1 "),
        (
            "metadata.csv",
            "name,text\na.jpg,A\n".to_owned(),
            "metadata.csv: has no column \"file_name\"",
        ),
        (
            "metadata.csv",
            "file_name,text\na.jpg\n".to_owned(),
            "line: 2",
        ),
    ] {
        let error = refused(name, &text);
        assert!(error.contains(words), "{error}");
    }
    write(&root, "metadata.jsonl", row);
    let folder = list(&root);
    write(&root, "metadata.jsonl", "");
    let error = folder.write_tar(0..1, Vec::new()).unwrap_err().to_string();
    assert!(error.contains("changed since it was listed"), "{error}");
}

#[test]
fn file_that_is_gone_keeps_the_positions_of_samples() {
    let root = TempDir::new().unwrap();
    for name in ["a.jpg", "a.txt", "b.jpg", "b.txt", "c.jpg", "c.txt"] {
        write(&root, name, name);
    }
    let folder = list(&root);
    for name in ["a.jpg", "a.txt", "b.txt"] {
        fs::remove_file(root.path().join(name)).unwrap();
    }
    assert_eq!(
        samples(&folder),
        ["a: jpg=", "b: jpg=b.jpg", "c: jpg=c.jpg txt=c.txt"]
    );
    let unread = tar(&folder).1.unwrap();
    assert!(
        unread.starts_with("3 files can't be read; the first is ") && unread.contains("a.jpg: "),
        "{unread}"
    );
}

#[test]
fn reader_that_goes_away_ends_the_tar() {
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let root = TempDir::new().unwrap();
    write(&root, "a.jpg", "a");
    assert_eq!(list(&root).write_tar(0..1, Full).unwrap(), None);
}
