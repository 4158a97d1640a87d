//! Kills `precompute` ([`precompute`]) and `train` with SIGKILL at random moments, starts it again until it is done, and compares what it left with a run that
//! nobody disturbed: every file of the finished student, every picture, every line of every record but its times.
//!
//! The small ones run with all tests. At full size, the quickstart and 50 kills, into a folder and into S3:
//! `cargo nextest run --release --test chaos --run-ignored only`; `COFFEY_CHAOS_KILLS` and `COFFEY_CHAOS_SEED` choose others.

mod precompute;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::support::cloud::Cloud;
use crate::support::cloud::proxy::clean;
use crate::support::command;
use serde_json::Value;
use tempfile::TempDir;

/// What a process says when it has loaded everything.
const STARTED: &str = "waiting for the first batch";
/// A wait beyond which a test has failed.
const PATIENCE: Duration = Duration::from_secs(600);

/// Where the runs go.
enum Place {
    Folder(TempDir),
    S3(Cloud),
}

impl Place {
    fn config(&self) -> PathBuf {
        match self {
            Self::Folder(_) => {
                Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/quickstart.toml")
            }
            Self::S3(cloud) => cloud.config.clone(),
        }
    }

    /// A run's `train.output`.
    fn output(&self, name: &str) -> String {
        match self {
            Self::Folder(_) => self.files(name).to_str().unwrap().to_owned(),
            Self::S3(_) => format!("s3://out/{name}/"),
        }
    }

    /// Its files.
    fn files(&self, name: &str) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.path().join(name),
            Self::S3(cloud) => cloud.out().join(name),
        }
    }

    fn scratch(&self) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.path().join("scratch"),
            Self::S3(cloud) => cloud.root.path().join("scratch"),
        }
    }

    /// Whether a checkpoint is half written.
    fn saving(&self, name: &str) -> bool {
        let Ok(entries) = std::fs::read_dir(self.files(name)) else {
            return false;
        };
        let half = |path: PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let marked = path.join("state.json").exists();
            // The server leaves empty folders of what was removed.
            let unmarked = || !marked && holds_a_file(&path);
            name.starts_with(".writing-") || name.starts_with("checkpoint-") && unmarked()
        };
        entries.flatten().any(|entry| half(entry.path()))
    }
}

/// One process and what it says.
struct Process {
    child: Child,
    said: PathBuf,
}

struct Chaos {
    place: Place,
    settings: Vec<String>,
    kills: usize,
    every: u32,
    steps: u64,
}

impl Chaos {
    fn start(&self, name: &str) -> Process {
        let (config, said) = (self.place.config(), self.place.scratch().join("said"));
        std::fs::create_dir_all(self.place.scratch()).unwrap();
        let own = [
            format!("train.output={}", self.place.output(name)),
            format!("train.scratch={}", self.place.scratch().display()),
            format!("train.max_steps={}", self.steps),
            format!("checkpoint.every={}", self.every),
        ];
        let mut args = vec!["train", "-c", config.to_str().unwrap()];
        for setting in own.iter().chain(&self.settings) {
            args.extend(["-s", setting]);
        }
        Process::start(&args, said)
    }

    /// Runs without a disturbance; how long it took to start, and then for each step.
    fn undisturbed(&self, name: &str) -> (Duration, Duration) {
        let begun = Instant::now();
        let mut trainer = self.start(name);
        trainer.wait_until(|said| said.contains(STARTED));
        let started = begun.elapsed();
        trainer.finish();
        (started, (begun.elapsed() - started) / self.steps as u32)
    }

    fn go(&self) {
        let (start, step) = self.undisturbed("whole");
        let seed = std::env::var("COFFEY_CHAOS_SEED").map_or(7, |seed| seed.parse().unwrap());
        let mut random = fastrand::Rng::with_seed(seed);
        let mut moments: BTreeMap<&str, usize> = BTreeMap::new();
        let mut kills = 0;
        while kills < self.kills {
            let mut trainer = self.start("parts");
            let span = |whole: Duration, random: &mut fastrand::Rng| whole.mul_f64(random.f64());
            let moment = match random.u8(0..6) {
                0 => {
                    trainer.rest(span(start, &mut random));
                    "before the first step"
                }
                1 | 2 => {
                    trainer.wait_until(|_| self.place.saving("parts"));
                    trainer.rest(span(step, &mut random));
                    "while saving"
                }
                _ => {
                    trainer.wait_until(|said| said.contains(STARTED));
                    // A little more than from one checkpoint to the next: on average the run gets ahead, and not far.
                    trainer.rest(span(self.every * step * 6 / 5, &mut random));
                    "while training"
                }
            };
            if trainer.ended() {
                break;
            }
            trainer.kill();
            *moments.entry(moment).or_default() += 1;
            kills += 1;
        }
        eprintln!("{kills} kills: {moments:?}");
        assert!(kills * 2 >= self.kills, "{kills} kills before it was done");
        self.start("parts").finish();
        self.compare();
    }

    fn compare(&self) {
        let (whole, parts) = (self.place.files("whole"), self.place.files("parts"));
        let (lines, expected) = (timeless(&parts), timeless(&whole));
        let steps: Vec<_> = lines.iter().map(|line| line["step"].as_u64()).collect();
        assert_eq!(steps, (1..=self.steps).map(Some).collect::<Vec<_>>());
        assert_eq!(lines, expected);
        let skipped = |run: &Path| std::fs::read_to_string(run.join("skipped.jsonl")).unwrap();
        assert_eq!(skipped(&parts), skipped(&whole));
        assert!(!skipped(&parts).is_empty(), "nothing was left out");
        for folder in ["unet", "unet_target", "samples"] {
            let (found, expected) = (files(&parts.join(folder)), files(&whole.join(folder)));
            assert_eq!(
                found.keys().collect::<Vec<_>>(),
                expected.keys().collect::<Vec<_>>()
            );
            for (name, content) in &expected {
                assert!(found[name] == *content, "{folder}/{name}");
            }
        }
        assert!(!self.place.saving("parts"), "a checkpoint is half written");
        if let Place::S3(cloud) = &self.place {
            assert_eq!(cloud.uploads(), 0);
        }
    }
}

impl Process {
    fn start(args: &[&str], said: PathBuf) -> Self {
        let child = command(args)
            .stdout(Stdio::null())
            .stderr(File::create(&said).unwrap())
            .spawn()
            .unwrap();
        Self { child, said }
    }

    fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn ended(&mut self) -> bool {
        let status = self.child.try_wait().unwrap();
        if let Some(status) = status {
            assert!(status.success(), "{}", self.said());
        }
        status.is_some()
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.said).unwrap_or_default()
    }

    fn wait_until(&mut self, here: impl Fn(&str) -> bool) {
        let begun = Instant::now();
        while !here(&self.said()) && !self.ended() {
            assert!(begun.elapsed() < PATIENCE, "{}", self.said());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn rest(&mut self, time: Duration) {
        let begun = Instant::now();
        while begun.elapsed() < time && !self.ended() {
            std::thread::sleep(Duration::from_millis(2).min(time));
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap(); // SIGKILL
        self.child.wait().unwrap();
    }

    fn finish(mut self) {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{}", self.said());
    }
}

/// Every line but what depends on the clock.
fn timeless(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            for key in ["seconds", "samples_per_second", "limiting_stage"] {
                line.as_object_mut().unwrap().remove(key);
            }
            line
        })
        .collect()
}

fn holds_a_file(path: &Path) -> bool {
    path.is_file()
        || std::fs::read_dir(path)
            .is_ok_and(|entries| entries.flatten().any(|entry| holds_a_file(&entry.path())))
}

/// The files of a folder and of those in it, with their content.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        match path.is_dir() {
            true => found.extend(
                files(&path)
                    .into_iter()
                    .map(|(file, content)| (format!("{name}/{file}"), content)),
            ),
            false => drop(found.insert(name, std::fs::read(path).unwrap())),
        }
    }
    found
}

fn small(place: Place) -> Chaos {
    let settings = [
        "train.batch_size=2",
        "report.endpoint_captions=2",
        "report.endpoint_every=4",
        "report.grid=false",
        "validation.every=3",
        "validation.prompts=[\"red apple\"]",
        "data.filter.max_caption_chars=14",
        "data.shuffle_buffer=20",
        "checkpoint.keep=2",
    ];
    Chaos {
        place,
        settings: settings.map(str::to_owned).to_vec(),
        kills: 6,
        every: 2,
        steps: 14,
    }
}

/// The quickstart, with a checkpoint every five steps, and fewer captions drawn by the teacher at each start.
fn full(place: Place) -> Chaos {
    let settings = [
        "report.endpoint_captions=8",
        "report.grid=false",
        "validation.every=20",
        "data.filter.max_caption_chars=30",
        "checkpoint.keep=3",
    ];
    let kills = std::env::var("COFFEY_CHAOS_KILLS").map_or(50, |kills| kills.parse().unwrap());
    Chaos {
        place,
        settings: settings.map(str::to_owned).to_vec(),
        kills,
        every: 5,
        steps: 250,
    }
}

#[test]
fn a_run_in_a_folder_that_is_killed_again_and_again_is_the_run_that_never_was() {
    small(Place::Folder(TempDir::new().unwrap())).go();
}

#[test]
fn a_run_in_s3_that_is_killed_again_and_again_is_the_run_that_never_was() {
    small(Place::S3(Cloud::start(clean()))).go();
}

#[test]
#[ignore = "takes the better part of an hour"]
fn the_quickstart_in_a_folder_survives_fifty_kills() {
    full(Place::Folder(TempDir::new().unwrap())).go();
}

#[test]
#[ignore = "takes the better part of an hour"]
fn the_quickstart_in_s3_survives_fifty_kills() {
    full(Place::S3(Cloud::start(clean()))).go();
}
