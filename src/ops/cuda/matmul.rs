//! Products of matrices by cuBLAS, through candle's storage: sums of 16-bit numbers are in `f32`, and those of `f32` too unless
//! TF32 is allowed.

use candle_core::backend::BackendStorage;
use candle_core::{Result, Shape, Storage, Tensor, bail};

use super::gpu::Output;

/// `a · b`, in a shape that holds as many numbers. Neither is copied.
///
/// Both are matrices, or both batches of matrices, and each is contiguous, or the transpose of what is; one matrix for all of
/// a batch is a view that [`Tensor::broadcast_left`] gives.
pub(super) fn matmul(a: &Tensor, b: &Tensor, shape: impl Into<Shape>) -> Result<Output> {
    let shape = shape.into();
    let (batch, m, n, k) = match (a.dims(), b.dims()) {
        (&[m, k], &[l, n]) if k == l => (1, m, n, k),
        (&[batch, m, k], &[other, l, n]) if batch == other && k == l => (batch, m, n, k),
        (a, b) => bail!("a product of {a:?} and {b:?}"),
    };
    if shape.elem_count() != batch * m * n {
        bail!("a product of {batch} x {m} x {n} numbers as {shape:?}");
    }
    #[cfg(test)]
    let b = &for_the_cpu(a, b)?;
    let (a_storage, a_layout) = a.storage_and_layout();
    let (b_storage, b_layout) = b.storage_and_layout();
    let product = match (&*a_storage, &*b_storage) {
        #[cfg(feature = "cuda")]
        (Storage::Cuda(a), Storage::Cuda(b)) => {
            Storage::Cuda(a.matmul(b, (batch, m, n, k), a_layout, b_layout)?)
        }
        #[cfg(test)]
        (Storage::Cpu(a), Storage::Cpu(b)) => {
            Storage::Cpu(a.matmul(b, (batch, m, n, k), a_layout, b_layout)?)
        }
        _ => bail!("no product of tensors on {:?}", a.device()),
    };
    Ok(Output::of(product, shape))
}

/// Checks that cuBLAS would take the operands as they are, and gives `b` as the CPU's product takes it: that is wrong for a
/// transposed `a` with one matrix for all of the batch (candle-core 0.11.1).
#[cfg(test)]
fn for_the_cpu(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    for x in [a, b] {
        let [.., rows, columns] = *x.dims() else {
            bail!("no matrix: {:?}", x.dims());
        };
        let [ref batch @ .., down, right] = *x.stride() else {
            bail!("no matrix: {:?}", x.stride());
        };
        let plain = (right == 1 || columns == 1) && (down == columns || rows == 1);
        let transposed = (right == rows || columns == 1) && (down == 1 || rows == 1);
        assert!(plain || transposed, "cuBLAS takes no {:?}", x.layout());
        assert!(batch.len() <= 1, "cuBLAS takes no {:?}", x.layout());
    }
    if b.device().is_cpu() && b.stride()[0] == 0 {
        b.contiguous()
    } else {
        Ok(b.clone())
    }
}
