//! Progress of a command on standard error: a bar on a terminal, plain lines elsewhere.

use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How a command's progress is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProgressOptions {
    /// Position at which the work is done.
    pub(crate) total: u64,
    /// Template of the bar, as indicatif's.
    pub(crate) template: &'static str,
    /// Time between two plain lines where there is no bar.
    pub(crate) line_every: Duration,
}

/// A bar or plain lines. Dropping it removes the bar.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    options: ProgressOptions,
    last_line: Cell<Option<Instant>>,
}

impl Progress {
    /// Shows a bar if standard error is a terminal.
    pub(crate) fn new(options: ProgressOptions) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let target = ProgressDrawTarget::stderr();
            let bar = ProgressBar::with_draw_target(Some(options.total), target);
            let style = ProgressStyle::with_template(options.template);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self {
            bar,
            options,
            last_line: Cell::new(None),
        }
    }

    /// Prints a message that stays.
    pub(crate) fn say(&self, message: impl AsRef<str>) {
        match &self.bar {
            Some(bar) => bar.suspend(|| errln!("{}", message.as_ref())),
            None => errln!("{}", message.as_ref()),
        }
    }

    /// Begins at `position`, not at 0.
    pub(crate) fn start_at(&self, position: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
            bar.reset_eta();
        }
    }

    /// Shows the position reached and a message. Without a bar, prints `line` if the last line is old enough or the work is
    /// done.
    pub(crate) fn update(&self, position: u64, message: &str, line: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
            bar.set_message(message.to_owned());
            return;
        }
        if position == self.options.total || self.line_is_due() {
            self.print_line(&line());
        }
    }

    /// Shows work that is done between two positions. Without a bar, prints the message if the last line is old enough.
    pub(crate) fn between(&self, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(message.to_owned());
        } else if self.line_is_due() {
            self.print_line(message);
        }
    }

    fn line_is_due(&self) -> bool {
        let due = |at: Instant| at.elapsed() >= self.options.line_every;
        self.last_line.get().is_none_or(due)
    }

    fn print_line(&self, line: &str) {
        self.last_line.set(Some(Instant::now()));
        errln!("{line}");
    }
}

#[cfg(test)]
impl Progress {
    /// Progress that prints plain lines, for tests of its users.
    pub(crate) fn hidden() -> std::rc::Rc<Self> {
        std::rc::Rc::new(Self {
            bar: None,
            options: ProgressOptions {
                total: 0,
                template: "",
                line_every: Duration::MAX,
            },
            last_line: Cell::new(None),
        })
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
