//! AdamW whose moments are kept in 8 bits: block-wise dynamic quantisation, as bitsandbytes' `AdamW8bit`.
//!
//! Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861). Each block of 256 numbers is divided by
//! its greatest magnitude and rounded to the nearest value of a dynamic map. A step widens a block, makes the step of AdamW
//! in `f32`, and rounds the moments again.

use candle_core::{DType, Device, Result, Tensor, Var, bail};

use super::dynamic_map::{SIGNED, UNSIGNED};
use super::{AdamWStep, cpu, portable};

/// Numbers that share a scale.
pub(super) const BLOCK: usize = 256;

/// A moment of a parameter in 8 bits. A step writes over it or replaces it; clones may share it.
#[derive(Clone, Debug)]
pub struct BlockQuantized {
    /// The code of each number of the parameter, `[n]` u8.
    pub codes: Tensor,
    /// The greatest magnitude in each block of 256, `[⌈n / 256⌉]` f32.
    pub absmax: Tensor,
}

impl BlockQuantized {
    /// `elements` zeros on `device`.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn zeros(elements: usize, signed: bool, device: &Device) -> Result<Self> {
        let map = if signed { &*SIGNED } else { &*UNSIGNED };
        Ok(Self {
            codes: Tensor::full(map.nearest(0.0), elements, device)?,
            absmax: Tensor::zeros(elements.div_ceil(BLOCK), DType::F32, device)?,
        })
    }
}

/// Both moments of a parameter in 8 bits.
#[derive(Clone, Debug)]
pub struct BlockMoments {
    /// The gradient's average.
    pub first: BlockQuantized,
    /// The squared gradient's average.
    pub second: BlockQuantized,
}

impl BlockMoments {
    /// The moments of a parameter of `elements` numbers before its first step.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn zeros(elements: usize, device: &Device) -> Result<Self> {
        Ok(Self {
            first: BlockQuantized::zeros(elements, true, device)?,
            second: BlockQuantized::zeros(elements, false, device)?,
        })
    }
}

/// [`super::adamw_steps()`] of one parameter with moments in 8 bits.
///
/// `param` is `f32`, `grad` of its shape.
pub(super) fn adamw8bit_step(
    param: &Var,
    moments: &mut BlockMoments,
    grad: &Tensor,
    grad_scale: f64,
    step: &AdamWStep,
) -> Result<()> {
    if param.dtype() != DType::F32 {
        bail!("8-bit AdamW takes f32 parameters, not {:?}", param.dtype());
    }
    let grad = grad.detach().contiguous()?;
    if cpu::has_kernel(param) {
        cpu::adamw8bit_step(param, moments, &grad, grad_scale, step)
    } else {
        portable::adamw8bit_step(param, moments, &grad, grad_scale, step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradcheck::device;
    use crate::ops::{AdamWMoments, AdamWUpdate};

    const N: usize = 4500;

    /// As `counted` of `adamw8bit.py`.
    fn counted(step: u64) -> Tensor {
        let number = |i: u64| {
            let bits = ((i + 1) * 2_654_435_761 + step * 40_503 * 65_536) as u32;
            let bits = bits ^ (bits >> 15);
            let unit = (bits >> 8) as f32 / (1 << 24) as f32 - 0.5;
            unit * 0.5f32.powi((i / BLOCK as u64 % 12) as i32)
        };
        Tensor::from_iter((0..N as u64).map(number), &device()).unwrap()
    }

    fn steps(mut step: impl FnMut(&Var, &Tensor, &AdamWStep) -> Result<()>) -> Result<Var> {
        let param = Var::from_tensor(&counted(0))?;
        for number in 1..=7 {
            let numbers = AdamWStep {
                learning_rate: 1e-3,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.01,
                step: number,
            };
            // The stored gradient is twice the true one: the scale must undo it.
            step(&param, &(counted(number) * 2.0)?, &numbers)?;
        }
        Ok(param)
    }

    fn most(a: &Tensor, b: &Tensor) -> Result<f32> {
        (a - b)?.abs()?.max_all()?.to_scalar()
    }

    #[test]
    fn adamw8bit_steps_equal_those_of_bitsandbytes() -> Result<()> {
        // In the checkout that is the working directory: tests/cuda/on_gpu.sh runs this on another machine.
        let golden = "tests/golden/adamw8bit.safetensors";
        let golden = candle_core::safetensors::load(golden, &device())?;
        for (name, map) in [("map.signed", &*SIGNED), ("map.unsigned", &*UNSIGNED)] {
            assert_eq!(golden[name].to_vec1::<f32>()?, map.values());
        }
        let kernel = |p: &Var, m: &mut BlockMoments, g: &Tensor, s: &AdamWStep| {
            adamw8bit_step(p, m, g, 0.5, s)
        };
        let portable = |p: &Var, m: &mut BlockMoments, g: &Tensor, s: &AdamWStep| {
            crate::ops::portable::adamw8bit_step(p, m, g, 0.5, s)
        };
        let cuda = |p: &Var, m: &mut BlockMoments, g: &Tensor, s: &AdamWStep| {
            // The kernel writes over the tensors that both moments share.
            let update = AdamWUpdate {
                param: p,
                moments: &mut AdamWMoments::Blocks(m.clone()),
                grad: g,
                copy: None,
            };
            crate::ops::cuda::adamw_steps(&mut [update], 0.5, s)
        };
        type Step<'a> = &'a dyn Fn(&Var, &mut BlockMoments, &Tensor, &AdamWStep) -> Result<()>;
        for way in [&kernel as Step<'_>, &portable, &cuda] {
            let mut moments = BlockMoments::zeros(N, &device())?;
            let param = steps(|p, g, s| way(p, &mut moments, g, s))?;
            let apart = (param.as_tensor() - &golden["param"])?
                .abs()?
                .to_vec1::<f32>()?;
            let apart: Vec<f32> = apart.into_iter().filter(|&d| d > 2e-7).collect();
            // As below: the steps after such a number differ by as much as the values do.
            assert!(
                apart.len() <= 4 && apart.iter().all(|&d| d < 1e-4),
                "{}",
                apart.len()
            );
            let BlockMoments { first, second } = &moments;
            for (got, name) in [(first, "exp_avg"), (second, "exp_avg_sq")] {
                let want = golden[name].to_vec1::<u8>()?;
                let got_codes = got.codes.to_vec1::<u8>()?;
                // A last bit may move a number over the border between two values, never further.
                let off = |(a, b): (&u8, &u8)| a.abs_diff(*b);
                let differing: Vec<u8> = want.iter().zip(&got_codes).map(off).collect();
                assert!(differing.iter().all(|&d| d <= 1), "{name}");
                assert!(differing.iter().filter(|&&d| d > 0).count() <= 2, "{name}");
                let absmax = &golden[&format!("{name}_absmax")];
                assert!(most(&(&got.absmax / absmax)?, &absmax.ones_like()?)? < 1e-6);
            }
        }
        Ok(())
    }

    #[test]
    fn adamw8bit_steps_stay_near_those_of_adamw() -> Result<()> {
        let mut moments = BlockMoments::zeros(N, &device())?;
        let coded = steps(|p, g, s| adamw8bit_step(p, &mut moments, g, 0.5, s))?;
        let [m, v] = [(); 2].map(|()| Var::zeros(N, DType::F32, &device()));
        let (m, v) = (m?, v?);
        let full = steps(|p, g, s| crate::ops::update::adamw_step(p, &m, &v, g, 0.5, s))?;
        let moved = (full.as_tensor() - counted(0))?
            .sqr()?
            .sum_all()?
            .to_scalar::<f32>()?;
        let apart = (full.as_tensor() - coded.as_tensor())?
            .sqr()?
            .sum_all()?
            .to_scalar::<f32>()?;
        assert!(
            apart > 0.0 && apart.sqrt() < 0.05 * moved.sqrt(),
            "{apart} {moved}"
        );
        Ok(())
    }
}
