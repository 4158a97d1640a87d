//! An HTTP server of one object that misbehaves as it is told, request by request.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;

/// What to do with one request. Without instructions the object is served as it should be.
#[derive(Debug, Clone)]
pub enum Behaviour {
    /// An error status with an S3 error code.
    Status(u16, &'static str),
    /// Promise everything and close after so many bytes.
    CutAfter(usize),
    /// Send so many bytes, then nothing, and keep the connection.
    StallAfter(usize),
    /// Serve another version of the object, whatever was asked for.
    OtherVersion,
    /// Serve from the first byte, whatever the range.
    IgnoreRange,
}

pub struct Faulty {
    pub endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Faulty {
    pub fn start(
        runtime: &Handle,
        object: Vec<u8>,
        behaviours: impl IntoIterator<Item = Behaviour>,
    ) -> Self {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let behaviours = Arc::new(Mutex::new(behaviours.into_iter().collect::<VecDeque<_>>()));
        let object = Arc::new(object);
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(serve(
                    socket,
                    Arc::clone(&object),
                    Arc::clone(&behaviours),
                    Arc::clone(&seen),
                ));
            }
        });
        Self { endpoint, requests }
    }

    /// The requests' heads so far.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

async fn serve(
    mut socket: TcpStream,
    object: Arc<Vec<u8>>,
    behaviours: Arc<Mutex<VecDeque<Behaviour>>>,
    seen: Arc<Mutex<Vec<String>>>,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match socket.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    seen.lock().unwrap().push(head.clone());
    let behaviour = behaviours.lock().unwrap().pop_front();
    let start = head
        .lines()
        .find_map(|line| line.strip_prefix("range: bytes="))
        .map_or(0, |range| {
            range.trim_end_matches('-').parse::<usize>().unwrap()
        });
    let mut tag = "\"one\"";
    let mut start = start;
    match behaviour {
        Some(Behaviour::Status(status, code)) => {
            let body = format!("<Error><Code>{code}</Code><Message>as told</Message></Error>");
            let answer = format!(
                "HTTP/1.1 {status} X\r\ncontent-type: application/xml\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
            let _gone = socket.write_all(answer.as_bytes()).await;
            return;
        }
        Some(Behaviour::OtherVersion) => tag = "\"two\"",
        Some(Behaviour::IgnoreRange) => start = 0,
        _ => {}
    }
    let body = &object[start..];
    let status = if start > 0 {
        format!(
            "206 Partial Content\r\ncontent-range: bytes {start}-{}/{}",
            object.len() - 1,
            object.len()
        )
    } else {
        "200 OK".to_owned()
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\netag: {tag}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    if socket.write_all(answer.as_bytes()).await.is_err() {
        return;
    }
    let sent = match behaviour {
        Some(Behaviour::CutAfter(bytes) | Behaviour::StallAfter(bytes)) => {
            &body[..bytes.min(body.len())]
        }
        _ => body,
    };
    if socket.write_all(sent).await.is_err() {
        return;
    }
    let _flushed = socket.flush().await;
    if let Some(Behaviour::StallAfter(_)) = behaviour {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
}
