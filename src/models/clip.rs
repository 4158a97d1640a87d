//! `CLIPTextModel`: token ids to text embeddings.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use serde_json::json;

use super::config::ConfigFile;
use super::layers::{LayerNorm, Linear};
use super::{ModelError, Scope, Weights};
use crate::ops::{self, Attention};

#[derive(Clone, Copy, Debug)]
enum Activation {
    QuickGelu,
    Gelu,
}

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
    fn new(
        scope: &Scope<'_>,
        width: usize,
        hidden: usize,
        eps: f64,
    ) -> std::result::Result<Self, ModelError> {
        let attention = |name: &str| Linear::new(&scope.sub("self_attn").sub(name), width, width);
        Ok(Self {
            layer_norm1: LayerNorm::new(&scope.sub("layer_norm1"), width, eps)?,
            q_proj: attention("q_proj")?,
            k_proj: attention("k_proj")?,
            v_proj: attention("v_proj")?,
            out_proj: attention("out_proj")?,
            layer_norm2: LayerNorm::new(&scope.sub("layer_norm2"), width, eps)?,
            fc1: Linear::new(&scope.sub("mlp.fc1"), width, hidden)?,
            fc2: Linear::new(&scope.sub("mlp.fc2"), hidden, width)?,
        })
    }

    fn forward(&self, x: &Tensor, heads: usize, activation: Activation) -> Result<Tensor> {
        let normed = self.layer_norm1.forward(x)?;
        let (q, k) = (self.q_proj.forward(&normed)?, self.k_proj.forward(&normed)?);
        let v = self.v_proj.forward(&normed)?;
        let attended = ops::attention(&q, &k, &v, heads, true, Attention::MemoryEfficient)?;
        let x = self.out_proj.forward(&attended)?.add(x)?;
        let hidden = self.fc1.forward(&self.layer_norm2.forward(&x)?)?;
        let hidden = match activation {
            Activation::QuickGelu => ops::quick_gelu(&hidden)?,
            Activation::Gelu => hidden.gelu_erf()?,
        };
        self.fc2.forward(&hidden)?.add(&x)
    }
}

/// transformers' `CLIPTextModel`, up to `last_hidden_state`.
#[derive(Clone, Debug)]
pub struct ClipTextModel {
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
    heads: usize,
    activation: Activation,
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
        let file = ConfigFile::read(folder)?;
        file.only("model_type", &[json!("clip_text_model")])?;
        let width: usize = file.get("hidden_size", 512)?;
        let hidden = file.get("intermediate_size", 2048)?;
        let heads: usize = file.get("num_attention_heads", 8)?;
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(file.unsupported(
                "num_attention_heads",
                heads,
                format!("a divisor of {width}"),
            ));
        }
        let eps = file.get("layer_norm_eps", 1e-5)?;
        let activation = match file.get("hidden_act", "quick_gelu".to_owned())?.as_str() {
            "quick_gelu" => Activation::QuickGelu,
            "gelu" => Activation::Gelu,
            other => {
                return Err(file.unsupported(
                    "hidden_act",
                    format!("\"{other}\""),
                    "\"quick_gelu\", \"gelu\"",
                ));
            }
        };
        let weights = Weights::load(folder, "model", dtype, device)?;
        // transformers 5 drops the text_model prefix, older versions write it.
        let root = weights.root();
        let scope = if root.has("text_model") {
            root.sub("text_model")
        } else {
            root
        };
        let embeddings = scope.sub("embeddings");
        let vocab = file.get("vocab_size", 49408)?;
        let positions = file.get("max_position_embeddings", 77)?;
        let model = Self {
            token_embedding: embeddings.get("token_embedding.weight", &[vocab, width])?,
            position_embedding: embeddings.get("position_embedding.weight", &[positions, width])?,
            layers: (0..file.get("num_hidden_layers", 12)?)
                .map(|i: usize| Layer::new(&scope.sub("encoder.layers").sub(i), width, hidden, eps))
                .collect::<std::result::Result<_, _>>()?,
            final_layer_norm: LayerNorm::new(&scope.sub("final_layer_norm"), width, eps)?,
            heads,
            activation,
        };
        // A table of 0, 1, 2 … of older versions, and what CLIPTextModelWithProjection has besides.
        weights.expect_all_taken(&["embeddings.position_ids", "text_projection.weight"])?;
        Ok(model)
    }

    /// Width of the embeddings.
    pub fn width(&self) -> usize {
        self.token_embedding.dims()[1]
    }

    /// `last_hidden_state` of `ids`: `B` rows of equal length `T` → `[B, T, width]`.
    ///
    /// # Errors
    /// When an id is not in the vocabulary or a row is too long.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let (b, t) = (ids.len(), ids.first().map_or(0, Vec::len));
        let flat: Vec<u32> = ids.iter().flatten().copied().collect();
        let (vocabulary, positions) = (
            self.token_embedding.dim(0)?,
            self.position_embedding.dim(0)?,
        );
        if let Some(id) = flat.iter().find(|&&id| id as usize >= vocabulary) {
            candle_core::bail!(
                "token {id} is not in the text encoder's vocabulary of {vocabulary}: the tokenizer is another model's"
            );
        }
        if t > positions {
            candle_core::bail!("{t} tokens, but the text encoder has {positions} positions");
        }
        let ids = Tensor::from_vec(flat, b * t, self.token_embedding.device())?;
        let tokens = self
            .token_embedding
            .index_select(&ids, 0)?
            .reshape((b, t, self.width()))?;
        let mut x = tokens.broadcast_add(&self.position_embedding.narrow(0, 0, t)?)?;
        ops::in_pool(|| {
            for layer in &self.layers {
                x = layer.forward(&x, self.heads, self.activation)?;
            }
            self.final_layer_norm.forward(&x)
        })
    }
}
