//! The network as objectives and samplers see it, and what it is conditioned on.

use std::fmt;

use candle_core::{Device, Result, Tensor};

/// Inputs of a network besides the noisy latents and their timesteps; `B` samples.
///
/// `hidden` is always there; a network that needs one of the others, or is given one it has no use for, returns an error.
#[derive(Clone, Debug)]
pub struct Conditioning {
    /// Hidden states of the text encoders, `[B, T, W]` f32: `T` tokens of width `W`.
    pub hidden: Tensor,
    /// Pooled text embedding, `[B, P]` f32 (SDXL).
    pub pooled: Option<Tensor>,
    /// Original size, crop and target size, `[B, 6]` f32 (SDXL).
    pub size: Option<Tensor>,
    /// Embedding of the guidance scale, `[B, G]` f32 (students with `time_cond_proj_dim`).
    pub guidance: Option<Tensor>,
}

impl Conditioning {
    /// Text alone: `hidden` is `[B, T, W]`.
    pub fn text(hidden: Tensor) -> Self {
        Self {
            hidden,
            pooled: None,
            size: None,
            guidance: None,
        }
    }

    /// The same conditioning with a guidance embedding, `[B, G]`, or without one.
    #[must_use]
    pub fn with_guidance(self, guidance: Option<Tensor>) -> Self {
        Self { guidance, ..self }
    }

    /// Number of samples, `B`.
    ///
    /// # Errors
    /// When `hidden` has no dimensions.
    pub fn batch_size(&self) -> Result<usize> {
        self.hidden.dim(0)
    }

    /// Samples `start..start + count`: every tensor `[B, …]` → `[count, …]`.
    ///
    /// # Errors
    /// When there are fewer samples.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        self.map(|tensor| tensor.narrow(0, start, count))
    }

    /// One sample for each of `batch`: every tensor `[1, …]` → `[batch, …]`, contiguous.
    ///
    /// # Errors
    /// When there is more than one sample.
    pub fn repeat(&self, batch: usize) -> Result<Self> {
        self.map(|tensor| {
            let mut shape = tensor.dims().to_vec();
            shape[0] = batch;
            tensor.broadcast_as(shape)?.contiguous()
        })
    }

    /// The samples of `parts` one after another.
    ///
    /// # Errors
    /// When the parts differ in their shapes or in the tensors they have.
    pub fn cat(parts: &[Self]) -> Result<Self> {
        let optional = |field: fn(&Self) -> &Option<Tensor>| {
            let tensors: Vec<&Tensor> = parts
                .iter()
                .filter_map(|part| field(part).as_ref())
                .collect();
            match tensors.len() {
                0 => Ok(None),
                found if found == parts.len() => Tensor::cat(&tensors, 0).map(Some),
                found => candle_core::bail!(
                    "{found} of {} conditionings have a tensor that the others lack",
                    parts.len()
                ),
            }
        };
        let hidden: Vec<&Tensor> = parts.iter().map(|part| &part.hidden).collect();
        Ok(Self {
            hidden: Tensor::cat(&hidden, 0)?,
            pooled: optional(|part| &part.pooled)?,
            size: optional(|part| &part.size)?,
            guidance: optional(|part| &part.guidance)?,
        })
    }

    /// Replaces the text (`hidden` and `pooled`) of the samples marked in `replaced` by that of `other`, one sample, `[1, …]`.
    /// Size and guidance stay.
    ///
    /// # Errors
    /// When the shapes differ, or one of the two has a pooled embedding and the other has none.
    pub fn replace_text(&self, replaced: &[bool], other: &Self) -> Result<Self> {
        if !replaced.contains(&true) {
            return Ok(self.clone());
        }
        let mask: Vec<u8> = replaced.iter().map(|&replaced| replaced.into()).collect();
        let mask = Tensor::from_vec(mask, replaced.len(), self.hidden.device())?;
        let select = |own: &Tensor, other: &Tensor| {
            let mut shape = vec![1; own.rank()];
            shape[0] = replaced.len();
            let mask = mask.reshape(shape)?.broadcast_as(own.shape())?;
            mask.where_cond(&other.broadcast_as(own.shape())?, own)
        };
        let pooled = match (&self.pooled, &other.pooled) {
            (Some(own), Some(other)) => Some(select(own, other)?),
            (None, None) => None,
            _ => candle_core::bail!("only one of two conditionings has a pooled text embedding"),
        };
        Ok(Self {
            hidden: select(&self.hidden, &other.hidden)?,
            pooled,
            ..self.clone()
        })
    }

    /// The same tensors on `device`; no copy where they are there already.
    ///
    /// # Errors
    /// When the device can't hold them.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(|tensor| tensor.to_device(device))
    }

    fn map(&self, change: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let optional = |tensor: &Option<Tensor>| tensor.as_ref().map(&change).transpose();
        Ok(Self {
            hidden: change(&self.hidden)?,
            pooled: optional(&self.pooled)?,
            size: optional(&self.size)?,
            guidance: optional(&self.guidance)?,
        })
    }
}

/// A network that predicts noise, the clean latents or the velocity, as its noise schedule says.
pub trait Denoiser: fmt::Debug + Send + Sync {
    /// Raw prediction for noisy latents `[B, C, h, w]` at one timestep a sample → `[B, C, h, w]` in the latents' dtype.
    ///
    /// # Errors
    /// When the shapes or the conditioning do not fit the network.
    fn forward(
        &self,
        latents: &Tensor,
        timesteps: &[i64],
        conditioning: &Conditioning,
    ) -> Result<Tensor>;

    /// Width `G` of the guidance embedding it takes; `None` for a network that takes none.
    fn guidance_width(&self) -> Option<usize>;
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    fn rows(values: &[f32]) -> Result<Tensor> {
        Tensor::from_slice(values, (values.len(), 1, 1), &Device::Cpu)
    }

    fn values(conditioning: &Conditioning) -> Result<Vec<f32>> {
        conditioning.hidden.flatten_all()?.to_vec1()
    }

    #[test]
    fn conditioning_replaces_the_text_of_marked_samples() -> Result<()> {
        let batch = Conditioning::text(rows(&[1.0, 2.0, 3.0])?);
        let empty = Conditioning::text(rows(&[9.0])?);
        let replaced = batch.replace_text(&[false, true, false], &empty)?;
        assert_eq!(values(&replaced)?, [1.0, 9.0, 3.0]);
        assert_eq!(
            values(&batch.replace_text(&[false; 3], &empty)?)?,
            [1.0, 2.0, 3.0]
        );
        let pooled = Conditioning {
            pooled: Some(Tensor::zeros((1, 2), DType::F32, &Device::Cpu)?),
            ..empty
        };
        assert!(batch.replace_text(&[true; 3], &pooled).is_err());
        Ok(())
    }

    #[test]
    fn conditioning_is_cut_repeated_and_joined() -> Result<()> {
        let batch = Conditioning::text(rows(&[1.0, 2.0, 3.0])?);
        let (first, rest) = (batch.narrow(0, 1)?, batch.narrow(1, 2)?);
        assert_eq!(values(&first.repeat(2)?)?, [1.0, 1.0]);
        assert_eq!(
            values(&Conditioning::cat(&[first.clone(), rest.clone()])?)?,
            values(&batch)?
        );
        let guided = first.with_guidance(Some(rows(&[0.5])?.flatten_from(1)?));
        assert!(Conditioning::cat(&[guided, rest]).is_err());
        Ok(())
    }
}
