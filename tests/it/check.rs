//! Drives `inspect`, `bench` and `check` as a user does, on the quickstart's assets.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::support::{command, damaged, refuse, succeed, text};
use coffey::models::unet::WEIGHTS_STEM;
use serde_json::{Value, json};
use tempfile::TempDir;

const QUICKSTART: &str = "configs/quickstart.toml";
const SHARD: &str = "assets/quickstart/emoji/00000.tar";

fn succeed_json(args: &[&str]) -> Value {
    serde_json::from_str(&succeed(args)).unwrap()
}

#[test]
fn inspect_counts_what_is_in_the_shards() {
    let report = succeed_json(&["inspect", "-c", QUICKSTART, "--json"]);
    assert_eq!(report["shards"].as_array().unwrap().len(), 4);
    assert_eq!(report["unreadable"], json!([]));
    let totals = &report["totals"];
    let samples = totals["samples"].as_u64().unwrap();
    assert!(samples > 100, "{totals}");
    assert_eq!(
        totals["members"],
        json!({"json": samples, "png": samples, "txt": samples})
    );
    assert_eq!(totals["formats"], json!({"png": samples}));
    assert_eq!(
        (&totals["width"]["min"], &totals["width"]["max"]),
        (&json!(64), &json!(64))
    );
    assert_eq!(totals["problems"], json!(0));
    let sum: u64 = report["shards"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["samples"].as_u64().unwrap())
        .sum();
    assert_eq!(sum, samples);
}

#[test]
fn inspect_is_readable() {
    let said = succeed(&[
        "inspect",
        SHARD,
        "assets/quickstart/emoji/{00001..00002}.tar",
    ]);
    assert!(
        said.starts_with("assets/quickstart/emoji/00000.tar\n"),
        "{said}"
    );
    for words in [
        "64-64 (mean 64) pixels",
        "total\n  shards    3\n",
        "problems  none",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn inspect_reports_a_shard_that_is_cut_off() {
    let folder = TempDir::new().unwrap();
    let cut = folder.path().join("cut.tar");
    let whole = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(SHARD)).unwrap();
    std::fs::write(&cut, &whole[..100_000]).unwrap();
    let report = succeed_json(&["inspect", text(&cut), "--json"]);
    assert_eq!(report["totals"]["broken_shards"], json!(1));
    assert!(report["shards"][0]["broken"].is_string());
    assert!(succeed(&["inspect", text(&cut)]).contains("broken"));
}

#[test]
fn inspect_looks_at_shards_together_and_groups_what_it_finds() {
    let folder = TempDir::new().unwrap();
    let copy = folder.path().join("copy.tar");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(SHARD), &copy).unwrap();
    let args = ["inspect", SHARD, text(&copy), "-c", QUICKSTART];
    let larger = ["-s", "image.resolution=128"];
    let report = succeed_json(&[&args[..], &larger, &["--json"]].concat());
    let samples = report["shards"][0]["samples"].as_u64().unwrap();
    assert_eq!(
        report["totals"]["problems_by_kind"],
        json!({"key_in_other_shard": samples, "below_resolution": 2 * samples})
    );
    assert_eq!(report["totals"]["problems"], json!(3 * samples));
    let said = succeed(&args);
    assert!(
        said.contains(&format!("problem   key_in_other_shard: {samples}\n    ")),
        "{said}"
    );
    assert!(
        said.contains(&format!("and {} more; --json lists them", samples - 3)),
        "{said}"
    );
    assert!(
        said.contains(&format!("has the key of a sample of {SHARD}")),
        "{said}"
    );
    assert!(
        said.ends_with(&format!("problems  {samples} key_in_other_shard\n")),
        "{said}"
    );
}

#[test]
fn inspect_goes_on_after_a_shard_that_can_not_be_read() {
    let folder = TempDir::new().unwrap();
    let not_a_tar = folder.path().join("text.tar");
    std::fs::write(&not_a_tar, "not a tar at all ".repeat(100)).unwrap();
    let output = command(&[
        "inspect",
        text(&not_a_tar),
        "nowhere/0.tar",
        SHARD,
        "--json",
    ])
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["unreadable"].as_array().unwrap().len(), 2);
    assert_eq!(report["totals"]["unreadable_shards"], json!(2));
    assert_eq!(report["shards"].as_array().unwrap().len(), 1);
    assert!(
        report["unreadable"][0]["error"]
            .as_str()
            .unwrap()
            .contains("is not a tar")
    );
    assert!(
        report["unreadable"][1]["error"]
            .as_str()
            .unwrap()
            .contains("not found")
    );
}

#[test]
fn inspect_refuses_what_it_can_not_look_for() {
    refuse(
        1,
        &["inspect", "s3://emoji/99999.tar", "-c", QUICKSTART],
        &["s3://emoji/99999.tar", "not found"],
    );
    refuse(2, &["inspect"], &["<URL>"]);
    refuse(2, &["inspect", "{0..9.tar"], &["{0..9.tar"]);
    refuse(1, &["inspect", "nowhere/"], &["nowhere/"]);
    refuse(2, &["inspect", "-c", "nowhere.toml"], &["nowhere.toml"]);
}

#[test]
fn bench_says_which_stage_is_the_limit() {
    let args = ["bench", "-c", QUICKSTART, "--samples", "100"];
    let measured = succeed_json(&[&args[..], &["--json"]].concat());
    // Batches of 16.
    assert_eq!(
        (&measured["samples"], &measured["batches"]),
        (&json!(112), &json!(7))
    );
    for key in [
        "images_per_second",
        "megabytes_per_second",
        "first_batch_seconds",
        "cpu_ms_per_image",
    ] {
        assert!(measured[key].as_f64().unwrap() > 0.0, "{key}: {measured}");
    }
    let stage = |name: &str| {
        measured["stages"]
            .as_array()
            .unwrap()
            .iter()
            .find(|s| s["stage"] == name)
            .unwrap()
    };
    assert!(stage("decode")["items"].as_u64().unwrap() >= 112);
    assert!(measured["limiting_stage"].is_string());
    let table = succeed(&args);
    for words in [
        "starved s",
        "CPU ms/image",
        "\ndecode ",
        "\ntrain ",
        "train is only the conversion",
        "images/s",
        "first batch",
        "limit ",
    ] {
        assert!(table.contains(words), "{words}: {table}");
    }
    assert!(!table.contains("\nencode "), "{table}");
}

#[test]
fn bench_measures_processor_time_and_the_machines_limit() {
    let args = ["bench", "-c", QUICKSTART, "--samples", "200", "--limit"];
    let measured = succeed_json(&[&args[..], &["--json"]].concat());
    let number = |value: &Value| value.as_f64().unwrap();
    let stages = measured["stages"].as_array().unwrap();
    let decode = stages.iter().find(|s| s["stage"] == "decode").unwrap();
    assert!(number(&decode["cpu_seconds"]) > 0.0, "{decode}");
    let staged: f64 = stages.iter().map(|s| number(&s["cpu_seconds"])).sum();
    let whole = number(&measured["cpu_ms_per_image"]) * number(&measured["samples"]) / 1e3;
    let other = number(&measured["other_cpu_seconds"]);
    // What is left of the process is the network's and the server's. The two clocks are read one after the other.
    assert!((staged + other - whole).abs() < 0.1 * whole, "{measured}");
    let machine = &measured["machine"];
    assert_eq!(machine["images"], measured["samples"]);
    let reached = number(&measured["images_per_second"]) / number(&machine["images_per_second"]);
    assert!((number(&machine["reached"]) - reached).abs() < 1e-9);
    let table = succeed(&args);
    assert!(table.contains("the stream reached"), "{table}");
}

#[test]
fn bench_reads_the_part_of_a_rank() {
    let args = [
        "bench",
        "-c",
        QUICKSTART,
        "--samples",
        "16",
        "--json",
        "--rank",
        "1",
        "--world",
        "2",
    ];
    assert_eq!(succeed_json(&args)["samples"], json!(16));
    refuse(
        2,
        &["bench", "-c", QUICKSTART, "--rank", "0", "--world", "5"],
        &["4 shards", "5 ranks"],
    );
}

#[test]
fn bench_refuses_bad_input() {
    let bench = |set: &str, code, words: &[&str]| {
        refuse(code, &["bench", "-c", QUICKSTART, "-s", set], words)
    };
    bench(
        "data.shards=s3://emoji/99999.tar",
        1,
        &["s3://emoji/99999.tar", "not found"],
    );
    bench(
        "data.shards=s3://nobucket/0.tar",
        1,
        &["s3://nobucket/0.tar", "not found"],
    );
    bench("data.shards=Cargo.toml", 1, &["Cargo.toml", "is not a tar"]);
    bench("data.open_shard=3", 2, &["data.open_shard", "open_shards"]);
    bench(
        "data.open_shards=many",
        2,
        &["data.open_shards", "whole number"],
    );
    bench(
        "s3.embedded_root=nowhere",
        2,
        &["s3.embedded_root", "nowhere"],
    );
    refuse(
        2,
        &["bench", "-c", QUICKSTART, "--samples", "0"],
        &["--samples"],
    );
    refuse(2, &["bench"], &["--config"]);
}

/// `check` on the quickstart with an output of its own.
fn check(folder: &TempDir, more: &[&str]) -> Vec<String> {
    let output = format!("train.output={:?}", text(&folder.path().join("run")));
    let args = ["check", "-c", QUICKSTART, "-s", &output];
    args.iter()
        .chain(more)
        .map(|arg| (*arg).to_owned())
        .collect()
}

fn refs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

#[test]
fn check_tries_every_step() {
    let folder = TempDir::new().unwrap();
    let report = succeed_json(&refs(&check(&folder, &["--json"])));
    let steps: Vec<(&str, &str)> = report["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| {
            (
                line["step"].as_str().unwrap(),
                line["status"].as_str().unwrap(),
            )
        })
        .collect();
    let names = [
        "configuration",
        "models",
        "sources",
        "first sample",
        "encoders",
        "teacher",
        "dry run",
        "memory",
        "output",
    ];
    assert_eq!(steps, names.map(|name| (name, "ok")));
    let parts = report["memory"]["parts"].as_array().unwrap();
    let part = |what: &str| {
        parts.iter().find(|p| p["what"] == what).unwrap()["bytes"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(part("optimizer"), 2 * part("student"));
    assert!(part("student") > part("teacher"));
    assert!(part("shuffle buffer") > 0 && part("activations") > 0);
    let said = succeed(&refs(&check(&folder, &[])));
    assert!(
        said.contains("ok       teacher") && said.contains("M parameters"),
        "{said}"
    );
    assert!(
        !folder.path().join("run").exists(),
        "a check leaves nothing behind"
    );
}

/// The most memory a command holds, as the system saw it shortly before its end. Bytes.
fn peak_memory(args: &[&str]) -> u64 {
    let mut child = command(args).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let ended = loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(kilobytes.unwrap_or(0) * 1024);
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(ended.success());
    peak
}

#[test]
fn the_memory_plan_comes_near_what_a_run_holds() {
    let folder = TempDir::new().unwrap();
    let output = format!("train.output={}", folder.path().join("run").display());
    let quickstart = ["-c", "configs/quickstart.toml", "-s", &output];
    let plan = succeed_json(&[&["check", "--json"], &quickstart[..]].concat());
    let parts = plan["memory"]["parts"].as_array().unwrap();
    let planned: u64 = parts.iter().map(|p| p["bytes"].as_u64().unwrap()).sum();
    let few = ["-s", "train.max_steps=4", "-s", "checkpoint.every=2"];
    let bare = [
        "-s",
        "report.endpoint_captions=0",
        "-s",
        "report.grid=false",
    ];
    let peak = peak_memory(&[&["train"], &quickstart[..], &few, &bare].concat());
    let ratio = planned as f64 / peak as f64;
    assert!(
        (0.85..1.15).contains(&ratio),
        "planned {planned}, held {peak}"
    );
}

#[test]
fn check_knows_what_a_configuration_is_for() {
    let said = succeed(&["check", "-c", "configs/precompute-quickstart.toml"]);
    assert!(
        said.contains("coffey precompute") && !said.contains("teacher "),
        "{said}"
    );
}

#[test]
fn check_prints_the_configuration_in_full() {
    let toml = succeed(&[
        "check",
        "-c",
        QUICKSTART,
        "--print-config",
        "-s",
        "train.max_steps=7",
    ]);
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("full.toml");
    std::fs::write(&path, &toml).unwrap();
    assert!(
        toml.contains("max_steps = 7") && toml.contains("max_bad_fraction = 0.05"),
        "{toml}"
    );
    assert_eq!(
        succeed(&["check", "-c", text(&path), "--print-config"]),
        toml
    );
}

#[test]
fn check_ends_at_the_first_fault() {
    let folder = TempDir::new().unwrap();
    let faulty = |set: &str, code, step: &str, words: &[&str]| {
        let args = check(&folder, &["-s", set]);
        refuse(code, &refs(&args), words);
        let said = String::from_utf8(command(&refs(&args)).output().unwrap().stdout).unwrap();
        let last = said.lines().last().unwrap();
        assert!(last.starts_with(&format!("error    {step}")), "{last}");
    };
    faulty(
        "train.max_step=3",
        2,
        "configuration",
        &["train.max_step", "max_steps"],
    );
    faulty(
        "image.resolution=63",
        2,
        "configuration",
        &["image.resolution", "multiple of 8"],
    );
    faulty(
        "model.teacher=nowhere",
        2,
        "configuration",
        &["model.teacher", "nowhere"],
    );
    faulty(
        "data.shards=s3://emoji/nothing/",
        1,
        "sources",
        &["s3://emoji/nothing/"],
    );
    faulty(
        "data.shards=s3://emoji/99999.tar",
        1,
        "first sample",
        &["99999.tar", "not found"],
    );
    faulty(
        "data.shards=Cargo.toml",
        1,
        "first sample",
        &["is not a tar"],
    );
    faulty(
        "data.image_keys=[\"gif\"]",
        1,
        "first sample",
        &["no_image"],
    );
}

#[test]
fn check_names_what_is_wrong_with_a_model() {
    let folder = TempDir::new().unwrap();
    let pipeline = damaged(&folder, "unet", WEIGHTS_STEM, "conv_in.weight");
    let set = format!("model.teacher={:?}", text(&pipeline));
    let args = check(&folder, &["-s", &set]);
    refuse(
        1,
        &refs(&args),
        &["conv_in.weight", "is missing", "[48, 4, 3, 3]"],
    );
    std::fs::remove_dir_all(pipeline.join("tokenizer")).unwrap();
    refuse(1, &refs(&args), &["tokenizer", "vocab.json"]);
}

#[test]
fn check_refuses_an_output_that_can_not_be_written() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("run"), "a file").unwrap();
    refuse(
        2,
        &refs(&check(&folder, &[])),
        &["train.output", "is not a folder"],
    );
}
