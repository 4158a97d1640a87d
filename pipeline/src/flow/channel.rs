//! Bounded channels that count the time of a wait for the stage that waits.

use std::time::Instant;

use super::clock::{FlowMetrics, StageHandle};

/// The other end of a channel is gone: the stream is ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the channel is closed")]
pub struct Closed;

/// The sending half of a bounded channel; clones share it.
#[derive(Debug)]
pub struct Sender<T>(async_channel::Sender<T>);

/// The receiving half of a bounded channel; clones share it, each item goes to one of them.
#[derive(Debug)]
pub struct Receiver<T>(async_channel::Receiver<T>);

/// A channel holding at most `capacity` items (at least one), whose fill is reported under `name`.
#[must_use]
pub fn channel<T: Send + 'static>(
    metrics: &FlowMetrics,
    name: &'static str,
    capacity: usize,
) -> (Sender<T>, Receiver<T>) {
    let capacity = capacity.max(1);
    let (sender, receiver) = async_channel::bounded(capacity);
    metrics.watch_channel(name, capacity, &sender);
    (Sender(sender), Receiver(receiver))
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Sender<T> {
    /// Waits for room and sends; the wait counts as `stage` being blocked.
    ///
    /// # Errors
    /// [`Closed`] when no receiver is left; the item is dropped.
    pub async fn send(&self, item: T, stage: &StageHandle) -> Result<(), Closed>
    where
        T: Send,
    {
        let item = match self.0.try_send(item) {
            Ok(()) => return Ok(()),
            Err(async_channel::TrySendError::Closed(_)) => return Err(Closed),
            Err(async_channel::TrySendError::Full(item)) => item,
        };
        let start = Instant::now();
        let sent = self.0.send(item).await;
        stage.add_blocked(start.elapsed());
        sent.map_err(|_| Closed)
    }

    /// As [`Sender::send`], from a thread that may block.
    ///
    /// # Errors
    /// [`Closed`] when no receiver is left; the item is dropped.
    pub fn send_blocking(&self, item: T, stage: &StageHandle) -> Result<(), Closed> {
        let item = match self.0.try_send(item) {
            Ok(()) => return Ok(()),
            Err(async_channel::TrySendError::Closed(_)) => return Err(Closed),
            Err(async_channel::TrySendError::Full(item)) => item,
        };
        let start = Instant::now();
        let sent = self.0.send_blocking(item);
        stage.add_blocked(start.elapsed());
        sent.map_err(|_| Closed)
    }

    /// Ends the channel: receivers get the items still in it, then `None`.
    pub fn close(&self) {
        self.0.close();
    }

    pub(crate) fn is_full(&self) -> bool {
        self.0.is_full()
    }
}

impl<T> Receiver<T> {
    /// Waits for an item; the wait counts as `stage` being starved. `None`: the channel has ended.
    pub async fn recv(&self, stage: &StageHandle) -> Option<T>
    where
        T: Send,
    {
        if let Ok(item) = self.0.try_recv() {
            return Some(item);
        }
        let start = Instant::now();
        let item = self.0.recv().await;
        stage.add_starved(start.elapsed());
        item.ok()
    }

    /// As [`Receiver::recv`], from a thread that may block.
    pub fn recv_blocking(&self, stage: &StageHandle) -> Option<T> {
        if let Ok(item) = self.0.try_recv() {
            return Some(item);
        }
        let start = Instant::now();
        let item = self.0.recv_blocking();
        stage.add_starved(start.elapsed());
        item.ok()
    }

    /// Ends the channel: senders fail at once.
    pub fn close(&self) {
        self.0.close();
    }

    /// Items waiting now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no item waits now.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Receives without counting the wait: for waits of no stage, or timed by the caller.
    pub fn recv_untimed(&self) -> Option<T> {
        self.0.recv_blocking().ok()
    }

    /// As [`Receiver::recv_untimed`], for a task.
    pub async fn recv_untimed_async(&self) -> Option<T> {
        self.0.recv().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stages::Stage;

    #[test]
    fn wait_counts_for_the_stage_that_waits() {
        let metrics = FlowMetrics::new();
        let (sender, receiver) = channel::<u32>(&metrics, "test", 1);
        let producer = metrics.stage(Stage::Decode);
        let consumer = metrics.stage(Stage::Batch);
        sender.send_blocking(1, &producer).unwrap();
        let thread = std::thread::spawn(move || sender.send_blocking(2, &producer));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(receiver.recv_blocking(&consumer), Some(1));
        assert_eq!(receiver.recv_blocking(&consumer), Some(2));
        thread.join().unwrap().unwrap();
        assert_eq!(receiver.recv_blocking(&consumer), None);
        let snapshot = metrics.snapshot();
        let decode = snapshot.stage(Stage::Decode);
        assert!(decode.blocked_seconds >= 0.01, "{decode:?}");
        assert_eq!(decode.starved_seconds, 0.0);
    }

    #[test]
    fn sender_fails_without_a_receiver() {
        let metrics = FlowMetrics::new();
        let (sender, receiver) = channel::<u32>(&metrics, "test", 1);
        drop(receiver);
        let stage = metrics.stage(Stage::Fetch);
        assert_eq!(sender.send_blocking(1, &stage), Err(Closed));
    }
}
