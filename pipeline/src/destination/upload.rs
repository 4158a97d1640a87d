//! The upload of one object to S3.
//!
//! Written bytes collect in a part; a full part is sent while the next part fills. An object that fits in its first
//! part is written in one request instead. The object is visible only after the upload is complete.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use super::bucket::Bucket;
use crate::net::SourceError;
use crate::s3::{ObjectPath, UploadedPart};

/// Parts of one size, before it doubles.
const PARTS_OF_A_SIZE: usize = 1000;
/// Metadata key that tells the object of an upload from an earlier object of the same name.
const MARK: &str = "coffey-upload";
/// Least ratio of a server's speed of joining parts to the slowest accepted pace of an upload.
const ASSEMBLY: usize = 64;
/// Checks for a complete object after a lost response: the server may still be joining the parts.
const CHECKS: u32 = 10;
/// Time between two checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait for an upload to be aborted.
const ABORT_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Upload {
    bucket: Arc<Bucket>,
    target: ObjectPath,
    metadata: BTreeMap<String, String>,
    buffer: Vec<u8>,
    multipart: Option<Multipart>,
}

/// An upload in parts, known to the server.
#[derive(Debug)]
struct Multipart {
    id: String,
    mark: String,
    parts: usize,
    bytes: usize,
    in_flight: JoinSet<Result<UploadedPart, SourceError>>,
    sent: Vec<UploadedPart>,
}

impl Upload {
    pub(super) fn new(bucket: Arc<Bucket>, name: &str, metadata: BTreeMap<String, String>) -> Self {
        Self {
            target: bucket.target(name),
            bucket,
            metadata,
            buffer: Vec::new(),
            multipart: None,
        }
    }

    /// Size of the next part.
    fn part_size(&self) -> usize {
        let parts = self
            .multipart
            .as_ref()
            .map_or(0, |multipart| multipart.parts);
        part_size(self.bucket.parts.bytes, parts)
    }

    pub(super) fn append(&mut self, mut content: &[u8]) -> Result<(), SourceError> {
        while !content.is_empty() {
            let size = self.part_size();
            let (now, later) = content.split_at(content.len().min(size - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            content = later;
            if self.buffer.len() == size {
                self.send_part()?;
            }
        }
        Ok(())
    }

    fn send_part(&mut self) -> Result<(), SourceError> {
        let runtime = self.bucket.runtime().clone();
        let body = Bytes::from(std::mem::take(&mut self.buffer));
        let multipart = match &mut self.multipart {
            Some(multipart) => multipart,
            None => {
                let mark = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
                let mut metadata = self.metadata.clone();
                metadata.insert(MARK.to_owned(), mark.clone());
                let (target, metadata) = (&self.target, &metadata);
                let id = runtime.block_on(
                    self.bucket
                        .retry(&target.url, 0, |s3| s3.begin(target, metadata)),
                )?;
                self.multipart.insert(Multipart {
                    id,
                    mark,
                    parts: 0,
                    bytes: 0,
                    in_flight: JoinSet::new(),
                    sent: Vec::new(),
                })
            }
        };
        while multipart.in_flight.len() >= self.bucket.parts.in_flight.max(1) {
            runtime.block_on(multipart.wait_for_part())?;
        }
        multipart.parts += 1;
        multipart.bytes += body.len();
        let number = i32::try_from(multipart.parts).unwrap_or(i32::MAX);
        let (bucket, target, id) = (
            Arc::clone(&self.bucket),
            self.target.clone(),
            multipart.id.clone(),
        );
        multipart.in_flight.spawn_on(
            async move {
                let (target, id, body) = (&target, id.as_str(), &body);
                bucket
                    .retry(&target.url, body.len(), |s3| {
                        s3.send_part(target, id, number, body.clone())
                    })
                    .await
            },
            &runtime,
        );
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<(), SourceError> {
        let runtime = self.bucket.runtime().clone();
        if self.multipart.is_none() {
            let body = Bytes::from(std::mem::take(&mut self.buffer));
            let (target, metadata) = (&self.target, &self.metadata);
            return runtime.block_on(self.bucket.retry(&target.url, body.len(), |s3| {
                s3.put(target, body.clone(), metadata)
            }));
        }
        if !self.buffer.is_empty() {
            self.send_part()?;
        }
        let Some(multipart) = &mut self.multipart else {
            return Ok(());
        };
        runtime.block_on(async {
            while !multipart.in_flight.is_empty() {
                multipart.wait_for_part().await?;
            }
            multipart.sent.sort_by_key(UploadedPart::number);
            complete(&self.bucket, &self.target, multipart).await
        })?;
        self.multipart = None;
        Ok(())
    }
}

/// Size of the part that follows `parts` others.
fn part_size(first: usize, parts: usize) -> usize {
    let doublings = (parts / PARTS_OF_A_SIZE).min(16);
    first.saturating_mul(1 << doublings)
}

impl Multipart {
    /// Waits until one more part is sent.
    async fn wait_for_part(&mut self) -> Result<(), SourceError> {
        match self.in_flight.join_next().await {
            Some(Ok(sent)) => {
                self.sent.push(sent?);
                Ok(())
            }
            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            None => Ok(()),
        }
    }
}

/// Joins the parts to an object. If the response is lost after the server has joined them, a retry finds no such upload, and
/// the object's metadata tells whether it is the object of this upload.
async fn complete(
    bucket: &Bucket,
    target: &ObjectPath,
    multipart: &Multipart,
) -> Result<(), SourceError> {
    let requests = AtomicU32::new(0);
    let completed = bucket
        .retry(&target.url, multipart.bytes / ASSEMBLY, |s3| {
            requests.fetch_add(1, Ordering::Relaxed);
            s3.complete(target, &multipart.id, &multipart.sent)
        })
        .await;
    let Err(error) = completed else {
        return Ok(());
    };
    // After one request no response was lost: the server refused.
    let checks = if requests.into_inner() <= 1 {
        1
    } else {
        CHECKS
    };
    for check in 0..checks {
        if check > 0 {
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
        let found = bucket.head_object(target).await.ok().flatten();
        if found.is_some_and(|meta| meta.metadata.get(MARK) == Some(&multipart.mark)) {
            return Ok(());
        }
    }
    Err(error)
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut multipart) = self.multipart.take() else {
            return;
        };
        let (bucket, target) = (Arc::clone(&self.bucket), self.target.clone());
        let abort = async move {
            multipart.in_flight.shutdown().await;
            let aborted =
                tokio::time::timeout(ABORT_PATIENCE, bucket.abort(&target, &multipart.id));
            if let Ok(Err(error)) = aborted.await {
                tracing::warn!(%error, "an unfinished upload is left behind; the bucket's lifecycle or the next start clears it away");
            }
        };
        let runtime = self.bucket.runtime().clone();
        match Handle::try_current() {
            Ok(_) => drop(runtime.spawn(abort)),
            Err(_) => runtime.block_on(abort),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::part_size;
    use crate::destination::PartOptions;

    #[test]
    fn upload_parts_hold_the_largest_object() {
        let first = PartOptions::default().bytes;
        let all: usize = (0..10_000).map(|parts| part_size(first, parts)).sum();
        assert!(all > 5 << 40, "{all}");
        // The parts of an ordinary checkpoint stay small.
        assert_eq!(part_size(first, 999), first);
        assert!((0..10_000).all(|parts| part_size(first, parts) <= 5 << 30));
    }
}
