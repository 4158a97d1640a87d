//! A running command whose page and metrics a test reads over HTTP on loopback.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, Command, Stdio};

use super::command;

/// A running command.
pub(crate) struct Watched {
    child: Child,
    stderr: BufReader<ChildStderr>,
    /// The address of the server, as `127.0.0.1:40123`.
    pub(crate) address: String,
}

/// An HTTP answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The status line and headers, with names in lower case.
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }
}

impl Watched {
    /// Starts a command and waits for the message with its address.
    pub(crate) fn start(args: &[impl AsRef<std::ffi::OsStr>]) -> Self {
        Self::of(command(args))
    }

    /// The same for a prepared command.
    pub(crate) fn of(mut command: Command) -> Self {
        let mut child = command
            .args(["-s", "metrics.listen=127.0.0.1:0"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut watched = Self {
            stderr: BufReader::new(child.stderr.take().unwrap()),
            child,
            address: String::new(),
        };
        let mut all = String::new();
        while watched.address.is_empty() {
            let begin = all.len();
            assert_ne!(watched.stderr.read_line(&mut all).unwrap(), 0, "{all}");
            let line = all[begin..].trim_end();
            if let Some(url) = line.strip_prefix("metrics at http://") {
                watched.address = url.strip_suffix("/metrics").unwrap().to_owned();
            }
        }
        watched
    }

    /// Opens a connection and requests `path`.
    pub(crate) fn open(&self, path: &str, host: &str) -> Option<TcpStream> {
        let mut socket = TcpStream::connect(&self.address).ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).ok()?;
        Some(socket)
    }

    /// The answer to a request with the header `host`; `None` if the command has ended.
    pub(crate) fn ask(&self, path: &str, host: &str) -> Option<Answer> {
        let mut bytes = Vec::new();
        self.open(path, host)?.read_to_end(&mut bytes).ok()?;
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
        let body = bytes.split_off(end + 4);
        let head = String::from_utf8(bytes).ok()?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Answer { status, head, body })
    }

    /// The answer to a request; `None` if the command has ended.
    pub(crate) fn get(&self, path: &str) -> Option<Answer> {
        self.ask(path, &self.address)
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        super::terminate(&self.child);
    }

    /// Waits for the end; returns the exit code and the rest of standard error.
    pub(crate) fn end(mut self) -> (Option<i32>, String) {
        let mut messages = String::new();
        self.stderr.read_to_string(&mut messages).unwrap();
        (self.child.wait().unwrap().code(), messages)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // The command may have ended and been waited for.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
