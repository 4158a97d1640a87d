//! Precompute: the loop from the encode pool to latent shards.

use std::time::{Duration, Instant};

use coffey_pipeline::flow::{FlowSnapshot, Recent};
use coffey_pipeline::stages::Stage;
use coffey_pipeline::{StreamError, counted};
use tokio_util::sync::CancellationToken;

use crate::encode::{EncodeError, EncodePool};
use crate::latents::{LatentError, LatentWriter};
use crate::monitor::Monitor;
use crate::progress::{Progress, ProgressOptions};

/// Why precomputing ended early.
#[derive(Debug, thiserror::Error)]
pub enum PrecomputeError {
    /// The data or its encoding failed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A latent shard or a manifest could not be written.
    #[error(transparent)]
    Latents(#[from] LatentError),
    /// A stop was asked for: finished shards stand.
    #[error("stopped")]
    Stopped,
}

/// Writes the batches of `pool` to latent shards until the stream ends. Returns the stages' times since the first batch.
///
/// # Errors
/// [`PrecomputeError::Stopped`] once `cancel` is cancelled; otherwise when encoding or writing fails. Shards that are not
/// finished are dropped.
pub fn write_latents(
    mut pool: EncodePool,
    writer: &mut LatentWriter,
    monitor: &Monitor,
    cancel: &CancellationToken,
) -> Result<Option<FlowSnapshot>, PrecomputeError> {
    let metrics = monitor.flow();
    let stage = metrics.stage(Stage::Write);
    let mut totals = WriteTotals::new(writer.remaining().len());
    monitor.expect("shards", 0, totals.shards as u64);
    monitor.heartbeat();
    loop {
        let (samples, finished) = match pool.next(&stage, cancel, Duration::MAX) {
            Ok(Some(batch)) => (batch.samples.len(), stage.work(|| writer.write(&batch))?),
            Ok(None) => break,
            Err(EncodeError::Cancelled) => return Err(PrecomputeError::Stopped),
            Err(EncodeError::Stream(error)) => {
                let rest = pool.stream().take_undelivered();
                match *error {
                    // The shards that were left hold no usable sample, but earlier ones do.
                    StreamError::NothingUsable { .. } if writer.manifest().samples() > 0 => {
                        let finished =
                            writer.finish_shards(&rest.skipped, &rest.finished_shards)?;
                        (0, finished)
                    }
                    error => {
                        let listed = writer.list_skipped(&rest.skipped);
                        totals.say_listed(listed);
                        return Err(EncodeError::from(error).into());
                    }
                }
            }
            Err(other) => return Err(other.into()),
        };
        stage.add_items(samples as u64);
        for name in &finished {
            let entry = &writer.manifest().shards[name];
            stage.add_bytes(entry.bytes);
            if let Some(cause) = &entry.broken {
                totals.progress.say(format!(
                    "warning: {} is broken after {}: {cause}",
                    entry.source,
                    counted(entry.samples, "sample")
                ));
            }
        }
        totals.add(samples, finished.len(), monitor);
        monitor.heartbeat();
    }
    monitor.stop_waiting();
    Ok(totals.recent.overall(metrics))
}

/// Counts of written shards and samples, and their display.
struct WriteTotals {
    shards: usize,
    shards_done: usize,
    samples: usize,
    started: Instant,
    recent: Recent,
    progress: Progress,
}

impl WriteTotals {
    fn new(shards: usize) -> Self {
        Self {
            shards,
            shards_done: 0,
            samples: 0,
            started: Instant::now(),
            recent: Recent::default(),
            progress: Progress::new(ProgressOptions {
                total: shards as u64,
                template: "{spinner} {wide_bar} {pos}/{len} shards  {msg}",
                line_every: Duration::from_secs(10),
            }),
        }
    }

    /// Says which lists of skipped samples an ended run leaves.
    fn say_listed(&self, listed: Result<Vec<String>, LatentError>) {
        match listed.as_deref() {
            Ok([]) => {}
            Ok([one]) => self
                .progress
                .say(format!("skipped samples are listed in {one}")),
            Ok([one, more @ ..]) => self.progress.say(format!(
                "skipped samples are listed in {one} and {} beside it",
                counted(more.len(), "file")
            )),
            Err(error) => self.progress.say(format!(
                "warning: the skipped samples could not be listed: {error}"
            )),
        }
    }

    fn add(&mut self, samples: usize, shards: usize, monitor: &Monitor) {
        self.samples += samples;
        self.shards_done += shards;
        monitor.advance(self.shards_done as u64);
        let limit = self.recent.mark(monitor.flow());
        let limit = limit.and_then(FlowSnapshot::limiting_stage);
        let limit = limit.map_or(String::new(), |stage| format!(" · limit: {stage}"));
        let rate = self.samples as f64 / self.started.elapsed().as_secs_f64();
        let message = format!(
            "{} · {rate:.1} samples/s{limit}",
            counted(self.samples, "sample")
        );
        self.progress.update(self.shards_done as u64, &message, || {
            format!("{}/{} shards · {message}", self.shards_done, self.shards)
        });
    }
}
