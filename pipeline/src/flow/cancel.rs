//! One signal that ends a stream: threads and tasks wait for it beside what else they wait for.

use std::future::Future;

use futures_lite::future;

/// A cloneable flag that can be awaited. Setting it wakes every waiter, with no runtime needed.
#[derive(Debug, Clone)]
pub(crate) struct Cancel {
    // A channel nobody sends on: closing it is the signal.
    sender: async_channel::Sender<()>,
    receiver: async_channel::Receiver<()>,
}

impl Cancel {
    pub(crate) fn new() -> Self {
        let (sender, receiver) = async_channel::bounded(1);
        Self { sender, receiver }
    }

    pub(crate) fn cancel(&self) {
        self.sender.close();
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.sender.is_closed()
    }

    /// Waits for `work`, or for the signal: then `None`.
    pub(crate) async fn guard<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        future::or(async { Some(work.await) }, async {
            let _closed = self.receiver.recv().await;
            None
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiter_is_woken_from_another_thread() {
        let cancel = Cancel::new();
        let waiter = cancel.clone();
        let thread = std::thread::spawn(move || {
            future::block_on(waiter.guard(std::future::pending::<()>()))
        });
        assert!(!cancel.is_cancelled());
        cancel.cancel();
        assert_eq!(thread.join().unwrap(), None);
        assert!(cancel.is_cancelled());
    }
}
