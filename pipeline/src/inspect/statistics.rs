//! Distributions over samples: sizes, caption lengths, scores.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::json::Document;
use crate::shard::{AESTHETIC, PUNSAFE, PWATERMARK, SIMILARITY, number};

/// Bounds of buckets. A bucket includes its lower bound and excludes its upper bound.
const SIDES: &[f64] = &[
    0.0, 64.0, 128.0, 256.0, 384.0, 512.0, 768.0, 1024.0, 1536.0, 2048.0, 4096.0,
];
const RATIOS: &[f64] = &[
    0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95, 1.05, 1.25, 1.4, 1.6, 2.0, 2.5, 4.0,
];
const CHARACTERS: &[f64] = &[
    0.0, 10.0, 20.0, 40.0, 60.0, 80.0, 120.0, 160.0, 240.0, 320.0, 640.0, 1280.0,
];
const TOKENS: &[f64] = &[0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 75.0];
const PROBABILITIES: &[f64] = &[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
const SIMILARITIES: &[f64] = &[0.1, 0.15, 0.2, 0.25, 0.28, 0.3, 0.32, 0.35, 0.4, 0.5];
const AESTHETICS: &[f64] = &[3.0, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0];

/// Distribution of one quantity.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Histogram {
    /// The quantity, with its unit.
    pub quantity: &'static str,
    /// Number of values.
    pub count: u64,
    /// Samples without a value.
    pub missing: u64,
    /// Smallest value; `None` without values.
    pub min: Option<f64>,
    /// Largest value; `None` without values.
    pub max: Option<f64>,
    /// Mean; `None` without values.
    pub mean: Option<f64>,
    /// Bounds of the buckets, ascending.
    pub bounds: &'static [f64],
    /// Values in each bucket: of the first below all bounds, of the last from the last bound on.
    pub buckets: Vec<u64>,
    #[serde(skip)]
    sum: f64,
}

impl Histogram {
    fn new(quantity: &'static str, bounds: &'static [f64]) -> Self {
        Self {
            quantity,
            count: 0,
            missing: 0,
            min: None,
            max: None,
            mean: None,
            bounds,
            buckets: vec![0; bounds.len() + 1],
            sum: 0.0,
        }
    }

    /// A value that is missing or not finite counts as missing.
    fn add(&mut self, value: Option<f64>) {
        let Some(value) = value.filter(|value| value.is_finite()) else {
            self.missing += 1;
            return;
        };
        self.count += 1;
        self.sum += value;
        self.buckets[self.bounds.partition_point(|bound| *bound <= value)] += 1;
        self.min = Some(self.min.map_or(value, |min| min.min(value)));
        self.max = Some(self.max.map_or(value, |max| max.max(value)));
        self.update_mean();
    }

    fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.missing += other.missing;
        self.sum += other.sum;
        for (total, part) in self.buckets.iter_mut().zip(&other.buckets) {
            *total += part;
        }
        self.min = self.min.into_iter().chain(other.min).reduce(f64::min);
        self.max = self.max.into_iter().chain(other.max).reduce(f64::max);
        self.update_mean();
    }

    fn update_mean(&mut self) {
        #[expect(clippy::cast_precision_loss, reason = "the mean is only displayed")]
        let count = self.count as f64;
        self.mean = (self.count > 0).then(|| self.sum / count);
    }

    /// Label and number of values of each bucket that the values reach.
    pub fn rows(&self) -> impl Iterator<Item = (String, u64)> {
        let first = self.buckets.iter().position(|count| *count > 0);
        let last = self.buckets.iter().rposition(|count| *count > 0);
        let range = first
            .zip(last)
            .map_or(0..0, |(first, last)| first..last + 1);
        range.map(|index| {
            let label = match (
                index.checked_sub(1).map(|i| self.bounds[i]),
                self.bounds.get(index),
            ) {
                (Some(low), Some(high)) => format!("{low} - {high}"),
                (None, Some(high)) => format!("below {high}"),
                (Some(low), None) => format!("{low} and above"),
                (None, None) => String::new(),
            };
            (label, self.buckets[index])
        })
    }
}

/// Distributions over the samples of shards.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Statistics {
    /// Shorter side of the images that decode. Pixels.
    pub shorter_side: Histogram,
    /// Width by height of the images that decode.
    pub aspect_ratio: Histogram,
    /// Lengths of the captions. Characters.
    pub caption_chars: Histogram,
    /// Lengths of the captions, without start and end and up to the tokenizer's maximum; `None` without a tokenizer.
    pub caption_tokens: Option<Histogram>,
    /// Captions with more tokens than the tokenizer's maximum; `None` without a tokenizer.
    pub captions_cut: Option<u64>,
    /// LAION's probability of a watermark.
    pub pwatermark: Histogram,
    /// LAION's probability of unsafe content.
    pub punsafe: Histogram,
    /// CLIP similarity of image and caption.
    pub similarity: Histogram,
    /// LAION's aesthetic score.
    pub aesthetic: Histogram,
}

impl Default for Statistics {
    fn default() -> Self {
        Self {
            shorter_side: Histogram::new("shorter side, pixels", SIDES),
            aspect_ratio: Histogram::new("aspect ratio, width / height", RATIOS),
            caption_chars: Histogram::new("caption length, characters", CHARACTERS),
            caption_tokens: None,
            captions_cut: None,
            pwatermark: Histogram::new("pwatermark", PROBABILITIES),
            punsafe: Histogram::new("punsafe", PROBABILITIES),
            similarity: Histogram::new("similarity", SIMILARITIES),
            aesthetic: Histogram::new("aesthetic", AESTHETICS),
        }
    }
}

/// Number of a caption's tokens, up to a maximum, and whether it has more.
type CountTokens = dyn Fn(&str) -> (usize, bool) + Send + Sync;

/// Counts the tokens of captions.
#[derive(Clone)]
pub struct TokenCounter(Arc<CountTokens>);

impl TokenCounter {
    /// `count` returns the number of a caption's tokens that fit, and whether it has more.
    pub fn new(count: impl Fn(&str) -> (usize, bool) + Send + Sync + 'static) -> Self {
        Self(Arc::new(count))
    }
}

impl fmt::Debug for TokenCounter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenCounter")
    }
}

impl Statistics {
    /// All histograms that count something, or miss a value of every sample.
    pub fn histograms(&self) -> impl Iterator<Item = &Histogram> {
        [
            Some(&self.shorter_side),
            Some(&self.aspect_ratio),
            Some(&self.caption_chars),
            self.caption_tokens.as_ref(),
            Some(&self.pwatermark),
            Some(&self.punsafe),
            Some(&self.similarity),
            Some(&self.aesthetic),
        ]
        .into_iter()
        .flatten()
    }

    /// Adds the distributions of other shards.
    pub fn merge(&mut self, other: &Self) {
        for (total, part) in [
            (&mut self.shorter_side, &other.shorter_side),
            (&mut self.aspect_ratio, &other.aspect_ratio),
            (&mut self.caption_chars, &other.caption_chars),
            (&mut self.pwatermark, &other.pwatermark),
            (&mut self.punsafe, &other.punsafe),
            (&mut self.similarity, &other.similarity),
            (&mut self.aesthetic, &other.aesthetic),
        ] {
            total.merge(part);
        }
        if let (Some(tokens), Some(cut)) = (&other.caption_tokens, other.captions_cut) {
            self.tokens().merge(tokens);
            *self.captions_cut.get_or_insert_default() += cut;
        }
    }

    fn tokens(&mut self) -> &mut Histogram {
        self.caption_tokens
            .get_or_insert_with(|| Histogram::new("caption length, tokens", TOKENS))
    }

    /// Adds an image's size. Pixels.
    pub(super) fn add_size(&mut self, width: u32, height: u32) {
        self.shorter_side.add(Some(f64::from(width.min(height))));
        self.aspect_ratio
            .add(Some(f64::from(width) / f64::from(height)));
    }

    pub(super) fn add_caption(&mut self, caption: &str, counter: Option<&TokenCounter>) {
        #[expect(clippy::cast_precision_loss, reason = "lengths are small")]
        let length = |count: usize| Some(count as f64);
        self.caption_chars.add(length(caption.chars().count()));
        if let Some(TokenCounter(count)) = counter {
            let (tokens, cut) = count(caption);
            self.tokens().add(length(tokens));
            *self.captions_cut.get_or_insert_default() += u64::from(cut);
        }
    }

    /// Adds the scores of a sample's json.
    pub(super) fn add_scores(&mut self, json: Option<&Document>) {
        for (histogram, keys) in [
            (&mut self.pwatermark, PWATERMARK),
            (&mut self.punsafe, PUNSAFE),
            (&mut self.similarity, SIMILARITY),
            (&mut self.aesthetic, AESTHETIC),
        ] {
            histogram.add(json.and_then(|json| number(json, keys)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_on_a_bound_belong_to_the_bucket_above() {
        let mut histogram = Histogram::new("score", &[0.0, 0.5, 1.0]);
        for value in [-1.0, 0.0, 0.49, 0.5, 1.0, 7.0, f64::NAN, f64::INFINITY] {
            histogram.add(Some(value));
        }
        histogram.add(None);
        assert_eq!(histogram.buckets, [1, 2, 1, 2]);
        assert_eq!((histogram.count, histogram.missing), (6, 3));
        assert_eq!((histogram.min, histogram.max), (Some(-1.0), Some(7.0)));
        let rows: Vec<_> = histogram.rows().collect();
        let expected = [
            ("below 0", 1),
            ("0 - 0.5", 2),
            ("0.5 - 1", 1),
            ("1 and above", 2),
        ];
        assert_eq!(
            rows,
            expected.map(|(label, count)| (label.to_owned(), count))
        );
    }

    #[test]
    fn merged_histograms_equal_one_of_all_values() {
        let values = [0.1, 0.7, 0.2, 0.9, 0.3];
        let of = |values: &[f64]| {
            let mut histogram = Histogram::new("score", PROBABILITIES);
            values.iter().for_each(|value| histogram.add(Some(*value)));
            histogram
        };
        let mut merged = of(&[]);
        assert_eq!(merged.rows().count(), 0);
        merged.merge(&of(&values[..2]));
        merged.merge(&of(&values[2..]));
        let (whole, mean) = (of(&values), merged.mean.unwrap());
        assert!((mean - whole.mean.unwrap()).abs() < 1e-12);
        assert_eq!(
            (merged.buckets, merged.min, merged.max),
            (whole.buckets, whole.min, whole.max)
        );
    }
}
