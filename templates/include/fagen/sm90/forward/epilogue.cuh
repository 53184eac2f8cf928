// O and LSE of a row tile, from registers to global memory.
#pragma once
#include "fagen/common/dropout.cuh"
#include "fagen/common/element.cuh"
#include "fagen/common/row_state.cuh"
#include "fagen/sm90/forward/row_tile.cuh"

namespace fagen {

// A row tile that is computed, but not stored yet.
struct PendingTile {
  int m0, m1, head, batch;
};

// Store the 64 rows of a warpgroup, two a thread; some columns before the first are none of O's. Lanes of a quad hold
// two columns each of pieces of 8; neighbours swap so that each has four of one piece, and a quad writes 32 whole bytes
// at once.
template <class C, class Element, class State>
__device__ __forceinline__ void store_rows(const fagen_forward_params& p, const HeadPacking<C>& packing, State& state,
                                           const PendingTile& tile, int group, int early = 0) {
  const Lane lane;
  const bool odd = lane.id % 2;
  const int end = MaskOf<C>::kIntervals ? tile.m1 : min(tile.m0 + packing.tile_rows(), packing.rows(p.seqlen_q));
  const int first = tile.m0 + group * 64 + threadIdx.x / 32 % 4 * 16 + lane.row;
  const int column = odd * 8 + lane.id % 4 / 2 * 4 - early;  // in two pieces
  Element* out = static_cast<Element*>(p.o.data) + tile.batch * p.o.stride[0];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int m = first + r * 8, row_of_q = packing.row(m), head = packing.head(tile.head, m);
    const float row_sum = quad_sum(state.softmax.sum[r]);
    const float inverse = scale_up_pairs<C, Element>(p, row_sum == 0.f ? 0.f : 1.f / row_sum);
    if (p.lse && lane.id % 4 == 0 && m < end)
      p.lse[(int64_t(tile.batch) * p.heads + head) * p.seqlen_q + row_of_q] = state.softmax.lse(r, row_sum);
    Element* row = out + row_of_q * p.o.stride[1] + head * p.o.stride[2] + column;
    const int columns = m < end ? p.head_dim_v - column : 0;
    const auto word = [&](int n) {
      return pack<Element>(state.o[0][n][r * 2] * inverse, state.o[0][n][r * 2 + 1] * inverse);
    };
#pragma unroll
    for (int n = 0; n < C::kHeadDimV / 8; n += 2) {
      const uint32_t mine[2] = {word(n), word(n + 1)};
      const uint32_t other = __shfl_xor_sync(~0u, odd ? mine[0] : mine[1], 1);
      if (n * 8 < columns && (n > 0 || !kLoadsEarly<C> || column >= 0))
        *reinterpret_cast<uint2*>(row + n * 8) = odd ? make_uint2(other, mine[1]) : make_uint2(mine[0], other);
    }
  }
}

// Store rows that see no key at all, which neither producers nor consumers visit: O = 0, LSE = -inf. One warp's work.
template <class C, class Element>
__device__ __forceinline__ void store_empty_rows(const fagen_forward_params& p, const LaunchArgs& launch) {
  const Band band(p);
  const HeadPacking<C> packing(launch);
  if (MaskOf<C>::kIntervals) ptx::wait_for_previous_kernel();
  for (int index = blockIdx.x; index < launch.tiles; index += gridDim.x) {
    const RowTile<C> row_tile(p, launch, band, assignment_at<C>(p, launch, index));
    const TileCoord& coord = row_tile.coord;
    if (row_tile.key_tiles() > 0) continue;
    for (int m = row_tile.m0; m < row_tile.m1; ++m) {
      const int row = packing.row(m), head = packing.head(coord.head, m);
      Element* out =
          static_cast<Element*>(p.o.data) + coord.batch * p.o.stride[0] + row * p.o.stride[1] + head * p.o.stride[2];
      for (int column = threadIdx.x % 32 * 8; column < p.head_dim_v; column += 256)
        *reinterpret_cast<uint4*>(out + column) = make_uint4(0, 0, 0, 0);
      if (p.lse && threadIdx.x % 32 == 0) p.lse[(int64_t(coord.batch) * p.heads + head) * p.seqlen_q + row] = -INFINITY;
    }
  }
}

// Store all rows where there are no keys at all. A grid's work, a warp a row.
template <class Element>
__device__ __forceinline__ void store_all_empty(const fagen_forward_params& p) {
  const int64_t rows = int64_t(p.batch) * p.heads * p.seqlen_q;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; i < rows; i += gridDim.x * blockDim.x / 32) {
    const int64_t m = i % p.seqlen_q, head = i / p.seqlen_q % p.heads, batch = i / p.seqlen_q / p.heads;
    Element* out = static_cast<Element*>(p.o.data) + batch * p.o.stride[0] + m * p.o.stride[1] + head * p.o.stride[2];
    for (int column = threadIdx.x % 32 * 8; column < p.head_dim_v; column += 256)
      *reinterpret_cast<uint4*>(out + column) = make_uint4(0, 0, 0, 0);
    if (p.lse && threadIdx.x % 32 == 0) p.lse[i] = -INFINITY;
  }
}

}  // namespace fagen
