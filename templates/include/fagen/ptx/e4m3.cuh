// Conversion to fp8 (e4m3).
#pragma once
#include <stdint.h>

namespace fagen::ptx {

// Four numbers as e4m3, rounded to nearest and at most 448 in size, the first one in the lowest byte.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t x;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(x)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return x;
}

}  // namespace fagen::ptx
