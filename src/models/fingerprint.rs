//! Fingerprints of weights: they depend on names, shapes and values, not on where the files are or how they are divided.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::config::ConfigFile;
use super::weights::weight_files;
use super::{ModelError, Weights, mapped};

/// Values that are widened and hashed at once.
const HASHED: usize = 1 << 14;

/// Fingerprint of the weights of a folder: the SHA-256 of the SHA-256 of each tensor in name order, as `sha256:` and hexadecimal
/// digits. A tensor's is over its name (without `text_model.`), shape and values as f32; integers do not count.
///
/// The tensors are hashed in parallel, where the files are mapped.
///
/// # Errors
/// When weights are missing or damaged.
pub fn fingerprint(folder: &Path, stem: &str) -> Result<String, ModelError> {
    let (origin, shards) = weight_files(folder, stem)?;
    let files: BTreeSet<_> = if shards.is_empty() {
        [origin].into()
    } else {
        shards.into_values().collect()
    };
    let mut tensors = BTreeMap::new();
    for file in files {
        tensors.extend(mapped::map_tensors(&file, hash_of)?);
    }
    let mut sha = Sha256::new();
    for digest in tensors.into_values().flatten() {
        sha.update(digest);
    }
    Ok(text(sha))
}

/// Fingerprint of the weights of a folder as manifests of latent shards hold it: one SHA-256 over all tensors in name order, of
/// the same content as [`fingerprint`].
///
/// # Errors
/// When weights are missing or damaged.
pub fn fingerprint_in_one(folder: &Path, stem: &str) -> Result<String, ModelError> {
    let weights = Weights::load(folder, stem, DType::F32, &Device::Cpu)?;
    let mut sha = Sha256::new();
    for (name, tensor) in weights.tensors() {
        if tensor.dtype().is_float() {
            hash_head(&mut sha, name, tensor.dims());
            let tensor = tensor.flatten_all()?;
            for from in (0..tensor.elem_count()).step_by(HASHED) {
                let count = HASHED.min(tensor.elem_count() - from);
                hash_values(&mut sha, &tensor.narrow(0, from, count)?)?;
            }
        }
    }
    Ok(text(sha))
}

/// The values of keys of a folder's `config.json`, each given with its default.
///
/// # Errors
/// When the file can't be read.
pub fn settings(folder: &Path, keys: &[(&str, Value)]) -> Result<Map<String, Value>, ModelError> {
    let file = ConfigFile::read(folder)?;
    let values = keys.iter().map(|(key, default)| {
        let value = file.map.get(*key).filter(|value| !value.is_null());
        ((*key).to_owned(), value.unwrap_or(default).clone())
    });
    Ok(values.collect())
}

/// Hash of a stored tensor; `None` for integers: position_ids (0, 1, 2 …) are saved by some versions of transformers only.
fn hash_of(name: &str, view: &TensorView<'_>) -> Result<Option<[u8; 32]>, ModelError> {
    let dtype = match DType::try_from(view.dtype()) {
        Ok(dtype) if dtype.is_float() => dtype,
        _ => return Ok(None),
    };
    let mut sha = Sha256::new();
    hash_head(&mut sha, name, view.shape());
    if dtype == DType::F32 {
        sha.update(view.data());
    } else {
        let size = dtype.size_in_bytes();
        for bytes in view.data().chunks(HASHED * size) {
            let shape = [bytes.len() / size];
            let values = Tensor::from_raw_buffer(bytes, dtype, &shape, &Device::Cpu)?;
            hash_values(&mut sha, &values)?;
        }
    }
    Ok(Some(sha.finalize().into()))
}

fn hash_head(sha: &mut Sha256, name: &str, shape: &[usize]) {
    let name = name.strip_prefix("text_model.").unwrap_or(name);
    sha.update((name.len() as u64).to_le_bytes());
    sha.update(name);
    sha.update((shape.len() as u64).to_le_bytes());
    for &size in shape {
        sha.update((size as u64).to_le_bytes());
    }
}

/// Hashes the values of a tensor with one dimension as f32.
fn hash_values(sha: &mut Sha256, values: &Tensor) -> Result<(), ModelError> {
    let values = values.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    sha.update(bytes.collect::<Vec<u8>>());
    Ok(())
}

/// `sha256:` and the digits of a finished hash.
pub(crate) fn text(sha: Sha256) -> String {
    format!("sha256:{:x}", sha.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::save_model;
    use crate::models::unet::WEIGHTS_STEM;

    /// The fingerprint of tensors saved under names.
    fn of(tensors: &[(&str, Tensor)]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let tensors = tensors
            .iter()
            .map(|(name, t)| ((*name).to_owned(), t.clone()));
        let config = serde_json::Map::new();
        save_model(folder.path(), WEIGHTS_STEM, &config, &tensors.collect()).unwrap();
        fingerprint(folder.path(), WEIGHTS_STEM).unwrap()
    }

    #[test]
    fn fingerprint_follows_names_shapes_and_values() {
        let values: Vec<f32> = (0..40_000).map(|i| (i % 255) as f32).collect();
        let tensor = Tensor::new(values, &Device::Cpu).unwrap();
        let ids = Tensor::new(&[0i64, 1], &Device::Cpu).unwrap();
        let first = of(&[("a", tensor.clone()), ("b", tensor.clone())]);
        // The same numbers in 16 bits, another prefix, a table of positions.
        for dtype in [DType::F16, DType::BF16, DType::F64] {
            let narrow = tensor.to_dtype(dtype).unwrap();
            let same = [
                ("text_model.a", narrow),
                ("text_model.b", tensor.clone()),
                ("ids", ids.clone()),
            ];
            assert_eq!(of(&same), first, "{dtype:?}");
        }
        let reshaped = tensor.reshape((2, 20_000)).unwrap();
        let other = (&tensor + 1.0).unwrap();
        for (a, b) in [("a", reshaped), ("a", other), ("c", tensor.clone())] {
            assert_ne!(of(&[(a, b), ("b", tensor.clone())]), first, "{a}");
        }
    }
}
