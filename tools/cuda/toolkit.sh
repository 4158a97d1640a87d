#!/usr/bin/env bash
# Installs a CUDA 13.0 toolkit on a machine that has none, and needs no GPU or driver: compiler, headers and libraries from the
# wheels NVIDIA publishes on PyPI. The versions are those PyTorch 2.11 (cu130) depends on: what is linked here finds the same
# libraries there. x86-64 Linux, python3 with pip, a C++ compiler (nvcc 13.0 takes gcc up to 15). No root. 1.6 GB, half a minute.
#
#   tools/cuda/toolkit.sh DEST
#   tools/cuda/build DEST            # or: source DEST/env.sh, and cargo build --release --features cuda,cudnn
#
# --compiler DEST: without cuBLAS, cuRAND and cuDNN, 0.3 GB. Enough for lints, for the kernels, and to link against the fake GPU.
set -euo pipefail
compiler_only=''
[ "${1:-}" != --compiler ] || { compiler_only=yes; shift; }
[ $# = 1 ] || { echo "usage: tools/cuda/toolkit.sh [--compiler] DEST" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
dest=$(cd "$1" && pwd)
cuda=$dest/python/nvidia/cu13 cudnn=$dest/python/nvidia/cudnn
command -v c++ >/dev/null || { echo "toolkit.sh: needs a C++ compiler" >&2; exit 1; }

wheels=(
  nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88   # compiler
  nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96                    # headers; libcudart
)
[ -n "$compiler_only" ] || wheels+=(nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35 nvidia-cudnn-cu13==9.19.0.56 nvidia-cuda-nvrtc==13.0.88)
# One command for all: pip --target replaces the folder nvidia/ as a whole.
python3 -m pip install -q --no-deps --no-compile --upgrade --disable-pip-version-check --root-user-action=ignore \
  --target "$dest/python" "${wheels[@]}"

# What the wheels lack. Execute permission depends on pip's version.
chmod +x "$cuda"/bin/* "$cuda"/nvvm/bin/*
# 1. The folder lib64, where nvcc's profile and build scripts look.
ln -sfn lib "$cuda/lib64"
# 2. The names the linker looks for: lib*.so.
for file in "$cuda"/lib/*.so.* "$cudnn"/lib/*.so.*; do
  case $file in *.alt.* | *'*'*) continue ;; esac
  ln -sfn "${file##*/}" "${file%%.so.*}.so"
done
# 3. A libcuda.so to link against, as the driver brings the real one: every function of the headers, each answering
# CUDA_ERROR_STUB_LIBRARY.
mkdir -p "$cuda/lib/stubs"
grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "$cuda"/include/cuda.h "$cuda"/include/cudaProfiler*.h | sort -u |
  sed 's/.*/int &(void) { return 34; }/' |
  cc -x c -shared -fPIC -w -fno-builtin -Wl,-soname,libcuda.so.1 -o "$cuda/lib/stubs/libcuda.so.1" -
ln -sfn libcuda.so.1 "$cuda/lib/stubs/libcuda.so"

# The compiler that the build calls: see its first lines.
mkdir -p "$dest/bin"
install -m 755 "$here/nvcc" "$dest/bin/nvcc"

# Compute capability 80: PTX that the driver compiles for any card from the A100 on. 90 would mean sm_90a, which only an H100 runs.
cat >"$dest/env.sh" <<END
export CUDA_HOME=$cuda CUDA_PATH=$cuda CUDNN_LIB=$cudnn NVCC=$dest/bin/nvcc PATH=$dest/bin:\$PATH
export CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=80
END

# Does it compile?
echo '__global__ void kernel(float *x) { *x = 0; }' >"$dest/test.cu"
CUDA_HOME=$cuda "$dest/bin/nvcc" -arch=sm_80 -cubin -o "$dest/test.cubin" "$dest/test.cu"
rm "$dest/test.cu" "$dest/test.cubin"
echo "$dest: nvcc $("$cuda/bin/nvcc" --version | sed -n 's/.*release \([^,]*\),.*/\1/p'). source $dest/env.sh"
