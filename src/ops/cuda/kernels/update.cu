// The arithmetic of the optimiser over all tensors of a set in one launch: AdamW with moments in f32 or in 8 bits, the moving
// average, and the sum of squares for clipping. Everything is computed in f32, in the order of operations of the CPU's kernels.
//
// A table has a row a tensor. Each block works on a chunk of one tensor, which it finds by the number of the tensor's first
// block.

#include "common.cuh"

namespace {

// Numbers of a tensor that one block works on. `CHUNK` in update.rs.
constexpr int CHUNK = 8192;

// An array of numbers of one of three types. A null address: no array.
struct Array {
  int64_t address;
  // 0: f32, 1: f16, 2: bf16.
  int64_t type;
};

struct AdamWRow {
  int64_t first_block, elements;
  float *param, *moment1, *moment2;
  Array grad, copy;
};

struct AdamW8BitRow {
  int64_t first_block, elements;
  float* param;
  uint8_t* codes1;
  float* absmax1;
  uint8_t* codes2;
  float* absmax2;
  Array grad, copy;
};

struct EmaRow {
  int64_t first_block, elements;
  float* target;
  const float* source;
};

struct NormRow {
  int64_t first_block, elements;
  Array x;
};

// The row of this block.
template <class Row> __device__ __forceinline__ Row row_of_block(const Row* rows, int count) {
  int low = 0;
  for (int high = count; high - low > 1;) {
    const int middle = (low + high) / 2;
    if (rows[middle].first_block <= blockIdx.x) low = middle;
    else high = middle;
  }
  return rows[low];
}

// The numbers of a tensor that this block works on: from `begin` to before `end`.
struct Chunk {
  int64_t begin, end;
};

template <class Row> __device__ __forceinline__ Chunk chunk_of_block(const Row& row) {
  const int64_t begin = (blockIdx.x - row.first_block) * CHUNK;
  return {begin, min(begin + CHUNK, row.elements)};
}

// Four numbers that are read and written as one.
template <class T> struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// Four numbers of a tensor from index `i` on, or as many as there are before `end`.
struct Place {
  int64_t i, end;
  // Whether all four are there, and all arrays of the tensor begin at a multiple of 16 bytes.
  bool whole;

  __device__ __forceinline__ Place(int64_t i, int64_t end, int64_t addresses)
      : i(i), end(end), whole(i + 4 <= end && addresses % 16 == 0) {}
};

// The numbers at a place; zeros after the end.
template <class T> __device__ __forceinline__ void load(const T* from, const Place& at, float (&x)[4]) {
  if (at.whole) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from + at.i);
    for (int k = 0; k < 4; ++k) x[k] = to_float(four.x[k]);
  } else {
    for (int k = 0; k < 4; ++k) x[k] = at.i + k < at.end ? to_float(from[at.i + k]) : 0;
  }
}

__device__ __forceinline__ void load(const Array& from, const Place& at, float (&x)[4]) {
  switch (from.type) {
    case 0: load(reinterpret_cast<const float*>(from.address), at, x); break;
    case 1: load(reinterpret_cast<const f16*>(from.address), at, x); break;
    default: load(reinterpret_cast<const bf16*>(from.address), at, x);
  }
}

template <class T> __device__ __forceinline__ void store(T* to, const Place& at, const float (&x)[4]) {
  if (at.whole) {
    Four<T> four;
    for (int k = 0; k < 4; ++k) four.x[k] = from_float<T>(x[k]);
    *reinterpret_cast<Four<T>*>(to + at.i) = four;
  } else {
    for (int k = 0; k < 4 && at.i + k < at.end; ++k) to[at.i + k] = from_float<T>(x[k]);
  }
}

__device__ __forceinline__ void store(const Array& to, const Place& at, const float (&x)[4]) {
  if (to.address == 0) return;
  switch (to.type) {
    case 0: store(reinterpret_cast<float*>(to.address), at, x); break;
    case 1: store(reinterpret_cast<f16*>(to.address), at, x); break;
    default: store(reinterpret_cast<bf16*>(to.address), at, x);
  }
}

// Codes at a place; those of index 0 after the end.
__device__ __forceinline__ void load_codes(const uint8_t* from, const Place& at, Four<uint8_t>& codes) {
  if (at.whole) {
    codes = *reinterpret_cast<const Four<uint8_t>*>(from + at.i);
  } else {
    for (int k = 0; k < 4; ++k) codes.x[k] = at.i + k < at.end ? from[at.i + k] : 0;
  }
}

__device__ __forceinline__ void store_codes(uint8_t* to, const Place& at, const Four<uint8_t>& codes) {
  if (at.whole) {
    *reinterpret_cast<Four<uint8_t>*>(to + at.i) = codes;
  } else {
    for (int k = 0; k < 4 && at.i + k < at.end; ++k) to[at.i + k] = codes.x[k];
  }
}

// The factors of a step of AdamW: `Factors` in ops/update.rs.
struct Factors {
  float grad_scale, weight1, beta2, weight2, keep, step_size, root_correction2, epsilon;

  __device__ __forceinline__ void update(float& p, float& m, float& v, float grad) const {
    const float g = grad * grad_scale;
    m += weight1 * (g - m);
    v = beta2 * v + weight2 * g * g;
    p = p * keep - step_size * m / (sqrtf(v) / root_correction2 + epsilon);
  }
};

__device__ void adamw(const AdamWRow* rows, int count, const Factors& by) {
  const AdamWRow row = row_of_block(rows, count);
  const Chunk chunk = chunk_of_block(row);
  const int64_t addresses = reinterpret_cast<int64_t>(row.param) | reinterpret_cast<int64_t>(row.moment1) |
                            reinterpret_cast<int64_t>(row.moment2) | row.grad.address | row.copy.address;
  for (int64_t i = chunk.begin + 4 * threadIdx.x; i < chunk.end; i += 4 * blockDim.x) {
    const Place at(i, chunk.end, addresses);
    float p[4], m[4], v[4], grad[4];
    load(row.param, at, p);
    load(row.moment1, at, m);
    load(row.moment2, at, v);
    load(row.grad, at, grad);
    for (int k = 0; k < 4; ++k) by.update(p[k], m[k], v[k], grad[k]);
    store(row.param, at, p);
    store(row.moment1, at, m);
    store(row.moment2, at, v);
    store(row.copy, at, p);
  }
}

// Codes of a map: 256 values in ascending order, and the middles between them, infinite after the last one.
constexpr int CODES = 256;
// Numbers that share a scale.
constexpr int BLOCK = 256;
// Groups of four that a thread has of them.
constexpr int GROUPS = BLOCK / (4 * WARP);

struct Map {
  const float *values, *middles;

  // The code of the value nearest to `x`, of two equally near ones the lower: the number of middles below `x`.
  __device__ __forceinline__ uint8_t nearest(float x) const {
    int code = 0;
    for (int half = CODES / 2; half > 0; half /= 2) {
      if (middles[code + half - 1] < x) code += half;
    }
    return code;
  }
};

// A moment's numbers that a thread has of a block.
struct BlockMoment {
  float x[GROUPS][4];

  __device__ __forceinline__ void widen(int g, const uint8_t* from, float absmax, const Place& at, const Map& map) {
    Four<uint8_t> codes;
    load_codes(from, at, codes);
    for (int k = 0; k < 4; ++k) x[g][k] = at.i + k < at.end ? map.values[codes.x[k]] * absmax : 0;
  }

  // Rounds the block and writes it. All threads of the warp call it.
  template <class Places>
  __device__ __forceinline__ void round(uint8_t* codes, float* absmax, const Places& places, const Map& map) const {
    float most = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      for (int k = 0; k < 4; ++k) most = fmaxf(most, fabsf(x[g][k]));
    }
    most = warp_max(most);
    if (threadIdx.x % WARP == 0) *absmax = most;
    // A block of zeros stays one.
    const float divisor = most > 0 ? most : 1;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      Four<uint8_t> four;
      for (int k = 0; k < 4; ++k) four.x[k] = map.nearest(x[g][k] / divisor);
      store_codes(codes, places(g), four);
    }
  }
};

// A warp works on the numbers that share a scale.
__device__ void adamw8bit(const AdamW8BitRow* rows, int count, const float* maps, const Factors& by) {
  __shared__ float shared_maps[4 * CODES];
  for (int i = threadIdx.x; i < 4 * CODES; i += blockDim.x) shared_maps[i] = maps[i];
  __syncthreads();
  const Map map1{shared_maps, shared_maps + CODES}, map2{shared_maps + 2 * CODES, shared_maps + 3 * CODES};
  const AdamW8BitRow row = row_of_block(rows, count);
  const Chunk chunk = chunk_of_block(row);
  const int64_t addresses = reinterpret_cast<int64_t>(row.param) | reinterpret_cast<int64_t>(row.codes1) |
                            reinterpret_cast<int64_t>(row.codes2) | row.grad.address | row.copy.address;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  for (int64_t begin = chunk.begin + warp * BLOCK; begin < chunk.end; begin += blockDim.x / WARP * BLOCK) {
    const auto places = [&](int g) { return Place(begin + 4 * (g * WARP + lane), chunk.end, addresses); };
    const int64_t block = begin / BLOCK;
    const float absmax1 = row.absmax1[block], absmax2 = row.absmax2[block];
    // Every thread has read the scales before one of them writes the new ones.
    __syncwarp();
    BlockMoment m, v;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const Place at = places(g);
      float p[4], grad[4];
      load(row.param, at, p);
      load(row.grad, at, grad);
      m.widen(g, row.codes1, absmax1, at, map1);
      v.widen(g, row.codes2, absmax2, at, map2);
      for (int k = 0; k < 4; ++k) by.update(p[k], m.x[g][k], v.x[g][k], grad[k]);
      store(row.param, at, p);
      store(row.copy, at, p);
    }
    m.round(row.codes1, row.absmax1 + block, places, map1);
    v.round(row.codes2, row.absmax2 + block, places, map2);
  }
}

// target = decay · target + weight · source, with one rounding of the sum.
__device__ void ema(const EmaRow* rows, int count, float decay, float weight) {
  const EmaRow row = row_of_block(rows, count);
  const Chunk chunk = chunk_of_block(row);
  const int64_t addresses = reinterpret_cast<int64_t>(row.target) | reinterpret_cast<int64_t>(row.source);
  for (int64_t i = chunk.begin + 4 * threadIdx.x; i < chunk.end; i += 4 * blockDim.x) {
    const Place at(i, chunk.end, addresses);
    float target[4], source[4];
    load(row.target, at, target);
    load(row.source, at, source);
    for (int k = 0; k < 4; ++k) target[k] = fmaf(weight, source[k], target[k] * decay);
    store(row.target, at, target);
  }
}

// The sum of `x` over the threads of a block of whole warps, in its first thread. All threads of the block call it.
__device__ double block_sum(double x) {
  __shared__ double sums[WARP];
  for (int apart = WARP / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
  __syncthreads();
  double sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) sum += sums[warp];
  return sum;
}

// The sum of the squares of each block's chunk. A thread adds its few numbers in f32; the rest is f64.
__device__ void squares(const NormRow* rows, int count, double* sums) {
  const NormRow row = row_of_block(rows, count);
  const Chunk chunk = chunk_of_block(row);
  float sum = 0;
  for (int64_t i = chunk.begin + 4 * threadIdx.x; i < chunk.end; i += 4 * blockDim.x) {
    float x[4];
    load(row.x, Place(i, chunk.end, row.x.address), x);
    for (int k = 0; k < 4; ++k) sum += x[k] * x[k];
  }
  const double total = block_sum(double(sum));
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

}  // namespace

KERNEL adamw_f32(const AdamWRow* rows, int count, float grad_scale, float weight1, float beta2, float weight2, float keep,
                 float step_size, float root_correction2, float epsilon) {
  adamw(rows, count, {grad_scale, weight1, beta2, weight2, keep, step_size, root_correction2, epsilon});
}
EXPORT(adamw_f32)

// Four blocks of 256 threads fit a multiprocessor's registers.
KERNEL __launch_bounds__(256, 4)
    adamw8bit_f32(const AdamW8BitRow* rows, int count, const float* maps, float grad_scale, float weight1, float beta2,
                  float weight2, float keep, float step_size, float root_correction2, float epsilon) {
  adamw8bit(rows, count, maps, {grad_scale, weight1, beta2, weight2, keep, step_size, root_correction2, epsilon});
}
EXPORT(adamw8bit_f32)

KERNEL ema_f32(const EmaRow* rows, int count, float decay, float weight) { ema(rows, count, decay, weight); }
EXPORT(ema_f32)

KERNEL squares_f64(const NormRow* rows, int count, double* sums) { squares(rows, count, sums); }
EXPORT(squares_f64)
