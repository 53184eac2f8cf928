#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

namespace emulator {

template <>
inline float value<__half>(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, size = bits & 0x7fff;
  if (size < 1024) return bits >> 15 ? size * -0x1p-24f : size * 0x1p-24f;
  const uint32_t bias = size < 31 << 10 ? 112u << 23 : 224u << 23;  // beyond are infinity and what is not a number
  const uint32_t whole = sign | ((size << 13) + bias);
  float f;
  memcpy(&f, &whole, 4);
  return f;
}
inline __half round_half(float f) {
  const uint16_t sign = signbit(f) ? 0x8000 : 0;
  const float size = fabsf(f);
  if (f != f) return {0x7fff};
  if (size >= 65520.f) return {uint16_t(sign | 0x7c00)};
  int exponent;
  frexpf(size, &exponent);
  const int last = std::max(exponent - 11, -24);  // the place of the last bit that is kept
  const unsigned kept = unsigned(nearbyintf(ldexpf(size, -last)));
  return {uint16_t(sign | (kept < 1024 ? kept : (unsigned(last + 25) << 10) + kept - 1024))};
}

}  // namespace emulator

inline float __half2float(__half x) { return emulator::value<__half>(x.bits); }
inline __half __float2half_rn(float x) { return emulator::round_half(x); }
inline __half2 __floats2half2_rn(float a, float b) { return {emulator::round_half(a), emulator::round_half(b)}; }
inline float2 __half22float2(__half2 pair) {
  return {emulator::value<__half>(pair.x.bits), emulator::value<__half>(pair.y.bits)};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  const float2 x = __half22float2(a), y = __half22float2(b);
  return __floats2half2_rn(x.x * y.x, x.y * y.y);
}
