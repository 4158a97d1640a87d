// Activations and gated GELU, computed in f32.

#include "vector.cuh"

namespace {

// The normal distribution function.
__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * (1 + erff(x * 0.70710678118654752f)); }

// The slope of GELU, x·cdf(x).
__device__ __forceinline__ float gelu_slope(float x, float cdf) {
  return cdf + x * 0.39894228040143268f * expf(-0.5f * x * x);
}

// Functions of one number: their value, and the gradient of x given that of the value.
template <class T> struct Silu {
  static __device__ float value(float x) { return x * sigmoid<T>(x); }
  static __device__ float grad(float x, float grad) { return silu_backward<T>(x, grad); }
};

template <class T> struct QuickGelu {
  static constexpr float SCALE = 1.702f;
  static __device__ float value(float x) { return x * sigmoid<T>(SCALE * x); }
  static __device__ float grad(float x, float grad) { return silu_backward<T>(SCALE * x, grad); }
};

template <class T> struct Gelu {
  static __device__ float value(float x) { return x * normal_cdf(x); }
  static __device__ float grad(float x, float grad) { return grad * gelu_slope(x, normal_cdf(x)); }
};

template <template <class> class F, class T> __device__ void forward(const T* x, T* out, int64_t count) {
  for_each<T>(count, packs<T>(0, x, out), [&](auto n, int64_t i) {
    float value[n.value];
    load(x + i, value);
#pragma unroll
    for (int k = 0; k < n.value; ++k) value[k] = F<T>::value(value[k]);
    store(out + i, value);
  });
}

template <template <class> class F, class T>
__device__ void backward(const T* x, const T* grad, T* x_grad, int64_t count) {
  for_each<T>(count, packs<T>(0, x, grad, x_grad), [&](auto n, int64_t i) {
    float value[n.value], g[n.value];
    load(x + i, value);
    load(grad + i, g);
#pragma unroll
    for (int k = 0; k < n.value; ++k) value[k] = F<T>::grad(value[k], g[k]);
    store(x_grad + i, value);
  });
}

// The first half of each row times GELU of the second half.
template <class T> __device__ void geglu_forward(const T* x, T* out, int64_t rows, int width) {
  for_each<T>(rows * width, packs<T>(width, x, out), [&](auto n, int64_t i) {
    const T* row = x + i + quotient(i, width) * width;
    float value[n.value], gate[n.value];
    load(row, value);
    load(row + width, gate);
#pragma unroll
    for (int k = 0; k < n.value; ++k) value[k] *= gate[k] * normal_cdf(gate[k]);
    store(out + i, value);
  });
}

template <class T> __device__ void geglu_backward(const T* x, const T* grad, T* x_grad, int64_t rows, int width) {
  for_each<T>(rows * width, packs<T>(width, x, grad, x_grad), [&](auto n, int64_t i) {
    const int64_t at = i + quotient(i, width) * width;
    float value[n.value], gate[n.value], g[n.value];
    load(x + at, value);
    load(x + at + width, gate);
    load(grad + i, g);
#pragma unroll
    for (int k = 0; k < n.value; ++k) {
      const float cdf = normal_cdf(gate[k]), slope = gelu_slope(gate[k], cdf);
      const float value_grad = g[k] * gate[k] * cdf;
      gate[k] = g[k] * value[k] * slope;
      value[k] = value_grad;
    }
    store(x_grad + at, value);
    store(x_grad + at + width, gate);
  });
}

}  // namespace

#define FUNCTION(name, F, T)                                                                                     \
  KERNEL name##_forward_##T(In<T> x, Out<T> out, int64_t count) { forward<F>(x, out, count); }                   \
  EXPORT(name##_forward_##T)                                                                                     \
  KERNEL name##_backward_##T(In<T> x, In<T> grad, Out<T> x_grad, int64_t count) {                                \
    backward<F>(x, grad, x_grad, count);                                                                         \
  }                                                                                                              \
  EXPORT(name##_backward_##T)

#define ACTIVATIONS(T)                                                                                           \
  FUNCTION(silu, Silu, T)                                                                                        \
  FUNCTION(quick_gelu, QuickGelu, T)                                                                             \
  FUNCTION(gelu, Gelu, T)                                                                                        \
  KERNEL geglu_forward_##T(In<T> x, Out<T> out, int64_t rows, int width) { geglu_forward(x, out, rows, width); } \
  EXPORT(geglu_forward_##T)                                                                                      \
  KERNEL geglu_backward_##T(In<T> x, In<T> grad, Out<T> x_grad, int64_t rows, int width) {                       \
    geglu_backward(x, grad, x_grad, rows, width);                                                                \
  }                                                                                                              \
  EXPORT(geglu_backward_##T)

ACTIVATIONS(f32)
ACTIVATIONS(f16)
ACTIVATIONS(bf16)
