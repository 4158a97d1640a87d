//! Packing: a folder of images to shards in the layout of img2dataset.
//!
//! Shard `i` holds the usable samples among the same places of the folder's order, whatever is in other shards. So a
//! restarted pack keeps finished shards, and the bytes of a shard depend only on names and contents.

mod input;
mod place;
mod sample;
mod shard;

use std::collections::BTreeMap;
use std::ops::Range;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::destination::Destination;
use crate::flow::FlowMetrics;
use crate::image::ImageOptions;
use crate::image_folder::ImageFolder;
use crate::shard::{HeldMembers, Location, Sample, ShardUrl};
use crate::source::{SourceError, Sources};
use crate::stream::{OpenShard, ReaderContext, ShardEvent, StreamError};

pub use input::{check_apart, is_within};

use input::images_of;
use place::{PackedPlace, Stats, shard_name};
use sample::{LeftOut, PackedSample};
use shard::ShardWriter;

/// Most samples of a shard: the last four digits of a key count them.
pub const MOST_SAMPLES: usize = 10_000;

/// Why packing ended early.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The folder can't be read.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The output can't be written.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The output holds other shards.
    #[error("{place} {cause}; remove it, or choose another --out")]
    Occupied {
        /// Object of the output.
        place: String,
        /// Kind of the object.
        cause: String,
    },
    /// The output is a pack with shards of another size.
    #[error(
        "{place} is of a pack with --samples-per-shard {samples_per_shard}; give the same --samples-per-shard, remove the \
         folder {out}, or choose another --out"
    )]
    OtherSize {
        /// The mark of the output.
        place: String,
        /// Its number.
        samples_per_shard: usize,
        /// The output.
        out: String,
    },
    /// The folder or the output is of another kind, whatever is in it.
    #[error("{place}: {cause}")]
    Place {
        /// Its path.
        place: String,
        /// The fault, and the right form.
        cause: String,
    },
    /// The folder has no images.
    #[error("{folder}: {cause}")]
    NoImages {
        /// The folder.
        folder: String,
        /// Files that the folder has instead.
        cause: String,
    },
    /// A file of the folder is there and can't be read.
    #[error("{file}: {cause}; the shard of this file is not finished")]
    Unreadable {
        /// The file.
        file: String,
        /// The system's error.
        cause: String,
    },
    /// No sample of the folder can be packed.
    #[error("{folder}: no image can be packed: {left_out}")]
    Nothing {
        /// The folder.
        folder: String,
        /// Counts by reason.
        left_out: String,
    },
    /// A stop was asked for: finished shards stay.
    #[error("stopped")]
    Stopped,
}

/// Counts of the packed shards.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Packed {
    /// Samples of the folder that were looked at.
    pub seen: u64,
    /// Packed samples.
    pub samples: u64,
    /// Shards.
    pub shards: u64,
    /// Shards that an earlier run finished.
    pub kept: u64,
    /// Size of the shards.
    pub bytes: u64,
    /// Samples that were not packed, by the reason for which a stream skips them.
    pub left_out: BTreeMap<String, u64>,
    /// Number of files that went away before their turn, and the first of them. Their shards are not finished.
    pub gone: Option<(u64, String)>,
    /// Key and fault of the first such sample of each reason. Not of shards that were kept.
    pub examples: BTreeMap<String, String>,
}

impl Packed {
    /// The samples that were not packed: the count of each reason, and the first sample.
    #[must_use]
    pub fn describe_left_out(&self) -> String {
        let reasons = self.left_out.iter().map(|(reason, count)| {
            let example = self.examples.get(reason);
            let example = example.map(|example| format!(" (the first is {example})"));
            format!("{reason} {count}{}", example.unwrap_or_default())
        });
        reasons.collect::<Vec<_>>().join(", ")
    }

    fn add(&mut self, stats: &Stats) {
        self.samples += stats.successes;
        self.shards += u64::from(stats.successes > 0);
        self.bytes += stats.bytes;
    }

    fn leave_out(&mut self, reason: &str, count: u64) {
        *self.left_out.entry(reason.to_owned()).or_default() += count;
    }
}

/// Packs a local folder of images into shards of `samples_per_shard` samples each. `progress` is called with the counts so
/// far and the number of samples in the folder.
///
/// Blocks until it is done; must not be called on a thread of the runtime.
///
/// # Errors
/// [`PackError::Stopped`] once `cancel` is cancelled, else when the folder can't be read or the output can't be written.
pub fn pack(
    sources: &Sources,
    folder: &ShardUrl,
    place: &Destination,
    samples_per_shard: usize,
    (runtime, cancel): (&Handle, &CancellationToken),
    progress: impl FnMut(&Packed, u64),
) -> Result<Packed, PackError> {
    runtime.block_on(images_of(sources, folder))?;
    let shards = runtime.block_on(sources.image_shards(folder, samples_per_shard))?;
    let keys = sources.members();
    let max_image_bytes = ImageOptions::default().max_bytes;
    let mut packer = Packer {
        place: PackedPlace::open(place, samples_per_shard, shards.len())?,
        context: ReaderContext {
            sources: sources.clone(),
            metrics: FlowMetrics::private(),
            runtime: runtime.clone(),
            held: HeldMembers::of_images(&keys.images, &keys.captions, max_image_bytes),
            inspects: false,
        },
        cancel,
        packed: Packed::default(),
        progress,
    };
    for (index, url) in shards.iter().enumerate() {
        packer.shard(index, url)?;
    }
    match packer.packed.samples {
        0 => {
            packer.place.clear(shards.len())?;
            Err(PackError::Nothing {
                folder: folder.to_string(),
                left_out: packer.packed.describe_left_out(),
            })
        }
        _ => Ok(packer.packed),
    }
}

struct Packer<'a, P> {
    place: PackedPlace,
    context: ReaderContext,
    cancel: &'a CancellationToken,
    packed: Packed,
    progress: P,
}

impl<P: FnMut(&Packed, u64)> Packer<'_, P> {
    /// Packs a shard, unless an earlier run did.
    fn shard(&mut self, index: usize, url: &ShardUrl) -> Result<(), PackError> {
        let Location::Images(images) = url.location() else {
            return Ok(());
        };
        let runtime = self.context.runtime.clone();
        let folder = runtime.block_on(self.context.sources.image_folder(&images.folder))?;
        let samples = folder.samples_of(images)?;
        let files = folder.state(samples.clone());
        let (name, total) = (shard_name(index), folder.len() as u64);
        let stats = match self.place.finished(&name, &files)? {
            Some(stats) => {
                self.packed.seen += stats.count;
                self.packed.kept += u64::from(stats.successes > 0);
                for (reason, count) in stats.left_out() {
                    self.packed.leave_out(reason, *count);
                }
                (self.progress)(&self.packed, total);
                stats
            }
            None => {
                let open = OpenShard::start(&self.context, url, None);
                let open = open.map_err(|error| StreamError::threads(&error))?;
                let mut shard = ShardWriter::new(&self.place.destination, index);
                loop {
                    match open.next(self.cancel) {
                        Some(ShardEvent::Sample(sample)) => {
                            self.sample(&folder, &sample, &mut shard)?
                        }
                        Some(ShardEvent::NonSample(_)) => continue,
                        Some(ShardEvent::End { broken: None }) => break,
                        Some(ShardEvent::End {
                            broken: Some(cause),
                        }) => {
                            let url = url.to_string();
                            return Err(SourceError::File { url, cause }.into());
                        }
                        Some(ShardEvent::Failed(error)) => return Err(error.into()),
                        None => return Err(PackError::Stopped),
                    }
                    self.packed.seen += 1;
                    (self.progress)(&self.packed, total);
                }
                let is_complete = self.check_read(&folder, samples)?;
                let stats = shard.finish(files)?;
                match is_complete {
                    true => self.place.finish(&name, &stats)?,
                    false => self.place.unfinish(&name)?,
                }
                stats
            }
        };
        self.packed.add(&stats);
        Ok(())
    }

    /// Whether every file of `samples` was read. A file that is gone was not.
    fn check_read(
        &mut self,
        folder: &ImageFolder,
        samples: Range<usize>,
    ) -> Result<bool, PackError> {
        let unread = folder.unread(samples);
        for (path, why) in &unread {
            let file = path.display().to_string();
            if !why.is_gone {
                let cause = why.cause.clone();
                return Err(PackError::Unreadable { file, cause });
            }
            self.packed.gone.get_or_insert((0, file)).0 += 1;
        }
        Ok(unread.is_empty())
    }

    /// Packs a sample, or counts why not.
    fn sample(
        &mut self,
        folder: &ImageFolder,
        sample: &Sample,
        shard: &mut ShardWriter,
    ) -> Result<(), PackError> {
        match PackedSample::of(sample, self.context.sources.members()) {
            Ok(packed) => {
                let file = folder.path_in(&sample.key, packed.extension);
                let file = file.unwrap_or_else(|| format!("{}.{}", sample.key, packed.extension));
                shard.append(sample, &packed, &file)?;
            }
            Err(LeftOut { reason, fault }) => {
                let example = || format!("{:?}, which {fault}", sample.key);
                let examples = &mut self.packed.examples;
                examples.entry(reason.clone()).or_insert_with(example);
                self.packed.leave_out(&reason, 1);
                shard.stats.leave_out(reason);
            }
        }
        Ok(())
    }
}
