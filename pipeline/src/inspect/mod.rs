//! What is in a shard: a report for people and for scripts. Reads all of it and decodes every image.

mod across;
mod latents;
mod picture;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, mpsc};

use serde::Serialize;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::flow::FlowMetrics;
use crate::image::{DecodeError, ImageOptions, decode};
use crate::shard::{PassedOver, Sample, ShardUrl, Why};
use crate::source::Sources;
use crate::stages::Stage;
use crate::stream::{
    LATENT, Note, OpenShard, PROMPT_EMBEDS, ReaderContext, ShardEvent, StreamError, parse_json,
};

pub use across::Across;
pub use latents::{Channel, LatentReport};

/// What a shard holds, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ShardReport {
    /// Where it is.
    pub url: String,
    /// Its size.
    pub bytes: u64,
    /// Samples in it.
    pub samples: u64,
    /// Members by extension.
    pub members: BTreeMap<String, u64>,
    /// Images that decode, by format (by content, not by name).
    pub formats: BTreeMap<String, u64>,
    /// Widths of the images that decode. Pixels.
    pub width: Spread,
    /// Heights of the images that decode. Pixels.
    pub height: Spread,
    /// Lengths of the captions. Characters.
    pub caption_chars: Spread,
    /// Of latent shards: their arrays.
    pub latents: Option<LatentReport>,
    /// Samples without an image.
    pub missing_images: u64,
    /// Samples without a caption.
    pub missing_captions: u64,
    /// Images that don't decode, or are too large to.
    pub undecodable: u64,
    /// Samples whose key an earlier one has.
    pub duplicate_keys: u64,
    /// Members that belong to no sample, by what they are. They are passed over.
    pub passed_over: BTreeMap<&'static str, u64>,
    /// What is wrong with the tar itself, if it is cut off or damaged.
    pub broken: Option<String>,
    /// Every problem found: those of samples in the shard's order, then those of other members, then
    /// those of shards together.
    pub problems: Vec<Problem>,
    /// The samples' keys, in order.
    #[serde(skip)]
    pub keys: Vec<Arc<str>>,
}

/// The range of a number.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Spread {
    /// How many there are.
    pub count: u64,
    /// The least.
    pub min: u64,
    /// The most.
    pub max: u64,
    /// The mean; 0 if there are none.
    pub mean: f64,
    #[serde(skip)]
    sum: u64,
}

/// Something wrong with one sample or member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Which of the things that can be wrong.
    pub kind: ProblemKind,
    /// The sample's key, or the member's path; empty for the shard as a whole.
    pub key: String,
    /// What is wrong with this one.
    pub what: String,
}

/// What can be wrong with a sample or a member. The first five leave the sample out, under the same
/// name; with `Link`, `Special` and `TrailingData` something is not read; the rest is used as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// No image under the keys looked for.
    NoImage,
    /// No caption under the keys looked for.
    NoCaption,
    /// The json does not parse; left out where a filter needs it.
    BadJson,
    /// The image has too many bytes or pixels.
    TooLarge,
    /// The image can't be decoded.
    DecodeError,
    /// The member is a link; links are never followed.
    Link,
    /// The member is a device, a pipe or a sparse file.
    Special,
    /// Something comes after the end of the archive, as where two tars were joined.
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
    /// The caption is nothing but white space.
    EmptyCaption,
    /// The image is of another format than its extension says.
    WrongExtension,
    /// The image has several frames; the first is taken.
    Animated,
    /// The image has 16 bits a channel; 8 are kept.
    SixteenBit,
    /// The image is smaller than the resolution, and will be enlarged.
    BelowResolution,
    /// An array of latents or embeddings is damaged, or of another type or shape.
    BadArray,
    /// Latents or embeddings hold NaN or infinity.
    NotFinite,
    /// The manifest beside latent shards says something else of this one.
    OtherThanManifest,
}

impl ProblemKind {
    /// The name in JSON and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoImage => "no_image",
            Self::NoCaption => "no_caption",
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

/// What to look for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Extensions of images, in order of preference.
    pub image_keys: Vec<String>,
    /// Extensions of captions, in order of preference.
    pub caption_keys: Vec<String>,
    /// Side below which an image is a problem, if any. Pixels.
    pub resolution: Option<u32>,
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
        #[expect(clippy::cast_precision_loss, reason = "a mean for people to read")]
        let mean = self.sum as f64 / self.count as f64;
        self.mean = mean;
    }
}

/// Reads a shard to its end and reports on it.
///
/// Needs a tokio runtime. What is wrong with samples stands in the report.
///
/// # Errors
/// [`StreamError`] if the shard can't be read, or isn't a tar.
pub async fn shard(
    sources: &Sources,
    url: &ShardUrl,
    wanted: &Wanted,
) -> Result<ShardReport, StreamError> {
    let (sender, notes) = mpsc::channel();
    let context = ReaderContext {
        sources: sources.clone(),
        metrics: FlowMetrics::private(),
        runtime: Handle::current(),
        max_member_bytes: ImageOptions::default().max_bytes,
        notes: Some(sender),
    };
    let inspector = Inspector {
        wanted: wanted.clone(),
        keys: HashSet::new(),
        report: ShardReport {
            url: url.redacted(),
            ..ShardReport::default()
        },
    };
    let url = url.clone();
    // Should the caller lose interest, the thread stops with it.
    let guard = CancelOnDrop(CancellationToken::new());
    let cancel = guard.0.clone();
    let work = move || {
        let open =
            OpenShard::start(&context, &url).map_err(|error| StreamError::threads(&error))?;
        drop(context); // The notes end with the shard.
        inspector.read(open, &notes, &cancel)
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
    wanted: Wanted,
    keys: HashSet<Arc<str>>,
    report: ShardReport,
}

impl Inspector {
    fn read(
        mut self,
        open: OpenShard,
        notes: &mpsc::Receiver<Note>,
        cancel: &CancellationToken,
    ) -> Result<ShardReport, StreamError> {
        while let Some(event) = open.next(cancel) {
            match event {
                ShardEvent::Sample(sample) => self.sample(&sample),
                ShardEvent::End { broken } => {
                    self.report.broken = broken;
                    break;
                }
                ShardEvent::Failed(error) => return Err(error),
            }
        }
        self.report.bytes = open.size();
        drop(open);
        for note in notes {
            match note {
                Note::PassedOver(member) => self.passed_over(&member),
                Note::Trailing(bytes) => {
                    let what = format!("{bytes} bytes after the end of the archive are not read");
                    self.problem(ProblemKind::TrailingData, "", what);
                }
            }
        }
        Ok(self.report)
    }

    fn passed_over(&mut self, PassedOver { path, why }: &PassedOver) {
        let name = match why {
            Why::Folder => "folder",
            Why::Name => "file without an extension, or hidden",
            Why::Link => {
                self.problem(ProblemKind::Link, path, "is a link, and not followed");
                "link"
            }
            Why::Special => {
                self.problem(ProblemKind::Special, path, "is no plain file, and not read");
                "special file"
            }
        };
        *self.report.passed_over.entry(name).or_default() += 1;
    }

    fn sample(&mut self, sample: &Sample) {
        self.report.samples += 1;
        self.report.keys.push(sample.key.clone());
        let extensions = sample.members.keys().chain(sample.oversized.keys());
        for extension in extensions {
            *self.report.members.entry(extension.clone()).or_default() += 1;
        }
        if !self.keys.insert(sample.key.clone()) {
            self.report.duplicate_keys += 1;
            let what = "has the key of an earlier sample";
            self.problem(ProblemKind::DuplicateKey, &sample.key, what);
        }
        // Where a name was not UTF-8, this stands for what could not be read.
        if sample.key.contains(char::REPLACEMENT_CHARACTER) {
            let what = "has a name that is not UTF-8; its bytes are replaced";
            self.problem(ProblemKind::UnreadableName, &sample.key, what);
        }
        match sample.members.contains_key(LATENT) {
            true => self.latents(sample),
            false => self.image(sample),
        }
        self.caption(sample);
        if sample
            .members
            .get("json")
            .is_some_and(|raw| parse_json(raw).is_none())
        {
            let what = "json does not parse";
            self.problem(ProblemKind::BadJson, &sample.key, what);
        }
    }

    fn caption(&mut self, sample: &Sample) {
        let Some((extension, caption)) = sample.pick(&self.wanted.caption_keys) else {
            self.report.missing_captions += 1;
            self.problem(ProblemKind::NoCaption, &sample.key, "has no caption");
            return;
        };
        let text = String::from_utf8_lossy(caption);
        self.report.caption_chars.add(text.chars().count() as u64);
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
        for (extension, moments) in [(LATENT, true), (PROMPT_EMBEDS, false)] {
            let Some(file) = sample.members.get(extension) else {
                continue;
            };
            match report.add(extension, file, moments) {
                Ok(true) => {}
                Ok(false) => not_finite.push(extension),
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
        let image_keys = &self.wanted.image_keys;
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
                let what = format!("{extension} is too large ({bytes} bytes)");
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
        if picture::lies(extension, format) {
            let what = format!("{extension} is a {}", format.to_uppercase());
            self.problem(ProblemKind::WrongExtension, key, what);
        }
        if picture::animated(image) {
            let what = format!("{extension} has several frames; the first is taken");
            self.problem(ProblemKind::Animated, key, what);
        }
        if picture::deep(image) {
            let what = format!("{extension} has 16 bits a channel; 8 are kept");
            self.problem(ProblemKind::SixteenBit, key, what);
        }
        if let Some(side) = self.wanted.resolution
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
