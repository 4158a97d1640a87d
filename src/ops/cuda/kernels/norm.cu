// Group normalisation, with or without SiLU, and layer normalisation. Statistics and sums are in f32.
//
// x of a group norm is [B, groups, channels of a group, inner]: a group of an image is a row of contiguous numbers. `stats` has
// mean and reciprocal standard deviation of each row, [rows, 2], or is null where they are not needed again.

#include "vector.cuh"

namespace {

// Of some numbers: their count, their mean, and the sum of their squared distances from it. Merged as Chan, Golub and LeVeque
// do, so that nothing is lost where the mean is large.
struct Moments {
  float count, mean, squares;
};

__device__ __forceinline__ Moments merge(Moments a, Moments b) {
  if (b.count == 0) return a;
  const float count = a.count + b.count, share = __fdividef(b.count, count), apart = b.mean - a.mean;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

template <int N> __device__ __forceinline__ Moments moments_of(const float (&x)[N]) {
  float sum = 0, squares = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) sum += x[k];
  const float mean = sum * (1.0f / N);
#pragma unroll
  for (int k = 0; k < N; ++k) squares += (x[k] - mean) * (x[k] - mean);
  return {float(N), mean, squares};
}

// The moments of the numbers of a warp's threads, in every thread.
__device__ __forceinline__ Moments warp_moments(Moments m) {
  for (int apart = WARP / 2; apart > 0; apart /= 2) {
    m = merge(m, {__shfl_xor_sync(0xffffffffu, m.count, apart), __shfl_xor_sync(0xffffffffu, m.mean, apart),
                  __shfl_xor_sync(0xffffffffu, m.squares, apart)});
  }
  // The threads merged in different orders and differ in the last bits.
  return {__shfl_sync(0xffffffffu, m.count, 0), __shfl_sync(0xffffffffu, m.mean, 0),
          __shfl_sync(0xffffffffu, m.squares, 0)};
}

// The moments of the numbers of a block's threads, in every thread. Called once in a kernel.
__device__ __forceinline__ Moments block_moments(Moments m) {
  __shared__ Moments all[WARP];
  m = warp_moments(m);
  if (threadIdx.x % WARP == 0) all[threadIdx.x / WARP] = m;
  __syncthreads();
  m = all[0];
  for (unsigned warp = 1; warp < blockDim.x / WARP; ++warp) m = merge(m, all[warp]);
  return m;
}

// The moments of the numbers that this of `threads` threads sees of those from `first` to `end`.
template <int N, class T>
__device__ __forceinline__ Moments thread_moments(const T* x, int64_t first, int64_t end, int thread, int threads) {
  Moments m = {};
#pragma unroll 4
  for (int64_t i = first + thread * N; i < end; i += threads * N) {
    float value[N];
    load(x + i, value);
    m = merge(m, moments_of(value));
  }
  return m;
}

__device__ __forceinline__ float reciprocal_deviation(Moments m, float eps) {
  return 1 / sqrtf(m.squares / m.count + eps);
}

// A group of an image: the block's row of x.
struct Group {
  int64_t size, first, end;  // numbers of a row, and those of this block
  int image, channel;        // of the row; its first channel

  __device__ Group(int groups, int channels, int64_t inner, int64_t each)
      : size(channels * inner),
        first(blockIdx.y * each),
        end(min(size, first + each)),
        image(blockIdx.x / groups),
        channel(blockIdx.x % groups * channels) {}

  __device__ int64_t row() const { return blockIdx.x * size; }
};

// Mean and squares of a part of each row, [rows, gridDim.y, 2].
template <class T, int N> __device__ void group_parts(const T* x, float* parts, int64_t size, int64_t each) {
  const int64_t first = blockIdx.y * each;
  const T* row = x + blockIdx.x * size;
  const Moments m = block_moments(thread_moments<N>(row, first, min(size, first + each), threadIdx.x, blockDim.x));
  if (threadIdx.x > 0) return;
  float* part = parts + 2 * (int64_t(blockIdx.x) * gridDim.y + blockIdx.y);
  part[0] = m.mean;
  part[1] = m.squares;
}

// The grid is [rows, parts of a row]. Without `parts` a block has its row to itself.
template <class T, int N>
__device__ void group_forward(const T* x, T* out, Parameters weight, Parameters bias, const float* parts, float* stats,
                              int groups, int channels, int64_t inner, int64_t each, float eps, bool silu) {
  const Group group(groups, channels, inner, each);
  x += group.row();
  out += group.row();
  Moments m = {};
  if (parts == nullptr) {
    m = block_moments(thread_moments<N>(x, 0, group.size, threadIdx.x, blockDim.x));
  } else {
    parts += 2 * int64_t(blockIdx.x) * gridDim.y;
    for (int part = 0; part < int(gridDim.y); ++part) {
      const int64_t count = min(each, group.size - part * each);
      m = merge(m, {float(count), parts[2 * part], parts[2 * part + 1]});
    }
  }
  const float mean = m.mean, rstd = reciprocal_deviation(m, eps);
  if (stats != nullptr && blockIdx.y == 0 && threadIdx.x == 0) {
    stats[2 * int64_t(blockIdx.x)] = mean;
    stats[2 * int64_t(blockIdx.x) + 1] = rstd;
  }
#pragma unroll 4
  for (int64_t i = group.first + threadIdx.x * N; i < group.end; i += blockDim.x * N) {
    const int64_t channel = group.channel + quotient(i, inner);
    const float scale = rstd * load_parameter<T>(weight, channel), shift = load_parameter<T>(bias, channel);
    float value[N];
    load(x + i, value);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float y = (value[k] - mean) * scale + shift;
      value[k] = silu ? y * sigmoid<T>(y) : y;
    }
    store(out + i, value);
  }
}

// What forward and backward of a channel compute.
struct Channel {
  float mean, rstd, weight, bias;

  __device__ float normalised(float x) const { return (x - mean) * rstd; }

  // The gradient of xhat·weight + bias.
  template <class T> __device__ float grad(float xhat, float grad, bool silu) const {
    return silu ? silu_backward<T>(xhat * weight + bias, grad) : grad;
  }
};

template <class T>
__device__ __forceinline__ Channel channel_of(Parameters weight, Parameters bias, float mean, float rstd, int64_t c) {
  return {mean, rstd, load_parameter<T>(weight, c), load_parameter<T>(bias, c)};
}

// The gradients of weight and bias of each channel of each image, [B, 2, all channels], each by a warp, or by a block if
// `by_block`.
template <class T, int N>
__device__ void group_sums(const T* x, const T* grad, Parameters weight, Parameters bias, const float* stats, float* sums,
                           int planes, int groups, int channels, int64_t inner, bool silu, bool by_block) {
  const int threads = by_block ? blockDim.x : WARP, thread = threadIdx.x % threads;
  const int plane = blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
  if (plane >= planes) return;  // whole warps
  const int all = groups * channels, c = plane % all;
  stats += 2 * (plane / channels);
  const Channel channel = channel_of<T>(weight, bias, stats[0], stats[1], c);
  x += plane * inner;
  grad += plane * inner;
  float against = 0, total = 0;
#pragma unroll 4
  for (int64_t i = thread * N; i < inner; i += threads * N) {
    float value[N], g[N];
    load(x + i, value);
    load(grad + i, g);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float xhat = channel.normalised(value[k]), before = channel.grad<T>(xhat, g[k], silu);
      against += before * xhat;
      total += before;
    }
  }
  against = by_block ? block_sum(against) : warp_sum(against);
  total = by_block ? block_sum(total) : warp_sum(total);
  if (thread > 0) return;
  float* of = sums + int64_t(plane / all) * 2 * all + c;
  of[0] = against;
  of[all] = total;
}

// The grid is [rows, parts of a row].
template <class T, int N>
__device__ void group_backward(const T* x, const T* grad, Parameters weight, Parameters bias, const float* stats,
                               const float* sums, T* x_grad, int groups, int channels, int64_t inner, int64_t each,
                               bool silu) {
  const Group group(groups, channels, inner, each);
  const int all = groups * channels;
  sums += int64_t(group.image) * 2 * all + group.channel;
  float against = 0, total = 0;
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    const float w = load_parameter<T>(weight, group.channel + c);
    against += w * sums[c];
    total += w * sums[all + c];
  }
  // Means over the row of the gradient of xhat times xhat, and of that gradient.
  against = block_sum(against) / group.size;
  total = block_sum(total) / group.size;
  const float mean = stats[2 * int64_t(blockIdx.x)], rstd = stats[2 * int64_t(blockIdx.x) + 1];
  x += group.row();
  grad += group.row();
  x_grad += group.row();
#pragma unroll 2
  for (int64_t i = group.first + threadIdx.x * N; i < group.end; i += blockDim.x * N) {
    const Channel channel = channel_of<T>(weight, bias, mean, rstd, group.channel + quotient(i, inner));
    float value[N], g[N];
    load(x + i, value);
    load(grad + i, g);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float xhat = channel.normalised(value[k]), before = channel.grad<T>(xhat, g[k], silu);
      value[k] = channel.rstd * (before * channel.weight - total - xhat * against);
    }
    store(x_grad + i, value);
  }
}

// A warp has a row of x [rows, width].
template <class T, int N>
__device__ void layer_forward(const T* x, T* out, Parameters weight, Parameters bias, float* stats, int rows, int width,
                              float eps) {
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
  if (row >= rows) return;
  const int lane = threadIdx.x % WARP;
  x += row * width;
  out += row * width;
  const Moments m = warp_moments(thread_moments<N>(x, 0, width, lane, WARP));
  const float rstd = reciprocal_deviation(m, eps);
  if (stats != nullptr && lane == 0) {
    stats[2 * row] = m.mean;
    stats[2 * row + 1] = rstd;
  }
#pragma unroll 2
  for (int i = lane * N; i < width; i += WARP * N) {
    float value[N], w[N], b[N];
    load(x + i, value);
    load_parameters<T>(weight, i, w);
    load_parameters<T>(bias, i, b);
#pragma unroll
    for (int k = 0; k < N; ++k) value[k] = (value[k] - m.mean) * rstd * w[k] + b[k];
    store(out + i, value);
  }
}

// The gradient of one row of x, by a warp.
template <class T, int N>
__device__ void layer_row_backward(const T* x, const T* grad, Parameters weight, float mean, float rstd, T* x_grad,
                                   int width) {
  const int lane = threadIdx.x % WARP;
  float against = 0, total = 0;
#pragma unroll 2
  for (int i = lane * N; i < width; i += WARP * N) {
    float value[N], g[N], w[N];
    load(x + i, value);
    load(grad + i, g);
    load_parameters<T>(weight, i, w);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      against += g[k] * w[k] * ((value[k] - mean) * rstd);
      total += g[k] * w[k];
    }
  }
  against = warp_sum(against) / width;
  total = warp_sum(total) / width;
#pragma unroll 2
  for (int i = lane * N; i < width; i += WARP * N) {
    float value[N], g[N], w[N];
    load(x + i, value);
    load(grad + i, g);
    load_parameters<T>(weight, i, w);
#pragma unroll
    for (int k = 0; k < N; ++k) value[k] = rstd * (g[k] * w[k] - total - (value[k] - mean) * rstd * against);
    store(x_grad + i, value);
  }
}

// The grid is [tiles of columns, blocks of `each` rows]. `parts`: the sums over each block of rows of the gradients of weight
// and bias, [blocks, 2, width]. `x_grad` and `parts` may be null.
template <class T, int N>
__device__ void layer_backward(const T* x, const T* grad, Parameters weight, const float* stats, T* x_grad, float* parts,
                               int rows, int width, int each) {
  DYNAMIC_SHARED(shared);
  const int first = blockIdx.y * each, end = min(rows, first + each), warps = blockDim.x / WARP;
  if (x_grad != nullptr) {
    for (int row = first + blockIdx.x * warps + threadIdx.x / WARP; row < end; row += gridDim.x * warps) {
      const int64_t at = int64_t(row) * width;
      layer_row_backward<T, N>(x + at, grad + at, weight, stats[2 * row], stats[2 * row + 1], x_grad + at, width);
    }
  }
  if (parts == nullptr) return;
  // The rows are read once more, by columns: they are in the cache.
  const Tile tile(width / N, blockIdx.x, gridDim.x);
  float against[N] = {}, total[N] = {};
  if (tile.row >= 0) {
#pragma unroll 2
    for (int row = first + tile.row; row < end; row += tile.rows) {
      const float mean = stats[2 * row], rstd = stats[2 * row + 1];
      const int64_t at = int64_t(row) * width + tile.column * N;
      float value[N], g[N];
      load(x + at, value);
      load(grad + at, g);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        against[k] += g[k] * ((value[k] - mean) * rstd);
        total[k] += g[k];
      }
    }
  }
  sum_tile(tile, reinterpret_cast<float*>(shared), against);
  sum_tile(tile, reinterpret_cast<float*>(shared), total);
  if (tile.row != 0) return;
  parts += int64_t(blockIdx.y) * 2 * width + tile.column * N;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    parts[k] = against[k];
    parts[width + k] = total[k];
  }
}

// The gradients of weight and bias, by the blocks of the grid's second dimension; either may be null.
template <class T> __device__ void parameter_grads(const float* parts, T* weight, T* bias, int rows, int width) {
  T* const out = blockIdx.y == 0 ? weight : bias;
  if (out != nullptr) sum_rows(parts + blockIdx.y * width, out, rows, width, 2 * width);
}

}  // namespace

// `function<T, N>` of the arguments.
#define BY_PACKS(packed, function, T, ...)                                                                       \
  if (packed) {                                                                                                  \
    function<T, LANES<T>>(__VA_ARGS__);                                                                          \
  } else {                                                                                                       \
    function<T, 1>(__VA_ARGS__);                                                                                 \
  }

#define NORM(T)                                                                                                  \
  KERNEL group_norm_parts_##T(In<T> x, Out<float> parts, int64_t size, int64_t each) {                           \
    BY_PACKS(packs<T>(size, x), group_parts, T, x, parts, size, each)                                            \
  }                                                                                                              \
  EXPORT(group_norm_parts_##T)                                                                                   \
  KERNEL group_norm_forward_##T(In<T> x, Out<T> out, In<void> weight, In<void> bias, int wide,                   \
                                In<float> parts, Out<float> stats, int groups, int channels, int64_t inner,      \
                                int64_t each, float eps, int silu) {                                             \
    const Parameters w = {weight, wide}, b = {bias, wide};                                                       \
    BY_PACKS(packs<T>(inner, x, out), group_forward, T, x, out, w, b, parts, stats, groups, channels, inner,     \
             each, eps, silu != 0)                                                                               \
  }                                                                                                              \
  EXPORT(group_norm_forward_##T)                                                                                 \
  KERNEL group_norm_sums_##T(In<T> x, In<T> grad, In<void> weight, In<void> bias, int wide,                      \
                             In<float> stats, Out<float> sums, int planes, int groups, int channels,             \
                             int64_t inner, int silu, int by_block) {                                            \
    const Parameters w = {weight, wide}, b = {bias, wide};                                                       \
    BY_PACKS(packs<T>(inner, x, grad), group_sums, T, x, grad, w, b, stats, sums, planes, groups, channels,      \
             inner, silu != 0, by_block != 0)                                                                    \
  }                                                                                                              \
  EXPORT(group_norm_sums_##T)                                                                                    \
  KERNEL group_norm_backward_##T(In<T> x, In<T> grad, In<void> weight, In<void> bias, int wide,                  \
                                 In<float> stats, In<float> sums, Out<T> x_grad, int groups, int channels,       \
                                 int64_t inner, int64_t each, int silu) {                                        \
    const Parameters w = {weight, wide}, b = {bias, wide};                                                       \
    BY_PACKS(packs<T>(inner, x, grad, x_grad), group_backward, T, x, grad, w, b, stats, sums, x_grad, groups,    \
             channels, inner, each, silu != 0)                                                                   \
  }                                                                                                              \
  EXPORT(group_norm_backward_##T)                                                                                \
  KERNEL layer_norm_forward_##T(In<T> x, Out<T> out, In<void> weight, In<void> bias, int wide,                   \
                                Out<float> stats, int rows, int width, float eps) {                              \
    const Parameters w = {weight, wide}, b = {bias, wide};                                                       \
    BY_PACKS(packs<T>(width, x, out, weight, bias), layer_forward, T, x, out, w, b, stats, rows, width, eps)     \
  }                                                                                                              \
  EXPORT(layer_norm_forward_##T)                                                                                 \
  KERNEL layer_norm_backward_##T(In<T> x, In<T> grad, In<void> weight, int wide, In<float> stats,                \
                                 Out<T> x_grad, Out<float> parts, int rows, int width, int each, int packed) {   \
    const Parameters w = {weight, wide};                                                                         \
    BY_PACKS(packed, layer_backward, T, x, grad, w, stats, x_grad, parts, rows, width, each)                     \
  }                                                                                                              \
  EXPORT(layer_norm_backward_##T)                                                                                \
  KERNEL norm_parameter_grads_##T(In<float> parts, Out<T> weight, Out<T> bias, int rows, int width) {            \
    parameter_grads(parts, weight, bias, rows, width);                                                           \
  }                                                                                                              \
  EXPORT(norm_parameter_grads_##T)

NORM(f32)
NORM(f16)
NORM(bf16)
