// Fragments of float32 to rows of elements in memory.
#pragma once
#include "fagen/abi/backward.h"
#include "fagen/common/element.cuh"

namespace fagen {

// A lane's values of two rows, 8 apart, as pieces of 8 columns hold them: `load(piece)` gives four. They are scaled,
// rounded and stored. Lanes of a quad hold two columns each of a piece; neighbours swap so that each has four of one
// piece, and a quad writes 32 whole bytes at once. Rows from `rows` on and columns from `columns` on are not there.
template <class Element, int kUnroll, class Load>
__device__ __forceinline__ void store_rows(const fagen_tensor& to, int batch, int head, int row, int rows, int columns,
                                           int first_piece, int pieces, float scale, Load load) {
  const bool odd = threadIdx.x % 2;
  const int column = first_piece * 8 + odd * 8 + threadIdx.x % 4 / 2 * 4;  // in two pieces
  Element* out = static_cast<Element*>(to.data) + batch * to.stride[0] + head * to.stride[2] + column;
#pragma unroll kUnroll
  for (int n = 0; n < pieces; n += 2) {
    const float4 a = load(n), b = load(n + 1);
    const float c[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t mine[2] = {pack<Element>(c[0][r * 2] * scale, c[0][r * 2 + 1] * scale),
                                pack<Element>(c[1][r * 2] * scale, c[1][r * 2 + 1] * scale)};
      const uint32_t other = __shfl_xor_sync(~0u, odd ? mine[0] : mine[1], 1);
      if (row + r * 8 < rows && n * 8 < columns - column)
        *reinterpret_cast<uint2*>(out + (row + r * 8) * to.stride[1] + n * 8) =
            odd ? make_uint2(other, mine[1]) : make_uint2(mine[0], other);
    }
  }
}

}  // namespace fagen
