//! The operations on the CPU: kernels over slices, on rayon's pool.
//!
//! Kernels compute in `f32` and `f64`; 16-bit tensors are widened for them. Every sum is in an order that depends on shapes
//! alone, never on the number of threads.
//!
//! Loops over elements are functions marked `pulp::with_simd`: compiled once for each vector unit, with everything
//! `#[inline(always)]` below them, and chosen at run time. A closure would be compiled for the baseline alone.

mod activation;
mod adamw8bit;
mod attention;
mod conv;
mod gemm;
mod kernel;
mod linear;
mod norm;
mod projection;
mod real;
mod reduce;
mod update;
mod upsample;

pub(super) use activation::{geglu, quick_gelu};
pub(super) use adamw8bit::adamw8bit_step;
pub(super) use attention::attention;
pub(super) use conv::conv2d;
pub use conv::convolves_alike;
pub(super) use kernel::{TensorView, has_kernel};
pub(super) use linear::linear;
pub(super) use norm::{group_norm, layer_norm};
pub(super) use projection::{map_to_tokens, tokens_to_map};
pub(super) use update::{adamw_step, ema_update, squared_norm};
pub(super) use upsample::upsample_nearest_2x;
