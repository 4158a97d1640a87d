//! CUDA devices: each one opened once, with one stream.
#![allow(
    unsafe_code,
    reason = "three calls of the driver that cudarc does not make safe"
)]

use std::collections::BTreeMap;
use std::env;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::result::{self, DriverError};
use candle_core::cuda_backend::cudarc::driver::sys::{self, CUmemPool_attribute, CUresult};
use candle_core::{CudaDevice, Device};

use super::{DeviceError, libraries};

/// The devices that are open, by ordinal. They stay open until the process ends.
static OPEN: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());

/// The device of `ordinal`, opened at the first call.
pub(super) fn open(ordinal: usize) -> Result<Device, DeviceError> {
    let mut devices = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = devices.get(&ordinal) {
        return Ok(device.clone());
    }
    libraries::load()?;
    check_driver(ordinal)?;
    let device = Device::new_cuda_with_stream(ordinal).map_err(first_line)?;
    if let Device::Cuda(cuda) = &device {
        use_one_stream(cuda);
        keep_freed_memory(ordinal).map_err(called)?;
    }
    devices.insert(ordinal, device.clone());
    Ok(device)
}

/// Checks what has a remedy: a device is there, it has this ordinal, and the driver is new enough.
fn check_driver(ordinal: usize) -> Result<(), DeviceError> {
    let visible = || env::var("CUDA_VISIBLE_DEVICES").ok();
    match result::init() {
        Ok(()) => {}
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => {
            return Err(DeviceError::NoDevice { visible: visible() });
        }
        Err(error) => return Err(called(error)),
    }
    let count = result::device::get_count().map_err(called)?;
    let count = usize::try_from(count).unwrap_or(0);
    if count == 0 {
        return Err(DeviceError::NoDevice { visible: visible() });
    }
    if ordinal >= count {
        return Err(DeviceError::Ordinal { count });
    }
    let mut driver = 0;
    // SAFETY: the driver writes an integer to the address of one.
    let status = unsafe { sys::cuDriverGetVersion(&mut driver) };
    let driver = u32::try_from(driver).unwrap_or(0);
    if status == CUresult::CUDA_SUCCESS && (1..sys::CUDA_VERSION).contains(&driver) {
        return Err(DeviceError::OldDriver {
            driver,
            needed: sys::CUDA_VERSION,
        });
    }
    Ok(())
}

/// Turns cudarc's events off, which order the streams of a device: an event for each use of each buffer, and nothing to order.
fn use_one_stream(device: &CudaDevice) {
    // SAFETY: every tensor of this device is allocated, used and freed on the device's only stream, in the order of the calls: the device
    // is opened once and cloned for each user. Code that makes a second stream orders it by events of its own.
    unsafe { device.disable_event_tracking() };
}

/// Has the driver keep freed memory for the next allocation. It would return it to the system whenever the host waits for the device.
fn keep_freed_memory(ordinal: usize) -> Result<(), DriverError> {
    let device = result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX))?;
    // SAFETY: `device` is a device of the driver. The pool is the device's own, and a device without pools returns an error.
    let pool = match unsafe { result::device::get_default_mem_pool(device) } {
        Ok(pool) => pool,
        // cudarc allocates without a pool there.
        Err(DriverError(CUresult::CUDA_ERROR_NOT_SUPPORTED)) => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut threshold = u64::MAX;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the pool is valid, and the attribute is a u64, which the driver reads during the call.
    unsafe {
        result::mem_pool::set_attribute(
            pool,
            attribute,
            std::ptr::from_mut(&mut threshold).cast::<c_void>(),
        )
    }
}

/// All memory of the device. Bytes.
pub(super) fn memory(device: &CudaDevice) -> Option<u64> {
    let (_, all) = device.cuda_stream().context().mem_get_info().ok()?;
    u64::try_from(all).ok()
}

/// The error of a call of the driver: its name, and its text if the driver has one.
fn called(error: DriverError) -> DeviceError {
    let name = format!("{:?}", error.0);
    DeviceError::Call(match error.error_string() {
        Ok(text) => format!("{name}: {}", text.to_string_lossy()),
        Err(_) => name,
    })
}

/// candle's error without its backtrace.
fn first_line(error: candle_core::Error) -> DeviceError {
    let message = error.to_string();
    let line = message.lines().find(|line| !line.trim().is_empty());
    DeviceError::Call(line.unwrap_or("unknown error").trim().to_owned())
}
