//! Two processes share the shards, are killed at random moments and started again, at times twice at once; what they leave must
//! be, byte for byte, what one process left that nobody disturbed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{Place, Process, files};
use crate::support::cloud::Cloud;
use crate::support::cloud::proxy::clean;
use tempfile::TempDir;

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
        let mut all = vec!["precompute", "-c", config.to_str().unwrap()];
        for setting in std::iter::once(&output).chain(&self.settings) {
            all.extend(["-s", setting]);
        }
        all.extend(args);
        Process::start(&all, scratch.join(said))
    }

    fn worker(&self, rank: usize, said: &str) -> Process {
        let (rank, world) = (rank.to_string(), WORLD.to_string());
        self.start("parts", said, &["--rank", &rank, "--world", &world])
    }

    /// Whether all is there, by `--finish`.
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
                // Of the other rank, or a second one of the same.
                workers.push(self.worker(random.usize(0..WORLD), "two"));
            }
            // What a server has not got whole is not seen.
            let seen = matches!(self.place, Place::Folder(_));
            let moment = match seen && random.bool() {
                true => "while writing",
                false => "at any time",
            };
            let (begun, rest) = (Instant::now(), whole.mul_f64(random.f64()));
            let now = || match moment {
                "while writing" => self.place.saving("parts"),
                _ => begun.elapsed() > rest,
            };
            while !now() && workers.iter_mut().any(Process::runs) {
                std::thread::sleep(Duration::from_millis(1));
            }
            let alone = workers.len() == 1;
            for mut worker in workers {
                if worker.runs() {
                    worker.kill();
                    *moments.entry(moment).or_default() += 1;
                    continue;
                }
                // Of two with one rank, the later takes the files away that the earlier writes.
                let robbed = !alone && worker.said().contains("cleared away what this one wrote");
                assert!(
                    worker.child.wait().unwrap().success() || robbed,
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
            "nothing was left out"
        );
        if let Place::S3(cloud) = &self.place {
            assert_eq!(cloud.uploads(), 0);
        }
    }
}

/// Batches that fill across the borders of shards, of which some samples are left out.
fn small(place: Place) -> Chaos {
    let settings = ["encode.batch_size=7", "data.filter.max_caption_chars=14"];
    Chaos {
        place,
        settings: settings.map(str::to_owned).to_vec(),
        kills: std::env::var("COFFEY_CHAOS_KILLS").map_or(8, |kills| kills.parse().unwrap()),
    }
}

#[test]
fn latents_in_a_folder_are_the_same_after_any_number_of_kills() {
    small(Place::Folder(TempDir::new().unwrap())).go();
}

#[test]
fn latents_in_s3_are_the_same_after_any_number_of_kills() {
    small(Place::S3(Cloud::start(clean()))).go();
}
