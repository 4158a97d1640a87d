//! The training state: everything a run needs to continue as if it had never stopped.

use candle_core::Tensor;
use coffey_pipeline::order::Cursor;

use super::optimizer::AdamW;
use crate::adaptation::Adaptation;

/// The state of a run after a step.
#[derive(Debug)]
pub struct TrainState {
    /// Steps made.
    pub step: u64,
    /// Samples trained on.
    pub samples: u64,
    /// The student: its trained variables and their moving average.
    pub student: Box<dyn Adaptation>,
    /// The optimiser with its moments and its loss scale.
    pub optimizer: AdamW,
    /// Position in the stream after the last batch; `None` before the first step.
    pub cursor: Option<Cursor>,
}

impl TrainState {
    /// The state before the first step.
    pub fn new(student: Box<dyn Adaptation>, optimizer: AdamW) -> Self {
        Self {
            step: 0,
            samples: 0,
            student,
            optimizer,
            cursor: None,
        }
    }

    /// Size of the tensors of a checkpoint. Bytes.
    pub(super) fn checkpoint_bytes(&self) -> u64 {
        let size = |tensor: &Tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        let student = [Some(self.student.params()), self.student.target_params()];
        let student = student.into_iter().flatten();
        let student = student.flat_map(|params| params.iter().map(|(_, var)| size(var)));
        let optimizer = self.optimizer.state();
        student.sum::<u64>() + optimizer.values().map(size).sum::<u64>()
    }
}
