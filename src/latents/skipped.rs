//! `skipped/NAME.jsonl`: the skipped samples of a shard, with their reasons.

use std::collections::BTreeMap;

use coffey_pipeline::SkippedSample;
use coffey_pipeline::destination::Destination;
use serde::Serialize;

use super::LatentError;

/// Name of the file that lists the skipped samples of a shard.
pub(super) fn file_name(shard: &str) -> String {
    format!("skipped/{shard}.jsonl")
}

#[derive(Serialize)]
struct Line<'a> {
    shard: &'a str,
    key: &'a str,
    reason: &'a str,
}

/// Skipped samples of shards whose list is not written yet.
#[derive(Debug, Default)]
pub(super) struct Skipped(BTreeMap<usize, Vec<SkippedSample>>);

impl Skipped {
    /// Records skipped samples.
    pub(super) fn add(&mut self, samples: &[SkippedSample]) {
        for sample in samples {
            self.0.entry(sample.shard).or_default().push(sample.clone());
        }
    }

    /// The shards with skipped samples that are not written.
    pub(super) fn shards(&self) -> Vec<usize> {
        self.0.keys().copied().collect()
    }

    /// Writes the skipped samples of the shard `name`, if there are any. `url` must hold no secrets.
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
