// Stores of several registers into global memory by one instruction, which a compiler else may take apart.
#pragma once
#include <stdint.h>

namespace fagen::ptx {

// `to` is aligned to the size of what is stored.
__device__ __forceinline__ void st_global(void* to, uint16_t x) { *static_cast<uint16_t*>(to) = x; }
__device__ __forceinline__ void st_global(void* to, uint32_t x) { *static_cast<uint32_t*>(to) = x; }
__device__ __forceinline__ void st_global(void* to, uint2 x) {
  asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}
__device__ __forceinline__ void st_global(void* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

}  // namespace fagen::ptx
