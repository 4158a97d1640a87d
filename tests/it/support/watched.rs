//! A command that serves its page and its metrics, watched over HTTP on loopback.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, Command, Stdio};

use super::command;

/// A running command.
pub(crate) struct Watched {
    child: Child,
    said: BufReader<ChildStderr>,
    /// Where it listens, as `127.0.0.1:40123`.
    pub(crate) address: String,
}

/// What was answered.
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Status and headers, names in small letters.
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }
}

impl Watched {
    /// Starts it and waits until it has said where it listens.
    pub(crate) fn start(args: &[&str]) -> Self {
        let listen = ["-s", "metrics.listen=127.0.0.1:0"];
        let mut child = command(&[args, &listen].concat())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut watched = Self {
            said: BufReader::new(child.stderr.take().unwrap()),
            child,
            address: String::new(),
        };
        let mut all = String::new();
        while watched.address.is_empty() {
            let begin = all.len();
            assert_ne!(watched.said.read_line(&mut all).unwrap(), 0, "{all}");
            let line = all[begin..].trim_end();
            if let Some(url) = line.strip_prefix("metrics at http://") {
                watched.address = url.strip_suffix("/metrics").unwrap().to_owned();
            }
        }
        watched
    }

    /// A connection on which `path` was asked for.
    pub(crate) fn open(&self, path: &str, host: &str) -> Option<TcpStream> {
        let mut socket = TcpStream::connect(&self.address).ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).ok()?;
        Some(socket)
    }

    /// What is answered to one who came by the name `host`, unless the command has ended.
    pub(crate) fn ask(&self, path: &str, host: &str) -> Option<Answer> {
        let mut bytes = Vec::new();
        self.open(path, host)?.read_to_end(&mut bytes).ok()?;
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
        let body = bytes.split_off(end + 4);
        let head = String::from_utf8(bytes).ok()?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Answer { status, head, body })
    }

    /// What is answered, unless the command has ended.
    pub(crate) fn get(&self, path: &str) -> Option<Answer> {
        self.ask(path, &self.address)
    }

    /// Asks it to stop.
    pub(crate) fn terminate(&self) {
        let id = self.child.id().to_string();
        let kill = Command::new("kill").args(["-TERM", &id]).status().unwrap();
        assert!(kill.success());
    }

    /// Waits for its end; its exit code, and what it said on standard error.
    pub(crate) fn end(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.said.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}
