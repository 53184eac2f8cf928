// A warp's products on tensor cores, by ldmatrix and mma, from operands in shared memory or in registers.
#pragma once
#include "fagen/common/element.cuh"
#include "fagen/ptx/cp_async.cuh"
#include "fagen/ptx/mma_sync.cuh"
#include "fagen/sm80/smem_tile.cuh"

namespace fagen {

// A thread's place in an accumulator piece of 16 rows and 8 columns: it holds rows `row` and `row` + 8, columns
// `column` and `column` + 1.
struct Lane {
  int id = threadIdx.x % 32;
  int row = id / 4, column = id % 4 * 2;
};

template <int kSlabs, int kPieces>
__device__ __forceinline__ void clear(float (&sums)[kSlabs][kPieces][4]) {
#pragma unroll
  for (auto& slab : sums)
#pragma unroll
    for (auto& piece : slab) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
}

template <bool kFirst, class First, class Second>
struct Selected {
  using Type = First;
};
template <class First, class Second>
struct Selected<false, First, Second> {
  using Type = Second;
};
template <bool kFirst, class First, class Second>
using Select = typename Selected<kFirst, First, Second>::Type;

// An operand in shared memory, seen from this lane. `down` and `right` count 16 x 16 pieces of the tile. The lane's
// place is kept apart from the tile's, so that tiles of equal rows share it.
template <class Tile>
struct Operand {
  uint32_t tile, place;

  // Lanes 0-15 take the rows of the two left 8 x 8 matrices of a piece: A as it lies, or B transposed on the way.
  static __device__ __forceinline__ Operand rows_first(const Lane& lane, uint32_t tile, int row, int right) {
    return {tile, Tile::step(Tile::offset(row + lane.id % 16, lane.id / 16), 0, right)};
  }
  // Lanes 0-15 take the two upper matrices: B as it lies, or A transposed on the way.
  static __device__ __forceinline__ Operand columns_first(const Lane& lane, uint32_t tile, int row, int right) {
    return {tile, Tile::step(Tile::offset(row + lane.id / 16 * 8 + lane.id % 8, lane.id / 8 % 2), 0, right)};
  }
  __device__ __forceinline__ void load(uint32_t (&fragment)[4], int down, int right) const {
    ptx::ldmatrix_x4(fragment, tile + Tile::step(place, down * 16, right));
  }
  __device__ __forceinline__ void load_transposed(uint32_t (&fragment)[4], int down, int right) const {
    ptx::ldmatrix_x4_trans(fragment, tile + Tile::step(place, down * 16, right));
  }
};

// sums += A B, A of kSlabs x 16 rows, B of kPieces x 8 columns, over kSteps x 16. `load_a(fragment, slab, step)` and
// `load_b(fragment, pair of pieces, step)` give the operands.
template <class Element, int kSteps, int kSlabs, int kPieces, class LoadA, class LoadB>
__device__ __forceinline__ void multiply(float (&sums)[kSlabs][kPieces][4], LoadA load_a, LoadB load_b) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[kSlabs][4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) load_a(a[s], s, step);
#pragma unroll
    for (int n = 0; n < kPieces / 2; ++n) {
      uint32_t b[4];
      load_b(b, n, step);
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        ptx::mma_m16n8k16<Element>(sums[s][2 * n], a[s], b[0], b[1]);
        ptx::mma_m16n8k16<Element>(sums[s][2 * n + 1], a[s], b[2], b[3]);
      }
    }
  }
}

// Accumulators rounded to 16 bits: two columns a register, rows `row` and `row` + 8 of each piece. The order is that of
// the A operand, so that they can go straight into the next product.
template <int kSlabs, int kColumns>
struct Packed {
  uint32_t pairs[kSlabs][kColumns / 8][2];

  __device__ __forceinline__ void operand(uint32_t (&a)[4], int slab, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pairs[slab][2 * step + i / 2][i % 2];
  }

  // Store to a tile in shared memory, from row `row` and column `column` of it on.
  template <class Tile>
  __device__ __forceinline__ void store(const Lane& lane, uint32_t tile, int row, int column) const {
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          ptx::st_shared_4(tile + Tile::offset(row + s * 16 + half * 8 + lane.row, column / 8 + n) + lane.column * 2,
                           pairs[s][n][half]);
  }
};

}  // namespace fagen
