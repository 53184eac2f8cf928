// The producer warp: q once, then chunks of K and V in the order in which the consumers read them. One lane talks to
// the copy engine.
#pragma once
#include "fagen/ptx/tma.cuh"
#include "fagen/sm90/forward_large/task.cuh"
#include "fagen/sm90/pipeline.cuh"

namespace fagen {

template <class C>
using LargeRing = Pipeline<C::kStages, LargeLayout<C>::kStageBytes, C::kCluster>;

template <class C>
struct LargeProducer {
  using L = LargeLayout<C>;

  const LargeLaunch& launch;
  const LargeTask<C>& task;
  Pipeline<1, L::kSlabs * L::kQSlabBytes> q;
  LargeRing<C> ring;

  __device__ __forceinline__ void load(uint32_t to, const CUtensorMap& map, int column, int row) const {
    const int head = task.kv_head, batch = task.coord.batch;
    if constexpr (C::kCluster > 1)
      ptx::tma_load_to_all(to, &map, ring.full(), column, row, head, batch, (1 << C::kCluster) - 1);
    else
      ptx::tma_load(to, &map, ring.full(), column, row, head, batch);
  }

  __device__ __forceinline__ void load_q() const {
    if (threadIdx.x % 32 != 0) return;
    q.expect_bytes();
    for (int slab = 0; slab < L::kSlabs; ++slab)
      ptx::tma_load(q.tile() + slab * L::kQSlabBytes, &launch.q, q.full(), slab * kSlabColumns, task.first_row,
                    task.coord.head, task.coord.batch);
  }
  // Chunks [first, end) of a tile of keys. Of each slab every block of the cluster loads some rows, for all of them; of
  // peers each has its own.
  __device__ __forceinline__ void load_keys(int tile, int first, int end) {
    constexpr int kPart = L::kBlockKeys / C::kCluster;
    const int before = task.rank() * kPart, place = L::kPeers ? 0 : before;
    for (int chunk = first; chunk < end; ++chunk, ring.advance()) {
      if (threadIdx.x % 32 != 0) continue;
      ring.acquire();
      ptx::mbarrier_arrive_expect(ring.full(), L::kKeyBytes);
      for (int slab = 0; slab < L::kChunkSlabs; ++slab)
        load(ring.tile() + slab * L::kKeySlabBytes + place * kRowBytes, launch.k,
             (chunk * L::kChunkSlabs + slab) * kSlabColumns, tile * C::kTileN + before);
    }
  }
  // All chunks of V of a tile of keys. Every block of the cluster loads some slabs.
  __device__ __forceinline__ void load_values(int tile) {
    for (int chunk = 0; chunk < L::kValueChunks; ++chunk, ring.advance()) {
      if (threadIdx.x % 32 != 0) continue;
      ring.acquire();
      ptx::mbarrier_arrive_expect(ring.full(), L::kValueBytes);
      for (int slab = task.rank() % C::kCluster; slab < L::kValueSlabs; slab += C::kCluster)
        load(ring.tile() + slab * L::kValueSlabBytes, launch.v, task.first_column + slab * kSlabColumns,
             tile * C::kTileN + task.value_chunk(chunk) * L::kValueKeys);
    }
  }

  // The first chunks of the next tile come before the values of this one: consumers multiply them under its softmax.
  __device__ __forceinline__ void run() {
    auto walk = task.walk();
    if (!walk.valid()) return;
    load_q();
    load_keys(walk.tile, 0, L::kKeyChunks);
    for (;;) {
      const int tile = walk.tile;
      walk.advance();
      if (!walk.valid()) return load_values(tile);
      load_keys(walk.tile, 0, C::kChunksAhead);
      load_values(tile);
      load_keys(walk.tile, C::kChunksAhead, L::kKeyChunks);
    }
  }
};

}  // namespace fagen
