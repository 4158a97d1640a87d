// Sums of two tensors, and tensors joined along their channels.

#include "vector.cuh"

namespace {

template <class T> __device__ void add(const T* a, const T* b, T* out, int64_t count) {
  for_each<T>(count, packs<T>(0, a, b, out), [&](auto n, int64_t i) {
    float x[n.value], y[n.value];
    load(a + i, x);
    load(b + i, y);
#pragma unroll
    for (int k = 0; k < n.value; ++k) x[k] += y[k];
    store(out + i, x);
  });
}

// Between a [rows, left] and b [rows, right], and joined [rows, left + right]: copies the numbers of `joined` to the two if
// `apart`, else theirs to `joined`.
template <class T>
__device__ void join(T* a, T* b, T* joined, int64_t rows, int64_t left, int64_t right, bool apart) {
  const int64_t width = left + right;
  for_each<T>(rows * width, packs<T>(left, a, b) && packs<T>(right, joined), [&](auto n, int64_t i) {
    const int64_t row = quotient(i, width), column = i - row * width;
    T* part = column < left ? a + row * left + column : b + row * right + (column - left);
    float x[n.value];
    if (apart) {
      load(joined + i, x);
      store(part, x);
    } else {
      load(part, x);
      store(joined + i, x);
    }
  });
}

}  // namespace

#define RESIDUAL(T)                                                                                              \
  KERNEL add_##T(In<T> a, In<T> b, Out<T> out, int64_t count) { add(a, b, out, count); }                         \
  EXPORT(add_##T)                                                                                                \
  KERNEL join_##T(Out<T> a, Out<T> b, Out<T> joined, int64_t rows, int64_t left, int64_t right, int apart) {     \
    join(a, b, joined, rows, left, right, apart != 0);                                                           \
  }                                                                                                              \
  EXPORT(join_##T)

RESIDUAL(f32)
RESIDUAL(f16)
RESIDUAL(bf16)
