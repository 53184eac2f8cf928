// The producer warp: what stays of the block's own rows once, then of each visit the chunks in the order in which the
// consumers read them. One lane talks to the copy engine.
#pragma once
#include "fagen/ptx/bulk.cuh"
#include "fagen/ptx/tma.cuh"
#include "fagen/sm90/backward_large/pipelines.cuh"
#include "fagen/sm90/backward_large/share.cuh"

namespace fagen {

template <class P>
struct PassProducer {
  using L = PassLayout<P>;

  const PassLaunch& launch;
  const PassShare<P>& share;
  PassPipelines<P> pipelines;

  __device__ __forceinline__ static bool leads() { return threadIdx.x % 32 == 0; }

  // Slabs [first, first + count) of the block's own rows.
  __device__ __forceinline__ void load_own(uint32_t to, const CUtensorMap& map, uint32_t barrier, int first,
                                           int count) const {
    const int head = P::kOwnsKeys ? share.kv_head : share.head;
#pragma unroll 1
    for (int slab = 0; slab < count; ++slab)
      ptx::tma_load(to + slab * L::kOwnSlabBytes, &map, barrier, (first + slab) * kSlabColumns, share.own, head,
                    share.batch);
  }
  // A box of the other side, for all blocks of the cluster.
  __device__ __forceinline__ void load_other(uint32_t to, const CUtensorMap& map, int column, int row, int head) const {
    const int from = P::kOwnsKeys ? head : share.kv_head;
    const uint32_t full = pipelines.chunks.full();
    if constexpr (P::kCluster > 1)
      ptx::tma_load_to_all(to, &map, full, column, row, from, share.batch, (1 << P::kCluster) - 1);
    else
      ptx::tma_load(to, &map, full, column, row, from, share.batch);
  }

  __device__ __forceinline__ void load_what_stays() const {
    if (!leads() || !L::kScoresStay) return;
    pipelines.own.expect_bytes();
    load_own(pipelines.own.tile(), launch.own_scores, pipelines.own.full(), 0, L::kScoreChunks * L::kChunkSlabs);
    if constexpr (L::kWeightsStay)
      load_own(pipelines.own.tile() + L::kOwnWeights, launch.own_weights, pipelines.own.full(), 0,
               L::kWeightChunks * L::kChunkSlabs);
  }
  // The stats of rows of q.
  __device__ __forceinline__ void load_stats(int head, int row) {
    if (leads()) {
      pipelines.stats.acquire();
      pipelines.stats.expect_bytes();
      ptx::bulk_load(pipelines.stats.tile(), share.stats_of(head) + row, L::kStatBytes, pipelines.stats.full());
    }
    pipelines.stats.advance();
  }
  // Columns of the rows that the block owns, unless they stay, and of those that it visits. Of these every block of the
  // cluster loads a part.
  template <bool kStay>
  __device__ __forceinline__ void load_columns(const CUtensorMap& own, const CUtensorMap& other, int chunks, int head,
                                               int row) {
    constexpr int kPart = L::kBlockOther / P::kCluster, kOwnBytes = kStay ? 0 : L::kOwnChunkBytes;
    const int before = share.rank() * kPart, first = row + share.part * L::kBlockOther;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk, pipelines.chunks.advance()) {
      if (!leads()) continue;
      const int first_slab = chunk * L::kChunkSlabs;
      pipelines.chunks.acquire();
      ptx::mbarrier_arrive_expect(pipelines.chunks.full(), kOwnBytes + L::kOtherChunkBytes);
      const uint32_t to = pipelines.chunks.tile();
      if constexpr (!kStay) load_own(to, own, pipelines.chunks.full(), first_slab, L::kChunkSlabs);
#pragma unroll 1
      for (int slab = 0; slab < L::kChunkSlabs; ++slab)
        load_other(to + kOwnBytes + slab * L::kOtherSlabBytes + before * kRowBytes, other,
                   (first_slab + slab) * kSlabColumns, first + before, head);
    }
  }
  // Whole rows, as wide as the block's part of the gradient. Every block of the cluster loads some slabs.
  __device__ __forceinline__ void load_rows(int head, int row) {
#pragma unroll 1
    for (int chunk = 0; chunk < L::kSumChunks; ++chunk, pipelines.chunks.advance()) {
      if (!leads()) continue;
      pipelines.chunks.acquire();
      ptx::mbarrier_arrive_expect(pipelines.chunks.full(), L::kSumBytes);
#pragma unroll 1
      for (int slab = share.rank(); slab < L::kGroups * L::kGroupSlabs; slab += P::kCluster)
        load_other(pipelines.chunks.tile() + slab * L::kSumSlabBytes, launch.rows,
                   share.first_column + slab * kSlabColumns, row + share.sum_chunk(chunk) * L::kSumRows, head);
    }
  }

  __device__ __forceinline__ void run() {
    typename PassShare<P>::Walk walk(share);
    if (!walk.valid()) return;
    load_what_stays();
    if (!P::kOwnsKeys) load_stats(share.head, share.own);
    for (; walk.valid(); walk.advance()) {
      const int row = walk.tile() * P::kTileOther;
      if (P::kOwnsKeys) load_stats(walk.head, row);
      load_columns<L::kScoresStay>(launch.own_scores, launch.scores, L::kScoreChunks, walk.head, row);
      load_columns<L::kWeightsStay>(launch.own_weights, launch.weights, L::kWeightChunks, walk.head, row);
      load_rows(walk.head, row);
    }
  }
};

}  // namespace fagen
