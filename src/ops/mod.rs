//! Operations that candle lacks for training: a fast backward, and gradients that reach every parameter.
//!
//! candle's layer norm, softmax over the last dimension and `sdpa` drop their gradients without an error, and the backward of
//! its convolution is several times slower than the forward. The functions here are differentiable, compute no gradient for
//! operands that are not tracked, and give the same numbers for any number of threads.
//!
//! Each operation has three files of one name:
//!
//! - `ops/NAME.rs`: the public function. It checks the shapes and chooses between the other two.
//! - `ops/cpu/NAME.rs`: a kernel over slices, for floats on the CPU (`f64` is for checks against finite differences).
//! - `ops/portable/NAME.rs`: the same out of candle's tensor operations, for any device.
//!
//! An operation that takes time in a step on a GPU has `ops/cuda/NAME.rs` too, with kernels in `ops/cuda/kernels/NAME.cu`.
//!
//! This module knows tensors and nothing of diffusion.

mod activation;
mod activation_checkpoint;
mod adamw8bit;
mod attention;
mod autograd_op;
mod backward;
mod cast;
mod conv;
mod cpu;
#[cfg(any(feature = "cuda", test))]
mod cuda;
mod describe;
mod dynamic_map;
mod half;
mod linear;
mod norm;
mod portable;
mod projection;
mod residual;
mod tape;
mod update;
mod upsample;

#[cfg(test)]
mod gradcheck;
#[cfg(test)]
mod pytorch;

pub use activation::{geglu, gelu, quick_gelu, silu};
pub use activation_checkpoint::{Activations, activation_checkpoint};
pub use adamw8bit::{BlockMoments, BlockQuantized};
pub use attention::{Attention, attention};
pub use backward::gradients;
pub use cast::cast;
pub use conv::{conv2d, convolves_alike};
pub use describe::{NetworkAttention, describe};
pub use linear::linear;
pub use norm::{group_norm, layer_norm};
pub use projection::{map_to_tokens, tokens_to_map};
pub use residual::{add, add_to_rows, concatenate};
pub use tape::no_grad;
pub use update::{
    AdamWMoments, AdamWStep, AdamWUpdate, EmaUpdate, adamw_steps, ema_updates, squared_norms,
};
pub use upsample::upsample_nearest_2x;

use candle_core::{DType, Device, Result, Tensor};

use self::tape::Recording;

/// Runs `work`, a chain of operations on tensors of `device`, on a thread of rayon's pool if that is the CPU.
///
/// From outside the pool each operation would wake a thread of it and sleep until that is done, which for small tensors costs
/// as much as the work. The result is the same. The work of another device stays on the calling thread: its operations only go to the
/// device's queue, and cuDNN has a state for each thread.
pub fn in_pool<R: Send>(device: &Device, work: impl FnOnce() -> R + Send) -> R {
    if device.is_cpu() {
        let recording = Recording::take();
        let (result, recording) = rayon::scope(|_| recording.run(work));
        recording.put_back();
        result
    } else {
        work()
    }
}

/// Whether all numbers of a tensor of floats are finite.
///
/// # Errors
/// When the device can't compute it.
pub fn all_finite(tensor: &Tensor) -> Result<bool> {
    // Not a number times 0 is not a number, nor is an infinity times 0.
    let zeros = (tensor.to_dtype(DType::F32)? * 0.0)?;
    Ok(zeros.sum_all()?.to_scalar::<f32>()? == 0.0)
}

/// `bias`, or `len` zeros in the dtype and on the device of `like`: an operation has a fixed number of operands.
fn bias_or_zeros(bias: Option<&Tensor>, len: usize, like: &Tensor) -> Result<Tensor> {
    match bias {
        Some(bias) => Ok(bias.clone()),
        None => Tensor::zeros(len, like.dtype(), like.device()),
    }
}
