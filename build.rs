//! With the feature `cuda`: compiles the kernels of `src/ops/cuda/kernels/` to PTX, which the driver translates for the card it
//! finds. `NVCC` names the compiler; without it, it is looked for in `CUDA_HOME` and on the `PATH`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

const KERNELS: &str = "src/ops/cuda/kernels";
/// The least compute capability that the kernels run on.
const ARCHITECTURE: &str = "-arch=compute_80";

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    println!("cargo::rerun-if-changed={KERNELS}");
    for variable in ["NVCC", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let nvcc = nvcc();
    for entry in fs::read_dir(KERNELS)? {
        let source = entry?.path();
        let is_kernel = source.extension().is_some_and(|end| end == "cu");
        if let (true, Some(name)) = (is_kernel, source.file_stem()) {
            compile(&nvcc, &source, &out.join(name).with_extension("ptx"))?;
        }
    }
    Ok(())
}

fn nvcc() -> PathBuf {
    let home = || env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let named = env::var_os("NVCC").map(PathBuf::from).or_else(home);
    named.unwrap_or_else(|| PathBuf::from("nvcc"))
}

fn compile(nvcc: &Path, source: &Path, ptx: &Path) -> io::Result<()> {
    let failed = |why: String| io::Error::other(format!("{}: {why}", nvcc.display()));
    let status = Command::new(nvcc)
        .args(["--ptx", "-O3", "-std=c++17", ARCHITECTURE, "-o"])
        .arg(ptx)
        .arg(source)
        .status()
        .map_err(|error| {
            failed(format!(
                "{error}; NVCC or CUDA_HOME should name the CUDA compiler"
            ))
        })?;
    if status.success() {
        Ok(())
    } else {
        Err(failed(format!(
            "{} does not compile: {status}",
            source.display()
        )))
    }
}
