//! `skipped/NAME.jsonl`: which samples of a finished shard were left out, and why.

use std::collections::BTreeMap;

use coffey_pipeline::SkippedSample;
use coffey_pipeline::destination::Destination;
use serde::Serialize;

use super::LatentError;

/// The name of the file that lists what a shard leaves out.
pub(super) fn file_name(shard: &str) -> String {
    format!("skipped/{shard}.jsonl")
}

#[derive(Serialize)]
struct Line<'a> {
    shard: &'a str,
    key: &'a str,
    reason: &'a str,
}

/// What waits for its shard to be finished.
#[derive(Debug, Default)]
pub(super) struct Skipped(BTreeMap<usize, Vec<SkippedSample>>);

impl Skipped {
    /// Takes note of samples that were left out.
    pub(super) fn add(&mut self, samples: &[SkippedSample]) {
        for sample in samples {
            self.0.entry(sample.shard).or_default().push(sample.clone());
        }
    }

    /// Writes those of the shard called `name`, if there are any. `url` is without secrets.
    pub(super) fn finish(
        &mut self,
        place: &Destination,
        shard: usize,
        name: &str,
        url: &str,
    ) -> Result<(), LatentError> {
        let Some(samples) = self.0.remove(&shard) else {
            return Ok(());
        };
        let file = file_name(name);
        let mut lines = Vec::new();
        for SkippedSample { key, reason, .. } in &samples {
            let line = Line {
                shard: url,
                key,
                reason,
            };
            serde_json::to_writer(&mut lines, &line)
                .map_err(|error| place.failed(&file, error.into()))?;
            lines.push(b'\n');
        }
        place.write(&file, &lines)?;
        Ok(())
    }
}
