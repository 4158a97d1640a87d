//! Safetensors files as memory maps: a tensor is copied out of the page cache once, and the file is never held besides.
//!
//! Mapping a file is `unsafe`, and with `ops::gemm` this is the only module of the library that is.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{Device, Tensor};
use memmap2::Mmap;
use safetensors::{SafeTensorError, SafeTensors};

use super::ModelError;

/// Calls `each` with every tensor of a safetensors file and its name, one after the other, on the CPU and as stored.
///
/// # Errors
/// When the file can't be read or is damaged, and what `each` returns.
pub(super) fn for_each_tensor(
    path: &Path,
    mut each: impl FnMut(&str, Tensor) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    let io = |source| ModelError::Io {
        path: path.to_owned(),
        source,
    };
    let damaged = |message: String| ModelError::Damaged {
        path: path.to_owned(),
        message,
    };
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.len() == 0 {
        return Err(damaged("it is empty".to_owned()));
    }
    // SAFETY: the map is read-only, and every tensor is copied out of it before it is dropped at the end of this function.
    // Model files are not written to while they are read: coffey itself replaces files whole (by renaming) and never writes
    // into one. If another program cuts the file short meanwhile, the read faults (SIGBUS); memory is not corrupted.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    let tensors = SafeTensors::deserialize(&map).map_err(|e| damaged(explain(&e, &map)))?;
    for (name, view) in tensors.iter() {
        let tensor = view
            .load(&Device::Cpu)
            .map_err(|e| damaged(format!("tensor \"{name}\": {e}")))?;
        each(name, tensor)?;
    }
    Ok(())
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
