//! Functions of tensors as nodes of candle's graph, with a backward of their own, on any device.

use std::sync::{Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape,
    Storage, Tensor, backend::BackendStorage, bail,
};

use super::backward::deliver;

/// A function of `N` tensors with a backward of its own.
pub(super) trait TensorOp<const N: usize>: Send + Sync + 'static {
    const NAME: &'static str;

    /// The result for inputs that carry no graph.
    fn forward(&self, inputs: [&Tensor; N]) -> Result<Tensor>;

    /// A gradient for each input that is tracked, of its shape and dtype.
    fn backward(&self, inputs: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]>;
}

/// An operation and its result, which candle asks for once, as storage. The result is copied into the graph: candle gives
/// no way to move a tensor's storage, and the copy is small beside the work.
pub(super) struct Computed<F> {
    op: F,
    value: Mutex<Option<Tensor>>,
}

impl<F> Computed<F> {
    pub(super) fn new(op: F, value: Tensor) -> Self {
        let value = Mutex::new(Some(value));
        Self { op, value }
    }

    fn storage<S>(
        &self,
        copy: impl FnOnce(&Storage, &Layout) -> Result<Option<S>>,
    ) -> Result<(S, Shape)> {
        let value = self
            .value
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(value) = value else {
            bail!("an operation's result was asked for twice");
        };
        let (storage, layout) = value.storage_and_layout();
        match copy(&storage, layout)? {
            Some(copied) => Ok((copied, layout.shape().clone())),
            None => bail!("an operation's result is on {:?}", value.device()),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        self.storage(|storage, layout| match storage {
            Storage::Cpu(s) => copied(s, layout).map(Some),
            _ => Ok(None),
        })
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        self.storage(|storage, layout| match storage {
            Storage::Cuda(s) => copied(s, layout).map(Some),
            _ => Ok(None),
        })
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        self.storage(|storage, layout| match storage {
            Storage::Metal(s) => copied(s, layout).map(Some),
            _ => Ok(None),
        })
    }
}

/// A contiguous copy: what candle's cast gives, whatever the layout.
fn copied<S: BackendStorage>(storage: &S, layout: &Layout) -> Result<S> {
    storage.to_dtype(layout, storage.dtype())
}

impl<F: TensorOp<1>> CustomOp1 for Computed<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [gx] = self.op.backward([x], grad)?;
        deliver(x, gx)
    }
}

impl<F: TensorOp<2>> CustomOp2 for Computed<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [ga, gb] = self.op.backward([a, b], grad)?;
        Ok((deliver(a, ga)?, deliver(b, gb)?))
    }
}

impl<F: TensorOp<3>> CustomOp3 for Computed<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
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
        self.cuda()
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
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [ga, gb, gc] = self.op.backward([a, b, c], grad)?;
        Ok((deliver(a, ga)?, deliver(b, gb)?, deliver(c, gc)?))
    }
}

/// `op` of one tensor, as a node of the graph when the tensor is tracked.
pub(super) fn apply1(op: impl TensorOp<1>, x: &Tensor) -> Result<Tensor> {
    let value = op.forward([&x.detach()])?;
    if !x.track_op() {
        return Ok(value);
    }
    x.apply_op1(Computed::new(op, value))
}

/// `op` of three tensors, as a node of the graph when one of them is tracked.
pub(super) fn apply3(op: impl TensorOp<3>, a: &Tensor, b: &Tensor, c: &Tensor) -> Result<Tensor> {
    let value = op.forward([&a.detach(), &b.detach(), &c.detach()])?;
    if ![a, b, c].iter().any(|t| t.track_op()) {
        return Ok(value);
    }
    a.apply_op3(b, c, Computed::new(op, value))
}
