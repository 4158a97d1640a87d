//! diffusers' `Transformer2DModel` over feature maps.

use candle_core::{Result, Tensor};

use super::layers::{Conv2d, GroupNorm, LayerNorm, Linear};
use super::{ModelError, Scope};
use crate::ops::{self, Attention};

/// The sizes of one `Transformer2DModel`.
#[derive(Clone, Copy, Debug)]
pub(super) struct TransformerConfig {
    pub(super) channels: usize,
    pub(super) heads: usize,
    pub(super) layers: usize,
    pub(super) cross_attention_dim: usize,
    pub(super) groups: usize,
    pub(super) linear_projection: bool,
    pub(super) attention: Attention,
}

#[derive(Clone, Debug)]
struct AttentionLayer {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
    kind: Attention,
}

impl AttentionLayer {
    fn new(
        scope: &Scope<'_>,
        config: &TransformerConfig,
        context: usize,
    ) -> std::result::Result<Self, ModelError> {
        let c = config.channels;
        Ok(Self {
            to_q: Linear::without_bias(&scope.sub("to_q"), c, c)?,
            to_k: Linear::without_bias(&scope.sub("to_k"), context, c)?,
            to_v: Linear::without_bias(&scope.sub("to_v"), context, c)?,
            to_out: Linear::new(&scope.sub("to_out.0"), c, c)?,
            heads: config.heads,
            kind: config.attention,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (q, k, v) = (
            self.to_q.forward(x)?,
            self.to_k.forward(context)?,
            self.to_v.forward(context)?,
        );
        self.to_out
            .forward(&ops::attention(&q, &k, &v, self.heads, false, self.kind)?)
    }
}

#[derive(Clone, Debug)]
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: AttentionLayer,
    norm2: LayerNorm,
    attn2: AttentionLayer,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
}

impl TransformerBlock {
    fn new(scope: &Scope<'_>, config: &TransformerConfig) -> std::result::Result<Self, ModelError> {
        const EPS: f64 = 1e-5;
        let c = config.channels;
        Ok(Self {
            norm1: LayerNorm::new(&scope.sub("norm1"), c, EPS)?,
            attn1: AttentionLayer::new(&scope.sub("attn1"), config, c)?,
            norm2: LayerNorm::new(&scope.sub("norm2"), c, EPS)?,
            attn2: AttentionLayer::new(&scope.sub("attn2"), config, config.cross_attention_dim)?,
            norm3: LayerNorm::new(&scope.sub("norm3"), c, EPS)?,
            ff_in: Linear::new(&scope.sub("ff.net.0.proj"), c, 8 * c)?,
            ff_out: Linear::new(&scope.sub("ff.net.2"), 4 * c, c)?,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let normed = self.norm1.forward(x)?;
        let x = self.attn1.forward(&normed, &normed)?.add(x)?;
        let x = self
            .attn2
            .forward(&self.norm2.forward(&x)?, context)?
            .add(&x)?;
        let hidden = ops::geglu(&self.ff_in.forward(&self.norm3.forward(&x)?)?)?;
        self.ff_out.forward(&hidden)?.add(&x)
    }
}

#[derive(Clone, Debug)]
enum Projection {
    Conv(Conv2d),
    Linear(Linear),
}

impl Projection {
    fn new(scope: &Scope<'_>, config: &TransformerConfig) -> std::result::Result<Self, ModelError> {
        let c = config.channels;
        Ok(match config.linear_projection {
            true => Self::Linear(Linear::new(scope, c, c)?),
            false => Self::Conv(Conv2d::pointwise(scope, c, c)?),
        })
    }
}

/// Self- and cross-attention over the pixels of a feature map, with a residual connection.
#[derive(Clone, Debug)]
pub(super) struct Transformer2d {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<TransformerBlock>,
    proj_out: Projection,
}

impl Transformer2d {
    pub(super) fn new(
        scope: &Scope<'_>,
        config: &TransformerConfig,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self {
            norm: GroupNorm::new(&scope.sub("norm"), config.channels, config.groups, 1e-6)?,
            proj_in: Projection::new(&scope.sub("proj_in"), config)?,
            blocks: (0..config.layers)
                .map(|i| TransformerBlock::new(&scope.sub("transformer_blocks").sub(i), config))
                .collect::<std::result::Result<_, _>>()?,
            proj_out: Projection::new(&scope.sub("proj_out"), config)?,
        })
    }

    /// `x`: `[B, C, H, W]`, `context`: `[B, T, cross_attention_dim]` → `[B, C, H, W]`.
    pub(super) fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let to_tokens = |t: &Tensor| t.reshape((b, c, h * w))?.transpose(1, 2)?.contiguous();
        let to_map = |t: &Tensor| t.transpose(1, 2)?.contiguous()?.reshape((b, c, h, w));
        let normed = self.norm.forward(x)?;
        let mut tokens = match &self.proj_in {
            Projection::Conv(conv) => to_tokens(&conv.forward(&normed)?)?,
            Projection::Linear(linear) => linear.forward(&to_tokens(&normed)?)?,
        };
        for block in &self.blocks {
            tokens = block.forward(&tokens, context)?;
        }
        match &self.proj_out {
            Projection::Conv(conv) => conv.forward(&to_map(&tokens)?)?.add(x),
            Projection::Linear(linear) => to_map(&linear.forward(&tokens)?)?.add(x),
        }
    }
}
