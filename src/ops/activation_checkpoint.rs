//! Activation checkpointing: blocks of a network whose activations are recomputed in the backward pass instead of being kept.

use candle_core::{Result, Tensor, Var};

use super::autograd_op::is_recorded;
use super::backward::{accumulate_all, collect_variable_grads};
use super::tape::{Tape, no_grad};

/// Whether a block's activations are kept from its forward pass to its backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// They are kept.
    Keep,
    /// They are dropped, and computed anew in the backward pass.
    Recompute,
}

/// `block(x, condition)`, as a graph of its own: differentiable in both operands and in the variables inside. As
/// `torch.utils.checkpoint.checkpoint`; without a tracked operand the block simply runs.
///
/// `block` must be deterministic. The gradients are then the same to the last bit whatever `activations` says. Only
/// [`ops::gradients`](super::gradients()) can compute them; candle's own is refused.
///
/// # Errors
/// When the block fails.
pub fn activation_checkpoint<F>(
    x: &Tensor,
    condition: &Tensor,
    activations: Activations,
    block: F,
) -> Result<Tensor>
where
    F: Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    if !is_recorded(&[x, condition]) {
        return block(x, condition);
    }
    let (output, kept) = match activations {
        Activations::Keep => {
            let pass = TrackedPass::new(&block, x, condition)?;
            (pass.output.clone(), Some(pass))
        }
        Activations::Recompute => (no_grad(|| block(x, condition))?.detach(), None),
    };
    let backward = move |[x, condition]: [&Tensor; 2], _: &Tensor, grad: &Tensor| {
        let pass = match kept {
            Some(pass) => pass,
            None => TrackedPass::new(&block, x, condition)?,
        };
        pass.backward(grad)
    };
    Tape::push([x, condition], output.into(), backward)
}

/// One pass through a block: its result, its operations, and a leaf of its graph for each tracked operand.
struct TrackedPass {
    output: Tensor,
    tape: Tape,
    x: Option<Var>,
    condition: Option<Var>,
}

impl TrackedPass {
    fn new<F>(block: &F, x: &Tensor, condition: &Tensor) -> Result<Self>
    where
        F: Fn(&Tensor, &Tensor) -> Result<Tensor>,
    {
        let leaf = |t: &Tensor| t.track_op().then(|| Var::from_tensor(t)).transpose();
        let (x_leaf, condition_leaf) = (leaf(x)?, leaf(condition)?);
        let operand = |leaf: &Option<Var>, t: &Tensor| match leaf {
            Some(leaf) => leaf.as_tensor().clone(),
            None => t.clone(),
        };
        let operands = (operand(&x_leaf, x), operand(&condition_leaf, condition));
        let (output, tape) = Tape::record(|| block(&operands.0, &operands.1))?;
        Ok(Self {
            output,
            tape,
            x: x_leaf,
            condition: condition_leaf,
        })
    }

    /// The gradients of `x` and the condition; those of the variables inside go to the running backward pass.
    fn backward(self, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let backward = || self.tape.backward(&self.output, grad.clone());
        let ((), mut found) = collect_variable_grads(backward)?;
        let gradients = [self.x, self.condition].map(|leaf| found.remove(leaf.as_ref()?));
        accumulate_all(found)?;
        Ok(gradients)
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::random;
    use super::super::{conv2d, gradients as gradients_of, linear};
    use super::*;

    /// Gradients of x, the condition and a weight through two checkpoints that share all three.
    fn gradients(activations: Activations) -> Result<Vec<Vec<f64>>> {
        let x = Var::from_tensor(&random(&[2, 3, 4, 4], 1)?)?;
        let condition = Var::from_tensor(&random(&[2, 3], 2)?)?;
        let weight = Var::from_tensor(&random(&[3, 3, 3, 3], 3)?)?;
        let w = weight.as_tensor().clone();
        let block = move |x: &Tensor, c: &Tensor| {
            let shift = linear(c, &random(&[3, 3], 4)?, None)?.reshape((2, 3, 1, 1))?;
            conv2d(x, &w, None, 1, 1)?.broadcast_add(&shift)?.silu()? + x
        };
        let (gradients, ()) = gradients_of(|| {
            let once = activation_checkpoint(&x, &condition, activations, block.clone())?;
            let twice = activation_checkpoint(&once, &condition, activations, block)?;
            Ok(((twice.sqr()?.sum_all()? + once.sum_all()?)?, ()))
        })?;
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
        assert_eq!(
            gradients(Activations::Keep)?,
            gradients(Activations::Recompute)?
        );
        Ok(())
    }

    #[test]
    fn gradients_equal_those_without_a_checkpoint() -> Result<()> {
        let x = Var::from_tensor(&random(&[2, 3], 1)?)?;
        let weight = Var::from_tensor(&random(&[3, 3], 2)?)?;
        let w = weight.as_tensor().clone();
        let block = move |x: &Tensor, c: &Tensor| linear(&x.sqr()?, &w, None)?.mul(c);
        let condition = random(&[2, 3], 3)?;
        let (plain, ()) = gradients_of(|| Ok((block(&x, &condition)?.sqr()?.sum_all()?, ())))?;
        let (cut, ()) = gradients_of(|| {
            let cut = activation_checkpoint(&x, &condition, Activations::Recompute, block)?;
            Ok((cut.sqr()?.sum_all()?, ()))
        })?;
        for variable in [&x, &weight] {
            let want = plain.get(variable).expect("a gradient").to_vec2::<f64>()?;
            let got = cut.get(variable).expect("a gradient").to_vec2::<f64>()?;
            assert_eq!(got, want);
        }
        Ok(())
    }
}
