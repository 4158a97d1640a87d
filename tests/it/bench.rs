//! `coffey bench` on the quickstart's shards.

use serde_json::{Value, json};

use crate::support::{QUICKSTART, refuse, says, succeed, succeed_json};

#[test]
fn bench_names_limiting_stage() {
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
    says(
        &table,
        &[
            "starved s",
            "CPU ms/image",
            "\ndecode ",
            "\ntrain ",
            "train is only the conversion",
            "images/s",
            "first batch",
            "limit ",
        ],
    );
    assert!(!table.contains("\nencode "), "{table}");
}

#[test]
fn bench_measures_cpu_time_and_machine_limit() {
    let args = ["bench", "-c", QUICKSTART, "--samples", "200", "--limit"];
    let measured = succeed_json(&[&args[..], &["--json"]].concat());
    let number = |value: &Value| value.as_f64().unwrap();
    let stages = measured["stages"].as_array().unwrap();
    let decode = stages.iter().find(|s| s["stage"] == "decode").unwrap();
    assert!(number(&decode["cpu_seconds"]) > 0.0, "{decode}");
    let staged: f64 = stages.iter().map(|s| number(&s["cpu_seconds"])).sum();
    let whole = number(&measured["cpu_ms_per_image"]) * number(&measured["samples"]) / 1e3;
    let other = number(&measured["other_cpu_seconds"]);
    // The rest of the process is the network and the server. The two clocks are read one after the other.
    assert!((staged + other - whole).abs() < 0.1 * whole, "{measured}");
    let machine = &measured["machine"];
    assert_eq!(machine["images"], measured["samples"]);
    let reached = number(&measured["images_per_second"]) / number(&machine["images_per_second"]);
    assert!((number(&machine["reached"]) - reached).abs() < 1e-9);
    let table = succeed(&args);
    assert!(table.contains("the stream reached"), "{table}");
}

#[test]
fn bench_reads_the_shards_of_a_rank() {
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
