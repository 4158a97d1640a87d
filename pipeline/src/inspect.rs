//! What is in a shard: a report for people and for scripts. Reads all of it and decodes every image.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;
use tokio::runtime::Handle;

use crate::flow::{Cancel, FlowMetrics, Stage};
use crate::image::{ImageOptions, decode};
use crate::shard::{Sample, ShardUrl};
use crate::source::Sources;
use crate::stream::{OpenShard, ReaderContext, Reason, ShardEvent, StreamError, parse_json};

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
    /// Samples without an image.
    pub missing_images: u64,
    /// Samples without a caption.
    pub missing_captions: u64,
    /// Images that don't decode, or are too large to.
    pub undecodable: u64,
    /// Samples whose key an earlier one has.
    pub duplicate_keys: u64,
    /// What is wrong with the tar itself, if it is cut off or damaged.
    pub broken: Option<String>,
    /// Every problem found, in the shard's order.
    pub problems: Vec<Problem>,
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

/// Something wrong with one sample.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The sample's key.
    pub key: String,
    /// What is wrong.
    pub what: String,
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

/// Reads a shard to its end and reports on it. `image_keys` and `caption_keys` are the extensions to
/// look for, in order of preference.
///
/// Needs a tokio runtime. What is wrong with samples stands in the report.
///
/// # Errors
/// [`StreamError`] if the shard can't be read, or isn't a tar.
pub async fn shard(
    sources: &Sources,
    url: &ShardUrl,
    image_keys: &[String],
    caption_keys: &[String],
) -> Result<ShardReport, StreamError> {
    let context = ReaderContext {
        sources: sources.clone(),
        metrics: FlowMetrics::new(),
        runtime: Handle::current(),
        max_member_bytes: ImageOptions::default().max_bytes,
    };
    let inspector = Inspector {
        image_keys: image_keys.to_vec(),
        caption_keys: caption_keys.to_vec(),
        keys: HashSet::new(),
        report: ShardReport {
            url: url.redacted(),
            ..ShardReport::default()
        },
    };
    let url = url.clone();
    // Should the caller lose interest, the thread stops with it.
    let guard = CancelOnDrop(Cancel::new());
    let cancel = guard.0.clone();
    let work = move || {
        let open =
            OpenShard::start(&context, &url).map_err(|error| StreamError::threads(&error))?;
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

struct CancelOnDrop(Cancel);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

struct Inspector {
    image_keys: Vec<String>,
    caption_keys: Vec<String>,
    keys: HashSet<std::sync::Arc<str>>,
    report: ShardReport,
}

impl Inspector {
    fn read(mut self, open: &OpenShard, cancel: &Cancel) -> Result<ShardReport, StreamError> {
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
        Ok(self.report)
    }

    fn sample(&mut self, sample: &Sample) {
        self.report.samples += 1;
        let extensions = sample.members.keys().chain(sample.oversized.keys());
        for extension in extensions {
            *self.report.members.entry(extension.clone()).or_default() += 1;
        }
        if !self.keys.insert(sample.key.clone()) {
            self.report.duplicate_keys += 1;
            self.problem(sample, "has the key of an earlier sample".to_owned());
        }
        self.image(sample);
        match sample.pick(&self.caption_keys) {
            Some((_, caption)) => {
                let chars = String::from_utf8_lossy(caption).chars().count();
                self.report.caption_chars.add(chars as u64);
            }
            None => {
                self.report.missing_captions += 1;
                self.problem(sample, Reason::NO_CAPTION.name().into_owned());
            }
        }
        if sample
            .members
            .get("json")
            .is_some_and(|raw| parse_json(raw).is_none())
        {
            self.problem(sample, Reason::BAD_JSON.name().into_owned());
        }
    }

    fn image(&mut self, sample: &Sample) {
        let oversized = self
            .image_keys
            .iter()
            .find_map(|key| sample.oversized.get_key_value(key));
        match (sample.pick(&self.image_keys), oversized) {
            (Some((extension, image)), _) => {
                match decode(image, ImageOptions::default().max_pixels) {
                    Ok(decoded) => {
                        *self
                            .report
                            .formats
                            .entry(decoded.format.to_owned())
                            .or_default() += 1;
                        self.report.width.add(u64::from(decoded.pixels.width()));
                        self.report.height.add(u64::from(decoded.pixels.height()));
                    }
                    Err(error) => {
                        self.report.undecodable += 1;
                        let what = format!("{extension} {error}");
                        self.problem(sample, what);
                    }
                }
            }
            (None, Some((extension, bytes))) => {
                self.report.undecodable += 1;
                let what = format!("{extension} is too large ({bytes} bytes)");
                self.problem(sample, what);
            }
            (None, None) => {
                self.report.missing_images += 1;
                self.problem(sample, Reason::NO_IMAGE.name().into_owned());
            }
        }
    }

    fn problem(&mut self, sample: &Sample, what: String) {
        self.report.problems.push(Problem {
            key: sample.key.to_string(),
            what,
        });
    }
}
