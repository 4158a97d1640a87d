//! The exchange of a run's ranks in each step: a message of every rank to rank 0, and its answer to all.

use std::time::Duration;

use coffey_pipeline::SkippedSample;
use coffey_pipeline::order::Cursor;
use serde::{Deserialize, Serialize};

use super::TrainError;
use crate::ranks::{Collective, Patience, RanksError, TreeSum};

/// The micro-batches of one rank in a step.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StepPart {
    /// Whether the rank has made them; false if a stop ended its wait for data.
    pub(super) made: bool,
    /// Whether the rank was asked to stop.
    pub(super) stop: bool,
    /// Sum of their losses' shares in the step's loss, as bits: JSON has no NaN.
    pub(super) loss_bits: u64,
    pub(super) samples: u64,
    /// Time from the beginning of the step until they were made.
    pub(super) seconds: f64,
    /// Epoch of the last sample.
    pub(super) epoch: u64,
    /// Position in the rank's lanes after the last batch.
    pub(super) cursor: Option<Cursor>,
    /// Samples skipped: shard, key and reason.
    pub(super) skipped: Vec<(usize, String, String)>,
}

impl StepPart {
    pub(super) fn new(loss: f64, skipped: &[SkippedSample]) -> Self {
        let skipped = skipped.iter();
        Self {
            made: true,
            stop: false,
            loss_bits: loss.to_bits(),
            samples: 0,
            seconds: 0.0,
            epoch: 0,
            cursor: None,
            skipped: skipped
                .map(|sample| (sample.shard, sample.key.to_string(), sample.reason.clone()))
                .collect(),
        }
    }

    /// A rank that makes no step, because it was asked to stop.
    pub(super) fn interrupted() -> Self {
        Self {
            made: false,
            stop: true,
            ..Self::new(0.0, &[])
        }
    }
}

/// The answer of rank 0 to all.
#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    made: bool,
    stop: bool,
    loss_bits: u64,
    samples: u64,
    epoch: u64,
}

/// A step as all ranks see it.
#[derive(Debug)]
pub(super) struct Agreed {
    /// Whether every rank has made its micro-batches; else the step is not made.
    pub(super) made: bool,
    /// Whether a rank was asked to stop: the run ends after this step.
    pub(super) stop: bool,
    /// The step's loss.
    pub(super) loss: f64,
    /// Samples of the step.
    pub(super) samples: u64,
    /// Epoch of its last sample.
    pub(super) epoch: u64,
    /// Position in all lanes, on rank 0; `None` on the others.
    pub(super) cursor: Option<Cursor>,
    /// Samples that all ranks skipped, in the order of the lanes, on rank 0.
    pub(super) skipped: Vec<SkippedSample>,
    /// Each rank's time for its micro-batches, on rank 0.
    pub(super) seconds: Vec<f64>,
}

/// What rank 0 alone learns of a step.
#[derive(Debug, Default)]
struct Gathered {
    cursor: Option<Cursor>,
    skipped: Vec<SkippedSample>,
    seconds: Vec<f64>,
}

/// Exchanges `part` for the whole step. `limit`: time without an answer of a rank after which the run fails.
pub(super) fn agree(
    collective: &dyn Collective,
    part: StepPart,
    limit: Duration,
) -> Result<Agreed, TrainError> {
    let rank = collective.rank();
    // Rank 0 may draw or write before it answers. The others go from step to step.
    let patience = match rank.leads() {
        true => Patience::ForData(limit),
        false => Patience::ForLife(limit),
    };
    let message = serde_json::to_vec(&part).map_err(unreadable(rank.index))?;
    let mut gathered = Gathered::default();
    let mut answer = Vec::new();
    if let Some(parts) = collective.gather(message, patience)? {
        let whole;
        (whole, gathered) = join(&parts)?;
        answer = serde_json::to_vec(&whole).map_err(unreadable(0))?;
    }
    let answer = collective.broadcast(answer, patience)?;
    let whole: Answer = serde_json::from_slice(&answer).map_err(unreadable(0))?;
    Ok(Agreed {
        made: whole.made,
        stop: whole.stop,
        loss: f64::from_bits(whole.loss_bits),
        samples: whole.samples,
        epoch: whole.epoch,
        cursor: gathered.cursor,
        skipped: gathered.skipped,
        seconds: gathered.seconds,
    })
}

fn unreadable(rank: usize) -> impl FnOnce(serde_json::Error) -> TrainError {
    move |error| {
        let cause = error.to_string();
        TrainError::Ranks(RanksError::Message { rank, cause })
    }
}

/// The whole step from the parts of all ranks, in rank order.
fn join(messages: &[Vec<u8>]) -> Result<(Answer, Gathered), TrainError> {
    let mut loss = TreeSum::default();
    let (mut cursors, mut gathered) = (Vec::new(), Gathered::default());
    let mut whole = Answer {
        made: true,
        stop: false,
        loss_bits: 0,
        samples: 0,
        epoch: 0,
    };
    for (rank, message) in messages.iter().enumerate() {
        let part: StepPart = serde_json::from_slice(message).map_err(unreadable(rank))?;
        whole.made &= part.made;
        whole.stop |= part.stop;
        whole.samples += part.samples;
        whole.epoch = part.epoch;
        loss.push(f64::from_bits(part.loss_bits), |a, b| Ok(a + b))?;
        cursors.extend(part.cursor);
        let listed = part.skipped.into_iter();
        gathered.seconds.push(part.seconds);
        gathered
            .skipped
            .extend(listed.map(|(shard, key, reason)| SkippedSample {
                shard,
                key: key.into(),
                reason,
            }));
    }
    whole.loss_bits = loss.finish().unwrap_or(0.0).to_bits();
    if whole.made {
        gathered.cursor = Some(Cursor::join(cursors).map_err(RanksError::Differ)?);
    }
    Ok((whole, gathered))
}
