// The end of a row tile: parts of its sums to O and LSE, and the merge of its splits.
#pragma once
#include "fagen/common/element.cuh"
#include "fagen/common/merge_parts.cuh"
#include "fagen/sm80/decode/place.cuh"

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

template <class C, class Element>
struct DecodeOutput {
  static constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.69314718056f;
  const fagen_decode_params& p;
  const DecodeTile<C>& tile;
  float scale_log2, value_scale;  // scores are times scale_log2 in the base-2 logarithm

  // A packed row: where it goes, and what its sums are multiplied by.
  struct Row {
    Element* to;
    float inverse;
  };
  // With `want_lse` its LSE is written, too.
  __device__ __forceinline__ Row finish_row(int packed, float reference, float sum, bool want_lse) const {
    const int token = tile.first_q + packed / tile.group, head = tile.head(packed);
    float top = reference * scale_log2, total = sum, factor = 1.f;
    if constexpr (C::kSinks) {
      const float sink = p.sinks[head] * kLog2e, higher = fmaxf(top, sink);
      factor = ptx::ex2(top - higher);
      total = total * factor + ptx::ex2(sink - higher);
      top = higher;
    }
    if (p.lse && want_lse) {
      const int64_t at =
          p.cu_seqlens_q ? int64_t(head) * p.rows + token : (int64_t(tile.batch) * p.heads + head) * p.seqlen_q + token;
      p.lse[at] = total == 0.f ? -INFINITY : top * kLn2 + logf(total);
    }
    const float inverse = total == 0.f ? 0.f : factor * value_scale / total;
    return {static_cast<Element*>(p.o.data) + (p.cu_seqlens_q ? 0 : tile.batch * p.o.stride[0]) +
                token * p.o.stride[1] + head * p.o.stride[2],
            inverse};
  }
  // Write columns `column` to `column` + 3.
  __device__ __forceinline__ void write_4(const Row& row, int column, const float4& o) const {
    Element* to = row.to + column;
    const uint2 pairs = make_uint2(pack<Element>(o.x * row.inverse, o.y * row.inverse),
                                   pack<Element>(o.z * row.inverse, o.w * row.inverse));
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
  // Both, and with the first columns the row's LSE.
  __device__ __forceinline__ void write(int packed, int column, const RowSums& row) const {
    write_4(finish_row(packed, row.reference, row.sum, column == 0), column, row.o);
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

// Merge a tile's splits; their parts may have been written by other blocks just now. `rank`, `blocks`: as above.
template <class C, class Element>
__device__ __forceinline__ void merge_splits(const DecodeOutput<C, Element>& output, const DecodeGrid& grid, int used,
                                             int threads, int rank = 0, int blocks = 1) {
  const DecodeTile<C>& tile = output.tile;
  for_4_columns<C>(
      tile, threads,
      [&](int row, int column) {
        const RowSums sums = merge_parts<false>(
            used, output.scale_log2, [&](int i) { return __ldcg(grid.stats + part_row<C>(grid, tile.index, i, row)); },
            [&](int i) {
              return __ldcg(grid.sums + part_row<C>(grid, tile.index, i, row) * (C::kHeadDimV / 4) + column / 4);
            });
        output.write(tile.first_row + row, column, sums);
      },
      rank, blocks);
}

}  // namespace fagen
