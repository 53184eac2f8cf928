// Single-instruction functions: of the special-function unit, and of bytes.
#pragma once
#include <stdint.h>

namespace fagen::ptx {

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// For bytes 2 h and 2 h + 1 of x a 16-bit half each: all ones if the byte's sign bit is set, else 0.
__device__ __forceinline__ uint32_t spread_byte_signs(uint32_t x, int h) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "r"(h ? 0xbbaa : 0x9988));
  return y;
}
// For each 16-bit half all ones if its sign bit is set, else 0.
__device__ __forceinline__ uint32_t spread_signs(uint32_t x) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace fagen::ptx
