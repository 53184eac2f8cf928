// Elements of tensors as float32 numbers and back: float32 itself, or 16 bits.
#pragma once
#include "fagen/common/element.cuh"

namespace fagen {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat_t x) { return __bfloat162float(x); }

template <class Element>
__device__ __forceinline__ Element from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ half_t from_float<half_t>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bfloat_t from_float<bfloat_t>(float x) {
  return __float2bfloat16_rn(x);
}

// Store four neighbours, aligned to their size.
__device__ __forceinline__ void store_4(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
template <class Element>
__device__ __forceinline__ void store_4(Element* to, const float (&x)[4]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]));
}

// Store those of four neighbours that lie before column `columns`; x[0] is that of `column`.
template <bool kAligned, class Element>
__device__ __forceinline__ void store_columns(Element* row, int column, int columns, const float (&x)[4]) {
  if constexpr (kAligned) {
    if (column < columns) store_4(row + column, x);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (column + e < columns) row[column + e] = from_float<Element>(x[e]);
  }
}

}  // namespace fagen
