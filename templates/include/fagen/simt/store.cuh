// Stores of neighbouring columns, rounded to the dtype of the tensor.
#pragma once
#include "fagen/common/float.cuh"

namespace fagen {

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
