// Reading and writing 16 bytes at a time, and sums over rows in a fixed order.
//
// A function of `N` numbers at a time exists twice in a kernel: with `N = LANES<T>`, for tensors that split into whole packs,
// and with `N = 1`.
#pragma once

#include <type_traits>

#include "common.cuh"

// What a kernel reads, and what it writes and nothing else points to: the loads of a loop need not wait for its stores.
template <class T> using In = const T* __restrict__;
template <class T> using Out = T* __restrict__;

// Numbers of 16 bytes.
template <class T> constexpr int LANES = 16 / int(sizeof(T));

template <class T> struct alignas(16) Pack {
  T values[LANES<T>];
};

// Whether a pointer is that of a pack. A null pointer is.
__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<uint64_t>(p) % 16 == 0; }

// Whether rows of `length` numbers that begin at `p` split into whole packs.
template <class T, class... Pointers> __device__ __forceinline__ bool packs(int64_t length, Pointers... p) {
  return length % LANES<T> == 0 && (aligned(p) && ...);
}

// `N` numbers from `p`: 1, or whole packs of an aligned pointer.
template <int N, class T> __device__ __forceinline__ void load(const T* p, float (&out)[N]) {
  if constexpr (N == 1) {
    out[0] = to_float(*p);
  } else {
    static_assert(N % LANES<T> == 0, "whole packs");
#pragma unroll
    for (int first = 0; first < N; first += LANES<T>) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p + first);
#pragma unroll
      for (int i = 0; i < LANES<T>; ++i) out[first + i] = to_float(pack.values[i]);
    }
  }
}

// `N` numbers to `p`: as `load`.
template <int N, class T> __device__ __forceinline__ void store(T* p, const float (&x)[N]) {
  if constexpr (N == 1) {
    *p = from_float<T>(x[0]);
  } else {
    static_assert(N == LANES<T>, "one pack");
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.values[i] = from_float<T>(x[i]);
    *reinterpret_cast<Pack<T>*>(p) = pack;
  }
}

// Calls `body(N, i)` for the numbers `i` to `i + N` of `count`, once for each by all threads of a grid of one dimension: whole
// packs if `packed`, and single numbers. `N` is a type whose `value` is the number.
template <class T, class Body> __device__ __forceinline__ void for_each(int64_t count, bool packed, Body body) {
  const int64_t whole = packed ? count - count % LANES<T> : 0;
  for (int64_t i = thread_index() * LANES<T>; i < whole; i += thread_count() * LANES<T>) {
    body(std::integral_constant<int, LANES<T>>(), i);
  }
  for (int64_t i = whole + thread_index(); i < count; i += thread_count()) body(std::integral_constant<int, 1>(), i);
}

// Parameters: of the type of the tensor that they belong to, or f32 if `wide`.
struct Parameters {
  const void* values;
  int wide;
};

// `N` parameters from the `first`.
template <class T, int N>
__device__ __forceinline__ void load_parameters(Parameters parameters, int64_t first, float (&out)[N]) {
  if (parameters.wide) {
    load(static_cast<const float*>(parameters.values) + first, out);
  } else {
    load(static_cast<const T*>(parameters.values) + first, out);
  }
}

template <class T> __device__ __forceinline__ float load_parameter(Parameters parameters, int64_t i) {
  float out[1];
  load_parameters<T>(parameters, i, out);
  return out[0];
}

// `a / b` and `a % b` for `a >= 0`, `b > 0`: divisions of 32 bits are several times faster.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}
__device__ __forceinline__ int64_t remainder_of(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a % b : int64_t(uint32_t(a) % uint32_t(b));
}

// The threads of a block over a tile of a matrix: each has a column of `N` numbers and every `rows`th row.
struct Tile {
  int columns;  // of N numbers each
  int column;   // this thread's, in the matrix
  int row;      // this thread's first, or -1 if it has none
  int rows;

  // Tile `index` of `count` that share `all` columns.
  __device__ Tile(int all, int index, int count) {
    const int each = (all + count - 1) / count, first = index * each;
    columns = min(each, all - first);
    rows = max(1, int(blockDim.x) / max(1, columns));
    column = columns > 0 ? first + int(threadIdx.x) % columns : 0;
    row = columns > 0 && int(threadIdx.x) < rows * columns ? int(threadIdx.x) / columns : -1;
  }
};

// Floats of shared memory for `sum_tile`: `N` for each thread of a block.
//
// The sums of `x` over the rows of a tile, in the threads of its first row. All threads of the block call it.
template <int N> __device__ __forceinline__ void sum_tile(const Tile& tile, float* shared, float (&x)[N]) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) shared[i * blockDim.x + threadIdx.x] = x[i];
  __syncthreads();
  if (tile.row != 0) return;
  for (int row = 1; row < tile.rows; ++row) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += shared[i * blockDim.x + row * tile.columns + threadIdx.x];
  }
}

// `out[c] = Σ parts[row·stride + c]` over `rows`. The blocks of the grid's first dimension have 32 columns each, and each column
// a thread of every warp.
template <class T> __device__ void sum_rows(const float* parts, T* out, int rows, int columns, int stride) {
  __shared__ float sums[1024];
  const int column = blockIdx.x * WARP + threadIdx.x % WARP, lanes = blockDim.x / WARP;
  float sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int row = threadIdx.x / WARP; row < rows; row += lanes) sum += parts[int64_t(row) * stride + column];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= WARP || column >= columns) return;
  for (int lane = 1; lane < lanes; ++lane) sum += sums[lane * WARP + threadIdx.x];
  out[column] = from_float<T>(sum);
}

// The logistic function for numbers that are kept as `T`: in f32 to the last bits, else to about 1e-6.
template <class T> __device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 4) {
    return 1 / (1 + expf(-x));
  } else {
    return __fdividef(1.0f, 1 + __expf(-x));
  }
}

// The gradient of `y` given that of SiLU of `y`.
template <class T> __device__ __forceinline__ float silu_backward(float y, float grad) {
  const float s = sigmoid<T>(y);
  return grad * s * (1 + y * (1 - s));
}
