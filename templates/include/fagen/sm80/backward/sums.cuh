// Accumulators on their way to global memory: added up in float32 across blocks, or rounded and stored as rows.
#pragma once
#include "fagen/ptx/reduce.cuh"
#include "fagen/sm80/backward/block.cuh"

namespace fagen {

// A tile of float32 sums in the order of a block's accumulators, so that a warp adds to neighbours.
template <int kThreads, int kSlabs, int kPieces>
struct FragmentSums {
  static constexpr int kFloats = kThreads * kSlabs * kPieces * 4;
  using Sums = float[kSlabs][kPieces][4];

  // This thread's first number, and the others from there.
  static __device__ __forceinline__ int first() { return int(threadIdx.x) * ptx::kReduceWidth; }
  static __device__ __forceinline__ constexpr int offset(int piece, int i) {
    return ptx::kReduceWidth == 4 ? piece * kThreads * 4 + i : (piece * 4 + i) * kThreads;
  }
  static __device__ __forceinline__ void add(float* tile, const Sums& sums) {
    float* mine = tile + first();
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
#pragma unroll
      for (int n = 0; n < kPieces; ++n) {
        const int piece = s * kPieces + n;
        if constexpr (ptx::kReduceWidth == 4) {
          ptx::reduce_add_4(mine + offset(piece, 0), sums[s][n]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) ptx::reduce_add(mine + offset(piece, i), sums[s][n][i]);
        }
      }
  }
  static __device__ __forceinline__ void load(const float* tile, Sums& sums) {
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
#pragma unroll
      for (int n = 0; n < kPieces; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[s][n][i] = tile[first() + offset(s * kPieces + n, i)];
  }
};

// Store a warp's part of a tile, times `factor`, through shared memory so that every store is a whole 16-byte piece of
// a row. The part starts at row `row` and column `column` of the tile, the tile at row `first` of the matrix.
template <class Tile, bool kAligned, int kSlabs, int kPieces, class Element>
__device__ __forceinline__ void store_part(const Lane& lane, uint32_t tile, int row, int column,
                                           const float (&sums)[kSlabs][kPieces][4], float factor,
                                           const GlobalMatrix<Element>& to, int first) {
  Packed<kSlabs, kPieces * 8> packed;
#pragma unroll
  for (int s = 0; s < kSlabs; ++s)
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        packed.pairs[s][n][half] = pack<Element>(sums[s][n][half * 2] * factor, sums[s][n][half * 2 + 1] * factor);
  packed.template store<Tile>(lane, tile, row, column);
  __syncwarp();  // a warp reads back only what it wrote
#pragma unroll 4
  for (int i = lane.id; i < kSlabs * 16 * kPieces; i += 32) {
    const int at = row + i / kPieces, chunk = column / 8 + i % kPieces, cols = to.cols - chunk * 8;
    if (first + at >= to.rows || cols <= 0) continue;
    const uint4 value = ptx::ld_shared_16(tile + Tile::offset(at, chunk));
    Element* out = const_cast<Element*>(to.base) + (first + at) * to.stride + chunk * 8;
    if constexpr (kAligned) {
      *reinterpret_cast<uint4*>(out) = value;
    } else {
      Element e[8];
      memcpy(e, &value, 16);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < cols) out[j] = e[j];
    }
  }
}

}  // namespace fagen
