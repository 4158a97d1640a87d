//! Launching kernels on tensors.
// Reason: a launch hands addresses of tensors to code that the compiler does not see.
#![allow(unsafe_code)]

use candle_core::backend::BackendDevice;
use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, bail};

use crate::ops::autograd_op::OpResult;

/// A file of kernels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Module {
    pub(super) name: &'static str,
    #[cfg(feature = "cuda")]
    pub(super) ptx: &'static str,
}

/// The file `kernels/NAME.cu`.
macro_rules! module {
    ($name:literal) => {
        $crate::ops::cuda::gpu::Module {
            name: $name,
            #[cfg(feature = "cuda")]
            ptx: include_str!(concat!(env!("OUT_DIR"), "/", $name, ".ptx")),
        }
    };
}
pub(super) use module;

/// Threads of a block of kernels that go element by element.
pub(super) const THREADS: u32 = 256;

/// A kernel and the size of its launch.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    module: Module,
    kernel: String,
    grid: [u32; 3],
    block: u32,
    shared: u32,
}

impl Launch {
    /// The kernel `name_DTYPE`, such as `geglu_forward_f16`, in blocks of `block` threads.
    pub(super) fn new(
        module: Module,
        name: &str,
        dtype: DType,
        grid: [usize; 3],
        block: u32,
    ) -> Self {
        Self {
            module,
            kernel: format!("{name}_{}", dtype.as_str()),
            grid: grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
            block,
            shared: 0,
        }
    }

    /// The kernel `name_DTYPE` in a grid of one dimension, with threads that go through `elements` with the grid's stride.
    pub(super) fn elementwise(module: Module, name: &str, dtype: DType, elements: usize) -> Self {
        // Enough blocks for every multiprocessor of the largest cards, several times over.
        let blocks = elements.div_ceil(THREADS as usize).clamp(1, 1 << 14);
        Self::new(module, name, dtype, [blocks, 1, 1], THREADS)
    }

    /// With dynamic shared memory of `bytes` a block.
    pub(super) fn with_shared(self, bytes: u32) -> Self {
        Self {
            shared: bytes,
            ..self
        }
    }
}

/// An argument of a kernel, of the kernel's own type: an `int` is [`Self::Int`], an `int64_t` [`Self::Long`].
#[derive(Clone, Copy, Debug)]
pub(super) enum Arg<'a> {
    /// The address of a contiguous tensor's first element. The kernel reads or writes it.
    Tensor(&'a Tensor),
    /// The address of a result.
    Output(&'a Output),
    /// A null pointer.
    Null,
    Int(i32),
    Long(i64),
    Float(f32),
}

impl<'a> Arg<'a> {
    pub(super) fn optional(tensor: Option<&'a Tensor>) -> Self {
        tensor.map_or(Self::Null, Self::Tensor)
    }

    /// A count or a size that the kernel takes as `int`.
    pub(super) fn int(n: usize) -> Result<Self> {
        match i32::try_from(n) {
            Ok(n) => Ok(Self::Int(n)),
            Err(_) => bail!("a size of {n} is more than a kernel takes"),
        }
    }

    /// A count that the kernel takes as `int64_t`.
    pub(super) fn long(n: usize) -> Self {
        Self::Long(n as i64)
    }

    fn value(&self) -> Result<Value> {
        Ok(match *self {
            Self::Tensor(tensor) => Value::Long(address(tensor)?),
            Self::Output(output) => Value::Long(storage_address(&output.storage)?),
            Self::Null => Value::Long(0),
            Self::Int(n) => Value::Int(n),
            Self::Long(n) => Value::Long(n),
            Self::Float(x) => Value::Float(x),
        })
    }
}

/// An argument as it is passed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    Int(i32),
    Long(i64),
    Float(f32),
}

/// The result of an operation's forward, for a kernel to fill: storage that becomes a variable without a copy.
///
/// Its numbers are undefined until a kernel has written all of them.
#[derive(Debug)]
pub(super) struct Output {
    storage: Storage,
    shape: Shape,
}

impl Output {
    pub(super) fn new(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Self> {
        let shape = shape.into();
        let storage = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                // SAFETY: as in `empty`.
                Storage::Cuda(unsafe { device.alloc_uninit(&shape, dtype) }?)
            }
            #[cfg(test)]
            Device::Cpu => {
                let cpu = candle_core::cpu_backend::CpuDevice;
                // SAFETY: as in `empty`.
                Storage::Cpu(unsafe { cpu.alloc_uninit(&shape, dtype) }?)
            }
            device => bail!("no kernels for {device:?}"),
        };
        Ok(Self { storage, shape })
    }

    /// Contiguous storage that has been written, of as many numbers as `shape` has.
    pub(super) fn of(storage: Storage, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        Self { storage, shape }
    }

    /// The result as a tensor: for gradients, which are no nodes of the graph.
    pub(super) fn into_tensor(self) -> Tensor {
        OpResult::from(self).into_tensor()
    }
}

impl From<Output> for OpResult {
    fn from(output: Output) -> Self {
        Self::Owned(output.storage, output.shape)
    }
}

/// A contiguous tensor for a kernel to fill.
///
/// Its numbers are undefined until a kernel has written all of them.
pub(super) fn empty(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: every bit pattern is a number of these types, and the kernels write before they read.
    unsafe { Tensor::empty(shape, dtype, device) }
}

/// A tensor for a kernel to fill, like `x`.
pub(super) fn empty_like(x: &Tensor) -> Result<Tensor> {
    empty(x.shape(), x.dtype(), x.device())
}

/// Launches a kernel on the device of `like`, on the device's one stream. Returns before it has run.
///
/// The arguments must be those that the kernel declares, of the sizes that it goes through: this is not checked.
pub(super) fn launch(like: &Tensor, launch: &Launch, args: &[Arg<'_>]) -> Result<()> {
    let values: Vec<Value> = args.iter().map(Arg::value).collect::<Result<_>>()?;
    match like.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => launch_on(device, launch, &values),
        #[cfg(test)]
        Device::Cpu => super::host::launch(
            launch.module.name,
            &launch.kernel,
            launch.grid,
            launch.block,
            launch.shared,
            &values,
        ),
        device => bail!("{}: no kernel for {device:?}", launch.kernel),
    }
}

#[cfg(feature = "cuda")]
fn launch_on(device: &candle_core::CudaDevice, launch: &Launch, values: &[Value]) -> Result<()> {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg, sys};

    /// Dynamic shared memory that a kernel has without asking for more. Bytes.
    const SHARED_DEFAULT: u32 = 48 << 10;

    let Launch { module, kernel, .. } = launch;
    let function = device.get_or_load_custom_func(kernel, module.name, module.ptx)?;
    if launch.shared > SHARED_DEFAULT {
        let attribute =
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function
            .set_attribute(attribute, launch.shared as i32)
            .w()?;
    }
    let mut builder = function.builder();
    for value in values {
        match value {
            Value::Int(n) => builder.arg(n),
            Value::Long(n) => builder.arg(n),
            Value::Float(x) => builder.arg(x),
        };
    }
    let config = LaunchConfig {
        grid_dim: launch.grid.into(),
        block_dim: (launch.block, 1, 1),
        shared_mem_bytes: launch.shared,
    };
    // SAFETY: each operation of this folder passes the arguments that its kernel declares, with the sizes of the tensors behind
    // them. The device has one stream, so that what follows sees what the kernel wrote, and memory is freed after its last use.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// The address of a contiguous tensor's first element, on its device.
pub(super) fn address(tensor: &Tensor) -> Result<i64> {
    let (storage, layout) = tensor.storage_and_layout();
    if !layout.is_contiguous() {
        bail!("a kernel takes contiguous tensors, not {layout:?}");
    }
    let offset = layout.start_offset() * tensor.dtype().size_in_bytes();
    Ok(storage_address(&storage)? + offset as i64)
}

/// The address of a result's first element, on its device.
#[cfg(feature = "cudnn")]
pub(super) fn output_address(output: &Output) -> Result<i64> {
    storage_address(&output.storage)
}

fn storage_address(storage: &Storage) -> Result<i64> {
    match storage {
        Storage::Cpu(storage) => cpu_address(storage),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => cuda_address(storage),
        _ => bail!("a kernel takes no tensor on this device"),
    }
}

fn cpu_address(storage: &CpuStorage) -> Result<i64> {
    Ok(match storage {
        CpuStorage::U8(x) => x.as_ptr() as i64,
        CpuStorage::U32(x) => x.as_ptr() as i64,
        CpuStorage::I64(x) => x.as_ptr() as i64,
        CpuStorage::F16(x) => x.as_ptr() as i64,
        CpuStorage::BF16(x) => x.as_ptr() as i64,
        CpuStorage::F32(x) => x.as_ptr() as i64,
        CpuStorage::F64(x) => x.as_ptr() as i64,
        other => bail!("a kernel takes no {other:?}"),
    })
}

#[cfg(feature = "cuda")]
fn cuda_address(storage: &candle_core::CudaStorage) -> Result<i64> {
    use candle_core::backend::BackendStorage;
    use candle_core::cuda_backend::CudaDType;
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
    use half::{bf16, f16};

    fn of<T: CudaDType>(storage: &candle_core::CudaStorage) -> Result<i64> {
        let slice = storage.as_cuda_slice::<T>()?;
        let (address, _) = slice.device_ptr(slice.stream());
        Ok(address as i64)
    }
    match storage.dtype() {
        DType::U8 => of::<u8>(storage),
        DType::U32 => of::<u32>(storage),
        DType::I64 => of::<i64>(storage),
        DType::F16 => of::<f16>(storage),
        DType::BF16 => of::<bf16>(storage),
        DType::F32 => of::<f32>(storage),
        DType::F64 => of::<f64>(storage),
        other => bail!("a kernel takes no {other:?}"),
    }
}
