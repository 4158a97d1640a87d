//! The edge where text leaves the process for a person: results on standard output, messages on standard error and in the log file.
//!
//! No URL with a password or signature passes, and no character that a terminal interprets. A text never breaks a progress bar, and a
//! closed pipe is ignored.

use std::fmt::{Arguments, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coffey_pipeline::text::message;
use indicatif::{ProgressBar, ProgressDrawTarget};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};

macro_rules! out {
    ($($arg:tt)*) => {
        $crate::print::output(format_args!($($arg)*))
    };
}

macro_rules! outln {
    ($($arg:tt)*) => {
        out!("{}\n", format_args!($($arg)*))
    };
}

macro_rules! errln {
    ($($arg:tt)*) => {
        $crate::print::say(&format!($($arg)*))
    };
}

/// Outputs of the process, for all threads.
struct Printer {
    /// The bar on the terminal, which makes room for each text.
    bar: Option<ProgressBar>,
    log: Option<Log>,
    /// The first error of standard output.
    output_error: Option<io::Error>,
    /// Beginning of the messages of a [quiet](be_quiet) process; `None` for another.
    quiet: Option<String>,
}

static PRINTER: Mutex<Printer> = Mutex::new(Printer {
    bar: None,
    log: None,
    output_error: None,
    quiet: None,
});

fn printer() -> MutexGuard<'static, Printer> {
    PRINTER.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Printer {
    /// Does `print` while the bar is off the terminal.
    fn beside_bar<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    fn note_output(&mut self, printed: io::Result<()>) {
        if let Err(error) = printed {
            self.output_error.get_or_insert(error);
        }
    }

    fn to_stderr(&self, text: &str) {
        let line = format!("{text}\n");
        self.beside_bar(|| io::stderr().write_all(line.as_bytes()))
            .ok();
    }

    fn log(&mut self, text: &str) {
        let fault = self.log.as_mut().and_then(|log| log.append(text));
        if let Some(fault) = fault {
            self.to_stderr(&fault);
        }
    }
}

/// Prints a part of the result on standard output. [`finish_output`] returns the first error. JSON and TOML stay valid: only their
/// strings hold what is escaped.
pub(crate) fn output(text: Arguments<'_>) {
    let text = text.to_string();
    let mut printer = printer();
    let printed = printer.beside_bar(|| io::stdout().write_all(message(&text).as_bytes()));
    printer.note_output(printed);
}

/// Records the result of a print on standard output for [`finish_output`].
pub(crate) fn note_output(printed: io::Result<()>) {
    printer().note_output(printed);
}

/// Flushes standard output.
///
/// # Errors
/// The first error since the start of the process, other than a closed pipe.
pub(crate) fn finish_output() -> io::Result<()> {
    let flushed = io::stdout().flush();
    let mut printer = printer();
    printer.note_output(flushed);
    match printer.output_error.take() {
        Some(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// Prints a message on standard error and appends it to the log file, unless the process is [quiet](be_quiet).
pub(crate) fn say(text: &str) {
    let text = message(text);
    let mut printer = printer();
    if printer.quiet.is_none() {
        printer.to_stderr(&text);
        printer.log(&text);
    }
}

/// As [`say`], also from a quiet process: errors and warnings.
pub(crate) fn say_always(text: &str) {
    let text = message(text);
    let mut printer = printer();
    let name = printer.quiet.as_deref().unwrap_or_default();
    let text = format!("{name}{text}");
    printer.to_stderr(&text);
    printer.log(&text);
}

/// Leaves standard error and the log file to another process of the same job: from now on only errors and warnings are printed, behind
/// `name`.
pub(crate) fn be_quiet(name: String) {
    printer().quiet = Some(name);
}

/// Appends a message to the log file alone.
pub(crate) fn log(text: &str) {
    printer().log(&message(text));
}

/// Appends all messages from now on to `file` as well.
///
/// # Errors
/// When the file can't be opened.
pub(crate) fn log_to(file: &Path) -> io::Result<()> {
    // To open a named pipe would wait for its reader.
    if std::fs::metadata(file).is_ok_and(|found| found.file_type().is_fifo()) {
        return Err(io::Error::other("it is a named pipe, not a file"));
    }
    let opened = File::options().append(true).create(true).open(file)?;
    printer().log = Some(Log {
        name: file.display().to_string(),
        file: opened,
        refused: false,
    });
    Ok(())
}

/// The file of `--log-file`. Each message is one write, so that the messages of several processes are not mixed.
struct Log {
    name: String,
    file: File,
    /// Whether the newest message could not be written.
    refused: bool,
}

impl Log {
    /// Returns a warning when the file begins to refuse messages.
    fn append(&mut self, text: &str) -> Option<String> {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time)).ok();
        let mut stamped = String::new();
        for line in text.lines() {
            writeln!(stamped, "{time} {line}").ok();
        }
        let written = self.file.write_all(stamped.as_bytes());
        let before = std::mem::replace(&mut self.refused, written.is_err());
        let error = written.err().filter(|_| !before)?;
        let name = &self.name;
        Some(format!(
            "warning: --log-file {name} can't be written: {error}; messages are lost there until it can"
        ))
    }
}

/// The writer of `tracing`: each event is a message.
pub(crate) struct Events;

impl io::Write for Events {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        say_always(String::from_utf8_lossy(event).trim_end());
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Time between two draws of a bar.
const TICK: Duration = Duration::from_millis(200);

/// The progress bar of the process.
#[derive(Debug)]
pub(crate) enum Bar {
    /// This one, shown until [`hide`].
    Shown(ProgressBar),
    /// An earlier one, which is still shown.
    Taken(ProgressBar),
    /// None: standard error is no terminal, or one that can't move its cursor (`TERM` is not set or `dumb`).
    None,
}

/// Shows `bar` on a terminal that has none.
pub(crate) fn show(bar: ProgressBar) -> Bar {
    let target = ProgressDrawTarget::stderr();
    let mut printer = printer();
    if target.is_hidden() || printer.quiet.is_some() {
        return Bar::None;
    }
    if let Some(taken) = &printer.bar {
        return Bar::Taken(taken.clone());
    }
    bar.set_draw_target(target);
    bar.enable_steady_tick(TICK);
    printer.bar = Some(bar.clone());
    Bar::Shown(bar)
}

/// Removes the bar that [`show`] showed.
pub(crate) fn hide(bar: &ProgressBar) {
    let mut printer = printer();
    bar.finish_and_clear();
    printer.bar = None;
}
