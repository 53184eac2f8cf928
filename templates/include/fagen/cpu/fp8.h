// Elements of a cache in fp8 e4m3: 4 bits of exponent, 3 of mantissa, no infinity.
#pragma once
#include "fagen/cpu/element.h"

namespace fagen {

struct fp8_t {
  uint8_t bits;
};

// Bytes in the upper eight bits of lanes: words of four bytes, each in four lanes, shifted. Compilers widen bytes
// worse.
FAGEN_INLINE uvec load_bytes(const fp8_t* p) {
  const ivec lane = lane_index();
  uvec words{};
#pragma GCC unroll 4
  for (int word = 0; word < kLanes / 4; ++word) {
    uint32_t four;
    memcpy(&four, p + 4 * word, sizeof(four));
    words = lane / 4 == word ? uvec{} + four : words;
  }
  return words << (uvec)(24 - lane % 4 * 8);
}

FAGEN_INLINE vec load(const fp8_t* p) {
  const uvec x = load_bytes(p);
  const uvec sign = x & 0x80000000u, magnitude = x >> 24 & 0x7fu;
  const uvec normal = (x >> 4 & 0x7f00000u) + 0x3c000000u;  // moves the exponent's bias
  // an exponent of 0 has no implicit one: the float with it, minus 2^-6. No float here is subnormal, which is slow.
  const uvec subnormal = (uvec)((vec)(normal + 0x800000u) - 0x1p-6f);
  const uvec finite = magnitude < 8u ? subnormal : normal;
  return (vec)(sign | (magnitude == 0x7fu ? uvec{} + 0x7fc00000u : finite));
}

}  // namespace fagen
