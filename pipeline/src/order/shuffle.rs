//! The shuffle buffer: holds up to so many items, and so many bytes, and gives back a random one.

use serde::{Deserialize, Serialize};

use super::rng::{index_below, rng};

/// How much a buffer may hold: so many items, and so many bytes of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Capacity {
    /// 0 and 1 keep the order as it is.
    pub(crate) items: usize,
    /// Exceeded by at most the item that was put in last.
    pub(crate) bytes: u64,
}

/// What a buffer's next draws depend on, beside its items.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct ShuffleState {
    draws: u64,
    filling: bool,
}

/// An item taken out, and the place in the buffer it was in: whoever keeps a list of what the buffer
/// holds does the same with [`Vec::swap_remove`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Drawn<T> {
    pub(crate) item: T,
    pub(crate) slot: usize,
}

/// A seeded buffer. Which item a draw takes depends on the seed and on how many draws there were;
/// when a draw is due depends on how many items there are and what they weigh.
#[derive(Debug)]
pub(crate) struct ShuffleBuffer<T> {
    items: Vec<(T, u64)>,
    bytes: u64,
    capacity: Capacity,
    seed: u64,
    state: ShuffleState,
}

impl<T> ShuffleBuffer<T> {
    pub(crate) fn new(seed: u64, capacity: Capacity) -> Self {
        Self {
            items: Vec::new(),
            bytes: 0,
            capacity: Capacity {
                items: capacity.items.max(1),
                ..capacity
            },
            seed,
            state: ShuffleState::default(),
        }
    }

    /// Goes on from `state`, with what was in the buffer then, in its order, and each item's bytes.
    pub(crate) fn restore(&mut self, state: ShuffleState, items: Vec<(T, u64)>) {
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

    /// Puts an item in; whether it is time to draw one.
    ///
    /// A tenth of the buffer is enough to begin with: waiting for all of it would hold the first
    /// batch back. From there to its capacity every second item stays in it, as in webdataset.
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

    /// Whether it holds more bytes than it should: then it is to be drawn from until it does not.
    pub(crate) fn is_overfull(&self) -> bool {
        self.bytes > self.capacity.bytes
    }

    /// Takes a random item out.
    pub(crate) fn draw(&mut self) -> Option<Drawn<T>> {
        if self.items.is_empty() {
            return None;
        }
        let mut rng = rng(self.seed, "shuffle", self.state.draws, 0);
        self.state.draws += 1;
        let slot = index_below(&mut rng, self.items.len());
        let (item, bytes) = self.items.swap_remove(slot);
        self.bytes -= bytes;
        Some(Drawn { item, slot })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer<T>(seed: u64, items: usize, bytes: u64) -> ShuffleBuffer<T> {
        ShuffleBuffer::new(seed, Capacity { items, bytes })
    }

    /// Pushes one item that weighs `bytes` and gives back all that is due.
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
    fn everything_comes_out_once_in_another_order() {
        let out = shuffle(1, 50, 1000);
        let mut sorted = out.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_ne!(out, sorted);
        assert_eq!(out, shuffle(1, 50, 1000));
        assert_ne!(out, shuffle(2, 50, 1000));
    }

    #[test]
    fn a_buffer_of_one_keeps_the_order() {
        assert_eq!(shuffle(1, 0, 100), (0..100).collect::<Vec<_>>());
        assert_eq!(shuffle(1, 1, 100), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_draw_does_not_wait_for_a_full_buffer() {
        let mut buffer = buffer(1, 1000, u64::MAX);
        let first = (0..1000).position(|item| buffer.push(item, 1));
        assert!(first.unwrap() <= 101, "{first:?}");
    }

    #[test]
    fn bytes_bound_it_whatever_the_items() {
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
    fn a_list_kept_beside_it_restores_it_at_any_draw() {
        let run = |stop_after: usize| {
            let mut first = buffer(3, 20, 90);
            let (mut list, mut out) = (Vec::new(), Vec::new());
            let mut second: Option<ShuffleBuffer<u64>> = None;
            for n in 0..200_u64 {
                let weight = 1 + n % 13;
                let current = second.as_mut().unwrap_or(&mut first);
                list.push(n);
                let mut due = current.push(n, weight);
                while due || second.as_ref().unwrap_or(&first).is_overfull() {
                    due = false;
                    let current = second.as_mut().unwrap_or(&mut first);
                    let drawn = current.draw().unwrap();
                    assert_eq!(list.swap_remove(drawn.slot), drawn.item);
                    out.push(drawn.item);
                    if out.len() == stop_after {
                        let state = current.state();
                        let mut fresh = buffer(3, 20, 90);
                        fresh.restore(state, list.iter().map(|&n| (n, 1 + n % 13)).collect());
                        second = Some(fresh);
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
