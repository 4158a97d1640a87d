//! Safetensors files as memory maps: a tensor is copied out of the page cache once, and the file itself is never in memory.
//!
//! Mapping a file is `unsafe`; besides `ops::cpu::gemm` this is the only module of the library with `unsafe` code.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{Device, Tensor};
use coffey_pipeline::regular_file;
use memmap2::{Mmap, UncheckedAdvice};
use rayon::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{SafeTensorError, SafeTensors};

use super::ModelError;

/// Calls `each` with the name and the tensor, on the CPU and as stored, of every tensor of a safetensors file.
///
/// # Errors
/// When the file can't be read or is damaged, and what `each` returns.
pub(super) fn for_each_tensor(
    path: &Path,
    each: impl FnMut(&str, Tensor) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    for_each_wanted_tensor(path, |_| true, each)
}

/// As [`for_each_tensor`], for the tensors whose names are `wanted`.
pub(super) fn for_each_wanted_tensor(
    path: &Path,
    wanted: impl Fn(&str) -> bool,
    mut each: impl FnMut(&str, Tensor) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    let map = map(path)?;
    for (name, view) in tensors(path, &map)?.iter() {
        if !wanted(name) {
            continue;
        }
        let tensor = view
            .load(&Device::Cpu)
            .map_err(|e| damaged(path, format!("tensor \"{name}\": {e}")))?;
        drop_pages(path, &map, &view)?;
        each(name, tensor)?;
    }
    Ok(())
}

/// What `each` makes of every tensor of a safetensors file, by its name. The tensors are visited in parallel and not copied.
///
/// # Errors
/// As [`for_each_tensor`].
pub(super) fn map_tensors<R: Send>(
    path: &Path,
    each: impl Fn(&str, &TensorView<'_>) -> Result<R, ModelError> + Sync,
) -> Result<BTreeMap<String, R>, ModelError> {
    let map = map(path)?;
    let tensors = tensors(path, &map)?.tensors();
    let visited = tensors.into_par_iter().map(|(name, view)| {
        let result = each(&name, &view)?;
        drop_pages(path, &map, &view)?;
        Ok((name, result))
    });
    visited.collect()
}

/// The metadata of a safetensors file; empty if it has none.
///
/// # Errors
/// When the file can't be read or is damaged.
pub(super) fn metadata(path: &Path) -> Result<HashMap<String, String>, ModelError> {
    let map = map(path)?;
    let (_, header) =
        SafeTensors::read_metadata(&map).map_err(|e| damaged(path, explain(&e, &map)))?;
    Ok(header.metadata().clone().unwrap_or_default())
}

fn damaged(path: &Path, message: String) -> ModelError {
    ModelError::Damaged {
        path: path.to_owned(),
        message,
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> ModelError {
    let path = path.to_owned();
    move |source| ModelError::Io { path, source }
}

fn map(path: &Path) -> Result<Mmap, ModelError> {
    let file = regular_file::open(path).map_err(io(path))?;
    if file.metadata().map_err(io(path))?.len() == 0 {
        return Err(damaged(path, "it is empty".to_owned()));
    }
    // SAFETY: the map is read-only, and never leaves the functions above. Model files are not written to while they are read: coffey
    // itself replaces files whole (by renaming) and never writes into one. If another program cuts the file short meanwhile, the read
    // faults (SIGBUS); memory is not corrupted.
    unsafe { Mmap::map(&file) }.map_err(io(path))
}

fn tensors<'a>(path: &Path, map: &'a Mmap) -> Result<SafeTensors<'a>, ModelError> {
    SafeTensors::deserialize(map).map_err(|e| damaged(path, explain(&e, map)))
}

/// Unmaps the pages of a tensor that was read: else the file would count as this process's memory until the end.
fn drop_pages(path: &Path, map: &Mmap, view: &TensorView<'_>) -> Result<(), ModelError> {
    let bytes = view.data();
    let offset = bytes.as_ptr().addr() - map.as_ptr().addr();
    // SAFETY: dropping pages of a read-only map of a file loses nothing; they are read again if they are touched again.
    let dropped =
        unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, bytes.len()) };
    dropped.map_err(io(path))
}

fn explain(error: &SafeTensorError, bytes: &[u8]) -> String {
    if bytes.starts_with(b"version https://git-lfs") {
        return "it is a Git LFS pointer and not the file itself; `git lfs pull` fetches it"
            .to_owned();
    }
    match error {
        SafeTensorError::HeaderTooSmall
        | SafeTensorError::InvalidHeaderLength
        | SafeTensorError::MetadataIncompleteBuffer => format!(
            "its {} bytes are not what its header describes ({error}); it was cut short",
            bytes.len()
        ),
        other => other.to_string(),
    }
}
