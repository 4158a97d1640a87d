//! Copies of CUDA tensors in main memory, through pinned memory.
//!
//! The driver copies to pageable memory in two steps, one after the other. Here the device fills one pinned buffer, on a stream of
//! its own, while the host empties the other.
#![allow(
    unsafe_code,
    reason = "pinned memory and copies to it are the driver's raw calls"
)]

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::result::{self, DriverError};
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, DevicePtr};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Storage, Tensor, bail};
use half::{bf16, f16};

/// Size of a pinned buffer. Bytes.
const BUFFER: usize = 32 << 20;

/// Copies of contiguous tensors of `device` in main memory, in their order.
///
/// The device's other work may go on; what was submitted before is in the copies.
pub(super) fn download(device: &CudaDevice, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    let stream = device.cuda_stream();
    let copies = stream.context().new_stream().w()?;
    copies.join(&stream).w()?;
    let mut buffers = [Buffer::new(&copies)?, Buffer::new(&copies)?];
    let mut copied = Vec::with_capacity(tensors.len());
    let mut bytes = Vec::new();
    let mut finish = |buffer: &mut Buffer| -> Result<()> {
        let Some(piece) = buffer.pending.take() else {
            return Ok(());
        };
        piece.done.synchronize().w()?;
        bytes.extend_from_slice(buffer.memory.part(piece.len));
        if piece.is_last {
            let tensor = &tensors[copied.len()];
            let copy = Tensor::from_raw_buffer(&bytes, tensor.dtype(), tensor.dims(), &Device::Cpu);
            copied.push(copy?);
            bytes.clear();
        }
        Ok(())
    };
    let mut turn = 0;
    for tensor in tensors {
        let (address, size) = place(tensor)?;
        // An empty tensor has one piece of no bytes.
        let mut from = 0;
        loop {
            let len = BUFFER.min(size - from);
            let buffer = &mut buffers[turn % 2];
            finish(buffer)?;
            buffer.fill(&copies, address + from as u64, len, from + len == size)?;
            turn += 1;
            from += len;
            if from == size {
                break;
            }
        }
    }
    for _ in 0..buffers.len() {
        finish(&mut buffers[turn % 2])?;
        turn += 1;
    }
    Ok(copied)
}

/// A part of a tensor on its way to a buffer.
struct Piece {
    len: usize,
    /// Whether it ends its tensor.
    is_last: bool,
    done: CudaEvent,
}

struct Buffer {
    memory: Pinned,
    pending: Option<Piece>,
}

impl Buffer {
    fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        Ok(Self {
            memory: Pinned::new(stream.clone()).w()?,
            pending: None,
        })
    }

    /// Has the device copy `len` bytes from `address` to this buffer.
    fn fill(&mut self, stream: &CudaStream, address: u64, len: usize, is_last: bool) -> Result<()> {
        if len > 0 {
            let to = &mut self.memory.all()[..len];
            // SAFETY: `address` is that of at least `len` bytes of a tensor, which the caller of `download` holds until it returns. The
            // buffer is pinned, and is not read before `done`.
            unsafe { result::memcpy_dtoh_async(to, address, stream.cu_stream()) }.w()?;
        }
        let done = stream.record_event(None).w()?;
        self.pending = Some(Piece { len, is_last, done });
        Ok(())
    }
}

/// [`BUFFER`] bytes of memory that the device copies to directly.
struct Pinned {
    address: *mut u8,
    /// The stream that fills it.
    stream: Arc<CudaStream>,
}

impl Pinned {
    fn new(stream: Arc<CudaStream>) -> std::result::Result<Self, DriverError> {
        stream.context().bind_to_thread()?;
        // SAFETY: no flags; the driver's memory is written before it is read, and freed once, in `drop`.
        let address = unsafe { result::malloc_host(BUFFER, 0) }?.cast::<u8>();
        // SAFETY: the allocation has this size.
        unsafe { address.write_bytes(0, BUFFER) };
        Ok(Self { address, stream })
    }

    fn all(&mut self) -> &mut [u8] {
        // SAFETY: the allocation has this size and is initialised, and `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.address, BUFFER) }
    }

    fn part(&self, len: usize) -> &[u8] {
        assert!(len <= BUFFER);
        // SAFETY: as in `all`.
        unsafe { std::slice::from_raw_parts(self.address, len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A copy may be under way when an error ends `download`.
        if self.stream.synchronize().is_ok() {
            // SAFETY: the address is `malloc_host`'s, and no copy to it is under way. An error leaves the memory allocated.
            let _ = unsafe { result::free_host(self.address.cast::<c_void>()) };
        }
    }
}

/// The address of a contiguous tensor's first byte on its CUDA device, and its size in bytes.
pub(crate) fn place(tensor: &Tensor) -> Result<(u64, usize)> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("a tensor to download is on {:?}", tensor.device());
    };
    if !layout.is_contiguous() {
        bail!("a tensor to download is not contiguous: {layout:?}");
    }
    let each = tensor.dtype().size_in_bytes();
    let base = match storage.dtype() {
        DType::U8 => address::<u8>(storage),
        DType::U32 => address::<u32>(storage),
        DType::I64 => address::<i64>(storage),
        DType::F16 => address::<f16>(storage),
        DType::BF16 => address::<bf16>(storage),
        DType::F32 => address::<f32>(storage),
        DType::F64 => address::<f64>(storage),
        other => bail!("no download of {other:?}"),
    }?;
    let offset = layout.start_offset() * each;
    Ok((base + offset as u64, tensor.elem_count() * each))
}

fn address<T: CudaDType>(storage: &CudaStorage) -> Result<u64> {
    let slice = storage.as_cuda_slice::<T>()?;
    let (address, _) = slice.device_ptr(slice.stream());
    Ok(address)
}
