// Additions to float32 numbers in global memory that many blocks add to, in no order; nothing is returned.
#pragma once

namespace fagen::ptx {

// Numbers that one instruction adds: four neighbours from sm_90 up, else one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr int kReduceWidth = 4;
#else
inline constexpr int kReduceWidth = 1;
#endif

__device__ __forceinline__ void reduce_add(float* to, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}

// `to` is aligned to 16 bytes.
__device__ __forceinline__ void reduce_add_4(float* to, const float (&x)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
#endif
}

}  // namespace fagen::ptx
