//! A sum whose order depends on the number of its terms alone.

use candle_core::Result;

/// Sums terms by a balanced tree: `((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))`. Whoever holds the terms of one subtree can form its sum
/// alone, with the same rounding. The number of terms is a power of two.
///
/// Terms arrive in their order; of `n` terms at most `log2(n) + 1` are held.
#[derive(Debug)]
pub struct TreeSum<T> {
    /// Sums of 2^level terms, the largest first.
    partial: Vec<(u32, T)>,
}

impl<T> TreeSum<T> {
    /// Adds the next term. `add` gives the sum of an earlier and a later one.
    ///
    /// # Errors
    /// An error of `add`.
    pub fn push(&mut self, term: T, mut add: impl FnMut(T, T) -> Result<T>) -> Result<()> {
        let (mut level, mut sum) = (0, term);
        while let Some((_, earlier)) = self.partial.pop_if(|(held, _)| *held == level) {
            sum = add(earlier, sum)?;
            level += 1;
        }
        self.partial.push((level, sum));
        Ok(())
    }

    /// The sum; `None` without terms.
    pub fn finish(mut self) -> Option<T> {
        debug_assert!(
            self.partial.len() <= 1,
            "the number of terms is a power of two"
        );
        self.partial.pop().map(|(_, sum)| sum)
    }
}

impl<T> Default for TreeSum<T> {
    fn default() -> Self {
        Self {
            partial: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tree_sum_is_balanced() {
        let sum = |terms: std::ops::Range<u32>| {
            let mut sum = TreeSum::default();
            for term in terms {
                sum.push(term.to_string(), |a, b| Ok(format!("({a}{b})")))
                    .unwrap();
                assert!(sum.partial.len() <= 3);
            }
            sum.finish()
        };
        assert_eq!(sum(0..1).unwrap(), "0");
        assert_eq!(sum(0..4).unwrap(), "((01)(23))");
        assert_eq!(sum(0..8).unwrap(), "(((01)(23))((45)(67)))");
        assert_eq!(sum(0..0), None);
    }
}
