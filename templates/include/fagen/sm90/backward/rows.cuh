// Fragments of float32 to rows of elements in memory.
#pragma once
#include "fagen/abi/backward.h"
#include "fagen/common/dropout.cuh"
#include "fagen/common/element.cuh"

namespace fagen {

// The factor of the sums of dQ and dK. With dropout it makes up for dropped weights, as delta does not.
template <class C>
__device__ __forceinline__ float gradient_scale(const fagen_backward_params& p) {
  return scale_up<C>(p, p.scale);
}

// The lanes of a quad hold two columns each of four pieces, a word a piece. Afterwards each has a piece's four words.
__device__ __forceinline__ uint4 transpose_quad(const uint32_t (&words)[4]) {
  const bool odd = threadIdx.x % 2, upper = threadIdx.x % 4 / 2;
  uint32_t halves[2][2];  // of piece odd, and of piece 2 + odd: this lane pair's words
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? words[h * 2] : words[h * 2 + 1], 1);
    halves[h][0] = odd ? other : words[h * 2], halves[h][1] = odd ? words[h * 2 + 1] : other;
  }
  uint32_t other[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) other[i] = __shfl_xor_sync(~0u, upper ? halves[0][i] : halves[1][i], 2);
  return upper ? make_uint4(other[0], other[1], halves[1][0], halves[1][1])
               : make_uint4(halves[0][0], halves[0][1], other[0], other[1]);
}

// A lane's values of two rows, 8 apart, as pieces of 8 columns hold them: `load(piece)` gives four. They are scaled,
// rounded and stored, so that a quad writes 64 whole bytes of a row at once. Rows from `rows` on and columns from
// `columns` on are not there.
template <class Element, int kUnroll, class Load>
__device__ __forceinline__ void store_rows(const fagen_tensor& to, int batch, int head, int row, int rows, int columns,
                                           int first_piece, int pieces, float scale, Load load) {
  const int mine = threadIdx.x % 4, column = (first_piece + mine) * 8;
  Element* out = static_cast<Element*>(to.data) + batch * to.stride[0] + head * to.stride[2] + column;
#pragma unroll kUnroll
  for (int n = 0; n < pieces; n += 4) {
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 c = n + i < pieces ? load(n + i) : make_float4(0.f, 0.f, 0.f, 0.f);
      words[0][i] = pack<Element>(c.x * scale, c.y * scale), words[1][i] = pack<Element>(c.z * scale, c.w * scale);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint4 piece = transpose_quad(words[r]);
      if (row + r * 8 < rows && n + mine < pieces && column + n * 8 < columns)
        *reinterpret_cast<uint4*>(out + (row + r * 8) * to.stride[1] + n * 8) = piece;
    }
  }
}

}  // namespace fagen
