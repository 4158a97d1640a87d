//! `coffey train` started again: after a signal, when it is finished, with damaged records, beside another process.

use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::support::{
    command, messages, records, refuse, refused, says, send, terminate, text, wait_for_steps,
};
use crate::train::train_args;

#[test]
fn hangup_saves_unless_it_is_ignored() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let args = train_args(&run, &["train.max_steps=400", "checkpoint.every=1000"]);
    let mut child = command(&args).stderr(Stdio::null()).spawn().unwrap();
    wait_for_steps(&run, 1);
    send(&child, "HUP");
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let made = records(&run).len();
    assert!(run.join(format!("checkpoint-{made}/state.json")).is_file());

    let last = made + 3;
    let args = train_args(&run, &[&format!("train.max_steps={last}")]);
    let inner = command(&args);
    let mut child = Command::new("nohup")
        .arg(inner.get_program())
        .args(inner.get_args())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for_steps(&run, made + 1);
    send(&child, "HUP");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(records(&run).len(), last);
}

#[test]
fn finished_run_says_so_and_fewer_steps_are_refused() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let train = |steps: &str| command(&train_args(&run, &[&format!("train.max_steps={steps}")]));
    messages(train("2"));
    let said = messages(train("2"));
    says(
        &said,
        &[
            "the run is finished",
            "checkpoint-2",
            "raise train.max_steps",
        ],
    );
    let words = [
        "checkpoint-2 is of step 2, and train.max_steps is 1",
        "train.output",
    ];
    refused(train("1"), 2, &words);
    let said = messages(train("3"));
    assert!(!said.contains("finished"), "{said}");
}

#[test]
fn lost_and_damaged_records_are_said_on_resume() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let train = |steps: &str| command(&train_args(&run, &[&format!("train.max_steps={steps}")]));
    let said = messages(train("3"));
    assert!(!said.contains("warning"), "{said}");
    let metrics = run.join("metrics.jsonl");
    let whole = std::fs::read_to_string(&metrics).unwrap();
    let damaged = whole.replacen("{\"step\":2", "{\"step", 1);
    assert_ne!(damaged, whole);
    std::fs::write(&metrics, damaged).unwrap();
    let said = messages(train("4"));
    let words = [
        "metrics.jsonl: line 2 can't be read; step 2 missing",
        "the run goes on",
    ];
    says(&said, &words);
    std::fs::remove_file(&metrics).unwrap();
    std::fs::remove_file(run.join("skipped.jsonl")).unwrap();
    let said = messages(train("5"));
    let words = [
        "metrics.jsonl: steps 1 to 4 missing",
        "skipped.jsonl: steps 1 to 4 missing",
    ];
    says(&said, &words);
    assert_eq!(records(&run).len(), 1);
    let said = messages(train("6"));
    assert!(!said.contains("missing"), "{said}");
}

#[test]
fn output_is_checked_before_models_are_loaded() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    // A teacher that can't be loaded would be refused as well, later.
    let teacher = folder.path().join("teacher/unet");
    std::fs::create_dir_all(&teacher).unwrap();
    let teacher = format!("model.teacher={:?}", text(&folder.path().join("teacher")));
    for output in [&file, &file.join("run")] {
        let words = ["train.output can't be written", "file: is not a folder"];
        refuse(2, &train_args(output, &[&teacher]), &words);
    }
    let run = folder.path().join("a/run");
    refuse(1, &train_args(&run, &[&teacher]), &["teacher"]);
    assert!(!folder.path().join("a").exists(), "it left its folder");

    let held = train_args(&run, &["train.max_steps=400"]);
    let mut child = command(&held).stderr(Stdio::null()).spawn().unwrap();
    wait_for_steps(&run, 1);
    let holder = format!("another process (pid {} on host ", child.id());
    refuse(
        2,
        &train_args(&run, &[&teacher]),
        &[&holder, "is training into this folder"],
    );
    let check = [&["check".to_owned()], &train_args(&run, &[])[1..]].concat();
    refuse(2, &check, &[&holder]);
    terminate(&child);
    child.wait().unwrap();
}
