//! Every operation against PyTorch: results and gradients in each dtype, as exact as PyTorch's own.
//!
//! `tests/cuda/pytorch_ops.py` computes what is compared: on a GPU at Stable Diffusion 1.5's shapes, on the CPU at small ones.

use std::path::Path;
use std::process::Command;

use candle_core::{DType, Result, Tensor, Var, bail};
use serde::Deserialize;

use super::gradcheck::{device, largest_difference, numbers};
use super::*;

/// A case as `cases.json` has it.
#[derive(Deserialize)]
struct Case {
    name: String,
    operation: String,
    /// Arguments that are not tensors.
    numbers: Vec<usize>,
    /// File of the operands, the result and the gradients.
    file: String,
    /// Errors of PyTorch's result and of its gradients.
    errors: Vec<f64>,
}

impl Case {
    fn compute(&self, t: &[Tensor]) -> Result<Tensor> {
        let last = t.get(2);
        match (self.operation.as_str(), self.numbers.as_slice(), t) {
            ("attention", &[heads, causal], [q, k, v]) => {
                attention(q, k, v, heads, causal == 1, Attention::MemoryEfficient)
            }
            ("conv2d", &[stride, padding], [x, w, _]) => conv2d(x, w, last, stride, padding),
            ("group_norm", &[groups, silu], [x, w, b]) => {
                group_norm(x, w, b, groups, 1e-5, silu == 1)
            }
            ("layer_norm", [], [x, w, b]) => layer_norm(x, w, b, 1e-5),
            ("linear", [], [x, w, ..]) => linear(x, w, last),
            ("geglu", [], [x]) => geglu(x),
            ("silu", [], [x]) => silu(x),
            ("gelu", [], [x]) => gelu(x),
            ("quick_gelu", [], [x]) => quick_gelu(x),
            ("upsample_nearest_2x", [], [x]) => upsample_nearest_2x(x),
            ("add", [], [a, b]) => add(a, b),
            ("add_to_rows", [], [x, row]) => add_to_rows(x, row),
            ("concatenate", [], [a, b]) => concatenate(a, b),
            ("map_to_tokens", [], [x, w, b]) => map_to_tokens(x, w, b),
            ("tokens_to_map", &[height, width], [x, w, b]) => {
                tokens_to_map(x, w, b, (height, width))
            }
            (operation, numbers, _) => bail!("{operation} {numbers:?} of {} tensors", t.len()),
        }
    }

    /// The quantities that are less exact than PyTorch's, and a line with the errors of all.
    fn check(&self, folder: &Path) -> Result<(Vec<String>, String)> {
        let tensors = candle_core::safetensors::load(folder.join(&self.file), &device())?;
        let operands = (0..self.errors.len() - 1).map(|i| &tensors[&format!("input.{i}")]);
        let vars: Vec<Var> = operands.map(Var::from_tensor).collect::<Result<_>>()?;
        let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let (grads, out) = gradients(|| {
            let out = self.compute(&inputs)?;
            Ok((out.mul(&tensors["direction"])?, out))
        })?;
        let dtype = out.dtype();
        let mut got = vec![("out".to_owned(), out.detach())];
        for (i, var) in vars.iter().enumerate() {
            let grad = grads.get(var).expect("a gradient").clone();
            got.push((format!("grad.{i}"), grad));
        }
        let (mut worse, mut line) = (Vec::new(), format!("{}:", self.name));
        for ((quantity, got), theirs) in got.iter().zip(&self.errors) {
            let error = error(got, &tensors[quantity])?;
            line += &format!(" {quantity} {error:.1e} ({theirs:.1e})");
            if got.dtype() != dtype || error.is_nan() || error > limit(dtype, *theirs) {
                let name = &self.name;
                worse.push(format!(
                    "{name}: {quantity} {error:.1e}, PyTorch's {theirs:.1e}"
                ));
            }
        }
        Ok((worse, line))
    }
}

/// The error that a result may have where PyTorch's is `theirs`: three times that, or what its last bits make.
fn limit(dtype: DType, theirs: f64) -> f64 {
    let bits: f64 = match dtype {
        DType::F16 => 2e-3,
        DType::BF16 => 1.6e-2,
        _ => 2e-6,
    };
    bits.max(3.0 * theirs)
}

/// The largest difference over the largest number.
fn error(got: &Tensor, want: &Tensor) -> Result<f64> {
    let largest = numbers(want)?.into_iter().map(f64::abs);
    Ok(largest_difference(got, want)? / largest.max_by(f64::total_cmp).unwrap_or(1.0))
}

#[test]
#[ignore = "needs COFFEY_PYTHON: a Python with PyTorch"]
fn operations_equal_pytorch() -> Result<()> {
    let python = std::env::var_os("COFFEY_PYTHON")
        .expect("COFFEY_PYTHON is not set; README.md says how to run this test");
    let folder = tempfile::tempdir().unwrap();
    let mut script = Command::new(python);
    // The checkout is the working directory, for cargo and for tests/cuda/on_gpu.sh.
    script.arg("tests/cuda/pytorch_ops.py").arg(folder.path());
    if device().is_cpu() {
        script.arg("--tiny");
    }
    let status = script.status().unwrap();
    assert!(status.success(), "{script:?}: {status}");
    let cases = std::fs::read(folder.path().join("cases.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&cases).unwrap();
    let mut worse = Vec::new();
    for case in &cases {
        let (found, line) = case.check(folder.path())?;
        println!("{line}");
        worse.extend(found);
    }
    assert!(
        worse.is_empty(),
        "less exact than PyTorch:\n{}",
        worse.join("\n")
    );
    println!("{} cases are as exact as PyTorch", cases.len());
    Ok(())
}
