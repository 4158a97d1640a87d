//! Two runs never write to one output: the lock of a prefix in S3.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::cloud::Cloud;
use crate::support::cloud::proxy::clean;
use crate::support::{command, messages, refused, says, terminate, text};
use crate::train::train_args;

const PLACE: &str = "s3://out/run";

/// A server, and a folder for each of two machines.
struct Machines {
    cloud: Cloud,
    folder: TempDir,
}

impl Machines {
    fn new() -> Self {
        Self {
            cloud: Cloud::start(clean()),
            folder: TempDir::new().unwrap(),
        }
    }

    /// A run of `steps` steps on a machine, whose scratch folder it does not share.
    fn train(&self, machine: &str, steps: u32) -> Command {
        let scratch = self.folder.path().join(machine);
        let scratch = format!("train.scratch={}", scratch.display());
        let steps = format!("train.max_steps={steps}");
        let more = [
            scratch.as_str(),
            &steps,
            "checkpoint.every=1",
            "checkpoint.background=false",
        ];
        let mut args = train_args(Path::new(PLACE), &more);
        args[2] = text(&self.cloud.config).to_owned();
        command(&args)
    }

    fn in_run(&self, name: &str) -> PathBuf {
        self.cloud.out().join("run").join(name)
    }

    /// Starts an endless run and waits for its first checkpoint.
    fn start(&self, machine: &str) -> Child {
        let mut command = self.train(machine, 100_000);
        let child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while !self.in_run("checkpoint-1/state.json").exists() {
            assert!(begun.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_millis(20));
        }
        child
    }

    /// Goes on from the newest checkpoint for one step; returns the messages.
    fn one_step_more(&self, machine: &str) -> String {
        let step = |entry: std::io::Result<std::fs::DirEntry>| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let step = name.strip_prefix("checkpoint-")?.parse::<u32>().unwrap();
            self.in_run(&name)
                .join("state.json")
                .exists()
                .then_some(step)
        };
        let entries = std::fs::read_dir(self.in_run("")).unwrap();
        let newest = entries.filter_map(step).max().unwrap();
        let said = messages(self.train(machine, newest + 1));
        says(&said, &[&format!("checkpoint-{newest} (step {newest})")]);
        said
    }

    /// The lock of the run; empty if there is none.
    fn lock(&self) -> String {
        std::fs::read_to_string(self.in_run(".lock")).unwrap_or_default()
    }

    /// Leaves the lock of a process of another machine.
    fn lock_elsewhere(&self, lease: u64, renewed: u64) {
        let process = r#"{"system":"another","pid":7,"started":"1"}"#;
        let lock = format!(
            r#"{{"holder":"pid 7 on host far","process":{process},"renewed":{renewed},"lease":{lease}}}"#
        );
        self.cloud.put("run/.lock", lock.as_bytes());
    }
}

#[test]
fn second_run_into_a_prefix_is_refused_and_a_killed_one_makes_room() {
    let machines = Machines::new();
    let mut first = machines.start("one");
    let holder = format!("another process (pid {} on host ", first.id());
    let words = [PLACE, &holder, "name another train.output"];
    refused(machines.train("two", 3), 2, &words);
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(machines.in_run(".lock").exists());
    // The process is known to have ended: nothing is waited for.
    let said = machines.one_step_more("two");
    assert!(!said.contains("waiting until"), "{said}");
    assert!(!machines.in_run(".lock").exists());
}

#[test]
fn lock_of_another_machine_is_taken_over_after_its_lease() {
    let machines = Machines::new();
    machines.lock_elsewhere(2, 0);
    let said = messages(machines.train("one", 1));
    says(
        &said,
        &[
            "another process (pid 7 on host far) has locked this output",
            "2 s at most",
        ],
    );
    assert!(!machines.in_run(".lock").exists());
    // A lock that is renewed belongs to a process that lives.
    machines.lock_elsewhere(600, 0);
    std::thread::scope(|scope| {
        let refused = scope.spawn(|| {
            let words = ["pid 7 on host far", "is training into this prefix"];
            refused(machines.train("one", 2), 2, &words)
        });
        for renewed in 1.. {
            if refused.is_finished() {
                break;
            }
            assert!(renewed < 600, "the run waits for ever");
            machines.lock_elsewhere(600, renewed);
            std::thread::sleep(Duration::from_millis(100));
        }
        refused.join().unwrap();
    });
    // A stop ends the wait.
    let mut waiting = machines.train("one", 2);
    let mut waiting = waiting.stderr(Stdio::piped()).spawn().unwrap();
    let said = BufReader::new(waiting.stderr.take().unwrap());
    let mut said = said.lines().map(Result::unwrap);
    assert!(said.any(|line| line.contains("has locked this output")));
    terminate(&waiting);
    assert_eq!(waiting.wait().unwrap().code(), Some(143));
    assert!(machines.in_run(".lock").exists());
}

#[test]
fn run_whose_lock_is_taken_over_saves_nothing_more() {
    let machines = Machines::new();
    let first = machines.start("one");
    machines.lock_elsewhere(60, 0);
    let output = first.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    says(
        &said,
        &[PLACE, "pid 7 on host far has taken this output over"],
    );
    assert!(machines.lock().contains("pid 7 on host far"));
    machines.lock_elsewhere(0, 0);
    machines.one_step_more("two");
}
