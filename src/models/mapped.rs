//! Safetensors files as memory maps: a tensor is copied out of the page cache once, and the file itself is never in memory.
//!
//! Mapping a file is `unsafe`; besides `ops::cpu::gemm` this is the only module of the library with `unsafe` code.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{Device, Tensor};
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::{SafeTensorError, SafeTensors};

use super::ModelError;

/// Calls `each` with the name and the tensor, on the CPU and as stored, of every tensor of a safetensors file.
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
        let bytes = view.data();
        let offset = bytes.as_ptr().addr() - map.as_ptr().addr();
        // A copied page need not stay mapped: else the file would count as this process's memory until the end.
        // SAFETY: dropping pages of a read-only map of a file loses nothing; they are read again if they are touched again.
        let dropped =
            unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, bytes.len()) };
        dropped.map_err(io)?;
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
