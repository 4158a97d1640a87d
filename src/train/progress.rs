//! What a person sees of a run: a bar on a terminal, plain lines elsewhere, both on standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::log::StepRecord;

/// Seconds between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The run's voice.
#[derive(Debug)]
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    max_steps: u64,
}

impl Progress {
    pub(super) fn new(max_steps: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(max_steps), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(
                "{spinner} [{elapsed}] {wide_bar} {pos}/{len} {msg} eta {eta}",
            );
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self {
            bar,
            last_line: None,
            max_steps,
        }
    }

    /// Something that happens once, or begins.
    pub(super) fn say(&self, message: impl AsRef<str>) {
        match &self.bar {
            Some(bar) => bar.println(message.as_ref()),
            None => errln!("{}", message.as_ref()),
        }
    }

    /// The run goes on from this step.
    pub(super) fn start_at(&self, step: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            bar.reset_eta();
        }
    }

    /// A step was made.
    pub(super) fn step(&mut self, record: &StepRecord) {
        let limit = record
            .limiting_stage
            .map(|stage| format!(" · limit: {stage}"))
            .unwrap_or_default();
        let message = format!(
            "loss {:.4} · grad {:.3} · {:.1} samples/s{limit}",
            record.loss, record.grad_norm, record.samples_per_second
        );
        if let Some(bar) = &self.bar {
            bar.set_position(record.step);
            bar.set_message(message);
        } else if record.step == self.max_steps
            || self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY)
        {
            self.last_line = Some(Instant::now());
            errln!("step {}/{} · {message}", record.step, self.max_steps);
        }
    }

    /// Takes the bar away.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
