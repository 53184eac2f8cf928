// dQ on its way from a consumer's registers into memory, where the blocks of all key tiles add theirs in float32: by
// shared memory and the copy engine (bulk), or straight from registers (red). Deterministic: in turns.
#pragma once
#include "fagen/ptx/barrier.cuh"
#include "fagen/ptx/bulk.cuh"
#include "fagen/ptx/reduce.cuh"
#include "fagen/ptx/shared.cuh"
#include "fagen/ptx/turn.cuh"
#include "fagen/ptx/warpgroup.cuh"
#include "fagen/sm90/backward/rows.cuh"
#include "fagen/sm90/backward/walk.cuh"
#include "fagen/sm90/operand.cuh"

namespace fagen {

// Its index among those of all heads.
template <class C>
__device__ __forceinline__ int64_t row_tile_index(const fagen_backward_params& p, const BackwardLaunch& launch,
                                                  int batch, int head, int tile) {
  return (int64_t(batch) * p.heads + head) * launch.row_tiles + tile;
}

// Start a chunk of dQ = dS K, with both in shared memory.
template <class C>
__device__ __forceinline__ void start_dq(float (&dq)[DqShare<C>::kColumns / 8][4], const DqShare<C>& share, int chunk,
                                         uint32_t ds, uint32_t k) {
  const uint32_t columns = k + share.slab(chunk) * C::kTileN * kRowBytes + share.half(chunk) * kRowBytes / 2;
  const Operand a = Operand::of_rows(ds + share.row_chunk(chunk) * 64 * kRowBytes);
  const Operand b = Operand::of_columns(columns, C::kTileN * kRowBytes);
  pin(dq);
  ptx::wgmma_fence();
#pragma unroll
  for (int n = 0; n < C::kTileN / 16; ++n)
    ptx::wgmma<DqShare<C>::kColumns, false, true>(dq, a.at(n / 4 * BackwardLayout<C>::kDsSlabBytes + n % 4 * 32),
                                                  b.at(n * 2048), n > 0);
  ptx::wgmma_commit();
}

// A chunk of rows of dQ that no other block adds to, to memory as it is.
template <class C, class Element>
__device__ __forceinline__ void store_dq(const fagen_backward_params& p, const float (&dq)[DqShare<C>::kColumns / 8][4],
                                         const DqShare<C>& share, int chunk, int batch, const RowTileVisit& at) {
  constexpr int kPieces = DqShare<C>::kColumns / 8;
  unsigned thread = threadIdx.x;
  ptx::pin(thread);  // nothing of this is computed before the visits: registers are few
  const int m = at.tile * C::kTileM + share.row_chunk(chunk) * 64 + thread % 128 / 32 * 16 + thread % 32 / 4;
  store_rows<Element, (kPieces + 3) / 4>(p.dq, batch, at.head, m, p.seqlen_q, p.head_dim, share.first_piece(chunk),
                                         kPieces, gradient_scale<C>(p),
                                         [&](int n) { return make_float4(dq[n][0], dq[n][1], dq[n][2], dq[n][3]); });
}

// The consumer's side: one chunk of its part.
template <class C>
__device__ __forceinline__ void sink_dq(const float (&dq)[DqShare<C>::kColumns / 8][4], const DqShare<C>& share,
                                        int chunk, BackwardPipelines<C>& pipelines, float* tile) {
  const int pieces = share.pieces(chunk), thread = threadIdx.x % 128;
  if constexpr (C::kDqSink == DqSink::bulk) {
    pipelines.dq.acquire();
    const uint32_t to = pipelines.dq.tile() + thread * 16;
#pragma unroll
    for (int i = 0; i < DqShare<C>::kColumns / 8; ++i)
      ptx::st_shared_16(to + i * kPieceBytes, dq[i][0], dq[i][1], dq[i][2], dq[i][3]);
    ptx::fence_shared_writes();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(pipelines.dq.full());
    pipelines.dq.advance();
  } else {
    if (kRedInTurns<C> && chunk == 0) pipelines.dq.wait();
    float* to = tile + share.offset(chunk) + thread * 4;
#pragma unroll
    for (int i = 0; i < DqShare<C>::kColumns / 8; ++i)
      if (i < pieces) ptx::reduce_add_4(to + i * (kPieceBytes / 4), dq[i]);
    if (kRedInTurns<C> && (chunk + 1 == DqShare<C>::kChunks || !share.owns(chunk + 1))) {
      __syncwarp();
      pipelines.dq.release();
    }
  }
}

// The number of key tiles whose parts of a row tile come before this block's: a warp's work.
template <class C>
__device__ __forceinline__ int turn_of(const fagen_backward_params& p, const BackwardLaunch& launch,
                                       const KeyTile<C>& keys, const RowBand& band, const RowTileVisit& at) {
  if constexpr (kTurnsBySeen<C>)
    return keys.turn(p, launch, at.tile).mine;
  else
    return keys.turn(band, at.tile).mine;
}

// The other side of the red sink where the sums have an order: a warp tells those of an owner when the block's turn has
// come, and passes it on when they have added their part. It waits for the next turn while they compute.
template <class C>
struct DqTurns {
  const fagen_backward_params& p;
  const BackwardLaunch& launch;
  const KeyTile<C>& keys;
  const RowBand& band;
  const DqShare<C> share;
  BackwardPipelines<C> pipelines;
  unsigned* before = nullptr;  // the counter of the last row tile; its turn has not been passed on

  __device__ __forceinline__ static bool leads() { return threadIdx.x % 32 == 0; }
  __device__ __forceinline__ void pass() const {
    if (!leads() || before == nullptr) return;
    pipelines.dq.acquire();
    ptx::pass_turn(before);
  }
  __device__ __forceinline__ void run() {
    if (launch.one_key_tile) return;
    keys.walk(p, [&](const RowTileVisit& at) {
      const int mine = turn_of<C>(p, launch, keys, band, at);
      pass();
      const int64_t index = row_tile_index<C>(p, launch, keys.batch, at.head, at.tile);
      before = launch.turns + index * DqShare<C>::kGroups + share.group;
      if (leads()) {
        ptx::wait_for_turn(before, mine);
        ptx::mbarrier_arrive(pipelines.dq.full());
      }
      pipelines.dq.advance();
    });
    pass();
  }
};

// The other side of the bulk sink: a warp adds what an owner has stored, row tile after row tile. With
// dq_rounding=last_block the first block to add to a tile stores instead, so that nothing need be zero, and the last
// one rounds the sum. Counters in memory tell who that is. A block asks for them while its consumers compute, and
// rounds when the next part has left the stage in shared memory.
template <class C, class Element>
struct DqDrain {
  using L = BackwardLayout<C>;
  using Dq = DqShare<C>;
  static constexpr unsigned kStored = 1u << 31, kClaimed = 1u << 30;  // of a counter; below them lies the count

  const fagen_backward_params& p;
  const BackwardLaunch& launch;
  const KeyTile<C>& keys;
  const RowBand& band;
  const Dq share;
  BackwardPipelines<C> pipelines;
  int summed_phase = 0;
  RowTileVisit before = {0, -1, false};  // the last row tile added to; not yet counted
  bool stored = false;                   // `before` was stored

  __device__ __forceinline__ static bool leads() { return threadIdx.x % 32 == 0; }
  __device__ __forceinline__ int64_t index(const RowTileVisit& at) const {
    return row_tile_index<C>(p, launch, keys.batch, at.head, at.tile);
  }
  __device__ __forceinline__ float* tile(const RowTileVisit& at) const { return dq_sums<C>(launch, index(at)); }
  __device__ __forceinline__ unsigned* counter(const RowTileVisit& at) const {
    return launch.turns + index(at) * Dq::kGroups + share.group;
  }

  // Whether this block's part is the first; if not, the others' are there that it is added to.
  __device__ __forceinline__ bool begin(const RowTileVisit& at, bool seen) const {
    if constexpr (L::kRoundsDq) {
      if (seen) return false;
      if (ptx::claim(counter(at), kClaimed)) return true;
      ptx::wait_for_bit(counter(at), kStored);
    }
    return false;
  }
  // Count the part that was added before, and say whether it was the last.
  __device__ __forceinline__ bool count() {
    bool last = false;
    if (leads() && before.tile >= 0 && (L::kRoundsDq || C::kDeterministic)) {
      ptx::bulk_wait();
      if constexpr (L::kRoundsDq) {
        const bool first = stored && !C::kDeterministic;
        const unsigned others = ptx::count(counter(before), 1 + (first ? kStored : 0)) & (kClaimed - 1);
        last = int(others) == keys.turn(band, before.tile).count - 1;
      } else {
        ptx::pass_turn(counter(before));
      }
    }
    return L::kRoundsDq && __shfl_sync(~0u, last, 0);
  }

  __device__ __forceinline__ void add(const RowTileVisit& at) {
    const bool last = count();
    bool seen = false;
    if constexpr (C::kDeterministic) {  // the turn may have come before the part is there
      const int mine = turn_of<C>(p, launch, keys, band, at);
      if (leads()) ptx::wait_for_turn(counter(at), mine);
      stored = L::kRoundsDq && mine == 0;
    } else {
      seen = L::kRoundsDq && leads() && ptx::has_bit(counter(at), kStored);
    }
#pragma unroll 1
    for (int chunk = 0; chunk < Dq::kChunks && share.owns(chunk); ++chunk) {
      const bool more = chunk + 1 < Dq::kChunks && share.owns(chunk + 1);
      if (leads()) {
        pipelines.dq.wait();
        if (!C::kDeterministic && chunk == 0) stored = begin(at, seen);
        float* to = tile(at) + share.offset(chunk);
        const int bytes = share.pieces(chunk) * kPieceBytes;
        stored ? ptx::bulk_store(to, pipelines.dq.tile(), bytes) : ptx::bulk_add(to, pipelines.dq.tile(), bytes);
        ptx::bulk_commit();
        ptx::bulk_wait_read();
      }
      if (!more && last) round(before);
      if (leads()) ptx::mbarrier_arrive(pipelines.dq.empty());
      pipelines.dq.advance();
    }
    before = at;
  }

  // The sum of all blocks comes back to the stage, which is free.
  __device__ __forceinline__ void round(const RowTileVisit& at) {
#pragma unroll 1
    for (int chunk = 0; chunk < Dq::kChunks && share.owns(chunk); ++chunk) {
      const int bytes = share.pieces(chunk) * kPieceBytes, lane = threadIdx.x % 32;
      if (leads()) {
        ptx::mbarrier_arrive_expect(pipelines.summed, bytes);
        ptx::bulk_load(pipelines.dq.tile(), tile(at) + share.offset(chunk), bytes, pipelines.summed);
      }
      ptx::mbarrier_wait(pipelines.summed, summed_phase);
      summed_phase ^= 1;
#pragma unroll 1
      for (int warp = 0; warp < 4; ++warp) {
        const uint32_t from = pipelines.dq.tile() + (warp * 32 + lane) * 16;
        const int m = at.tile * C::kTileM + share.row_chunk(chunk) * 64 + warp * 16 + lane / 4;
        const auto load = [&](int piece) {
          const uint4 x = ptx::ld_shared_16(from + piece * kPieceBytes);
          return make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w));
        };
        store_rows<Element, 1>(p.dq, keys.batch, at.head, m, p.seqlen_q, p.head_dim, share.first_piece(chunk),
                               share.pieces(chunk), gradient_scale<C>(p), load);
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ void run() {
    if (launch.one_key_tile) return;
    keys.walk(p, [&](const RowTileVisit& at) { add(at); });
    if (count()) round(before);
    if (leads()) ptx::bulk_wait();
  }
};

}  // namespace fagen
