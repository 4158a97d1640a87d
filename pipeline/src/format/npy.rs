//! f16 arrays in npy files of version 1.0.

use half::f16;
use npyz::{DType, NpyHeader, Order, WriteOptions, WriterBuilder};

/// Longest header that is read. Bytes. numpy writes 118 for an array of latents; a much longer header
/// belongs to another kind of file, and may nest deep.
const MAX_HEADER: u16 = 1024;
/// Start of every npy file of version 1.0. numpy writes later versions only for headers longer than
/// [`MAX_HEADER`].
const MAGIC: [u8; 8] = *b"\x93NUMPY\x01\x00";
/// Little-endian f16.
const F16: &str = "<f2";

/// Why an array can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ArrayError {
    #[error("{0}")]
    Damaged(String),
    #[error("{found}, and not {expected}")]
    Other { found: String, expected: String },
}

/// Writes `values` as an npy file, `shape` in C order.
pub(super) fn write(shape: &[usize], values: Vec<f16>) -> std::io::Result<Vec<u8>> {
    let shape: Vec<u64> = shape.iter().map(|&size| size as u64).collect();
    let mut bytes = Vec::with_capacity(128 + 2 * values.len());
    let mut writer = WriteOptions::new()
        .default_dtype()
        .shape(&shape)
        .writer(&mut bytes)
        .begin_nd()?;
    writer.extend(values)?;
    writer.finish()?;
    Ok(bytes)
}

/// An npy file whose header was read.
pub(crate) struct Npy<'a> {
    header: NpyHeader,
    shape: Vec<usize>,
    /// Values, as they are in the file.
    data: &'a [u8],
}

impl<'a> Npy<'a> {
    /// Reads the header.
    pub(crate) fn open(file: &'a [u8]) -> Result<Self, ArrayError> {
        match file.split_at_checked(MAGIC.len() + 2) {
            Some((start, _)) if start.starts_with(&MAGIC) => {
                let length = u16::from_le_bytes([start[8], start[9]]);
                if length > MAX_HEADER {
                    return Err(ArrayError::Damaged(format!(
                        "an npy header of {length} bytes"
                    )));
                }
            }
            _ => {
                let message = "not an npy file of version 1.0".to_owned();
                return Err(ArrayError::Damaged(message));
            }
        }
        let mut data = file;
        let header = NpyHeader::from_reader(&mut data)
            .map_err(|error| ArrayError::Damaged(error.to_string()))?;
        let size = |&size: &u64| usize::try_from(size).unwrap_or(usize::MAX);
        let shape = header.shape().iter().map(size).collect();
        Ok(Self {
            header,
            shape,
            data,
        })
    }

    /// Type of the values, as `<f2`.
    pub(crate) fn dtype(&self) -> String {
        match self.header.dtype() {
            DType::Plain(plain) => plain.to_string(),
            other => other.descr(),
        }
    }

    /// Shape of the array.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// All values if they are f16 in C order, `None` for another type or order.
    pub(crate) fn values(&self) -> Result<Option<Vec<f16>>, ArrayError> {
        if !self.is_f16() {
            return Ok(None);
        }
        self.check_size()?;
        Ok(Some(f16_values(self.data)))
    }

    /// The file as f16 arrays of `shape`: one, or any number along an additional first axis.
    pub(crate) fn arrays(&self, shape: &[usize]) -> Result<F16Arrays<'a>, ArrayError> {
        let count = match self.shape.strip_suffix(shape) {
            Some([]) => 1,
            Some(&[count]) => count,
            _ => 0,
        };
        if count == 0 || !self.is_f16() {
            let order = match self.header.order() {
                Order::C => "",
                Order::Fortran => " in Fortran order",
            };
            let dtype = self.header.dtype().descr();
            return Err(ArrayError::Other {
                found: format!("{dtype} {:?}{order}", self.shape),
                expected: format!("'{F16}' {shape:?}"),
            });
        }
        self.check_size()?;
        Ok(F16Arrays {
            data: self.data,
            size: self.data.len() / count,
            count,
        })
    }

    fn is_f16(&self) -> bool {
        self.dtype() == F16 && self.header.order() == Order::C
    }

    /// Refuses a file whose f16 values don't fill the shape.
    fn check_size(&self) -> Result<(), ArrayError> {
        let bytes = self
            .shape
            .iter()
            .try_fold(2, |all: usize, &size| all.checked_mul(size));
        if bytes == Some(self.data.len()) {
            return Ok(());
        }
        Err(ArrayError::Damaged(format!(
            "{} bytes of numbers for the shape {:?}",
            self.data.len(),
            self.shape
        )))
    }
}

fn f16_values(data: &[u8]) -> Vec<f16> {
    data.chunks_exact(2)
        .map(|pair| f16::from_le_bytes([pair[0], pair[1]]))
        .collect()
}

/// f16 arrays of one shape in one file.
#[derive(Debug)]
pub(crate) struct F16Arrays<'a> {
    data: &'a [u8],
    /// Bytes of one array.
    size: usize,
    count: usize,
}

impl F16Arrays<'_> {
    /// Number of arrays, at least 1.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Values of array number `index`. All are finite.
    pub(crate) fn get(&self, index: usize) -> Result<Vec<f16>, ArrayError> {
        let data = self.data.get(index * self.size..(index + 1) * self.size);
        let values = f16_values(data.unwrap_or_default());
        if values.iter().all(|value| value.is_finite()) {
            Ok(values)
        } else {
            Err(ArrayError::Damaged(
                "numbers that are not finite".to_owned(),
            ))
        }
    }

    /// Values of the only array. All are finite.
    pub(crate) fn only(&self) -> Result<Vec<f16>, ArrayError> {
        if self.count == 1 {
            return self.get(0);
        }
        Err(ArrayError::Other {
            found: format!("{} arrays", self.count),
            expected: "one".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy<T: npyz::AutoSerialize + Copy>(shape: &[u64], values: &[T]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let options = WriteOptions::new().default_dtype().shape(shape);
        let mut writer = options.writer(&mut bytes).begin_nd().unwrap();
        writer.extend(values.iter().copied()).unwrap();
        writer.finish().unwrap();
        bytes
    }

    fn halves(values: impl IntoIterator<Item = u16>) -> Vec<f16> {
        let half = |n: u16| f16::from_f32(f32::from(n) / 8.0);
        values.into_iter().map(half).collect()
    }

    fn read(bytes: &[u8]) -> Result<Vec<f16>, ArrayError> {
        Npy::open(bytes)?.arrays(&[2, 1, 3])?.get(0)
    }

    #[test]
    fn npy_reads_what_it_writes() {
        let values = halves(0..6);
        let file = write(&[2, 1, 3], values.clone()).unwrap();
        assert_eq!(file, npy(&[2, 1, 3], &values));
        assert_eq!(read(&file), Ok(values));
        assert!(write(&[2, 1, 3], halves(0..5)).is_err());
    }

    #[test]
    fn npy_refuses_other_arrays_and_names_them() {
        let other = |bytes: Vec<u8>| match read(&bytes) {
            Err(error @ ArrayError::Other { .. }) => error.to_string(),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            other(npy(&[2, 3, 1], &halves(0..6))),
            "'<f2' [2, 3, 1], and not '<f2' [2, 1, 3]"
        );
        assert!(other(npy(&[2, 1, 3], &[0.5_f32; 6])).starts_with("'<f4' [2, 1, 3], and"));
        assert!(other(npy(&[6], &halves(0..6))).starts_with("'<f2' [6]"));
        assert!(other(npy(&[0, 2, 1, 3], &halves(0..0))).starts_with("'<f2' [0, 2, 1, 3]"));
        assert!(other(npy(&[1, 1, 2, 1, 3], &halves(0..6))).starts_with("'<f2' [1, 1, 2"));
        let fortran = npy(&[2, 1, 3], &halves(0..6));
        let text = String::from_utf8_lossy(&fortran[10..118]).replace("False", "True ");
        let fortran = [&fortran[..10], text.as_bytes(), &fortran[118..]].concat();
        assert!(other(fortran).starts_with("'<f2' [2, 1, 3] in Fortran order"));
    }

    #[test]
    fn npy_tells_damage_from_other_arrays() {
        let whole = npy(&[2, 1, 3], &halves(0..6));
        let mut long = whole.clone();
        long.push(0);
        let mut magic = whole.clone();
        magic[0] = b'x';
        // A header longer than that of any array, and nested.
        let nested = [&MAGIC[..], &[0xff, 0xff], &[b'('; 0xffff]].concat();
        let mut nan = halves(0..6);
        nan[5] = f16::NAN;
        nan[4] = f16::INFINITY;
        for bytes in [
            Vec::new(),
            whole[..40].to_vec(),
            whole[..whole.len() - 1].to_vec(),
            long,
            magic,
            nested,
            npy(&[2, 1, 3], &nan),
        ] {
            assert!(matches!(read(&bytes), Err(ArrayError::Damaged(_))));
        }
    }
}
