//! [`ops::adamw8bit`](crate::ops::adamw8bit) on the CPU: each task widens, updates and rounds one block at a time.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result, Tensor, Var, bail};
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::kernel::TensorView;
use super::update::slice_mut;
use crate::ops::adamw8bit::BLOCK;
use crate::ops::dynamic_map::{DynamicMap, SIGNED, UNSIGNED};
use crate::ops::update::Factors;
use crate::ops::{AdamWStep, BlockMoments, BlockQuantized};

/// Blocks that one task updates.
const TASK: usize = 64;

/// As [`crate::ops::adamw8bit::adamw8bit_step()`].
pub(in crate::ops) fn adamw8bit_step(
    param: &Var,
    moments: &mut BlockMoments,
    grad: &Tensor,
    grad_scale: f64,
    step: &AdamWStep,
) -> Result<()> {
    let (n, blocks) = (param.elem_count(), param.elem_count().div_ceil(BLOCK));
    let BlockMoments { first, second } = &*moments;
    let fitting = |m: &BlockQuantized| m.codes.elem_count() == n && m.absmax.elem_count() == blocks;
    if grad.elem_count() != n || !fitting(first) || !fitting(second) {
        bail!("8-bit AdamW: {n} parameters, a gradient or moments of another size");
    }
    let next = {
        let update = AdamW8bitUpdate {
            grad: TensorView::of(grad),
            first: (TensorView::of(&first.codes), TensorView::of(&first.absmax)),
            second: (
                TensorView::of(&second.codes),
                TensorView::of(&second.absmax),
            ),
            factors: Factors::new(step, grad_scale),
            next: Mutex::new([NextMoment::new(n, blocks), NextMoment::new(n, blocks)]),
        };
        param.inplace_op1(&update)?;
        update.next.into_inner()
    };
    let [first, second] = next
        .unwrap_or_else(PoisonError::into_inner)
        .map(|moment| moment.into_tensors(param.device()));
    *moments = BlockMoments {
        first: first?,
        second: second?,
    };
    Ok(())
}

/// A moment after the step.
struct NextMoment {
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl NextMoment {
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

    /// The pieces that tasks write, in order.
    fn tasks(&mut self) -> impl IndexedParallelIterator<Item = (&mut [u8], &mut [f32])> {
        let codes = self.codes.par_chunks_mut(TASK * BLOCK);
        codes.zip(self.absmax.par_chunks_mut(TASK))
    }
}

/// Codes and scales of a moment.
type Coded<'a> = (TensorView<'a>, TensorView<'a>);

/// The pieces that tasks read, in order.
fn tasks<'a>(
    (codes, absmax): &'a Coded<'_>,
) -> Result<impl IndexedParallelIterator<Item = (&'a [u8], &'a [f32])>> {
    let codes = codes.slice::<u8>()?.par_chunks(TASK * BLOCK);
    Ok(codes.zip(absmax.slice::<f32>()?.par_chunks(TASK)))
}

/// The step of one parameter.
struct AdamW8bitUpdate<'a> {
    grad: TensorView<'a>,
    first: Coded<'a>,
    second: Coded<'a>,
    factors: Factors,
    next: Mutex<[NextMoment; 2]>,
}

impl InplaceOp1 for AdamW8bitUpdate<'_> {
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

/// A task's piece of a moment, before and after the step.
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
