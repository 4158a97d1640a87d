//! The shuffle buffer: holds up to so many items and gives back a random one.

use super::rng::{index_below, rng};

/// A seeded buffer. Which item a draw takes depends on the seed and on how many draws there were.
#[derive(Debug)]
pub(crate) struct ShuffleBuffer<T> {
    items: Vec<T>,
    capacity: usize,
    /// Items wanted before the first draw.
    initial: usize,
    seed: u64,
    draws: u64,
    filling: bool,
}

impl<T> ShuffleBuffer<T> {
    /// A buffer of `capacity` items; 0 and 1 keep the order as it is.
    pub(crate) fn new(seed: u64, capacity: usize) -> Self {
        let capacity = capacity.max(1);
        Self {
            items: Vec::new(),
            capacity,
            // A tenth is enough to begin with: waiting for all of it would hold the first batch back.
            initial: capacity.div_ceil(10),
            seed,
            draws: 0,
            filling: false,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// Puts an item in; gives one back when it is time to.
    ///
    /// While the buffer is below its capacity every second item stays in it, as in webdataset.
    pub(crate) fn push(&mut self, item: T) -> Option<T> {
        self.items.push(item);
        if self.items.len() < self.initial {
            return None;
        }
        if self.items.len() < self.capacity {
            self.filling = !self.filling;
            if self.filling {
                return None;
            }
        }
        self.draw()
    }

    /// Takes a random item out.
    pub(crate) fn draw(&mut self) -> Option<T> {
        if self.items.is_empty() {
            return None;
        }
        let mut rng = rng(self.seed, "shuffle", self.draws, 0);
        self.draws += 1;
        let at = index_below(&mut rng, self.items.len());
        Some(self.items.swap_remove(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shuffle(seed: u64, capacity: usize, n: u32) -> Vec<u32> {
        let mut buffer = ShuffleBuffer::new(seed, capacity);
        let mut out: Vec<u32> = (0..n).filter_map(|item| buffer.push(item)).collect();
        assert!(buffer.len() <= capacity);
        while let Some(item) = buffer.draw() {
            out.push(item);
        }
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
        let mut buffer = ShuffleBuffer::new(1, 1000);
        let first = (0..1000).position(|item| buffer.push(item).is_some());
        assert!(first.unwrap() <= 101, "{first:?}");
    }
}
