// Numbers of fp8 (e4m3) as 16-bit elements, four at a time. All but NaN are exact: NaN counts as 480.
#pragma once
#include "fagen/common/element.cuh"

namespace fagen {

// The two halves of a register times a power of two, given as the element's bits.
template <class Element>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t pair, uint32_t factor);

template <>
__device__ __forceinline__ uint32_t multiply_pair<bfloat_t>(uint32_t pair, uint32_t factor) {
  __nv_bfloat162 a, b;
  memcpy(&a, &pair, 4);
  memcpy(&b, &factor, 4);
  a = __hmul2(a, b);
  memcpy(&pair, &a, 4);
  return pair;
}

template <>
__device__ __forceinline__ uint32_t multiply_pair<half_t>(uint32_t pair, uint32_t factor) {
  __half2 a, b;
  memcpy(&a, &pair, 4);
  memcpy(&b, &factor, 4);
  a = __hmul2(a, b);
  memcpy(&pair, &a, 4);
  return pair;
}

// Place the 4 bits of exponent and 3 of mantissa in those of the element, whose exponent has another bias: that leaves
// a factor of a power of two, denormals included.
template <class Element>
struct Fp8Bits;
template <>
struct Fp8Bits<bfloat_t> {
  static constexpr int kShift = 4;
  static constexpr uint32_t kMagnitude = 0x07f007f0, kFactor = 0x7b807b80;  // 2^120
};
template <>
struct Fp8Bits<half_t> {
  static constexpr int kShift = 1;
  static constexpr uint32_t kMagnitude = 0x3f803f80, kFactor = 0x5c005c00;  // 2^8
};

// Bytes 0 and 2 of `four` as the halves of `even`, bytes 1 and 3 as those of `odd`.
template <class Element>
__device__ __forceinline__ void expand_e4m3(uint32_t four, uint32_t& even, uint32_t& odd) {
  using Bits = Fp8Bits<Element>;
  constexpr uint32_t kSigns = 0x80008000;
  even = ((four << 8) & kSigns) | ((four << (8 - Bits::kShift)) & Bits::kMagnitude);
  odd = (four & kSigns) | ((four >> Bits::kShift) & Bits::kMagnitude);
  even = multiply_pair<Element>(even, Bits::kFactor);
  odd = multiply_pair<Element>(odd, Bits::kFactor);
}

}  // namespace fagen
