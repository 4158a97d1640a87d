//! The edge where text leaves the process for a person: no URL with a password or signature passes, and no character that a
//! terminal interprets. Printing ignores a closed pipe: `print!`, `println!` and `eprintln!` panic when their reader has closed it.

use std::fmt::Arguments;
use std::io::{self, Stderr, Write};

use coffey_pipeline::text::message;

macro_rules! out {
    ($($arg:tt)*) => {
        $crate::print::print(std::io::stdout(), format_args!($($arg)*))
    };
}

macro_rules! outln {
    ($($arg:tt)*) => {
        out!("{}\n", format_args!($($arg)*))
    };
}

macro_rules! errln {
    ($($arg:tt)*) => {
        $crate::print::print(std::io::stderr(), format_args!("{}\n", format_args!($($arg)*)))
    };
}

/// Prints a message. JSON and TOML stay valid: only their strings hold what is escaped.
pub(crate) fn print(mut to: impl Write, text: Arguments<'_>) {
    to.write_all(message(&text.to_string()).as_bytes()).ok();
}

/// Standard error for messages that a library formats. Each write holds whole characters.
pub(crate) struct MessageWriter(Stderr);

impl MessageWriter {
    pub(crate) fn new() -> Self {
        Self(io::stderr())
    }
}

impl Write for MessageWriter {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let text_out = message(&String::from_utf8_lossy(text));
        self.0.write_all(text_out.as_bytes())?;
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
