//! The embedding of the guidance scale, an input of students.

use candle_core::{Device, Result, Tensor};

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
