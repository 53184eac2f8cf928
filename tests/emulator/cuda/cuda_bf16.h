#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

namespace emulator {

template <>
inline float value<__nv_bfloat16>(uint16_t bits) {
  const uint32_t whole = uint32_t(bits) << 16;
  float f;
  memcpy(&f, &whole, 4);
  return f;
}
inline __nv_bfloat16 round_bfloat(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace emulator

inline float __bfloat162float(__nv_bfloat16 x) { return emulator::value<__nv_bfloat16>(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return emulator::round_bfloat(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {emulator::round_bfloat(a), emulator::round_bfloat(b)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
  return {emulator::value<__nv_bfloat16>(pair.x.bits), emulator::value<__nv_bfloat16>(pair.y.bits)};
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  const float2 x = __bfloat1622float2(a), y = __bfloat1622float2(b);
  return __floats2bfloat162_rn(x.x * y.x, x.y * y.y);
}
