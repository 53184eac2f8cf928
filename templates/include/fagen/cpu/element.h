// Input and output elements: float, bfloat16 and IEEE half, converted by bit arithmetic that every machine has.
#pragma once
#include <string.h>

#include "fagen/cpu/simd.h"

namespace fagen {

struct bfloat_t {
  uint16_t bits;
};
struct half_t {
  uint16_t bits;
};

typedef uint16_t hvec __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef hvec any_hvec __attribute__((aligned(2), may_alias));
typedef uint32_t uvec __attribute__((vector_size(kLanes * sizeof(uint32_t))));

FAGEN_INLINE uvec load_bits(const void* p) { return __builtin_convertvector(*static_cast<const any_hvec*>(p), uvec); }

FAGEN_INLINE vec load(const bfloat_t* p) { return (vec)(load_bits(p) << 16); }

FAGEN_INLINE vec load(const half_t* p) {
  const uvec h = load_bits(p);
  const uvec sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  const vec finite = (vec)magnitude * 0x1p112f;  // moves the exponent's bias, subnormals included
  const uvec special = magnitude | 0x7f800000u;  // infinities and NaN
  return (vec)(sign | (magnitude >= 0x0f800000u ? special : (uvec)finite));
}

FAGEN_INLINE void store_bits(void* p, uvec bits) { *static_cast<any_hvec*>(p) = __builtin_convertvector(bits, hvec); }

// Round to nearest even; a NaN stays one.
FAGEN_INLINE void store(bfloat_t* p, vec x) {
  const uvec bits = (uvec)x;
  const uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uvec quiet = (bits >> 16) | 0x40u;
  store_bits(p, (uvec)(x == x ? (ivec)rounded : (ivec)quiet));
}

FAGEN_INLINE void store(half_t* p, vec x) {
  const uvec bits = (uvec)x, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uvec normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uvec subnormal = (uvec)((vec)magnitude + 0.5f) - 0x3f000000u;  // the addition rounds at 2^-24
  uvec half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? uvec{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? uvec{} + 0x7e00u : half;
  store_bits(p, sign | half);
}

// `count` < kLanes elements; the other lanes are 0.
template <class Element>
FAGEN_INLINE vec load_some(const Element* p, int count) {
  Element all[kLanes] = {};
  memcpy(all, p, count * sizeof(Element));
  return load(all);
}

template <class Element>
FAGEN_INLINE void store_some(Element* p, vec x, int count) {
  Element all[kLanes];
  store(all, x);
  memcpy(p, all, count * sizeof(Element));
}

}  // namespace fagen
