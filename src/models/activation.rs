//! The activation functions that a `config.json` may name.
//!
//! `candle_nn::Activation` is not used: it lacks the quick GELU, and its Mish overflows where `eˣ` does.

use candle_core::{Module, Result, Tensor};

use crate::ops;

/// An activation of diffusers' `get_activation` or transformers' `ACT2FN`. As a [`Module`] it keeps shape and dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activation {
    /// `x·σ(x)`; diffusers also calls it swish.
    Silu,
    /// `x·tanh(ln(1 + eˣ))`.
    Mish,
    /// The exact GELU, `x·Φ(x)`.
    Gelu,
    /// `x·σ(1.702·x)`, of text encoders only.
    QuickGelu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// The names that [`Activation::of_diffusers`] knows.
    pub(super) const DIFFUSERS: &'static str = "\"silu\", \"swish\", \"mish\", \"gelu\", \"relu\"";
    /// The names that [`Activation::of_clip`] knows.
    pub(super) const CLIP: &'static str = "\"quick_gelu\", \"gelu\"";

    /// By diffusers' name, in upper or lower case.
    pub(super) fn of_diffusers(name: &str) -> Option<Self> {
        match name.to_lowercase().as_str() {
            "silu" | "swish" => Some(Self::Silu),
            "mish" => Some(Self::Mish),
            "gelu" => Some(Self::Gelu),
            "relu" => Some(Self::Relu),
            _ => None,
        }
    }

    /// By the name that a CLIP text encoder's `hidden_act` gives.
    pub(super) fn of_clip(name: &str) -> Option<Self> {
        match name {
            "quick_gelu" => Some(Self::QuickGelu),
            "gelu" => Some(Self::Gelu),
            _ => None,
        }
    }
}

impl Module for Activation {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => ops::silu(x),
            Self::Mish => {
                // tanh(ln(1 + e)) = n / (n + 2) with n = e·(e + 2); from x = 20 on it is 1 in f32, and e must not overflow.
                let e = x.minimum(20f64)?.exp()?;
                let n = e.mul(&(&e + 2.0)?)?;
                x.mul(&n.div(&(&n + 2.0)?)?)
            }
            Self::Gelu => ops::gelu(x),
            Self::QuickGelu => ops::quick_gelu(x),
            Self::Relu => x.relu(),
        }
    }
}
