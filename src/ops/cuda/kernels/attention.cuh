// Multi-head attention without its weights in memory: out = softmax(q·kᵀ / √d)·v for each head, and the gradients.
//
// q, out: [B, N, heads·d], k, v: [B, M, heads·d]. As FlashAttention-2: a block holds a tile of rows in shared memory and goes over
// the tiles of columns, two of which are there at a time, one in use and one on its way; weights live in registers only. The
// forward stores the log-sum-exp of each row of scores, in base 2, and the backward computes the weights from it. Each result is
// written by one thread: no atomics.
//
// A kernel is made for heads of up to D numbers; narrower ones are padded with zeros in shared memory. With a causal mask N is M,
// and query i sees the keys 0..=i.

#pragma once

#include "mma.cuh"

namespace {

constexpr float LOG2_E = 1.4426950408889634f;

// Numbers of a row in shared memory. Rows of a tile that threads read at once lie in different banks.
template <int D> constexpr int PADDED = (D + 15) / 16 * 16;
template <int D> constexpr int STRIDE = PADDED<D> + 8;

// Where the operands of this block's (image, head) pair begin.
struct Head {
  int64_t image;
  int head, heads, d;

  __device__ Head(int heads, int d) : image(blockIdx.y / heads), head(blockIdx.y % heads), heads(heads), d(d) {}

  // Numbers from one position to the next.
  __device__ int64_t width() const { return int64_t(heads) * d; }

  // The numbers of position `at` in [B, length, heads·d].
  template <class T> __device__ T* row(T* x, int length, int at) const {
    return x + (image * length + at) * width() + head * d;
  }

  // The number of position `at` in [B, heads, length].
  __device__ int64_t statistic(int length, int at) const { return (image * heads + head) * length + at; }
};

// Whether tiles of x can be copied in pieces of 16 bytes.
template <class T> __device__ bool aligned(const T* x, int d) {
  return d * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

// Copies `ROWS` rows of one head, `width` apart, to a tile; zeros stand for rows from `valid` on and for numbers from d on.
template <int ROWS, int D, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int valid, int64_t width, int d, bool in_pieces) {
  constexpr int PIECE = 16 / sizeof(T), PIECES = PADDED<D> / PIECE;
  if (in_pieces) {
    for (int i = threadIdx.x; i < ROWS * PIECES; i += blockDim.x) {
      const int row = i / PIECES, column = i % PIECES * PIECE;
      const bool there = row < valid && column < d;
      copy_16(tile + row * STRIDE<D> + column, there ? from + row * width + column : from, there);
    }
  } else {
    for (int i = threadIdx.x; i < ROWS * PADDED<D>; i += blockDim.x) {
      const int row = i / PADDED<D>, column = i % PADDED<D>;
      const bool there = row < valid && column < d;
      tile[row * STRIDE<D> + column] = there ? from[row * width + column] : from_float<T>(0);
    }
  }
}

// x = a·bᵀ of a warp's rows of `a` and all rows of `b`, tiles in shared memory.
template <int D, class T, int MT, int NT>
__device__ __forceinline__ void multiply_rows(float (&x)[MT][NT][4], const T* a, const T* b) {
#pragma unroll
  for (int i = 0; i < MT * NT * 4; ++i) x[i / 4 / NT][i / 4 % NT][i % 4] = 0;
#pragma unroll
  for (int k = 0; k < PADDED<D>; k += 16) {
    FragmentA<T> rows[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) load_a(rows[i], a + 16 * i * STRIDE<D> + k, STRIDE<D>);
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      FragmentB<T> columns;
      load_b_transposed(columns, b + 8 * j * STRIDE<D> + k, STRIDE<D>);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        multiply(x[i][j], rows[i], columns, 0);
        multiply(x[i][j + 1], rows[i], columns, 1);
      }
    }
  }
}

// x += a·b of a warp's rows in registers and a tile in shared memory.
template <int D, class T, int MT, int NT, int KT>
__device__ __forceinline__ void multiply_add(float (&x)[MT][NT][4], const float (&a)[MT][KT][4], const T* b) {
#pragma unroll
  for (int k = 0; k < KT; k += 2) {
    FragmentA<T> rows[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) to_a(rows[i], a[i][k], a[i][k + 1]);
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      FragmentB<T> columns;
      load_b(columns, b + 8 * k * STRIDE<D> + 8 * j, STRIDE<D>);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        multiply(x[i][j], rows[i], columns, 0);
        if (j + 1 < NT) multiply(x[i][j + 1 < NT ? j + 1 : j], rows[i], columns, 1);
      }
    }
  }
}

// Two numbers of a row, at an even position of an allocation.
template <class T> __device__ __forceinline__ void store_both(T* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = pack(x, y, T{});
}

__device__ __forceinline__ void store_both(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = float2{x, y}; }

// Writes two numbers of a row, those of them that the head has.
template <class T> __device__ __forceinline__ void store_pair(T* row, int column, int d, float x, float y) {
  if (d % 2 == 0) {
    if (column < d) store_both(row + column, x, y);
  } else {
    if (column < d) row[column] = from_float<T>(x);
    if (column + 1 < d) row[column + 1] = from_float<T>(y);
  }
}

// Writes a warp's rows of a result, each times a factor: those before `length`.
template <class T, int MT, int NT>
__device__ __forceinline__ void store_rows(T* x, const Head& head, int length, int first, const float (&values)[MT][NT][4],
                                           const float (&factors)[MT][2]) {
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = first + 16 * i + 8 * half + lane_index() / 4;
      if (at >= length) continue;
      T* row = head.row(x, length, at);
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const float factor = factors[i][half];
        store_pair(row, 8 * j + lane_index() % 4 * 2, head.d, values[i][j][2 * half] * factor,
                   values[i][j][2 * half + 1] * factor);
      }
    }
  }
}

// Puts `hidden` where a query does not see a key. `row` is the query of the warp's first row, `column` the key of this thread's
// first column.
template <int MT, int NT>
__device__ __forceinline__ void mask(float (&x)[MT][NT][4], float hidden, int row, int column, int m, int causal) {
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int last = causal ? min(m - 1, row + 16 * i + 8 * half + lane_index() / 4) : m - 1;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        if (column + 8 * j > last) x[i][j][2 * half] = hidden;
        if (column + 8 * j + 1 > last) x[i][j][2 * half + 1] = hidden;
      }
    }
  }
}

// Rows are queries, columns are keys. `lse` [B, heads, N] may be null.
template <class T, int D, int ROWS, int COLUMNS, int WARPS>
__device__ __forceinline__ void forward(const T* q, const T* k, const T* v, T* out, float* lse, int n, int m, int heads, int d,
                                        int causal) {
  constexpr int S = STRIDE<D>, MT = ROWS / 16 / WARPS, NT = COLUMNS / 8;
  DYNAMIC_SHARED(shared);
  T* queries = reinterpret_cast<T*>(shared);
  T* keys = queries + ROWS * S;        // two tiles
  T* values = keys + 2 * COLUMNS * S;  // two tiles
  const Head head(heads, d);
  const int first = blockIdx.x * ROWS, row = first + warp_index() * 16 * MT;
  const int seen = causal ? min(m, first + ROWS) : m, tiles = (seen + COLUMNS - 1) / COLUMNS;
  const bool in_pieces = aligned(q, d) && aligned(k, d) && aligned(v, d);
  const auto load = [&](int tile) {
    const int at = tile * COLUMNS, place = tile % 2 * COLUMNS * S;
    load_tile<COLUMNS, D>(keys + place, head.row(k, m, at), m - at, head.width(), d, in_pieces);
    load_tile<COLUMNS, D>(values + place, head.row(v, m, at), m - at, head.width(), d, in_pieces);
  };
  load_tile<ROWS, D>(queries, head.row(q, n, first), n - first, head.width(), d, in_pieces);
  load(0);
  const float scale = LOG2_E * rsqrtf(float(d));
  float sums[MT][D / 8][4] = {}, total[MT][2] = {}, greatest[MT][2];
#pragma unroll
  for (int i = 0; i < MT; ++i) greatest[i][0] = greatest[i][1] = -INFINITY;

  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies();
    __syncthreads();
    if (tile + 1 < tiles) load(tile + 1);
    const int place = tile % 2 * COLUMNS * S, column = tile * COLUMNS + lane_index() % 4 * 2;
    float weights[MT][NT][4];
    multiply_rows<D>(weights, queries + warp_index() * 16 * MT * S, keys + place);
    if ((tile + 1) * COLUMNS > m || (causal && (tile + 1) * COLUMNS > row + 1)) mask(weights, -INFINITY, row, column, m, causal);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float greater = weights[i][0][2 * half];
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          greater = fmaxf(greater, fmaxf(weights[i][j][2 * half], weights[i][j][2 * half + 1]));
        }
        greater = fmaxf(greater, __shfl_xor_sync(0xffffffffu, greater, 1));
        greater = fmaxf(greater, __shfl_xor_sync(0xffffffffu, greater, 2));
        // The first tile has a key that the query sees, so that from there on the greatest score is a number.
        greater = fmaxf(greatest[i][half], greater * scale);
        const float correction = power_of_2(greatest[i][half] - greater);
        greatest[i][half] = greater;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = weights[i][j][2 * half + e];
            x = power_of_2(x * scale - greater);
            sum += x;
          }
        }
        total[i][half] = total[i][half] * correction + sum;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          sums[i][j][2 * half] *= correction;
          sums[i][j][2 * half + 1] *= correction;
        }
      }
    }
    multiply_add<D>(sums, weights, values + place);
  }

  float factors[MT][2];
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = total[i][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      factors[i][half] = 1 / sum;
      const int at = row + 16 * i + 8 * half + lane_index() / 4;
      if (lse != nullptr && at < n && lane_index() % 4 == 0) {
        lse[head.statistic(n, at)] = greatest[i][half] + log2f(sum);
      }
    }
  }
  store_rows(out, head, n, row, sums, factors);
}

// Σ out·grad over the numbers of a head, for each query: [B, heads, N]. A warp for each.
template <class T>
__device__ void delta(const T* out, const T* grad, float* delta, int n, int heads, int d, int64_t count) {
  const int64_t i = thread_index() / WARP;
  if (i >= count) return;  // a whole warp
  const int64_t from = ((i / n / heads * n + i % n) * heads + i / n % heads) * d;
  float sum = 0;
  for (int j = lane_index(); j < d; j += WARP) sum += to_float(out[from + j]) * to_float(grad[from + j]);
  sum = warp_sum(sum);
  if (lane_index() == 0) delta[i] = sum;
}

// The gradient of q. Rows are queries, columns are keys.
template <class T, int D, int ROWS, int COLUMNS, int WARPS>
__device__ __forceinline__ void backward_q(const T* q, const T* k, const T* v, const T* grad, const float* lse,
                                           const float* delta, T* q_grad, int n, int m, int heads, int d, int causal) {
  constexpr int S = STRIDE<D>, MT = ROWS / 16 / WARPS, NT = COLUMNS / 8;
  DYNAMIC_SHARED(shared);
  T* queries = reinterpret_cast<T*>(shared);
  T* grads = queries + ROWS * S;
  T* keys = grads + ROWS * S;          // two tiles
  T* values = keys + 2 * COLUMNS * S;  // two tiles
  const Head head(heads, d);
  const int first = blockIdx.x * ROWS, row = first + warp_index() * 16 * MT;
  const int seen = causal ? min(m, first + ROWS) : m, tiles = (seen + COLUMNS - 1) / COLUMNS;
  const bool in_pieces = aligned(q, d) && aligned(k, d) && aligned(v, d) && aligned(grad, d);
  const auto load = [&](int tile) {
    const int at = tile * COLUMNS, place = tile % 2 * COLUMNS * S;
    load_tile<COLUMNS, D>(keys + place, head.row(k, m, at), m - at, head.width(), d, in_pieces);
    load_tile<COLUMNS, D>(values + place, head.row(v, m, at), m - at, head.width(), d, in_pieces);
  };
  load_tile<ROWS, D>(queries, head.row(q, n, first), n - first, head.width(), d, in_pieces);
  load_tile<ROWS, D>(grads, head.row(grad, n, first), n - first, head.width(), d, in_pieces);
  load(0);
  const float factor = rsqrtf(float(d)), scale = LOG2_E * factor;
  float sums[MT][D / 8][4] = {}, row_lse[MT][2], row_delta[MT][2], factors[MT][2];
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 16 * i + 8 * half + lane_index() / 4;
      row_lse[i][half] = at < n ? lse[head.statistic(n, at)] : 0;
      row_delta[i][half] = at < n ? delta[head.statistic(n, at)] : 0;
      factors[i][half] = factor;
    }
  }

  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies();
    __syncthreads();
    if (tile + 1 < tiles) load(tile + 1);
    const int place = tile % 2 * COLUMNS * S, column = tile * COLUMNS + lane_index() % 4 * 2;
    float weights[MT][NT][4], weight_grads[MT][NT][4];
    multiply_rows<D>(weights, queries + warp_index() * 16 * MT * S, keys + place);
    multiply_rows<D>(weight_grads, grads + warp_index() * 16 * MT * S, values + place);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = weights[i][j][e];
          x = power_of_2(x * scale - row_lse[i][e / 2]) * (weight_grads[i][j][e] - row_delta[i][e / 2]);
        }
      }
    }
    if ((tile + 1) * COLUMNS > m || (causal && (tile + 1) * COLUMNS > row + 1)) mask(weights, 0, row, column, m, causal);
    multiply_add<D>(sums, weights, keys + place);
  }
  store_rows(q_grad, head, n, row, sums, factors);
}

// The gradients of k and v; each may be null. Rows are keys, columns are queries.
template <class T, int D, int ROWS, int COLUMNS, int WARPS>
__device__ __forceinline__ void backward_kv(const T* q, const T* k, const T* v, const T* grad, const float* lse,
                                            const float* delta, T* k_grad, T* v_grad, int n, int m, int heads, int d,
                                            int causal) {
  constexpr int S = STRIDE<D>, MT = ROWS / 16 / WARPS, NT = COLUMNS / 8;
  DYNAMIC_SHARED(shared);
  T* keys = reinterpret_cast<T*>(shared);
  T* values = keys + ROWS * S;
  T* queries = values + ROWS * S;      // two tiles
  T* grads = queries + 2 * COLUMNS * S;  // two tiles
  float* lses = reinterpret_cast<float*>(grads + 2 * COLUMNS * S);
  float* deltas = lses + 2 * COLUMNS;
  const Head head(heads, d);
  const int first = blockIdx.x * ROWS, row = first + warp_index() * 16 * MT;
  const int tiles = (n + COLUMNS - 1) / COLUMNS;
  const bool in_pieces = aligned(q, d) && aligned(k, d) && aligned(v, d) && aligned(grad, d);
  // Zeros stand for queries from n on: they have weights, but neither a gradient nor numbers of their own.
  const auto load = [&](int tile) {
    const int at = tile * COLUMNS, place = tile % 2 * COLUMNS;
    load_tile<COLUMNS, D>(queries + place * S, head.row(q, n, at), n - at, head.width(), d, in_pieces);
    load_tile<COLUMNS, D>(grads + place * S, head.row(grad, n, at), n - at, head.width(), d, in_pieces);
    for (int i = threadIdx.x; i < COLUMNS; i += blockDim.x) {
      const bool there = at + i < n;
      const int64_t from = head.statistic(n, there ? at + i : 0);
      copy_4(lses + place + i, lse + from, there);
      copy_4(deltas + place + i, delta + from, there);
    }
  };
  load_tile<ROWS, D>(keys, head.row(k, m, first), m - first, head.width(), d, in_pieces);
  load_tile<ROWS, D>(values, head.row(v, m, first), m - first, head.width(), d, in_pieces);
  // Before the first key of this block no query sees it.
  const int start = causal ? first / COLUMNS : 0;
  load(start);
  const float factor = rsqrtf(float(d)), scale = LOG2_E * factor;
  float k_sums[MT][D / 8][4] = {}, v_sums[MT][D / 8][4] = {};

  for (int tile = start; tile < tiles; ++tile) {
    wait_for_copies();
    __syncthreads();
    if (tile + 1 < tiles) load(tile + 1);
    const int place = tile % 2 * COLUMNS, offset = lane_index() % 4 * 2;
    float weights[MT][NT][4], weight_grads[MT][NT][4];
    multiply_rows<D>(weights, keys + warp_index() * 16 * MT * S, queries + place * S);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(lses + place + 8 * j + offset);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = weights[i][j][e];
          x = power_of_2(x * scale - (e % 2 ? pair.y : pair.x));
        }
      }
    }
    if (causal && tile * COLUMNS < row + 16 * MT - 1) {
#pragma unroll
      for (int i = 0; i < MT * NT * 4; ++i) {
        const int key = row + i / 4 / NT * 16 + i % 4 / 2 * 8 + lane_index() / 4;
        const int query = tile * COLUMNS + offset + i / 4 % NT * 8 + i % 2;
        if (query < key) weights[i / 4 / NT][i / 4 % NT][i % 4] = 0;
      }
    }
    multiply_add<D>(v_sums, weights, grads + place * S);
    multiply_rows<D>(weight_grads, values + warp_index() * 16 * MT * S, grads + place * S);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(deltas + place + 8 * j + offset);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) weights[i][j][e] *= weight_grads[i][j][e] - (e % 2 ? pair.y : pair.x);
      }
    }
    multiply_add<D>(k_sums, weights, queries + place * S);
  }

  float factors[MT][2], ones[MT][2];
#pragma unroll
  for (int i = 0; i < MT; ++i) {
    factors[i][0] = factors[i][1] = factor;
    ones[i][0] = ones[i][1] = 1;
  }
  if (k_grad != nullptr) store_rows(k_grad, head, m, row, k_sums, factors);
  if (v_grad != nullptr) store_rows(v_grad, head, m, row, v_sums, ones);
}

}  // namespace

// A kernel's name says its sizes: `attention_forward_DxROWSxCOLUMNSxWARPS_T`. `attention.rs` computes with the same.

#define FORWARD(T, D, ROWS, COLUMNS, WARPS)                                                                              \
  KERNEL __launch_bounds__(WARPS* WARP) attention_forward_##D##x##ROWS##x##COLUMNS##x##WARPS##_##T(                      \
      const T* q, const T* k, const T* v, T* out, float* lse, int n, int m, int heads, int d, int causal) {             \
    forward<T, D, ROWS, COLUMNS, WARPS>(q, k, v, out, lse, n, m, heads, d, causal);                                      \
  }                                                                                                                      \
  EXPORT(attention_forward_##D##x##ROWS##x##COLUMNS##x##WARPS##_##T)

#define BACKWARD_Q(T, D, ROWS, COLUMNS, WARPS)                                                                           \
  KERNEL __launch_bounds__(WARPS* WARP) attention_backward_q_##D##x##ROWS##x##COLUMNS##x##WARPS##_##T(                   \
      const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* delta, T* q_grad, int n, int m, \
      int heads, int d, int causal) {                                                                                    \
    backward_q<T, D, ROWS, COLUMNS, WARPS>(q, k, v, grad, lse, delta, q_grad, n, m, heads, d, causal);                   \
  }                                                                                                                      \
  EXPORT(attention_backward_q_##D##x##ROWS##x##COLUMNS##x##WARPS##_##T)

#define BACKWARD_KV(T, D, ROWS, COLUMNS, WARPS)                                                                          \
  KERNEL __launch_bounds__(WARPS* WARP) attention_backward_kv_##D##x##ROWS##x##COLUMNS##x##WARPS##_##T(                  \
      const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* delta, T* k_grad, T* v_grad,    \
      int n, int m, int heads, int d, int causal) {                                                                      \
    backward_kv<T, D, ROWS, COLUMNS, WARPS>(q, k, v, grad, lse, delta, k_grad, v_grad, n, m, heads, d, causal);          \
  }                                                                                                                      \
  EXPORT(attention_backward_kv_##D##x##ROWS##x##COLUMNS##x##WARPS##_##T)

#define DELTA(T)                                                                                                  \
  KERNEL attention_delta_##T(const T* out, const T* grad, float* sums, int n, int heads, int d, int64_t count) { \
    delta(out, grad, sums, n, heads, d, count);                                                                   \
  }                                                                                                               \
  EXPORT(attention_delta_##T)
