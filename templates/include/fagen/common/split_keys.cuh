// Blocks that share the keys of a row tile: few rows on many keys, where a block a row tile leaves most SMs idle.
//
// Block (i, s) of the grid walks over the key tiles of row tile i that lie in part s of the keys. It leaves O,
// unnormalised, with reference and sum of the softmax in the workspace, and a second kernel merges the parts of each
// row, always in the same order. What differs from the kernel that does not split is chosen by the type of its config,
// SplitKeys<Config>: the key tiles that a row tile visits, and the store of O.
#pragma once
#include <string.h>

#include "fagen/common/dropout.cuh"
#include "fagen/common/element.cuh"
#include "fagen/common/merge_parts.cuh"
#include "fagen/common/row_state.cuh"

namespace fagen {

template <class Base>
struct SplitKeys : Base {};

// The key tiles from the first that any row sees, in parts of one size. The last may be smaller, none is empty: so the
// host chooses their number.
template <class C>
struct KeyParts {
  int first_tile, tiles_of_part;

  __host__ __device__ __forceinline__ KeyParts(int first_key, int seqlen_k, int parts)
      : first_tile(MaskOf<C>::kHasBegin ? first_key / C::kTileN : 0) {
    const int tiles = (seqlen_k + C::kTileN - 1) / C::kTileN - first_tile;
    tiles_of_part = tiles < parts ? 1 : (tiles + parts - 1) / parts;
  }
  // The part of a row tile's keys that is this block's.
  __device__ __forceinline__ TileRange clip(const TileRange& all) const {
    const int begin = first_tile + blockIdx.y * tiles_of_part, end = begin + tiles_of_part;
    TileRange mine;
    mine.begin = min(max(all.begin, begin), all.end);
    mine.end = max(min(all.end, end), mine.begin);
    mine.full_end = min(max(all.full_end, mine.begin), mine.end);
    mine.full_begin = min(max(all.full_begin, mine.begin), mine.full_end);
    return mine;
  }
  __device__ __forceinline__ int part_of(int tile) const { return (tile - first_tile) / tiles_of_part; }
};
template <class C>
__device__ __forceinline__ KeyParts<C> key_parts(const Band& band, int parts) {
  return KeyParts<C>(band.begin(0), band.seqlen_k, parts);
}

// The parts of O in the workspace, and what the softmax knew of them.
template <class C>
struct StoredParts {
  float* sums;    // (row tile, part, row, dv): O, unnormalised
  float2* stats;  // (row tile, part, row): reference, sum
  int parts;

  __device__ __forceinline__ StoredParts(void* memory, int row_tiles, int parts)
      : sums(static_cast<float*>(memory)), parts(parts) {
    stats = reinterpret_cast<float2*>(sums + row_at(row_tiles, 0, 0) * C::kHeadDimV);
  }
  static uint64_t bytes(int row_tiles, int parts) {
    return uint64_t(row_tiles) * parts * C::kTileM * (C::kHeadDimV * sizeof(float) + sizeof(float2));
  }
  __device__ __forceinline__ int64_t row_at(int row_tile, int part, int row) const {
    return (int64_t(row_tile) * parts + part) * C::kTileM + row;
  }
  // Store the r-th row of a thread, `row` of this block's tile; `sum` is that of the whole row.
  template <class State>
  __device__ __forceinline__ void store(const State& state, int r, int row, float sum) const {
    const int64_t at = row_at(blockIdx.x, blockIdx.y, row);
    if (state.lane.id % 4 == 0) stats[at] = make_float2(state.softmax.reference[r], sum);
    float* to = sums + at * C::kHeadDimV + state.lane.column;
#pragma unroll
    for (int n = 0; n < C::kHeadDimV / 8; ++n) {
      const float* pair = &state.o[r / 2][n][r % 2 * 2];
      *reinterpret_cast<float2*>(to + n * 8) = make_float2(pair[0], pair[1]);
    }
  }
};

// A block of the merge has so many threads, with 4 columns each.
constexpr int kMergeThreads = 128;
template <class C>
constexpr int kMergeBlocks = (C::kTileM * C::kHeadDimV / 4 + kMergeThreads - 1) / kMergeThreads;  // of a row tile

// The place of a thread of the merge.
template <class C>
struct MergePlace {
  static constexpr int kPieces = C::kHeadDimV / 4;
  int row_tile, row, column;

  __device__ __forceinline__ MergePlace() : row_tile(blockIdx.x / kMergeBlocks<C>) {
    const int piece = blockIdx.x % kMergeBlocks<C> * kMergeThreads + threadIdx.x;
    row = piece / kPieces, column = piece % kPieces * 4;
  }
};

// Merge the parts of 4 columns of a row into O, and with the first ones its LSE. `range` has the key tiles of the row's
// tile: parts without any of them are not read. A row without keys has no parts: O = 0, LSE = -inf.
template <class C, class Element>
__device__ __forceinline__ void merge_row(const fagen_forward_params& p, const StoredParts<C>& stored,
                                          const MergePlace<C>& place, const TileRange& range, int batch, int head,
                                          int row_of_q) {
  const KeyParts<C> parts = key_parts<C>(Band(p), stored.parts);
  const bool some = range.begin < range.end;
  const int first = some ? parts.part_of(range.begin) : 0;
  const int count = some ? parts.part_of(range.end - 1) + 1 - first : 0;
  const int64_t at = stored.row_at(place.row_tile, first, place.row);
  const float scale_log2 = ScoreMod<C>::softmax_scale_log2(p);
  const RowSums row = merge_parts<false>(
      count, scale_log2, [&](int i) { return __ldcg(stored.stats + at + i * C::kTileM); },
      [&](int i) {
        const float* from = stored.sums + (at + i * C::kTileM) * C::kHeadDimV + place.column;
        return __ldcg(reinterpret_cast<const float4*>(from));
      });
  if (p.lse && place.column == 0)
    p.lse[(int64_t(batch) * p.heads + head) * p.seqlen_q + row_of_q] =
        row.sum == 0.f ? -INFINITY : row.reference * scale_log2 * 0.69314718056f + logf(row.sum);
  const float inverse = scale_up_pairs<C, Element>(p, row.sum == 0.f ? 0.f : 1.f / row.sum);
  Element* out = static_cast<Element*>(p.o.data) + batch * p.o.stride[0] + row_of_q * p.o.stride[1] +
                 head * p.o.stride[2] + place.column;
  const uint2 pairs = make_uint2(pack<Element>(row.o.x * inverse, row.o.y * inverse),
                                 pack<Element>(row.o.z * inverse, row.o.w * inverse));
  if constexpr (C::kAligned) {
    if (place.column < p.head_dim_v) *reinterpret_cast<uint2*>(out) = pairs;
  } else {
    Element e[4];
    memcpy(e, &pairs, 8);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (place.column + i < p.head_dim_v) out[i] = e[i];
  }
}

}  // namespace fagen
