//! The memory of `coffey sample`.

use super::activations::{Held, activations};
use super::limits::{MemoryError, MemoryLimits};
use super::plan::{F32, HELD_BY_VAE, PROGRAM};
use crate::models::{UNetConfig, VaeConfig};

/// Refuses an image whose drawing needs more memory than there is, with the greatest square that fits.
///
/// `latent`: height and width of the latents, drawn one by one; `device`: where, with the memory of `limits`.
///
/// # Errors
/// [`MemoryError`].
pub fn check_sampling(
    unet: &UNetConfig,
    vae: &VaeConfig,
    latent: [usize; 2],
    device: &str,
    limits: &MemoryLimits,
) -> Result<(), MemoryError> {
    let downscale = vae.downscale() as u64;
    let needed = |[height, width]: [u64; 2]| {
        let held = Held {
            scores: false,
            inside_blocks: false,
        };
        let drawing = activations(unet.to_json(), [height, width], held) / INPUTS_HELD;
        let pixels = height * width * downscale * downscale;
        let decoding = HELD_BY_VAE * vae.base_channels() as u64 * pixels;
        let each = drawing.max(decoding).saturating_mul(F32);
        PROGRAM.saturating_add(each)
    };
    let excess = |latent| limits.excess(device, needed(latent));
    let latent = latent.map(|side| side as u64);
    let Some(message) = excess(latent) else {
        return Ok(());
    };
    let mut side = latent[0].max(latent[1]);
    while side > 0 && excess([side; 2]).is_some() {
        side -= 1;
    }
    let remedy = match side * downscale {
        0 => "no image fits".to_owned(),
        side => format!("it fits with --height {side} --width {side}"),
    };
    Err(MemoryError(format!(
        "{message} for {}x{} pixels; {remedy}",
        latent[1] * downscale,
        latent[0] * downscale
    )))
}

/// Share of the blocks' inputs that is not held while images are drawn: only those of the way down wait for the way up.
const INPUTS_HELD: u64 = 2;
