//! The page of a run at `/`: what it is told, and that a browser shows it.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::text;
use crate::support::watched::Watched;
use serde_json::Value;
use tempfile::TempDir;

/// The quickstart with few and small steps.
fn train(output: &Path, more: &[&str]) -> Watched {
    let output = format!("train.output={}", text(output));
    let mut args = vec!["train", "-c", "configs/quickstart.toml"];
    for setting in [
        output.as_str(),
        "train.batch_size=4",
        "report.grid=false",
        "report.endpoint_captions=0",
    ]
    .iter()
    .chain(more)
    {
        args.extend(["-s", setting]);
    }
    Watched::start(&args)
}

/// Events up to the end of the run, each handed to `look` as it comes; whether the last one said so.
fn follow(watched: &Watched, mut look: impl FnMut(&Value)) -> bool {
    let socket = watched.open("/events", &watched.address).unwrap();
    let (mut end, mut over) = (false, false);
    for line in BufReader::new(socket).lines().map_while(Result::ok) {
        // Empty lines and the transfer's chunks are between them.
        end |= line == "event: end";
        over |= end && line == "data: over";
        if let Some(json) = line.strip_prefix("data: {") {
            look(&serde_json::from_str(&format!("{{{json}")).unwrap());
        }
    }
    over
}

fn steps(update: &Value) -> Vec<u64> {
    let steps = update["curves"]["step"].as_array().unwrap().iter();
    steps.map(|step| step.as_u64().unwrap()).collect()
}

#[test]
fn the_page_is_told_of_every_step_also_of_those_before_a_resume() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let watched = train(&run, &["train.max_steps=12", "validation.every=4"]);
    // One who never reads must not hold the run up.
    let _deaf = watched.open("/events", &watched.address).unwrap();

    let page = watched.get("/").unwrap();
    assert_eq!(page.status, 200);
    for header in [
        "content-type: text/html; charset=utf-8\r\n",
        "content-security-policy: default-src 'none'; script-src 'sha256-",
        "x-content-type-options: nosniff\r\n",
    ] {
        assert!(page.head.contains(header), "{}", page.head);
    }
    for path in ["/", "/events", "/metrics", "/healthz", "/grid.png"] {
        let stranger = watched.ask(path, "evil.example:80").unwrap();
        assert_eq!(stranger.status, 421, "{path}");
    }
    assert_eq!(watched.get("/grid.png").unwrap().status, 404);

    let (mut seen, mut states, mut pictured, mut last) = (Vec::new(), Vec::new(), false, None);
    let over = follow(&watched, |update| {
        assert_eq!(update["curves"]["anew"], seen.is_empty() && last.is_none());
        seen.extend(steps(update));
        let status = &update["status"];
        let state = status["state"].as_str().unwrap().to_owned();
        if states.last() != Some(&state) {
            states.push(state);
        }
        // The run may be over before it is asked for.
        if let (false, Some(_), Some(grid)) = (
            pictured,
            status["grid"].as_u64(),
            watched.get("/grid.png?step=1"),
        ) {
            assert!(
                grid.head.contains("content-type: image/png"),
                "{}",
                grid.head
            );
            pictured = image::load_from_memory(&grid.body).unwrap().width() > 0;
        }
        last = Some(status.clone());
    });
    assert!(over, "the end was not told");
    assert_eq!(seen, (1..=12).collect::<Vec<u64>>());
    assert!(pictured);
    let status = last.unwrap();
    assert_eq!(
        states.first().map(String::as_str),
        Some("preparing"),
        "{states:?}"
    );
    assert_eq!(
        states.last().map(String::as_str),
        Some("finishing"),
        "{states:?}"
    );
    assert_eq!(status["command"], "train");
    assert_eq!(status["subject"], text(&run));
    assert_eq!(status["step"]["step"], 12);
    assert_eq!(status["step"]["samples"], 48);
    assert_eq!(status["progress"]["total"], 12);
    assert!(status["limit"].is_string(), "{status:#}");
    assert!(status["checkpoint"]["seconds"].as_f64().unwrap() > 0.0);
    assert!(status["s3_requests"]["ok"].as_u64().unwrap() > 0);
    let (code, said) = watched.end();
    assert_eq!(code, Some(0), "{said}");

    let watched = train(&run, &["train.max_steps=14", "validation.every=4"]);
    let mut seen = Vec::new();
    assert!(follow(&watched, |update| seen.extend(steps(update))));
    assert_eq!(seen, (1..=14).collect::<Vec<u64>>(), "the whole curve");
    assert_eq!(watched.end().0, Some(0));
}

#[test]
fn a_command_without_steps_has_a_page_too() {
    let watched = Watched::start(&[
        "bench",
        "-c",
        "configs/quickstart.toml",
        "--samples",
        "60000",
    ]);
    let mut last = Value::Null;
    let mut updates = 0;
    let over = follow(&watched, |update| {
        assert!(steps(update).is_empty());
        last = update["status"].clone();
        updates += 1;
        if updates == 3 {
            watched.terminate();
        }
    });
    // `bench` has nothing to save: it ends at the signal, without a word to the page.
    assert!(!over);
    assert_eq!(last["command"], "bench");
    assert_eq!(last["progress"]["unit"], "samples");
    assert_eq!(last["step"], Value::Null);
    let stages = last["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 7, "{last:#}");
}

/// In headless Chromium, by `tests/browser/look_on.py`; its pictures are kept in cargo's temporary folder.
#[test]
fn a_person_sees_the_run_in_a_browser() {
    let (Some(python), Some(_browser)) = (
        std::env::var_os("COFFEY_PYTHON"),
        std::env::var_os("COFFEY_BROWSER"),
    ) else {
        eprintln!("COFFEY_PYTHON or COFFEY_BROWSER is not set: no browser looked at the page");
        return;
    };
    let folder = TempDir::new().unwrap();
    // Names are other people's text.
    let run = folder
        .path()
        .join("a <b>bold<img src=x onerror=alert(1)> run");
    let watched = train(
        &run,
        &[
            "train.max_steps=100000",
            "validation.every=6",
            "checkpoint.every=10",
        ],
    );
    let pictures = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("page");
    std::fs::create_dir_all(&pictures).unwrap();
    let mut looker = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser/look_on.py"))
        .arg(format!("http://{}/", watched.address))
        .arg(&pictures)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It says so when it has seen a run go on, and then looks at how it ends.
    let mut told = String::new();
    let mut out = BufReader::new(looker.stdout.take().unwrap());
    out.read_line(&mut told).unwrap();
    watched.terminate();
    out.read_to_string(&mut told).unwrap();
    assert!(looker.wait().unwrap().success(), "{told}");
    assert_eq!(told, "seen\nover\n");
    assert_eq!(watched.end().0, Some(143));
}
