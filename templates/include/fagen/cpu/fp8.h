// Elements of a cache in fp8 e4m3: 4 bits of exponent, 3 of mantissa, no infinity.
#pragma once
#include "fagen/cpu/element.h"

namespace fagen {

struct fp8_t {
  uint8_t bits;
};

typedef uint8_t bvec __attribute__((vector_size(kLanes * sizeof(uint8_t))));
typedef bvec any_bvec __attribute__((aligned(1), may_alias));

FAGEN_INLINE vec load(const fp8_t* p) {
  const uvec x = __builtin_convertvector(*reinterpret_cast<const any_bvec*>(p), uvec);
  const uvec sign = (x & 0x80u) << 24, magnitude = x & 0x7fu;
  const uvec normal = (magnitude << 20) + 0x3c000000u;  // moves the exponent's bias
  // an exponent of 0 has no implicit one: the float with it, minus 2^-6. No float here is subnormal, which is slow.
  const uvec subnormal = (uvec)((vec)(normal + 0x800000u) - 0x1p-6f);
  const uvec finite = magnitude < 8u ? subnormal : normal;
  return (vec)(sign | (magnitude == 0x7fu ? uvec{} + 0x7fc00000u : finite));
}

}  // namespace fagen
