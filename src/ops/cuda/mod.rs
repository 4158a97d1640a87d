//! The operations on CUDA devices: kernels of our own in `kernels/`, cuDNN's convolutions, cuBLAS's products.
//!
//! Each operation is a [`AutogradOp`](super::autograd_op::AutogradOp) whose forward and backward launch kernels. Kernels take
//! contiguous `f32`, `f16` and `bf16` tensors and compute in `f32`; no sum depends on the order in which threads finish.
//!
//! Tests run the same code without a GPU: there the kernels are compiled for the CPU ([`host`]) and take its tensors.

mod activation;
mod attention;
mod bias;
mod cast;
mod conv;
#[cfg(feature = "cudnn")]
mod cudnn;
mod gpu;
#[cfg(test)]
mod host;
mod linear;
mod matmul;
mod norm;
mod projection;
mod residual;
mod update;
mod upsample;

#[cfg(feature = "cuda")]
use candle_core::{DType, Tensor};

pub(super) use attention::WIDEST as WIDEST_HEAD;
pub(super) use update::adamw_steps;
#[cfg(feature = "cuda")]
pub(super) use {
    activation::{geglu, gelu, quick_gelu, silu},
    attention::{attention, has_attention_kernel},
    cast::cast,
    conv::conv2d,
    linear::linear,
    norm::{group_norm, layer_norm},
    projection::{map_to_tokens, tokens_to_map},
    residual::{add, add_to_rows, concatenate},
    update::{ema_updates, squared_norms},
    upsample::upsample_nearest_2x,
};

/// Whether the kernels take a tensor.
#[cfg(feature = "cuda")]
pub(super) fn has_kernel(x: &Tensor) -> bool {
    x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// Whether the kernels of optimiser arithmetic change these tensors.
#[cfg(feature = "cuda")]
pub(super) fn has_update_kernel<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> bool {
    let mut tensors = tensors.into_iter();
    tensors.all(|x| x.device().is_cuda() && x.dtype() == DType::F32)
}
