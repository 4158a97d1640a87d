//! The test binary as a child process, with an environment and a standard input of its own.

#![allow(
    clippy::unwrap_used,
    reason = "a helper that fails is a test that fails"
)]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use coffey_pipeline::{Order, S3Options, SourceError, StreamConfig};

use crate::support::{Bench, config, keys, urls};

const URL: &str = "REACH_URL";
const ENDPOINT: &str = "REACH_ENDPOINT";
const SWITCH: &str = "REACH_SWITCH";

/// What a child is to do, and with what.
pub(crate) struct Child {
    command: Command,
    /// Its home, in which the AWS default chain finds nothing.
    home: tempfile::TempDir,
}

impl Child {
    /// Runs one of the ignored tests below.
    fn new(test: &str, url: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([
                "--exact",
                &format!("child::{test}"),
                "--ignored",
                "--nocapture",
            ])
            .env_clear()
            .env("HOME", home.path())
            .env("AWS_REGION", "eu-west-1")
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env(URL, url);
        Self { command, home }
    }

    /// Reads an object from an S3 server.
    pub(crate) fn reads(url: &str, endpoint: &str) -> Self {
        Self::new("reads_an_object", url).set(ENDPOINT, endpoint)
    }

    /// Streams a shard twice.
    pub(crate) fn streams(url: &str) -> Self {
        Self::new("streams_a_shard_twice", url)
    }

    /// Streams a shard in the order of training, until it ends.
    pub(crate) fn trains(url: &str) -> Self {
        Self::new("streams_until_the_end", url)
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

    /// What it printed of its own, a line each.
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
        // It need not read all of it.
        let feed = std::thread::spawn(move || pipe.write_all(&input).is_ok());
        let output = child.wait_with_output().unwrap();
        let _all = feed.join().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines()
            .filter_map(|line| line.split_once("SAYS "))
            .map(|(_, said)| said.to_owned())
            .collect()
    }
}

fn says(text: impl std::fmt::Display) {
    println!("SAYS {text}");
}

fn given(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

#[test]
#[ignore = "run by others, in an environment of its own"]
fn reads_an_object() {
    let endpoint = Some(given(ENDPOINT)).filter(|endpoint| !endpoint.is_empty());
    let bench = Bench::new(S3Options {
        endpoint_url: endpoint,
        path_style: true,
        max_attempts: 3,
        anonymous: given(SWITCH) == "anonymous",
        requester_pays: given(SWITCH) == "requester_pays",
        ..S3Options::default()
    });
    let read = bench.runtime.block_on(async {
        let mut reader = bench.sources.open(&urls(&given(URL))[0]).await?;
        let mut bytes = 0;
        while let Some(chunk) = reader.next().await? {
            bytes += chunk.len();
        }
        Ok::<_, SourceError>(bytes)
    });
    match read {
        Ok(bytes) => says(format_args!("read {bytes} bytes")),
        Err(error) => says(error),
    }
}

#[test]
#[ignore = "run by others, with a standard input of its own"]
fn streams_a_shard_twice() {
    let bench = Bench::new(S3Options::default());
    for _ in 0..2 {
        let all = bench.all(StreamConfig {
            order: Order::Sequential,
            ..config(urls(&given(URL)))
        });
        match all {
            Ok(batches) => says(keys(&batches).join(" ")),
            Err(error) => says(error),
        }
    }
}

#[test]
#[ignore = "run by others, with a standard input of its own"]
fn streams_until_the_end() {
    let bench = Bench::new(S3Options::default());
    let stream = bench.open(StreamConfig {
        resample: true,
        batch_size: 1,
        ..config(urls(&given(URL)))
    });
    let stream = stream.unwrap();
    let consumer = bench.metrics.stage(coffey_pipeline::stages::Stage::Train);
    let mut batches = 0;
    while let Some(batch) = stream.batches().recv_blocking(&consumer) {
        match batch {
            Ok(_) => batches += 1,
            Err(error) => says(format_args!("after {batches}: {error}")),
        }
    }
}
