//! The activation functions that a `config.json` may name.

use candle_core::{Result, Tensor};

/// An activation of diffusers' `get_activation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activation {
    /// `x·σ(x)`; diffusers also calls it swish.
    Silu,
    /// `x·tanh(ln(1 + eˣ))`.
    Mish,
    /// The exact GELU, `x·Φ(x)`.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// The names that [`Activation::named`] knows.
    pub(super) const NAMES: &'static str = "\"silu\", \"swish\", \"mish\", \"gelu\", \"relu\"";

    /// By diffusers' name, whose case does not matter.
    pub(super) fn named(name: &str) -> Option<Self> {
        match name.to_lowercase().as_str() {
            "silu" | "swish" => Some(Self::Silu),
            "mish" => Some(Self::Mish),
            "gelu" => Some(Self::Gelu),
            "relu" => Some(Self::Relu),
            _ => None,
        }
    }

    pub(super) fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => x.silu(),
            Self::Mish => {
                // tanh(ln(1 + e)) = n / (n + 2) with n = e·(e + 2); from x = 20 on it is 1 in f32, and e must not overflow.
                let e = x.minimum(20f64)?.exp()?;
                let n = e.mul(&(&e + 2.0)?)?;
                x.mul(&n.div(&(&n + 2.0)?)?)
            }
            Self::Gelu => x.gelu_erf(),
            Self::Relu => x.relu(),
        }
    }
}
