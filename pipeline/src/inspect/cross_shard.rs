//! Problems of several shards together.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Problem, ProblemKind, ShardReport};

/// Finds keys that occur in several shards.
#[derive(Debug, Default)]
pub struct CrossShardCheck {
    /// The first shard of each key.
    first: HashMap<Arc<str>, usize>,
    urls: Vec<String>,
    last_key: Option<Arc<str>>,
}

impl CrossShardCheck {
    /// Compares a shard with the shards before it, and adds the problems to its report. Removes the report's keys.
    pub fn add(&mut self, report: &mut ShardReport) {
        let shard = self.urls.len();
        let keys = std::mem::take(&mut report.keys);
        for (index, key) in keys.iter().enumerate() {
            let &mut first = self.first.entry(Arc::clone(key)).or_insert(shard);
            if first == shard {
                continue;
            }
            let continues = index == 0 && self.last_key.as_ref() == Some(key);
            let (kind, what) = if continues {
                let before = &self.urls[shard - 1];
                let what = format!("may be the rest of the last sample of {before}");
                (ProblemKind::SplitSample, what)
            } else {
                let what = format!("has the key of a sample of {}", self.urls[first]);
                (ProblemKind::KeyInOtherShard, what)
            };
            report.problems.push(Problem {
                kind,
                key: key.to_string(),
                what,
            });
        }
        self.last_key = keys.last().cloned();
        self.urls.push(report.url.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_shard_finds_shared_keys_and_split_samples() {
        let mut check = CrossShardCheck::default();
        let mut found = Vec::new();
        for (url, keys) in [
            ("0.tar", ["a", "b"]),
            ("1.tar", ["b", "a"]),
            ("2.tar", ["c", "c"]),
        ] {
            let mut report = ShardReport {
                url: url.to_owned(),
                keys: keys.map(Arc::from).into(),
                ..ShardReport::default()
            };
            check.add(&mut report);
            found.push(report.problems);
        }
        assert!(found[0].is_empty() && found[2].is_empty(), "{found:?}");
        let kinds: Vec<_> = found[1].iter().map(|p| (p.kind, p.key.as_str())).collect();
        assert_eq!(
            kinds,
            [
                (ProblemKind::SplitSample, "b"),
                (ProblemKind::KeyInOtherShard, "a")
            ]
        );
        assert!(found[1][1].what.contains("0.tar"), "{found:?}");
    }
}
