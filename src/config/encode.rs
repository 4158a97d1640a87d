//! `[encode]`: the workers that turn pixels and captions into latents and text embeddings.

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, integer};
use super::limits::Limits;
use super::values::{DeviceSpec, FloatType};

/// Bounds of the numbers in `[encode]`.
pub(super) const NUMBERS: &[Bounds] = &[integer("encode.batch_size", 1, 65_536)];

/// `[encode]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Encode {
    /// Device of each worker; a device may be named more than once. No flag.
    pub devices: Vec<DeviceSpec>,
    /// Images the VAE encodes at once; an upper limit on the CPU. `--vae_encode_batch_size`
    pub batch_size: usize,
    /// Type the text encoder runs in. Follows `--mixed_precision` in the reference.
    pub dtype: FloatType,
    /// Type the VAE runs in. Follows `--mixed_precision` in the reference.
    pub vae_dtype: FloatType,
}

impl Default for Encode {
    fn default() -> Self {
        Self {
            devices: vec![DeviceSpec::Cpu],
            batch_size: 32,
            dtype: FloatType::F32,
            vae_dtype: FloatType::F32,
        }
    }
}

impl Encode {
    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        let needs = r#"needs at least one device, as ["cpu"]"#;
        limits.check("encode.devices", "[]", !self.devices.is_empty(), needs)?;
        for (index, device) in self.devices.iter().enumerate() {
            limits.device(&format!("encode.devices[{index}]"), *device)?;
        }
        Ok(())
    }
}
