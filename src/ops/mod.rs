//! What candle lacks for training: layers whose backward is fast and whose gradients reach every parameter.
//!
//! Candle's stock group norm, layer norm, softmax and attention drop their gradients without an error, and its
//! convolution's backward is several times slower than its forward. The functions here are differentiable through
//! [`candle_core::Tensor::backward`], run on rayon's pool, compute no gradient for inputs that are not tracked, and give the same
//! numbers for any number of threads. The kernels are the CPU's and take `f32` and `f64` (`f64` is there for checks
//! against finite differences). On other devices, and for `f16` and `bf16`, the same functions are made of candle's tensor
//! operations, with a backward as fast and as sparing of memory as those allow.
//!
//! This module knows tensors and nothing of diffusion.

mod activation;
mod adamw8bit;
mod attention;
mod backward;
mod cast;
mod computed;
mod conv;
mod cpu;
mod dynamic_map;
mod gemm;
mod kernel;
mod linear;
mod norm;
mod pool;
mod projection;
mod segment;
mod tensor;
mod update;
mod upsample;

#[cfg(test)]
mod gradcheck;

pub use activation::{geglu, quick_gelu};
pub use adamw8bit::{BlockMoments, BlockQuantized, adamw8bit_step};
pub use attention::{Attention, attention};
pub use backward::{Gradients, backward};
pub use cast::cast;
pub use conv::{conv2d, convolves_alike};
pub use linear::linear;
pub use norm::{group_norm, layer_norm};
pub use pool::in_pool;
pub use projection::{map_to_tokens, tokens_to_map};
pub use segment::{Keep, segment};
pub use update::{AdamWStep, adamw_step, ema_update, squared_norm};
pub use upsample::upsample_nearest_2x;
