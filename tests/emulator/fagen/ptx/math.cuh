#pragma once
#include <math.h>
#include <stdint.h>

namespace fagen::ptx {
inline float ex2(float x) { return exp2f(x); }
inline float tanh_approx(float x) { return tanhf(x); }
inline uint32_t spread_byte_signs(uint32_t x, int h) {
  x >>= 16 * h;
  return (x >> 15 & 1) * 0xffff0000u | (x >> 7 & 1) * 0xffffu;
}
inline uint32_t spread_signs(uint32_t x) { return (x >> 31) * 0xffff0000u | (x >> 15 & 1) * 0xffffu; }
}  // namespace fagen::ptx
