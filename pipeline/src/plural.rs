//! Counts in messages.

use std::fmt::Display;

/// `count` and its noun, in the plural unless it is one.
pub fn counted<N: Display + PartialEq + From<u8>>(count: N, noun: &str) -> String {
    let ending = if count == N::from(1) { "" } else { "s" };
    format!("{count} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::counted;

    #[test]
    fn nouns_follow_their_count() {
        assert_eq!(counted(1_usize, "shard"), "1 shard");
        assert_eq!(counted(0_u64, "byte"), "0 bytes");
        assert_eq!(counted(21_u32, "attempt"), "21 attempts");
    }
}
