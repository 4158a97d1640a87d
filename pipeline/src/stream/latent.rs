//! Latents and text embeddings out of their npy files.

use half::f16;
use npyz::{DType, NpyHeader, Order};
use rand_chacha::rand_core::RngCore;
use serde_json::Value;

use super::content::{BatchContent, Halves, Npy};
use super::prepare::View;
use crate::image::CropWindow;
use crate::order::rng::index_below;

/// Longest header that is read, in bytes. numpy makes 118 of such an array's; one that is much longer is of
/// something else, and may nest deep.
const MAX_HEADER: u16 = 1024;
/// What every npy file of version 1.0 begins with; numpy writes others only for headers that are too long here.
const MAGIC: [u8; 8] = *b"\x93NUMPY\x01\x00";
/// The key of a sample's json under which `coffey precompute` says what was encoded.
const NOTES: &str = "coffey";

/// Why a sample's arrays can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ArrayError {
    #[error("{0}")]
    Damaged(String),
    #[error("{found}, and not {expected}")]
    Other { found: String, expected: String },
}

/// Reads a sample's arrays; of several crops, the one that `rng` draws. `json` says what was encoded.
pub(super) fn read(
    moments: &Npy<3>,
    prompt_embeds: Option<&Npy<2>>,
    json: Option<&Value>,
    rng: &mut impl RngCore,
) -> Result<(BatchContent, View), ArrayError> {
    let crops = Crops::open(moments)?;
    let chosen = match crops.count {
        1 => 0,
        count => index_below(rng, count),
    };
    let content = BatchContent::Latents {
        moments: crops.get(chosen)?,
        prompt_embeds: prompt_embeds
            .map(|npy| Crops::open(npy)?.only())
            .transpose()?,
    };
    let view = json
        .and_then(|json| json.get(NOTES))
        .map_or_else(View::default, |notes| view(notes, chosen));
    Ok((content, view))
}

/// An array file whose header was read: some arrays of the wanted shape.
struct Crops<'a, const D: usize> {
    /// The numbers, little-endian.
    data: &'a [u8],
    shape: [usize; D],
    count: usize,
}

impl<'a, const D: usize> Crops<'a, D> {
    fn open(npy: &'a Npy<D>) -> Result<Self, ArrayError> {
        let Npy { file, shape } = npy;
        let mut data: &[u8] = file;
        let header = header(&mut data)?;
        let found: Vec<usize> = header
            .shape()
            .iter()
            .map(|&size| usize::try_from(size).unwrap_or(usize::MAX))
            .collect();
        let count = match found
            .len()
            .checked_sub(D)
            .map(|extra| found.split_at(extra))
        {
            Some(([], one)) if one == shape => 1,
            Some((&[count], each)) if each == shape && count > 0 => count,
            _ => 0,
        };
        let dtype = header.dtype();
        let halves = matches!(&dtype, DType::Plain(plain) if plain.to_string() == "<f2");
        if count == 0 || !halves || header.order() != Order::C {
            let order = match header.order() {
                Order::C => "",
                Order::Fortran => " in Fortran order",
            };
            return Err(ArrayError::Other {
                found: format!("{} {found:?}{order}", dtype.descr()),
                expected: format!("'<f2' {shape:?}"),
            });
        }
        let crops = Self {
            data,
            shape: *shape,
            count,
        };
        match crops.size().checked_mul(count) {
            Some(bytes) if bytes == data.len() => Ok(crops),
            _ => Err(ArrayError::Damaged(format!(
                "{} bytes of numbers for the shape {found:?}",
                data.len()
            ))),
        }
    }

    /// Bytes of one array.
    fn size(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }

    fn get(&self, index: usize) -> Result<Halves<D>, ArrayError> {
        let size = self.size();
        let bytes = self.data.get(index * size..(index + 1) * size);
        let values: Vec<f16> = bytes
            .unwrap_or_default()
            .chunks_exact(2)
            .map(|pair| f16::from_le_bytes([pair[0], pair[1]]))
            .collect();
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(Halves {
                values,
                shape: self.shape,
            }),
            false => Err(ArrayError::Damaged(
                "numbers that are not finite".to_owned(),
            )),
        }
    }

    fn only(&self) -> Result<Halves<D>, ArrayError> {
        match self.count {
            1 => self.get(0),
            count => Err(ArrayError::Other {
                found: format!("{count} arrays"),
                expected: "one".to_owned(),
            }),
        }
    }
}

/// An array as it stands in its file.
#[derive(Debug)]
pub(crate) struct Array {
    /// As `<f2`.
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    /// The numbers in C order, if they are f16.
    pub(crate) values: Option<Vec<f16>>,
}

/// Reads an array of any shape. The error says in words what is wrong with the file.
pub(crate) fn read_halves(mut file: &[u8]) -> Result<Array, String> {
    let header = header(&mut file).map_err(|error| error.to_string())?;
    let size = |&size: &u64| usize::try_from(size).unwrap_or(usize::MAX);
    let shape: Vec<usize> = header.shape().iter().map(size).collect();
    let dtype = match header.dtype() {
        DType::Plain(plain) => plain.to_string(),
        other => other.descr(),
    };
    let values = match dtype == "<f2" && header.order() == Order::C {
        true => {
            let count = shape
                .iter()
                .try_fold(2, |all: usize, &size| all.checked_mul(size));
            if count != Some(file.len()) {
                return Err(format!(
                    "{} bytes of numbers for the shape {shape:?}",
                    file.len()
                ));
            }
            let half = |pair: &[u8]| f16::from_le_bytes([pair[0], pair[1]]);
            Some(file.chunks_exact(2).map(half).collect())
        }
        false => None,
    };
    Ok(Array {
        dtype,
        shape,
        values,
    })
}

/// Reads the header and leaves the numbers.
fn header(file: &mut &[u8]) -> Result<NpyHeader, ArrayError> {
    let damaged = |message: String| ArrayError::Damaged(message);
    match file.split_at_checked(MAGIC.len() + 2) {
        Some((begin, _)) if begin.starts_with(&MAGIC) => {
            let length = u16::from_le_bytes([begin[8], begin[9]]);
            if length > MAX_HEADER {
                return Err(damaged(format!("an npy header of {length} bytes")));
            }
        }
        _ => return Err(damaged("not an npy file of version 1.0".to_owned())),
    }
    NpyHeader::from_reader(file).map_err(|error| damaged(error.to_string()))
}

/// What the json says of crop number `index`; zeros where it says nothing.
fn view(notes: &Value, index: usize) -> View {
    let of_crop = |key: &str| match notes.get(key)? {
        Value::Array(all) => all.get(index),
        one => Some(one),
    };
    let number = |key: &str| {
        let number = of_crop(key).and_then(Value::as_u64);
        number.and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
    };
    View {
        original: (number("original_width"), number("original_height")),
        resized: (number("resized_width"), number("resized_height")),
        crops: vec![CropWindow {
            top: number("crop_top"),
            left: number("crop_left"),
            flipped: of_crop("flipped").and_then(Value::as_bool).unwrap_or(false),
        }],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::rng::rng;
    use npyz::{WriteOptions, WriterBuilder};
    use serde_json::json;

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

    fn open(bytes: Vec<u8>) -> Result<Halves<3>, ArrayError> {
        let npy = Npy {
            file: bytes.into(),
            shape: [2, 1, 3],
        };
        Crops::open(&npy)?.get(0)
    }

    #[test]
    fn numbers_come_out_as_they_were_written() {
        let values = halves(0..6);
        assert_eq!(
            open(npy(&[2, 1, 3], &values)),
            Ok(Halves {
                values,
                shape: [2, 1, 3]
            })
        );
    }

    #[test]
    fn other_arrays_are_refused_with_what_they_are() {
        let other = |bytes| match open(bytes) {
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
    fn damage_is_told_from_another_array() {
        let whole = npy(&[2, 1, 3], &halves(0..6));
        let mut long = whole.clone();
        long.push(0);
        let mut magic = whole.clone();
        magic[0] = b'x';
        // A header that says it is longer than anything sound, and nests.
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
            assert!(matches!(open(bytes), Err(ArrayError::Damaged(_))));
        }
    }

    #[test]
    fn one_of_several_crops_is_drawn_with_what_the_json_says_of_it() {
        let moments = Npy {
            file: npy(&[3, 2, 1, 3], &halves(0..18)).into(),
            shape: [2, 1, 3],
        };
        let json = json!({"coffey": {
            "original_width": 90, "original_height": 60, "resized_width": 96, "resized_height": 64,
            "crop_top": [0, 1, 2], "crop_left": [7, 8, 9], "flipped": [false, true, false],
        }});
        let mut drawn = std::collections::BTreeSet::new();
        for occasion in 0..20 {
            let draw = || {
                let mut rng = rng(1, "crop", occasion, 5);
                read(&moments, None, Some(&json), &mut rng).unwrap()
            };
            let (content, view) = draw();
            assert_eq!((content.clone(), view.clone()), draw());
            let BatchContent::Latents { moments, .. } = content else {
                panic!("{content:?}")
            };
            let index = view.crops[0].top;
            assert_eq!(
                moments.values,
                halves(6 * index as u16..6 * (index as u16 + 1))
            );
            assert_eq!(
                (
                    view.original,
                    view.resized,
                    view.crops[0].left,
                    view.crops[0].flipped
                ),
                ((90, 60), (96, 64), 7 + index, index == 1)
            );
            drawn.insert(index);
        }
        assert_eq!(drawn.len(), 3);
    }

    #[test]
    fn embeddings_come_once_and_a_silent_json_says_nothing() {
        let moments = Npy {
            file: npy(&[2, 1, 3], &halves(0..6)).into(),
            shape: [2, 1, 3],
        };
        let embeds = |shape: &[u64], count| Npy {
            file: npy(shape, &halves(0..count)).into(),
            shape: [2, 2],
        };
        let read = |embeds: &Npy<2>| {
            let json = json!({"coffey": {"crop_top": -1}});
            read(
                &moments,
                Some(embeds),
                Some(&json),
                &mut rng(1, "crop", 0, 0),
            )
        };
        let (content, view) = read(&embeds(&[2, 2], 4)).unwrap();
        assert_eq!((view.original, view.resized), ((0, 0), (0, 0)));
        let BatchContent::Latents { prompt_embeds, .. } = content else {
            panic!("{content:?}")
        };
        assert_eq!(prompt_embeds.unwrap().values, halves(0..4));
        assert!(read(&embeds(&[2, 2, 2], 8)).is_err());
    }
}
