// The warpgroup that loads all tiles and computes dQ = dS K of what the consumers hand over (dq_owner=loader). They
// wait neither for each other nor for dQ, so that one forms P and dS while products of the other are computed.
#pragma once
#include "fagen/sm90/backward/dq.cuh"
#include "fagen/sm90/backward/producer.cuh"
#include "fagen/sm90/backward/split_sums.cuh"

namespace fagen {

template <class C, class Element>
struct DqLoader {
  using L = BackwardLayout<C>;
  using Dq = DqShare<C>;
  using DqPart = float[Dq::kColumns / 8][4];
  // visits that are loaded before the one whose dQ is next
  static constexpr int kAhead = (C::kQStages < C::kDoutStages ? C::kQStages : C::kDoutStages) - 1;

  BackwardProducer<C> producer;
  const int warp;
  const Dq share = {0};

  __device__ __forceinline__ void load(const RowTileVisit& at) {
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) producer.load_q(at);
      if (warp == 1) producer.load_dout(at);
    }
    __syncwarp();
  }
  // dQ of a visit, of the row tile with this index among those of all heads.
  __device__ __forceinline__ void add(int row_tile) {
    auto& pipelines = producer.pipelines;
    pipelines.handed_ds.wait();
#pragma unroll
    for (int chunk = 0; chunk < Dq::kChunks; ++chunk) {
      DqPart dq;
      start_dq<C>(dq, share, chunk, pipelines.handed_ds.tile(), pipelines.k.tile());
      ptx::wgmma_wait<0>();
      pin(dq);
      if (chunk == Dq::kChunks - 1) pipelines.handed_ds.release();
      sink_dq<C>(dq, share, chunk, pipelines, dq_sums<C>(producer.launch, row_tile));
    }
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) producer.load_keys();
      if (warp == 1) producer.load_values();
    }
    ptx::wait_for_previous_kernel();
    int visits = 0, row_tiles[kAhead];  // of those loaded, the oldest first
    const auto shift = [&](int row_tile) {
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i) row_tiles[i] = row_tiles[i + 1];
      row_tiles[kAhead - 1] = row_tile;
    };
    producer.keys.walk(producer.p, [&](const RowTileVisit& at) {
      load(at);
      if (visits == 0) producer.pipelines.k.wait();
      if (visits >= kAhead) add(row_tiles[0]);
      shift(row_tile_index<C>(producer.p, producer.launch, producer.keys.batch, at.head, at.tile));
      ++visits;
    });
#pragma unroll 1
    for (int i = kAhead; i > 0; --i) {
      if (i <= visits) add(row_tiles[0]);
      shift(0);
    }
    if (kMostSplits<C> > 1 && producer.keys.splits > 1) {
      ptx::barrier_sync(BackwardConsumer<C, Element>::kBarrier, SplitSums<C>::kReaders);
      SplitSums<C>::attend();
    }
  }
};

}  // namespace fagen
