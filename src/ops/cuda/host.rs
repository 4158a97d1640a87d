//! The kernels compiled for the CPU with a C++ compiler, for tests.
// Reason: the compiled kernels are opened and called here.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CString, OsStr, c_char, c_int, c_uint, c_void};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};

use candle_core::{DType, Result, Tensor, bail};
use sha2::{Digest, Sha256};

use super::gpu::Value;
use crate::ops::gradcheck::{assert_close, computed_as};

/// `coffey_launch` of `host.h`.
type LaunchFn =
    unsafe extern "C" fn(*const c_char, *const c_uint, c_uint, c_uint, *mut *mut c_void) -> c_int;

/// The compiled files by name.
static OPENED: LazyLock<Mutex<HashMap<&str, LaunchFn>>> = LazyLock::new(Mutex::default);

/// Held during a launch: the threads of a block are those of one process-wide machine.
static MACHINE: Mutex<()> = Mutex::new(());

/// Runs a kernel over its grid, one block after another.
pub(super) fn launch(
    module: &'static str,
    kernel: &str,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    values: &[Value],
) -> Result<()> {
    let run = opened(module);
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
    let _machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
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

fn opened(module: &'static str) -> LaunchFn {
    let known = || OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(run) = known().get(module) {
        return *run;
    }
    let run = open(module);
    known().insert(module, run);
    run
}

fn open(module: &str) -> LaunchFn {
    let library =
        CString::new(compiled(module).into_os_string().into_encoded_bytes()).expect("a path");
    // SAFETY: the library was made of the kernels' sources; it has no constructors but those of its table of kernels.
    unsafe {
        let handle = libc::dlopen(library.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!handle.is_null(), "{library:?} can't be opened");
        let symbol = libc::dlsym(handle, c"coffey_launch".as_ptr());
        assert!(!symbol.is_null(), "{library:?} has no coffey_launch");
        std::mem::transmute::<*mut c_void, LaunchFn>(symbol)
    }
}

/// What a file of kernels is compiled with, besides its name and the result's.
const FLAGS: &[&str] = &["-O2", "-std=c++17", "-shared", "-fPIC", "-x", "c++"];

/// The library of a file of kernels, compiled with `CXX` or `g++` unless a test has compiled the same sources before.
///
/// The libraries are next to the tests' program, each under a hash of what it was made of. A lock makes tests that need the same
/// one wait for the first, whether they are threads or processes.
fn compiled(module: &str) -> PathBuf {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let program = std::env::current_exe().expect("the tests' program");
    let folder = program.with_file_name("kernels-for-the-cpu");
    let hash = hash_of_sources(&compiler).expect("the kernels' sources");
    let library = folder.join(format!("{module}-{}.so", &hash[..32]));
    let made = || -> io::Result<()> {
        fs::create_dir_all(&folder)?;
        let lock = File::create(folder.join(module).with_extension("lock"))?;
        lock.lock()?;
        if library.exists() {
            return Ok(());
        }
        let part = tempfile::tempdir_in(&folder)?;
        let output = part.path().join("kernels.so");
        compile(&compiler, module, &output);
        fs::rename(output, &library)
    };
    made().unwrap_or_else(|error| panic!("{}: {error}", library.display()));
    library
}

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops/cuda/kernels")
}

/// Of the kernels' sources, the compiler with its version, and its flags.
fn hash_of_sources(compiler: &OsStr) -> io::Result<String> {
    let mut files: Vec<PathBuf> = fs::read_dir(kernels())?
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<_>>()?;
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let name = file.file_name().unwrap_or_default();
        hash.update(Sha256::digest(name.as_encoded_bytes()));
        hash.update(Sha256::digest(fs::read(&file)?));
    }
    let version = Command::new(compiler).arg("--version").output();
    let version = version.unwrap_or_else(|error| panic!("{compiler:?}: {error}"));
    hash.update(Sha256::digest(version.stdout));
    hash.update(FLAGS.join(" "));
    Ok(format!("{:x}", hash.finalize()))
}

fn compile(compiler: &OsStr, module: &str, library: &Path) {
    let status = Command::new(compiler)
        .args(FLAGS)
        .arg("-o")
        .arg(library)
        .arg(kernels().join(module).with_extension("cu"))
        .status()
        .unwrap_or_else(|error| panic!("{compiler:?}: {error}"));
    assert!(status.success(), "{compiler:?} failed on {module}.cu");
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
        let exact = computed_as(DType::F64, &rounded, reference)?;
        for (got, want) in computed_as(dtype, inputs, f)?.iter().zip(&exact) {
            assert_eq!(got.dtype(), dtype);
            let scale = want.abs()?.max_all()?.to_scalar::<f64>()?.max(1e-3);
            assert_close(&got.to_dtype(DType::F64)?, want, tolerance * scale)?;
        }
    }
    Ok(())
}
