//! Functions with a backward of their own, as nodes of candle's graph.
//!
//! An [`AutogradOp`] is such a node. candle has one trait for each number of operands; this file is the one place that
//! implements them. A [`TensorOp`] is a function over tensors, of which [`PrecomputedOp`] makes a node on any device.

use std::sync::{Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape,
    Storage, Tensor, Var, backend::BackendStorage, bail, op::BackpropOp,
};

use super::backward::accumulate_variable_grad;
use super::tape::Tape;

/// A node of the graph with `N` operands.
pub(super) trait AutogradOp<const N: usize>: Send + Sync + 'static {
    /// Named in errors.
    const NAME: &'static str;

    /// The result on the CPU, and its shape.
    fn cpu_forward(&self, operands: [(&CpuStorage, &Layout); N]) -> Result<(CpuStorage, Shape)>;

    /// The result with CUDA, and its shape.
    fn cuda_forward(&self) -> Result<(CudaStorage, Shape)> {
        bail!("{} has no CUDA kernel", Self::NAME)
    }

    /// The result with Metal, and its shape.
    fn metal_forward(&self) -> Result<(MetalStorage, Shape)> {
        bail!("{} has no Metal kernel", Self::NAME)
    }

    /// The result outside candle's graph.
    fn result(&self, operands: [&Tensor; N]) -> Result<OpResult> {
        let operands = operands.map(Tensor::storage_and_layout);
        if !operands.iter().all(|(s, _)| matches!(**s, Storage::Cpu(_))) {
            bail!("{} has a kernel for the CPU only", Self::NAME);
        }
        let on_cpu = operands.each_ref().map(|(storage, layout)| match &**storage {
            Storage::Cpu(storage) => (storage, *layout),
            _ => unreachable!("checked above"),
        });
        let (storage, shape) = self.cpu_forward(on_cpu)?;
        Ok(OpResult::Owned(Storage::Cpu(storage), shape))
    }

    /// A gradient for each operand that is tracked, of its shape and dtype, given the result's.
    fn backward(&self, operands: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]>;

    /// As [`Self::backward`], for an operation that needs its result again.
    fn backward_with_result(
        &self,
        operands: [&Tensor; N],
        _result: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        self.backward(operands, grad)
    }
}

/// `op` of one tensor.
pub(super) fn apply1(op: impl AutogradOp<1>, x: &Tensor) -> Result<Tensor> {
    apply(op, [x], |op| x.apply_op1(op))
}

/// `op` of two tensors.
pub(super) fn apply2(op: impl AutogradOp<2>, [a, b]: [&Tensor; 2]) -> Result<Tensor> {
    apply(op, [a, b], |op| a.apply_op2(b, op))
}

/// `op` of three tensors.
pub(super) fn apply3(op: impl AutogradOp<3>, [a, b, c]: [&Tensor; 3]) -> Result<Tensor> {
    apply(op, [a, b, c], |op| a.apply_op3(b, c, op))
}

/// Records `op` on the tape of this thread if there is one; else makes it a node of candle's graph.
fn apply<F: AutogradOp<N>, const N: usize>(
    op: F,
    operands: [&Tensor; N],
    node: impl FnOnce(CandleOp<F>) -> Result<Tensor>,
) -> Result<Tensor> {
    if !Tape::is_recording() || !operands.into_iter().any(Tensor::track_op) {
        return node(CandleOp(op));
    }
    let result = op.result(operands)?;
    Tape::push(operands, result, move |operands, result, grad| {
        op.backward_with_result(operands, result, grad)
    })
}

/// An operation as candle's traits want it.
struct CandleOp<F>(F);

/// The gradients for candle to go on with. Gradients of variables are accumulated and not among them.
fn gradients<F: AutogradOp<N>, const N: usize>(
    op: &F,
    operands: [&Tensor; N],
    result: &Tensor,
    grad: &Tensor,
) -> Result<[Option<Tensor>; N]> {
    let mut grads = op.backward_with_result(operands, result, grad)?;
    for (operand, grad) in operands.into_iter().zip(&mut grads) {
        *grad = accumulate_variable_grad(operand, grad.take())?;
    }
    Ok(grads)
}

impl<F: AutogradOp<1>> CustomOp1 for CandleOp<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.cpu_forward([(x, xl)])
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.cuda_forward()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.0.metal_forward()
    }

    fn bwd(&self, x: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [x] = gradients(&self.0, [x], result, grad)?;
        Ok(x)
    }
}

impl<F: AutogradOp<2>> CustomOp2 for CandleOp<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        al: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.cpu_forward([(a, al), (b, bl)])
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.cuda_forward()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.0.metal_forward()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        gradients(&self.0, [a, b], result, grad).map(|[a, b]| (a, b))
    }
}

impl<F: AutogradOp<3>> CustomOp3 for CandleOp<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        al: &Layout,
        b: &CpuStorage,
        bl: &Layout,
        c: &CpuStorage,
        cl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.cpu_forward([(a, al), (b, bl), (c, cl)])
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.cuda_forward()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.0.metal_forward()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        gradients(&self.0, [a, b, c], result, grad).map(|[a, b, c]| (a, b, c))
    }
}

/// The gradient of an operand, if that is tracked.
pub(super) fn if_tracked(
    operand: &Tensor,
    gradient: impl FnOnce() -> Result<Tensor>,
) -> Result<Option<Tensor>> {
    operand.track_op().then(gradient).transpose()
}

/// A function of `N` tensors, made of tensor operations, with a backward of its own.
pub(super) trait TensorOp<const N: usize>: Send + Sync + 'static {
    /// Named in errors.
    const NAME: &'static str;

    /// The result for operands that carry no graph.
    fn forward(&self, operands: [&Tensor; N]) -> Result<OpResult>;

    /// As [`AutogradOp::backward`].
    fn backward(&self, operands: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]>;

    /// As [`Self::backward`], for an operation that needs its result again.
    fn backward_with_result(
        &self,
        operands: [&Tensor; N],
        _result: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        self.backward(operands, grad)
    }
}

/// The result of a [`TensorOp`].
#[derive(Debug)]
pub(super) enum OpResult {
    /// A tensor whose storage others may share. As a node of the graph it is copied: candle gives no way to move its storage.
    Shared(Tensor),
    /// Storage of its own, contiguous, with its shape.
    Owned(Storage, Shape),
}

impl OpResult {
    /// The result as a tensor without a graph.
    pub(super) fn into_tensor(self) -> Tensor {
        match self {
            Self::Shared(tensor) => tensor,
            Self::Owned(storage, shape) => {
                Tensor::from_storage(storage, shape, BackpropOp::none(), false)
            }
        }
    }

    /// The result as a variable: a leaf of candle's graph.
    pub(super) fn into_variable(self) -> Result<Tensor> {
        Ok(match self {
            Self::Shared(tensor) => Var::from_tensor(&tensor)?.into_inner(),
            Self::Owned(storage, shape) => {
                Tensor::from_storage(storage, shape, BackpropOp::none(), true)
            }
        })
    }
}

impl From<Tensor> for OpResult {
    fn from(tensor: Tensor) -> Self {
        Self::Shared(tensor)
    }
}

/// `op` of one tensor, as a node of the graph if the tensor is tracked.
pub(super) fn apply_tensor_op1(op: impl TensorOp<1>, x: &Tensor) -> Result<Tensor> {
    let value = op.forward([&x.detach()])?;
    if !x.track_op() {
        return Ok(value.into_tensor());
    }
    apply1(PrecomputedOp::new(op, value), x)
}

/// `op` of two tensors, as a node of the graph if one of them is tracked.
#[cfg(any(feature = "cuda", test))]
pub(super) fn apply_tensor_op2(op: impl TensorOp<2>, operands: [&Tensor; 2]) -> Result<Tensor> {
    let [a, b] = operands.map(Tensor::detach);
    let value = op.forward([&a, &b])?;
    if !operands.into_iter().any(Tensor::track_op) {
        return Ok(value.into_tensor());
    }
    apply2(PrecomputedOp::new(op, value), operands)
}

/// `op` of three tensors, as a node of the graph if one of them is tracked.
pub(super) fn apply_tensor_op3(op: impl TensorOp<3>, operands: [&Tensor; 3]) -> Result<Tensor> {
    let [a, b, c] = operands.map(Tensor::detach);
    let value = op.forward([&a, &b, &c])?;
    if !operands.into_iter().any(Tensor::track_op) {
        return Ok(value.into_tensor());
    }
    apply3(PrecomputedOp::new(op, value), operands)
}

/// A [`TensorOp`] and its result, which candle asks for once, as storage.
pub(super) struct PrecomputedOp<F> {
    op: F,
    value: Mutex<Option<OpResult>>,
}

impl<F> PrecomputedOp<F> {
    pub(super) fn new(op: F, value: impl Into<OpResult>) -> Self {
        let value = Mutex::new(Some(value.into()));
        Self { op, value }
    }

    fn take(&self) -> Result<OpResult> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        match value.take() {
            Some(value) => Ok(value),
            None => bail!("an operation's result was asked for twice"),
        }
    }

    /// The storage of the result: moved by `own`, or copied by `copy`; both give `None` for another device's storage.
    fn storage<S>(
        &self,
        own: impl FnOnce(Storage) -> Option<S>,
        copy: impl FnOnce(&Storage, &Layout) -> Result<Option<S>>,
    ) -> Result<(S, Shape)> {
        let (storage, shape) = match self.take()? {
            OpResult::Owned(storage, shape) => (own(storage), shape),
            OpResult::Shared(tensor) => {
                let (storage, layout) = tensor.storage_and_layout();
                (copy(&storage, layout)?, layout.shape().clone())
            }
        };
        match storage {
            Some(storage) => Ok((storage, shape)),
            None => bail!("an operation's result is on another device than its operands"),
        }
    }
}

/// A contiguous copy: what candle's cast gives, whatever the layout.
fn copied<S: BackendStorage>(storage: &S, layout: &Layout) -> Result<S> {
    storage.to_dtype(layout, storage.dtype())
}

impl<F: TensorOp<N>, const N: usize> AutogradOp<N> for PrecomputedOp<F> {
    const NAME: &'static str = F::NAME;

    fn result(&self, _: [&Tensor; N]) -> Result<OpResult> {
        self.take()
    }

    fn cpu_forward(&self, _: [(&CpuStorage, &Layout); N]) -> Result<(CpuStorage, Shape)> {
        self.storage(
            |storage| match storage {
                Storage::Cpu(s) => Some(s),
                _ => None,
            },
            |storage, layout| match storage {
                Storage::Cpu(s) => copied(s, layout).map(Some),
                _ => Ok(None),
            },
        )
    }

    fn cuda_forward(&self) -> Result<(CudaStorage, Shape)> {
        self.storage(
            |storage| match storage {
                Storage::Cuda(s) => Some(s),
                _ => None,
            },
            |storage, layout| match storage {
                Storage::Cuda(s) => copied(s, layout).map(Some),
                _ => Ok(None),
            },
        )
    }

    fn metal_forward(&self) -> Result<(MetalStorage, Shape)> {
        self.storage(
            |storage| match storage {
                Storage::Metal(s) => Some(s),
                _ => None,
            },
            |storage, layout| match storage {
                Storage::Metal(s) => copied(s, layout).map(Some),
                _ => Ok(None),
            },
        )
    }

    fn backward(&self, operands: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]> {
        self.op.backward(operands, grad)
    }

    fn backward_with_result(
        &self,
        operands: [&Tensor; N],
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        self.op.backward_with_result(operands, result, grad)
    }
}
