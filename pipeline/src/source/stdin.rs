//! Standard input as a shard.

use std::io::{self, Read};

use async_channel::{Receiver, bounded};
use bytes::Bytes;

use crate::net::SourceError;

const CHUNK_BYTES: usize = 256 << 10;
/// Chunks read ahead.
const CHUNKS: usize = 4;

/// Standard input being read, on a thread of its own: a read can neither be awaited nor interrupted,
/// and must not keep the process from ending.
#[derive(Debug)]
pub(crate) struct StdinReader(Receiver<io::Result<Bytes>>);

impl StdinReader {
    /// Starts to read `input` to its end, or until the reader is dropped.
    pub(crate) fn start(mut input: impl Read + Send + 'static) -> Result<Self, SourceError> {
        let (sender, receiver) = bounded(CHUNKS);
        let read = move || {
            loop {
                let mut chunk = vec![0; CHUNK_BYTES];
                let read = match input.read(&mut chunk) {
                    Ok(0) => return,
                    Ok(read) => {
                        chunk.truncate(read);
                        Ok(Bytes::from(chunk))
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => Err(error),
                };
                let failed = read.is_err();
                if sender.send_blocking(read).is_err() || failed {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("stdin".to_owned())
            .spawn(read)
            .map_err(|error| failed(&error))?;
        Ok(Self(receiver))
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        match self.0.recv().await {
            Ok(Ok(chunk)) => Ok(Some(chunk)),
            Ok(Err(error)) => Err(failed(&error)),
            Err(_closed) => Ok(None),
        }
    }
}

fn failed(error: &io::Error) -> SourceError {
    SourceError::File {
        url: "-".to_owned(),
        cause: format!("standard input can't be read: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    /// Endless input that counts the bytes read.
    struct Counting(Arc<AtomicUsize>);

    impl Read for Counting {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.fetch_add(buffer.len(), Ordering::SeqCst);
            buffer.fill(7);
            Ok(buffer.len())
        }
    }

    #[tokio::test]
    async fn stdin_read_ahead_is_bounded() {
        let taken = Arc::new(AtomicUsize::new(0));
        let mut reader = StdinReader::start(Counting(Arc::clone(&taken))).unwrap();
        assert_eq!(reader.next().await.unwrap().unwrap().len(), CHUNK_BYTES);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let ahead = taken.load(Ordering::SeqCst) / CHUNK_BYTES;
        assert!(ahead <= CHUNKS + 2, "{ahead} chunks");
    }

    #[tokio::test]
    async fn stdin_ends_and_fails_as_its_input() {
        let mut reader = StdinReader::start(&b"ab"[..]).unwrap();
        assert_eq!(reader.next().await.unwrap().unwrap(), "ab");
        assert_eq!(reader.next().await.unwrap(), None);
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("gone"))
            }
        }
        let mut reader = StdinReader::start(Failing).unwrap();
        let error = reader.next().await.unwrap_err().to_string();
        assert_eq!(error, "-: standard input can't be read: gone");
    }
}
