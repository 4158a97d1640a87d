//! The frozen text encoder and its tokenizer on one device.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::EncodeError;
use crate::models::{ClipTextModel, ClipTokenizer, ModelError};

/// Text encoder and tokenizer of a pipeline.
#[derive(Debug)]
pub struct TextEncoder {
    model: ClipTextModel,
    tokenizer: ClipTokenizer,
    device: Device,
}

impl TextEncoder {
    /// Loads them from a pipeline's folder.
    ///
    /// # Errors
    /// When the folder does not hold what it should.
    pub fn load(pipeline: &Path, device: &Device) -> Result<Self, ModelError> {
        Ok(Self {
            model: ClipTextModel::load(&pipeline.join("text_encoder"), DType::F32, device)?,
            tokenizer: ClipTokenizer::load(&pipeline.join("tokenizer"))?,
            device: device.clone(),
        })
    }

    /// Width of the embeddings.
    pub fn width(&self) -> usize {
        self.model.width()
    }

    /// Text embeddings of captions: `[B, 77, width]`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn encode<S: AsRef<str>>(&self, captions: &[S]) -> Result<Tensor, EncodeError> {
        let ids: Vec<Vec<u32>> = captions
            .iter()
            .map(|caption| self.tokenizer.encode(caption.as_ref()))
            .collect::<Result<_, _>>()?;
        self.model
            .forward(&ids)
            .map_err(EncodeError::on(&self.device))
    }
}
