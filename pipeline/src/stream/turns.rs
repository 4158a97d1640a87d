//! Turns: a thread that takes the batches of several lanes in turn, and joins their cursors.

use std::sync::{Arc, Mutex, PoisonError};

use crate::flow::{Receiver, Sender, StageHandle};
use crate::order::{Cursor, LaneCursor, OrderIdentity};

use super::batch::Batch;
use super::config::StreamConfig;
use super::error::StreamError;
use super::skip::Undelivered;

/// The output of a lane.
pub(super) struct LaneOutput<D> {
    pub(super) batches: Receiver<Result<Batch<D>, StreamError>>,
    /// Receives the rest when the lane ends in an error.
    pub(super) undelivered: Arc<Mutex<Undelivered>>,
}

/// Takes batches from lanes in turn.
pub(super) struct Turns<D> {
    lanes: Vec<LaneOutput<D>>,
    batches_in_turn: usize,
    batches_in_round: usize,
    identity: OrderIdentity,
    /// Positions in the lanes after the last batch.
    positions: Vec<LaneCursor>,
    /// Batches of the round that were taken.
    taken: usize,
    /// Batches taken so far.
    index: u64,
    undelivered: Arc<Mutex<Undelivered>>,
    out: Sender<Result<Batch<D>, StreamError>>,
    stage: StageHandle,
}

impl<D> Turns<D> {
    pub(super) fn new(
        lanes: Vec<LaneOutput<D>>,
        config: &StreamConfig,
        identity: OrderIdentity,
        undelivered: Arc<Mutex<Undelivered>>,
        out: Sender<Result<Batch<D>, StreamError>>,
        stage: StageHandle,
    ) -> Self {
        let batches_in_round = config.lanes.batches_in_round();
        let at = |lane| config.lane(lane).resume;
        let positions: Vec<LaneCursor> = config
            .lanes
            .hosted
            .clone()
            .map(|lane| {
                at(lane).unwrap_or_else(|| LaneCursor {
                    lane,
                    ..LaneCursor::default()
                })
            })
            .collect();
        let resume = config.resume.as_ref();
        Self {
            lanes,
            batches_in_turn: config.lanes.batches_in_turn,
            batches_in_round,
            identity,
            // Another number of batches in a round may have been configured.
            taken: resume.map_or(0, |cursor| cursor.taken % batches_in_round),
            index: positions.iter().map(|lane| lane.next_batch).sum(),
            positions,
            undelivered,
            out,
            stage,
        }
    }

    /// Passes on batches until a lane ends, in an error or because the stream is dropped.
    pub(super) fn run(mut self) {
        loop {
            let turn = self.taken / self.batches_in_turn;
            let Some(result) = self.lanes[turn].batches.recv_untimed() else {
                return;
            };
            let failed = result.is_err();
            let result = match result {
                Ok(batch) => Ok(self.joined(batch, turn)),
                Err(error) => {
                    self.report_undelivered(turn);
                    Err(error)
                }
            };
            if self.out.send_blocking(result, &self.stage).is_err() || failed {
                return;
            }
        }
    }

    /// A lane's batch with its number and cursor in the stream.
    fn joined(&mut self, batch: Batch<D>, turn: usize) -> Batch<D> {
        if let Some(position) = batch.cursor.into_lane() {
            self.positions[turn] = position;
        }
        self.taken = (self.taken + 1) % self.batches_in_round;
        let index = self.index;
        self.index += 1;
        Batch {
            index,
            cursor: Cursor::in_lanes(self.identity.clone(), self.positions.clone(), self.taken),
            ..batch
        }
    }

    /// Makes what the failed lane did not deliver that of the stream.
    fn report_undelivered(&self, turn: usize) {
        let of_lane = &self.lanes[turn].undelivered;
        let of_lane = std::mem::take(&mut *of_lane.lock().unwrap_or_else(PoisonError::into_inner));
        *self
            .undelivered
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = of_lane;
    }
}
