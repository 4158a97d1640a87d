//! The test binary as a child process, with its own environment and standard input, or with its own memory to measure.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use coffey_pipeline::{Order, S3Options, StreamConfig};

use crate::support::{Bench, config, keys, urls};

const URL: &str = "COFFEY_TEST_URL";
const ENDPOINT: &str = "COFFEY_TEST_ENDPOINT";
const SWITCH: &str = "COFFEY_TEST_SWITCH";
const ALONE: &str = "COFFEY_TEST_ALONE";

/// A child process that runs one of the ignored tests below.
pub(crate) struct Child {
    command: Command,
    /// The home folder, in which the AWS default chain finds nothing.
    home: tempfile::TempDir,
}

impl Child {
    fn new(test: &str, url: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut command = only(&format!("child::{test}"));
        command
            .env_clear()
            .env("HOME", home.path())
            .env("AWS_REGION", "eu-west-1")
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env(URL, url);
        Self { command, home }
    }

    /// Reads an object from an S3 server.
    pub(crate) fn reads(url: &str, endpoint: &str) -> Self {
        Self::new("reads_object", url).set(ENDPOINT, endpoint)
    }

    /// Writes an object below a prefix of an S3 server.
    pub(crate) fn writes(url: &str, endpoint: &str) -> Self {
        Self::new("writes_object", url).set(ENDPOINT, endpoint)
    }

    /// Streams shards from an S3 server, one after another.
    pub(crate) fn reads_in_turn(url: &str, endpoint: &str) -> Self {
        Self::new("reads_shards_in_turn", url)
            .set(ENDPOINT, endpoint)
            .set("PATH", "/usr/bin:/bin")
    }

    /// Streams a shard twice.
    pub(crate) fn streams(url: &str) -> Self {
        Self::new("streams_shard_twice", url)
    }

    /// Streams a shard in the order of training until the stream ends.
    pub(crate) fn trains(url: &str) -> Self {
        Self::new("streams_until_end", url)
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    pub(crate) fn set(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn unset(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    /// Sets an option of `[s3]` that is `false` by default.
    pub(crate) fn switch(self, name: &str) -> Self {
        self.set(SWITCH, name)
    }

    /// Returns the lines that the child printed with [`print`].
    pub(crate) fn run(self) -> Vec<String> {
        self.run_with(&[])
    }

    pub(crate) fn run_with(mut self, stdin: &[u8]) -> Vec<String> {
        let mut child = self
            .command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut pipe = child.stdin.take().unwrap();
        let input = stdin.to_vec();
        let feed = std::thread::spawn(move || pipe.write_all(&input));
        let output = child.wait_with_output().unwrap();
        // A child that ends before it has read everything breaks the pipe.
        feed.join().unwrap().ok();
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines()
            .filter_map(|line| line.split_once(MARK))
            .map(|(_, printed)| printed.to_owned())
            .collect()
    }
}

/// The test binary with a filter for the one test `name`.
fn only(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--include-ignored", "--nocapture"]);
    command
}

/// Whether this process runs only the test `name`, whose memory it may measure. If not, runs the test in such a process first.
///
/// nextest gives each test a process; `cargo test` runs all tests in one.
pub(crate) fn is_alone(name: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let status = only(name).env(ALONE, "1").status().unwrap();
    assert!(status.success(), "{name} failed in its own process");
    false
}

const MARK: &str = "CHILD PRINTS ";

/// Prints on one line.
fn print(text: impl std::fmt::Display) {
    println!("{MARK}{}", text.to_string().replace('\n', " "));
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

#[test]
#[ignore = "a child process of other tests, which set its environment"]
fn reads_object() {
    let endpoint = Some(variable(ENDPOINT)).filter(|endpoint| !endpoint.is_empty());
    let bench = Bench::new(S3Options {
        endpoint_url: endpoint,
        path_style: true,
        max_attempts: 3,
        anonymous: variable(SWITCH) == "anonymous",
        requester_pays: variable(SWITCH) == "requester_pays",
        ..S3Options::default()
    });
    match bench.read(&variable(URL)) {
        Ok(bytes) => print(format_args!("read {} bytes", bytes.len())),
        Err(error) => print(error),
    }
}

#[test]
#[ignore = "a child process of other tests, which set its environment"]
fn writes_object() {
    let bench = Bench::new(S3Options {
        endpoint_url: Some(variable(ENDPOINT)),
        path_style: true,
        max_attempts: 3,
        ..S3Options::default()
    });
    let runtime = bench.runtime.handle();
    let place = bench.sources.destination(&variable(URL), runtime).unwrap();
    match place.write("object", b"content") {
        Ok(_) => print("written"),
        Err(error) => print(error),
    }
}

#[test]
#[ignore = "a child process of other tests, which set its environment"]
fn reads_shards_in_turn() {
    let bench = Bench::new(S3Options {
        endpoint_url: Some(variable(ENDPOINT)),
        path_style: true,
        max_attempts: 3,
        stall_timeout: Duration::from_secs(20),
        ..S3Options::default()
    });
    let config = StreamConfig {
        order: Order::Sequential,
        open_shards: 1,
        ..config(urls(&variable(URL)))
    };
    match bench.all(config) {
        Ok(batches) => print(format_args!("read {} samples", keys(&batches).len())),
        Err(error) => print(error),
    }
}

#[test]
#[ignore = "a child process of other tests, which write its standard input"]
fn streams_shard_twice() {
    let bench = Bench::new(S3Options::default());
    for _ in 0..2 {
        let all = bench.all(StreamConfig {
            order: Order::Sequential,
            ..config(urls(&variable(URL)))
        });
        match all {
            Ok(batches) => print(keys(&batches).join(" ")),
            Err(error) => print(error),
        }
    }
}

#[test]
#[ignore = "a child process of other tests, which write its standard input"]
fn streams_until_end() {
    let bench = Bench::new(S3Options::default());
    let stream = bench.open(StreamConfig {
        resample: true,
        batch_size: 1,
        ..config(urls(&variable(URL)))
    });
    let stream = stream.unwrap();
    let consumer = bench.metrics.stage(coffey_pipeline::stages::Stage::Train);
    let mut batches = 0;
    while let Some(batch) = stream.batches().recv_blocking(&consumer) {
        match batch {
            Ok(_) => batches += 1,
            Err(error) => print(format_args!("after {batches}: {error}")),
        }
    }
}
