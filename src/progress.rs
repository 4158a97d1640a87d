//! Progress of a command on standard error: a bar on a terminal, plain lines elsewhere and in the log file.

use std::cell::{Cell, OnceCell, RefCell};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::pace::Pace;
use crate::print::{self, Bar};

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

/// Time after which [`Progress::later`] shows something.
const MOMENT: Duration = Duration::from_secs(2);
const WAITING_LINE_EVERY: Duration = Duration::from_secs(10);

/// A bar or plain lines. Dropping it removes the bar. While another `Progress` shows a bar, its messages are shown there.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: OnceCell<Bar>,
    options: ProgressOptions,
    pace: RefCell<Pace>,
    /// When to begin to show anything.
    shown_from: Instant,
    last_line: Cell<Option<Instant>>,
}

impl Progress {
    /// Progress that is shown at once.
    pub(crate) fn new(options: ProgressOptions) -> Self {
        let progress = Self::after(Duration::ZERO, options);
        progress.bar();
        progress
    }

    /// Progress of work that may be done in a moment: nothing is shown before.
    pub(crate) fn later(options: ProgressOptions) -> Self {
        Self::after(MOMENT, options)
    }

    fn after(delay: Duration, options: ProgressOptions) -> Self {
        Self {
            bar: OnceCell::new(),
            options,
            pace: RefCell::new(Pace::new(0, options.total)),
            shown_from: Instant::now() + delay,
            last_line: Cell::new(None),
        }
    }

    fn bar(&self) -> &Bar {
        self.bar.get_or_init(|| {
            let hidden = ProgressDrawTarget::hidden();
            let bar = ProgressBar::with_draw_target(Some(self.options.total), hidden);
            let style = ProgressStyle::with_template(self.options.template);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            print::show(bar)
        })
    }

    /// Prints a message that stays.
    pub(crate) fn say(&self, message: impl AsRef<str>) {
        print::say(message.as_ref());
    }

    /// Begins at `position`, not at 0.
    pub(crate) fn start_at(&self, position: u64) {
        self.pace.replace(Pace::new(position, self.options.total));
        if let Some(Bar::Shown(bar)) = self.bar.get() {
            bar.set_position(position);
        }
    }

    /// Shows the position reached, a message and the time left. Where there is no bar, prints `line` if the last line is old enough or
    /// the work is done. Where there is one, the log file alone gets these lines.
    pub(crate) fn update(&self, position: u64, message: &str, line: impl FnOnce() -> String) {
        self.pace.borrow_mut().advance(position);
        let now = Instant::now();
        if now < self.shown_from {
            return;
        }
        let done = position == self.options.total;
        let left = self.pace.borrow().left(now).filter(|_| !done);
        let left = left.map_or(String::new(), |left| format!(" · {} left", clock(left)));
        let line = format!("{}{left}", line());
        let due = done || self.line_is_due(now);
        if due {
            self.last_line.set(Some(now));
        }
        match self.bar() {
            Bar::Shown(bar) => {
                bar.set_position(position);
                bar.set_message(format!("{message}{left}"));
            }
            Bar::Taken(bar) => bar.set_message(line.clone()),
            Bar::None if due => return print::say(&line),
            Bar::None => {}
        }
        if due {
            print::log(&line);
        }
    }

    /// Shows work that is done between two positions. Where there is no bar, prints the message if the last line is old enough.
    pub(crate) fn between(&self, message: &str) {
        let now = Instant::now();
        match self.bar() {
            Bar::Shown(bar) | Bar::Taken(bar) => bar.set_message(message.to_owned()),
            Bar::None if self.line_is_due(now) => {
                self.last_line.set(Some(now));
                print::say(message);
            }
            Bar::None => {}
        }
    }

    fn line_is_due(&self, now: Instant) -> bool {
        let old = |at: Instant| now - at >= self.options.line_every;
        self.last_line.get().is_none_or(old)
    }
}

/// Says how a wait goes, once every ten seconds, until it is dropped.
#[derive(Debug)]
pub(crate) struct Waiting {
    _stop: mpsc::Sender<()>,
}

impl Waiting {
    /// Takes the text of each line from `line`, on a thread of its own.
    pub(crate) fn begin(line: impl Fn() -> String + Send + 'static) -> Self {
        let (stop, dropped) = mpsc::channel();
        let say = move || {
            while dropped.recv_timeout(WAITING_LINE_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
                print::say(&line());
            }
        };
        let thread = thread::Builder::new().name("waiting".to_owned());
        // A refused thread costs only the lines.
        thread.spawn(say).ok();
        Self { _stop: stop }
    }
}

/// A duration as `h:mm:ss`.
fn clock(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours}:{minutes:02}:{:02}", seconds % 60)
}

#[cfg(test)]
impl Progress {
    /// Progress that prints plain lines, for tests of its users.
    pub(crate) fn hidden() -> std::rc::Rc<Self> {
        let progress = Self::later(ProgressOptions {
            total: 0,
            template: "",
            line_every: Duration::MAX,
        });
        progress.bar.get_or_init(|| Bar::None);
        std::rc::Rc::new(progress)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        match self.bar.get() {
            Some(Bar::Shown(bar)) => print::hide(bar),
            Some(Bar::Taken(bar)) => bar.set_message(""),
            Some(Bar::None) | None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_of_short_work_is_not_shown_and_later_lines_have_the_time_left() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("log");
        print::log_to(&file).unwrap();
        let delay = Duration::from_millis(50);
        let options = ProgressOptions {
            total: 1000,
            template: "{msg}",
            line_every: Duration::ZERO,
        };
        let progress = Progress::after(delay, options);
        for step in [1, 2, 3] {
            progress.update(step, "", || format!("at {step}"));
            thread::sleep(delay);
        }
        progress.update(1000, "", || "at 1000".to_owned());
        let logged = std::fs::read_to_string(&file).unwrap();
        assert!(
            !logged.contains("at 1\n") && !logged.contains("at 1 "),
            "{logged}"
        );
        for line in [" at 2 · 0:0", " at 3 · 0:0", " at 1000\n"] {
            assert!(logged.contains(line), "{line:?}: {logged}");
        }
        assert_eq!(logged.matches(" left\n").count(), 2, "{logged}");
    }

    #[test]
    fn time_left_has_hours() {
        let clock = |seconds| super::clock(Duration::from_secs(seconds));
        assert_eq!(clock(59), "0:00:59");
        assert_eq!(clock(42 * 60 + 10), "0:42:10");
        assert_eq!(clock(100 * 3600 + 61), "100:01:01");
    }
}
