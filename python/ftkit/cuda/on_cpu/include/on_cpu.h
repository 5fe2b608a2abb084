// CUDA C++'s language on the host's compiler: what a kernel may use without including anything.
//
// Included before every kernel that is compiled for the CPU. Loads and stores need no words here: the compiler's
// thread-sanitizer instrumentation tells the runtime of each (see runtime/memory.cpp).
#pragma once
#include <stddef.h>
#include <stdint.h>

#define __global__ __attribute__((noinline))
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __constant__ static const
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static __attribute__((section("on_cpu_shared")))

extern "C" {
struct OnCpuLaunch {
  unsigned grid[3], block[3], shared_bytes, schedule, seed, traffic;
};
enum OnCpuIndex { ON_CPU_THREAD = 0, ON_CPU_BLOCK = 3, ON_CPU_BLOCK_SIZE = 6, ON_CPU_GRID_SIZE = 9, ON_CPU_LANE = 12 };
enum OnCpuWarpOperation {
  ON_CPU_SYNC,
  ON_CPU_SHUFFLE,
  ON_CPU_BALLOT,
  ON_CPU_LDMATRIX,
  ON_CPU_MOVMATRIX,
  ON_CPU_MMA_BF16,
  ON_CPU_MMA_F16,
  ON_CPU_MMA_S8,
};
struct OnCpuShuffle {
  uint32_t value, source, result;
};
struct OnCpuBallot {
  uint32_t predicate, result;
};
struct OnCpuLdmatrix {
  const void* row;
  uint32_t* result;
  int matrices, transposed;
};
struct OnCpuMovmatrix {
  uint32_t value, result;
};
struct OnCpuMma {
  void* d;  // C on entry
  const uint32_t *a, *b;
};
unsigned on_cpu_index(int which);
void* on_cpu_dynamic_shared(void);
void on_cpu_barrier(void);
void on_cpu_warp(int operation, void* arguments, unsigned mask);
void on_cpu_access(const void* address, int bytes, int is_write);
void on_cpu_copy_async(void* to, const void* from, int bytes, int source_bytes);
void on_cpu_copy_commit(void);
void on_cpu_copy_wait(int groups);
int on_cpu_run(void (*entry)(void**), void** arguments, const OnCpuLaunch*, const void* kernel, char* shared_start, char* shared_end);
extern char __start_on_cpu_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_on_cpu_shared[] __attribute__((weak, visibility("hidden")));
}

namespace on_cpu {
template <int FIRST>
struct Index {
  template <int AXIS>
  struct Axis {
    operator unsigned() const { return on_cpu_index(FIRST + AXIS); }
  };
  Axis<0> x;
  Axis<1> y;
  Axis<2> z;
};
template <size_t... I>
struct Numbers {};
template <size_t N, size_t... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <size_t... I>
struct Count<0, I...> {
  using Type = Numbers<I...>;
};
template <class... P, size_t... I>
__attribute__((no_sanitize_thread)) void call(void (*kernel)(P...), void** arguments, Numbers<I...>) {
  kernel(*(P*)arguments[I]...);
}
template <class... P>
__attribute__((no_sanitize_thread)) void call(void (*kernel)(P...), void** arguments) {
  call(kernel, arguments, typename Count<sizeof...(P)>::Type{});
}
}  // namespace on_cpu

static const on_cpu::Index<ON_CPU_THREAD> threadIdx;
static const on_cpu::Index<ON_CPU_BLOCK> blockIdx;
static const on_cpu::Index<ON_CPU_BLOCK_SIZE> blockDim;
static const on_cpu::Index<ON_CPU_GRID_SIZE> gridDim;

// Makes `kernel` callable from outside as `name`.
#define ON_CPU_ENTRY(kernel, name)                                                                       \
  extern "C" int name(const OnCpuLaunch* launch, void** arguments) {                                     \
    return on_cpu_run([](void** a) { on_cpu::call(kernel, a); }, arguments, launch, (const void*)kernel, \
                      __start_on_cpu_shared, __stop_on_cpu_shared);                                      \
  }

static __forceinline__ void __syncthreads() { on_cpu_barrier(); }
static __forceinline__ void __syncwarp(unsigned mask = ~0u) { on_cpu_warp(ON_CPU_SYNC, nullptr, mask); }

namespace on_cpu {
template <class To, class From>
static __forceinline__ To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To result;
  __builtin_memcpy(&result, &value, sizeof result);
  return result;
}
template <class T>
static __forceinline__ T shuffle(unsigned mask, T value, unsigned source) {
  OnCpuShuffle arguments{bits<uint32_t>(value), source, 0};
  on_cpu_warp(ON_CPU_SHUFFLE, &arguments, mask);
  return bits<T>(arguments.result);
}
}  // namespace on_cpu

template <class T>
static __forceinline__ T __shfl_sync(unsigned mask, T value, int lane) {
  return on_cpu::shuffle(mask, value, lane & 31);
}
template <class T>
static __forceinline__ T __shfl_xor_sync(unsigned mask, T value, int other) {
  return on_cpu::shuffle(mask, value, on_cpu_index(ON_CPU_LANE) ^ other);
}
template <class T>
static __forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  unsigned lane = on_cpu_index(ON_CPU_LANE);
  return on_cpu::shuffle(mask, value, lane + distance < 32 ? lane + distance : lane);
}
static __forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  OnCpuBallot arguments{predicate != 0, 0};
  on_cpu_warp(ON_CPU_BALLOT, &arguments, mask);
  return arguments.result;
}

template <class T>
static __forceinline__ T __ldg(const T* address) {
  return *address;
}
template <class T>
static __forceinline__ T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
static __forceinline__ T max(T a, T b) {
  return a > b ? a : b;
}
static __forceinline__ float __uint_as_float(uint32_t value) { return on_cpu::bits<float>(value); }
static __forceinline__ uint32_t __float_as_uint(float value) { return on_cpu::bits<uint32_t>(value); }
// Kernels are compiled with -ffp-contract=off, so that these are what they say.
static __forceinline__ float __fmul_rn(float a, float b) { return a * b; }
static __forceinline__ float __fadd_rn(float a, float b) { return a + b; }
static __forceinline__ float __fsub_rn(float a, float b) { return a - b; }
static __forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
static __forceinline__ float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
static __forceinline__ float rsqrtf(float a) { return 1.0f / __builtin_sqrtf(a); }
static __forceinline__ float expf(float a) { return __builtin_expf(a); }
static __forceinline__ float exp2f(float a) { return __builtin_exp2f(a); }
static __forceinline__ float sqrtf(float a) { return __builtin_sqrtf(a); }
static __forceinline__ float logf(float a) { return __builtin_logf(a); }
static __forceinline__ float fabsf(float a) { return __builtin_fabsf(a); }
static __forceinline__ float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
static __forceinline__ float fminf(float a, float b) { return __builtin_fminf(a, b); }
static __forceinline__ float rintf(float a) { return __builtin_rintf(a); }

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static __forceinline__ uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static __forceinline__ float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
