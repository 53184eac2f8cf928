// A block's work on its split of the keys: q to shared memory, the ring of key tiles, scores and sums.
#pragma once
#include "fagen/sm80/decode/cache.cuh"
#include "fagen/sm80/decode/products.cuh"

namespace fagen {

// 16 neighbouring elements of a row of q; those past `count` are 0.
template <class C, class Element>
__device__ __forceinline__ void load_16_columns(uint4 (&halves)[2], const Element* from, int count) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (C::kAligned)
      halves[half] = count > half * 8 ? reinterpret_cast<const uint4*>(from)[half] : make_uint4(0, 0, 0, 0);
    else
      halves[half] = gather_chunk(from + half * 8, count - half * 8);
  }
}

// The even columns of 16, then the odd ones.
__device__ __forceinline__ void part_even_and_odd(uint4 (&halves)[2]) {
  const uint32_t pairs[8] = {halves[0].x, halves[0].y, halves[0].z, halves[0].w,
                             halves[1].x, halves[1].y, halves[1].z, halves[1].w};
  uint32_t even[4], odd[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    even[i] = (pairs[2 * i] & 0xffff) | (pairs[2 * i + 1] << 16);
    odd[i] = (pairs[2 * i] >> 16) | (pairs[2 * i + 1] & 0xffff0000);
  }
  halves[0] = make_uint4(even[0], even[1], even[2], even[3]);
  halves[1] = make_uint4(odd[0], odd[1], odd[2], odd[3]);
}

template <class C, class Element>
struct DecodeBlock {
  using S = DecodeShape<C>;
  using Products = DecodeProducts<C, Element>;
  using Scores = typename Products::Scores;

  const fagen_decode_params& p;
  const DecodeTile<C>& tile;
  const DecodeSplit<C>& split;
  unsigned char* shared;
  uint32_t smem;
  int warp;
  CacheReader<C> cache;

  __device__ __forceinline__ DecodeBlock(const fagen_decode_params& p, const DecodeTile<C>& tile,
                                         const DecodeSplit<C>& split, unsigned char* shared)
      : p(p),
        tile(tile),
        split(split),
        shared(shared),
        smem(ptx::shared_address(shared)),
        warp(__shfl_sync(~0u, threadIdx.x / 32, 0)),  // warp-uniform for the compiler as well
        cache(p, tile, split.first, warp) {}

  __device__ __forceinline__ uint32_t stage(int index) const {
    return smem + S::kRingsBegin + (S::kSplitColumns ? 0 : warp * S::kRingBytes) + index * S::kStageBytes;
  }
  __device__ __forceinline__ int tiles() const { return split.end - split.first; }
  // Start copying this warp's keys of a tile, if there is one; always a group of copies.
  __device__ __forceinline__ void copy(int index, int stage_index) {
    if (index < tiles()) cache.copy(index, stage(stage_index), S::kSplitColumns ? warp * S::kWarpKeys : 0);
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void load_q() const {
    constexpr int kPieces = C::kHeadDim / 16;
    const Element* q = static_cast<const Element*>(p.q.data) + (p.cu_seqlens_q ? 0 : tile.batch * p.q.stride[0]);
    for (int i = threadIdx.x; i < C::kTileM * kPieces; i += S::kThreads) {
      const int row = i / kPieces, column = i % kPieces * 16, packed = tile.first_row + row;
      uint4 halves[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
      if (packed < tile.rows() && column < p.head_dim) {
        const Element* from =
            q + (tile.first_q + packed / tile.group) * p.q.stride[1] + tile.head(packed) * p.q.stride[2] + column;
        load_16_columns<C>(halves, from, p.head_dim - column);
      }
      if constexpr (C::kFp8Cache) part_even_and_odd(halves);
      ptx::st_shared_16(smem + S::TileQ::offset(row, column / 8), halves[0]);
      ptx::st_shared_16(smem + S::TileQ::offset(row, column / 8 + 1), halves[1]);
    }
  }

  // The warp's first key of a tile.
  __device__ __forceinline__ int key_of(int index) const {
    return (split.first + index) * C::kTileN + warp * S::kWarpKeys;
  }
  // This warp's scores of a tile, masked where some row does not see all of its keys.
  __device__ __forceinline__ void compute_scores(Products& products, Scores& s_acc, int index, int stage_index) const {
    const int key = key_of(index);
    products.compute_scores(s_acc, smem, stage(stage_index), S::kSplitColumns ? warp * S::kWarpKeys : 0);
    if (key >= tile.full_begin && key + S::kWarpKeys <= tile.full_end)
      products.template modify_scores<false>(s_acc, key);
    else
      products.template modify_scores<true>(s_acc, key);
  }

  // Visit the split's tiles, each when it has landed; the copies of those that follow are under way. `sync` lets nobody
  // go on before the tile is there for all who read it, and all have read the one before.
  template <class Sync, class Visit>
  __device__ __forceinline__ void visit_tiles(Products& products, Sync sync, Visit visit) {
#pragma unroll
    for (int i = 0; i < C::kStages - 1; ++i) copy(i, i);
    load_q();
    __syncthreads();
    products.load_q_registers(smem, 0);
    int now = 0, next = C::kStages - 1;
    for (int i = 0; i < tiles(); ++i) {
      ptx::cp_async_wait<C::kStages - 2>();
      sync();
      copy(i + C::kStages - 1, next);
      visit(i, now);
      next = now;
      now = now == C::kStages - 1 ? 0 : now + 1;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // shared memory is free
  }
};

// Warps work alone, on keys of their own.
template <class C, class Element>
__device__ __forceinline__ void run_split_keys(DecodeBlock<C, Element>& block, DecodeProducts<C, Element>& products) {
  using S = DecodeShape<C>;
  block.visit_tiles(
      products, [] { __syncwarp(); },
      [&](int i, int stage) {
        const int key = block.key_of(i);
        if (key >= block.tile.end || key + S::kWarpKeys <= block.tile.begin) return;
        typename DecodeProducts<C, Element>::Scores s_acc;
        block.compute_scores(products, s_acc, i, stage);
        products.add_values(s_acc, block.stage(stage) + S::kValues);
      });
}

// Each warp computes the weights of its keys, and its columns of O from all warps' weights.
template <class C, class Element>
struct SharedWeights {
  using S = DecodeShape<C>;
  using Products = DecodeProducts<C, Element>;
  using TileP = typename S::TileP;
  static constexpr int kRows = Products::kRows;

  const DecodeBlock<C, Element>& block;
  uint32_t p_tile = block.smem + S::kRingsEnd;
  float* maxima = reinterpret_cast<float*>(block.shared + S::kMaxima);  // (warp, row)

  // All warps find the same maxima, so their references move together.
  __device__ __forceinline__ void update_max(Products& products, typename Products::Scores& s_acc) const {
    float row_max[kRows], factor[kRows];
    products.thread_maxima(s_acc, row_max);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row_max[r] = quad_max(row_max[r]);
      if (products.lane.id % 4 == 0) maxima[block.warp * C::kTileM + products.row_of(r)] = row_max[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int w = 0; w < C::kWarps; ++w) row_max[r] = fmaxf(row_max[r], maxima[w * C::kTileM + products.row_of(r)]);
    if (__any_sync(~0u, products.softmax.exceeds_slack(row_max))) {
      products.set_reference(s_acc, row_max, factor);
      products.rescale(factor);
    } else {
      products.softmax.refresh_offset();
    }
  }

  __device__ __forceinline__ void add_values(Products& products, typename Products::Scores& s_acc,
                                             uint32_t v_tile) const {
    using TileV = typename S::TileV;
    update_max(products, s_acc);
    typename Products::Weights own;
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 16; ++n)
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          products.exponentiate(s_acc, own, s, n, i);
          const int chunk = (block.warp * S::kWarpKeys + n * 16) / 8 + i / 2;
          ptx::st_shared_4(p_tile + TileP::offset(products.row_of(s * 2 + i % 2), chunk) + products.lane.column * 2,
                           own[n][s][i]);
        }
    __syncthreads();  // all weights are there
    const uint32_t p_lane = row_major_address<TileP>(products.lane, p_tile, 0);
    const uint32_t v_lane =
        TileV::step(row_major_address<TileV>(products.lane, v_tile, 0), 0, block.warp * (S::kWarpColumns / C::kStep));
#pragma unroll
    for (int n = 0; n < C::kTileN / 16; ++n) {
      uint32_t weights[S::kSlabs][4];
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s) ptx::ldmatrix_x4(weights[s], TileP::step(p_lane, s * 16, n));
      products.add_16_values(weights, v_lane + n * 16 * TileV::kPitch);
    }
  }
};

template <class C, class Element>
__device__ __forceinline__ void run_split_columns(DecodeBlock<C, Element>& block,
                                                  DecodeProducts<C, Element>& products) {
  using S = DecodeShape<C>;
  const SharedWeights<C, Element> weights{block};
  block.visit_tiles(
      products, [] { __syncthreads(); },
      [&](int i, int stage) {
        typename DecodeProducts<C, Element>::Scores s_acc;
        block.compute_scores(products, s_acc, i, stage);
        weights.add_values(products, s_acc, block.stage(stage) + S::kValues);
      });
}

}  // namespace fagen
