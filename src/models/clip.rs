//! `CLIPTextModel` and `CLIPTextModelWithProjection`: token ids to text embeddings.

use std::ops::RangeInclusive;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Embedding, VarBuilder, embedding};
use serde_json::json;

use super::activation::Activation;
use super::config::{ConfigFile, range};
use super::layers::{LayerNorm, Linear};
use super::{ModelError, TEXT_ENCODER_STEM, Weights};
use crate::ops::{self, Attention};

/// transformers' `CLIPEncoderLayer`.
#[derive(Clone, Debug)]
struct Layer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Layer {
    fn new(vb: VarBuilder<'_>, width: usize, hidden: usize, eps: f64) -> Result<Self> {
        let attention = |name: &str| Linear::new(vb.pp("self_attn").pp(name), width, width);
        Ok(Self {
            layer_norm1: LayerNorm::new(vb.pp("layer_norm1"), width, eps)?,
            q_proj: attention("q_proj")?,
            k_proj: attention("k_proj")?,
            v_proj: attention("v_proj")?,
            out_proj: attention("out_proj")?,
            layer_norm2: LayerNorm::new(vb.pp("layer_norm2"), width, eps)?,
            fc1: Linear::new(vb.pp("mlp.fc1"), width, hidden)?,
            fc2: Linear::new(vb.pp("mlp.fc2"), hidden, width)?,
        })
    }

    /// `x`: `[B, T, width]` → the same shape. The attention is causal.
    fn forward(&self, x: &Tensor, heads: usize, activation: Activation) -> Result<Tensor> {
        let normed = x.apply(&self.layer_norm1)?;
        let q = normed.apply(&self.q_proj)?;
        let k = normed.apply(&self.k_proj)?;
        let v = normed.apply(&self.v_proj)?;
        let attended = ops::attention(&q, &k, &v, heads, true, Attention::MemoryEfficient)?;
        let x = ops::add(&attended.apply(&self.out_proj)?, x)?;
        let hidden = x
            .apply(&self.layer_norm2)?
            .apply(&self.fc1)?
            .apply(&activation)?
            .apply(&self.fc2)?;
        ops::add(&hidden, &x)
    }
}

/// Results of a text encoder for SDXL.
#[derive(Clone, Debug)]
pub struct PenultimateStates {
    /// transformers' `hidden_states[-2]`: the input of the last layer, `[B, T, width]`, without the final norm.
    pub hidden: Tensor,
    /// transformers' `text_embeds`, `[B, projection]`, for a text encoder with a projection.
    pub pooled: Option<Tensor>,
}

/// transformers' `CLIPTextModel`, or `CLIPTextModelWithProjection`.
#[derive(Clone, Debug)]
pub struct ClipTextModel {
    token_embedding: Embedding,
    position_embedding: Embedding,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
    projection: Option<Projection>,
    heads: usize,
    activation: Activation,
}

/// The projection of the final state at the end of a caption.
#[derive(Clone, Debug)]
struct Projection {
    linear: Linear,
    /// `eos_token_id` of `config.json`.
    end: u32,
}

impl Projection {
    /// Position of a caption's end in its ids, as transformers finds it: the first `eos_token_id`; for 2, which older configurations
    /// have in place of the tokenizer's id, the first of the highest id.
    fn end_of(&self, ids: &[u32]) -> u32 {
        let end = match self.end {
            2 => ids.iter().copied().max().unwrap_or_default(),
            end => end,
        };
        ids.iter().position(|&id| id == end).unwrap_or(0) as u32
    }
}

impl ClipTextModel {
    /// Reads a text encoder's folder.
    ///
    /// # Errors
    /// When the folder is not a text encoder that coffey builds; file, key or tensor are named.
    pub fn load(
        folder: &Path,
        dtype: DType,
        device: &Device,
    ) -> std::result::Result<Self, ModelError> {
        Self::load_as(folder, dtype, device, false)
    }

    /// Reads the folder of a `CLIPTextModelWithProjection`.
    ///
    /// # Errors
    /// As [`ClipTextModel::load`], and when it has no projection.
    pub fn load_with_projection(
        folder: &Path,
        dtype: DType,
        device: &Device,
    ) -> std::result::Result<Self, ModelError> {
        Self::load_as(folder, dtype, device, true)
    }

    fn load_as(
        folder: &Path,
        dtype: DType,
        device: &Device,
        projected: bool,
    ) -> std::result::Result<Self, ModelError> {
        let file = ConfigFile::read(folder)?;
        file.only("model_type", &[json!("clip_text_model")]);
        /// Rows of an embedding, and the width inside a layer.
        const ROWS: RangeInclusive<usize> = 1..=10_000_000;
        let width = file.whole("hidden_size", 512, range::WIDTH);
        let hidden = file.whole("intermediate_size", 2048, ROWS);
        let heads = file.whole("num_attention_heads", 8, range::WIDTH);
        if !width.is_multiple_of(heads) {
            let known = format!("a divisor of {width}");
            file.refuse("num_attention_heads", heads, known);
        }
        let eps = file.real("layer_norm_eps", 1e-5, range::EPS);
        let (vocab, positions) = (
            file.whole("vocab_size", 49408, ROWS),
            file.whole("max_position_embeddings", 77, ROWS),
        );
        let layers = file.whole("num_hidden_layers", 12, range::LAYERS);
        let projection = projected.then(|| {
            let width = file.whole("projection_dim", 512, range::WIDTH);
            let end = file.whole("eos_token_id", 49407, 0..=u32::MAX as usize);
            (width, end as u32)
        });
        let name: String = file.get("hidden_act", "quick_gelu".to_owned());
        let activation = Activation::of_clip(&name)
            .ok_or_else(|| file.unsupported("hidden_act", format!("\"{name}\""), Activation::CLIP));
        let activation = file.finish(activation)?;
        let weights = Weights::load(folder, TEXT_ENCODER_STEM, dtype, device)?;
        // transformers 5 drops the text_model prefix, older versions write it.
        let root = weights.builder();
        let prefixed = root.contains_tensor("text_model.embeddings.token_embedding.weight");
        let vb = if prefixed {
            root.pp("text_model")
        } else {
            root
        };
        let embeddings = vb.pp("embeddings");
        let projection = projection.map(|(outputs, end)| -> Result<Projection> {
            let vb = weights.builder().pp("text_projection");
            Ok(Projection {
                linear: Linear::without_bias(vb, width, outputs)?,
                end,
            })
        });
        let model = Self {
            token_embedding: embedding(vocab, width, embeddings.pp("token_embedding"))?,
            position_embedding: embedding(positions, width, embeddings.pp("position_embedding"))?,
            layers: (0..layers)
                .map(|i| Layer::new(vb.pp("encoder.layers").pp(i), width, hidden, eps))
                .collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::new(vb.pp("final_layer_norm"), width, eps)?,
            projection: projection.transpose()?,
            heads,
            activation,
        };
        // Older versions write a table of 0, 1, 2 …; a projection is used where one is asked for.
        weights.expect_all_taken(&["embeddings.position_ids", "text_projection.weight"])?;
        Ok(model)
    }

    /// Width of the embeddings.
    pub fn width(&self) -> usize {
        self.token_embedding.hidden_size()
    }

    /// Number of token embeddings.
    pub fn vocabulary(&self) -> usize {
        self.token_embedding.embeddings().dims()[0]
    }

    /// Width of the pooled embedding, for a text encoder with a projection.
    pub fn projection_width(&self) -> Option<usize> {
        Some(self.projection.as_ref()?.linear.outputs())
    }

    /// Numbers of a head of attention.
    pub fn head_width(&self) -> usize {
        self.width() / self.heads
    }

    /// `last_hidden_state` of transformers' `CLIPTextModel.forward`.
    ///
    /// `ids`: `B` rows of one length `T` → `[B, T, width]` in the dtype of the weights.
    ///
    /// # Errors
    /// When an id is not in the vocabulary or a row is too long.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let x = self.embed(ids)?;
        ops::in_pool(&x.device().clone(), || {
            self.through(&self.layers, x)?.apply(&self.final_layer_norm)
        })
    }

    /// The outputs that SDXL takes of a text encoder: `hidden_states[-2]`, and of one with a projection `text_embeds`, in the dtype of the
    /// weights. Without a projection the last layer is not computed.
    ///
    /// # Errors
    /// As [`ClipTextModel::forward`].
    pub fn penultimate(&self, ids: &[Vec<u32>]) -> Result<PenultimateStates> {
        let x = self.embed(ids)?;
        ops::in_pool(&x.device().clone(), || {
            let (last, before) = match self.layers.split_last() {
                Some((last, before)) => (std::slice::from_ref(last), before),
                None => (&[][..], &[][..]),
            };
            let hidden = self.through(before, x)?;
            let pooled = self.projection.as_ref().map(|projection| {
                let states = self.through(last, hidden.clone())?;
                let ends = ids.iter().map(|row| projection.end_of(row)).enumerate();
                let rows = ends
                    .map(|(row, end)| states.get(row)?.narrow(0, end as usize, 1))
                    .collect::<Result<Vec<_>>>()?;
                Tensor::cat(&rows, 0)?
                    .apply(&self.final_layer_norm)?
                    .apply(&projection.linear)
            });
            Ok(PenultimateStates {
                hidden,
                pooled: pooled.transpose()?,
            })
        })
    }

    fn through(&self, layers: &[Layer], mut x: Tensor) -> Result<Tensor> {
        for layer in layers {
            x = layer.forward(&x, self.heads, self.activation)?;
        }
        Ok(x)
    }

    /// Embeddings of tokens and positions, `[B, T, width]`.
    fn embed(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let (b, t) = (ids.len(), ids.first().map_or(0, Vec::len));
        let flat: Vec<u32> = ids.iter().flatten().copied().collect();
        let tokens = self.token_embedding.embeddings();
        let positions = self.position_embedding.embeddings();
        let vocabulary = tokens.dim(0)?;
        if let Some(id) = flat.iter().find(|&&id| id as usize >= vocabulary) {
            candle_core::bail!(
                "token {id} is not in the text encoder's vocabulary of {vocabulary}: the tokenizer is another model's"
            );
        }
        if t > positions.dim(0)? {
            candle_core::bail!(
                "{t} tokens, but the text encoder has {} positions",
                positions.dim(0)?
            );
        }
        let ids = Tensor::from_vec(flat, (b, t), tokens.device())?;
        ids.apply(&self.token_embedding)?
            .broadcast_add(&positions.narrow(0, 0, t)?)
    }
}
