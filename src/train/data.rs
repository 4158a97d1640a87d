//! Where a run's batches come from, and what is looked up in them before it begins.

use std::collections::BTreeSet;

use coffey_pipeline::order::{Cursor, Order};
use coffey_pipeline::{Destination, SourceError, Stream, StreamError};

use super::TrainError;
use crate::monitor::Monitor;
use crate::stop::Stop;

/// Where batches come from.
pub struct Data<'a> {
    /// Opens a stream: in training order from a cursor, or every sample once in order. Arguments: order, batch size, cursor.
    #[allow(clippy::type_complexity)]
    pub open: Box<dyn Fn(Order, usize, Option<Cursor>) -> Result<Stream, StreamError> + 'a>,
    /// Opens a place to write to: a folder or an `s3://` prefix.
    #[allow(clippy::type_complexity)]
    pub destination: Box<dyn Fn(&str) -> Result<Destination, SourceError> + 'a>,
    /// What the run and its stages report to.
    pub monitor: Monitor,
}

impl std::fmt::Debug for Data<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Data").finish_non_exhaustive()
    }
}

/// The first distinct captions of the data, in the order of the shards.
pub(super) fn first_captions(
    data: &Data<'_>,
    wanted: usize,
    stop: &Stop,
) -> Result<Vec<String>, TrainError> {
    let stream = (data.open)(Order::Sequential, wanted.min(64), None)?;
    let batches = stream.batches().clone();
    stop.on_stop(move || batches.close());
    let (mut captions, mut seen) = (Vec::new(), BTreeSet::new());
    while let Some(batch) = stream.batches().recv_untimed() {
        for sample in batch?.samples {
            if captions.len() < wanted && seen.insert(sample.caption.clone()) {
                captions.push(sample.caption);
            }
        }
        if captions.len() == wanted {
            break;
        }
    }
    match stop.asked() {
        true => Err(TrainError::Stopped),
        false => Ok(captions),
    }
}
