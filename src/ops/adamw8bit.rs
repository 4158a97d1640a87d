//! AdamW whose moments are kept in 8 bits: block-wise dynamic quantisation, as bitsandbytes' `AdamW8bit`.
//!
//! Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861). Each block of 256 numbers is divided by
//! its greatest magnitude and rounded to the nearest value of a dynamic map. A step widens a block, makes the step of AdamW
//! in `f32`, and rounds the moments again.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, Var, bail};
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::dynamic_map::{DynamicMap, SIGNED, UNSIGNED};
use super::kernel::{View, has_kernel};
use super::update::{AdamWStep, Factors, slice_mut};

/// Numbers that share a scale.
pub(super) const BLOCK: usize = 256;

/// Blocks a task updates.
const TASK: usize = 64;

/// A moment of a parameter in 8 bits. Clones share it; a step replaces it.
#[derive(Clone, Debug)]
pub struct BlockQuantized {
    /// One code a number of the parameter, `[n]` u8.
    pub codes: Tensor,
    /// The greatest magnitude in each block of 256, `[⌈n / 256⌉]` f32.
    pub absmax: Tensor,
}

impl BlockQuantized {
    /// `elements` zeros.
    ///
    /// # Errors
    /// When the tensors can't be made.
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
    /// When the tensors can't be made.
    pub fn zeros(elements: usize, device: &Device) -> Result<Self> {
        Ok(Self {
            first: BlockQuantized::zeros(elements, true, device)?,
            second: BlockQuantized::zeros(elements, false, device)?,
        })
    }
}

/// As [`super::adamw_step()`], with moments in 8 bits.
///
/// # Errors
/// When the parameter is not `f32` or the shapes do not fit together.
pub fn adamw8bit_step(
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
    if !has_kernel(param) {
        return super::tensor::adamw8bit_step(param, moments, &grad, grad_scale, step);
    }
    let (n, blocks) = (param.elem_count(), param.elem_count().div_ceil(BLOCK));
    let BlockMoments { first, second } = &*moments;
    let fitting = |m: &BlockQuantized| m.codes.elem_count() == n && m.absmax.elem_count() == blocks;
    if grad.elem_count() != n || !fitting(first) || !fitting(second) {
        bail!("8-bit AdamW: {n} parameters, a gradient or moments of another size");
    }
    let next = {
        let update = Update {
            grad: View::of(&grad),
            first: (View::of(&first.codes), View::of(&first.absmax)),
            second: (View::of(&second.codes), View::of(&second.absmax)),
            factors: Factors::new(step, grad_scale),
            next: Mutex::new([Half::new(n, blocks), Half::new(n, blocks)]),
        };
        param.inplace_op1(&update)?;
        update.next.into_inner()
    };
    let [first, second] = next
        .unwrap_or_else(PoisonError::into_inner)
        .map(|half| half.into_tensors(param.device()));
    *moments = BlockMoments {
        first: first?,
        second: second?,
    };
    Ok(())
}

/// A moment as it is written.
struct Half {
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl Half {
    fn new(elements: usize, blocks: usize) -> Self {
        Self {
            codes: vec![0; elements],
            absmax: vec![0.0; blocks],
        }
    }

    fn into_tensors(self, device: &Device) -> Result<BlockQuantized> {
        let (n, blocks) = (self.codes.len(), self.absmax.len());
        Ok(BlockQuantized {
            codes: Tensor::from_vec(self.codes, n, device)?,
            absmax: Tensor::from_vec(self.absmax, blocks, device)?,
        })
    }

    /// The pieces tasks write, in order.
    fn tasks(&mut self) -> impl IndexedParallelIterator<Item = (&mut [u8], &mut [f32])> {
        let codes = self.codes.par_chunks_mut(TASK * BLOCK);
        codes.zip(self.absmax.par_chunks_mut(TASK))
    }
}

/// Codes and scales.
type Coded<'a> = (View<'a>, View<'a>);

/// The pieces tasks read, in order.
fn tasks<'a>(
    (codes, absmax): &'a Coded<'_>,
) -> Result<impl IndexedParallelIterator<Item = (&'a [u8], &'a [f32])>> {
    let codes = codes.slice::<u8>()?.par_chunks(TASK * BLOCK);
    Ok(codes.zip(absmax.slice::<f32>()?.par_chunks(TASK)))
}

/// A step over one parameter.
struct Update<'a> {
    grad: View<'a>,
    first: Coded<'a>,
    second: Coded<'a>,
    factors: Factors,
    next: Mutex<[Half; 2]>,
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw8bit"
    }

    fn cpu_fwd(&self, param: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let param = slice_mut(param, layout)?;
        let grad = self.grad.slice::<f32>()?;
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let [first, second] = &mut *next;
        let numbers = param
            .par_chunks_mut(TASK * BLOCK)
            .zip(grad.par_chunks(TASK * BLOCK));
        let moments =
            (tasks(&self.first)?.zip(first.tasks())).zip(tasks(&self.second)?.zip(second.tasks()));
        numbers.zip(moments).for_each(|((p, g), (first, second))| {
            let blocks = p.chunks_mut(BLOCK).zip(g.chunks(BLOCK));
            let [mut first, mut second] = [first, second].map(|(old, new)| Blocks { old, new });
            for (i, (p, g)) in blocks.enumerate() {
                let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
                let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
                first.widen(i, m, &SIGNED);
                second.widen(i, v, &UNSIGNED);
                update_block(p, m, v, g, &self.factors);
                first.round(i, m, &SIGNED);
                second.round(i, v, &UNSIGNED);
            }
        });
        Ok(())
    }
}

/// A task's piece of a moment, before and after.
struct Blocks<'a> {
    old: (&'a [u8], &'a [f32]),
    new: (&'a mut [u8], &'a mut [f32]),
}

impl Blocks<'_> {
    fn widen(&self, block: usize, into: &mut [f32], map: &DynamicMap) {
        let (codes, absmax) = (&self.old.0[block * BLOCK..], self.old.1[block]);
        for (x, &code) in into.iter_mut().zip(codes) {
            *x = map.value(code) * absmax;
        }
    }

    fn round(&mut self, block: usize, from: &[f32], map: &DynamicMap) {
        let absmax = greatest(from);
        self.new.1[block] = absmax;
        // A block of zeros stays one.
        let divisor = if absmax > 0.0 { absmax } else { 1.0 };
        for (code, &x) in self.new.0[block * BLOCK..].iter_mut().zip(from) {
            *code = map.nearest(x / divisor);
        }
    }
}

#[pulp::with_simd(update_block = Arch::new())]
#[inline(always)]
fn update_block_on<S: Simd>(
    _: S,
    p: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    g: &[f32],
    by: &Factors,
) {
    for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
        *m = by.average(*m, g);
        *v = by.square_average(*v, g);
        *p = by.updated(*p, *m, *v);
    }
}

#[pulp::with_simd(greatest = Arch::new())]
#[inline(always)]
fn greatest_on<S: Simd>(_: S, x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most, x| x.abs().max(most))
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: usize = 4500;

    /// As `counted` of `adamw8bit.py`.
    fn counted(step: u64) -> Tensor {
        let number = |i: u64| {
            let bits = ((i + 1) * 2_654_435_761 + step * 40_503 * 65_536) as u32;
            let bits = bits ^ (bits >> 15);
            let unit = (bits >> 8) as f32 / (1 << 24) as f32 - 0.5;
            unit * 0.5f32.powi((i / BLOCK as u64 % 12) as i32)
        };
        Tensor::from_iter((0..N as u64).map(number), &Device::Cpu).unwrap()
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
    fn steps_equal_those_of_bitsandbytes() -> Result<()> {
        let golden = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/adamw8bit.safetensors"
        );
        let golden = candle_core::safetensors::load(golden, &Device::Cpu)?;
        for (name, map) in [("map.signed", &*SIGNED), ("map.unsigned", &*UNSIGNED)] {
            assert_eq!(golden[name].to_vec1::<f32>()?, map.values());
        }
        let on_host = |p: &Var, m: &mut BlockMoments, g: &Tensor, s: &AdamWStep| {
            adamw8bit_step(p, m, g, 0.5, s)
        };
        let of_tensors = |p: &Var, m: &mut BlockMoments, g: &Tensor, s: &AdamWStep| {
            super::super::tensor::adamw8bit_step(p, m, g, 0.5, s)
        };
        type Step<'a> = &'a dyn Fn(&Var, &mut BlockMoments, &Tensor, &AdamWStep) -> Result<()>;
        for way in [&on_host as Step<'_>, &of_tensors] {
            let mut moments = BlockMoments::zeros(N, &Device::Cpu)?;
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
    fn steps_stay_near_those_with_full_moments() -> Result<()> {
        let mut moments = BlockMoments::zeros(N, &Device::Cpu)?;
        let coded = steps(|p, g, s| adamw8bit_step(p, &mut moments, g, 0.5, s))?;
        let [m, v] = [(); 2].map(|()| Var::zeros(N, DType::F32, &Device::Cpu));
        let (m, v) = (m?, v?);
        let full = steps(|p, g, s| super::super::adamw_step(p, &m, &v, g, 0.5, s))?;
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
