// The end of a warpgroup's rows: O and LSE, or a split's part of them for the merge.
#pragma once
#include "fagen/common/row_state.cuh"
#include "fagen/ptx/barrier.cuh"
#include "fagen/ptx/cp_async.cuh"
#include "fagen/ptx/warpgroup.cuh"
#include "fagen/sm80/decode/output.cuh"
#include "fagen/sm80/decode/plan.cuh"
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

// Copy the rows of q to shared memory, in slabs; rows and columns that are not there become 0. The work of kThreads
// threads, which meet at barrier `id`.
template <class C, class Element, int kThreads>
__device__ __forceinline__ void load_rows(const fagen_decode_params& p, const DecodeTile<C>& tile, uint32_t to,
                                          int id) {
  constexpr int kChunks = (C::kHeadDim + kSlabColumns - 1) / kSlabColumns * 8;  // 16 bytes each
  const Element* q = static_cast<const Element*>(p.q.data) + (p.cu_seqlens_q ? 0 : tile.batch * p.q.stride[0]);
  for (int row = threadIdx.x / 32; row < C::kTileM; row += kThreads / 32) {
    const int packed = tile.first_row + row;
    const bool there = packed < tile.rows();
    const Element* from =
        there ? q + (tile.first_q + packed / tile.group) * p.q.stride[1] + tile.head(packed) * p.q.stride[2] : q;
    for (int chunk = threadIdx.x % 32; chunk < kChunks; chunk += 32) {
      const bool valid = there && chunk * 8 < p.head_dim;
      ptx::cp_async_16(to + (chunk / 8 * C::kTileM + row) * kRowBytes + ((chunk % 8 ^ row % 8) << 4),
                       valid ? from + chunk * 8 : q, valid);
    }
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_shared_writes();
  ptx::barrier_sync(id, kThreads);
}

// Call visit(column, 4 sums) for this lane's columns of its row r, of pieces of 8 columns from `first` on. Lanes of a
// quad hold two columns each; neighbours swap so that each has four of one piece.
template <int kPieces, class Visit>
__device__ __forceinline__ void for_4_columns_of(const float (&o)[kPieces][4], int r, int first, Visit visit) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane % 2;
  first += odd * 8 + lane % 4 / 2 * 4;
#pragma unroll
  for (int n = 0; n < kPieces; n += 2) {
    const float2 low = make_float2(o[n][r * 2], o[n][r * 2 + 1]);
    const float2 high = make_float2(o[n + 1][r * 2], o[n + 1][r * 2 + 1]);
    const float x = __shfl_xor_sync(~0u, odd ? low.x : high.x, 1), y = __shfl_xor_sync(~0u, odd ? low.y : high.y, 1);
    visit(first + n * 8, odd ? make_float4(x, y, high.x, high.y) : make_float4(low.x, low.y, x, y));
  }
}

// Store row r of this thread, `row` of the tile, given the reference and the sum of all its weights. The columns of `o`
// are those from `first` on; `alone`: there is one split.
template <class C, class Element, int kPieces>
__device__ __forceinline__ void store_row(const DecodeOutput<C, Element>& output, const DecodeGrid& grid, int split,
                                          bool alone, const float (&o)[kPieces][4], int r, int row, int first,
                                          float reference, float sum) {
  const DecodeTile<C>& tile = output.tile;
  const bool there = tile.first_row + row < tile.rows(), leads = there && first == 0 && threadIdx.x % 4 == 0;
  if (alone) {
    const auto to = output.finish_row(there ? tile.first_row + row : 0, reference, sum, leads);
    for_4_columns_of(o, r, first, [&](int column, const float4& x) {
      if (there) output.write_4(to, column, x);
    });
  } else {
    const int64_t at = part_row<C>(grid, tile.index, split, row);
    float4* to = grid.sums + at * (C::kHeadDimV / 4);
    if (leads) grid.stats[at] = make_float2(reference, sum);
    for_4_columns_of(o, r, first, [&](int column, const float4& x) {
      if (there) to[column / 4] = x;
    });
  }
}

// ---- the merge of splits

// A thread of the merge reads so many parts at once: one after the other would be as many reads that wait.
constexpr int kPartsAtOnce = 4;

// Threads that share the splits of 4 columns, so that up to 32 are read at once.
__host__ __device__ __forceinline__ int merge_team(int splits) {
  return splits <= kPartsAtOnce ? 1 : splits <= 2 * kPartsAtOnce ? 2 : splits <= 4 * kPartsAtOnce ? 4 : 8;
}

// Blocks that merge a row tile's splits, 4 columns of a row a team. The fewest are the fastest: each begins with reads
// of lengths that it waits for.
template <class C>
__host__ __device__ __forceinline__ int merge_blocks(const fagen_decode_params& p, int splits) {
  const int64_t packed = int64_t(p.seqlen_q) * (p.heads / p.kv_heads);
  const int rows = packed < C::kTileM ? int(packed) : C::kTileM;
  return (rows * (C::kHeadDimV / 4) * merge_team(splits) + kCombineThreads - 1) / kCombineThreads;
}

// Block `rank` of them. Parts are added in an order that depends on how many there are, and on nothing else: where the
// launch has a larger team than so many ask for, the rest of it has none.
template <class C, class Element>
__device__ __forceinline__ void merge_share(const DecodeOutput<C, Element>& output, const DecodeGrid& grid, int used,
                                            int rank) {
  constexpr int kPieces = C::kHeadDimV / 4;
  constexpr float kNoKeys = OnlineSoftmax<1, false>::kNoKeys;
  const DecodeTile<C>& tile = output.tile;
  const int team = merge_team(grid.splits), at_work = merge_team(used), thread = rank * kCombineThreads + threadIdx.x;
  const int member = thread % team, piece = thread / team % kPieces, row = thread / team / kPieces;
  const bool there = row < C::kTileM && tile.first_row + row < tile.rows();
  const int64_t at = part_row<C>(grid, tile.index, 0, there ? row : 0);
  const float2* stats = grid.stats + at;
  const float4* sums = grid.sums + at * kPieces + piece;
  RowSums all;
  all.reference = kNoKeys;
  const auto refer_to = [&](float top) {
    const float factor = ptx::ex2((all.reference - top) * output.scale_log2);
    all.reference = top, all.sum *= factor;
    all.o.x *= factor, all.o.y *= factor, all.o.z *= factor, all.o.w *= factor;
  };
  for (int first = member < at_work ? member : used; first < used; first += kPartsAtOnce * at_work) {
    float2 part[kPartsAtOnce];
    float4 x[kPartsAtOnce];
    float top = all.reference;
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const int n = first + i * at_work;
      part[i] = n < used ? __ldcg(stats + n * C::kTileM) : make_float2(kNoKeys, 0.f);
      x[i] = n < used ? __ldcg(sums + int64_t(n) * C::kTileM * kPieces) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    for (const float2& its : part) top = fmaxf(top, its.x);
    refer_to(top);
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const float factor = ptx::ex2((part[i].x - top) * output.scale_log2);
      all.sum += part[i].y * factor;
      all.o.x += x[i].x * factor, all.o.y += x[i].y * factor, all.o.z += x[i].z * factor, all.o.w += x[i].w * factor;
    }
  }
  float top = all.reference;
  for (int step = 1; step < team; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  refer_to(top);
  for (int step = 1; step < team; step *= 2) {
    all.sum += __shfl_xor_sync(~0u, all.sum, step);
    all.o.x += __shfl_xor_sync(~0u, all.o.x, step), all.o.y += __shfl_xor_sync(~0u, all.o.y, step);
    all.o.z += __shfl_xor_sync(~0u, all.o.z, step), all.o.w += __shfl_xor_sync(~0u, all.o.w, step);
  }
  if (there && member == 0) output.write(tile.first_row + row, piece * 4, all);
}

}  // namespace fagen
