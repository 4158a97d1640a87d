// Where the time goes on a machine with a GPU and no profiler: LD_PRELOAD for coffey's CUDA binary. It waits for the card before and after
// each kernel, product, convolution and copy, and adds up their times by name. With GPUTRACE_OUT=FILE the times of each training step
// (a line of metrics.jsonl) are appended to FILE. A run with it is slow; the parts can be compared, their sum is not a step's time.
//
// The binary takes CUDA's functions from dlsym, so that is the function replaced here: for names known below it answers with a wrapper.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <string>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

namespace {

using u64 = uint64_t;
std::recursive_mutex mutex;
struct Total {
  u64 calls = 0;
  double seconds = 0, work = 0;
};
std::map<std::string, Total> totals;
std::map<void *, std::string> kernel_names;
int (*synchronize)();

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void report(const char *what) {
  if (totals.empty()) return;
  const char *path = getenv("GPUTRACE_OUT");
  FILE *file = path ? fopen(path, "a") : stderr;
  if (!file) return;
  double seconds = 0;
  std::multimap<double, std::string> order;
  for (auto &[key, total] : totals) seconds += total.seconds, order.emplace(-total.seconds, key);
  fprintf(file, "--- %s: %.1f ms\n", what, seconds * 1e3);
  for (auto &[_, key] : order) {
    auto &t = totals[key];
    fprintf(file, "%10.3f ms %7lu x %-60s", t.seconds * 1e3, t.calls, key.c_str());
    if (t.work) fprintf(file, " %10.3f G", t.work / 1e9);
    fprintf(file, "\n");
  }
  if (path) fclose(file);
  totals.clear();
}

struct AtExit {
  ~AtExit() { report("to the end"); }
} at_exit;

// The call with the card idle before and after it.
template <class Call> int timed(const std::string &key, double work, Call call) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (synchronize) synchronize();
  double start = now();
  int result = call();
  if (synchronize) synchronize();
  auto &total = totals[result ? key + " FAILED" : key];
  total.calls++;
  total.seconds += now() - start;
  total.work += work;
  return result;
}

std::string text(const char *pattern, auto... values) {
  char buffer[256];
  snprintf(buffer, sizeof buffer, pattern, values...);
  return buffer;
}

const char *data_type(int t) { return t == 0 ? "f32" : t == 2 ? "f16" : t == 14 ? "bf16" : "other"; }

// ---- wrappers; `real_NAME` is filled by dlsym ----
#define REAL(name, ...) int (*real_##name)(__VA_ARGS__)

REAL(cuModuleGetFunction, void **, void *, const char *);
int cuModuleGetFunction(void **f, void *m, const char *name) {
  int result = real_cuModuleGetFunction(f, m, name);
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (!result) kernel_names[*f] = name;
  return result;
}
REAL(cuModuleLoadData, void **, const void *);
int cuModuleLoadData(void **m, const void *image) {
  return timed("(loading and compiling a module)", 0, [&] { return real_cuModuleLoadData(m, image); });
}
using Dim = unsigned;
REAL(cuLaunchKernel, void *, Dim, Dim, Dim, Dim, Dim, Dim, Dim, void *, void **, void **);
int cuLaunchKernel(void *f, Dim gx, Dim gy, Dim gz, Dim bx, Dim by, Dim bz, Dim shared, void *s, void **p, void **e) {
  std::string key = [&] {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return kernel_names[f];
  }();
  u64 blocks = (u64)gx * gy * gz;
  key += blocks == 1 ? " (1 block)" : blocks < 132 ? " (< 132 blocks)" : "";
  return timed(key, 0, [&] { return real_cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, s, p, e); });
}
REAL(cuMemAllocAsync, u64 *, size_t, void *);
int cuMemAllocAsync(u64 *p, size_t n, void *s) {
  return timed("(cuMemAllocAsync)", n, [&] { return real_cuMemAllocAsync(p, n, s); });
}
REAL(cuMemcpyHtoDAsync_v2, u64, const void *, size_t, void *);
int cuMemcpyHtoDAsync_v2(u64 d, const void *from, size_t n, void *s) {
  return timed(n <= 256 ? "(upload, up to 256 bytes)" : "(upload)", n, [&] { return real_cuMemcpyHtoDAsync_v2(d, from, n, s); });
}
REAL(cuMemcpyDtoHAsync_v2, void *, u64, size_t, void *);
int cuMemcpyDtoHAsync_v2(void *to, u64 from, size_t n, void *s) {
  return timed("(download)", n, [&] { return real_cuMemcpyDtoHAsync_v2(to, from, n, s); });
}
REAL(cuMemcpyDtoDAsync_v2, u64, u64, size_t, void *);
int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t n, void *s) {
  return timed("(copy)", n, [&] { return real_cuMemcpyDtoDAsync_v2(to, from, n, s); });
}
REAL(cuMemsetD8Async, u64, unsigned char, size_t, void *);
int cuMemsetD8Async(u64 to, unsigned char v, size_t n, void *s) {
  return timed("(memset)", n, [&] { return real_cuMemsetD8Async(to, v, n, s); });
}

REAL(cublasGemmStridedBatchedEx, void *, int, int, int, int, int, const void *, const void *, int, int, long long, const void *, int, int, long long,
     const void *, void *, int, int, long long, int, int, int);
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, const void *al, const void *a, int at, int la, long long sa, const void *b, int bt,
                               int lb, long long sb, const void *be, void *c, int ct, int lc, long long sc, int batch, int compute, int algorithm) {
  return timed(text("gemm %s compute%d%s", data_type(at), compute, batch > 1 ? " batched" : ""), 2.0 * m * n * k * batch, [&] {
    return real_cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, al, a, at, la, sa, b, bt, lb, sb, be, c, ct, lc, sc, batch, compute, algorithm);
  });
}
REAL(cublasGemmEx, void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int, const void *, void *, int, int, int, int);
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, const void *al, const void *a, int at, int la, const void *b, int bt, int lb, const void *be,
                 void *c, int ct, int lc, int compute, int algorithm) {
  return timed(text("gemm %s compute%d", data_type(at), compute), 2.0 * m * n * k,
               [&] { return real_cublasGemmEx(h, ta, tb, m, n, k, al, a, at, la, b, bt, lb, be, c, ct, lc, compute, algorithm); });
}

// The shape of a convolution: filter, stride and output, from cuDNN's own queries.
int (*get_filter)(void *, int, int *, int *, int *, int *, int *, int *);
int (*get_tensor)(void *, int *, int *, int *, int *, int *, int *, int *, int *, int *);
std::string convolution(const char *kind, void *w, void *y, int algorithm, double *flop) {
  int type = 0, layout = 0, k = 0, c = 0, kh = 0, kw = 0, n = 0, co = 0, h = 0, v = 0, s[4] = {};
  if (get_filter) get_filter(w, 4, &type, &layout, &k, &c, &kh, &kw);
  if (get_tensor) get_tensor(y, &type, &n, &co, &h, &v, s, s + 1, s + 2, s + 3);
  *flop = 2.0 * n * co * h * v * c * kh * kw;
  return text("convolution %s type%d %dx%d %s algorithm%d", kind, type, kh, kw, s[1] == 1 && co > 1 ? "nhwc" : "nchw", algorithm);
}
REAL(cudnnConvolutionForward, void *, const void *, void *, const void *, void *, const void *, void *, int, void *, size_t, const void *, void *, void *);
int cudnnConvolutionForward(void *h, const void *al, void *x, const void *xp, void *w, const void *wp, void *c, int algorithm, void *ws, size_t wn,
                            const void *be, void *y, void *yp) {
  double flop;
  std::string key = convolution("forward", w, y, algorithm, &flop);
  return timed(key, flop, [&] { return real_cudnnConvolutionForward(h, al, x, xp, w, wp, c, algorithm, ws, wn, be, y, yp); });
}
REAL(cudnnConvolutionBackwardData, void *, const void *, void *, const void *, void *, const void *, void *, int, void *, size_t, const void *, void *, void *);
int cudnnConvolutionBackwardData(void *h, const void *al, void *w, const void *wp, void *y, const void *yp, void *c, int algorithm, void *ws, size_t wn,
                                 const void *be, void *x, void *xp) {
  double flop;
  std::string key = convolution("data", w, y, algorithm, &flop);
  return timed(key, flop, [&] { return real_cudnnConvolutionBackwardData(h, al, w, wp, y, yp, c, algorithm, ws, wn, be, x, xp); });
}
REAL(cudnnConvolutionBackwardFilter, void *, const void *, void *, const void *, void *, const void *, void *, int, void *, size_t, const void *, void *, void *);
int cudnnConvolutionBackwardFilter(void *h, const void *al, void *x, const void *xp, void *y, const void *yp, void *c, int algorithm, void *ws, size_t wn,
                                   const void *be, void *w, void *wp) {
  double flop;
  std::string key = convolution("filter", w, y, algorithm, &flop);
  return timed(key, flop, [&] { return real_cudnnConvolutionBackwardFilter(h, al, x, xp, y, yp, c, algorithm, ws, wn, be, w, wp); });
}
REAL(cudnnConvolutionBackwardBias, void *, const void *, void *, const void *, const void *, void *, void *);
int cudnnConvolutionBackwardBias(void *h, const void *al, void *y, const void *yp, const void *be, void *b, void *bp) {
  return timed("convolution bias", 0, [&] { return real_cudnnConvolutionBackwardBias(h, al, y, yp, be, b, bp); });
}

struct Wrapper {
  const char *name;
  void *wrapper, **real;
};
#define WRAP(name) {#name, (void *)name, (void **)&real_##name}
const Wrapper WRAPPERS[] = {
    WRAP(cuModuleGetFunction), WRAP(cuModuleLoadData), WRAP(cuLaunchKernel), WRAP(cuMemAllocAsync), WRAP(cuMemcpyHtoDAsync_v2), WRAP(cuMemcpyDtoHAsync_v2),
    WRAP(cuMemcpyDtoDAsync_v2), WRAP(cuMemsetD8Async), WRAP(cublasGemmStridedBatchedEx), WRAP(cublasGemmEx), WRAP(cudnnConvolutionForward),
    WRAP(cudnnConvolutionBackwardData), WRAP(cudnnConvolutionBackwardFilter), WRAP(cudnnConvolutionBackwardBias),
};

using Dlsym = void *(*)(void *, const char *);
Dlsym real_dlsym() {
  static Dlsym found = [] {
    void *f = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
    return (Dlsym)(f ? f : dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5"));
  }();
  return found;
}

} // namespace

extern "C" __attribute__((visibility("default"))) void *dlsym(void *library, const char *name) {
  void *address = real_dlsym()(library, name);
  // CUDA's libraries call each other's functions: those are part of the call that is timed.
  Dl_info caller{};
  if (!address || !dladdr(__builtin_return_address(0), &caller) || !caller.dli_fname || strstr(caller.dli_fname, ".so")) return address;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (!strcmp(name, "cuCtxSynchronize")) synchronize = (int (*)())address;
  if (!synchronize && !strncmp(name, "cu", 2)) synchronize = (int (*)())real_dlsym()(library, "cuCtxSynchronize");
  if (!get_filter && !strncmp(name, "cudnn", 5)) {
    get_filter = (decltype(get_filter))real_dlsym()(library, "cudnnGetFilter4dDescriptor");
    get_tensor = (decltype(get_tensor))real_dlsym()(library, "cudnnGetTensor4dDescriptor");
  }
  for (auto &w : WRAPPERS)
    if (!strcmp(w.name, name)) return *w.real = address, w.wrapper;
  return address;
}

// A line of metrics.jsonl is the end of a training step.
extern "C" __attribute__((visibility("default"))) ssize_t write(int file, const void *data, size_t bytes) {
  ssize_t written = syscall(SYS_write, file, data, bytes);
  if (written > 8 && !memcmp(data, "{\"step\":", 8)) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    report("a step");
  }
  return written;
}
