//! The kernels compiled for the CPU with a C++ compiler, for tests.
// Reason: the compiled kernels are opened and called here.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};

use candle_core::{DType, Result, Tensor, bail};

use super::gpu::Value;
use crate::ops::gradcheck::{assert_close, result_and_gradients};

/// `coffey_launch` of `host.h`.
type LaunchFn =
    unsafe extern "C" fn(*const c_char, *const c_uint, c_uint, c_uint, *mut *mut c_void) -> c_int;

/// The compiled files by name. Locked during a launch: the threads of a block are those of one process-wide machine.
static OPENED: LazyLock<Mutex<HashMap<&str, LaunchFn>>> = LazyLock::new(Mutex::default);

/// Runs a kernel over its grid, one block after another.
pub(super) fn launch(
    module: &'static str,
    kernel: &str,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    values: &[Value],
) -> Result<()> {
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let run = *opened.entry(module).or_insert_with(|| open(module));
    let mut values = values.to_vec();
    let mut args: Vec<*mut c_void> = values
        .iter_mut()
        .map(|value| match value {
            Value::Int(n) => std::ptr::from_mut(n).cast(),
            Value::Long(n) => std::ptr::from_mut(n).cast(),
            Value::Float(x) => std::ptr::from_mut(x).cast(),
        })
        .collect();
    let name = CString::new(kernel).expect("a kernel's name");
    // SAFETY: `args` points to the arguments that the kernel declares; tensors outlive the call.
    let code = unsafe {
        run(
            name.as_ptr(),
            grid.as_ptr(),
            block,
            shared,
            args.as_mut_ptr(),
        )
    };
    if code != 0 {
        bail!("{module}.cu has no kernel {kernel}, or {block} threads are too many");
    }
    Ok(())
}

fn open(module: &str) -> LaunchFn {
    let library =
        CString::new(compile(module).into_os_string().into_encoded_bytes()).expect("a path");
    // SAFETY: the library is the one just compiled; it has no constructors but those of its table of kernels.
    unsafe {
        let handle = libc::dlopen(library.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!handle.is_null(), "{library:?} can't be opened");
        let symbol = libc::dlsym(handle, c"coffey_launch".as_ptr());
        assert!(!symbol.is_null(), "{library:?} has no coffey_launch");
        std::mem::transmute::<*mut c_void, LaunchFn>(symbol)
    }
}

/// Compiles a file of kernels with `CXX` or `g++`.
fn compile(module: &str) -> PathBuf {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops/cuda/kernels");
    let folder = tempfile::tempdir().expect("a folder").keep();
    let library = folder.join("kernels.so");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let status = Command::new(&compiler)
        .args(["-O2", "-std=c++17", "-shared", "-fPIC", "-x", "c++", "-o"])
        .arg(&library)
        .arg(kernels.join(module).with_extension("cu"))
        .status()
        .unwrap_or_else(|error| panic!("{compiler:?}: {error}"));
    assert!(status.success(), "{compiler:?} failed on {module}.cu");
    library
}

/// The result of `f` for `inputs` as `dtype`, and its gradients against a fixed random direction.
fn run(
    inputs: &[Tensor],
    dtype: DType,
    f: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let inputs: Vec<Tensor> = inputs
        .iter()
        .map(|x| x.to_dtype(dtype))
        .collect::<Result<_>>()?;
    let (out, gradients) = result_and_gradients(&inputs, f)?;
    Ok([vec![out], gradients].concat())
}

/// Checks the result and the gradients of an operation that launches kernels in `f32`, `f16` and `bf16` against the CPU's
/// operation in `f64`.
pub(super) fn check(
    inputs: &[Tensor],
    f: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    reference: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        // The reference sees the numbers that the kernel sees.
        let rounded: Vec<Tensor> = inputs
            .iter()
            .map(|x| x.to_dtype(dtype)?.to_dtype(DType::F64))
            .collect::<Result<_>>()?;
        let exact = run(&rounded, DType::F64, reference)?;
        for (got, want) in run(inputs, dtype, f)?.iter().zip(&exact) {
            assert_eq!(got.dtype(), dtype);
            let scale = want.abs()?.max_all()?.to_scalar::<f64>()?.max(1e-3);
            assert_close(&got.to_dtype(DType::F64)?, want, tolerance * scale)?;
        }
    }
    Ok(())
}
