//! Reducing the rank of adapters.

use candle_core::{DType, Device, Tensor};
use nalgebra::{DMatrix, SVD};
use rayon::prelude::*;

use super::{Adapter, Lora, LoraError};

/// The part of an adapter that a reduction of rank keeps, as the share of the Frobenius norm of the changes `ΔW`.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// Of all modules together, 0 to 1.
    pub share: f64,
    /// Of the module that loses most.
    pub least: f64,
    /// That module.
    pub module: String,
}

/// Squares of the Frobenius norms of a change: what is kept, and all.
#[derive(Clone, Copy, Debug)]
struct Norms {
    kept: f64,
    all: f64,
}

impl Norms {
    fn share(self) -> f64 {
        match self.all > 0.0 {
            true => (self.kept / self.all).sqrt(),
            false => 1.0,
        }
    }
}

/// The best approximation of a LoRA with adapters of at most `rank`, in the Frobenius norm of each `ΔW`, and what it keeps. The new
/// adapters have alpha = rank; adapters of a lower rank stay as they are.
///
/// `ΔW` itself is never formed: with `up = Q₁R₁` and `downᵀ = Q₂R₂`, its singular values are those of the `r × r` matrix `R₁R₂ᵀ`.
///
/// # Errors
/// When a decomposition does not converge.
pub fn reduce_rank(lora: &Lora, rank: usize) -> Result<(Lora, Kept), LoraError> {
    let reduced = lora
        .adapters
        .par_iter()
        .map(|(module, adapter)| {
            let failed = || LoraError::NoSvd {
                module: module.clone(),
            };
            let (adapter, norms) = adapter.reduced(rank)?.ok_or_else(failed)?;
            Ok((module.clone(), adapter, norms))
        })
        .collect::<Result<Vec<_>, LoraError>>()?;
    let mut sum = Norms {
        kept: 0.0,
        all: 0.0,
    };
    let mut kept = Kept {
        share: 1.0,
        least: 1.0,
        module: String::new(),
    };
    let mut smaller = Lora::default();
    for (module, adapter, norms) in reduced {
        sum.kept += norms.kept;
        sum.all += norms.all;
        if kept.module.is_empty() || norms.share() < kept.least {
            (kept.least, kept.module) = (norms.share(), module.clone());
        }
        smaller.adapters.insert(module, adapter);
    }
    kept.share = sum.share();
    Ok((smaller, kept))
}

impl Adapter {
    /// The adapter with at most `rank`; `None` if its decomposition does not converge.
    fn reduced(&self, rank: usize) -> Result<Option<(Self, Norms)>, LoraError> {
        let up = matrix(&self.up)?;
        let down = matrix(&self.down)?;
        let (up_basis, up_rest) = up.qr().unpack();
        let (down_basis, down_rest) = down.transpose().qr().unpack();
        let core = up_rest * down_rest.transpose() * self.scaling();
        // Of the order of 1, because the decomposition compares with absolute tolerances.
        let size = core.amax();
        let size = if size > 0.0 { size } else { 1.0 };
        let Some(svd) = SVD::try_new(core / size, true, true, f64::EPSILON, 0) else {
            return Ok(None);
        };
        let (Some(left), Some(right)) = (svd.u, svd.v_t) else {
            return Ok(None);
        };
        let values = svd.singular_values * size;
        let square = |n: usize| {
            values
                .iter()
                .take(n)
                .map(|value| value * value)
                .sum::<f64>()
        };
        let all = square(values.len());
        if rank >= self.rank() {
            return Ok(Some((self.clone(), Norms { kept: all, all })));
        }
        let rank = rank.min(values.len());
        let roots = DMatrix::from_diagonal(&values.rows(0, rank).map(f64::sqrt));
        let up = up_basis * left.columns(0, rank) * &roots;
        let down = roots * right.rows(0, rank) * down_basis.transpose();
        let norms = Norms {
            kept: square(rank),
            all,
        };
        let adapter = Self {
            up: tensor(&up, &with_size(&self.up, 1, rank))?,
            down: tensor(&down, &with_size(&self.down, 0, rank))?,
            alpha: rank as f64,
        };
        Ok(Some((adapter, norms)))
    }
}

/// The shape of a tensor with the dimension `dim` as `size`.
fn with_size(tensor: &Tensor, dim: usize, size: usize) -> Vec<usize> {
    let dims = tensor.dims().iter().enumerate();
    dims.map(|(i, &n)| if i == dim { size } else { n })
        .collect()
}

/// A tensor `[a, b, …]` as a matrix `[a, b·…]`.
fn matrix(tensor: &Tensor) -> Result<DMatrix<f64>, LoraError> {
    let tensor = tensor.flatten_from(1)?.to_dtype(DType::F64)?;
    let (rows, columns) = tensor.dims2()?;
    let values = tensor.flatten_all()?.to_vec1::<f64>()?;
    Ok(DMatrix::from_row_slice(rows, columns, &values))
}

/// A matrix as a tensor of `shape`, f32.
fn tensor(matrix: &DMatrix<f64>, shape: &[usize]) -> Result<Tensor, LoraError> {
    // The transpose, stored by columns, has the rows in order.
    let rows = matrix.transpose();
    let values: Vec<f32> = rows.iter().map(|&value| value as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}
