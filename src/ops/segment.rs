//! Recomputation: blocks of a network whose inner results are made anew in the backward pass instead of being kept.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, Var,
    bail,
};

use super::backward::{backward, deliver, deliver_all};

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
        Keep::All => Run::tracked(&block, x, condition)?,
        Keep::Nothing => Run {
            output: block(&x.detach(), &condition.detach())?.detach(),
            x: None,
            condition: None,
        },
    };
    let op = Segment {
        block,
        output: Mutex::new(Some(run.output.detach())),
        run: Mutex::new((keep == Keep::All).then_some(run)),
    };
    x.apply_op2(condition, op)
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
    /// Handed over by the forward.
    output: Mutex<Option<Tensor>>,
    /// Handed over by the backward, which frees what the block kept.
    run: Mutex<Option<Run>>,
}

fn take<T>(slot: &Mutex<Option<T>>) -> Option<T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

impl<F> CustomOp2 for Segment<F>
where
    F: Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync,
{
    fn name(&self) -> &'static str {
        "segment"
    }

    fn cpu_fwd(
        &self,
        _x: &CpuStorage,
        _xl: &Layout,
        _condition: &CpuStorage,
        _cl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Some(output) = take(&self.output) else {
            bail!("a segment's forward ran twice");
        };
        let (storage, layout) = output.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => copy(storage, layout),
            _ => bail!("a segment's block changed the device"),
        }
    }

    fn cuda_fwd(
        &self,
        _x: &CudaStorage,
        _xl: &Layout,
        _condition: &CudaStorage,
        _cl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let Some(output) = take(&self.output) else {
            bail!("a segment's forward ran twice");
        };
        let (storage, layout) = output.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => copy(storage, layout),
            _ => bail!("a segment's block changed the device"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        condition: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let run = match take(&self.run) {
            Some(run) => run,
            None => Run::tracked(&self.block, x, condition)?,
        };
        let Run {
            output,
            x: x_leaf,
            condition: condition_leaf,
        } = run;
        let mut found = backward(&output.apply_op1(Seed(grad.clone()))?)?;
        let mut give = |leaf: Option<Var>, input: &Tensor| match leaf.and_then(|v| found.remove(&v))
        {
            Some(gradient) => deliver(input, gradient),
            None => Ok(None),
        };
        let gradients = (give(x_leaf, x)?, give(condition_leaf, condition)?);
        deliver_all(found)?;
        Ok(gradients)
    }
}

fn copy<S>(storage: &S, layout: &Layout) -> Result<(S, Shape)>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    let shape = layout.shape().clone();
    let mut copy = storage.device().zeros_impl(&shape, storage.dtype())?;
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok((copy, shape))
}

/// A scalar (zero) whose gradient with respect to the argument is the given tensor: where a backward pass starts.
struct Seed(Tensor);

fn zero<S>(storage: &S) -> Result<(S, Shape)>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    let shape = Shape::from(());
    let zero = storage.device().zeros_impl(&shape, storage.dtype())?;
    Ok((zero, shape))
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, x: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        zero(x)
    }

    fn cuda_fwd(&self, x: &CudaStorage, _layout: &Layout) -> Result<(CudaStorage, Shape)> {
        zero(x)
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
