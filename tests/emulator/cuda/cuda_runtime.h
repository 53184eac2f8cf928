// What CUDA's language and its run time have, as far as our kernels use it.
#pragma once
#include "../emulator.h"

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (emulator::now->thread)
extern uint3 gridDim, blockDim;
#define blockIdx (uint3{emulator::now->block->index % gridDim.x, emulator::now->block->index / gridDim.x, 0})

// ---- functions of the language

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmul_ru(float a, float b) {
  const float near = a * b;
  return near < double(a) * b ? nextafterf(near, INFINITY) : near;
}
inline unsigned __float_as_uint(float x) { return unsigned(emulator::bits_of(x)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }  // NaN: 0
inline float __uint_as_float(unsigned x) { return emulator::of_bits<float>(x); }
inline int __float_as_int(float x) { return int(emulator::bits_of(x)); }
inline float __int_as_float(int x) { return emulator::of_bits<float>(x); }
inline float __fmaf_rd(float a, float b, float c) {  // of operands whose sum a double holds
  const double exact = double(a) * b + c;
  const float near = float(exact);
  return near > exact ? nextafterf(near, -INFINITY) : near;
}
inline float __fdividef(float x, float y) { return x / y; }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T, class U>
T atomicAdd(T* at, U x) {
  const T old = *at;
  *at = T(old + x);
  return old;
}
inline unsigned atomicMax(unsigned* at, unsigned x) {
  const unsigned old = *at;
  *at = old > x ? old : x;
  return old;
}
inline unsigned atomicOr(unsigned* at, unsigned x) {
  const unsigned old = *at;
  *at |= x;
  return old;
}
inline void __threadfence() {}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= uint32_t(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return picked;
}
inline void __syncwarp() { emulator::exchange(0, "__syncwarp"); }
inline void __syncthreads() {
  emulator::meet(emulator::now->block->meetings[0], emulator::now->block->threads, "__syncthreads", 0);
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulator::of_bits<T>(emulator::exchange(emulator::bits_of(x), "__shfl_sync")[lane]);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  const uint64_t* all = emulator::exchange(emulator::bits_of(x), "__shfl_xor_sync");
  return emulator::of_bits<T>(all[emulator::now->thread.x % 32 ^ mask]);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* all = emulator::exchange(vote, "__ballot_sync");
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(all[lane]) << lane;
  return bits;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline int __reduce_min_sync(unsigned, int x) {
  const uint64_t* all = emulator::exchange(emulator::bits_of(x), "__reduce_min_sync");
  for (int lane = 0; lane < 32; ++lane) x = min(x, emulator::of_bits<int>(all[lane]));
  return x;
}
inline int __reduce_add_sync(unsigned, int x) {
  const uint64_t* all = emulator::exchange(emulator::bits_of(x), "__reduce_add_sync");
  x = 0;
  for (int lane = 0; lane < 32; ++lane) x += emulator::of_bits<int>(all[lane]);
  return x;
}
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
  const uint64_t* all = emulator::exchange(x, "__reduce_or_sync");
  for (int lane = 0; lane < 32; ++lane) x |= unsigned(all[lane]);
  return x;
}
inline int __reduce_max_sync(unsigned, int x) {
  const uint64_t* all = emulator::exchange(emulator::bits_of(x), "__reduce_max_sync");
  for (int lane = 0; lane < 32; ++lane) x = max(x, emulator::of_bits<int>(all[lane]));
  return x;
}

// ---- the run time

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchTimeout = 702,
  cudaErrorNotSupported = 801
};
using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrL2CacheSize };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetDevice(int* device) { return *device = emulator::units, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int device) {
  *value = what == cudaDevAttrMultiProcessorCount ? device : 50 << 20;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= 232448 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return memset(to, value, bytes), cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return emulator::report.c_str(); }

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  emulator::report.clear();
  const uint3 grid = {config->gridDim.x, config->gridDim.y, 1};
  if (grid.x % cluster || config->gridDim.z != 1) return cudaErrorInvalidValue;
  const bool fine =
      emulator::launch(grid, config->blockDim.x, cluster, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return fine ? cudaSuccess : cudaErrorLaunchTimeout;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  *clusters = std::max(1u, 2 * emulator::units / config->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}

namespace emulator {

inline cudaError_t last_error = cudaSuccess;

// kernel<<<blocks, threads, bytes, stream>>>
template <class... Parameters>
auto start(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t bytes, cudaStream_t stream) {
  return [=](const auto&... arguments) {
    const cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), bytes, stream, nullptr, 0};
    if (last_error == cudaSuccess) last_error = cudaLaunchKernelEx(&config, kernel, arguments...);
  };
}

}  // namespace emulator

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}
