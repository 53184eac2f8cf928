// From the warps' sums to O and LSE: parts are merged by their references, within a block and between splits.
#pragma once
#include "fagen/ptx/cluster.cuh"
#include "fagen/ptx/warpgroup.cuh"
#include "fagen/sm80/decode/block.cuh"
#include "fagen/sm80/decode/output.cuh"

namespace fagen {

// Merge a tile's splits where they are a cluster: each block has its part in its own shared memory, and merges some of
// the columns of all. Blocks without keys come along.
template <class C, class Element>
__device__ __forceinline__ void merge_cluster(const DecodeOutput<C, Element>& output, uint32_t shared, int split,
                                              const DecodeGrid& grid, int used) {
  using S = DecodeShape<C>;
  const DecodeTile<C>& tile = output.tile;
  ptx::cluster_sync();
  for_4_columns<C>(
      tile, S::kThreads,
      [&](int row, int column) {
        const auto stats = [&](int i) {  // two rows have 16 bytes
          const float4 both = ptx::ld_cluster_16(shared + S::kOwnStats + row / 2 * 16, i);
          return row % 2 ? make_float2(both.z, both.w) : make_float2(both.x, both.y);
        };
        const auto sums = [&](int i) { return ptx::ld_cluster_16(shared + (row * S::kPartPitch + column) * 4, i); };
        output.write(tile.first_row + row, column, merge_parts<false>(used, output.scale_log2, stats, sums));
      },
      split, grid.splits);
  ptx::cluster_sync();  // none ends while others read its shared memory
}

// Whether this block is the last of its tile's splits; then it sees what the others wrote.
__device__ __forceinline__ bool arrive_last(unsigned* arrived, int used) {
  __shared__ unsigned before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before = atomicAdd(arrived, 1u);
  __syncthreads();
  __threadfence();
  return before == unsigned(used - 1);
}

// The end of a block: merge its warps; then write the tile's rows, or leave them to whoever merges the splits.
template <class C, class Element>
__device__ __forceinline__ void finish_block(const DecodeBlock<C, Element>& block,
                                             const DecodeProducts<C, Element>& products,
                                             const DecodeOutput<C, Element>& output, const DecodeGrid& grid,
                                             int split) {
  using S = DecodeShape<C>;
  const DecodeTile<C>& tile = block.tile;
  float* parts = reinterpret_cast<float*>(block.shared);
  float2* stats = reinterpret_cast<float2*>(block.shared + S::kStats);
  products.store_sums(parts + (S::kSplitColumns ? 0 : block.warp * S::kPartFloats),
                      S::kSplitColumns ? block.warp * S::kWarpColumns : 0);
#pragma unroll
  for (int r = 0; r < DecodeProducts<C, Element>::kRows; ++r) {
    const float sum = quad_sum(products.softmax.sum[r]);
    if (products.lane.id % 4 == 0)
      stats[block.warp * C::kTileM + products.row_of(r)] = make_float2(products.softmax.reference[r], sum);
  }
  __syncthreads();
  const bool alone = block.split.used == 1;
  float2* own_stats = reinterpret_cast<float2*>(block.shared + S::kOwnStats);
  for_4_columns<C>(tile, S::kThreads, [&](int row, int column) {
    const RowSums sums = merge_parts<S::kSplitColumns>(
        C::kWarps, output.scale_log2, [&](int i) { return stats[i * C::kTileM + row]; },
        [&](int i) {
          return *reinterpret_cast<const float4*>(parts + i * S::kPartFloats + row * S::kPartPitch + column);
        });
    if (alone) {
      output.write(tile.first_row + row, column, sums);
      return;
    }
    if (C::kMergedBy == MergedBy::cluster && grid.clustered) {  // no other thread reads this place
      *reinterpret_cast<float4*>(parts + row * S::kPartPitch + column) = sums.o;
      if (column == 0) own_stats[row] = make_float2(sums.reference, sums.sum);
      return;
    }
    const int64_t at = part_row<C>(grid, tile.index, split, row);
    grid.sums[at * (C::kHeadDimV / 4) + column / 4] = sums.o;
    if (column == 0) grid.stats[at] = make_float2(sums.reference, sums.sum);
  });
  if constexpr (C::kMergedBy == MergedBy::cluster)
    if (!alone && grid.clustered)
      merge_cluster(output, ptx::shared_address(block.shared), split, grid, block.split.used);
  if constexpr (C::kMergedBy == MergedBy::last_block)
    if (!alone && arrive_last(grid.arrived + tile.index, block.split.used))
      merge_splits(output, grid, block.split.used, S::kThreads);
}

}  // namespace fagen
