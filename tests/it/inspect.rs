//! `coffey inspect` on the quickstart's shards and on broken ones.

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    QUICKSTART, command, refuse, repository, run, says, succeed, succeed_json, text,
};

const SHARD: &str = "assets/quickstart/emoji/00000.tar";

#[test]
fn inspect_counts_samples_and_formats() {
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
fn inspect_prints_a_text_report() {
    let printed = succeed(&[
        "inspect",
        SHARD,
        "assets/quickstart/emoji/{00001..00002}.tar",
    ]);
    assert!(
        printed.starts_with("assets/quickstart/emoji/00000.tar\n"),
        "{printed}"
    );
    says(
        &printed,
        &[
            "64-64 (mean 64) pixels",
            "total\n  shards    3\n",
            "problems  none",
        ],
    );
}

#[test]
fn inspect_reports_cut_shard() {
    let folder = TempDir::new().unwrap();
    let cut = folder.path().join("cut.tar");
    let whole = std::fs::read(repository(SHARD)).unwrap();
    std::fs::write(&cut, &whole[..100_000]).unwrap();
    let report = succeed_json(&["inspect", text(&cut), "--json"]);
    assert_eq!(report["totals"]["broken_shards"], json!(1));
    assert!(report["shards"][0]["broken"].is_string());
    assert!(succeed(&["inspect", text(&cut)]).contains("broken"));
}

#[test]
fn inspect_groups_problems_across_shards() {
    let folder = TempDir::new().unwrap();
    let copy = folder.path().join("copy.tar");
    std::fs::copy(repository(SHARD), &copy).unwrap();
    let args = ["inspect", SHARD, text(&copy), "-c", QUICKSTART];
    let larger = ["-s", "image.resolution=128"];
    let report = succeed_json(&[&args[..], &larger, &["--json"]].concat());
    let samples = report["shards"][0]["samples"].as_u64().unwrap();
    assert_eq!(
        report["totals"]["problems_by_kind"],
        json!({"key_in_other_shard": samples, "below_resolution": 2 * samples})
    );
    assert_eq!(report["totals"]["problems"], json!(3 * samples));
    let printed = succeed(&args);
    says(
        &printed,
        &[
            &format!("problem   key_in_other_shard: {samples}\n    "),
            &format!("and {} more; --json lists them", samples - 3),
            &format!("has the key of a sample of {SHARD}"),
        ],
    );
    assert!(
        printed.ends_with(&format!("problems  {samples} key_in_other_shard\n")),
        "{printed}"
    );
}

#[test]
fn inspect_continues_after_unreadable_shard() {
    let folder = TempDir::new().unwrap();
    let not_a_tar = folder.path().join("text.tar");
    std::fs::write(&not_a_tar, "not a tar at all ".repeat(100)).unwrap();
    let args = [
        "inspect",
        text(&not_a_tar),
        "nowhere/0.tar",
        SHARD,
        "--json",
    ];
    let report: Value = serde_json::from_str(&run(command(&args), 1).0).unwrap();
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
fn inspect_takes_overrides_without_a_file() {
    let root = text_of("s3.embedded_root", &repository("assets/quickstart"));
    let printed = succeed(&["inspect", "s3://emoji/00000.tar", "-s", &root]);
    says(
        &printed,
        &["s3://emoji/00000.tar\n", "shards    1\n", "problems  none"],
    );
    // `image.resolution` is checked where it is set.
    let resolution = ["-s", "image.resolution=128"];
    let printed = succeed(&[&["inspect", SHARD], &resolution[..]].concat());
    says(&printed, &["below_resolution"]);
    let printed = succeed(&["inspect", SHARD, "-s", "s3.anonymous=true"]);
    says(&printed, &["problems  none"]);
    refuse(
        2,
        &["inspect", SHARD, "-s", "s3.anonymus=true"],
        &["-s s3.anonymus", "s3.anonymous"],
    );
    refuse(
        2,
        &["inspect", SHARD, "-s", "s3.anonymous=1"],
        &["-s s3.anonymous=1"],
    );
    refuse(2, &["inspect", "-s", "s3.anonymous=true"], &["<URL>"]);
}

fn text_of(key: &str, path: &std::path::Path) -> String {
    format!("{key}={:?}", text(path))
}

/// The SDK logs the structures of a failed look-up of credentials.
#[test]
fn line_ends_in_credentials_are_named() {
    let inspect = [
        "inspect",
        "s3://b/0.tar",
        "-s",
        "s3.endpoint_url=http://127.0.0.1:9",
    ];
    for (variable, value, what) in [
        (
            "AWS_ACCESS_KEY_ID",
            "AK\n",
            "the access key id has a character",
        ),
        ("AWS_REGION", "us-\u{1b}[31m", "the region has a character"),
    ] {
        let mut command = command(&inspect);
        command.env(variable, value);
        let (_, messages) = run(command, 1);
        says(&messages, &[what, variable]);
        assert!(!messages.contains("panicked"), "{messages}");
    }
}

#[test]
fn credentials_error_is_one_line() {
    let home = TempDir::new().unwrap();
    let file = home.path().join("config");
    std::fs::write(&file, "[default]\ncredential_process = /bin/false\n").unwrap();
    let mut command = command(&[
        "inspect",
        "s3://b/0.tar",
        "-s",
        "s3.endpoint_url=http://127.0.0.1:9",
    ]);
    command
        .env_remove("AWS_ACCESS_KEY_ID")
        .env_remove("AWS_SECRET_ACCESS_KEY")
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("AWS_CONFIG_FILE", &file)
        .env("AWS_SHARED_CREDENTIALS_FILE", &file);
    let (_, messages) = run(command, 1);
    says(
        &messages,
        &[
            "s3://b/0.tar: no usable AWS credentials (",
            "exited with code",
            "aws sso login",
        ],
    );
    assert!(
        !messages.contains("ProviderError") && !messages.contains("WARN"),
        "{messages}"
    );
    let about = messages.lines().filter(|line| line.contains("credentials"));
    assert_eq!(about.count(), 1, "{messages}");
}

#[test]
fn inspect_refuses_bad_input() {
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
fn inspect_reports_distributions() {
    let folder = TempDir::new().unwrap();
    let picture = folder.path().join("distributions.png");
    let args = [
        "inspect",
        "-c",
        QUICKSTART,
        "--json",
        "--stats-png",
        text(&picture),
    ];
    let report = succeed_json(&args);
    let statistics = &report["totals"]["statistics"];
    let sum = |name: &str| -> u64 {
        let buckets = statistics[name]["buckets"].as_array().unwrap();
        buckets.iter().map(|count| count.as_u64().unwrap()).sum()
    };
    for name in [
        "shorter_side",
        "aspect_ratio",
        "caption_chars",
        "caption_tokens",
    ] {
        assert_eq!(sum(name), 459, "{name}: {statistics}");
    }
    assert_eq!(statistics["shorter_side"]["min"], 64.0);
    assert_eq!(
        statistics["caption_chars"]["mean"],
        report["totals"]["caption_chars"]["mean"]
    );
    assert_eq!(statistics["captions_cut"], 0);
    assert_eq!(statistics["aesthetic"]["missing"], 459);
    assert!(image::open(&picture).unwrap().height() > 100);

    // The place of the picture is checked before the shards are read.
    let in_folder = |out: &str, words: &[&str]| {
        refuse(2, &["inspect", "nowhere.tar", "--stats-png", out], words);
    };
    in_folder("x.jpg", &["--stats-png x.jpg: must be a .png file"]);
    std::fs::create_dir(folder.path().join("folder.png")).unwrap();
    let out = folder.path().join("folder.png");
    in_folder(text(&out), &["--stats-png: ", "it is a folder"]);

    // Without a teacher there is no tokenizer.
    let printed = succeed(&["inspect", SHARD, "--stats"]);
    assert!(
        printed.contains("  caption length, characters: "),
        "{printed}"
    );
    assert!(!printed.contains("tokens"), "{printed}");
    assert!(!succeed(&["inspect", SHARD]).contains("statistics"));
}
