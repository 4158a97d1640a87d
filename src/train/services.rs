//! Services of the process to a run: streams of data, destinations, the monitor, the stop signal.

use std::collections::BTreeSet;

use coffey_pipeline::order::{Cursor, Lanes};
use coffey_pipeline::{Destination, ShardUrl, SkippedSample, SourceError, Stream, StreamError};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::TrainError;
use crate::monitor::Monitor;

/// Services of the process to a run.
pub struct Services<'a> {
    /// The shards of the streams.
    pub shards: Vec<ShardUrl>,
    /// Opens a stream of the shards in training order. Arguments: batch size, lanes, cursor to resume from.
    #[allow(clippy::type_complexity)]
    pub open: Box<dyn Fn(usize, Lanes, Option<Cursor>) -> Result<Stream, StreamError> + 'a>,
    /// Opens a stream of the captions alone, every sample once in the order of the shards. Argument: batch size.
    #[allow(clippy::type_complexity)]
    pub captions: Box<dyn Fn(usize) -> Result<Stream<()>, StreamError> + 'a>,
    /// Opens a folder or an `s3://` prefix for writing.
    #[allow(clippy::type_complexity)]
    pub destination: Box<dyn Fn(&str) -> Result<Destination, SourceError> + 'a>,
    /// Monitor that the run and its stages report to.
    pub monitor: Monitor,
    /// The runtime that waits run on.
    pub runtime: Handle,
    /// Cancelled when the run is to stop.
    pub cancel: CancellationToken,
}

impl std::fmt::Debug for Services<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services").finish_non_exhaustive()
    }
}

impl Services<'_> {
    /// The first `wanted` distinct captions of the data, in the order of the shards. If the data ends in an error, `skipped`
    /// receives the skipped samples.
    pub(super) fn first_captions(
        &self,
        wanted: usize,
        skipped: &mut Vec<SkippedSample>,
    ) -> Result<Vec<String>, TrainError> {
        let stream = (self.captions)(wanted.min(64))?;
        let (mut captions, mut seen) = (Vec::new(), BTreeSet::new());
        loop {
            let next = self.runtime.block_on(async {
                let next = stream.batches().recv_untimed_async();
                self.cancel.run_until_cancelled(next).await
            });
            let Some(batch) = next.ok_or(TrainError::Stopped)? else {
                return Ok(captions);
            };
            let batch = match batch {
                Ok(batch) => batch,
                Err(error) => {
                    skipped.extend(stream.take_undelivered().skipped);
                    return Err(error.into());
                }
            };
            skipped.extend(batch.skipped);
            for sample in batch.samples {
                if captions.len() < wanted && seen.insert(sample.caption.clone()) {
                    captions.push(sample.caption);
                }
            }
            if captions.len() == wanted {
                return Ok(captions);
            }
        }
    }
}
