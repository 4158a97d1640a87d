//! The configuration of a stream, and its checks.

use std::sync::Arc;

use crate::format::latents::{LATENT, LatentShapes, POOLED, PROMPT_EMBEDS};
use crate::image::ImageOptions;
use crate::order::{
    Capacity, Cursor, EpochPlan, LaneCursor, Lanes, Order, OrderIdentity, fingerprint,
};
use crate::plural::counted;
use crate::shard::{Filter, HeldMembers, ShardUrl};

use super::error::StreamError;
use super::listed::ListedShard;

/// The content of the shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Content {
    /// Captioned images, from which crops of pixels are made.
    #[default]
    Images,
    /// Latents of captioned images: shards of `coffey precompute` ([`crate::format::latents`]).
    Latents(LatentShapes),
}

/// Everything a stream depends on.
#[derive(Debug, Clone)]
pub struct StreamConfig {
    /// The shards, listed ([`crate::Sources::list`]).
    pub shards: Vec<ShardUrl>,
    /// Their content.
    pub content: Content,
    /// The entry of each of `shards` in its manifest, in the same order. A shard that differs ends the stream: by its size
    /// before it is read, by its SHA-256 and its number of samples once it was read whole. `None` without manifests.
    pub listed: Option<Arc<[ListedShard]>>,
    /// Extensions of images, in order of preference. Has no effect on [`Content::Latents`].
    pub image_keys: Vec<String>,
    /// Extensions of captions, in order of preference.
    pub caption_keys: Vec<String>,
    /// Most samples in an epoch, over all lanes. After that many samples that pass the filter the next
    /// epoch begins, with its own order of shards; an [`Order::Sequential`] stream ends.
    pub max_samples: Option<u64>,
    /// Draw shards with replacement. Has no effect on [`Order::Sequential`].
    pub resample: bool,
    /// Samples in the shuffle buffers of all lanes; 0 for no shuffle. Has no effect on [`Order::Sequential`].
    pub shuffle_buffer: usize,
    /// Limit of the shuffle buffers in compressed megabytes (10^6): they hold fewer samples if images are large. The
    /// order depends on it. Has no effect on [`Order::Sequential`].
    pub shuffle_buffer_mb: u64,
    /// Shards read at once by all lanes, at least one a lane. The order depends on it. For [`Order::Sequential`] only the number of
    /// shards opened ahead.
    pub open_shards: usize,
    /// Threads that decode, resize and crop, or read latents. Has no effect on the batches.
    pub decode_threads: usize,
    /// Finished batches that wait for the consumer.
    pub prefetch_batches: usize,
    /// Largest fraction of broken samples, 0 to 1. With more the stream ends in an error. Filtered samples do not
    /// count as broken.
    pub max_bad_fraction: f64,
    /// Which samples to use.
    pub filter: Filter,
    /// The image transform. For [`Content::Latents`] only [`ImageOptions::max_bytes`] has an effect.
    pub image: ImageOptions,
    /// Order of the samples.
    pub order: Order,
    /// Skip a sample with the key of the sample delivered before it, if both are from one shard. Readers of a tar that is
    /// written from the stream would take the two for one sample. For [`Order::Sequential`]; a cursor does not hold the key.
    pub skip_duplicate_keys: bool,
    /// Samples in a batch.
    pub batch_size: usize,
    /// Seed of all randomness.
    pub seed: u64,
    /// The lanes, and which of them this stream reads. The order depends on their number.
    pub lanes: Lanes,
    /// The position to resume from.
    pub resume: Option<Cursor>,
}

impl Default for StreamConfig {
    fn default() -> Self {
        let owned = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect();
        Self {
            shards: Vec::new(),
            content: Content::default(),
            listed: None,
            image_keys: owned(&["jpg", "png", "jpeg", "webp"]),
            caption_keys: owned(&["text", "txt", "caption"]),
            max_samples: None,
            resample: true,
            shuffle_buffer: 1000,
            shuffle_buffer_mb: 256,
            open_shards: 4,
            decode_threads: std::thread::available_parallelism().map_or(1, Into::into),
            prefetch_batches: 4,
            max_bad_fraction: 0.05,
            filter: Filter::default(),
            image: ImageOptions::default(),
            order: Order::Shuffled,
            skip_duplicate_keys: false,
            batch_size: 1,
            seed: 0,
            lanes: Lanes::default(),
            resume: None,
        }
    }
}

/// A lane of a stream with its share of the settings that are totals over all lanes.
#[derive(Debug)]
pub(super) struct LaneConfig {
    pub(super) lane: usize,
    pub(super) plan: EpochPlan,
    /// Most samples in an epoch.
    pub(super) epoch_share: Option<u64>,
    pub(super) open_shards: usize,
    /// Limits of the shuffle buffer.
    pub(super) buffer: Capacity,
    pub(super) resume: Option<LaneCursor>,
}

impl StreamConfig {
    /// Lane `lane` of the stream.
    pub(super) fn lane(&self, lane: usize) -> LaneConfig {
        let part = |total: usize| self.lanes.part(total as u64) as usize;
        let (open_shards, items) = match self.order {
            Order::Shuffled => (part(self.open_shards), part(self.shuffle_buffer)),
            Order::Sequential => (self.open_shards, 0),
        };
        LaneConfig {
            lane,
            plan: EpochPlan {
                seed: self.seed,
                shards: self.shards.len(),
                lane,
                lanes: self.lanes.count,
                order: self.order,
                resample: self.resample,
            },
            epoch_share: self.epoch_share(lane),
            open_shards,
            buffer: Capacity {
                items,
                bytes: self
                    .lanes
                    .part(self.shuffle_buffer_mb.saturating_mul(1_000_000)),
            },
            resume: self
                .resume
                .as_ref()
                .and_then(|cursor| cursor.lane(lane).cloned())
                // A lane may not have begun when another lane's batch came.
                .filter(|lane| lane.next_batch > 0),
        }
    }

    /// The members that the stream reads.
    pub(crate) fn held_members(&self) -> HeldMembers {
        let most = self.image.max_bytes;
        let held = |image_keys| HeldMembers::of_images(image_keys, &self.caption_keys, most);
        match self.content {
            Content::Images => held(&self.image_keys),
            Content::Latents(shapes) => {
                let embeds = shapes.prompt_embeds.map(|_| PROMPT_EMBEDS);
                let pooled = shapes.pooled.map(|_| POOLED);
                let arrays = [Some(LATENT), embeds, pooled].into_iter().flatten();
                held(&[]).with(arrays, most)
            }
        }
    }

    /// A lane's share of `max_samples`.
    fn epoch_share(&self, lane: usize) -> Option<u64> {
        self.max_samples.map(|max| self.lanes.share(lane, max))
    }

    /// Checks every field, and the cursor against them.
    pub(crate) fn validate(&self) -> Result<OrderIdentity, StreamError> {
        let invalid = |what: String| Err(StreamError::Config(what));
        if self.shards.is_empty() {
            return invalid("there are no shards to read".to_owned());
        }
        if self.batch_size == 0 || self.image.resolution == 0 || self.open_shards == 0 {
            return invalid("batch_size, resolution and open_shards must be at least 1".to_owned());
        }
        if self.image_keys.is_empty() || self.caption_keys.is_empty() {
            return invalid("image_keys and caption_keys must each name an extension".to_owned());
        }
        if !(0.0..=1.0).contains(&self.max_bad_fraction) {
            return invalid(format!(
                "max_bad_fraction = {} must be between 0 and 1",
                self.max_bad_fraction
            ));
        }
        let Lanes {
            count,
            hosted,
            batches_in_turn,
        } = &self.lanes;
        if hosted.is_empty() || hosted.end > *count || *batches_in_turn == 0 {
            return invalid(format!(
                "lanes {hosted:?} of {count} in turns of {batches_in_turn}: lanes count from 0"
            ));
        }
        if self.shards.len() < *count {
            return Err(StreamError::TooFewShards {
                shards: self.shards.len(),
                lanes: *count,
            });
        }
        if hosted.clone().any(|lane| self.epoch_share(lane) == Some(0)) {
            return invalid(format!(
                "max_samples must be at least 1 for each of {}",
                counted(*count, "lane")
            ));
        }
        if let Some(listed) = self.listed.as_ref().map(|listed| listed.len())
            && listed != self.shards.len()
        {
            let shards = self.shards.len();
            return invalid(format!("{listed} entries of manifests for {shards} shards"));
        }
        if let Some(folder) = self.shards.iter().find(|url| url.is_folder()) {
            return invalid(format!("{folder} is a folder and was not listed"));
        }
        let identity = self.identity();
        if let Some(cursor) = &self.resume {
            cursor.check(&identity)?;
            if let Some(fault) = cursor.fault(self.shards.len(), hosted.clone()) {
                return invalid(format!(
                    "the saved position in the data is damaged: {fault}"
                ));
            }
        }
        Ok(identity)
    }

    fn identity(&self) -> OrderIdentity {
        let shuffled = self.order == Order::Shuffled;
        let urls: Vec<String> = self.shards.iter().map(ShardUrl::identity).collect();
        let mut selection = vec![
            self.image_keys.join(" "),
            self.caption_keys.join(" "),
            format!("{:?}", self.filter),
            self.image.max_bytes.to_string(),
        ];
        if let Content::Latents(shapes) = self.content {
            selection.push(format!("{shapes:?}"));
        }
        OrderIdentity {
            seed: self.seed,
            lanes: self.lanes.count,
            order: self.order,
            resample: shuffled && self.resample,
            open_shards: if shuffled { self.open_shards } else { 1 },
            shuffle_buffer: if shuffled { self.shuffle_buffer } else { 0 },
            shuffle_buffer_mb: if shuffled { self.shuffle_buffer_mb } else { 0 },
            max_samples: self.max_samples,
            shards: fingerprint(urls.iter().map(String::as_str)),
            selection: fingerprint(selection.iter().map(String::as_str)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> StreamConfig {
        StreamConfig {
            shards: vec![ShardUrl::file("0.tar"), ShardUrl::file("1.tar")],
            ..StreamConfig::default()
        }
    }

    #[test]
    fn config_refuses_what_cannot_work() {
        assert!(config().validate().is_ok());
        let refused = |config: StreamConfig| {
            let error = config.validate().unwrap_err();
            assert!(error.is_config());
            error.to_string()
        };
        assert!(refused(StreamConfig::default()).contains("no shards"));
        assert!(
            refused(StreamConfig {
                lanes: Lanes::one(2, 2),
                ..config()
            })
            .contains("lanes 2..3 of 2")
        );
        let error = refused(StreamConfig {
            lanes: Lanes::all(3, 1),
            ..config()
        });
        assert!(
            error.contains("2 shards") && error.contains("3 lanes"),
            "{error}"
        );
        assert!(
            refused(StreamConfig {
                max_bad_fraction: f64::NAN,
                ..config()
            })
            .contains("max_bad_fraction")
        );
        assert!(
            refused(StreamConfig {
                max_samples: Some(1),
                lanes: Lanes::one(1, 2),
                ..config()
            })
            .contains("max_samples")
        );
    }

    #[test]
    fn config_shares_totals_between_lanes() {
        let config = StreamConfig {
            max_samples: Some(11),
            shuffle_buffer: 9,
            open_shards: 2,
            lanes: Lanes::all(4, 1),
            ..config()
        };
        let lanes: Vec<LaneConfig> = (0..4).map(|lane| config.lane(lane)).collect();
        let shares = lanes.iter().filter_map(|lane| lane.epoch_share);
        assert_eq!(shares.collect::<Vec<_>>(), [3, 3, 3, 2]);
        let each = |lane: &LaneConfig| (lane.open_shards, lane.buffer.items, lane.buffer.bytes);
        assert!(lanes.iter().all(|lane| each(lane) == (1, 3, 64_000_000)));
    }
}
