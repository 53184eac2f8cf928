// The merge of a row tile's two splits where their blocks are a cluster: block i ends with the columns of warpgroup i,
// to which it adds the other's part of these. No part goes through the workspace, and no kernel follows.
#pragma once
#include "fagen/ptx/cluster.cuh"
#include "fagen/ptx/math.cuh"
#include "fagen/ptx/shared.cuh"
#include "fagen/sm90/mla/layout.cuh"

namespace fagen {

template <class C, int kGroup>
struct ClusterMerge {
  using L = MlaLayout<C>;
  static constexpr int kPieces = L::kHalf / 8, kBatch = 8;  // of 8 columns: a warpgroup's, those read at once
  // Where q and keys were: (piece, thread) sums of the columns that the other block ends with; (row) reference, sum.
  static constexpr int kStats = kPieces * 128 * 16;
  static_assert(kPieces % kBatch == 0 && kStats + C::kTileM * 16 <= L::kWeights, "a part has the place of q and keys");

  const uint32_t smem;
  const int rank;    // of the block
  const int row[2];  // of the thread
  const float scale_log2;

  __device__ __forceinline__ uint32_t sums(int piece) const { return smem + (piece * 128 + threadIdx.x % 128) * 16; }
  __device__ __forceinline__ uint32_t stats(int r) const { return smem + kStats + row[r] * 16; }

  // Becomes the sums of both: true if this warpgroup's columns are the block's to write. `sum`: of a row's weights. All
  // threads of the block call it, when all have read q and keys.
  __device__ __forceinline__ bool run(float (&o)[kPieces][4], float (&reference)[2], float (&sum)[2]) const {
    const bool writes = rank == kGroup;
    if (!writes) {
#pragma unroll
      for (int n = 0; n < kPieces; ++n) store(sums(n), o[n][0], o[n][1], o[n][2], o[n][3]);
      if (threadIdx.x % 4 == 0)
        for (int r = 0; r < 2; ++r) store(stats(r), reference[r], sum[r], 0.f, 0.f);
    }
    ptx::cluster_sync();
    if (writes) add(o, reference, sum);
    ptx::cluster_sync();  // none ends while the other reads its shared memory
    return writes;
  }

 private:
  static __device__ __forceinline__ void store(uint32_t to, float x, float y, float z, float w) {
    ptx::st_shared_16(to, make_uint4(__float_as_uint(x), __float_as_uint(y), __float_as_uint(z), __float_as_uint(w)));
  }
  __device__ __forceinline__ void add(float (&o)[kPieces][4], float (&reference)[2], float (&sum)[2]) const {
    float own[2], its[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float4 other = ptx::ld_cluster_16(stats(r), 1 - kGroup);  // reference, sum
      const float top = fmaxf(reference[r], other.x);
      own[r] = ptx::ex2((reference[r] - top) * scale_log2), its[r] = ptx::ex2((other.x - top) * scale_log2);
      reference[r] = top, sum[r] = sum[r] * own[r] + other.y * its[r];
    }
#pragma unroll
    for (int first = 0; first < kPieces; first += kBatch) {
      __syncwarp();  // or all loads begin at once, and registers are short
      float4 part[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) part[n] = ptx::ld_cluster_16(sums(first + n), 1 - kGroup);
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        float (&to)[4] = o[first + n];
        to[0] = to[0] * own[0] + part[n].x * its[0], to[1] = to[1] * own[0] + part[n].y * its[0];
        to[2] = to[2] * own[1] + part[n].z * its[1], to[3] = to[3] * own[1] + part[n].w * its[1];
      }
    }
  }
};

}  // namespace fagen
