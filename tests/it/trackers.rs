//! Files of experiment trackers: every step once, however often the run is killed.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::{QUICKSTART, args, command, python, steps_made, succeed, text};

fn train(run: &Path, more: &[&str]) -> Vec<String> {
    let output = format!("train.output={}", text(run));
    let own = [
        output.as_str(),
        "train.batch_size=2",
        "checkpoint.every=3",
        "validation.every=2",
        "validation.steps=1",
        "validation.prompts=['red apple']",
        "validation.images_per_prompt=2",
        "report.endpoint_captions=2",
        "report.endpoint_every=4",
        "report.grid=false",
        "track.wandb=lcm",
    ];
    args("train", QUICKSTART, own.iter().chain(more))
}

fn event_files(run: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = run
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| text(path).contains("tfevents"))
        .collect();
    files.sort();
    files
}

/// Logs of offline runs of W&B.
fn offline_runs(run: &Path) -> Vec<PathBuf> {
    let Ok(folders) = run.join("wandb").read_dir() else {
        return Vec::new();
    };
    let files = folders.flat_map(|folder| folder.unwrap().path().read_dir().unwrap());
    let files = files.map(|file| file.unwrap().path());
    files
        .filter(|file| text(file).ends_with(".wandb"))
        .collect()
}

/// Kills a run with SIGKILL once it has made `steps` steps.
fn kill_after(run: &Path, steps: usize) {
    let args = train(run, &["train.max_steps=1000"]);
    let mut child = command(&args).stderr(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    while steps_made(run) < steps {
        assert!(begun.elapsed() < Duration::from_secs(120), "no steps");
        assert!(child.try_wait().unwrap().is_none(), "the run ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Kills a run twice and finishes it, starts it again, and once more after the loss of its events. Calls `check` where the events
/// must be complete.
fn run_with_kills(check: impl Fn(&Path)) {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    kill_after(&run, 5);
    // A torn record, as of a kill within a write.
    let newest = event_files(&run).pop().unwrap();
    let offline = offline_runs(&run).pop().unwrap();
    for log in [newest, offline.clone()] {
        let mut file = std::fs::File::options().append(true).open(log).unwrap();
        file.write_all(&[7; 30]).unwrap();
    }
    kill_after(&run, steps_made(&run) + 2);
    let last = format!("train.max_steps={}", steps_made(&run) + 2);
    succeed(&train(&run, &[&last]));
    let files = event_files(&run);
    assert!(files.len() > 1, "{files:?}");
    check(&run);

    // A finished run that is started again adds no events.
    let whole = std::fs::read(&offline).unwrap();
    succeed(&train(&run, &[&last]));
    assert_eq!(event_files(&run), files);
    assert_eq!(offline_runs(&run), [offline.as_path()]);
    assert!(std::fs::read(&offline).unwrap() == whole);

    // Events that were lost, as in a folder that could not be written, are written again.
    for file in files.iter().chain([&offline]) {
        std::fs::remove_file(file).unwrap();
    }
    succeed(&train(&run, &[&last]));
    assert_eq!(event_files(&run).len(), 1);
    assert_eq!(offline_runs(&run), [offline]);
    check(&run);
}

#[test]
fn event_files_survive_kills_and_loss() {
    run_with_kills(|_| {});
}

#[test]
fn no_events_without_trackers() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let output = format!("train.output={}", text(&run));
    let more = [
        "train.max_steps=1",
        "track.tensorboard=false",
        "report.endpoint_captions=0",
    ];
    succeed(&args(
        "train",
        QUICKSTART,
        [output.as_str()].iter().chain(&more),
    ));
    assert_eq!(event_files(&run), Vec::<PathBuf>::new());
    assert_eq!(offline_runs(&run), Vec::<PathBuf>::new());
}

mod needs_python {
    use super::*;

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with TensorBoard and wandb"]
    fn trackers_read_every_step_once() {
        run_with_kills(|run| {
            python("read_events.py", &[run]);
            python("sync_wandb.py", &[run]);
        });
    }
}
