//! Helpers of this module's unit tests: seeded tensors, comparison, finite differences in `f64`.
//!
//! The tests run on the device that `COFFEY_TEST_DEVICE` names, as `cuda:0`: the CPU if it is not set. So the same binary checks
//! a GPU, whose results are compared with the CPU's kernels where a test has both.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::gradients;

/// The device that the tests run on.
pub(super) fn device() -> Device {
    let name = std::env::var("COFFEY_TEST_DEVICE");
    let device = name.as_deref().unwrap_or("cpu").parse().unwrap();
    crate::device::open(device).unwrap()
}

/// Copies of `tensors` on the CPU.
pub(super) fn on_cpu(tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    tensors.iter().map(|x| x.to_device(&Device::Cpu)).collect()
}

/// A seeded tensor of `f64` in [-1, 1] on [`device`].
pub(super) fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let mut state = seed;
    let data: Vec<f64> = (0..n)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
        })
        .collect();
    Tensor::from_vec(data, shape, &device())
}

pub(super) fn assert_close(got: &Tensor, want: &Tensor, tolerance: f64) -> Result<()> {
    let worst = largest_difference(got, want)?;
    assert!(worst <= tolerance, "differs by {worst}");
    Ok(())
}

/// The result of `f`, and the gradient of `Σ f(inputs)·r` with respect to each input, for a fixed random `r`.
fn result_and_gradients(
    inputs: &[Tensor],
    f: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<(Tensor, Vec<Tensor>)> {
    let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let (grads, out) = gradients(|| {
        let out = f(&tensors)?;
        Ok((out.mul(&direction(&out)?)?, out.detach()))
    })?;
    let gradient = |var| grads.get(var).expect("a gradient").clone();
    Ok((
        out,
        vars.iter().map(|var| gradient(var.as_tensor())).collect(),
    ))
}

/// [`result_and_gradients`] for inputs as `dtype`: the result, then the gradients.
pub(super) fn computed_as(
    dtype: DType,
    inputs: &[Tensor],
    f: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let inputs = inputs.iter().map(|x| x.to_dtype(dtype));
    let (out, gradients) = result_and_gradients(&inputs.collect::<Result<Vec<_>>>()?, f)?;
    Ok([vec![out], gradients].concat())
}

/// The fixed random tensor that a result of the shape, dtype and device of `out` is multiplied by.
fn direction(out: &Tensor) -> Result<Tensor> {
    random(out.dims(), 99)?
        .to_dtype(out.dtype())?
        .to_device(out.device())
}

/// The largest difference of two tensors of one shape, NaN if one is there.
pub(super) fn largest_difference(got: &Tensor, want: &Tensor) -> Result<f64> {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (numbers(got)?, numbers(want)?);
    let differences = got.iter().zip(&want).map(|(a, b)| (a - b).abs());
    // In this order NaN is the greatest, which candle's maximum may pass over.
    Ok(differences.max_by(f64::total_cmp).unwrap_or(0.0))
}

/// The elements of a tensor.
pub(super) fn numbers(x: &Tensor) -> Result<Vec<f64>> {
    let x = x.to_device(&Device::Cpu)?.flatten_all()?;
    x.to_dtype(DType::F64)?.to_vec1()
}

/// Checks the gradient of `Σ f(inputs)·r`, for a fixed random `r`, against central differences: every element of every input.
pub(super) fn check_gradients(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    let (out, gradients) = result_and_gradients(inputs, &f)?;
    let direction = direction(&out)?;
    let objective = |inputs: &[Tensor]| f(inputs)?.mul(&direction)?.sum_all()?.to_scalar::<f64>();
    const H: f64 = 1e-6;
    for (which, gradient) in gradients.iter().enumerate() {
        let grad = gradient.flatten_all()?.to_vec1::<f64>()?;
        let base = inputs[which].flatten_all()?.to_vec1::<f64>()?;
        for (i, &got) in grad.iter().enumerate() {
            let at = |h: f64| {
                let mut moved = base.clone();
                moved[i] += h;
                let mut inputs = inputs.to_vec();
                inputs[which] = Tensor::from_vec(moved, inputs[which].dims(), &device())?;
                objective(&inputs)
            };
            let want = (at(H)? - at(-H)?) / (2.0 * H);
            assert!(
                (got - want).abs() <= 1e-6 * (1.0 + want.abs()),
                "input {which}, element {i}: gradient {got}, finite difference {want}"
            );
        }
    }
    Ok(())
}

mod tests {
    use super::*;
    use crate::ops::{conv2d, geglu, linear, quick_gelu, upsample_nearest_2x};

    #[test]
    fn small_layer_gradients_match_finite_differences() -> Result<()> {
        check_gradients(&[random(&[2, 3, 6], 1)?], |t| geglu(&t[0]))?;
        check_gradients(&[random(&[2, 3, 6], 1)?], |t| quick_gelu(&t[0]))?;
        check_gradients(&[random(&[2, 3, 2, 3], 1)?], |t| upsample_nearest_2x(&t[0]))?;
        let inputs = [
            random(&[2, 3, 4], 1)?,
            random(&[5, 4], 2)?,
            random(&[5], 3)?,
        ];
        check_gradients(&inputs, |t| linear(&t[0], &t[1], Some(&t[2])))
    }

    #[test]
    fn frozen_operands_get_no_gradient() -> Result<()> {
        let x = Var::from_tensor(&random(&[1, 2, 4, 4], 1)?)?;
        let weight = random(&[2, 2, 3, 3], 2)?;
        let sum = || conv2d(&x, &weight, None, 1, 1)?.sum_all();
        let (grads, ()) = gradients(|| Ok((sum()?, ())))?;
        assert!(grads.get(&x).is_some());
        assert!(grads.get(&weight).is_none());
        Ok(())
    }
}
