//! Recomputation: blocks of a network whose inner results are made anew in the backward pass instead of being kept.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor, Var};

use super::backward::{backward, deliver_all};
use super::computed::{Computed, TensorOp};

/// What becomes of the results inside a block between its forward and its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// They are kept.
    All,
    /// They are dropped, and made anew when the backward needs them.
    Nothing,
}

/// Runs a block of a network as a graph of its own: `block(x, condition)`, differentiable in both and in the variables
/// inside. When neither is tracked the block simply runs.
///
/// `block` must give the same result for the same inputs. The gradients are then the same to the last bit whatever `keep`
/// says. They are found by [`ops::backward`](super::backward()) only: candle's own is refused.
///
/// # Errors
/// When the block fails.
pub fn segment<F>(x: &Tensor, condition: &Tensor, keep: Keep, block: F) -> Result<Tensor>
where
    F: Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    if !x.track_op() && !condition.track_op() {
        return block(x, condition);
    }
    let run = match keep {
        Keep::All => Some(Run::tracked(&block, x, condition)?),
        Keep::Nothing => None,
    };
    let output = match &run {
        Some(run) => run.output.detach(),
        None => block(&x.detach(), &condition.detach())?.detach(),
    };
    let op = Segment {
        block,
        run: Mutex::new(run),
    };
    x.apply_op2(condition, Computed::new(op, output))
}

/// One pass through a block: its result and the leaves its graph ends in, one for each tracked input.
struct Run {
    output: Tensor,
    x: Option<Var>,
    condition: Option<Var>,
}

impl Run {
    fn tracked<F>(block: &F, x: &Tensor, condition: &Tensor) -> Result<Self>
    where
        F: Fn(&Tensor, &Tensor) -> Result<Tensor>,
    {
        let leaf = |t: &Tensor| t.track_op().then(|| Var::from_tensor(t)).transpose();
        let (x_leaf, condition_leaf) = (leaf(x)?, leaf(condition)?);
        let input = |leaf: &Option<Var>, t: &Tensor| match leaf {
            Some(leaf) => leaf.as_tensor().clone(),
            None => t.clone(),
        };
        Ok(Self {
            output: block(&input(&x_leaf, x), &input(&condition_leaf, condition))?,
            x: x_leaf,
            condition: condition_leaf,
        })
    }
}

struct Segment<F> {
    block: F,
    /// What [`Keep::All`] kept; the backward takes it and so frees it.
    run: Mutex<Option<Run>>,
}

impl<F> TensorOp<2> for Segment<F>
where
    F: Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    const NAME: &'static str = "segment";

    fn forward(&self, [x, condition]: [&Tensor; 2]) -> Result<Tensor> {
        (self.block)(x, condition)
    }

    fn backward(&self, [x, condition]: [&Tensor; 2], grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let kept = self
            .run
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let run = match kept {
            Some(run) => run,
            None => Run::tracked(&self.block, x, condition)?,
        };
        let mut found = backward(&run.output.apply_op1(Seed(grad.clone()))?)?;
        let gradients = [run.x, run.condition].map(|leaf| found.remove(leaf.as_ref()?));
        deliver_all(found)?;
        Ok(gradients)
    }
}

/// A scalar (zero) whose gradient with respect to the argument is the given tensor: where a backward pass starts.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, x: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let scalar = Shape::from(());
        Ok((x.device().zeros_impl(&scalar, x.dtype())?, scalar))
    }

    fn cuda_fwd(&self, x: &CudaStorage, _layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let scalar = Shape::from(());
        Ok((x.device().zeros_impl(&scalar, x.dtype())?, scalar))
    }

    fn bwd(&self, _x: &Tensor, _res: &Tensor, _grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::random;
    use super::super::{conv2d, linear};
    use super::*;

    /// Gradients of x, the condition and a weight through two segments that share all of them.
    fn gradients(keep: Keep) -> Result<Vec<Vec<f64>>> {
        let x = Var::from_tensor(&random(&[2, 3, 4, 4], 1)?)?;
        let condition = Var::from_tensor(&random(&[2, 3], 2)?)?;
        let weight = Var::from_tensor(&random(&[3, 3, 3, 3], 3)?)?;
        let w = weight.as_tensor().clone();
        let block = move |x: &Tensor, c: &Tensor| {
            let shift = linear(c, &random(&[3, 3], 4)?, None)?.reshape((2, 3, 1, 1))?;
            conv2d(x, &w, None, 1, 1)?.broadcast_add(&shift)?.silu()? + x
        };
        let once = segment(&x, &condition, keep, block.clone())?;
        let twice = segment(&once, &condition, keep, block)?;
        let loss = (twice.sqr()?.sum_all()? + once.sum_all()?)?;
        let gradients = backward(&loss)?;
        [&x, &condition, &weight]
            .map(|v| {
                gradients
                    .get(v)
                    .expect("a gradient")
                    .flatten_all()?
                    .to_vec1()
            })
            .into_iter()
            .collect()
    }

    #[test]
    fn recomputation_changes_no_bit() -> Result<()> {
        assert_eq!(gradients(Keep::All)?, gradients(Keep::Nothing)?);
        Ok(())
    }

    #[test]
    fn gradients_equal_those_without_segments() -> Result<()> {
        let x = Var::from_tensor(&random(&[2, 3], 1)?)?;
        let weight = Var::from_tensor(&random(&[3, 3], 2)?)?;
        let w = weight.as_tensor().clone();
        let block = move |x: &Tensor, c: &Tensor| linear(&x.sqr()?, &w, None)?.mul(c);
        let condition = random(&[2, 3], 3)?;
        let plain = block(&x, &condition)?.sqr()?.sum_all()?.backward()?;
        let cut = segment(&x, &condition, Keep::Nothing, block)?;
        let cut = backward(&cut.sqr()?.sum_all()?)?;
        for variable in [&x, &weight] {
            let want = plain.get(variable).expect("a gradient").to_vec2::<f64>()?;
            let got = cut.get(variable).expect("a gradient").to_vec2::<f64>()?;
            assert_eq!(got, want);
        }
        Ok(())
    }
}
