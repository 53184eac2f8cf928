#pragma once
#include <math.h>
#include <stdint.h>

namespace fagen::ptx {
inline float ex2(float x) { return exp2f(x); }
inline float tanh_approx(float x) { return tanhf(x); }
inline uint32_t are_below(uint32_t x, uint32_t limits) {  // of whole numbers from 1024 on
  return ((limits & 0xffff) > (x & 0xffff)) * 0x3c00u | (limits >> 16 > x >> 16) * 0x3c000000u;
}
}  // namespace fagen::ptx
