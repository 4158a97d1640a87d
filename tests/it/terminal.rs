//! Text from shards, servers and the configuration does not control the terminal.

use std::path::Path;

use tempfile::TempDir;

use crate::support::{QUICKSTART, args, command, repository, run, text, texts};

/// Clears the screen, sets the title, ends the line, and turns the direction of text.
const HOSTILE: &str = "\u{1b}[2J\u{1b}]0;title\u{7}\nerror: false\u{9b}\u{202e}\u{2066}\r";

/// Writes a tar whose keys, captions and member names are hostile; each sample is a caption and an image.
fn shard(path: &Path, samples: &[(&str, Option<&[u8]>)]) {
    let mut tar = tar::Builder::new(std::fs::File::create(path).unwrap());
    let mut append = |name: String, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, content).unwrap();
    };
    for (index, (caption, image)) in samples.iter().enumerate() {
        let key = format!("k{index}{}", HOSTILE.replace('.', ""));
        if let Some(image) = image {
            append(format!("{key}.png"), image);
        }
        append(format!("{key}.txt"), caption.as_bytes());
        append(format!("{key}.x{HOSTILE}"), b"");
    }
    tar.finish().unwrap();
}

fn png() -> Vec<u8> {
    let mut png = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_fn(64, 64, |x, y| image::Rgb([x as u8, y as u8, 0]))
        .write_to(&mut png, image::ImageFormat::Png)
        .unwrap();
    png.into_inner()
}

#[track_caller]
fn harmless(shown: &str) {
    for (number, line) in shown.lines().enumerate() {
        let control = |c: char| {
            (c.is_control() && c != '\t')
                || ('\u{202a}'..='\u{202e}').contains(&c)
                || ('\u{2066}'..='\u{2069}').contains(&c)
        };
        assert!(!line.contains(control), "line {number}: {line:?}");
        assert!(!line.starts_with("error: false"), "line {number}: {line:?}");
    }
}

#[test]
fn hostile_names_do_not_reach_the_terminal() {
    let folder = TempDir::new().unwrap();
    let good = folder.path().join("good.tar");
    let png = png();
    let samples: Vec<_> = (0..12).map(|_| (HOSTILE, Some(&png[..]))).collect();
    shard(&good, &samples);
    let bad = folder.path().join(format!("bad{HOSTILE}.tar"));
    shard(
        &bad,
        &[
            (HOSTILE, None),
            (HOSTILE, Some(b"no image")),
            ("", Some(&png)),
        ],
    );
    let cut = folder.path().join("cut.tar");
    let whole = std::fs::read(&good).unwrap();
    std::fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let output = format!("train.output={}", text(&folder.path().join("run")));
    for shard in [&good, &bad, &cut] {
        for mut line in [
            vec!["inspect".to_owned()],
            vec!["inspect".to_owned(), "--json".to_owned()],
        ] {
            line.push(text(shard).to_owned());
            let shown = command(&line).output().unwrap();
            let (out, err) = texts(&shown);
            harmless(&out);
            harmless(&err);
            if line.len() == 3 {
                let report: serde_json::Value = serde_json::from_str(&out).unwrap();
                assert!(report["shards"][0]["url"].is_string(), "{out}");
            }
        }
        let set = [
            format!("data.shards=[{}]", toml_string(text(shard))),
            "train.batch_size=2".to_owned(),
            "train.max_steps=1".to_owned(),
            "validation.every=1000".to_owned(),
            "report.endpoint_captions=0".to_owned(),
            "report.grid=false".to_owned(),
            "data.max_bad_fraction=0.1".to_owned(),
            output.clone(),
        ];
        for name in ["bench", "check", "train"] {
            let shown = command(&args(name, QUICKSTART, &set)).output().unwrap();
            let (out, err) = texts(&shown);
            harmless(&out);
            harmless(&err);
            std::fs::remove_dir_all(folder.path().join("run")).ok();
        }
    }
}

fn toml_string(text: &str) -> String {
    serde_json::to_string(text).unwrap()
}

#[test]
fn hostile_arguments_and_values_do_not_reach_the_terminal() {
    let quickstart = repository(QUICKSTART);
    for (line, code) in [
        (vec!["inspect", HOSTILE], 1),
        (vec![HOSTILE], 2),
        (vec!["train", HOSTILE], 2),
        (vec!["train", "-c", HOSTILE], 2),
        (vec!["check", "-c", text(&quickstart), "-s", HOSTILE], 2),
        (
            vec![
                "check",
                "-c",
                text(&quickstart),
                "-s",
                &format!("train.x{HOSTILE}=1"),
            ],
            2,
        ),
        (
            vec![
                "check",
                "-c",
                text(&quickstart),
                "-s",
                &format!("train.max_steps={HOSTILE}"),
            ],
            2,
        ),
        (
            vec![
                "check",
                "-c",
                text(&quickstart),
                "-s",
                &format!("model.teacher={HOSTILE}"),
            ],
            2,
        ),
        (vec!["inspect", &format!("http://127.0.0.1:1/{HOSTILE}")], 1),
    ] {
        let (out, err) = run(command(&line), code);
        harmless(&out);
        harmless(&err);
    }
}
