// The part of the CUDA language that the kernels use, for a C++ compiler: tests run the kernels on the CPU with it.
//
// The threads of a block are fibers of one host thread; a fiber runs until it waits for others, at a barrier of its block or
// warp. Blocks run one after another. A barrier that no thread can pass ends the process with a message.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static
#define __align__(n) alignas(n)
#define __forceinline__ inline
#define __launch_bounds__(...)
#define KERNEL static void
#define EXPORT(name) static const bool name##_exported = host::add(#name, name);
#define DYNAMIC_SHARED(name) unsigned char* name = host::dynamic_shared()

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

// 16-bit floats. Arithmetic is done in f32, as in the kernels.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

namespace host {

template <class To, class From> To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

inline f16 to_f16(float x) { return {as<uint16_t>(static_cast<_Float16>(x))}; }

inline bf16 to_bf16(float x) {
  const uint32_t bits = as<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

constexpr unsigned MAX_THREADS = 1024, WARP_THREADS = 32, STACK = 1 << 16;

// Threads that wait for each other.
struct Group {
  unsigned members = 0, arrived = 0, generation = 0;

  void release() {
    arrived = 0;
    ++generation;
  }
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool running = false;
};

struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(MAX_THREADS);
  ucontext_t scheduler;
  unsigned current = 0;
  Group block, warps[MAX_THREADS / WARP_THREADS];
  uint64_t exchanged[MAX_THREADS];
  std::vector<unsigned char> shared;
  std::function<void()> body;
  bool progress = false;

  void wait(Group& group) {
    const unsigned generation = group.generation;
    if (++group.arrived == group.members) {
      group.release();
      progress = true;
    }
    while (group.generation == generation) swapcontext(&fibers[current].context, &scheduler);
  }

  void leave(Group& group) {
    if (--group.members > 0 && group.arrived == group.members) group.release();
  }

  Group& warp() { return warps[current / WARP_THREADS]; }

  void run_block(unsigned threads);
};

inline Machine& machine() {
  static Machine machine;
  return machine;
}

inline void fiber_main() {
  Machine& m = machine();
  m.body();
  m.leave(m.warp());
  m.leave(m.block);
  m.fibers[m.current].running = false;
  m.progress = true;
  swapcontext(&m.fibers[m.current].context, &m.scheduler);
}

inline void Machine::run_block(unsigned threads) {
  block = Group{threads, 0, 0};
  for (unsigned w = 0; w < MAX_THREADS / WARP_THREADS; ++w) {
    const unsigned first = w * WARP_THREADS;
    warps[w] = Group{threads > first ? min(threads - first, WARP_THREADS) : 0, 0, 0};
  }
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.stack.resize(STACK);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.running = true;
  }
  for (bool any = true; any;) {
    any = false;
    progress = false;
    for (current = 0; current < threads; ++current) {
      if (!fibers[current].running) continue;
      any = true;
      threadIdx.x = current;
      swapcontext(&scheduler, &fibers[current].context);
    }
    if (any && !progress) {
      std::fprintf(stderr, "threads of a block wait for each other for ever\n");
      std::abort();
    }
  }
}

inline unsigned char* dynamic_shared() { return machine().shared.data(); }

// The value that thread `lane` of the warp gives; the own value where there is no such thread.
template <class T> T exchange(T value, unsigned lane) {
  static_assert(sizeof(T) <= 8, "a shuffled value has at most 8 bytes");
  Machine& m = machine();
  std::memcpy(&m.exchanged[m.current], &value, sizeof value);
  m.wait(m.warp());
  const unsigned from = m.current / WARP_THREADS * WARP_THREADS + lane;
  T got = value;
  if (lane < WARP_THREADS && from < blockDim.x) std::memcpy(&got, &m.exchanged[from], sizeof got);
  m.wait(m.warp());
  return got;
}

using Entry = std::function<void(void**)>;

inline std::map<std::string, Entry>& kernels() {
  static std::map<std::string, Entry> kernels;
  return kernels;
}

template <class... Args, size_t... I> void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<Args>*>(args[I])...);
}

template <class... Args> bool add(const char* name, void (*kernel)(Args...)) {
  kernels()[name] = [kernel](void** args) { call(kernel, args, std::index_sequence_for<Args...>()); };
  return true;
}

}  // namespace host

inline float to_float(f16 x) { return static_cast<float>(host::as<_Float16>(x.bits)); }
inline float to_float(bf16 x) { return host::as<float>(static_cast<uint32_t>(x.bits) << 16); }

inline unsigned lane_of_thread() { return threadIdx.x % host::WARP_THREADS; }
inline void __syncthreads() { host::machine().wait(host::machine().block); }
inline void __syncwarp(unsigned = 0xffffffffu) { host::machine().wait(host::machine().warp()); }
template <class T> T __shfl_sync(unsigned, T value, int lane) { return host::exchange(value, lane); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return host::exchange(value, lane_of_thread() ^ mask); }
template <class T> T __shfl_down_sync(unsigned, T value, int apart) { return host::exchange(value, lane_of_thread() + apart); }

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }

// Runs a kernel over its grid. `args` points to each argument. Returns 0, or 1 if there is no such kernel.
extern "C" int coffey_launch(const char* name, const unsigned* grid, unsigned block, unsigned shared, void** args) {
  const auto found = host::kernels().find(name);
  if (found == host::kernels().end() || block == 0 || block > host::MAX_THREADS) return 1;
  host::Machine& machine = host::machine();
  machine.body = [&] { found->second(args); };
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block, 1, 1};
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        // What a block finds in shared memory is undefined.
        machine.shared.assign(shared + 16, 0xff);
        machine.run_block(block);
      }
    }
  }
  return 0;
}
