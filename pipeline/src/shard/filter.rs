//! The filter: selects samples by their json and caption, and reports why samples were rejected.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::json::Document;
use crate::plural::counted;

/// Rules for the numbers in a sample's json and for its caption. A rule that is `None` accepts all samples.
///
/// A sample without the json key of a rule is rejected with a separate reason. A score of 0.0 is a valid score.
///
/// Deserialises from the table `[data.filter]` of a configuration. The `Debug` text is part of a stream's identity
/// (`OrderIdentity`): renaming the type or a field refuses the cursors of older runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Filter {
    /// Least `original_width` and `original_height` (or `width` and `height`). Pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_size: Option<u32>,
    /// Most `pwatermark`, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_pwatermark: Option<f64>,
    /// Most `punsafe`, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_punsafe: Option<f64>,
    /// Least `similarity` of image and text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_similarity: Option<f64>,
    /// Least aesthetic score: `aesthetic`, `aesthetic_score` or `AESTHETIC_SCORE`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_aesthetic: Option<f64>,
    /// Least characters in the caption.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_caption_chars: Option<usize>,
    /// Most characters in the caption.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_caption_chars: Option<usize>,
}

/// Why a rule rejected a sample, with the rule's configuration key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rejection {
    /// The value is outside the rule.
    Rule(&'static str),
    /// The sample's json has none of the rule's keys.
    MissingKey(&'static str),
    /// The sample has no json at all.
    NoJson,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => write!(f, "filter:{rule}"),
            Self::MissingKey(rule) => write!(f, "filter:{rule}_missing"),
            Self::NoJson => f.write_str("filter:no_json"),
        }
    }
}

/// Json keys that stand for one value, in order of preference.
pub(crate) type Keys = &'static [&'static str];

const WIDTH: Keys = &["original_width", "width"];
const HEIGHT: Keys = &["original_height", "height"];
pub(crate) const PWATERMARK: Keys = &["pwatermark"];
pub(crate) const PUNSAFE: Keys = &["punsafe"];
pub(crate) const SIMILARITY: Keys = &["similarity"];
pub(crate) const AESTHETIC: Keys = &["aesthetic", "aesthetic_score", "AESTHETIC_SCORE"];

/// The first of `keys` with a number. NaN stands for a missing value, in Python's tables.
pub(crate) fn number(json: &Document, keys: Keys) -> Option<f64> {
    keys.iter().find_map(|key| match json.get(key)? {
        Value::Number(number) => number.as_f64(),
        // Json made from tables may hold numbers as text; infinity is read as text, too.
        Value::String(text) => text
            .trim()
            .parse()
            .ok()
            .filter(|number: &f64| !number.is_nan()),
        _ => None,
    })
}

impl Filter {
    /// Whether any rule reads the sample's json.
    #[must_use]
    pub fn needs_json(&self) -> bool {
        self.min_size.is_some() || self.scores().iter().any(|score| score.asked.is_some())
    }

    fn scores(&self) -> [Score; 4] {
        let score = |rule, keys, asked, at_least| Score {
            rule,
            keys,
            asked,
            at_least,
        };
        [
            score("max_pwatermark", PWATERMARK, self.max_pwatermark, false),
            score("max_punsafe", PUNSAFE, self.max_punsafe, false),
            score("min_similarity", SIMILARITY, self.min_similarity, true),
            score("min_aesthetic", AESTHETIC, self.min_aesthetic, true),
        ]
    }
}

struct Score {
    rule: &'static str,
    keys: Keys,
    asked: Option<f64>,
    at_least: bool,
}

/// A filter and its counts.
#[derive(Debug)]
pub(crate) struct FilterState {
    filter: Filter,
    /// For each rule in use, its keys and whether any sample had one of them.
    met: BTreeMap<&'static str, (Keys, bool)>,
    rejected: BTreeMap<String, u64>,
    seen: u64,
}

/// Counts of a filter, for the error of a run in which no sample passed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FilterReport {
    /// Samples checked.
    pub seen: u64,
    /// Samples skipped, by reason.
    pub rejected: BTreeMap<String, u64>,
    /// Rules whose json keys no sample had, with these keys.
    pub missing_keys: Vec<(&'static str, Vec<&'static str>)>,
    /// URL of the first shard that holds no sample, without secrets.
    pub empty_shard: Option<String>,
}

impl fmt::Display for FilterReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} seen", counted(self.seen, "sample"))?;
        for (index, (reason, count)) in self.rejected.iter().enumerate() {
            let lead = if index == 0 { "; left out: " } else { ", " };
            write!(f, "{lead}{reason} {count}")?;
        }
        if let Some(shard) = &self.empty_shard {
            write!(f, "; {shard} holds no sample")?;
        }
        for (rule, keys) in &self.missing_keys {
            write!(
                f,
                "; no sample's json has the key {} that {rule} reads",
                keys.join(" or ")
            )?;
        }
        Ok(())
    }
}

impl FilterState {
    pub(crate) fn new(filter: Filter) -> Self {
        let mut met: BTreeMap<&'static str, (Keys, bool)> = BTreeMap::new();
        if filter.min_size.is_some() {
            met.insert("min_size", (&["original_width", "width"], false));
        }
        for score in filter.scores() {
            if score.asked.is_some() {
                met.insert(score.rule, (score.keys, false));
            }
        }
        Self {
            filter,
            met,
            rejected: BTreeMap::new(),
            seen: 0,
        }
    }

    /// Checks a sample, and records which json keys it has.
    pub(crate) fn check(
        &mut self,
        json: Option<&Document>,
        caption: &str,
    ) -> Result<(), Rejection> {
        // Every rule is evaluated, also after a rejection, so that all json keys are recorded.
        let mut verdict = Ok(());
        let mut reject = |rejection| {
            if verdict.is_ok() {
                verdict = Err(rejection);
            }
        };
        if self.filter.needs_json() && json.is_none() {
            reject(Rejection::NoJson);
        }
        if let (Some(json), Some(least)) = (json, self.filter.min_size) {
            match (number(json, WIDTH), number(json, HEIGHT)) {
                (Some(width), Some(height)) => {
                    self.met
                        .entry("min_size")
                        .and_modify(|(_, met)| *met = true);
                    if width.min(height) < f64::from(least) {
                        reject(Rejection::Rule("min_size"));
                    }
                }
                _ => reject(Rejection::MissingKey("min_size")),
            }
        }
        for score in self.filter.scores() {
            let (Some(json), Some(asked)) = (json, score.asked) else {
                continue;
            };
            match number(json, score.keys) {
                Some(value) => {
                    self.met
                        .entry(score.rule)
                        .and_modify(|(_, met)| *met = true);
                    let passes = if score.at_least {
                        value >= asked
                    } else {
                        value <= asked
                    };
                    if !passes {
                        reject(Rejection::Rule(score.rule));
                    }
                }
                None => reject(Rejection::MissingKey(score.rule)),
            }
        }
        let (least, most) = (self.filter.min_caption_chars, self.filter.max_caption_chars);
        if least.is_some() || most.is_some() {
            let chars = caption.chars().count();
            if least.is_some_and(|least| chars < least) {
                reject(Rejection::Rule("min_caption_chars"));
            }
            if most.is_some_and(|most| chars > most) {
                reject(Rejection::Rule("max_caption_chars"));
            }
        }
        verdict
    }

    /// Counts one sample read.
    pub(crate) fn saw(&mut self) {
        self.seen += 1;
    }

    /// Whether `seen` samples were checked and some rule's json key has appeared in none of them.
    pub(crate) fn lacks_a_key_at(&self, seen: u64) -> bool {
        self.seen == seen && self.met.values().any(|(_, met)| !met)
    }

    /// Counts one sample skipped before or by the filter. Returns the number of samples skipped for this reason.
    pub(crate) fn count(&mut self, reason: &str) -> u64 {
        let count = self.rejected.entry(reason.to_owned()).or_default();
        *count += 1;
        *count
    }

    pub(crate) fn report(&self) -> FilterReport {
        let missing_keys = self
            .met
            .iter()
            .filter(|(_, (_, met))| !met)
            .map(|(rule, (keys, _))| (*rule, keys.to_vec()))
            .collect();
        FilterReport {
            seen: self.seen,
            rejected: self.rejected.clone(),
            missing_keys,
            empty_shard: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn document(json: &str) -> Document {
        Document::parse(json.as_bytes()).unwrap()
    }

    fn check(filter: &Filter, json: Value) -> Result<(), String> {
        FilterState::new(filter.clone())
            .check(Some(&document(&json.to_string())), "a caption")
            .map_err(|rejection| rejection.to_string())
    }

    #[test]
    fn filter_accepts_a_score_of_zero() {
        let filter = Filter {
            max_pwatermark: Some(0.5),
            min_size: Some(512),
            ..Filter::default()
        };
        let json = |watermark: Value| json!({"pwatermark": watermark, "original_width": 600, "original_height": 512});
        assert_eq!(check(&filter, json(json!(0.0))), Ok(()));
        assert_eq!(check(&filter, json(json!("0.5"))), Ok(()));
        assert_eq!(
            check(&filter, json(json!(0.51))),
            Err("filter:max_pwatermark".into())
        );
        assert_eq!(
            check(&filter, json(Value::Null)),
            Err("filter:max_pwatermark_missing".into())
        );
    }

    #[test]
    fn filter_sizes_fall_back_from_original_to_actual() {
        let filter = Filter {
            min_size: Some(512),
            ..Filter::default()
        };
        assert_eq!(check(&filter, json!({"width": 512, "height": 900})), Ok(()));
        let smaller =
            json!({"original_width": 511, "original_height": 900, "width": 512, "height": 900});
        assert_eq!(check(&filter, smaller), Err("filter:min_size".into()));
        assert_eq!(
            check(&filter, json!({"width": 512})),
            Err("filter:min_size_missing".into())
        );
        assert_eq!(
            check(&filter, json!([1])),
            Err("filter:min_size_missing".into())
        );
        let none = FilterState::new(filter).check(None, "");
        assert_eq!(none, Err(Rejection::NoJson));
    }

    #[test]
    fn filter_reads_numbers_as_python_writes_them() {
        let filter = Filter {
            min_size: Some(512),
            max_pwatermark: Some(0.5),
            ..Filter::default()
        };
        for (json, verdict) in [
            (
                r#"{"width": NaN, "height": 600, "pwatermark": 0.1}"#,
                Some("filter:min_size_missing"),
            ),
            (
                r#"{"original_width": NaN, "width": 600, "height": 600, "pwatermark": 0.1, "x": NaN}"#,
                None,
            ),
            (
                r#"{"width": 600, "height": 600, "pwatermark": NaN}"#,
                Some("filter:max_pwatermark_missing"),
            ),
            (
                r#"{"width": 600, "height": 600, "pwatermark": "nan"}"#,
                Some("filter:max_pwatermark_missing"),
            ),
            (
                r#"{"width": 600, "height": 600, "pwatermark": Infinity}"#,
                Some("filter:max_pwatermark"),
            ),
            (
                r#"{"width": 600, "height": 600, "pwatermark": -Infinity}"#,
                None,
            ),
            (
                r#"{"width": 1e400, "height": 12345678901234567890, "pwatermark": 0}"#,
                None,
            ),
            (
                r#"{"width": 1, "height": 600, "pwatermark": 0, "width": 600}"#,
                None,
            ),
            (
                "\u{feff}{\"width\": 600, \"height\": 600, \"pwatermark\": 0, \"caption\": \"\\ud83d\"}",
                None,
            ),
        ] {
            let got = FilterState::new(filter.clone()).check(Some(&document(json)), "");
            let got = got.err().map(|rejection| rejection.to_string());
            assert_eq!(got.as_deref(), verdict, "{json}");
        }
    }

    #[test]
    fn filter_measures_captions_in_characters() {
        let filter = Filter {
            min_caption_chars: Some(2),
            max_caption_chars: Some(3),
            ..Filter::default()
        };
        let mut state = FilterState::new(filter);
        assert!(!state.filter.needs_json());
        assert_eq!(state.check(None, "日本語"), Ok(()));
        assert_eq!(
            state.check(None, "é"),
            Err(Rejection::Rule("min_caption_chars"))
        );
        assert_eq!(
            state.check(None, "four"),
            Err(Rejection::Rule("max_caption_chars"))
        );
    }

    #[test]
    fn filter_report_names_missing_keys() {
        let mut state = FilterState::new(Filter {
            min_aesthetic: Some(6.0),
            max_punsafe: Some(0.1),
            ..Filter::default()
        });
        let rejection = state
            .check(Some(&document(r#"{"punsafe": 0.9}"#)), "")
            .unwrap_err();
        state.saw();
        state.count(&rejection.to_string());
        assert_eq!(
            state.report().to_string(),
            "1 sample seen; left out: filter:max_punsafe 1; no sample's json has the key aesthetic or \
             aesthetic_score or AESTHETIC_SCORE that min_aesthetic reads"
        );
    }
}
