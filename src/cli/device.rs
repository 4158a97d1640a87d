//! From a device's name in the configuration to the device.

use candle_core::Device;

use super::Failure;
use crate::config::DeviceSpec;

/// Opens a device.
pub(super) fn open(spec: DeviceSpec) -> Result<Device, Failure> {
    match spec {
        DeviceSpec::Cpu => Ok(Device::Cpu),
        DeviceSpec::Cuda(ordinal) => Device::new_cuda(ordinal)
            .map_err(|error| Failure::Failed(format!("{spec} can't be opened: {error}").into())),
    }
}
