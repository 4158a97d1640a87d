// Products of small matrices by tensor cores, and what feeds them: fragments in registers, asynchronous copies to shared memory.
//
// A fragment is a matrix that the 32 threads of a warp hold together. With g = lane / 4 and t = lane % 4, a thread holds of
// - A, 16 x 16: rows g and g + 8, columns 2t, 2t + 1, 2t + 8 and 2t + 9;
// - B, 16 x 8: rows 2t, 2t + 1, 2t + 8 and 2t + 9, column g;
// - C, 16 x 8: rows g and g + 8, columns 2t and 2t + 1: c[0], c[1] of row g, c[2], c[3] of row g + 8.
// So two Cs side by side become an A without an exchange between threads. All threads of a warp call the functions of fragments.
//
// f32 goes through tensor cores too: each number is split into two of TF32, and three products of four are added, which keeps
// 22 bits. Sums are f32 always.
#pragma once

#include "common.cuh"

template <class T> struct FragmentA {
  uint32_t x[4];
};
template <> struct FragmentA<float> {
  float x[8];
};

// Two Bs side by side: a matrix of 16 x 16.
template <class T> struct FragmentB {
  uint32_t x[2][2];
};
template <> struct FragmentB<float> {
  float x[2][4];
};

__device__ __forceinline__ int lane_index() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / WARP; }

// The instructions, or what stands for them in tests.

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* x) { return uint32_t(__cvta_generic_to_shared(x)); }

__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 x 8 16-bit numbers: thread i gives the address of row i % 8 of matrix i / 8, of 16 bytes. A thread gets of
// each matrix the columns 2t and 2t + 1 of row g, or with `TRANSPOSED` the rows 2t and 2t + 1 of column g.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* row) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(shared_address(row))
                 : "memory");
  }
}

__device__ __forceinline__ uint32_t pack(float low, float high, f16) {
  const __half2 x = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(x);
}

__device__ __forceinline__ uint32_t pack(float low, float high, bf16) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(x);
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Copies 16 or 4 bytes to shared memory, or zeros if not `valid`. They are there after `wait_for_copies`, and for other threads
// after a barrier behind it.
__device__ __forceinline__ void copy_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_4(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 2 to the power of x, with a relative error of 2^-22.
__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
namespace host {

// What the threads of a warp show each other for one instruction. Two sets take turns, so that one barrier is enough: a thread
// that writes to a set has passed the barrier of the instruction between, which the others reach after reading.
struct Shown {
  uint32_t a[WARP_THREADS][4], b[WARP_THREADS][2];
  const uint16_t* rows[WARP_THREADS];
};

inline Shown& shown() {
  static Shown sets[MAX_THREADS / WARP_THREADS][2];
  static unsigned turns[MAX_THREADS];
  return sets[warp_index()][turns[threadIdx.x]++ % 2];
}

inline float half_of(uint32_t pair, int which, f16) { return to_float(f16{uint16_t(pair >> 16 * which)}); }
inline float half_of(uint32_t pair, int which, bf16) { return to_float(bf16{uint16_t(pair >> 16 * which)}); }

}  // namespace host

template <class T> void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
  host::Shown& shown = host::shown();
  std::memcpy(shown.a[lane_index()], a, sizeof a);
  std::memcpy(shown.b[lane_index()], b, sizeof b);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane_index() / 4 + i / 2 * 8, column = lane_index() % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const float x = host::half_of(shown.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2, type);
      sum += x * host::half_of(shown.b[column * 4 + k % 8 / 2][k / 8], k % 2, type);
    }
    c[i] += sum;
  }
}

inline void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::Shown& shown = host::shown();
  std::memcpy(shown.a[lane_index()], a, sizeof a);
  std::memcpy(shown.b[lane_index()], b, sizeof b);
  __syncwarp();
  // TF32 has the exponent of f32 and 10 bits of its mantissa.
  const auto tf32 = [](uint32_t bits) { return host::as<float>(bits & 0xffffe000u); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane_index() / 4 + i / 2 * 8, column = lane_index() % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 8; ++k) {
      sum += tf32(shown.a[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]) * tf32(shown.b[column * 4 + k % 4][k / 4]);
    }
    c[i] += sum;
  }
}

template <bool TRANSPOSED>
void load_matrices(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* row) {
  host::Shown& shown = host::shown();
  shown.rows[lane_index()] = static_cast<const uint16_t*>(row);
  __syncwarp();
  const int g = lane_index() / 4, t = lane_index() % 4;
  uint32_t* to[] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i) {
    const uint16_t* const* rows = shown.rows + 8 * i;
    const uint32_t low = TRANSPOSED ? rows[2 * t][g] : rows[g][2 * t];
    const uint32_t high = TRANSPOSED ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
    *to[i] = low | high << 16;
  }
}

template <class T> uint32_t pack(float low, float high, T) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

inline uint32_t bits_of(float x) { return host::as<uint32_t>(x); }
inline float float_of(uint32_t bits) { return host::as<float>(bits); }

inline void copy_16(void* shared, const void* global, bool valid) {
  valid ? std::memcpy(shared, global, 16) : std::memset(shared, 0, 16);
}

inline void copy_4(void* shared, const void* global, bool valid) {
  valid ? std::memcpy(shared, global, 4) : std::memset(shared, 0, 4);
}

inline void wait_for_copies() {}
inline float power_of_2(float x) { return std::exp2(x); }
#endif

// x as a number of TF32, rounded to the nearest.
__device__ __forceinline__ float to_tf32(float x) { return float_of((bits_of(x) + 0x1000u) & 0xffffe000u); }

// The A at `tile`, whose rows are `stride` apart in shared memory.
template <class T> __device__ __forceinline__ void load_a(FragmentA<T>& a, const T* tile, int stride) {
  const int lane = lane_index();
  load_matrices<false>(a.x[0], a.x[1], a.x[2], a.x[3], tile + lane % 16 * stride + lane / 16 * 8);
}

__device__ __forceinline__ void load_a(FragmentA<float>& a, const float* tile, int stride) {
  tile += lane_index() / 4 * stride + lane_index() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 above = *reinterpret_cast<const float2*>(tile + 8 * half);
    const float2 below = *reinterpret_cast<const float2*>(tile + 8 * half + 8 * stride);
    float* x = a.x + 4 * half;
    x[0] = above.x, x[1] = below.x, x[2] = above.y, x[3] = below.y;
  }
}

// The transpose of the 16 x 16 numbers at `tile`, as two Bs: a row of shared memory is a column of B.
template <class T> __device__ __forceinline__ void load_b_transposed(FragmentB<T>& b, const T* tile, int stride) {
  const int lane = lane_index();
  load_matrices<false>(b.x[0][0], b.x[0][1], b.x[1][0], b.x[1][1],
                       tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}

__device__ __forceinline__ void load_b_transposed(FragmentB<float>& b, const float* tile, int stride) {
  tile += lane_index() / 4 * stride + lane_index() % 4 * 2;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 pair = *reinterpret_cast<const float2*>(tile + 8 * which * stride + 8 * half);
      b.x[which][2 * half] = pair.x, b.x[which][2 * half + 1] = pair.y;
    }
  }
}

// The 16 x 16 numbers at `tile`, as two Bs: a row of shared memory is a row of B.
template <class T> __device__ __forceinline__ void load_b(FragmentB<T>& b, const T* tile, int stride) {
  const int lane = lane_index();
  load_matrices<true>(b.x[0][0], b.x[0][1], b.x[1][0], b.x[1][1], tile + lane % 16 * stride + lane / 16 * 8);
}

__device__ __forceinline__ void load_b(FragmentB<float>& b, const float* tile, int stride) {
  tile += lane_index() % 4 * 2 * stride + lane_index() / 4;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      b.x[which][2 * half] = tile[8 * half * stride + 8 * which];
      b.x[which][2 * half + 1] = tile[(8 * half + 1) * stride + 8 * which];
    }
  }
}

// Two Cs side by side, as an A.
template <class T> __device__ __forceinline__ void to_a(FragmentA<T>& a, const float (&left)[4], const float (&right)[4]) {
  a.x[0] = pack(left[0], left[1], T{});
  a.x[1] = pack(left[2], left[3], T{});
  a.x[2] = pack(right[0], right[1], T{});
  a.x[3] = pack(right[2], right[3], T{});
}

__device__ __forceinline__ void to_a(FragmentA<float>& a, const float (&left)[4], const float (&right)[4]) {
  a.x[0] = left[0], a.x[1] = left[2], a.x[2] = left[1], a.x[3] = left[3];
  a.x[4] = right[0], a.x[5] = right[2], a.x[6] = right[1], a.x[7] = right[3];
}

// c += a·b, b being the `which`th B.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const FragmentA<T>& a, const FragmentB<T>& b, int which) {
  mma_m16n8k16(c, a.x, b.x[which], T{});
}

__device__ __forceinline__ void multiply(float (&c)[4], const FragmentA<float>& a, const FragmentB<float>& b, int which) {
  // The instruction takes 8 columns of A and rows of B, and a thread's are t and t + 4. Those that it holds are 2t and 2t + 1: the
  // same order in A and B gives the same sum.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = a.x[4 * half + i], high = to_tf32(x);
      a_high[i] = bits_of(high), a_low[i] = bits_of(to_tf32(x - high));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = b.x[which][2 * half + i], high = to_tf32(x);
      b_high[i] = bits_of(high), b_low[i] = bits_of(to_tf32(x - high));
    }
    mma_m16n8k8(c, a_low, b_high);
    mma_m16n8k8(c, a_high, b_low);
    mma_m16n8k8(c, a_high, b_high);
  }
}
