//! Credentials that are missing, or that expire while the stream runs. The environment decides
//! them, so each case runs in a process of its own.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::proxy::{Fault, Rule, clean};
use crate::support::{Bench, Faulty, keys, sequential, shard, urls};
use coffey_pipeline::S3Options;

const ENDPOINT: &str = "COFFEY_TEST_ENDPOINT";

/// Runs the test again as a process with nothing but this environment; what it printed.
fn read_in_a_process(test: &str, server: &Faulty, environment: &[(&str, &str)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env_clear()
        .env("HOME", server.root.path())
        .env("PATH", "/usr/bin:/bin")
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("AWS_REGION", "us-east-1")
        .env(ENDPOINT, &server.proxy.endpoint)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// In that process: reads four shards, one after another, and prints how it went.
fn read_here() -> bool {
    let Ok(endpoint) = std::env::var(ENDPOINT) else {
        return false;
    };
    let bench = Bench::new(S3Options {
        endpoint_url: Some(endpoint),
        path_style: true,
        max_attempts: 3,
        stall_timeout: Duration::from_secs(20),
        ..S3Options::default()
    });
    let mut config = sequential(urls("s3://data/{00000..00003}.tar"));
    config.open_shards = 1;
    match bench.all(config) {
        Ok(batches) => println!("read {}", keys(&batches).len()),
        Err(error) => println!("failed: {error}"),
    }
    true
}

fn server(rule: Rule) -> Faulty {
    let server = Faulty::with_keys(&["first", "second"], rule);
    for n in 0..4 {
        server.write(&format!("{n:05}.tar"), &shard(n, 9));
    }
    server
}

/// From the third request on the first credentials are too old.
fn expiring(mut noticed: impl FnMut() + Send + 'static) -> Rule {
    let mut requests = 0;
    Box::new(move |head, _| {
        requests += 1;
        (requests > 2 && head.contains("credential=first/")).then(|| {
            noticed();
            Fault::Status(403, "ExpiredToken")
        })
    })
}

fn write_keys(file: &Path, key: &str) {
    let keys = format!(r#"{{"Version": 1, "AccessKeyId": "{key}", "SecretAccessKey": "{key}"}}"#);
    std::fs::write(file, keys).unwrap();
}

#[test]
fn credentials_that_are_renewed_go_on() {
    if read_here() {
        return;
    }
    let server = server(clean());
    let file = server.root.path().join("keys.json");
    write_keys(&file, "first");
    let profile = server.root.path().join("config");
    let text = format!("[default]\ncredential_process = cat {}\n", file.display());
    std::fs::write(&profile, text).unwrap();
    // Whatever renews them does so only now.
    server
        .proxy
        .follow(expiring(move || write_keys(&file, "second")));
    let output = read_in_a_process(
        "credentials_that_are_renewed_go_on",
        &server,
        &[("AWS_CONFIG_FILE", &profile.display().to_string())],
    );
    assert!(output.contains("read 36"), "{output}");
    let requests = server.proxy.requests();
    assert!(
        requests
            .iter()
            .any(|head| head.contains("credential=second/"))
    );
}

#[test]
fn credentials_that_stay_expired_end_with_what_to_do() {
    if read_here() {
        return;
    }
    let server = server(expiring(|| {}));
    let output = read_in_a_process(
        "credentials_that_stay_expired_end_with_what_to_do",
        &server,
        &[
            ("AWS_ACCESS_KEY_ID", "first"),
            ("AWS_SECRET_ACCESS_KEY", "first"),
        ],
    );
    assert!(output.contains("s3://data/00002.tar"), "{output}");
    assert!(
        output.contains("credentials have expired (HTTP 403 ExpiredToken"),
        "{output}"
    );
    assert!(output.contains("renews them by itself"), "{output}");
}

#[test]
fn credentials_that_are_missing_or_wrong_are_named_at_once() {
    if read_here() {
        return;
    }
    let test = "credentials_that_are_missing_or_wrong_are_named_at_once";
    let server = server(clean());
    let output = read_in_a_process(test, &server, &[]);
    assert!(output.contains("no usable AWS credentials"), "{output}");
    assert!(output.contains("AWS_PROFILE"), "{output}");
    assert!(server.proxy.requests().is_empty());
    let wrong = [
        ("AWS_ACCESS_KEY_ID", "first"),
        ("AWS_SECRET_ACCESS_KEY", "other"),
    ];
    let output = read_in_a_process(test, &server, &wrong);
    assert!(
        output.contains("s3://data/00000.tar: access denied"),
        "{output}"
    );
    assert!(output.contains("check the credentials"), "{output}");
    // Once for each shard that was opened ahead.
    let requests = server.proxy.requests();
    let first_line = |head: &String| head.lines().next().map(str::to_owned);
    let asked: BTreeSet<_> = requests.iter().map(first_line).collect();
    assert_eq!(asked.len(), requests.len(), "{requests:?}");
}
