//! One object on its way to S3.
//!
//! What is written collects in a part; a full part is sent while the next one fills. An object that ends within its first
//! part is put in one request instead. Until the upload is completed nothing of it is to be seen.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use super::bucket::Bucket;
use crate::source::SourceError;
use crate::source::s3::{Sent, Target};

/// Parts of one size, before it doubles.
const PARTS_OF_A_SIZE: usize = 1000;
/// Metadata that tells an upload's object from one that stood there before.
const MARK: &str = "coffey-upload";
/// How much faster than it takes parts a server puts them together, at the least: it is waited for so long.
const ASSEMBLY: usize = 64;
/// How often, and after what time, an object is looked for whose last answer was lost: a server may still be putting it together.
const LOOKS: u32 = 10;
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);
/// Longest wait for an upload to be given up.
const ABORT_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Upload {
    bucket: Arc<Bucket>,
    target: Target,
    metadata: BTreeMap<String, String>,
    buffer: Vec<u8>,
    begun: Option<Begun>,
}

/// An upload in parts that the server knows of.
#[derive(Debug)]
struct Begun {
    id: String,
    mark: String,
    parts: usize,
    bytes: usize,
    under_way: JoinSet<Result<Sent, SourceError>>,
    sent: Vec<Sent>,
}

impl Upload {
    pub(super) fn new(bucket: Arc<Bucket>, name: &str, metadata: BTreeMap<String, String>) -> Self {
        Self {
            target: bucket.target(name),
            bucket,
            metadata,
            buffer: Vec::new(),
            begun: None,
        }
    }

    /// Size of the next part.
    fn part_size(&self) -> usize {
        let parts = self.begun.as_ref().map_or(0, |begun| begun.parts);
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
        let begun = match &mut self.begun {
            Some(begun) => begun,
            None => {
                let mark = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
                let mut metadata = self.metadata.clone();
                metadata.insert(MARK.to_owned(), mark.clone());
                let (target, metadata) = (&self.target, &metadata);
                let id = runtime.block_on(
                    self.bucket
                        .repeat(&target.url, 0, |s3| s3.begin(target, metadata)),
                )?;
                self.begun.insert(Begun {
                    id,
                    mark,
                    parts: 0,
                    bytes: 0,
                    under_way: JoinSet::new(),
                    sent: Vec::new(),
                })
            }
        };
        while begun.under_way.len() >= self.bucket.parts.in_flight.max(1) {
            runtime.block_on(begun.one_sent())?;
        }
        begun.parts += 1;
        begun.bytes += body.len();
        let number = i32::try_from(begun.parts).unwrap_or(i32::MAX);
        let (bucket, target, id) = (
            Arc::clone(&self.bucket),
            self.target.clone(),
            begun.id.clone(),
        );
        begun.under_way.spawn_on(
            async move {
                let (target, id, body) = (&target, id.as_str(), &body);
                bucket
                    .repeat(&target.url, body.len(), |s3| {
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
        if self.begun.is_none() {
            let body = Bytes::from(std::mem::take(&mut self.buffer));
            let (target, metadata) = (&self.target, &self.metadata);
            return runtime.block_on(self.bucket.repeat(&target.url, body.len(), |s3| {
                s3.put(target, body.clone(), metadata)
            }));
        }
        if !self.buffer.is_empty() {
            self.send_part()?;
        }
        let Some(begun) = &mut self.begun else {
            return Ok(());
        };
        runtime.block_on(async {
            while !begun.under_way.is_empty() {
                begun.one_sent().await?;
            }
            begun.sent.sort_by_key(Sent::number);
            complete(&self.bucket, &self.target, begun).await
        })?;
        self.begun = None;
        Ok(())
    }
}

/// Size of the part that follows `parts` others.
fn part_size(first: usize, parts: usize) -> usize {
    let doublings = (parts / PARTS_OF_A_SIZE).min(16);
    first.saturating_mul(1 << doublings)
}

impl Begun {
    /// Waits until one more part is sent.
    async fn one_sent(&mut self) -> Result<(), SourceError> {
        match self.under_way.join_next().await {
            Some(Ok(sent)) => {
                self.sent.push(sent?);
                Ok(())
            }
            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            None => Ok(()),
        }
    }
}

/// Makes an object of the parts. An answer may be lost after the server has done it; asked again, it does not know the upload
/// any more, and the object says whose it is.
async fn complete(bucket: &Bucket, target: &Target, begun: &Begun) -> Result<(), SourceError> {
    let asked = AtomicU32::new(0);
    let completed = bucket
        .repeat(&target.url, begun.bytes / ASSEMBLY, |s3| {
            asked.fetch_add(1, Ordering::Relaxed);
            s3.complete(target, &begun.id, &begun.sent)
        })
        .await;
    let Err(error) = completed else {
        return Ok(());
    };
    let looks = match asked.into_inner() {
        0 | 1 => 1, // what it was asked once it has refused
        _ => LOOKS,
    };
    for look in 0..looks {
        if look > 0 {
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        let found = bucket.head(target).await.ok().flatten();
        if found.is_some_and(|facts| facts.metadata.get(MARK) == Some(&begun.mark)) {
            return Ok(());
        }
    }
    Err(error)
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut begun) = self.begun.take() else {
            return;
        };
        let (bucket, target) = (Arc::clone(&self.bucket), self.target.clone());
        let abort = async move {
            begun.under_way.shutdown().await;
            let aborted = tokio::time::timeout(ABORT_PATIENCE, bucket.abort(&target, &begun.id));
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
    fn ten_thousand_parts_hold_the_largest_object() {
        let first = PartOptions::default().bytes;
        let all: usize = (0..10_000).map(|parts| part_size(first, parts)).sum();
        assert!(all > 5 << 40, "{all}");
        // And an ordinary checkpoint is cut small.
        assert_eq!(part_size(first, 999), first);
        assert!((0..10_000).all(|parts| part_size(first, parts) <= 5 << 30));
    }
}
