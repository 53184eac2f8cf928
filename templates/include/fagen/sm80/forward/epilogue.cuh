// From the warps' unnormalised sums to O and LSE in device memory.
#pragma once
#include "fagen/sm80/forward/pairs.cuh"

namespace fagen {

// split_k: every warp has seen its own share of the keys for the same rows. Bring the sums to one reference and add
// them up in warp 0, one warp after the other, so that the result never depends on timing.
template <class B>
__device__ __forceinline__ void merge_warps(const B& block, typename B::State& state,
                                            float (&row_sum)[B::State::kRows]) {
  using S = typename B::S;
  constexpr int kWarps = S::kThreads / 32, kTileRows = S::kWarpRows;
  float4* pieces = reinterpret_cast<float4*>(block.smem_bytes);
  float2* stats = reinterpret_cast<float2*>(block.smem_bytes + S::kMergeStats);  // (warp, row): reference, sum
  const Lane lane = state.lane;
  const float scale_log2 = state.softmax.scale_log2;
#pragma unroll
  for (int r = 0; r < B::State::kRows; ++r)
    if (lane.id % 4 == 0)
      stats[block.warp * kTileRows + r / 2 * 16 + r % 2 * 8 + lane.row] =
          make_float2(state.softmax.reference[r], row_sum[r]);
  __syncthreads();
  float factor[B::State::kRows];
#pragma unroll
  for (int r = 0; r < B::State::kRows; ++r) {
    const float2* row = stats + r / 2 * 16 + r % 2 * 8 + lane.row;
    float top = B::State::Softmax::kNoKeys, sum = 0.f;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, row[w * kTileRows].x);
    for (int w = 0; w < kWarps; ++w) sum += row[w * kTileRows].y * ptx::ex2((row[w * kTileRows].x - top) * scale_log2);
    factor[r] = ptx::ex2((state.softmax.reference[r] - top) * scale_log2);
    state.softmax.reference[r] = top;
    row_sum[r] = sum;
  }
  state.rescale(factor);
  for (int turn = kWarps - 1; turn >= 0; --turn) {
    if (block.warp == turn) {
      int i = lane.id;
#pragma unroll
      for (auto& slab : state.o)
#pragma unroll
        for (auto& piece : slab) {
          if (turn < kWarps - 1) {
            const float4 so_far = pieces[i];
            piece[0] += so_far.x, piece[1] += so_far.y, piece[2] += so_far.z, piece[3] += so_far.w;
          }
          if (turn > 0) pieces[i] = make_float4(piece[0], piece[1], piece[2], piece[3]);
          i += 32;
        }
    }
    __syncthreads();
  }
}

// Normalise, and store through shared memory so that every store is a whole 16-byte piece of a row.
template <class C, class Element>
__device__ __forceinline__ void store_rows(const Block<C, Element>& block, typename Block<C, Element>::State& state,
                                           int row_tile) {
  using S = BlockShape<C>;
  using TileO = typename S::TileO;
  constexpr int kRows = S::kSlabs * 2, kChunks = S::kWarpColumns / 8;
  const fagen_forward_params& p = block.p;
  const Lane lane = state.lane;
  float row_sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) row_sum[r] = quad_sum(state.softmax.sum[r]);
  ptx::cp_async_wait<0>();
  __syncthreads();  // the stages are free: O and the merge lie over them
  if constexpr (S::kSplitKeys) {
    merge_warps(block, state, row_sum);
    if (block.warp != 0) return;
  } else if constexpr (S::kPairs) {
    float other[kRows];
    Pair<C, Element>{block, lane}.exchange(row_sum, other);
#pragma unroll
    for (int r = 0; r < kRows; ++r) row_sum[r] += other[r];
    __syncthreads();
  }
  const int m0 = row_tile * C::kTileM;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = block.first_row + r / 2 * 16 + r % 2 * 8 + lane.row;
    const float inverse = scale_up_pairs<C, Element>(p, row_sum[r] == 0.f ? 0.f : 1.f / row_sum[r]);
    if (p.lse && block.first_column == 0 && lane.id % 4 == 0 && m0 + row < p.seqlen_q)
      p.lse[(int64_t(block.coord.batch) * p.heads + block.coord.head) * p.seqlen_q + m0 + row] =
          state.softmax.lse(r, row_sum[r]);
#pragma unroll
    for (int n = 0; n < S::kWarpColumns / 8; ++n) {
      const float* pair = &state.o[r / 2][n][r % 2 * 2];
      ptx::st_shared_4(block.smem + TileO::offset(row, block.first_column / 8 + n) + lane.column * 2,
                       pack<Element>(pair[0] * inverse, pair[1] * inverse));
    }
  }
  __syncwarp();  // a warp reads back only what it wrote
  Element* out = static_cast<Element*>(p.o.data) + block.coord.batch * p.o.stride[0] + block.coord.head * p.o.stride[2];
#pragma unroll 4
  for (int i = lane.id; i < S::kWarpRows * kChunks; i += 32) {
    const int row = block.first_row + i / kChunks, chunk = block.first_column / 8 + i % kChunks;
    const int cols = p.head_dim_v - chunk * 8;
    if (m0 + row >= p.seqlen_q || cols <= 0) continue;
    uint4 value = ptx::ld_shared_16(block.smem + TileO::offset(row, chunk));
    Element* to = out + (m0 + row) * p.o.stride[1] + chunk * 8;
    if constexpr (C::kAligned) {
      *reinterpret_cast<uint4*>(to) = value;
    } else {
      Element e[8];
      memcpy(e, &value, 16);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < cols) to[j] = e[j];
    }
  }
}

}  // namespace fagen
