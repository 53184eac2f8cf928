// Blocks that share the keys of a row tile: few rows on many keys, where a block a row tile leaves most SMs idle.
//
// Block (i, s) of the grid walks over the key tiles of row tile i that lie in part s of the keys. It leaves O,
// unnormalised, with reference and sum of the softmax in the workspace, and a second kernel merges the parts of each
// row, always in the same order. What differs from the other forward kernel is chosen by the type of the config,
// SplitKeys<Config>: the key tiles of a row tile, by HeadPacking, and the store of O, by store_rows.
#pragma once
#include "fagen/common/merge_parts.cuh"
#include "fagen/sm90/forward/kernel.cuh"

namespace fagen {

template <class Base>
struct SplitKeys : Base {
  static_assert(Base::kSchedule == Schedule::single, "blockIdx.x is the row tile");
  static_assert(Base::kBlockOrder == BlockOrder::ascending && Base::kCluster == 1, "Python refuses others");
  static_assert(!MaskOf<Base>::kIntervals, "the visits of intervals are not split");
};

struct SplitLaunchArgs : LaunchArgs {
  int first_tile;  // the first key tile that any row sees
  int part_tiles;  // key tiles of a part
  float2* stats;   // (row tile, part, row): reference, sum
  float* sums;     // (row tile, part, row, dv): O, unnormalised

  template <class C>
  __device__ __forceinline__ int64_t part_row(int row_tile, int parts, int part, int row) const {
    return (int64_t(row_tile) * parts + part) * C::kTileM + row;
  }
};

// Rows see the key tiles of this block's part alone.
template <class Base>
struct HeadPacking<SplitKeys<Base>> : HeadPacking<Base> {
  const SplitLaunchArgs& launch;

  __device__ __forceinline__ explicit HeadPacking(const LaunchArgs& launch)
      : HeadPacking<Base>(launch), launch(static_cast<const SplitLaunchArgs&>(launch)) {}
  __device__ __forceinline__ TileRange range(const Band& band, int m0, int m1) const {
    const TileRange all = HeadPacking<Base>::range(band, m0, m1);
    const int begin = launch.first_tile + blockIdx.y * launch.part_tiles, end = begin + launch.part_tiles;
    TileRange part;
    part.begin = min(max(all.begin, begin), all.end);
    part.end = max(min(all.end, end), part.begin);
    part.full_end = min(max(all.full_end, part.begin), part.end);
    part.full_begin = min(max(all.full_begin, part.begin), part.full_end);
    return part;
  }
};

// Store this block's part of the 64 rows of a warpgroup, or, where it is the only one, O and LSE.
template <class C, class Element, class State, class Base>
__device__ __forceinline__ void store_rows(const fagen_forward_params& p, const HeadPacking<SplitKeys<Base>>& packing,
                                           State& state, const PendingTile& tile, int group) {
  if (gridDim.y == 1)
    return store_rows<Base, Element>(p, static_cast<const HeadPacking<Base>&>(packing), state, tile, group);
  const Lane lane;
  const SplitLaunchArgs& launch = packing.launch;
  const int rows = packing.rows(p.seqlen_q) - tile.m0;
  const int first = group * kGroupRows + threadIdx.x / 32 % 4 * 16 + lane.row;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + r * 8;
    const float sum = quad_sum(state.softmax.sum[r]);
    if (row >= rows) continue;
    const int64_t at = launch.part_row<C>(blockIdx.x, gridDim.y, blockIdx.y, row);
    if (lane.id % 4 == 0) launch.stats[at] = make_float2(state.softmax.reference[r], sum);
    float* to = launch.sums + at * C::kHeadDimV + lane.column;
#pragma unroll
    for (int n = 0; n < C::kHeadDimV / 8; ++n)
      *reinterpret_cast<float2*>(to + n * 8) = make_float2(state.o[0][n][r * 2], state.o[0][n][r * 2 + 1]);
  }
}

// A row tile's parts are merged by so many blocks, 4 columns a thread.
constexpr int kMergeThreads = 256;
template <class C>
constexpr int kMergeBlocks = C::kTileM * C::kHeadDimV / 4 / kMergeThreads;

// Merge the parts of a row tile into O and LSE. A row without keys has no parts: O = 0, LSE = -inf.
template <class Base, class Element>
__device__ __forceinline__ void merge_row_tile(const fagen_forward_params& p, const SplitLaunchArgs& launch,
                                               int parts) {
  constexpr int kPieces = Base::kHeadDimV / 4;
  ptx::wait_for_previous_kernel();
  ptx::start_next_kernel();
  const int index = blockIdx.x / kMergeBlocks<Base>;
  const int piece = blockIdx.x % kMergeBlocks<Base> * kMergeThreads + threadIdx.x;
  const int row = piece / kPieces, column = piece % kPieces * 4;
  const RowTile<Base> row_tile(p, launch, Band(p), assignment_at<Base>(p, launch, index));
  const int m = row_tile.m0 + row;
  if (m >= row_tile.m1) return;

  const TileRange& range = row_tile.range;
  int first = 0, count = 0;  // of the parts that hold any of its key tiles
  if (range.begin < range.end) {
    first = (range.begin - launch.first_tile) / launch.part_tiles;
    count = (range.end - 1 - launch.first_tile) / launch.part_tiles + 1 - first;
  }
  const float scale_log2 = ScoreMod<Base>::softmax_scale_log2(p);
  const int64_t at = launch.part_row<Base>(index, parts, first, row);
  const RowSums sums = merge_parts<false>(
      count, scale_log2, [&](int i) { return __ldcg(launch.stats + at + i * Base::kTileM); },
      [&](int i) {
        const float* from = launch.sums + (at + i * Base::kTileM) * Base::kHeadDimV + column;
        return __ldcg(reinterpret_cast<const float4*>(from));
      });

  const HeadPacking<Base> packing(launch);
  const int row_of_q = packing.row(m), head = packing.head(row_tile.coord.head, m), batch = row_tile.coord.batch;
  if (p.lse && column == 0)
    p.lse[(int64_t(batch) * p.heads + head) * p.seqlen_q + row_of_q] =
        sums.sum == 0.f ? -INFINITY : sums.reference * scale_log2 * 0.69314718056f + logf(sums.sum);
  if (column >= p.head_dim_v) return;
  const float inverse = scale_up<Base>(p, sums.sum == 0.f ? 0.f : 1.f / sums.sum);
  Element* out = static_cast<Element*>(p.o.data) + batch * p.o.stride[0] + row_of_q * p.o.stride[1] +
                 head * p.o.stride[2] + column;
  *reinterpret_cast<uint2*>(out) = make_uint2(pack<Element>(sums.o.x * inverse, sums.o.y * inverse),
                                              pack<Element>(sums.o.z * inverse, sums.o.w * inverse));
}

}  // namespace fagen
