// From the warps' sums to O and LSE: parts are merged by their references, within a block and between splits.
#pragma once
#include "fagen/ptx/cluster.cuh"
#include "fagen/ptx/warpgroup.cuh"
#include "fagen/sm80/decode/block.cuh"

namespace fagen {

// The constants of a kv head's scores.
struct HeadScale {
  float score, value;  // q k times `score` is a score; sums times `value` are in units of v

  __device__ __forceinline__ HeadScale(const fagen_decode_params& p, int batch, int kv_head) {
    score = p.scale * scale_at(p.k_scale, batch, kv_head);
    value = scale_at(p.v_scale, batch, kv_head);
  }
  static __device__ __forceinline__ float scale_at(const fagen_tensor& t, int batch, int kv_head) {
    if (!t.data) return 1.f;
    return static_cast<const float*>(t.data)[batch * t.stride[0] + kv_head * t.stride[1]];
  }
};

// Four columns of a row of O, unnormalised, and the row's reference and sum.
struct RowSums {
  float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
  float reference, sum = 0.f;
};

// Merge parts of a row, always in the same order. `stats(i)` gives reference and sum of part i,
// `sums(i)` its columns; with `kOneSum` all parts have the same reference and their columns are in the first.
template <bool kOneSum, class Stats, class Sums>
__device__ __forceinline__ RowSums merge_parts(int count, float scale_log2, Stats stats, Sums sums) {
  RowSums row;
  row.reference = OnlineSoftmax<1, false>::kNoKeys;
#pragma unroll 8  // so many reads are under way at once
  for (int i = 0; i < count; ++i) row.reference = fmaxf(row.reference, stats(i).x);
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float2 part = stats(i);
    const float factor = ptx::ex2((part.x - row.reference) * scale_log2);
    row.sum += part.y * factor;
    if (kOneSum && i > 0) continue;
    const float4 x = sums(i);
    row.o.x += x.x * factor, row.o.y += x.y * factor, row.o.z += x.z * factor, row.o.w += x.w * factor;
  }
  return row;
}

template <class C, class Element>
struct DecodeOutput {
  static constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.69314718056f;
  const fagen_decode_params& p;
  const DecodeTile<C>& tile;
  float scale_log2, value_scale;  // scores are times scale_log2 in the base-2 logarithm

  // Write columns `column` to `column` + 3 of a packed row, and with the first ones its LSE.
  __device__ __forceinline__ void write(int packed, int column, const RowSums& row) const {
    const int token = tile.first_q + packed / tile.group, head = tile.head(packed);
    float top = row.reference * scale_log2, total = row.sum, factor = 1.f;
    if constexpr (C::kSinks) {
      const float sink = p.sinks[head] * kLog2e, higher = fmaxf(top, sink);
      factor = ptx::ex2(top - higher);
      total = total * factor + ptx::ex2(sink - higher);
      top = higher;
    }
    if (p.lse && column == 0) {
      const int64_t at =
          p.cu_seqlens_q ? int64_t(head) * p.rows + token : (int64_t(tile.batch) * p.heads + head) * p.seqlen_q + token;
      p.lse[at] = total == 0.f ? -INFINITY : top * kLn2 + logf(total);
    }
    const float inverse = total == 0.f ? 0.f : factor * value_scale / total;
    Element* to = static_cast<Element*>(p.o.data) + (p.cu_seqlens_q ? 0 : tile.batch * p.o.stride[0]) +
                  token * p.o.stride[1] + head * p.o.stride[2] + column;
    const uint2 pairs = make_uint2(pack<Element>(row.o.x * inverse, row.o.y * inverse),
                                   pack<Element>(row.o.z * inverse, row.o.w * inverse));
    if constexpr (C::kAligned) {
      if (column < p.head_dim_v) *reinterpret_cast<uint2*>(to) = pairs;
    } else {
      Element e[4];
      memcpy(e, &pairs, 8);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column + i < p.head_dim_v) to[i] = e[i];
    }
  }
};

// Call visit(row of the tile, column) for every 4 columns of the tile's rows, in turn by the threads of `blocks`
// blocks, of which this is number `rank`.
template <class C, class Visit>
__device__ __forceinline__ void for_4_columns(const DecodeTile<C>& tile, int threads, Visit visit, int rank = 0,
                                              int blocks = 1) {
  constexpr int kPieces = C::kHeadDimV / 4;
  const int rows = min(C::kTileM, tile.rows() - tile.first_row);
  for (int i = rank * threads + threadIdx.x; i < rows * kPieces; i += blocks * threads)
    visit(i / kPieces, i % kPieces * 4);
}

// Where a split's part of a tile lies.
template <class C>
__device__ __forceinline__ int64_t part_row(const DecodeGrid& grid, int tile, int split, int row) {
  return (int64_t(tile) * grid.splits + split) * C::kTileM + row;
}

// Merge a tile's splits; their parts may have been written by other blocks just now.
template <class C, class Element>
__device__ __forceinline__ void merge_splits(const DecodeOutput<C, Element>& output, const DecodeGrid& grid, int used,
                                             int threads) {
  const DecodeTile<C>& tile = output.tile;
  for_4_columns<C>(tile, threads, [&](int row, int column) {
    const RowSums sums = merge_parts<false>(
        used, output.scale_log2, [&](int i) { return __ldcg(grid.stats + part_row<C>(grid, tile.index, i, row)); },
        [&](int i) {
          return __ldcg(grid.sums + part_row<C>(grid, tile.index, i, row) * (C::kHeadDimV / 4) + column / 4);
        });
    output.write(tile.first_row + row, column, sums);
  });
}

// The same where the splits are a cluster: each block has its part in its own shared memory, and merges some of the
// columns of all. Blocks without keys come along.
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
