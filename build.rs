//! With the feature `cuda`: compiles the kernels of `src/ops/cuda/kernels/` to PTX, which the driver translates for the card it
//! finds. `NVCC` names the compiler; without it, it is looked for in `CUDA_HOME` and on the `PATH`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const KERNELS: &str = "src/ops/cuda/kernels";
/// The least compute capability that the kernels run on.
const ARCHITECTURE: &str = "-arch=compute_80";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed={KERNELS}");
    for variable in ["NVCC", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = nvcc();
    for entry in fs::read_dir(KERNELS).expect("the folder of kernels") {
        let source = entry.expect("an entry of a folder").path();
        if source
            .extension()
            .is_some_and(|extension| extension == "cu")
        {
            compile(&nvcc, &source, &out);
        }
    }
}

fn nvcc() -> PathBuf {
    let home = || env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let named = env::var_os("NVCC").map(PathBuf::from).or_else(home);
    named.unwrap_or_else(|| PathBuf::from("nvcc"))
}

fn compile(nvcc: &Path, source: &Path, out: &Path) {
    let name = source.file_stem().expect("a file has a name");
    let ptx = out.join(name).with_extension("ptx");
    let status = Command::new(nvcc)
        .args(["--ptx", "-O3", "-std=c++17", ARCHITECTURE, "-o"])
        .arg(&ptx)
        .arg(source)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!(
            "{} failed on {}: {status}",
            nvcc.display(),
            source.display()
        ),
        Err(error) => panic!(
            "{}: {error}; NVCC or CUDA_HOME should name the CUDA compiler",
            nvcc.display()
        ),
    }
}
