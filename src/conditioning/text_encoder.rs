//! The frozen text encoders of a pipeline with their tokenizers on one device.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::models::{
    ClipTextModel, ClipTokenizer, Conditioning, ModelError, PenultimateStates, TextParts,
    forces_zeros,
};

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

/// The conditioning without a caption in classifier-free guidance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unconditional {
    /// The empty caption, encoded.
    Empty,
    /// Zeros in place of hidden states and pooled embedding.
    Zeros,
}

/// Text encoders and tokenizers of a pipeline: one of each, or two of SDXL.
///
/// With one, the hidden states are its `last_hidden_state`. With two they are `hidden_states[-2]` of both side by side, and the pooled
/// embedding is the second one's projection (`encode_prompt` of diffusers' `StableDiffusionXLPipeline`).
#[derive(Debug)]
pub struct TextEncoder {
    first: ClipEncoder,
    second: Option<ClipEncoder>,
    unconditional: Unconditional,
}

/// A text encoder with its tokenizer.
#[derive(Debug)]
struct ClipEncoder {
    model: ClipTextModel,
    tokenizer: ClipTokenizer,
}

impl ClipEncoder {
    fn new(model: ClipTextModel, tokenizer: ClipTokenizer) -> Result<Self, ModelError> {
        tokenizer.check_embeddings(model.vocabulary())?;
        Ok(Self { model, tokenizer })
    }

    /// Ids of captions, and for each whether it was cut.
    fn ids<S: AsRef<str>>(&self, captions: &[S]) -> Result<(Vec<Vec<u32>>, Vec<bool>), ModelError> {
        let encoded = captions
            .iter()
            .map(|caption| self.tokenizer.encode(caption.as_ref()))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(encoded
            .into_iter()
            .map(|caption| (caption.ids, caption.truncated))
            .unzip())
    }
}

impl TextEncoder {
    /// Loads the text encoders and tokenizers of the pipeline in the folder `pipeline`. The weights are held in `dtype` and
    /// computed with in it.
    ///
    /// # Errors
    /// When a file is missing or does not describe a CLIP text encoder, a tokenizer has more or fewer tokens than its text
    /// encoder, or two tokenizers make rows of different lengths.
    pub fn load(pipeline: &Path, dtype: DType, device: &Device) -> Result<Self, ModelError> {
        let TextParts { first, second } = TextParts::of(pipeline);
        let tokenizer = ClipTokenizer::load(&first.tokenizer)?;
        let model = ClipTextModel::load(&first.text_encoder, dtype, device)?;
        let first = ClipEncoder::new(model, tokenizer)?;
        let second = second.map(|second| {
            let tokenizer = ClipTokenizer::load(&second.tokenizer)?;
            let folder = &second.text_encoder;
            let model = ClipTextModel::load_with_projection(folder, dtype, device)?;
            tokenizer.check_length(first.tokenizer.length())?;
            ClipEncoder::new(model, tokenizer)
        });
        let second = second.transpose()?;
        let zeros = second.is_some() && forces_zeros(pipeline)?;
        Ok(Self {
            first,
            second,
            unconditional: if zeros {
                Unconditional::Zeros
            } else {
                Unconditional::Empty
            },
        })
    }

    /// Tokens of the tokenizer; of the first of two.
    pub fn tokens(&self) -> usize {
        self.first.tokenizer.tokens()
    }

    /// Width `W` of the hidden states, of all text encoders together.
    pub fn width(&self) -> usize {
        self.models().map(ClipTextModel::width).sum()
    }

    /// Width `P` of the pooled embedding; `None` with one text encoder.
    pub fn pooled_width(&self) -> Option<usize> {
        self.second.as_ref()?.model.projection_width()
    }

    /// Numbers of a head of attention, of each text encoder.
    pub fn head_widths(&self) -> Vec<usize> {
        self.models().map(ClipTextModel::head_width).collect()
    }

    /// The pipeline's own conditioning without a caption: zeros for two text encoders, unless `model_index.json` has
    /// `force_zeros_for_empty_prompt` = false.
    pub fn own_unconditional(&self) -> Unconditional {
        self.unconditional
    }

    fn models(&self) -> impl Iterator<Item = &ClipTextModel> {
        let second = self.second.as_ref();
        [Some(&self.first), second]
            .into_iter()
            .flatten()
            .map(|part| &part.model)
    }

    /// Conditioning on `B` captions, f32 on the encoder's device: hidden states `[B, T, W]`, where `T` is the tokenizer's
    /// `model_max_length`, and with two text encoders a pooled embedding `[B, P]`.
    ///
    /// # Errors
    /// When a caption can't be tokenized or a tensor operation fails.
    pub fn encode<S: AsRef<str>>(&self, captions: &[S]) -> Result<EncodedText, TextEncoderError> {
        let (ids, mut cut) = self.first.ids(captions)?;
        let conditioning = match &self.second {
            None => Conditioning::text(self.first.model.forward(&ids)?.to_dtype(DType::F32)?),
            Some(second) => {
                let first = self.first.model.penultimate(&ids)?.hidden;
                let (ids, cut_by_second) = second.ids(captions)?;
                for (cut, by_second) in cut.iter_mut().zip(cut_by_second) {
                    *cut |= by_second;
                }
                let PenultimateStates { hidden, pooled } = second.model.penultimate(&ids)?;
                let hidden = Tensor::cat(&[first, hidden], 2)?.to_dtype(DType::F32)?;
                Conditioning {
                    pooled: pooled.map(|p| p.to_dtype(DType::F32)).transpose()?,
                    ..Conditioning::text(hidden)
                }
            }
        };
        Ok(EncodedText {
            conditioning,
            truncated: cut.into_iter().filter(|cut| *cut).count(),
        })
    }

    /// Conditioning on no caption, of one sample.
    ///
    /// # Errors
    /// As [`TextEncoder::encode`].
    pub fn unconditional(&self, kind: Unconditional) -> Result<Conditioning, TextEncoderError> {
        let empty = self.encode(&[""])?.conditioning;
        Ok(match kind {
            Unconditional::Empty => empty,
            Unconditional::Zeros => Conditioning {
                hidden: empty.hidden.zeros_like()?,
                pooled: empty.pooled.map(|p| p.zeros_like()).transpose()?,
                ..empty
            },
        })
    }
}
