//! A channel bounded in items and in bytes, for compressed data of any size.
//!
//! One sender, one receiver. An item larger than the byte bound passes alone, so the channel never
//! blocks for good.

use std::sync::Arc;
use std::time::Instant;

use futures_lite::future;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::channel::Closed;
use super::clock::{FlowMetrics, StageHandle};

#[derive(Debug)]
struct Weighted<T> {
    item: T,
    _bytes: OwnedSemaphorePermit,
}

/// The sending half.
#[derive(Debug)]
pub(crate) struct WeightedSender<T> {
    sender: async_channel::Sender<Weighted<T>>,
    budget: Arc<Semaphore>,
    max_bytes: u32,
}

/// The receiving half. Dropping it fails the sender, also a waiting one.
#[derive(Debug)]
pub(crate) struct WeightedReceiver<T> {
    receiver: async_channel::Receiver<Weighted<T>>,
    budget: Arc<Semaphore>,
}

/// A channel of at most `max_items` items that together weigh at most `max_bytes`.
pub(crate) fn weighted_channel<T: Send + 'static>(
    metrics: &FlowMetrics,
    name: &'static str,
    max_items: usize,
    max_bytes: u32,
) -> (WeightedSender<T>, WeightedReceiver<T>) {
    let (sender, receiver) = async_channel::bounded(max_items.max(1));
    metrics.watch_channel(name, max_items.max(1), &sender);
    let budget = Arc::new(Semaphore::new(max_bytes as usize));
    let sender = WeightedSender {
        sender,
        budget: Arc::clone(&budget),
        max_bytes,
    };
    (sender, WeightedReceiver { receiver, budget })
}

impl<T: Send> WeightedSender<T> {
    /// Waits for room for `bytes` and sends; the wait counts as `stage` being blocked.
    pub(crate) async fn send(
        &self,
        item: T,
        bytes: usize,
        stage: &StageHandle,
    ) -> Result<(), Closed> {
        let weight = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.max_bytes);
        let start = Instant::now();
        let sent = async {
            let permit = Arc::clone(&self.budget).acquire_many_owned(weight).await;
            let weighted = Weighted {
                item,
                _bytes: permit.map_err(|_| Closed)?,
            };
            self.sender.send(weighted).await.map_err(|_| Closed)
        }
        .await;
        stage.add_blocked(start.elapsed());
        sent
    }

    /// As [`WeightedSender::send`], from a thread that may block.
    pub(crate) fn send_blocking(
        &self,
        item: T,
        bytes: usize,
        stage: &StageHandle,
    ) -> Result<(), Closed> {
        future::block_on(self.send(item, bytes, stage))
    }
}

impl<T: Send> WeightedReceiver<T> {
    /// Waits for an item or for `cancel`; `None` when cancelled or at the end.
    ///
    /// The wait is not counted: the caller may act for several stages.
    pub(crate) fn recv_blocking(&self, cancel: &CancellationToken) -> Option<T> {
        if let Ok(weighted) = self.receiver.try_recv() {
            return Some(weighted.item);
        }
        let received = future::block_on(cancel.run_until_cancelled(self.receiver.recv()));
        received?.ok().map(|weighted| weighted.item)
    }
}

impl<T> Drop for WeightedReceiver<T> {
    fn drop(&mut self) {
        self.receiver.close();
        self.budget.close();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stages::Stage;

    #[test]
    fn weighted_sender_waits_for_bytes() {
        let metrics = FlowMetrics::new();
        let stage = metrics.stage(Stage::Fetch);
        let (sender, receiver) = weighted_channel::<u32>(&metrics, "chunks", 100, 10);
        sender.send_blocking(1, 6, &stage).unwrap();
        let thread = std::thread::spawn(move || {
            sender.send_blocking(2, 6, &stage).unwrap();
            // Heavier than the bound: passes once the channel is empty.
            sender.send_blocking(3, 1000, &stage)
        });
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(receiver.receiver.len(), 1);
        let cancel = CancellationToken::new();
        for expected in 1..=3 {
            assert_eq!(receiver.recv_blocking(&cancel), Some(expected));
        }
        thread.join().unwrap().unwrap();
        assert_eq!(receiver.recv_blocking(&cancel), None);
    }

    #[test]
    fn weighted_sender_wakes_when_receiver_drops() {
        let metrics = FlowMetrics::new();
        let stage = metrics.stage(Stage::Fetch);
        let (sender, receiver) = weighted_channel::<u32>(&metrics, "chunks", 4, 10);
        sender.send_blocking(1, 10, &stage).unwrap();
        let thread = std::thread::spawn(move || sender.send_blocking(2, 10, &stage));
        std::thread::sleep(Duration::from_millis(10));
        drop(receiver);
        assert_eq!(thread.join().unwrap(), Err(Closed));
    }

    #[test]
    fn weighted_receiver_wakes_when_cancelled() {
        let metrics = FlowMetrics::new();
        let (sender, receiver) = weighted_channel::<u32>(&metrics, "chunks", 4, 10);
        let cancel = CancellationToken::new();
        let signal = cancel.clone();
        let thread = std::thread::spawn(move || receiver.recv_blocking(&signal));
        cancel.cancel();
        assert_eq!(thread.join().unwrap(), None);
        drop(sender);
    }
}
