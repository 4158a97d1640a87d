//! Guidance: the two outputs that classifier-free guidance extrapolates, and the embedding of the scale, an input of students.

use candle_core::{Device, Result, Tensor};

use crate::models::{Conditioning, Denoiser};

/// A network's outputs on the captions and on the empty captions, `[B, C, h, w]` each. `latents`: `[B, C, h, w]`, the rest one for
/// each of the `B` samples.
///
/// On a GPU both are one pass over `2·B` samples, which reads each weight once and launches half the kernels. On the CPU they are
/// two passes: a batch of another size may sum in another order.
///
/// # Errors
/// When the latents or the conditioning do not fit the network.
pub fn conditional_and_unconditional(
    denoiser: &dyn Denoiser,
    latents: &Tensor,
    timesteps: &[i64],
    conditioning: &Conditioning,
    unconditional: &Conditioning,
) -> Result<(Tensor, Tensor)> {
    if latents.device().is_cpu() {
        let pass = |on: &Conditioning| denoiser.forward(latents, timesteps, on);
        return Ok((pass(conditioning)?, pass(unconditional)?));
    }
    let both = Conditioning::cat(&[conditioning.clone(), unconditional.clone()])?;
    let doubled = Tensor::cat(&[latents, latents], 0)?;
    let output = denoiser.forward(&doubled, &timesteps.repeat(2), &both)?;
    let batch = latents.dim(0)?;
    Ok((output.narrow(0, 0, batch)?, output.narrow(0, batch, batch)?))
}

/// Sinusoidal embedding of `B` guidance weights `w` (classifier-free guidance's scale minus one): `[B, width]` f32.
///
/// As `guidance_scale_embedding` in diffusers' `train_lcm_distill_sd_wds.py`.
///
/// # Errors
/// When the device is out of memory.
pub fn guidance_embedding(w: &[f64], width: usize, device: &Device) -> Result<Tensor> {
    let half = width / 2;
    let rate = 10000f32.ln() / (half.max(2) - 1) as f32;
    let mut data = vec![0f32; w.len() * width];
    for (row, &w) in data.chunks_exact_mut(width).zip(w) {
        for i in 0..half {
            let angle = w as f32 * 1000.0 * (i as f32 * -rate).exp();
            row[i] = angle.sin();
            row[half + i] = angle.cos();
        }
    }
    Tensor::from_vec(data, (w.len(), width), device)
}

#[cfg(test)]
mod tests {
    use super::super::golden;
    use super::*;

    #[test]
    fn guidance_embedding_equals_diffusers() -> Result<()> {
        let golden = &golden::load()["guidance_scale_embedding"];
        let w = golden::numbers(&golden["w"]);
        for width in [8, 9, 64] {
            let got = golden::flat(&guidance_embedding(&w, width, &Device::Cpu)?);
            // An angle of 7500 has an ulp of 5e-4 in f32.
            golden::assert_close(&got, &golden[width.to_string()], 1e-3);
        }
        Ok(())
    }
}
