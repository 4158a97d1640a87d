//! Runs of several ranks without MPI, connected by TCP as `torchrun` and Kubernetes jobs start them.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::mpi::{assert_same, train};
use crate::support::{command, refused, run, says, send, steps_made, texts, wait_for_steps};

/// A job of several processes.
struct Job(Vec<Child>);

impl Drop for Job {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended and been waited for.
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// A port of loopback that is free now.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn rank(index: usize, world: usize, port: u16, args: &[String]) -> Command {
    let mut command = command(args);
    command
        .env("RANK", index.to_string())
        .env("WORLD_SIZE", world.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

impl Job {
    fn start(world: usize, args: &[String]) -> Self {
        let port = free_port();
        // Rank 0 begins last: the others call until it listens.
        let ranks = (0..world).rev().map(|index| {
            let mut rank = rank(index, world, port, args);
            rank.spawn().unwrap()
        });
        let mut ranks: Vec<Child> = ranks.collect();
        ranks.reverse();
        Self(ranks)
    }

    /// Waits for all ranks; returns their exit codes and messages.
    fn end(mut self) -> Vec<(Option<i32>, String)> {
        let ended = self.0.drain(..).map(|child| {
            let output: Output = child.wait_with_output().unwrap();
            (output.status.code(), texts(&output).1)
        });
        ended.collect()
    }

    #[track_caller]
    fn succeed(self) -> String {
        let ended = self.end();
        assert!(ended.iter().all(|(code, _)| *code == Some(0)), "{ended:?}");
        ended.into_iter().next().unwrap().1
    }
}

#[test]
fn ranks_over_tcp_change_no_bit() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let args = |name: &str| train(at(name).to_str().unwrap(), &[]);
    run(command(&args("one")), 0);
    for (name, world) in [("two", 2), ("four", 4)] {
        let said = Job::start(world, &args(name)).succeed();
        says(
            &said,
            &[&format!("{world} ranks on 1 machine, TCP"), "4 lanes"],
        );
        assert_same(&at(name), &at("one"));
    }
}

#[test]
fn end_of_a_rank_over_tcp_ends_all() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("run");
    let args = |more: &[&str]| train(output.to_str().unwrap(), more);
    let endless = args(&["train.max_steps=100000", "train.stall_timeout=3"]);
    // A rank that is killed.
    let mut job = Job::start(2, &endless);
    wait_for_steps(&output, 3);
    job.0[1].kill().unwrap();
    let ended = job.end();
    assert_eq!(ended[0].0, Some(1), "{ended:?}");
    says(&ended[0].1, &["error: ", "the connection to rank 1 ("]);
    // A rank that stands still, whichever of the two.
    for (stopped, other) in [(1, 0), (0, 1)] {
        let made = steps_made(&output);
        let mut job = Job::start(2, &endless);
        wait_for_steps(&output, made + 2);
        send(&job.0[stopped], "STOP");
        let begun = Instant::now();
        let mut other = job.0.remove(other);
        let code = other.wait().unwrap().code();
        assert!(begun.elapsed() < Duration::from_secs(20));
        let mut said = String::new();
        std::io::Read::read_to_string(&mut other.stderr.take().unwrap(), &mut said).unwrap();
        assert_eq!(code, Some(1), "{said}");
        says(&said, &[&format!("no answer from rank {stopped} (")]);
    }
    // A signal to one rank stops all after the same step.
    let made = steps_made(&output);
    let job = Job::start(2, &endless);
    wait_for_steps(&output, made + 2);
    send(&job.0[1], "TERM");
    let ended = job.end();
    assert!(
        ended.iter().all(|(code, _)| *code == Some(143)),
        "{ended:?}"
    );
    let last = steps_made(&output);
    assert!(
        output
            .join(format!("checkpoint-{last}/state.json"))
            .is_file()
    );
}

#[test]
fn ranks_over_tcp_that_do_not_fit_are_refused() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("run");
    let args = |more: &[&str]| train(output.to_str().unwrap(), more);
    let two = |first: Command, second: Command| {
        let mut job = Job([first, second].map(|mut rank| rank.spawn().unwrap()).into());
        let ended = job.0.drain(..).map(|child| {
            let output = child.wait_with_output().unwrap();
            (output.status.code(), texts(&output).1)
        });
        ended.collect::<Vec<_>>()
    };
    // Another configuration: the rank that finds it says so, and both end with its code.
    let port = free_port();
    let (ours, theirs) = (args(&[]), args(&["train.seed=1"]));
    let ended = two(rank(0, 2, port, &ours), rank(1, 2, port, &theirs));
    assert!(ended.iter().all(|(code, _)| *code == Some(2)), "{ended:?}");
    says(&ended[0].1, &["its train.seed is 1"]);
    says(
        &ended[1].1,
        &["rank 0 (", "has ended the job with exit code 2"],
    );
    // Another number of ranks.
    let port = free_port();
    let short = args(&["train.stall_timeout=2"]);
    let ended = two(rank(0, 2, port, &short), rank(1, 3, port, &short));
    assert_eq!(ended[0].0, Some(2), "{ended:?}");
    says(&ended[0].1, &["rank 1 of 3 has called rank 0 of 2"]);
    // A rank that is absent, and no rank 0.
    let absent = ["no connection from rank 1", "MASTER_ADDR", "for 2."];
    refused(rank(0, 2, free_port(), &short), 1, &absent);
    let unreached = ["rank 0 can't be reached at 127.0.0.1:", "for 6."];
    let patient = args(&["train.stall_timeout=6"]);
    let said = refused(rank(1, 2, free_port(), &patient), 1, &unreached);
    says(&said, &["waiting for rank 0 at 127.0.0.1:"]);
    let mut wrong = rank(1, 2, 1, &short);
    wrong.env("MASTER_PORT", "x");
    refused(wrong, 2, &["MASTER_PORT = \"x\" is not a port"]);
    assert!(!Path::new(&output).exists());
}
