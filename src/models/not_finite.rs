//! The search for weights that are not finite.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::weights::weight_files;
use super::{ModelError, mapped};
use crate::ops::all_finite;

/// A tensor with numbers that are not finite.
#[derive(Debug)]
pub struct NotFiniteTensor {
    /// Its file.
    pub file: PathBuf,
    /// Its name in the file.
    pub name: String,
}

/// The first tensor with numbers that are not finite, by file and name, of the weights that [`Weights::load`](super::Weights::load)
/// would read.
///
/// # Errors
/// As [`Weights::load`](super::Weights::load).
pub fn first_not_finite(folder: &Path, stem: &str) -> Result<Option<NotFiniteTensor>, ModelError> {
    let (file, shards) = weight_files(folder, stem)?;
    let files: BTreeSet<PathBuf> = match shards.is_empty() {
        true => [file].into(),
        false => shards.into_values().collect(),
    };
    for file in files {
        let mut found = BTreeSet::new();
        mapped::for_each_tensor(&file, |name, tensor| {
            if tensor.dtype().is_float() && !all_finite(&tensor)? {
                found.insert(name.to_owned());
            }
            Ok(())
        })?;
        if let Some(name) = found.pop_first() {
            return Ok(Some(NotFiniteTensor { file, name }));
        }
    }
    Ok(None)
}
