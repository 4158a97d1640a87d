//! Two processes share the shards, are killed at random moments and started again, sometimes two of one rank at once. Their files
//! must equal those of one undisturbed process, byte for byte.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{Place, Process, files};
use crate::support::cloud::Cloud;
use crate::support::cloud::proxy::clean;
use crate::support::{self, text};

const WORLD: usize = 2;

struct Chaos {
    place: Place,
    settings: Vec<String>,
    kills: usize,
}

impl Chaos {
    fn start(&self, name: &str, said: &str, args: &[&str]) -> Process {
        let (config, scratch) = (self.place.config(), self.place.scratch());
        std::fs::create_dir_all(&scratch).unwrap();
        let output = format!("latents.output={}", self.place.output(name));
        let settings = std::iter::once(&output).chain(&self.settings);
        let mut all = support::args("precompute", text(&config), settings);
        all.extend(args.iter().map(|&arg| arg.to_owned()));
        Process::start(&all, scratch.join(said))
    }

    fn worker(&self, rank: usize, said: &str) -> Process {
        let (rank, world) = (rank.to_string(), WORLD.to_string());
        self.start("parts", said, &["--rank", &rank, "--world", &world])
    }

    /// Whether `--finish` finds all shards.
    fn finished(&self) -> bool {
        let mut process = self.start("parts", "finish", &["--finish"]);
        let success = process.child.wait().unwrap().success();
        let said = process.said();
        assert!(
            success || said.contains("missing: ") || said.contains("holds no manifest"),
            "{said}"
        );
        success
    }

    fn go(&self) {
        let begun = Instant::now();
        self.start("whole", "whole", &["--rank", "0", "--world", "1"])
            .finish();
        let whole = begun.elapsed();
        let seed = std::env::var("COFFEY_CHAOS_SEED").map_or(7, |seed| seed.parse().unwrap());
        let mut random = fastrand::Rng::with_seed(seed);
        let mut moments: BTreeMap<&str, usize> = BTreeMap::new();
        for round in 0..self.kills {
            let rank = random.usize(0..WORLD);
            let mut workers = vec![self.worker(rank, "one")];
            if round % 2 == 1 {
                // A process of the other rank, or a second one of the same rank.
                workers.push(self.worker(random.usize(0..WORLD), "two"));
            }
            // Partial objects are visible in a folder alone.
            let visible = matches!(self.place, Place::Folder(_));
            let moment = if visible && random.bool() {
                "while writing"
            } else {
                "at any time"
            };
            let (begun, rest) = (Instant::now(), whole.mul_f64(random.f64()));
            let now = || match moment {
                "while writing" => self.place.saving("parts"),
                _ => begun.elapsed() > rest,
            };
            while !now() && workers.iter_mut().any(Process::is_running) {
                std::thread::sleep(Duration::from_millis(1));
            }
            let alone = workers.len() == 1;
            for mut worker in workers {
                if worker.is_running() {
                    worker.kill();
                    *moments.entry(moment).or_default() += 1;
                    continue;
                }
                // Of two processes with one rank, the later removes the files that the earlier writes.
                let replaced = !alone && worker.said().contains("cleared away what this one wrote");
                assert!(
                    worker.child.wait().unwrap().success() || replaced,
                    "{}",
                    worker.said()
                );
            }
            if random.u8(0..3) == 0 && self.finished() {
                break;
            }
        }
        eprintln!("kills: {moments:?}");
        for rank in 0..WORLD {
            self.worker(rank, "last").finish();
        }
        assert!(self.finished());
        let (whole, parts) = (self.place.files("whole"), self.place.files("parts"));
        let (found, expected) = (files(&parts), files(&whole));
        let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&found), names(&expected));
        for (name, content) in &expected {
            assert!(found[name] == *content, "{name}");
        }
        assert!(
            expected.keys().any(|name| name.starts_with("skipped/")),
            "no sample was skipped"
        );
        if let Place::S3(cloud) = &self.place {
            assert_eq!(cloud.uploads(), 0);
        }
    }
}

/// Batches that span shards, with some samples skipped.
fn small(place: Place) -> Chaos {
    let settings = ["encode.batch_size=7", "data.filter.max_caption_chars=14"];
    Chaos {
        place,
        settings: settings.map(str::to_owned).to_vec(),
        kills: std::env::var("COFFEY_CHAOS_KILLS").map_or(8, |kills| kills.parse().unwrap()),
    }
}

#[test]
fn killed_precompute_in_folder_equals_undisturbed_one() {
    small(Place::Folder(TempDir::new().unwrap())).go();
}

#[test]
fn killed_precompute_in_s3_equals_undisturbed_one() {
    small(Place::S3(Cloud::start(clean()))).go();
}
