// dQ on its way from a consumer's registers into memory, where the blocks of all key tiles add theirs in float32: by
// shared memory and the copy engine (bulk), or straight from registers (red). Deterministic: in turns.
#pragma once
#include "fagen/ptx/bulk.cuh"
#include "fagen/ptx/reduce.cuh"
#include "fagen/ptx/shared.cuh"
#include "fagen/ptx/turn.cuh"
#include "fagen/ptx/warpgroup.cuh"
#include "fagen/sm90/backward/walk.cuh"

namespace fagen {

template <class C>
__device__ __forceinline__ int64_t row_tile_index(const fagen_backward_params& p, const BackwardLaunch& launch,
                                                  int batch, int head, int tile) {
  return (int64_t(batch) * p.heads + head) * launch.row_tiles + tile;
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
    float* to = tile + share.offset(chunk) + thread * 4;
#pragma unroll
    for (int i = 0; i < DqShare<C>::kColumns / 8; ++i)
      if (i < pieces) ptx::reduce_add_4(to + i * (kPieceBytes / 4), dq[i]);
  }
}

// The other side of the bulk sink: one lane adds what an owner has stored, row tile after row tile.
template <class C>
__device__ __forceinline__ void drain_dq(const fagen_backward_params& p, const BackwardLaunch& launch,
                                         const KeyTile<C>& keys, const RowBand& band, uint32_t smem, int owner) {
  using Dq = DqShare<C>;
  const Dq share{owner};
  BackwardPipelines<C> pipelines(smem, owner);
  const auto turn_of = [&](int head, int tile) {
    return launch.turns + row_tile_index<C>(p, launch, keys.batch, head, tile) * Dq::kGroups + owner;
  };
  const auto add = [&](const RowTileVisit& at) {
    float* tile = launch.dq + row_tile_index<C>(p, launch, keys.batch, at.head, at.tile) * Dq::kTileFloats;
    for (int chunk = 0; chunk < Dq::kChunks && share.owns(chunk); ++chunk) {
      pipelines.dq.wait();
      if (C::kDeterministic && chunk == 0) ptx::wait_for_turn(turn_of(at.head, at.tile), keys.turn(band, at.tile));
      ptx::bulk_add(tile + share.offset(chunk), pipelines.dq.tile(),
                    share.pieces(chunk) * kPieceBytes);
      ptx::bulk_commit();
      ptx::bulk_wait_read();
      ptx::mbarrier_arrive(pipelines.dq.empty());
      pipelines.dq.advance();
    }
    if (C::kDeterministic) {
      ptx::bulk_wait();
      ptx::pass_turn(turn_of(at.head, at.tile));
    }
  };
  const auto skip = [&](int head, int tile) {
    if (!C::kDeterministic) return;
    ptx::wait_for_turn(turn_of(head, tile), keys.turn(band, tile));
    ptx::pass_turn(turn_of(head, tile));
  };
  keys.walk(p, add, skip);
  ptx::bulk_wait();
}

}  // namespace fagen
