//! The shuffle buffer, limited in items and in bytes, and its mirror.

use serde::{Deserialize, Serialize};

use super::rng::{index_below, rng};

/// Limits of a buffer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Capacity {
    /// 0 and 1 keep the order as it is.
    pub(crate) items: usize,
    /// Exceeded by at most the item that was put in last.
    pub(crate) bytes: u64,
}

/// State of a buffer. With the items it decides the next draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct ShuffleState {
    draws: u64,
    filling: bool,
}

/// A drawn item, and the slot of the buffer that it was in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Drawn<T> {
    pub(crate) item: T,
    pub(crate) slot: usize,
}

/// The seeded shuffle buffer of a lane. Seed, lane and the number of earlier draws decide which item is drawn; the
/// number of items and their bytes decide when a draw is due.
#[derive(Debug)]
pub(crate) struct ShuffleBuffer<T> {
    items: Vec<(T, u64)>,
    bytes: u64,
    capacity: Capacity,
    seed: u64,
    lane: u64,
    state: ShuffleState,
}

impl<T> ShuffleBuffer<T> {
    pub(crate) fn new(seed: u64, lane: usize, capacity: Capacity) -> Self {
        Self {
            items: Vec::new(),
            bytes: 0,
            capacity: Capacity {
                items: capacity.items.max(1),
                ..capacity
            },
            seed,
            lane: lane as u64,
            state: ShuffleState::default(),
        }
    }

    /// Resumes from `state` and the buffer's contents at that state: items in the buffer's order, with their bytes.
    pub(crate) fn resume(&mut self, state: ShuffleState, items: Vec<(T, u64)>) {
        self.bytes = items.iter().map(|(_, bytes)| bytes).sum();
        self.items = items;
        self.state = state;
    }

    pub(crate) fn state(&self) -> ShuffleState {
        self.state
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Adds an item. Returns whether a draw is due.
    ///
    /// Draws begin when a tenth of the buffer is filled: waiting for all of it would delay the first
    /// batch. From there to the capacity every second push is followed by a draw, as in webdataset.
    #[must_use]
    pub(crate) fn push(&mut self, item: T, bytes: u64) -> bool {
        self.items.push((item, bytes));
        self.bytes += bytes;
        if self.items.len() < self.capacity.items.div_ceil(10) {
            return false;
        }
        if self.items.len() < self.capacity.items {
            self.state.filling = !self.state.filling;
            return !self.state.filling;
        }
        true
    }

    /// Whether the buffer exceeds its bytes: the caller then draws until it does not.
    pub(crate) fn is_overfull(&self) -> bool {
        self.bytes > self.capacity.bytes
    }

    /// Removes a random item, by [`Vec::swap_remove`].
    pub(crate) fn draw(&mut self) -> Option<Drawn<T>> {
        if self.items.is_empty() {
            return None;
        }
        let mut rng = rng(self.seed, "shuffle", self.state.draws, self.lane);
        self.state.draws += 1;
        let slot = index_below(&mut rng, self.items.len());
        let (item, bytes) = self.items.swap_remove(slot);
        self.bytes -= bytes;
        Some(Drawn { item, slot })
    }
}

/// Contents of a [`ShuffleBuffer`] in another thread, replayed from the buffer's pushes and draws.
#[derive(Debug, Clone)]
pub(crate) struct BufferMirror<T> {
    items: Vec<T>,
}

impl<T> BufferMirror<T> {
    /// A mirror of a buffer that holds `items`, in the buffer's order.
    pub(crate) fn new(items: Vec<T>) -> Self {
        Self { items }
    }

    /// Replays the pushes since the draw before, then the draw from `slot`. Returns the drawn item.
    pub(crate) fn replay(&mut self, pushed: Vec<T>, slot: usize) -> T {
        self.items.extend(pushed);
        self.items.swap_remove(slot)
    }

    /// Contents of the buffer after the last replayed draw, in the buffer's order.
    pub(crate) fn items(&self) -> &[T] {
        &self.items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer<T>(seed: u64, items: usize, bytes: u64) -> ShuffleBuffer<T> {
        ShuffleBuffer::new(seed, 0, Capacity { items, bytes })
    }

    /// Pushes one item of `bytes` bytes and returns all due draws.
    fn pass<T>(buffer: &mut ShuffleBuffer<T>, item: T, bytes: u64) -> Vec<T> {
        let mut out = Vec::new();
        if buffer.push(item, bytes) {
            out.extend(buffer.draw().map(|drawn| drawn.item));
        }
        while buffer.is_overfull() {
            out.extend(buffer.draw().map(|drawn| drawn.item));
        }
        out
    }

    fn shuffle(seed: u64, capacity: usize, n: u32) -> Vec<u32> {
        let mut buffer = buffer(seed, capacity, u64::MAX);
        let mut out: Vec<u32> = (0..n).flat_map(|item| pass(&mut buffer, item, 1)).collect();
        assert!(buffer.items.len() < capacity.max(1));
        while let Some(drawn) = buffer.draw() {
            out.push(drawn.item);
        }
        assert!(buffer.is_empty() && buffer.bytes == 0);
        out
    }

    #[test]
    fn shuffle_gives_every_item_once() {
        let out = shuffle(1, 50, 1000);
        let mut sorted = out.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_ne!(out, sorted);
        assert_eq!(out, shuffle(1, 50, 1000));
        assert_ne!(out, shuffle(2, 50, 1000));
    }

    #[test]
    fn shuffle_buffer_of_one_keeps_the_order() {
        assert_eq!(shuffle(1, 0, 100), (0..100).collect::<Vec<_>>());
        assert_eq!(shuffle(1, 1, 100), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn shuffle_draws_before_the_buffer_is_full() {
        let mut buffer = buffer(1, 1000, u64::MAX);
        let first = (0..1000).position(|item| buffer.push(item, 1));
        assert!(first.unwrap() <= 101, "{first:?}");
    }

    #[test]
    fn shuffle_buffer_keeps_its_limit_of_bytes() {
        let mut buffer = buffer(1, 1000, 100);
        let weights = [10, 60, 1, 200, 30, 30, 30, 30, 5];
        let mut out = Vec::new();
        for n in 0..900 {
            out.extend(pass(&mut buffer, n, weights[n % weights.len()]));
            assert!(buffer.bytes <= 100);
        }
        while let Some(drawn) = buffer.draw() {
            out.push(drawn.item);
        }
        out.sort_unstable();
        assert_eq!(out, (0..900).collect::<Vec<_>>());
    }

    #[test]
    fn buffer_mirror_resumes_the_buffer_at_any_draw() {
        let run = |stop_after: usize| {
            let mut current = buffer(3, 20, 90);
            let (mut mirror, mut pushed) = (BufferMirror::new(Vec::new()), Vec::new());
            let mut out = Vec::new();
            for n in 0..200_u64 {
                pushed.push(n);
                let mut due = current.push(n, 1 + n % 13);
                while due || current.is_overfull() {
                    due = false;
                    let drawn = current.draw().unwrap();
                    let replayed = mirror.replay(std::mem::take(&mut pushed), drawn.slot);
                    assert_eq!(replayed, drawn.item);
                    out.push(drawn.item);
                    if out.len() == stop_after {
                        let items = mirror.items().iter().map(|&n| (n, 1 + n % 13));
                        let mut resumed = buffer(3, 20, 90);
                        resumed.resume(current.state(), items.collect());
                        current = resumed;
                    }
                }
            }
            out
        };
        let whole = run(usize::MAX);
        for stop_after in 1..whole.len() {
            assert_eq!(run(stop_after), whole, "{stop_after}");
        }
    }
}
