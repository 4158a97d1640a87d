// Biases added, in place where `out` is `x`, and their gradients. x is [outer, channels, inner]; a bias has a number for each
// channel.

#include "vector.cuh"

namespace {

// x is [rows, width].
template <class T, int N> __device__ void add_to_rows(const T* x, T* out, Parameters bias, int64_t count, int width) {
  for (int64_t i = thread_index() * N; i < count; i += thread_count() * N) {
    float value[N], shift[N];
    load(x + i, value);
    load_parameters<T>(bias, remainder_of(i, width), shift);
#pragma unroll
    for (int k = 0; k < N; ++k) value[k] += shift[k];
    store(out + i, value);
  }
}

// x is [planes, inner], and plane p has the bias p % biases.
template <class T, int N>
__device__ void add_to_maps(const T* x, T* out, Parameters bias, int64_t count, int64_t inner, int biases) {
  for (int64_t i = thread_index() * N; i < count; i += thread_count() * N) {
    const float shift = load_parameter<T>(bias, remainder_of(quotient(i, inner), biases));
    float value[N];
    load(x + i, value);
#pragma unroll
    for (int k = 0; k < N; ++k) value[k] += shift;
    store(out + i, value);
  }
}

// The sums of the columns of x [rows, width] over `each` rows, [gridDim.y, width]; the grid's first dimension has the tiles.
template <class T, int N> __device__ void sum_columns(const T* x, float* parts, int rows, int width, int each) {
  DYNAMIC_SHARED(shared);
  const Tile tile(width / N, blockIdx.x, gridDim.x);
  const int first = blockIdx.y * each, end = min(rows, first + each);
  float sum[N] = {};
  if (tile.row >= 0) {
#pragma unroll 4
    for (int row = first + tile.row; row < end; row += tile.rows) {
      float value[N];
      load(x + int64_t(row) * width + tile.column * N, value);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += value[k];
    }
  }
  sum_tile(tile, reinterpret_cast<float*>(shared), sum);
  if (tile.row != 0) return;
#pragma unroll
  for (int k = 0; k < N; ++k) parts[int64_t(blockIdx.y) * width + tile.column * N + k] = sum[k];
}

// The sum of each plane of x [planes, inner], by a warp.
template <class T, int N> __device__ float sum_plane(const T* plane, int64_t inner) {
  float sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % WARP * N; i < inner; i += WARP * N) {
    float value[N];
    load(plane + i, value);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += value[k];
  }
  return warp_sum(sum);
}

template <class T> __device__ void sum_planes(const T* x, void* sums, int wide, int planes, int64_t inner) {
  const int plane = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
  if (plane >= planes) return;
  const T* from = x + plane * inner;
  const float sum = packs<T>(inner, x) ? sum_plane<T, LANES<T>>(from, inner) : sum_plane<T, 1>(from, inner);
  if (threadIdx.x % WARP != 0) return;
  if (wide) {
    static_cast<float*>(sums)[plane] = sum;
  } else {
    static_cast<T*>(sums)[plane] = from_float<T>(sum);
  }
}

}  // namespace

#define BIAS(T)                                                                                                \
  KERNEL bias_add_to_rows_##T(const T* x, T* out, const void* bias, int wide, int64_t count, int width) {      \
    if (packs<T>(width, x, out, bias)) {                                                                       \
      add_to_rows<T, LANES<T>>(x, out, {bias, wide}, count, width);                                            \
    } else {                                                                                                   \
      add_to_rows<T, 1>(x, out, {bias, wide}, count, width);                                                   \
    }                                                                                                          \
  }                                                                                                            \
  EXPORT(bias_add_to_rows_##T)                                                                                 \
  KERNEL bias_add_to_maps_##T(const T* x, T* out, const void* bias, int wide, int64_t count, int64_t inner,    \
                               int biases) {                                                                   \
    if (packs<T>(inner, x, out)) {                                                                             \
      add_to_maps<T, LANES<T>>(x, out, {bias, wide}, count, inner, biases);                                    \
    } else {                                                                                                   \
      add_to_maps<T, 1>(x, out, {bias, wide}, count, inner, biases);                                           \
    }                                                                                                          \
  }                                                                                                            \
  EXPORT(bias_add_to_maps_##T)                                                                                 \
  KERNEL bias_sum_columns_##T(const T* x, float* parts, int rows, int width, int each, int packed) {           \
    if (packed) {                                                                                              \
      sum_columns<T, LANES<T>>(x, parts, rows, width, each);                                                   \
    } else {                                                                                                   \
      sum_columns<T, 1>(x, parts, rows, width, each);                                                          \
    }                                                                                                          \
  }                                                                                                            \
  EXPORT(bias_sum_columns_##T)                                                                                 \
  KERNEL bias_sum_planes_##T(const T* x, void* sums, int wide, int planes, int64_t inner) {                    \
    sum_planes(x, sums, wide, planes, inner);                                                                  \
  }                                                                                                            \
  EXPORT(bias_sum_planes_##T)                                                                                  \
  KERNEL bias_sum_rows_##T(const float* parts, T* out, int rows, int columns) {                                \
    sum_rows(parts, out, rows, columns, columns);                                                              \
  }                                                                                                            \
  EXPORT(bias_sum_rows_##T)

BIAS(f32)
BIAS(f16)
BIAS(bf16)
