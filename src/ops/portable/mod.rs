//! The operations of candle's tensor operations: for devices other than the CPU, and the reference that kernels are held against.
//!
//! They run wherever candle does (with cuDNN's convolution where that is compiled in). candle does not differentiate them:
//! each has a backward of its own, which keeps the operands and nothing else, computes no gradient for an operand that is not
//! tracked, and sums 16-bit numbers in `f32`.

mod activation;
mod attention;
mod conv;
mod linear;
mod norm;
mod projection;
#[cfg(test)]
mod tests;
mod update;
mod upsample;

use candle_core::{DType, Result, Tensor};

use super::autograd_op::if_tracked;

pub(super) use activation::{geglu, quick_gelu};
pub(super) use attention::{attention, plain_attention};
pub(super) use conv::conv2d;
pub(super) use linear::linear;
pub(super) use norm::{group_norm, layer_norm};
pub(super) use projection::{map_to_tokens, tokens_to_map};
pub(super) use update::{adamw_step, adamw8bit_step, ema_update, squared_norm};
pub(super) use upsample::upsample_nearest_2x;

/// 16-bit numbers as `f32`, in which sums and statistics are computed; others as they are.
fn wide(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32),
        _ => Ok(x.clone()),
    }
}
