//! diffusers' `Transformer2DModel` over feature maps.

use candle_core::{Result, Tensor};

use super::layers::{GroupNorm, LayerNorm, Linear, Projection};
use super::{ModelError, Scope};
use crate::ops::{self, Attention};

/// The sizes of one `Transformer2DModel`.
#[derive(Clone, Copy, Debug)]
pub(super) struct TransformerConfig {
    pub(super) channels: usize,
    /// Width of the tokens: heads times channels per head, which is less than `channels` where those do not divide.
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) layers: usize,
    pub(super) cross_attention_dim: usize,
    /// Whether the first attention looks at the text, too.
    pub(super) only_cross_attention: bool,
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
        let c = config.width;
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
    only_cross_attention: bool,
}

impl TransformerBlock {
    fn new(scope: &Scope<'_>, config: &TransformerConfig) -> std::result::Result<Self, ModelError> {
        const EPS: f64 = 1e-5;
        let (c, text) = (config.width, config.cross_attention_dim);
        let first = if config.only_cross_attention { text } else { c };
        Ok(Self {
            norm1: LayerNorm::new(&scope.sub("norm1"), c, EPS)?,
            attn1: AttentionLayer::new(&scope.sub("attn1"), config, first)?,
            norm2: LayerNorm::new(&scope.sub("norm2"), c, EPS)?,
            attn2: AttentionLayer::new(&scope.sub("attn2"), config, text)?,
            norm3: LayerNorm::new(&scope.sub("norm3"), c, EPS)?,
            ff_in: Linear::new(&scope.sub("ff.net.0.proj"), c, 8 * c)?,
            ff_out: Linear::new(&scope.sub("ff.net.2"), 4 * c, c)?,
            only_cross_attention: config.only_cross_attention,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let normed = self.norm1.forward(x)?;
        let first = match self.only_cross_attention {
            true => context,
            false => &normed,
        };
        let x = self.attn1.forward(&normed, first)?.add(x)?;
        let x = self
            .attn2
            .forward(&self.norm2.forward(&x)?, context)?
            .add(&x)?;
        let hidden = ops::geglu(&self.ff_in.forward(&self.norm3.forward(&x)?)?)?;
        self.ff_out.forward(&hidden)?.add(&x)
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
        let (channels, width, linear) = (config.channels, config.width, config.linear_projection);
        Ok(Self {
            norm: GroupNorm::new(&scope.sub("norm"), channels, config.groups, 1e-6)?,
            proj_in: Projection::new(&scope.sub("proj_in"), channels, width, linear)?,
            blocks: (0..config.layers)
                .map(|i| TransformerBlock::new(&scope.sub("transformer_blocks").sub(i), config))
                .collect::<std::result::Result<_, _>>()?,
            proj_out: Projection::new(&scope.sub("proj_out"), width, channels, linear)?,
        })
    }

    /// `x`: `[B, C, H, W]`, `context`: `[B, T, cross_attention_dim]` → `[B, C, H, W]`.
    pub(super) fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        let mut tokens = self.proj_in.to_tokens(&self.norm.forward(x)?)?;
        for block in &self.blocks {
            tokens = block.forward(&tokens, context)?;
        }
        self.proj_out.to_map(&tokens, (h, w))?.add(x)
    }
}
