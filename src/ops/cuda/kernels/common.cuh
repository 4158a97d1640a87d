// What every kernel file includes: types, conversions, reductions within a warp.
//
// The files are CUDA C++ and, for tests, plain C++: without nvcc, `host.h` stands in for the CUDA language and runs the threads
// of a block one after another on the CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using f16 = __half;
using bf16 = __nv_bfloat16;

// Defines a kernel that the host finds by its name.
#define KERNEL extern "C" __global__ void
// Makes a kernel known to the tests.
#define EXPORT(name)
// The dynamic shared memory of a block, of 16-byte alignment.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
#else
#include "host.h"
#endif

using f32 = float;

__device__ __forceinline__ float to_float(float x) { return x; }

// A number as `T`, rounded to the nearest, ties to even.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
#ifdef __CUDACC__
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
#else
template <> inline f16 from_float<f16>(float x) { return host::to_f16(x); }
template <> inline bf16 from_float<bf16>(float x) { return host::to_bf16(x); }
#endif

// Threads of a warp.
constexpr int WARP = 32;

// The sum of `x` over the threads of a warp, in every thread. All threads of the warp call it.
__device__ __forceinline__ float warp_sum(float x) {
  for (int apart = WARP / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}

// The greatest `x` over the threads of a warp, in every thread. All threads of the warp call it.
__device__ __forceinline__ float warp_max(float x) {
  for (int apart = WARP / 2; apart > 0; apart /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, apart));
  return x;
}

// The sum of `x` over the threads of a block of whole warps, at most 1024, in every thread and in an order that depends on the
// block's size alone. All threads of the block call it.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float sums[WARP];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
  __syncthreads();
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) sum += sums[warp];
  return sum;
}

// The index of this thread in a grid of one dimension, and the number of threads in it.
__device__ __forceinline__ int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t thread_count() { return int64_t(gridDim.x) * blockDim.x; }
