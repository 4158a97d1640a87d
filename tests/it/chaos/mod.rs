//! Kills `train` and `precompute` with SIGKILL at random moments, starts them again until they are done, and compares their files with
//! those of an undisturbed run: the finished student, the pictures, and the records without times.
//!
//! The modules `slow` run the quickstart with 50 kills; `COFFEY_CHAOS_KILLS` and `COFFEY_CHAOS_SEED` set the number and the seed.

mod precompute;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::cloud::Cloud;
use crate::support::cloud::proxy::clean;
use crate::support::{args, command, quickstart, text, timeless};

/// The message of a process that has loaded everything.
const STARTED: &str = "waiting for the first batch";
/// The wait after which a test fails.
const PATIENCE: Duration = Duration::from_secs(600);

/// The output of the runs.
enum Place {
    Folder(TempDir),
    S3(Cloud),
}

impl Place {
    fn config(&self) -> PathBuf {
        match self {
            Self::Folder(_) => quickstart(),
            Self::S3(cloud) => cloud.config.clone(),
        }
    }

    /// A run's `train.output`.
    fn output(&self, name: &str) -> String {
        match self {
            Self::Folder(_) => text(&self.files(name)).to_owned(),
            Self::S3(_) => format!("s3://out/{name}/"),
        }
    }

    /// The folder of a run's files.
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

    /// Whether a checkpoint is partially written.
    fn saving(&self, name: &str) -> bool {
        let Ok(entries) = std::fs::read_dir(self.files(name)) else {
            return false;
        };
        let half = |path: PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let marked = path.join("state.json").exists();
            // The server keeps the empty folders of removed objects.
            let unmarked = || !marked && holds_a_file(&path);
            name.starts_with(".writing-") || name.starts_with("checkpoint-") && unmarked()
        };
        entries.flatten().any(|entry| half(entry.path()))
    }
}

/// A process whose messages go to a file.
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
        let settings = own.iter().chain(&self.settings);
        Process::start(&args("train", text(&config), settings), said)
    }

    /// Runs without kills; returns the time to the start of training and the time of each step.
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
                    trainer.wait_for(span(start, &mut random));
                    "before the first step"
                }
                1 | 2 => {
                    trainer.wait_until(|_| self.place.saving("parts"));
                    trainer.wait_for(span(step, &mut random));
                    "while saving"
                }
                _ => {
                    trainer.wait_until(|said| said.contains(STARTED));
                    // On average a little longer than half the time between checkpoints, so that the run makes slow progress.
                    trainer.wait_for(span(self.every * step * 6 / 5, &mut random));
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
        assert!(kills * 2 >= self.kills, "the run ended after {kills} kills");
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
        assert!(!skipped(&parts).is_empty(), "no sample was skipped");
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
        assert!(
            !self.place.saving("parts"),
            "a checkpoint is partially written"
        );
        if let Place::S3(cloud) = &self.place {
            assert_eq!(cloud.uploads(), 0);
        }
    }
}

impl Process {
    fn start(args: &[String], said: PathBuf) -> Self {
        let child = command(args)
            .stdout(Stdio::null())
            .stderr(File::create(&said).unwrap())
            .spawn()
            .unwrap();
        Self { child, said }
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Whether the process has ended; panics if it failed.
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

    /// Waits until the messages satisfy `here` or the process has ended.
    fn wait_until(&mut self, here: impl Fn(&str) -> bool) {
        let begun = Instant::now();
        while !here(&self.said()) && !self.ended() {
            assert!(begun.elapsed() < PATIENCE, "{}", self.said());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for `time` or until the process has ended.
    fn wait_for(&mut self, time: Duration) {
        let begun = Instant::now();
        while begun.elapsed() < time && !self.ended() {
            std::thread::sleep(Duration::from_millis(2).min(time));
        }
    }

    /// Sends SIGKILL.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn finish(mut self) {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{}", self.said());
    }
}

fn holds_a_file(path: &Path) -> bool {
    path.is_file()
        || std::fs::read_dir(path)
            .is_ok_and(|entries| entries.flatten().any(|entry| holds_a_file(&entry.path())))
}

/// The files below a folder, with their content.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            let inner = files(&path).into_iter();
            found.extend(inner.map(|(file, content)| (format!("{name}/{file}"), content)));
        } else {
            found.insert(name, std::fs::read(path).unwrap());
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

/// The quickstart with a checkpoint every five steps, and with fewer captions for the endpoint error, which takes time at each start.
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
fn killed_run_in_folder_equals_undisturbed_run() {
    small(Place::Folder(TempDir::new().unwrap())).go();
}

#[test]
fn killed_run_in_s3_equals_undisturbed_run() {
    small(Place::S3(Cloud::start(clean()))).go();
}

mod slow {
    use super::*;

    #[test]
    #[ignore = "takes the better part of an hour"]
    fn quickstart_in_folder_survives_50_kills() {
        full(Place::Folder(TempDir::new().unwrap())).go();
    }

    #[test]
    #[ignore = "takes the better part of an hour"]
    fn quickstart_in_s3_survives_50_kills() {
        full(Place::S3(Cloud::start(clean()))).go();
    }
}
