//! Inspection: a report on the content of a shard. Reads the whole shard and decodes every image.
//!
//! Reports on one shard at a time, and with [`CrossShardCheck`] on several. Never changes a shard, and never decides
//! which samples a stream uses.

mod cross_shard;
mod image_checks;
mod latents;
mod statistics;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use serde::Serialize;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::flow::FlowMetrics;
use crate::format::latents::{JSON, LATENT, POOLED, PROMPT_EMBEDS};
use crate::image::{DecodeError, ImageOptions, decode};
use crate::json::Document;
use crate::plural::counted;
use crate::shard::{HeldMembers, MAX_CAPTION_BYTES, PassedOver, PassedOverKind, Sample, ShardUrl};
use crate::source::Sources;
use crate::stages::Stage;
use crate::stream::{NonSample, OpenShard, ReaderContext, ShardEvent, StreamError};

pub use cross_shard::CrossShardCheck;
pub use latents::{ChannelStats, LatentReport};
pub use statistics::{Histogram, Statistics, TokenCounter};

/// Most extensions that a report counts by name.
const MOST_EXTENSIONS: usize = 1000;
/// The name of all other extensions in a report.
const OTHER_EXTENSIONS: &str = "other extensions";

/// The content of a shard, and its problems.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ShardReport {
    /// The shard's URL, without secrets.
    pub url: String,
    /// The shard's size.
    pub bytes: u64,
    /// The shard's SHA-256, hexadecimal.
    pub sha256: String,
    /// Number of samples.
    pub samples: u64,
    /// Members by extension.
    pub members: BTreeMap<String, u64>,
    /// Images that decode, by the format of their content.
    pub formats: BTreeMap<String, u64>,
    /// Widths of the images that decode. Pixels.
    pub width: Spread,
    /// Heights of the images that decode. Pixels.
    pub height: Spread,
    /// Lengths of the captions. Characters.
    pub caption_chars: Spread,
    /// Distributions, if they were asked for.
    #[serde(skip)]
    pub statistics: Option<Statistics>,
    /// Arrays of a latent shard.
    pub latents: Option<LatentReport>,
    /// Samples without an image.
    pub missing_images: u64,
    /// Samples without a caption.
    pub missing_captions: u64,
    /// Images that can't be decoded or are too large.
    pub undecodable: u64,
    /// Samples with the key of an earlier sample.
    pub duplicate_keys: u64,
    /// Members that belong to no sample, by kind.
    pub passed_over: BTreeMap<&'static str, u64>,
    /// Fault of the tar, if it is truncated or damaged.
    pub broken: Option<String>,
    /// All problems: of samples in the shard's order, then of other members, then of several shards
    /// together.
    pub problems: Vec<Problem>,
    /// The samples' keys, in order.
    #[serde(skip)]
    pub keys: Vec<Arc<str>>,
}

/// Range and mean of a number.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Spread {
    /// Number of values.
    pub count: u64,
    /// Smallest value.
    pub min: u64,
    /// Largest value.
    pub max: u64,
    /// Mean; 0 without values.
    pub mean: f64,
    #[serde(skip)]
    sum: u64,
}

/// A problem of one sample or member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Kind of the problem.
    pub kind: ProblemKind,
    /// The sample's key, or the member's path; empty for the whole shard.
    pub key: String,
    /// Description of the problem.
    pub what: String,
}

/// Kinds of problems. With the first six a stream skips the sample, for a reason of the same name. With `Link`,
/// `Special` and `TrailingData` a part of the shard is not read. Samples with the other problems are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// No image under the keys looked for.
    NoImage,
    /// No caption under the keys looked for.
    NoCaption,
    /// The caption has too many bytes.
    CaptionTooLong,
    /// The json does not parse; skipped only if a filter needs it.
    BadJson,
    /// The image, the json or the sample has too many bytes, the image too many pixels, or the sample too many members.
    TooLarge,
    /// The image can't be decoded.
    DecodeError,
    /// The member is a link; links are never followed.
    Link,
    /// The member is a device, a pipe or a sparse file.
    Special,
    /// Data follows the end of the archive, as in two joined tars.
    TrailingData,
    /// An earlier sample of the shard has this key.
    DuplicateKey,
    /// A sample of another shard has this key.
    KeyInOtherShard,
    /// The shard before ended with this key: the sample may have been cut in two.
    SplitSample,
    /// The name in the tar is not UTF-8.
    UnreadableName,
    /// The caption is not UTF-8.
    CaptionNotUtf8,
    /// The caption consists of white space only.
    EmptyCaption,
    /// The extension is that of another image format.
    WrongExtension,
    /// The image has several frames; the first is used.
    Animated,
    /// The image has 16 bits per channel; 8 are kept.
    SixteenBit,
    /// The image is smaller than the resolution, and will be enlarged.
    BelowResolution,
    /// An array of latents or embeddings is damaged, or of another type or shape.
    BadArray,
    /// Latents or embeddings hold NaN or infinity.
    NotFinite,
    /// The manifest of the latent shards disagrees with the shard.
    OtherThanManifest,
}

impl ProblemKind {
    /// The name in JSON and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoImage => "no_image",
            Self::NoCaption => "no_caption",
            Self::CaptionTooLong => "caption_too_long",
            Self::BadJson => "bad_json",
            Self::TooLarge => "too_large",
            Self::DecodeError => "decode_error",
            Self::Link => "link",
            Self::Special => "special",
            Self::TrailingData => "trailing_data",
            Self::DuplicateKey => "duplicate_key",
            Self::KeyInOtherShard => "key_in_other_shard",
            Self::SplitSample => "split_sample",
            Self::UnreadableName => "unreadable_name",
            Self::CaptionNotUtf8 => "caption_not_utf8",
            Self::EmptyCaption => "empty_caption",
            Self::WrongExtension => "wrong_extension",
            Self::Animated => "animated",
            Self::SixteenBit => "sixteen_bit",
            Self::BelowResolution => "below_resolution",
            Self::BadArray => "bad_array",
            Self::NotFinite => "not_finite",
            Self::OtherThanManifest => "other_than_manifest",
        }
    }
}

/// Options of the inspection.
#[derive(Debug, Clone)]
pub struct InspectOptions {
    /// Extensions of images, in order of preference.
    pub image_keys: Vec<String>,
    /// Extensions of captions, in order of preference.
    pub caption_keys: Vec<String>,
    /// Shortest side that is no problem; `None` for any. Pixels.
    pub resolution: Option<u32>,
    /// Whether to make [`ShardReport::statistics`].
    pub statistics: bool,
    /// Counter of the captions' tokens, for the statistics.
    pub tokens: Option<TokenCounter>,
}

impl InspectOptions {
    /// The members that are read.
    fn held_members(&self) -> HeldMembers {
        let most = ImageOptions::default().max_bytes;
        HeldMembers::of_images(&self.image_keys, &self.caption_keys, most)
            .with([LATENT, PROMPT_EMBEDS, POOLED], most)
    }
}

impl Spread {
    fn add(&mut self, value: u64) {
        self.min = if self.count == 0 {
            value
        } else {
            self.min.min(value)
        };
        self.max = self.max.max(value);
        self.count += 1;
        self.sum += value;
        #[expect(clippy::cast_precision_loss, reason = "the mean is only displayed")]
        let mean = self.sum as f64 / self.count as f64;
        self.mean = mean;
    }
}

/// Reads a shard to its end and reports on it.
///
/// Needs a tokio runtime. The report lists the problems of samples. `metrics` counts the samples while they are read, as items of
/// [`Stage::Untar`].
///
/// # Errors
/// [`StreamError`] if the shard can't be read, or isn't a tar.
pub async fn shard(
    sources: &Sources,
    url: &ShardUrl,
    options: &InspectOptions,
    metrics: &FlowMetrics,
) -> Result<ShardReport, StreamError> {
    let context = ReaderContext {
        sources: sources.clone(),
        metrics: metrics.clone(),
        runtime: Handle::current(),
        held: options.held_members(),
        inspects: true,
    };
    let inspector = Inspector {
        options: options.clone(),
        keys: HashSet::new(),
        non_samples: Vec::new(),
        report: ShardReport {
            url: url.to_string(),
            statistics: options.statistics.then(Statistics::default),
            ..ShardReport::default()
        },
    };
    let url = url.clone();
    // Stops the thread if the caller drops the future.
    let guard = CancelOnDrop(CancellationToken::new());
    let cancel = guard.0.clone();
    let work = move || {
        let open =
            OpenShard::start(&context, &url, None).map_err(|error| StreamError::threads(&error))?;
        inspector.read(&open, &cancel)
    };
    let report = tokio::task::spawn_blocking(work).await;
    drop(guard);
    report.unwrap_or_else(|error| {
        Err(StreamError::Panicked {
            stage: Stage::Decode,
            message: error.to_string(),
        })
    })
}

struct CancelOnDrop(CancellationToken);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

struct Inspector {
    options: InspectOptions,
    keys: HashSet<Arc<str>>,
    /// Problems of members that belong to no sample, listed last.
    non_samples: Vec<Problem>,
    report: ShardReport,
}

impl Inspector {
    fn read(
        mut self,
        open: &OpenShard,
        cancel: &CancellationToken,
    ) -> Result<ShardReport, StreamError> {
        while let Some(event) = open.next(cancel) {
            match event {
                ShardEvent::Sample(sample) => self.sample(&sample),
                ShardEvent::NonSample(NonSample::Member(member)) => self.passed_over(&member),
                ShardEvent::NonSample(NonSample::Trailing(bytes)) => {
                    let bytes = counted(bytes, "byte");
                    let what = format!("not read after the end of the archive: {bytes}");
                    self.non_sample(ProblemKind::TrailingData, "", what);
                }
                ShardEvent::End { broken } => {
                    self.report.broken = broken;
                    break;
                }
                ShardEvent::Failed(error) => return Err(error),
            }
        }
        self.report.bytes = open.size();
        self.report.sha256 = open.sha256();
        self.report.problems.append(&mut self.non_samples);
        Ok(self.report)
    }

    fn non_sample(&mut self, kind: ProblemKind, path: &str, what: impl Into<String>) {
        self.non_samples.push(Problem {
            kind,
            key: path.to_owned(),
            what: what.into(),
        });
    }

    fn passed_over(&mut self, PassedOver { path, kind }: &PassedOver) {
        let name = match kind {
            PassedOverKind::Folder => "folder",
            PassedOverKind::Name => "file without an extension, or hidden",
            PassedOverKind::LongPath => "file with a path over 4096 bytes",
            PassedOverKind::Link => {
                self.non_sample(ProblemKind::Link, path, "is a link, and not followed");
                "link"
            }
            PassedOverKind::Special => {
                self.non_sample(ProblemKind::Special, path, "is no plain file, and not read");
                "special file"
            }
        };
        *self.report.passed_over.entry(name).or_default() += 1;
    }

    fn sample(&mut self, sample: &Sample) {
        self.report.samples += 1;
        self.report.keys.push(sample.key.clone());
        self.count_members(sample);
        if !self.keys.insert(sample.key.clone()) {
            self.report.duplicate_keys += 1;
            let what = "has the key of an earlier sample";
            self.problem(ProblemKind::DuplicateKey, &sample.key, what);
        }
        // Replaces the bytes of a name that are not UTF-8.
        if sample.key.contains(char::REPLACEMENT_CHARACTER) {
            let what = "has a name that is not UTF-8; its bytes are replaced";
            self.problem(ProblemKind::UnreadableName, &sample.key, what);
        }
        if let Some(excess) = sample.excess {
            self.problem(ProblemKind::TooLarge, &sample.key, excess.to_string());
            return;
        }
        if sample.members.contains_key(LATENT) {
            self.latents(sample);
        } else {
            self.image(sample);
        }
        self.caption(sample);
        if let Some(bytes) = sample.oversized.get(JSON) {
            let what = format!("json is too large ({})", counted(*bytes, "byte"));
            self.problem(ProblemKind::TooLarge, &sample.key, what);
        }
        let json = sample.members.get(JSON).map(|raw| Document::parse(raw));
        if let Some(statistics) = &mut self.report.statistics {
            let json = json.as_ref().and_then(|json| json.as_ref().ok());
            statistics.add_scores(json);
        }
        if let Some(Err(error)) = json {
            let what = format!("json does not parse: {error}");
            self.problem(ProblemKind::BadJson, &sample.key, what);
        }
    }

    fn count_members(&mut self, sample: &Sample) {
        let members = &mut self.report.members;
        for extension in sample.extensions() {
            let is_listed = members.len() < MOST_EXTENSIONS || members.contains_key(extension);
            let name = if is_listed {
                extension
            } else {
                OTHER_EXTENSIONS
            };
            *members.entry(name.to_owned()).or_default() += 1;
        }
    }

    fn caption(&mut self, sample: &Sample) {
        let keys = &self.options.caption_keys;
        let oversized = keys
            .iter()
            .find_map(|key| sample.oversized.get_key_value(key));
        if let (None, Some((extension, bytes))) = (sample.pick(keys), oversized) {
            let what = format!(
                "{extension} is too long ({}, at most {MAX_CAPTION_BYTES})",
                counted(*bytes, "byte")
            );
            self.problem(ProblemKind::CaptionTooLong, &sample.key, what);
            return;
        }
        let Some((extension, caption)) = sample.pick(&self.options.caption_keys) else {
            self.report.missing_captions += 1;
            self.problem(ProblemKind::NoCaption, &sample.key, "has no caption");
            return;
        };
        let text = String::from_utf8_lossy(caption);
        self.report.caption_chars.add(text.chars().count() as u64);
        if let Some(statistics) = &mut self.report.statistics {
            statistics.add_caption(&text, self.options.tokens.as_ref());
        }
        if let Err(error) = std::str::from_utf8(caption) {
            let at = error.valid_up_to();
            let what = format!("{extension} is not UTF-8 at byte {at}; replaced by U+FFFD");
            self.problem(ProblemKind::CaptionNotUtf8, &sample.key, what);
        } else if text.trim().is_empty() {
            let what = format!("{extension} is empty");
            self.problem(ProblemKind::EmptyCaption, &sample.key, what);
        }
    }

    fn latents(&mut self, sample: &Sample) {
        let report = self.report.latents.get_or_insert_default();
        report.samples += 1;
        let (mut problems, mut not_finite) = (Vec::new(), Vec::new());
        for extension in [LATENT, PROMPT_EMBEDS, POOLED] {
            let Some(file) = sample.members.get(extension) else {
                continue;
            };
            let added = report.add_array(extension, file).and_then(|array| {
                if extension == LATENT {
                    report.add_moments(extension, &array)?;
                }
                Ok(array)
            });
            match added {
                Ok(array) if array.are_finite() => {}
                Ok(_) => not_finite.push(extension),
                Err(what) => problems.push((ProblemKind::BadArray, what)),
            }
        }
        if !not_finite.is_empty() {
            report.not_finite += 1;
            let what = format!("{} holds NaN or infinity", not_finite.join(" and "));
            problems.push((ProblemKind::NotFinite, what));
        }
        for (kind, what) in problems {
            self.problem(kind, &sample.key, what);
        }
    }

    fn image(&mut self, sample: &Sample) {
        let image_keys = &self.options.image_keys;
        let oversized = image_keys
            .iter()
            .find_map(|key| sample.oversized.get_key_value(key));
        match (sample.pick(image_keys), oversized) {
            (Some((extension, image)), _) => {
                let extension = extension.to_owned();
                self.decode(&sample.key, &extension, image);
            }
            (None, Some((extension, bytes))) => {
                self.report.undecodable += 1;
                let what = format!("{extension} is too large ({})", counted(*bytes, "byte"));
                self.problem(ProblemKind::TooLarge, &sample.key, what);
            }
            (None, None) => {
                self.report.missing_images += 1;
                self.problem(ProblemKind::NoImage, &sample.key, "has no image");
            }
        }
    }

    fn decode(&mut self, key: &str, extension: &str, image: &[u8]) {
        let decoded = match decode(image, ImageOptions::default().max_pixels) {
            Ok(decoded) => decoded,
            Err(error) => {
                self.report.undecodable += 1;
                let kind = match error {
                    DecodeError::TooLarge { .. } => ProblemKind::TooLarge,
                    _ => ProblemKind::DecodeError,
                };
                self.problem(kind, key, format!("{extension} {error}"));
                return;
            }
        };
        let format = decoded.format;
        let (width, height) = decoded.pixels.dimensions();
        *self.report.formats.entry(format.to_owned()).or_default() += 1;
        self.report.width.add(u64::from(width));
        self.report.height.add(u64::from(height));
        if let Some(statistics) = &mut self.report.statistics {
            statistics.add_size(width, height);
        }
        if image_checks::has_wrong_extension(extension, format) {
            let what = format!("{extension} is a {}", format.to_uppercase());
            self.problem(ProblemKind::WrongExtension, key, what);
        }
        if image_checks::is_animated(image) {
            let what = format!("{extension} has several frames; the first is taken");
            self.problem(ProblemKind::Animated, key, what);
        }
        if image_checks::has_16_bits(image) {
            let what = format!("{extension} has 16 bits a channel; 8 are kept");
            self.problem(ProblemKind::SixteenBit, key, what);
        }
        if let Some(side) = self.options.resolution
            && width.min(height) < side
        {
            let what = format!("{extension} is {width}x{height}, and enlarged to {side}");
            self.problem(ProblemKind::BelowResolution, key, what);
        }
    }

    fn problem(&mut self, kind: ProblemKind, key: &str, what: impl Into<String>) {
        self.report.problems.push(Problem {
            kind,
            key: key.to_owned(),
            what: what.into(),
        });
    }
}
