//! A frozen text encoder with its tokenizer on one device.

use std::path::Path;

use candle_core::{DType, Device};

use crate::models::{ClipTextModel, ClipTokenizer, Conditioning, ModelError};

/// Why captions could not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TextEncoderError {
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] ModelError),
    /// The text encoder failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Encoded captions.
#[derive(Clone, Debug)]
pub struct EncodedText {
    /// Conditioning on the captions.
    pub conditioning: Conditioning,
    /// Number of captions that have more tokens than fit, and were cut.
    pub truncated: usize,
}

/// Text encoder and tokenizer of a pipeline.
#[derive(Debug)]
pub struct TextEncoder {
    model: ClipTextModel,
    tokenizer: ClipTokenizer,
}

impl TextEncoder {
    /// Loads `text_encoder/` and `tokenizer/` of the pipeline in the folder `pipeline`. The weights are held in `dtype` and
    /// computed with in it.
    ///
    /// # Errors
    /// When a file is missing or does not describe a CLIP text encoder, or the tokenizer has more or fewer tokens than the text
    /// encoder.
    pub fn load(pipeline: &Path, dtype: DType, device: &Device) -> Result<Self, ModelError> {
        let tokenizer = ClipTokenizer::load(&pipeline.join("tokenizer"))?;
        let model = ClipTextModel::load(&pipeline.join("text_encoder"), dtype, device)?;
        tokenizer.check_embeddings(model.vocabulary())?;
        Ok(Self { model, tokenizer })
    }

    /// Tokens of the tokenizer.
    pub fn tokens(&self) -> usize {
        self.tokenizer.tokens()
    }

    /// Width `W` of the hidden states.
    pub fn width(&self) -> usize {
        self.model.width()
    }

    /// Numbers of a head of attention.
    pub fn head_width(&self) -> usize {
        self.model.head_width()
    }

    /// Conditioning on `B` captions: hidden states `[B, T, W]` f32 on the encoder's device, where `T` is the tokenizer's
    /// `model_max_length`.
    ///
    /// # Errors
    /// When a caption can't be tokenized or a tensor operation fails.
    pub fn encode<S: AsRef<str>>(&self, captions: &[S]) -> Result<EncodedText, TextEncoderError> {
        let mut ids = Vec::with_capacity(captions.len());
        let mut truncated = 0;
        for caption in captions {
            let caption = self.tokenizer.encode(caption.as_ref())?;
            truncated += usize::from(caption.truncated);
            ids.push(caption.ids);
        }
        let hidden = self.model.forward(&ids)?.to_dtype(DType::F32)?;
        Ok(EncodedText {
            conditioning: Conditioning::text(hidden),
            truncated,
        })
    }
}
