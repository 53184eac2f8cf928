#pragma once
#include <math.h>
#include <stdint.h>

namespace fagen::ptx {
inline float ex2(float x) { return exp2f(x); }
inline float tanh_approx(float x) { return tanhf(x); }
inline uint32_t widen_bytes(uint32_t x, int h) {
  return h ? (x >> 24) << 16 | (x >> 16 & 255) : (x >> 8 & 255) << 16 | (x & 255);
}
inline uint32_t spread_signs(uint32_t x) { return (x >> 31) * 0xffff0000u | (x >> 15 & 1) * 0xffffu; }
}  // namespace fagen::ptx
