//! Tensors between ranks: what is sent, what is expected, and their bytes.

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, WithDType, bail};

use super::{ExchangeError, RanksError};

/// Tensors that a rank sends to the ranks of its job.
#[derive(Debug)]
pub enum Outgoing {
    /// Row r goes to rank r.
    Rows(Vec<Vec<Tensor>>),
    /// The row goes to every rank.
    ToAll(Vec<Tensor>),
}

impl Outgoing {
    /// The row that goes to a rank.
    pub(super) fn row(&self, rank: usize) -> &[Tensor] {
        match self {
            Self::Rows(rows) => &rows[rank],
            Self::ToAll(row) => row,
        }
    }
}

/// The form of a tensor that is received.
#[derive(Clone, Debug)]
pub struct TensorForm {
    /// Its shape.
    pub shape: Shape,
    /// Its type: `f32` or `u8`.
    pub dtype: DType,
    /// The device that it is put on.
    pub device: Device,
}

impl TensorForm {
    /// The form of `tensor`.
    pub fn of(tensor: &Tensor) -> Self {
        Self {
            shape: tensor.shape().clone(),
            dtype: tensor.dtype(),
            device: tensor.device().clone(),
        }
    }

    /// Size of the tensor in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.shape.elem_count() * self.dtype.size_in_bytes()
    }

    /// The tensor whose little-endian numbers are `bytes`.
    pub(super) fn tensor(&self, bytes: &[u8]) -> Result<Tensor> {
        match self.dtype {
            DType::F32 => {
                let numbers = bytemuck::pod_collect_to_vec::<u8, f32>(bytes);
                Tensor::from_vec(numbers, &self.shape, &self.device)
            }
            DType::U8 => Tensor::from_slice(bytes, &self.shape, &self.device),
            other => bail!("no {other:?} is sent between ranks"),
        }
    }
}

/// An exchange of tensors by one of bytes, which gets the rows that go to the ranks, or one row that goes to all, and the length of the
/// row that comes from each. The row of this rank itself, `own`, is neither sent nor received.
pub(super) fn exchange_as_bytes(
    own: usize,
    sent: Outgoing,
    expected: &[Vec<TensorForm>],
    exchange: impl FnOnce(Vec<Vec<u8>>, Vec<usize>) -> std::result::Result<Vec<Vec<u8>>, RanksError>,
) -> std::result::Result<Vec<Vec<Tensor>>, ExchangeError> {
    let kept = sent.row(own).to_vec();
    let rows = match sent {
        Outgoing::Rows(mut rows) => {
            rows[own].clear();
            rows
        }
        Outgoing::ToAll(row) => vec![row],
    };
    let bytes = |row: Vec<Tensor>| -> Result<Vec<u8>> {
        let size = row.iter().map(|x| TensorForm::of(x).bytes()).sum();
        let mut bytes = Vec::with_capacity(size);
        row.iter()
            .try_for_each(|tensor| append(&mut bytes, tensor))?;
        Ok(bytes)
    };
    let rows = rows.into_iter().map(bytes).collect::<Result<_>>()?;
    let length = |forms: &Vec<TensorForm>| forms.iter().map(TensorForm::bytes).sum();
    let mut lengths: Vec<usize> = expected.iter().map(length).collect();
    lengths[own] = 0;
    let received = exchange(rows, lengths)?;
    let tensors = |(forms, bytes): (&Vec<TensorForm>, Vec<u8>)| {
        let mut rest = bytes.as_slice();
        let tensor = |form: &TensorForm| {
            let (bytes, after) = rest.split_at(form.bytes());
            rest = after;
            form.tensor(bytes)
        };
        forms.iter().map(tensor).collect::<Result<Vec<_>>>()
    };
    let mut kept = Some(kept);
    let rows = expected.iter().zip(received).enumerate();
    let rows = rows.map(|(rank, row)| match rank == own {
        true => Ok(kept.take().unwrap_or_default()),
        false => tensors(row),
    });
    Ok(rows.collect::<Result<_>>()?)
}

/// Appends the little-endian numbers of a tensor.
pub(super) fn append(bytes: &mut Vec<u8>, tensor: &Tensor) -> Result<()> {
    match tensor.dtype() {
        DType::F32 => append_as::<f32>(bytes, tensor),
        DType::U8 => append_as::<u8>(bytes, tensor),
        other => bail!("no {other:?} is sent between ranks"),
    }
}

fn append_as<T: WithDType + bytemuck::NoUninit>(
    bytes: &mut Vec<u8>,
    tensor: &Tensor,
) -> Result<()> {
    let (storage, layout) = tensor.storage_and_layout();
    if let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) {
        bytes.extend_from_slice(bytemuck::cast_slice(&numbers::<T>(storage)?[start..end]));
        return Ok(());
    }
    let numbers = tensor.flatten_all()?.to_vec1::<T>()?;
    bytes.extend_from_slice(bytemuck::cast_slice(&numbers));
    Ok(())
}

fn numbers<T: WithDType>(storage: &CpuStorage) -> Result<&[T]> {
    T::cpu_storage_as_slice(storage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_keep_their_numbers_and_forms_as_bytes() -> Result<()> {
        let whole = Tensor::arange(0f32, 12.0, &Device::Cpu)?.reshape((3, 4))?;
        let codes = Tensor::new(&[7u8, 0, 255], &Device::Cpu)?;
        for tensor in [whole.clone(), whole.narrow(0, 1, 2)?, whole.t()?, codes] {
            let (mut bytes, form) = (vec![9], TensorForm::of(&tensor));
            append(&mut bytes, &tensor)?;
            assert_eq!(bytes.len(), 1 + form.bytes());
            let again = form.tensor(&bytes[1..])?;
            assert_eq!(again.shape(), tensor.shape());
            let numbers = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
            assert_eq!(numbers(&again)?, numbers(&tensor)?);
        }
        assert!(append(&mut Vec::new(), &whole.to_dtype(DType::F16)?).is_err());
        Ok(())
    }
}
