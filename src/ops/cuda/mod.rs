//! The operations on CUDA devices: kernels of our own in `kernels/`, cuDNN's convolutions, cuBLAS's products.
//!
//! Each operation is a [`TensorOp`](super::autograd_op::TensorOp) whose forward and backward launch kernels. Kernels take
//! contiguous `f32`, `f16` and `bf16` tensors and compute in `f32`; no sum depends on the order in which threads finish.
//!
//! Tests run the same code without a GPU: there the kernels are compiled for the CPU ([`host`]) and take its tensors.

mod activation;
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
mod upsample;

#[cfg(feature = "cuda")]
use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
pub(super) use activation::{geglu, gelu, quick_gelu, silu};
#[cfg(feature = "cuda")]
pub(super) use cast::cast;
#[cfg(feature = "cuda")]
pub(super) use conv::conv2d;
#[cfg(feature = "cuda")]
pub(super) use linear::linear;
#[cfg(feature = "cuda")]
pub(super) use norm::{group_norm, layer_norm};
#[cfg(feature = "cuda")]
pub(super) use projection::{map_to_tokens, tokens_to_map};
#[cfg(feature = "cuda")]
pub(super) use residual::{add, add_to_rows, concatenate};
#[cfg(feature = "cuda")]
pub(super) use upsample::upsample_nearest_2x;

/// Whether the kernels take a tensor.
#[cfg(feature = "cuda")]
pub(super) fn has_kernel(x: &Tensor) -> bool {
    x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16)
}
