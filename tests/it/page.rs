//! The page of a run at `/`: its events, and its display in a browser.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::watched::Watched;
use crate::support::{NO_PICTURES, QUICKSTART, args, needed, repository, text};
use serde_json::Value;
use tempfile::TempDir;

/// Trains on the quickstart with small steps.
fn train(output: &Path, more: &[&str]) -> Watched {
    let output = format!("train.output={}", text(output));
    let small = [output.as_str(), "train.batch_size=4"];
    let settings = [&small[..], &NO_PICTURES, more].concat();
    Watched::start(&args("train", QUICKSTART, settings))
}

/// Passes each event to `look` until the connection ends; returns whether the last event announced the end of the run.
fn follow(watched: &Watched, mut look: impl FnMut(&Value)) -> bool {
    let socket = watched.open("/events", &watched.address).unwrap();
    let (mut end, mut over) = (false, false);
    for line in BufReader::new(socket).lines().map_while(Result::ok) {
        // Empty lines and chunk lengths stand between the events.
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
fn page_events_cover_every_step_across_resume() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let watched = train(&run, &["train.max_steps=12", "validation.every=4"]);
    // A client that never reads must not block the run.
    let _idle_client = watched.open("/events", &watched.address).unwrap();

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
        let answer = watched.ask(path, "evil.example:80").unwrap();
        assert_eq!(answer.status, 421, "{path}");
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
        // The run may end before the request.
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
    assert!(over, "no event announced the end");
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
    let (code, messages) = watched.end();
    assert_eq!(code, Some(0), "{messages}");

    let watched = train(&run, &["train.max_steps=14", "validation.every=4"]);
    let mut seen = Vec::new();
    assert!(follow(&watched, |update| seen.extend(steps(update))));
    assert_eq!(seen, (1..=14).collect::<Vec<u64>>(), "the whole curve");
    assert_eq!(watched.end().0, Some(0));
}

#[test]
fn page_works_for_command_without_steps() {
    let watched = Watched::start(&["bench", "-c", QUICKSTART, "--samples", "60000"]);
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
    // `bench` has nothing to save, so it ends at the signal without a last event.
    assert!(!over);
    assert_eq!(last["command"], "bench");
    assert_eq!(last["progress"]["unit"], "samples");
    assert_eq!(last["step"], Value::Null);
    let stages = last["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 7, "{last:#}");
}

mod needs_browser {
    use super::*;

    /// Runs `tests/browser/look_on.py` with headless Chromium; its pictures are kept in cargo's temporary folder.
    #[test]
    #[ignore = "needs COFFEY_PYTHON and COFFEY_BROWSER: a Python with playwright, and a headless Chromium"]
    fn page_renders_in_chromium() {
        let (python, browser) = (needed("COFFEY_PYTHON"), needed("COFFEY_BROWSER"));
        let folder = TempDir::new().unwrap();
        // The page must escape names.
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
        let mut script = Command::new(python)
            .env("COFFEY_BROWSER", browser)
            .arg(repository("tests/browser/look_on.py"))
            .arg(format!("http://{}/", watched.address))
            .arg(&pictures)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // The script prints a line when it has seen the run go on, and another when it has seen the run end.
        let mut printed = String::new();
        let mut out = BufReader::new(script.stdout.take().unwrap());
        out.read_line(&mut printed).unwrap();
        watched.terminate();
        out.read_to_string(&mut printed).unwrap();
        assert!(script.wait().unwrap().success(), "{printed}");
        assert_eq!(printed, "seen\nover\n");
        assert_eq!(watched.end().0, Some(143));
    }
}
