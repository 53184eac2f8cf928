// Before the passes: the stats of every row, those included that fill up the last tile.
#pragma once
#include "fagen/common/float.cuh"
#include "fagen/sm90/backward_large/share.cuh"

namespace fagen {

constexpr int kPrologueThreads = 256;

// 16 bytes of a row.
template <class Element>
union RowPiece {
  static constexpr int kElements = 16 / sizeof(Element);
  uint4 bits;
  Element e[kElements];
  __device__ __forceinline__ explicit RowPiece(const Element* from) : bits(*reinterpret_cast<const uint4*>(from)) {}
};

// A warp's work: one row, the `index`-th of all heads.
template <class Element>
__device__ __forceinline__ void store_stats(const fagen_backward_params& p, RowStats* stats, int stats_rows) {
  using Piece = RowPiece<Element>;
  const int64_t index = (int64_t(blockIdx.x) * kPrologueThreads + threadIdx.x) / 32, plane = index / stats_rows;
  const int lane = threadIdx.x % 32, row = index % stats_rows, head = plane % p.heads;
  const int64_t batch = plane / p.heads;
  if (batch >= p.batch) return;
  float sum = 0.f;
  if (row < p.seqlen_q) {
    const auto row_of = [&](const fagen_tensor& t) {
      return static_cast<const Element*>(t.data) + batch * t.stride[0] + row * t.stride[1] + head * t.stride[2];
    };
    for (int d = lane * Piece::kElements; d < p.head_dim_v; d += 32 * Piece::kElements) {
      const Piece o(row_of(p.o) + d), dout(row_of(p.dout) + d);
#pragma unroll
      for (int i = 0; i < Piece::kElements; ++i) sum += to_float(o.e[i]) * to_float(dout.e[i]);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane != 0) return;
  const int64_t at = plane * p.seqlen_q + row;
  const bool sees = row < p.seqlen_q && p.lse[at] != -INFINITY;
  stats[index] =
      sees ? RowStats{p.lse[at] * 1.4426950408889634f, p.dlse ? sum - p.dlse[at] : sum} : RowStats{INFINITY, 0.f};
}

}  // namespace fagen
