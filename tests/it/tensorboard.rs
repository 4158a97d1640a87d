//! What TensorBoard shows of a run, read by TensorBoard itself: everything once, however often the run was killed.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{command, python, succeed, text};
use tempfile::TempDir;

fn args(run: &Path, more: &[&str]) -> Vec<String> {
    let output = format!("train.output={}", text(run));
    let fixed = [
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
    ];
    let settings = fixed.iter().chain(more);
    ["train", "-c", "configs/quickstart.toml"]
        .map(str::to_owned)
        .into_iter()
        .chain(settings.flat_map(|s| ["-s".to_owned(), (*s).to_owned()]))
        .collect()
}

fn refs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
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

fn steps(run: &Path) -> usize {
    std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// Kills a run with SIGKILL once it has made so many steps.
fn killed_after(run: &Path, made: usize) {
    let args = args(run, &["train.max_steps=1000"]);
    let mut child = command(&refs(&args)).stderr(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    while steps(run) < made {
        assert!(begun.elapsed() < Duration::from_secs(120), "no steps");
        assert!(child.try_wait().unwrap().is_none(), "the run ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn tensorboard_reads_every_step_once_of_a_run_that_was_killed() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    killed_after(&run, 5);
    // As if the kill had come within a record.
    let newest = event_files(&run).pop().unwrap();
    let mut file = std::fs::File::options().append(true).open(newest).unwrap();
    file.write_all(&[7; 30]).unwrap();
    drop(file);
    let made = steps(&run);
    killed_after(&run, made + 2);
    let last = format!("train.max_steps={}", steps(&run) + 2);
    succeed(&refs(&args(&run, &[&last])));
    let files = event_files(&run);
    assert!(files.len() > 1, "{files:?}");
    python("read_events.py", &[&run]);

    // A finished run that is started once more adds nothing.
    succeed(&refs(&args(&run, &[&last])));
    assert_eq!(event_files(&run), files);

    // Lost, as a folder that could not be written at the time.
    for file in files {
        std::fs::remove_file(file).unwrap();
    }
    succeed(&refs(&args(&run, &[&last])));
    assert_eq!(event_files(&run).len(), 1);
    python("read_events.py", &[&run]);
}

#[test]
fn nothing_is_written_unless_it_is_wanted() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let more = ["train.max_steps=1", "track.tensorboard=false"];
    succeed(&refs(&args(&run, &more)));
    assert_eq!(event_files(&run), Vec::<PathBuf>::new());
}
