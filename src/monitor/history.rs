//! The curves of a run, from its first step on, in bounded memory.

use serde::Serialize;

use super::StepFigures;

/// Most points kept: more than a screen can show.
const MOST: usize = 2000;

/// One point for each `stride` steps. When there are too many, neighbours are joined and the stride doubles.
#[derive(Debug)]
pub(super) struct History {
    stride: u64,
    points: Vec<Point>,
    /// Steps that do not fill a point yet, joined, and their number.
    open: Option<(Point, u64)>,
}

/// Means over the steps of a point; step, learning rate and endpoint error are those of the last step.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    step: u64,
    loss: f64,
    grad_norm: f64,
    lr: f64,
    endpoint_error: Option<f64>,
}

/// Points in columns, for the page.
#[derive(Debug, Default, Serialize)]
pub(super) struct Curves {
    /// Whether these points replace all earlier ones.
    pub(super) anew: bool,
    pub(super) step: Vec<u64>,
    // Seven digits suffice for drawing.
    loss: Vec<f32>,
    grad_norm: Vec<f32>,
    lr: Vec<f32>,
    endpoint_error: Vec<Option<f32>>,
}

/// The part of a history that a page has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    stride: u64,
    points: usize,
}

impl Default for History {
    fn default() -> Self {
        Self {
            stride: 1,
            points: Vec::new(),
            open: None,
        }
    }
}

impl Point {
    /// Joins this point of `own` steps with a later point of `more` steps.
    fn join(self, own: u64, later: Self, more: u64) -> Self {
        let mean = |a: f64, b: f64| (a * own as f64 + b * more as f64) / (own + more) as f64;
        Self {
            step: later.step,
            loss: mean(self.loss, later.loss),
            grad_norm: mean(self.grad_norm, later.grad_norm),
            lr: later.lr,
            endpoint_error: later.endpoint_error.or(self.endpoint_error),
        }
    }
}

impl History {
    /// Adds the next step.
    pub(super) fn push(&mut self, figures: &StepFigures) {
        let step = Point {
            step: figures.step,
            loss: figures.loss,
            grad_norm: figures.grad_norm,
            lr: figures.lr,
            endpoint_error: figures.endpoint_error,
        };
        let (point, steps) = match self.open.take() {
            Some((open, steps)) => (open.join(steps, step, 1), steps + 1),
            None => (step, 1),
        };
        if steps < self.stride {
            self.open = Some((point, steps));
            return;
        }
        self.points.push(point);
        if self.points.len() == MOST {
            let joined = self.points.chunks_exact(2);
            self.points = joined.map(|pair| pair[0].join(1, pair[1], 1)).collect();
            self.stride *= 2;
        }
    }

    /// The points after `mark`, which is advanced.
    pub(super) fn since(&self, mark: &mut Mark) -> Curves {
        let anew = mark.stride != self.stride;
        let from = if anew { 0 } else { mark.points };
        let points = &self.points[from..];
        *mark = Mark {
            stride: self.stride,
            points: self.points.len(),
        };
        Curves {
            anew,
            step: points.iter().map(|p| p.step).collect(),
            loss: points.iter().map(|p| p.loss as f32).collect(),
            grad_norm: points.iter().map(|p| p.grad_norm as f32).collect(),
            lr: points.iter().map(|p| p.lr as f32).collect(),
            endpoint_error: points
                .iter()
                .map(|p| p.endpoint_error.map(|error| error as f32))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> StepFigures {
        StepFigures {
            step,
            loss: step as f64,
            lr: 1.0 / step as f64,
            grad_norm: 2.0,
            endpoint_error: (step == 3).then_some(0.5),
            samples: 4 * step,
        }
    }

    #[test]
    fn history_of_a_long_run_is_bounded() {
        let mut history = History::default();
        for n in 1..=100_000 {
            history.push(&step(n));
            assert!(history.points.len() < MOST);
        }
        let curves = history.since(&mut Mark::default());
        assert!(curves.anew && curves.step.len() >= MOST / 2 - 1);
        assert_eq!(
            curves.endpoint_error[0],
            Some(0.5),
            "an endpoint error is never lost"
        );
        assert!(curves.grad_norm.iter().all(|norm| *norm == 2.0));
        let stride = history.stride;
        for (i, (last, loss)) in curves.step.iter().zip(&curves.loss).enumerate() {
            // Consecutive whole strides, and the mean of each.
            assert_eq!(*last, (i as u64 + 1) * stride);
            assert_eq!(f64::from(*loss), *last as f64 - (stride - 1) as f64 / 2.0);
        }
    }

    #[test]
    fn history_sends_new_points_or_all_after_joining() {
        let mut history = History::default();
        let mut mark = Mark::default();
        assert!(history.since(&mut mark).anew);
        for n in 1..MOST as u64 {
            history.push(&step(n));
            let new = history.since(&mut mark);
            assert_eq!((new.anew, new.step), (false, vec![n]));
        }
        assert!(history.since(&mut mark).step.is_empty());
        history.push(&step(MOST as u64));
        let all = history.since(&mut mark);
        assert_eq!((all.anew, all.step.len()), (true, MOST / 2));
    }
}
