// Gated GELU: the first half of each row times the exact GELU of the second half. Computed in f32.

#include "common.cuh"

namespace {

// The normal distribution function.
__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * (1 + erff(x * 0.70710678118654752f)); }

template <class T> __device__ void geglu_forward(const T* x, T* out, int64_t rows, int width) {
  for (int64_t i = thread_index(); i < rows * width; i += thread_count()) {
    const T* row = x + i / width * 2 * width + i % width;
    const float value = to_float(row[0]), gate = to_float(row[width]);
    out[i] = from_float<T>(value * gate * normal_cdf(gate));
  }
}

template <class T> __device__ void geglu_backward(const T* x, const T* grad, T* x_grad, int64_t rows, int width) {
  for (int64_t i = thread_index(); i < rows * width; i += thread_count()) {
    const int64_t at = i / width * 2 * width + i % width;
    const float value = to_float(x[at]), gate = to_float(x[at + width]), g = to_float(grad[i]);
    const float cdf = normal_cdf(gate), pdf = 0.39894228040143268f * expf(-0.5f * gate * gate);
    x_grad[at] = from_float<T>(g * gate * cdf);
    x_grad[at + width] = from_float<T>(g * value * (cdf + gate * pdf));
  }
}

}  // namespace

#define GEGLU(T)                                                                                              \
  KERNEL geglu_forward_##T(const T* x, T* out, int64_t rows, int width) { geglu_forward(x, out, rows, width); } \
  EXPORT(geglu_forward_##T)                                                                                   \
  KERNEL geglu_backward_##T(const T* x, const T* grad, T* x_grad, int64_t rows, int width) {                  \
    geglu_backward(x, grad, x_grad, rows, width);                                                             \
  }                                                                                                           \
  EXPORT(geglu_backward_##T)

GEGLU(f32)
GEGLU(f16)
GEGLU(bf16)
