//! The optimiser arithmetic of [`ops::update`](crate::ops::update) by kernels that go over all tensors of a set in one launch.
//!
//! A kernel reads the addresses and sizes of its tensors from a table. The table is made and uploaded for each launch: for the
//! 686 tensors of Stable Diffusion's UNet it has 50 KB, which the host copies while the device is still at work on the backward
//! pass. It is not kept from one step to the next, so that nothing must know when an address is no longer valid.

use candle_core::{DType, Device, Result, Tensor, Var, bail};

use super::gpu::{Arg, Launch, Module, THREADS, address, empty, launch, module};
use crate::ops::dynamic_map::{SIGNED, UNSIGNED};
use crate::ops::update::Factors;
use crate::ops::{AdamWMoments, AdamWStep, AdamWUpdate, BlockMoments, BlockQuantized, EmaUpdate};

const MODULE: Module = module!("update");
/// Numbers of a tensor that one block works on. `CHUNK` in update.cu.
const CHUNK: usize = 8192;

/// The tensors that a kernel goes over: a row of numbers a tensor, as the `…Row` of update.cu.
#[derive(Default)]
struct Table {
    words: Vec<i64>,
    rows: usize,
    blocks: usize,
}

impl Table {
    /// A tensor of `elements` and the numbers after `first_block` and `elements`.
    fn push(&mut self, elements: usize, words: impl IntoIterator<Item = i64>) {
        self.words.extend([self.blocks as i64, elements as i64]);
        self.words.extend(words);
        self.rows += 1;
        self.blocks += elements.div_ceil(CHUNK);
    }

    /// Launches `kernel`, whose arguments are the table, its number of rows, and `args`.
    fn launch(self, device: &Device, kernel: &str, dtype: DType, args: &[Arg<'_>]) -> Result<()> {
        if self.blocks == 0 {
            return Ok(());
        }
        let words = self.words.len();
        let table = Tensor::from_vec(self.words, words, device)?;
        let mut all = vec![Arg::Tensor(&table), Arg::int(self.rows)?];
        all.extend(args);
        let kernel = Launch::new(MODULE, kernel, dtype, [self.blocks, 1, 1], THREADS);
        launch(&table, &kernel, &all)
    }
}

/// An `Array` of update.cu.
fn array(x: &Tensor) -> Result<[i64; 2]> {
    let code = match x.dtype() {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        other => bail!("optimiser arithmetic takes no {other:?}"),
    };
    Ok([address(x)?, code])
}

fn optional_array(x: Option<&Var>) -> Result<[i64; 2]> {
    x.map_or(Ok([0, 0]), |x| array(x))
}

fn factors(by: &Factors) -> [Arg<'static>; 8] {
    [
        by.grad_scale,
        by.weight1,
        by.beta2,
        by.weight2,
        by.keep,
        by.step_size,
        by.root_correction2,
        by.epsilon,
    ]
    .map(Arg::Float)
}

/// As [`crate::ops::adamw_steps()`], for `f32` parameters, by one launch for each kind of moments. Moments in 8 bits are written
/// over.
pub(in crate::ops) fn adamw_steps(
    updates: &mut [AdamWUpdate<'_>],
    grad_scale: f64,
    step: &AdamWStep,
) -> Result<()> {
    let Some(device) = updates.first().map(|update| update.param.device().clone()) else {
        return Ok(());
    };
    let (mut full, mut blocks) = (Table::default(), Table::default());
    // They must outlive the launches.
    let mut grads = Vec::with_capacity(updates.len());
    for update in updates {
        let grad = update.grad.contiguous()?;
        let (param, elements) = (address(update.param)?, update.param.elem_count());
        let arrays = [array(&grad)?, optional_array(update.copy)?].concat();
        grads.push(grad);
        match &*update.moments {
            AdamWMoments::Full { first, second } => {
                let words = [param, address(first)?, address(second)?];
                full.push(elements, words.into_iter().chain(arrays));
            }
            AdamWMoments::Blocks(BlockMoments { first, second }) => {
                let [m, v] = [first, second].map(|moment| -> Result<_> {
                    let BlockQuantized { codes, absmax } = moment;
                    Ok([address(codes)?, address(absmax)?])
                });
                let words = [[param].as_slice(), &m?, &v?].concat();
                blocks.push(elements, words.into_iter().chain(arrays));
            }
        }
    }
    let factors = factors(&Factors::new(step, grad_scale));
    full.launch(&device, "adamw", DType::F32, &factors)?;
    if blocks.rows > 0 {
        let maps = [&*SIGNED, &*UNSIGNED].map(|map| [*map.values(), *map.middles()]);
        let maps = Tensor::new(maps.as_flattened().as_flattened(), &device)?;
        let args = [&[Arg::Tensor(&maps)], factors.as_slice()].concat();
        blocks.launch(&device, "adamw8bit", DType::F32, &args)?;
    }
    Ok(())
}

/// As [`crate::ops::ema_updates()`], for `f32` tensors, by one launch.
pub(in crate::ops) fn ema_updates(updates: &[EmaUpdate<'_>], decay: f64) -> Result<()> {
    let Some(first) = updates.first() else {
        return Ok(());
    };
    let mut table = Table::default();
    // They must outlive the launch.
    let mut sources = Vec::with_capacity(updates.len());
    for update in updates {
        let source = update.source.contiguous()?;
        let words = [address(update.target)?, address(&source)?];
        table.push(update.target.elem_count(), words);
        sources.push(source);
    }
    let args = [Arg::Float(decay as f32), Arg::Float((1.0 - decay) as f32)];
    table.launch(first.target.device(), "ema", DType::F32, &args)
}

/// As [`crate::ops::squared_norms()`], by one launch and one wait. A thread adds its 32 numbers in `f32`; all else is `f64`, in an
/// order that depends on the sizes alone.
pub(in crate::ops) fn squared_norms(tensors: &[&Tensor]) -> Result<Vec<f64>> {
    let mut table = Table::default();
    // They must outlive the launch.
    let mut kept = Vec::with_capacity(tensors.len());
    let mut ends = Vec::with_capacity(tensors.len());
    for x in tensors {
        let x = x.contiguous()?;
        table.push(x.elem_count(), array(&x)?);
        ends.push(table.blocks);
        kept.push(x);
    }
    let (Some(first), blocks @ 1..) = (kept.first(), table.blocks) else {
        return Ok(vec![0.0; tensors.len()]);
    };
    let device = first.device();
    let sums = empty(blocks, DType::F64, device)?;
    table.launch(device, "squares", DType::F64, &[Arg::Tensor(&sums)])?;
    let sums = sums.to_vec1::<f64>()?;
    let mut begin = 0;
    Ok(ends
        .into_iter()
        .map(|end| sums[std::mem::replace(&mut begin, end)..end].iter().sum())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradcheck::{assert_close, random};
    use crate::ops::{self, cast};

    /// Sizes of the tensors of a set: one number, several chunks, none divisible by four.
    const SIZES: [usize; 5] = [1, 3, CHUNK + 257, 1000, 2 * CHUNK];

    fn set(seed: u64) -> Result<Vec<Tensor>> {
        let tensor = |(i, n): (usize, &usize)| random(&[*n], seed + i as u64)?.to_dtype(DType::F32);
        SIZES.iter().enumerate().map(tensor).collect()
    }

    fn vars(tensors: &[Tensor]) -> Result<Vec<Var>> {
        tensors.iter().map(Var::from_tensor).collect()
    }

    /// A parameter with its moments, and its copy in 16 bits.
    struct Part {
        param: Var,
        moments: AdamWMoments,
        copy: Option<Var>,
    }

    fn parts(eight_bits: bool, copies: Option<DType>) -> Result<Vec<Part>> {
        let part = |param: Var| -> Result<Part> {
            let zeros = || Var::zeros(param.shape(), DType::F32, param.device());
            let moments = if eight_bits {
                let (n, device) = (param.elem_count(), param.device());
                AdamWMoments::Blocks(BlockMoments::zeros(n, device)?)
            } else {
                let (first, second) = (zeros()?, zeros()?);
                AdamWMoments::Full { first, second }
            };
            let copy = |dtype| Var::zeros(param.shape(), dtype, param.device());
            Ok(Part {
                copy: copies.map(copy).transpose()?,
                param,
                moments,
            })
        };
        vars(&set(1)?)?.into_iter().map(part).collect()
    }

    type Steps<'a> = &'a dyn Fn(&mut [AdamWUpdate<'_>], f64, &AdamWStep) -> Result<()>;

    /// Three steps with gradients that are rounded to the first of two types and handed over as the second.
    fn three_steps(parts: &mut [Part], grads: [DType; 2], steps: Steps<'_>) -> Result<()> {
        for number in 1..=3 {
            let grads: Vec<Tensor> = set(100 * number)?
                .iter()
                .map(|g| cast(&cast(g, grads[0])?, grads[1]))
                .collect::<Result<_>>()?;
            let step = AdamWStep {
                learning_rate: 0.01,
                beta1: 0.9,
                beta2: 0.99,
                epsilon: 1e-3,
                weight_decay: 0.5,
                step: number,
            };
            let pairs = parts.iter_mut().zip(&grads);
            let mut updates: Vec<AdamWUpdate<'_>> = pairs
                .map(|(part, grad)| AdamWUpdate {
                    param: &part.param,
                    moments: &mut part.moments,
                    grad,
                    copy: part.copy.as_ref(),
                })
                .collect();
            steps(&mut updates, 0.5, &step)?;
        }
        Ok(())
    }

    /// The values that a moment in 8 bits stands for.
    fn dequantized(moment: &BlockQuantized, signed: bool) -> Result<Tensor> {
        let map = if signed { &*SIGNED } else { &*UNSIGNED };
        let codes = moment.codes.to_vec1::<u8>()?;
        let absmax = moment.absmax.to_vec1::<f32>()?;
        let value = |(i, &code): (usize, &u8)| map.value(code) * absmax[i / 256];
        Tensor::from_iter(codes.iter().enumerate().map(value), &Device::Cpu)
    }

    fn close(got: &Tensor, want: &Tensor) -> Result<()> {
        let [got, want] = [got, want].map(|x| x.to_dtype(DType::F64));
        assert_close(&got?, &want?, 1e-6)
    }

    fn same_copy(part: &Part) -> Result<()> {
        let Some(copy) = &part.copy else {
            return Ok(());
        };
        let want = cast(&part.param.as_detached_tensor(), copy.dtype())?;
        let wide = |x: &Tensor| x.to_dtype(DType::F32)?.to_vec1::<f32>();
        assert_eq!(wide(copy)?, wide(&want)?);
        Ok(())
    }

    #[test]
    fn cuda_adamw_equals_the_cpu() -> Result<()> {
        for (dtype, copies) in [
            (DType::F32, None),
            (DType::F16, Some(DType::F16)),
            (DType::BF16, Some(DType::BF16)),
        ] {
            let (mut got, mut want) = (parts(false, copies)?, parts(false, copies)?);
            three_steps(&mut got, [dtype, dtype], &adamw_steps)?;
            three_steps(&mut want, [dtype, DType::F32], &ops::adamw_steps)?;
            for (got, want) in got.iter().zip(&want) {
                close(&got.param, &want.param)?;
                let (
                    AdamWMoments::Full {
                        first: m,
                        second: v,
                    },
                    AdamWMoments::Full { first, second },
                ) = (&got.moments, &want.moments)
                else {
                    panic!("moments of another kind");
                };
                close(m, first)?;
                close(v, second)?;
                same_copy(got)?;
                same_copy(want)?;
            }
        }
        Ok(())
    }

    #[test]
    fn cuda_adamw8bit_equals_the_cpu() -> Result<()> {
        for (dtype, copies) in [(DType::F32, Some(DType::F16)), (DType::BF16, None)] {
            let (mut got, mut want) = (parts(true, copies)?, parts(true, copies)?);
            three_steps(&mut got, [dtype, dtype], &adamw_steps)?;
            three_steps(&mut want, [dtype, DType::F32], &ops::adamw_steps)?;
            for (got, want) in got.iter().zip(&want) {
                close(&got.param, &want.param)?;
                let (AdamWMoments::Blocks(m), AdamWMoments::Blocks(w)) =
                    (&got.moments, &want.moments)
                else {
                    panic!("moments of another kind");
                };
                for (got, want, signed) in
                    [(&m.first, &w.first, true), (&m.second, &w.second, false)]
                {
                    close(&dequantized(got, signed)?, &dequantized(want, signed)?)?;
                    close(&got.absmax, &want.absmax)?;
                }
                same_copy(got)?;
            }
        }
        Ok(())
    }

    #[test]
    fn cuda_ema_equals_the_cpu() -> Result<()> {
        let sources = set(7)?;
        let [got, want] = [vars(&set(1)?)?, vars(&set(1)?)?];
        let pairs = got.iter().zip(&sources);
        let updates: Vec<EmaUpdate<'_>> = pairs
            .map(|(target, source)| EmaUpdate { target, source })
            .collect();
        ema_updates(&updates, 0.95)?;
        for (i, want) in want.iter().enumerate() {
            crate::ops::update::ema_update(want, &sources[i], 0.95)?;
            // Both round once.
            assert_eq!(got[i].to_vec1::<f32>()?, want.to_vec1::<f32>()?);
        }
        Ok(())
    }

    #[test]
    fn cuda_norms_equal_those_of_the_cpu() -> Result<()> {
        // The CPU's sums of 1024 numbers hold squares of the greater scale.
        for scale in [1.0, 1e17] {
            let all = set(3)?;
            let all: Vec<Tensor> = all.iter().map(|x| x * scale).collect::<Result<_>>()?;
            let all: Vec<&Tensor> = all.iter().collect();
            let (got, want) = (squared_norms(&all)?, ops::squared_norms(&all)?);
            assert_eq!(got.len(), want.len());
            for (got, want) in got.into_iter().zip(want) {
                assert!((got / want - 1.0).abs() < 1e-6, "{got} {want}");
            }
        }
        // A sum of squares that f16 does not hold, of several types and a view into a tensor.
        let large = Tensor::full(300f32, CHUNK + 5, &Device::Cpu)?;
        let view = large.narrow(0, 3, CHUNK)?;
        let all = [
            large.to_dtype(DType::F16)?,
            large.to_dtype(DType::BF16)?,
            view,
        ];
        let elements = [CHUNK + 5, CHUNK + 5, CHUNK].map(|n| 9e4 * n as f64);
        let got = squared_norms(&all.iter().collect::<Vec<_>>())?;
        assert_eq!(got, elements);
        assert!(squared_norms(&[])?.is_empty());
        let infinite = Tensor::new(&[1f32, f32::NEG_INFINITY], &Device::Cpu)?;
        assert_eq!(squared_norms(&[&infinite])?, [f64::INFINITY]);
        Ok(())
    }
}
