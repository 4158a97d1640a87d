//! Measures the seconds of each operation of `coffey::ops`, forward and backward; prints one JSON line a case.
//!
//! This is coffey's side of `kernels_vs_pytorch.py`, which reads the same `kernels.json`.
//!
//! `cargo bench --bench kernels -- [--seconds 0.3] [--only WORD]`; `RAYON_NUM_THREADS` sets the threads.

use std::error::Error;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use clap::Parser;
use coffey::ops;
use serde::Deserialize;
use serde_json::json;

/// Seconds of coffey's tensor operations, as JSON lines.
#[derive(Parser)]
struct Args {
    /// Seconds spent on each case
    #[arg(long, default_value_t = 0.3)]
    seconds: f64,
    /// Only cases whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Passed by cargo to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    #[serde(flatten)]
    kernel: Kernel,
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Kernel {
    Conv2d {
        batch: usize,
        channels: usize,
        out: usize,
        side: usize,
        kernel: usize,
        stride: usize,
    },
    Linear {
        rows: usize,
        width: usize,
        out: usize,
    },
    Attention {
        batch: usize,
        heads: usize,
        queries: usize,
        keys: usize,
        head_width: usize,
    },
    GroupNormSilu {
        batch: usize,
        channels: usize,
        side: usize,
        groups: usize,
    },
    LayerNorm {
        rows: usize,
        width: usize,
    },
    Geglu {
        rows: usize,
        width: usize,
    },
}

impl Kernel {
    /// Shapes of the variables, in the order in which [`Self::forward`] takes them.
    fn shapes(&self) -> Vec<Vec<usize>> {
        match *self {
            Self::Conv2d {
                batch,
                channels,
                out,
                side,
                kernel,
                ..
            } => vec![
                vec![batch, channels, side, side],
                vec![out, channels, kernel, kernel],
                vec![out],
            ],
            Self::Linear { rows, width, out } => {
                vec![vec![rows, width], vec![out, width], vec![out]]
            }
            Self::Attention {
                batch,
                heads,
                queries,
                keys,
                head_width,
            } => {
                let tokens = |n| vec![batch, n, heads * head_width];
                vec![tokens(queries), tokens(keys), tokens(keys)]
            }
            Self::GroupNormSilu {
                batch,
                channels,
                side,
                ..
            } => vec![
                vec![batch, channels, side, side],
                vec![channels],
                vec![channels],
            ],
            Self::LayerNorm { rows, width } => vec![vec![rows, width], vec![width], vec![width]],
            Self::Geglu { rows, width } => vec![vec![rows, 2 * width]],
        }
    }

    fn forward(&self, variables: &[Var]) -> candle_core::Result<Tensor> {
        match (self, variables) {
            (Self::Conv2d { kernel, stride, .. }, [x, weight, bias]) => {
                ops::conv2d(x, weight, Some(bias), *stride, kernel / 2)
            }
            (Self::Linear { .. }, [x, weight, bias]) => ops::linear(x, weight, Some(bias)),
            (Self::Attention { heads, .. }, [q, k, v]) => {
                ops::attention(q, k, v, *heads, false, ops::Attention::MemoryEfficient)
            }
            (Self::GroupNormSilu { groups, .. }, [x, weight, bias]) => {
                ops::group_norm(x, weight, bias, *groups, 1e-5, true)
            }
            (Self::LayerNorm { .. }, [x, weight, bias]) => ops::layer_norm(x, weight, bias, 1e-5),
            (Self::Geglu { .. }, [x]) => ops::geglu(x),
            _ => candle_core::bail!("{} variables are not this kernel's", variables.len()),
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Median seconds of a pass.
struct Timing {
    /// The forward pass, which records a graph.
    forward: f64,
    /// The backward pass after it.
    backward: f64,
}

/// Repeats both passes for at least `seconds`.
fn measure(kernel: &Kernel, seconds: f64) -> candle_core::Result<Timing> {
    let variables = kernel
        .shapes()
        .into_iter()
        .map(|shape| Var::randn_f64(0.0, 0.1, shape, DType::F32, &Device::Cpu))
        .collect::<candle_core::Result<Vec<_>>>()?;
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    let mut begun = None;
    while begun.is_none_or(|at: Instant| at.elapsed().as_secs_f64() < seconds) || forward.len() < 3
    {
        let start = Instant::now();
        let (gradients, middle) = ops::gradients(|| {
            let y = kernel.forward(&variables)?;
            Ok((y, Instant::now()))
        })?;
        let end = Instant::now();
        if variables.iter().any(|v| gradients.get(v).is_none()) {
            candle_core::bail!("a variable got no gradient");
        }
        if begun.is_some() {
            forward.push((middle - start).as_secs_f64());
            backward.push((end - middle).as_secs_f64());
        }
        begun = begun.or(Some(end)); // the first pass warms up
    }
    Ok(Timing {
        forward: median(forward),
        backward: median(backward),
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let cases: Vec<Case> = serde_json::from_str(include_str!("kernels.json"))?;
    for case in cases.iter().filter(|case| case.name.contains(&args.only)) {
        // As in a step: inside the pool.
        let Timing { forward, backward } =
            ops::in_pool(&Device::Cpu, || measure(&case.kernel, args.seconds))?;
        println!(
            "{}",
            json!({ "name": case.name, "forward": forward, "backward": backward })
        );
    }
    Ok(())
}
