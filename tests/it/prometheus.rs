//! The metrics and the health of real runs, read over HTTP on loopback as Prometheus and a supervisor do.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use crate::support::watched::Watched;
use crate::support::{NO_PICTURES, PRECOMPUTE, QUICKSTART, args, refuse, repository, text};
use serde_json::Value;
use tempfile::TempDir;

/// Every metric: its name, its type and its label.
const STREAM: [(&str, &str, &str); 8] = [
    ("coffey_stage_items_total", "counter", "stage"),
    ("coffey_stage_bytes_total", "counter", "stage"),
    ("coffey_stage_busy_seconds_total", "gauge", "stage"),
    ("coffey_stage_starved_seconds_total", "gauge", "stage"),
    ("coffey_stage_blocked_seconds_total", "gauge", "stage"),
    ("coffey_captions_truncated_total", "counter", ""),
    ("coffey_s3_requests_total", "counter", "outcome"),
    ("coffey_stalled", "gauge", ""),
];
/// Metrics that are absent before their first event, or while no channel is open.
const OPTIONAL: [(&str, &str, &str); 6] = [
    ("coffey_channel_items", "gauge", "channel"),
    ("coffey_channel_capacity", "gauge", "channel"),
    ("coffey_samples_skipped_total", "counter", "reason"),
    ("coffey_s3_retries_total", "counter", "reason"),
    ("coffey_cache_hits_total", "counter", ""),
    ("coffey_cache_misses_total", "counter", ""),
];
const TRAINING: [(&str, &str, &str); 6] = [
    ("coffey_train_step", "gauge", ""),
    ("coffey_train_loss", "gauge", ""),
    ("coffey_train_grad_norm", "gauge", ""),
    ("coffey_train_lr", "gauge", ""),
    ("coffey_train_samples_total", "counter", ""),
    ("coffey_checkpoint_seconds", "gauge", ""),
];
/// Metrics of a run of several ranks.
const RANKS: [&str; 5] = [
    "coffey_exchange_seconds",
    "coffey_fastest_rank_seconds",
    "coffey_ranks",
    "coffey_slowest_rank",
    "coffey_slowest_rank_seconds",
];
const STAGES: [&str; 9] = [
    "fetch", "untar", "filter", "shuffle", "decode", "batch", "encode", "train", "write",
];

/// Scrapes until the command has ended with code 0; returns every scrape and the messages.
fn scrape(watched: Watched) -> (Vec<Scrape>, String) {
    let mut scrapes = Vec::new();
    while let Some(metrics) = watched.get("/metrics") {
        let kind = "content-type: text/plain; version=0.0.4";
        assert!(metrics.head.contains(kind), "{}", metrics.head);
        assert_eq!(metrics.status, 200, "{}", metrics.text());
        scrapes.push(Scrape::parse(&metrics.text()));
        if let Some(health) = watched.get("/healthz") {
            assert_eq!((health.status, health.text().as_str()), (200, "ok\n"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let (code, messages) = watched.end();
    assert_eq!(code, Some(0), "{messages}");
    (scrapes, messages)
}

/// The parsed text: types by metric, and values by series.
#[derive(Debug)]
struct Scrape {
    types: BTreeMap<String, String>,
    values: BTreeMap<String, f64>,
}

impl Scrape {
    /// Reads every line; fails on a line that is not in Prometheus's text format.
    fn parse(body: &str) -> Self {
        let mut scrape = Self {
            types: BTreeMap::new(),
            values: BTreeMap::new(),
        };
        let mut metric = String::new();
        for line in body.lines().filter(|line| !line.is_empty()) {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').unwrap();
                assert!(!help.is_empty(), "{line}");
                metric = name.to_owned();
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert_eq!(name, metric, "{line}");
                let twice = scrape.types.insert(name.to_owned(), kind.to_owned());
                assert_eq!(twice, None, "{line}");
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let (name, labels) = series.split_once('{').unwrap_or((series, ""));
                assert_eq!(name, metric, "{line}");
                let counts = scrape.types[&metric] == "counter";
                assert!(!counts || metric.ends_with("_total"), "{line}");
                let mut all = STREAM.iter().chain(&OPTIONAL).chain(&TRAINING);
                let (_, _, label) = all.find(|(name, ..)| *name == metric).unwrap();
                if label.is_empty() {
                    assert_eq!(labels, "", "{line}");
                } else {
                    let value = labels.strip_prefix(&format!("{label}=\"")).unwrap();
                    let value = value.strip_suffix("\"}").unwrap();
                    assert!(!value.is_empty() && !value.contains('"'), "{line}");
                }
                let value: f64 = value.parse().unwrap();
                assert!(value.is_finite() && value >= 0.0, "{line}");
                assert_eq!(scrape.values.insert(series.to_owned(), value), None);
            }
        }
        scrape
    }

    fn value(&self, series: &str) -> f64 {
        *self
            .values
            .get(series)
            .unwrap_or_else(|| panic!("no {series} in {:#?}", self.values))
    }

    fn items(&self, stage: &str) -> f64 {
        self.value(&format!("coffey_stage_items_total{{stage=\"{stage}\"}}"))
    }
}

/// Metrics are as designed, every stage is there, and no counter ever falls.
fn check(scrapes: &[Scrape], training: bool) {
    assert!(scrapes.len() > 2, "{} scrapes", scrapes.len());
    let last = scrapes.last().unwrap();
    let owned = |(name, kind, _): &(&str, &str, &str)| ((*name).to_owned(), (*kind).to_owned());
    let mut designed: BTreeMap<String, String> = STREAM.iter().map(owned).collect();
    let is_optional = |name: &str| OPTIONAL.iter().any(|(optional, ..)| *optional == name);
    let known = |name: &str| designed.contains_key(name) || is_optional(name);
    assert!(scrapes[0].types.keys().all(|name| known(name)));
    if training {
        designed.extend(TRAINING.iter().map(owned));
    }
    let optional = OPTIONAL.iter().map(owned);
    designed.extend(optional.filter(|(name, _)| last.types.contains_key(name)));
    assert_eq!(last.types, designed);
    let has_channels = |scrape: &Scrape| scrape.types.contains_key("coffey_channel_items");
    assert!(scrapes.iter().any(has_channels), "no channel was open");
    for measure in [
        "items_total",
        "bytes_total",
        "busy_seconds_total",
        "starved_seconds_total",
        "blocked_seconds_total",
    ] {
        for stage in STAGES {
            last.value(&format!("coffey_stage_{measure}{{stage=\"{stage}\"}}"));
        }
    }
    for pair in scrapes.windows(2) {
        for (series, value) in &pair[0].values {
            if series.contains("_total") {
                assert!(pair[1].value(series) >= *value, "{series} fell");
            }
        }
    }
    for (series, items) in &last.values {
        if let Some(channel) = series.strip_prefix("coffey_channel_items") {
            assert!(*items <= last.value(&format!("coffey_channel_capacity{channel}")));
        }
    }
    for stage in ["untar", "filter", "decode", "batch", "encode"] {
        assert!(last.items(stage) > 0.0, "{stage}");
    }
    assert!(last.value("coffey_s3_requests_total{outcome=\"ok\"}") > 0.0);
}

#[test]
fn metrics_of_training_run_grow() {
    let folder = TempDir::new().unwrap();
    let output = format!("train.output={}", text(&folder.path().join("run")));
    let own = [
        output.as_str(),
        "train.batch_size=4",
        "train.max_steps=12",
        "checkpoint.every=3",
        "validation.every=12",
    ];
    let settings = NO_PICTURES.iter().chain(&own);
    let (scrapes, messages) = scrape(Watched::start(&args("train", QUICKSTART, settings)));
    check(&scrapes, true);
    let last = scrapes.last().unwrap();
    check_dashboard_and_docs();
    // The last pictures are drawn after the last step.
    assert_eq!(last.value("coffey_train_step"), 12.0);
    assert_eq!(last.value("coffey_train_samples_total"), 48.0);
    assert_eq!(last.items("train"), 48.0);
    assert!(last.value("coffey_train_loss") > 0.0);
    assert!(last.value("coffey_train_grad_norm") > 0.0);
    assert_eq!(last.value("coffey_train_lr"), 3e-4);
    assert_eq!(last.value("coffey_stalled"), 0.0);
    assert!(last.value("coffey_checkpoint_seconds") > 0.0);
    assert!(
        messages.contains("12 steps in ") && messages.contains(" · limit: "),
        "{messages}"
    );
}

/// The name of every metric.
fn exported() -> BTreeSet<String> {
    let all = STREAM.iter().chain(&OPTIONAL).chain(&TRAINING);
    let all = all.map(|(name, ..)| *name).chain(RANKS);
    all.map(str::to_owned).collect()
}

/// The metrics that a text names.
fn named(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("coffey_"))
        .map(str::to_owned)
        .collect()
}

/// The documentation and the dashboard name every metric, and no other.
fn check_dashboard_and_docs() {
    let exported = exported();
    let docs = std::fs::read_to_string(repository("docs/operations.md")).unwrap();
    assert_eq!(named(&docs), exported);

    let dashboard = std::fs::read(repository("deploy/grafana/coffey.json")).unwrap();
    let dashboard: Value = serde_json::from_slice(&dashboard).unwrap();
    let mut queries = String::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        if panel["type"] == "row" {
            continue;
        }
        // Each user has another Prometheus.
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{panel:#}");
        for target in panel["targets"].as_array().unwrap() {
            queries.push_str(target["expr"].as_str().unwrap());
            queries.push('\n');
        }
    }
    assert_eq!(named(&queries), exported);
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        let asked = named(&variable["query"].to_string());
        assert!(asked.is_subset(&exported), "{asked:?}");
    }
}

#[test]
fn metrics_of_precompute_run_grow() {
    let folder = TempDir::new().unwrap();
    let output = format!("latents.output={}", text(&folder.path().join("latents")));
    let args = args("precompute", PRECOMPUTE, [output]);
    let (scrapes, messages) = scrape(Watched::start(&args));
    check(&scrapes, false);
    let last = scrapes.last().unwrap();
    assert!(last.items("write") > 0.0 && last.items("train") == 0.0);
    assert!(messages.contains("\nlimit: encode, busy "), "{messages}");
}

#[test]
fn healthz_names_hanging_stage() {
    // A server that never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let shards = format!("data.shards=http://{}/0.tar", silent.local_addr().unwrap());
    let settings = [shards.as_str(), "train.stall_timeout=1"];
    let watched = Watched::start(&args("bench", QUICKSTART, settings));
    assert_eq!(watched.get("/healthz").unwrap().status, 200);
    let begun = Instant::now();
    let (status, answer) = loop {
        let health = watched.get("/healthz").unwrap();
        if health.status != 200 {
            break (health.status, health.text());
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "still healthy");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(begun.elapsed() > Duration::from_millis(500));
    assert_eq!(status, 503);
    assert!(answer.contains("the fetch stage hangs"), "{answer}");
    assert_eq!(watched.get("/nothing").unwrap().status, 404);
    let metrics = Scrape::parse(&watched.get("/metrics").unwrap().text());
    assert_eq!(metrics.value("coffey_stalled"), 1.0);
}

#[test]
fn metrics_listen_refuses_unusable_address() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let bench = |listen: &str, words: &[&str]| {
        let listen = format!("metrics.listen={listen}");
        refuse(2, &args("bench", QUICKSTART, [listen]), words);
    };
    bench(&address, &["metrics.listen", &address, "in use", "port 0"]);
    bench(":9464", &["metrics.listen", "127.0.0.1:9464"]);
    bench("localhost:1", &["metrics.listen", "127.0.0.1:9464"]);
}
