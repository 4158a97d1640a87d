//! diffusers' `Transformer2DModel` over feature maps.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::adapter::adaptable;
use super::layers::{GroupNorm, LayerNorm, Linear, Projection};
use crate::ops::{self, Attention};

/// The sizes of one `Transformer2DModel`.
#[derive(Clone, Copy, Debug)]
pub(super) struct TransformerConfig {
    pub(super) channels: usize,
    /// Width of the tokens: heads times channels per head, which is less than `channels` if `heads` does not divide it.
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) layers: usize,
    pub(super) cross_attention_dim: usize,
    /// Whether the first attention reads the text, too, instead of the tokens themselves.
    pub(super) only_cross_attention: bool,
    pub(super) groups: usize,
    pub(super) linear_projection: bool,
    pub(super) attention: Attention,
}

/// diffusers' `Attention`.
#[derive(Clone, Debug)]
struct AttentionLayer {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
    kind: Attention,
}

adaptable!(AttentionLayer: to_q, to_k, to_v, to_out);

impl AttentionLayer {
    /// `context`: width of the keys' and values' input.
    fn new(vb: VarBuilder<'_>, config: &TransformerConfig, context: usize) -> Result<Self> {
        let c = config.width;
        Ok(Self {
            to_q: Linear::without_bias(vb.pp("to_q"), c, c)?,
            to_k: Linear::without_bias(vb.pp("to_k"), context, c)?,
            to_v: Linear::without_bias(vb.pp("to_v"), context, c)?,
            to_out: Linear::new(vb.pp("to_out.0"), c, c)?,
            heads: config.heads,
            kind: config.attention,
        })
    }

    /// `x`: `[B, N, width]`, `context`: `[B, T, …]` → `[B, N, width]`.
    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let q = x.apply(&self.to_q)?;
        let k = context.apply(&self.to_k)?;
        let v = context.apply(&self.to_v)?;
        ops::attention(&q, &k, &v, self.heads, false, self.kind)?.apply(&self.to_out)
    }
}

/// diffusers' `BasicTransformerBlock`.
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

adaptable!(TransformerBlock: attn1, attn2, ff_in, ff_out);

impl TransformerBlock {
    fn new(vb: VarBuilder<'_>, config: &TransformerConfig) -> Result<Self> {
        const EPS: f64 = 1e-5;
        let (c, text) = (config.width, config.cross_attention_dim);
        let first = if config.only_cross_attention { text } else { c };
        Ok(Self {
            norm1: LayerNorm::new(vb.pp("norm1"), c, EPS)?,
            attn1: AttentionLayer::new(vb.pp("attn1"), config, first)?,
            norm2: LayerNorm::new(vb.pp("norm2"), c, EPS)?,
            attn2: AttentionLayer::new(vb.pp("attn2"), config, text)?,
            norm3: LayerNorm::new(vb.pp("norm3"), c, EPS)?,
            ff_in: Linear::new(vb.pp("ff.net.0.proj"), c, 8 * c)?,
            ff_out: Linear::new(vb.pp("ff.net.2"), 4 * c, c)?,
            only_cross_attention: config.only_cross_attention,
        })
    }

    /// `x`: `[B, N, width]`, `context`: `[B, T, cross_attention_dim]` → `[B, N, width]`.
    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let normed = x.apply(&self.norm1)?;
        let first = if self.only_cross_attention {
            context
        } else {
            &normed
        };
        let x = ops::add(&self.attn1.forward(&normed, first)?, x)?;
        let normed = x.apply(&self.norm2)?;
        let x = ops::add(&self.attn2.forward(&normed, context)?, &x)?;
        let hidden = x.apply(&self.norm3)?.apply(&self.ff_in)?;
        ops::add(&ops::geglu(&hidden)?.apply(&self.ff_out)?, &x)
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

adaptable!(Transformer2d: proj_in, blocks, proj_out);

impl Transformer2d {
    pub(super) fn new(vb: VarBuilder<'_>, config: &TransformerConfig) -> Result<Self> {
        let (channels, width, linear) = (config.channels, config.width, config.linear_projection);
        Ok(Self {
            norm: GroupNorm::new(vb.pp("norm"), channels, config.groups, 1e-6)?,
            proj_in: Projection::new(vb.pp("proj_in"), channels, width, linear)?,
            blocks: (0..config.layers)
                .map(|i| TransformerBlock::new(vb.pp("transformer_blocks").pp(i), config))
                .collect::<Result<_>>()?,
            proj_out: Projection::new(vb.pp("proj_out"), width, channels, linear)?,
        })
    }

    /// `x`: `[B, C, H, W]`, `context`: `[B, T, cross_attention_dim]` → `[B, C, H, W]`.
    pub(super) fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        let mut tokens = self.proj_in.to_tokens(&x.apply(&self.norm)?)?;
        for block in &self.blocks {
            tokens = block.forward(&tokens, context)?;
        }
        ops::add(&self.proj_out.to_map(&tokens, (h, w))?, x)
    }
}
