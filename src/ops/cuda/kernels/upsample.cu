// Height and width doubled by repeating pixels. A thread has a pixel of the small map [rows, width], whose rows are those of
// all planes.

#include "vector.cuh"

namespace {

// Two neighbours, written and read at once. `T` is a type of 16 or 32 bits.
template <class T> struct alignas(2 * sizeof(T)) Pair {
  T left, right;
};

template <class T> __device__ void upsample_forward(const T* x, T* out, int64_t rows, int width) {
  Pair<T>* pairs = reinterpret_cast<Pair<T>*>(out);
  for (int64_t i = thread_index(); i < rows * width; i += thread_count()) {
    const Pair<T> pair = {x[i], x[i]};
    const int64_t at = i + quotient(i, width) * width;
    pairs[at] = pair;
    pairs[at + width] = pair;
  }
}

template <class T> __device__ void upsample_backward(const T* grad, T* x_grad, int64_t rows, int width) {
  for (int64_t i = thread_index(); i < rows * width; i += thread_count()) {
    const T* upper = grad + 2 * (i + quotient(i, width) * width);
    const T* lower = upper + 2 * width;
    x_grad[i] = from_float<T>(to_float(upper[0]) + to_float(upper[1]) + to_float(lower[0]) + to_float(lower[1]));
  }
}

}  // namespace

#define UPSAMPLE(T)                                                                                              \
  KERNEL upsample_forward_##T(In<T> x, Out<T> out, int64_t rows, int width) {                                    \
    upsample_forward(x, out, rows, width);                                                                       \
  }                                                                                                              \
  EXPORT(upsample_forward_##T)                                                                                   \
  KERNEL upsample_backward_##T(In<T> grad, Out<T> x_grad, int64_t rows, int width) {                             \
    upsample_backward(grad, x_grad, rows, width);                                                                \
  }                                                                                                              \
  EXPORT(upsample_backward_##T)

UPSAMPLE(f32)
UPSAMPLE(f16)
UPSAMPLE(bf16)
