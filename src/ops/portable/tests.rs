//! Every operation of this folder against finite differences and the CPU kernel.

use candle_core::{DType, Result, Tensor, Var};

use super::*;
use crate::ops;
use crate::ops::autograd_op::apply;
use crate::ops::gradcheck::{assert_close, check_gradients, computed_as, on_cpu, random};

type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Checks a portable operation in `f64` against finite differences and the CPU kernel, and other dtypes of both against `f64`.
fn check(inputs: &[Tensor], f: Op<'_>, kernel: Op<'_>) -> Result<()> {
    check_gradients(inputs, f)?;
    let exact = computed_as(DType::F64, inputs, f)?;
    for (got, want) in exact
        .iter()
        .zip(computed_as(DType::F64, &on_cpu(inputs)?, kernel)?)
    {
        assert_close(got, &want, 1e-11)?;
    }
    for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        for f in [f, kernel] {
            for (got, want) in computed_as(dtype, inputs, f)?.iter().zip(&exact) {
                assert_eq!(got.dtype(), dtype);
                let scale = want.abs()?.max_all()?.to_scalar::<f64>()?;
                assert_close(&got.to_dtype(DType::F64)?, want, tolerance * scale)?;
            }
        }
    }
    Ok(())
}

#[test]
fn portable_conv2d_equals_the_kernel() -> Result<()> {
    for (shape, kernel, stride, padding) in [
        ([2, 3, 5, 6], [3, 3], 1, 1),
        ([2, 3, 6, 6], [3, 3], 2, 1),
        ([1, 3, 7, 5], [3, 3], 2, 0),
        ([2, 3, 4, 5], [1, 1], 1, 0),
        ([1, 3, 4, 4], [1, 1], 1, 1),
        ([1, 3, 5, 6], [3, 1], 1, 0),
        ([1, 3, 8, 7], [2, 3], 3, 1),
    ] {
        let inputs = [
            random(&shape, 1)?,
            random(&[4, 3, kernel[0], kernel[1]], 2)?,
            random(&[4], 3)?,
        ];
        check(
            &inputs,
            &|t| conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
            &|t| ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
        )?;
    }
    // A bias for each image; channels enough for the kernel's other way.
    let inputs = [
        random(&[4, 16, 8, 8], 1)?,
        random(&[16, 16, 3, 3], 2)?,
        random(&[4, 16], 3)?,
    ];
    let f = |t: &[Tensor]| conv2d(&t[0], &t[1], Some(&t[2]), 1, 1);
    let kernel = |t: &[Tensor]| ops::conv2d(&t[0], &t[1], Some(&t[2]), 1, 1);
    let ours = computed_as(DType::F64, &on_cpu(&inputs)?, &kernel)?;
    for (got, want) in ours.iter().zip(computed_as(DType::F64, &inputs, &f)?) {
        assert_close(got, &want, 1e-11)?;
    }
    Ok(())
}

#[test]
fn portable_attention_equals_the_kernel() -> Result<()> {
    for (n, m, causal) in [(5, 3, false), (5, 5, true)] {
        let inputs = [
            random(&[2, n, 4], 1)?,
            random(&[2, m, 4], 2)?,
            random(&[2, m, 4], 3)?,
        ];
        let kernel = |t: &[Tensor]| {
            let kind = ops::Attention::MemoryEfficient;
            ops::attention(&t[0], &t[1], &t[2], 2, causal, kind)
        };
        // Two queries a block, so that blocks meet; then as many as the function itself takes.
        let blocks = |t: &[Tensor]| {
            let op = attention::AttentionOp {
                heads: 2,
                causal,
                rows: 2,
            };
            apply(op, [&t[0], &t[1], &t[2]])
        };
        check(&inputs, &blocks, &kernel)?;
        check(
            &inputs,
            &|t| attention(&t[0], &t[1], &t[2], 2, causal),
            &kernel,
        )?;
        check(
            &inputs,
            &|t| plain_attention(&t[0], &t[1], &t[2], 2, causal),
            &kernel,
        )?;
    }
    Ok(())
}

#[test]
fn portable_norms_equal_the_kernels() -> Result<()> {
    for silu in [false, true] {
        let inputs = [
            random(&[2, 6, 3, 4], 1)?,
            random(&[6], 2)?,
            random(&[6], 3)?,
        ];
        check(
            &inputs,
            &|t| group_norm(&t[0], &t[1], &t[2], 3, 1e-5, silu),
            &|t| ops::group_norm(&t[0], &t[1], &t[2], 3, 1e-5, silu),
        )?;
    }
    let inputs = [random(&[2, 7, 5], 1)?, random(&[5], 2)?, random(&[5], 3)?];
    check(&inputs, &|t| layer_norm(&t[0], &t[1], &t[2], 1e-5), &|t| {
        ops::layer_norm(&t[0], &t[1], &t[2], 1e-5)
    })
}

#[test]
fn portable_small_layers_equal_the_kernels() -> Result<()> {
    let inputs = [random(&[6, 4], 1)?, random(&[5, 4], 2)?, random(&[5], 3)?];
    check(&inputs, &|t| linear(&t[0], &t[1], Some(&t[2])), &|t| {
        ops::linear(&t[0], &t[1], Some(&t[2]))
    })?;
    let inputs = [
        random(&[2, 4, 2, 3], 1)?,
        random(&[5, 4, 1, 1], 2)?,
        random(&[5], 3)?,
    ];
    check(&inputs, &|t| map_to_tokens(&t[0], &t[1], &t[2]), &|t| {
        ops::map_to_tokens(&t[0], &t[1], &t[2])
    })?;
    let inputs = [
        random(&[2, 6, 4], 1)?,
        random(&[5, 4], 2)?,
        random(&[5], 3)?,
    ];
    check(
        &inputs,
        &|t| tokens_to_map(&t[0], &t[1], &t[2], (2, 3)),
        &|t| ops::tokens_to_map(&t[0], &t[1], &t[2], (2, 3)),
    )?;
    check(&[random(&[2, 3, 6], 1)?], &|t| geglu(&t[0]), &|t| {
        ops::geglu(&t[0])
    })?;
    check(
        &[random(&[2, 3, 2, 3], 1)?],
        &|t| upsample_nearest_2x(&t[0]),
        &|t| ops::upsample_nearest_2x(&t[0]),
    )
}

#[test]
fn portable_frozen_operands_get_no_gradient_and_no_graph() -> Result<()> {
    let x = random(&[1, 4, 3, 3], 1)?;
    let (w3, w1) = (random(&[4, 4, 3, 3], 2)?, random(&[4, 4], 3)?);
    let b = random(&[4], 4)?;
    let rows = x.flatten_from(2)?;
    let tokens = rows.t()?.contiguous()?;
    let ops: [(&str, [&Tensor; 3], Op<'_>); 5] = [
        ("conv2d", [&x, &w3, &b], &|t| {
            conv2d(&t[0], &t[1], Some(&t[2]), 1, 1)
        }),
        ("linear", [&tokens.squeeze(0)?, &w1, &b], &|t| {
            linear(&t[0], &t[1], Some(&t[2]))
        }),
        ("group_norm", [&x, &b, &b.copy()?], &|t| {
            group_norm(&t[0], &t[1], &t[2], 2, 1e-5, true)
        }),
        ("layer_norm", [&tokens, &b, &b.copy()?], &|t| {
            layer_norm(&t[0], &t[1], &t[2], 1e-5)
        }),
        (
            "attention",
            [&tokens, &tokens.copy()?, &tokens.copy()?],
            &|t| attention(&t[0], &t[1], &t[2], 2, false),
        ),
    ];
    for (name, inputs, f) in ops {
        assert!(!f(&inputs.map(Tensor::clone))?.track_op(), "{name}");
        for tracked in 0..3 {
            let var = Var::from_tensor(inputs[tracked])?;
            let mut inputs = inputs.map(Tensor::clone);
            inputs[tracked] = var.as_tensor().clone();
            let (grads, ()) = ops::gradients(|| Ok((f(&inputs)?.sqr()?, ())))?;
            for (i, input) in inputs.iter().enumerate() {
                assert_eq!(grads.get(input).is_some(), i == tracked, "{name} {i}");
            }
        }
    }
    Ok(())
}
