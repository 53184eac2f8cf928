// Elements that one instruction loads or stores.
#pragma once
#include "fagen/common/float.cuh"
#include "fagen/ptx/global.cuh"

namespace fagen {

// The register, or registers, of a load of so many bytes.
template <int kBytes>
struct RegistersOf;
template <>
struct RegistersOf<2> {
  using Type = uint16_t;
};
template <>
struct RegistersOf<4> {
  using Type = uint32_t;
};
template <>
struct RegistersOf<8> {
  using Type = uint2;
};
template <>
struct RegistersOf<16> {
  using Type = uint4;
};

__device__ __forceinline__ uint32_t assemble(const uint32_t (&words)[1]) { return words[0]; }
__device__ __forceinline__ uint2 assemble(const uint32_t (&words)[2]) { return make_uint2(words[0], words[1]); }
__device__ __forceinline__ uint4 assemble(const uint32_t (&words)[4]) {
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class Element, int kWidth>
struct Vector {
  using Registers = typename RegistersOf<sizeof(Element) * kWidth>::Type;
  Registers bits;

  __device__ __forceinline__ void to_floats(float (&x)[kWidth]) const {
    Element all[kWidth];
    memcpy(all, &bits, sizeof all);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = to_float(all[i]);
  }
  __device__ __forceinline__ static Vector of(const float (&x)[kWidth]) {
    if constexpr (kWidth * sizeof(Element) == 2) {
      const Element one = from_float<Element>(x[0]);
      Vector made;
      memcpy(&made.bits, &one, 2);
      return made;
    } else {  // word by word: a compiler that sees elements stores them two at a time
      constexpr int kInWord = 4 / sizeof(Element);
      uint32_t words[kWidth / kInWord];
#pragma unroll
      for (int i = 0; i < kWidth; i += kInWord) {
        if constexpr (kInWord == 1)
          memcpy(&words[i], &x[i], 4);
        else
          words[i / 2] = pack<Element>(x[i], x[i + 1]);
      }
      return {assemble(words)};
    }
  }
  __device__ __forceinline__ static Vector load(const Element* from) {
    return {*reinterpret_cast<const Registers*>(from)};
  }
  __device__ __forceinline__ void store(Element* to) const { ptx::st_global(to, bits); }
};

// Store floats; where the elements are wider than those that were read, by several stores of 16 bytes.
template <class Element, int kWidth>
__device__ __forceinline__ void store_floats(Element* to, const float (&x)[kWidth]) {
  constexpr int kStep = sizeof(Element) * kWidth > 16 ? 16 / sizeof(Element) : kWidth;
#pragma unroll
  for (int i = 0; i < kWidth; i += kStep) {
    float some[kStep];
#pragma unroll
    for (int j = 0; j < kStep; ++j) some[j] = x[i + j];
    Vector<Element, kStep>::of(some).store(to + i);
  }
}

// Bytes to which an address must be a multiple for such stores.
template <class Element, int kWidth>
constexpr int kStoreAlignment = sizeof(Element) * kWidth > 16 ? 16 : int(sizeof(Element)) * kWidth;

}  // namespace fagen
