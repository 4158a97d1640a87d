//! Lanes of the stream, all in one process.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    NO_PICTURES, QUICKSTART, args, command, messages, refused, says, student, timeless,
};

/// A short run of four micro-batches a step into `output`.
fn train(output: &Path, more: &[&str]) -> Command {
    let output = format!("train.output={}", output.display());
    let small = [
        output.as_str(),
        "train.batch_size=1",
        "train.gradient_accumulation=4",
        "data.shuffle_buffer=20",
        "checkpoint.every=100",
    ];
    let settings = [&small[..], &NO_PICTURES, more].concat();
    command(&args("train", QUICKSTART, settings))
}

#[test]
fn lanes_resume_bit_for_bit() {
    let folder = TempDir::new().unwrap();
    let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
    let said = messages(train(&whole, &["train.max_steps=5"]));
    says(&said, &["4 lanes of the data"]);
    for steps in [2, 3, 5] {
        messages(train(&parts, &[&format!("train.max_steps={steps}")]));
    }
    assert_eq!(timeless(&parts), timeless(&whole));
    assert_eq!(student(&parts), student(&whole));
    // The number of lanes is part of the order and of the gradients' sum.
    let other = folder.path().join("other");
    messages(train(&other, &["train.max_steps=5", "data.lanes=2"]));
    assert_ne!(timeless(&other), timeless(&whole));
}

#[test]
fn run_keeps_its_lanes() {
    let folder = TempDir::new().unwrap();
    let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
    messages(train(&whole, &["train.max_steps=3", "data.lanes=1"]));
    messages(train(&parts, &["train.max_steps=2", "data.lanes=1"]));
    // As a run of an earlier version, whose configuration names no lanes.
    messages(train(&parts, &["train.max_steps=3"]));
    assert_eq!(student(&parts), student(&whole));
    let two = train(&parts, &["train.max_steps=4", "data.lanes=2"]);
    refused(two, 2, &["lanes = 1, and now it is 2"]);
}

/// Makes a checkpoint of one lane that of coffey before there were lanes.
fn make_old(checkpoint: &Path) {
    let path = checkpoint.join("state.json");
    let mut state: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut cursor = state["cursor"]["lanes"][0].take();
    cursor.as_object_mut().unwrap().remove("lane");
    let mut identity = state["cursor"]["identity"].take();
    identity.as_object_mut().unwrap().remove("lanes");
    (identity["rank"], identity["world"]) = (0.into(), 1.into());
    (cursor["version"], cursor["identity"]) = (2.into(), identity);
    state["cursor"] = cursor;
    let configuration = state["configuration"].as_str().unwrap();
    assert!(configuration.contains("\nlanes = 1\n"));
    state["configuration"] = configuration.replace("\nlanes = 1\n", "\n").into();
    state.as_object_mut().unwrap().remove("sha256");
    std::fs::write(&path, state.to_string()).unwrap();
}

#[test]
fn checkpoint_without_lanes_goes_on_in_one() {
    let folder = TempDir::new().unwrap();
    let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
    messages(train(&whole, &["train.max_steps=3", "data.lanes=1"]));
    messages(train(&parts, &["train.max_steps=2", "data.lanes=1"]));
    make_old(&parts.join("checkpoint-2"));
    let said = messages(train(&parts, &["train.max_steps=3"]));
    says(&said, &["checkpoint-2 (step 2)"]);
    assert!(!said.contains("lanes of the data"), "{said}");
    assert_eq!(student(&parts), student(&whole));
    assert_eq!(timeless(&parts), timeless(&whole));
}

#[test]
fn lanes_that_do_not_fit_are_refused() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    for lanes in [3, 8] {
        let refusing = train(&run, &[&format!("data.lanes={lanes}")]);
        refused(
            refusing,
            2,
            &["data.lanes", "train.gradient_accumulation = 4"],
        );
    }
    let more = ["train.gradient_accumulation=8", "data.lanes=8"];
    refused(train(&run, &more), 2, &["4 shards", "8 lanes"]);
}
