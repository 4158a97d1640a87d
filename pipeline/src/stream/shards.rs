//! The open shards of the interleaver.

use std::sync::Arc;
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::error::{Halt, StreamError};
use super::listed::ListedShard;
use super::reader::{OpenShard, ReaderContext, ShardEvent};
use crate::flow::{FlowMetrics, StageHandle};
use crate::order::OpenPass;
use crate::shard::ShardUrl;
use crate::stages::Stage;

/// A shard that samples are taken from in turn, and the position in it.
pub(super) struct OpenSlot {
    pub(super) at: OpenPass,
    pub(super) shard: OpenShard,
}

/// Opens shards, and waits for their events.
pub(super) struct ShardOpener {
    shards: Vec<ShardUrl>,
    /// The entry of each shard in its manifest.
    listed: Option<Arc<[ListedShard]>>,
    context: ReaderContext,
    cancel: CancellationToken,
    /// The stages of the thread that waits.
    waiting: [StageHandle; 2],
}

impl ShardOpener {
    pub(super) fn new(
        shards: Vec<ShardUrl>,
        listed: Option<Arc<[ListedShard]>>,
        context: ReaderContext,
        cancel: CancellationToken,
        waiting: [StageHandle; 2],
    ) -> Self {
        Self {
            shards,
            listed,
            context,
            cancel,
            waiting,
        }
    }

    /// Number of shards.
    pub(super) fn count(&self) -> usize {
        self.shards.len()
    }

    /// URL of a shard for a message.
    pub(super) fn url(&self, index: usize) -> String {
        self.shards[index].to_string()
    }

    pub(super) fn metrics(&self) -> &FlowMetrics {
        &self.context.metrics
    }

    /// Starts to read a shard.
    pub(super) fn open(&self, index: usize) -> Result<OpenShard, Halt> {
        let listed = self.listed.as_ref().map(|listed| listed[index].clone());
        OpenShard::start(&self.context, &self.shards[index], listed)
            .map_err(|error| Halt::Failed(StreamError::threads(&error)))
    }

    /// Waits for the next event of a shard.
    pub(super) fn next_event(&self, shard: &OpenShard) -> Result<ShardEvent, Halt> {
        let start = Instant::now();
        let event = shard.next(&self.cancel);
        // One thread is two stages, which wait together.
        let waited = start.elapsed();
        for stage in &self.waiting {
            stage.add_starved(waited);
        }
        if self.cancel.is_cancelled() {
            return Err(Halt::Closed);
        }
        event.ok_or_else(|| {
            Halt::Failed(StreamError::Panicked {
                stage: Stage::Untar,
                message: "the untar thread ended unexpectedly".to_owned(),
            })
        })
    }
}
