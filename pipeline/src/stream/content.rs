//! What a stream's samples are made of: which members are needed, and what becomes of them.

use bytes::Bytes;
use half::f16;

use super::config::StreamConfig;
use super::step::Reason;
use crate::shard::Sample;

/// Extension of a sample's latents.
pub(crate) const LATENT: &str = "latent.npy";
/// Extension of a sample's text embeddings.
pub(crate) const PROMPT_EMBEDS: &str = "prompt_embeds.npy";

/// What the shards hold, and what a stream makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Content {
    /// Captioned images. Squares of pixels are made of them.
    #[default]
    Images,
    /// What `coffey precompute` made of captioned images: `KEY.latent.npy` and, where they are wanted,
    /// `KEY.prompt_embeds.npy`, both f16 in C order.
    Latents(LatentShapes),
}

/// What arrays of latent shards must look like: a sample with others is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentShapes {
    /// Of the moments, `[2C, h, w]`. A sample may hold several crops, `[N, 2C, h, w]`: one of them is drawn
    /// each time.
    pub moments: [usize; 3],
    /// Of the text embeddings, `[T, width]`. With them a sample needs no caption; `None` where the caption
    /// is what is wanted.
    pub prompt_embeds: Option<[usize; 2]>,
}

/// What the models read of a batch's samples, in their order.
#[derive(Debug, Clone, PartialEq)]
pub enum BatchContent {
    /// Of images.
    Pixels {
        /// `[B, crops, 3, R, R]`, 8 bit: a quarter of what the models read, so that waiting batches take little
        /// memory. See [`normalize`](crate::image::normalize).
        levels: Vec<u8>,
        /// `R`: side of the images.
        resolution: u32,
    },
    /// Of latents.
    Latents {
        /// Mean and log-variance, neither clamped nor scaled; `[2C, h, w]` a sample.
        moments: Halves<3>,
        /// Text embeddings if the stream was to read them; `[T, width]` a sample.
        prompt_embeds: Option<Halves<2>>,
    },
}

/// An f16 array for each sample, one after the other, in C order; all of one shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Halves<const D: usize> {
    /// The numbers. All finite.
    pub values: Vec<f16>,
    /// Of one sample's array.
    pub shape: [usize; D],
}

impl BatchContent {
    /// What one sample takes here. Bytes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Pixels { levels, .. } => levels.len(),
            Self::Latents {
                moments,
                prompt_embeds,
            } => {
                let embeds = prompt_embeds.as_ref();
                2 * (moments.values.len() + embeds.map_or(0, |embeds| embeds.values.len()))
            }
        }
    }

    /// Makes room for `samples` like the one that is here.
    pub(super) fn reserve(&mut self, samples: usize) {
        let more = samples.saturating_sub(1);
        match self {
            Self::Pixels { levels, .. } => levels.reserve_exact(more * levels.len()),
            Self::Latents {
                moments,
                prompt_embeds,
            } => {
                moments.reserve(more);
                if let Some(embeds) = prompt_embeds {
                    embeds.reserve(more);
                }
            }
        }
    }

    /// Adds a sample of the same stream, which has the same kind of content.
    pub(super) fn push(&mut self, sample: &Self) {
        match (self, sample) {
            (Self::Pixels { levels, .. }, Self::Pixels { levels: more, .. }) => {
                levels.extend_from_slice(more);
            }
            (
                Self::Latents {
                    moments,
                    prompt_embeds,
                },
                Self::Latents {
                    moments: more,
                    prompt_embeds: more_embeds,
                },
            ) => {
                moments.values.extend_from_slice(&more.values);
                if let (Some(embeds), Some(more)) = (prompt_embeds, more_embeds) {
                    embeds.values.extend_from_slice(&more.values);
                }
            }
            (Self::Pixels { .. }, Self::Latents { .. })
            | (Self::Latents { .. }, Self::Pixels { .. }) => {
                debug_assert!(false, "a stream has one kind of content");
            }
        }
    }
}

impl<const D: usize> Halves<D> {
    fn reserve(&mut self, more: usize) {
        self.values.reserve_exact(more * self.values.len());
    }
}

/// A sample's members that the models' input is made of, as they stand in the shard.
#[derive(Debug)]
pub(crate) enum Members {
    Image(Bytes),
    Latents {
        moments: Npy<3>,
        prompt_embeds: Option<Npy<2>>,
    },
}

/// An array in its file, and the shape that is wanted of it.
#[derive(Debug)]
pub(crate) struct Npy<const D: usize> {
    pub(crate) file: Bytes,
    pub(crate) shape: [usize; D],
}

impl Members {
    /// Bytes of all of them together.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Image(image) => image.len(),
            Self::Latents {
                moments,
                prompt_embeds,
            } => moments.file.len() + prompt_embeds.as_ref().map_or(0, |npy| npy.file.len()),
        }
    }
}

impl StreamConfig {
    /// The members of `sample` that are needed.
    pub(super) fn members(&self, sample: &Sample) -> Result<Members, Reason> {
        match self.content {
            Content::Images => match sample.pick(&self.image_keys) {
                Some((_, image)) => Ok(Members::Image(image.clone())),
                None => Err(absent(sample, &self.image_keys, Reason::NO_IMAGE)),
            },
            Content::Latents(shapes) => {
                let file = |key: &str, reason| match sample.members.get(key) {
                    Some(file) => Ok(file.clone()),
                    None => Err(absent(sample, &[key.to_owned()], reason)),
                };
                let prompt_embeds = |shape| {
                    let file = file(PROMPT_EMBEDS, Reason::NO_EMBEDS)?;
                    Ok(Npy { file, shape })
                };
                Ok(Members::Latents {
                    moments: Npy {
                        file: file(LATENT, Reason::NO_LATENT)?,
                        shape: shapes.moments,
                    },
                    prompt_embeds: shapes.prompt_embeds.map(prompt_embeds).transpose()?,
                })
            }
        }
    }

    /// The caption of `sample`; empty where there is none and none is needed.
    pub(super) fn caption(&self, sample: &Sample) -> Result<String, Reason> {
        match (sample.pick(&self.caption_keys), self.content) {
            (Some((_, caption)), _) => Ok(String::from_utf8_lossy(caption).into_owned()),
            (None, Content::Latents(shapes)) if shapes.prompt_embeds.is_some() => Ok(String::new()),
            (None, _) => Err(Reason::NO_CAPTION),
        }
    }
}

/// Why none of `keys` is there.
fn absent(sample: &Sample, keys: &[String], missing: Reason) -> Reason {
    let oversized = keys.iter().any(|key| sample.oversized.contains_key(key));
    if oversized {
        Reason::TOO_LARGE
    } else {
        missing
    }
}
