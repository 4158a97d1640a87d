//! Runs of several ranks: their command lines and what they leave.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use super::{NO_PICTURES, QUICKSTART, args, command, steps_made, timeless};

/// The arguments of a short run of four lanes into `output`.
pub(crate) fn train(output: &str, more: &[&str]) -> Vec<String> {
    let output = format!("train.output={output}");
    let small = [
        output.as_str(),
        "train.batch_size=1",
        "train.gradient_accumulation=4",
        "data.shuffle_buffer=20",
        "data.filter.min_caption_chars=8",
        "checkpoint.every=2",
        "train.max_steps=4",
    ];
    let settings = [&small[..], &NO_PICTURES, more].concat();
    args("train", QUICKSTART, settings)
}

/// A command line on `ranks` ranks, begun by `launcher`; a second part of the job as in `mpirun A : B`.
pub(crate) fn launched(
    launcher: &[&str],
    ranks: usize,
    args: &[String],
    other: Option<&[String]>,
) -> Command {
    // The variables of schedulers and clouds are those of a plain command.
    let mut plain = command(&[] as &[&str]);
    let mut command = Command::new(launcher[0]);
    command
        .args(&launcher[1..])
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    for (name, value) in plain.env("OMPI_ALLOW_RUN_AS_ROOT", "1").get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    let binary = env!("CARGO_BIN_EXE_coffey");
    command.args(["-n", &ranks.to_string(), binary]).args(args);
    if let Some(other) = other {
        command.args([":", "-n", "1", binary]).args(other);
    }
    command
}

/// Every file of a finished run that times do not change.
fn results(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut results = BTreeMap::new();
    for folder in ["unet", "unet_target", "unet_lora", "samples", "."] {
        let Ok(entries) = std::fs::read_dir(run.join(folder)) else {
            continue;
        };
        for entry in entries.map(|entry| entry.unwrap().path()) {
            let name = entry.file_name().unwrap().to_string_lossy().into_owned();
            let timed = folder == "." && name != "skipped.jsonl";
            if entry.is_file() && !timed {
                results.insert(format!("{folder}/{name}"), std::fs::read(&entry).unwrap());
            }
        }
    }
    let lines = timeless(run);
    let lines: Vec<String> = lines.iter().map(ToString::to_string).collect();
    results.insert("metrics.jsonl".to_owned(), lines.join("\n").into_bytes());
    assert!(
        !results["./skipped.jsonl"].is_empty(),
        "no sample was skipped"
    );
    results
}

/// Fails unless two runs left the same bytes.
#[track_caller]
pub(crate) fn assert_same(found: &Path, expected: &Path) {
    let (found, expected) = (results(found), results(expected));
    assert!(found.keys().eq(expected.keys()), "{:?}", found.keys());
    for (name, content) in &expected {
        assert!(found[name] == *content, "{name}");
    }
}

/// The step of the newest checkpoint that is whole.
#[track_caller]
pub(crate) fn newest_checkpoint(run: &Path) -> usize {
    let whole = |step: &usize| run.join(format!("checkpoint-{step}/state.json")).is_file();
    (1..=steps_made(run)).rev().find(whole).unwrap()
}
