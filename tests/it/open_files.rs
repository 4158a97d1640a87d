//! The limit of open files: idle clients of the page, and a limit that is reached for a while.

use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use rlimit::{Resource, prlimit};
use tempfile::TempDir;

use crate::support::watched::Watched;
use crate::support::{NO_PICTURES, QUICKSTART, args, command, text};

/// The command with a limit of open files that it can't raise.
fn limited(files: u32, args: &[String]) -> Command {
    let inner = command(args);
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("ulimit -n {files}; exec \"$0\" \"$@\"")])
        .arg(inner.get_program())
        .args(inner.get_args())
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
}

#[test]
fn idle_clients_do_not_end_a_run_with_few_open_files() {
    let folder = TempDir::new().unwrap();
    let output = format!("train.output={}", text(&folder.path().join("run")));
    let small = [output.as_str(), "train.batch_size=4", "train.max_steps=4"];
    let settings = [&small[..], &NO_PICTURES].concat();
    let watched = Watched::of(limited(64, &args("train", QUICKSTART, settings)));
    let clients: Vec<_> = (0..300)
        .map(|_| TcpStream::connect(&watched.address).unwrap())
        .collect();
    let (code, messages) = watched.end();
    drop(clients);
    assert_eq!(code, Some(0), "{messages}");
    assert!(!messages.contains("404"), "{messages}");
}

#[test]
fn health_is_answered_again_after_idle_clients() {
    let bench = args("bench", QUICKSTART, [] as [&str; 0]);
    let bench = [
        bench,
        ["--samples", "100000000"].map(str::to_owned).to_vec(),
    ]
    .concat();
    let watched = Watched::of(limited(64, &bench));
    let _clients: Vec<_> = (0..300)
        .map(|_| TcpStream::connect(&watched.address).unwrap())
        .collect();
    let begun = Instant::now();
    while watched
        .get("/healthz")
        .is_none_or(|answer| answer.status != 200)
    {
        assert!(begun.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(200));
    }
    watched.terminate();
    watched.end();
}

/// Sets the limit of open files of a running command.
fn set_limit(watched: &Watched, files: u64) {
    let id = watched.id().try_into().unwrap();
    prlimit(id, Resource::NOFILE, Some((files, 4096)), None).unwrap();
}

/// Waits until more than `least` images are decoded; returns their number.
fn decoded(watched: &Watched, least: u64) -> u64 {
    let begun = Instant::now();
    loop {
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "it stands still"
        );
        let text = watched.get("/metrics").unwrap().text();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("coffey_stage_items_total{stage=\"decode\"} "));
        match line.and_then(|count| count.parse().ok()) {
            Some(count) if count > least => return count,
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[test]
fn limit_that_is_reached_for_a_while_is_waited_for() {
    for shards in ["s3://emoji/{00000..00003}.tar", "assets/quickstart/emoji/"] {
        let shards = format!("data.shards={shards}");
        let bench = args("bench", QUICKSTART, [shards.as_str()]);
        let bench = [bench, ["--samples", "1000000"].map(str::to_owned).to_vec()].concat();
        let watched = Watched::of(command(&bench));
        decoded(&watched, 0);
        // Fewer than are open: no file and no connection can be opened.
        set_limit(&watched, 3);
        std::thread::sleep(Duration::from_secs(3));
        set_limit(&watched, 4096);
        // More than was read before.
        let before = decoded(&watched, 0);
        decoded(&watched, before + 3000);
        watched.terminate();
        let (_, messages) = watched.end();
        let warning =
            "too many open files (limit 3): raise `ulimit -n`; waiting until some are closed";
        // With connections that are open, only the embedded server meets the limit, and its client tries again.
        let warnings = messages.matches(warning).count();
        assert!(warnings <= 1, "{shards}: {messages}");
        assert!(!messages.contains("error"), "{shards}: {messages}");
    }
}
