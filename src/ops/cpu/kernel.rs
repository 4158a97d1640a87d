//! Kernels as operations on tensors: the one place where slices of floats meet tensors.
//!
//! 16-bit operands are widened to `f32` for the kernel, and its results are rounded: as a matrix unit does.

use std::borrow::Cow;

use candle_core::{
    CpuStorage, DType, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, WithDType,
    backend::BackendStorage, bail,
};
use half::{bf16, f16};

use super::real::Real;
use crate::ops::autograd_op::{self, AutogradOp, OpResult};
use crate::ops::half::{narrow, widen};

/// A differentiable operation on `N` contiguous CPU tensors, written over slices. Each slice is a tensor, row-major.
pub(super) trait Kernel<const N: usize>: Send + Sync + 'static {
    /// Named in errors.
    const NAME: &'static str;

    /// The shape of the result.
    fn shape(&self) -> Shape;

    /// The result, of [`Self::shape`].
    fn forward<T: Real>(&self, operands: [&[T]; N]) -> Vec<T>;

    /// The gradients of the operands that are `wanted`, of their shapes, given that of the result, `grad`.
    fn backward<T: Real>(
        &self,
        operands: [&[T]; N],
        grad: &[T],
        wanted: [bool; N],
    ) -> [Option<Vec<T>>; N];
}

/// Whether the kernels take this tensor. [`portable`](super::super::portable) takes the others.
pub(in crate::ops) fn has_kernel(tensor: &Tensor) -> bool {
    let dtypes = [DType::F32, DType::F64, DType::F16, DType::BF16];
    tensor.device().is_cpu() && dtypes.contains(&tensor.dtype())
}

/// Applies a kernel to tensors of any layout.
pub(super) fn apply<const N: usize>(
    kernel: impl Kernel<N>,
    operands: [&Tensor; N],
) -> Result<Tensor> {
    let mut contiguous = operands.map(Tensor::clone);
    for operand in &mut contiguous {
        *operand = operand.contiguous()?;
    }
    autograd_op::apply(KernelOp(kernel), contiguous.each_ref())
}

/// A type that kernels compute in.
trait Computes: Real {
    /// The elements of a contiguous operand.
    fn read<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [Self]>>;
    /// Results, as `dtype`.
    fn write(values: Vec<Self>, dtype: DType) -> CpuStorage;
}

impl Computes for f32 {
    fn read<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [f32]>> {
        Ok(match storage {
            CpuStorage::F16(_) => Cow::Owned(widen(slice::<f16>(storage, layout)?)),
            CpuStorage::BF16(_) => Cow::Owned(widen(slice::<bf16>(storage, layout)?)),
            _ => Cow::Borrowed(slice(storage, layout)?),
        })
    }

    fn write(values: Vec<f32>, dtype: DType) -> CpuStorage {
        match dtype {
            DType::F16 | DType::BF16 => narrow(&values, dtype),
            _ => CpuStorage::F32(values),
        }
    }
}

impl Computes for f64 {
    fn read<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [f64]>> {
        slice(storage, layout).map(Cow::Borrowed)
    }

    fn write(values: Vec<f64>, _: DType) -> CpuStorage {
        CpuStorage::F64(values)
    }
}

/// Calls `$f::<f32, …>` or `$f::<f64, …>`, whichever a dtype is computed in.
macro_rules! by_dtype {
    ($dtype:expr, $name:expr, $f:ident ( $($arg:expr),* $(,)? )) => {
        match $dtype {
            DType::F32 | DType::F16 | DType::BF16 => $f::<f32, _, _>($($arg),*),
            DType::F64 => $f::<f64, _, _>($($arg),*),
            other => bail!("{} on the CPU takes floats, not {other:?}", $name),
        }
    };
}

/// A kernel as an operation.
struct KernelOp<K>(K);

impl<K: Kernel<N>, const N: usize> AutogradOp<N> for KernelOp<K> {
    const NAME: &'static str = K::NAME;

    fn forward(&self, operands: [&Tensor; N]) -> Result<OpResult> {
        let dtype = operands[0].dtype();
        let result = by_dtype!(dtype, K::NAME, forward(&self.0, operands))?;
        Ok(OpResult::Owned(Storage::Cpu(result), self.0.shape()))
    }

    fn backward(&self, operands: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]> {
        let grad = grad.contiguous()?;
        by_dtype!(grad.dtype(), K::NAME, backward(&self.0, operands, &grad))
    }
}

fn forward<T: Computes, K: Kernel<N>, const N: usize>(
    kernel: &K,
    operands: [&Tensor; N],
) -> Result<CpuStorage> {
    let views = operands.map(TensorView::of);
    let values = each(views.each_ref(), TensorView::read::<T>)?;
    let result = kernel.forward(values.each_ref().map(AsRef::as_ref));
    Ok(T::write(result, operands[0].dtype()))
}

fn backward<T: Computes, K: Kernel<N>, const N: usize>(
    kernel: &K,
    operands: [&Tensor; N],
    grad: &Tensor,
) -> Result<[Option<Tensor>; N]> {
    let views = operands.map(TensorView::of);
    let values = each(views.each_ref(), TensorView::read::<T>)?;
    let grad_view = TensorView::of(grad);
    let wanted = operands.map(Tensor::track_op);
    let slices = values.each_ref().map(AsRef::as_ref);
    let grads = kernel.backward(slices, &grad_view.read::<T>()?, wanted);
    let mut grads = grads.into_iter();
    each(operands, |operand| {
        let grad = grads.next().flatten();
        grad.map(|g| tensor(T::write(g, operand.dtype()), operand.shape()))
            .transpose()
    })
}

fn tensor(values: CpuStorage, shape: &Shape) -> Result<Tensor> {
    match values {
        CpuStorage::F32(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        CpuStorage::F64(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        CpuStorage::F16(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        CpuStorage::BF16(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        other => bail!("a gradient of {:?}", other.dtype()),
    }
}

/// `array.map` for functions that can fail. Returns the first error.
fn each<A, B: Default, const N: usize>(
    array: [A; N],
    mut f: impl FnMut(A) -> Result<B>,
) -> Result<[B; N]> {
    let mut failure = None;
    let mapped = array.map(|a| {
        f(a).unwrap_or_else(|error| {
            failure.get_or_insert(error);
            B::default()
        })
    });
    failure.map_or(Ok(mapped), Err)
}

/// The elements of a contiguous operand of a custom op.
pub(super) fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&T::cpu_storage_as_slice(storage)?[start..end]),
        None => bail!("an operand of a coffey operation must be contiguous"),
    }
}

/// A contiguous CPU tensor, locked for reading as a slice.
pub(in crate::ops) struct TensorView<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> TensorView<'a> {
    pub(in crate::ops) fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    pub(in crate::ops) fn slice<T: WithDType>(&self) -> Result<&[T]> {
        slice(self.cpu()?, self.layout)
    }

    fn read<T: Computes>(&self) -> Result<Cow<'_, [T]>> {
        T::read(self.cpu()?, self.layout)
    }

    fn cpu(&self) -> Result<&CpuStorage> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => bail!("expected a CPU tensor"),
        }
    }
}
