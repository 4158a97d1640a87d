//! The only place where a device is opened.
//!
//! A CUDA device is opened once in a process: the encoders and the trainer on one device share one stream, so that their work is in the
//! order of the calls, without events. A binary with CUDA starts and works on the CPU on a machine without any CUDA library; what is
//! missing is said when a device is opened.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod download;
#[cfg(feature = "cuda")]
mod libraries;
#[cfg(feature = "cuda")]
mod symbols;

#[cfg(feature = "cuda")]
pub(crate) use download::place as cuda_place;

use std::fmt;

use candle_core::{Device, Result as TensorResult, Tensor};

use crate::config::DeviceSpec;

/// Why a device can't be opened. The text goes on after "can't be opened: ".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceError {
    /// The binary has no CUDA.
    WithoutCuda,
    /// A library is missing or can't be loaded: the message with the remedy.
    Library(String),
    /// CUDA finds no device.
    NoDevice {
        /// `CUDA_VISIBLE_DEVICES`, which may hide the devices.
        visible: Option<String>,
    },
    /// There are fewer devices.
    Ordinal {
        /// How many there are, 1 or more.
        count: usize,
    },
    /// The driver is older than the CUDA that the binary was built with. Versions are 1000 times the major number and 10 times the minor
    /// number.
    OldDriver {
        /// The newest CUDA that the driver supports.
        driver: u32,
        /// The CUDA of the binary.
        needed: u32,
    },
    /// A call failed, which no setting of coffey remedies.
    Call(String),
}

impl DeviceError {
    /// Whether the configuration or the machine's installation is the cause (exit code 2).
    #[must_use]
    pub fn is_config(&self) -> bool {
        !matches!(self, Self::Call(_))
    }
}

impl std::error::Error for DeviceError {}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WithoutCuda => f.write_str(
                "this binary was built without CUDA; use \"cpu\" or build with `--features cuda`",
            ),
            Self::Library(message) | Self::Call(message) => f.write_str(message),
            Self::NoDevice { visible: None } => f.write_str("CUDA finds no device; use \"cpu\""),
            Self::NoDevice {
                visible: Some(visible),
            } => write!(
                f,
                "CUDA finds no device, with CUDA_VISIBLE_DEVICES={visible:?}; use \"cpu\""
            ),
            Self::Ordinal { count: 1 } => f.write_str("CUDA finds only cuda:0"),
            Self::Ordinal { count } => write!(
                f,
                "CUDA finds only {count} devices, cuda:0 to cuda:{}",
                count - 1
            ),
            Self::OldDriver { driver, needed } => write!(
                f,
                "the NVIDIA driver supports CUDA {}, and this binary was built with {}; install a newer driver, or use \"cpu\"",
                version(*driver),
                version(*needed)
            ),
        }
    }
}

/// `13.0` for 13000.
fn version(number: u32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// The device of `spec`. Every call for a CUDA device returns the same one.
///
/// # Errors
/// When the device can't be opened, with what to do about it where something can be done.
pub fn open(spec: DeviceSpec) -> Result<Device, DeviceError> {
    match spec {
        DeviceSpec::Cpu => Ok(Device::Cpu),
        #[cfg(feature = "cuda")]
        DeviceSpec::Cuda(ordinal) => cuda::open(ordinal),
        #[cfg(not(feature = "cuda"))]
        DeviceSpec::Cuda(_) => Err(DeviceError::WithoutCuda),
    }
}

/// Memory of a CUDA device that is open, whoever uses it. Bytes; `None` for the CPU.
pub fn memory(device: &Device) -> Option<u64> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::memory(device),
        _ => None,
    }
}

/// Copies in main memory of contiguous tensors that are all on one device, in their order. Later changes of the tensors are not in them.
///
/// # Errors
/// When a tensor can't be copied.
pub fn copies(tensors: &[Tensor]) -> TensorResult<Vec<Tensor>> {
    match tensors.first().map(Tensor::device) {
        #[cfg(feature = "cuda")]
        Some(Device::Cuda(device)) => download::download(device, tensors),
        Some(Device::Cpu) => tensors.iter().map(Tensor::copy).collect(),
        _ => {
            let moved = tensors.iter().map(|tensor| tensor.to_device(&Device::Cpu));
            moved.collect()
        }
    }
}

/// Lets matrix products and convolutions of f32 round their operands to TF32, on every CUDA device and from now on. Without this call they
/// don't. The CPU computes in f32.
pub fn allow_tf32(allow: bool) {
    candle_core::cuda::set_gemm_reduced_precision_f32(allow);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_opens_in_every_binary() {
        assert!(open(DeviceSpec::Cpu).unwrap().is_cpu());
    }

    #[test]
    fn messages_say_what_is_there() {
        let said = |error: DeviceError| error.to_string();
        assert_eq!(
            said(DeviceError::NoDevice { visible: None }),
            "CUDA finds no device; use \"cpu\""
        );
        assert_eq!(
            said(DeviceError::NoDevice {
                visible: Some("7".to_owned())
            }),
            "CUDA finds no device, with CUDA_VISIBLE_DEVICES=\"7\"; use \"cpu\""
        );
        assert_eq!(
            said(DeviceError::Ordinal { count: 1 }),
            "CUDA finds only cuda:0"
        );
        assert_eq!(
            said(DeviceError::Ordinal { count: 4 }),
            "CUDA finds only 4 devices, cuda:0 to cuda:3"
        );
        assert_eq!(
            said(DeviceError::OldDriver {
                driver: 12080,
                needed: 13000
            }),
            "the NVIDIA driver supports CUDA 12.8, and this binary was built with 13.0; install a newer driver, \
             or use \"cpu\""
        );
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_binary_without_cuda_says_so() {
        let error = open(DeviceSpec::Cuda(0)).unwrap_err();
        assert!(error.is_config());
        assert!(error.to_string().contains("built without CUDA"), "{error}");
    }
}
