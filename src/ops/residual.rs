//! Sums of tensors, and tensors joined along their channels: residual and skip connections.
//!
//! On devices other than CUDA these are candle's own operations.

use candle_core::{D, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use super::cuda;

/// `a + b` of one shape and dtype.
///
/// # Errors
/// When the shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(a) && a.dims() == b.dims() && a.dtype() == b.dtype() {
        return cuda::add(a, b);
    }
    a.add(b)
}

/// `row`, `[C]`, added to each row of `x`, `[…, C]`, both of one dtype.
///
/// # Errors
/// When the shapes do not fit together.
pub fn add_to_rows(x: &Tensor, row: &Tensor) -> Result<Tensor> {
    if row.dims() != [x.dim(D::Minus1)?] {
        bail!("add_to_rows: x is {:?}, row {:?}", x.dims(), row.dims());
    }
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) && x.dtype() == row.dtype() {
        return cuda::add_to_rows(x, row);
    }
    x.broadcast_add(row)
}

/// `[B, C, …]` and `[B, D, …]` → `[B, C + D, …]`, as `torch.cat((a, b), 1)`.
///
/// # Errors
/// When the shapes do not fit together.
pub fn concatenate(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(a)
        && a.dtype() == b.dtype()
        && a.dim(0)? == b.dim(0)?
        && a.dims().get(2..) == b.dims().get(2..)
    {
        return cuda::concatenate(a, b);
    }
    Tensor::cat(&[a, b], 1)
}
