// dK and dV where the blocks of a cluster share the query heads of a kv head: each puts its part into its own shared
// memory, where nothing else is any more, and adds up some columns of all parts, in a fixed order.
#pragma once
#include "fagen/ptx/barrier.cuh"
#include "fagen/ptx/cluster.cuh"
#include "fagen/ptx/shared.cuh"
#include "fagen/ptx/warpgroup.cuh"
#include "fagen/sm90/backward/rows.cuh"
#include "fagen/sm90/backward/walk.cuh"

namespace fagen {

template <class C, class Element>
struct SplitSums {
  using L = BackwardLayout<C>;
  static constexpr int kReaders = (L::kGroups + kLoaderHasDq<C>)*128;  // threads that read tiles
  static constexpr int kPairs = (C::kHeadDim + C::kHeadDimV) / 16;  // of pieces of 8 columns, of a warpgroup's keys

  const fagen_backward_params& p;
  const KeyTile<C>& keys;
  uint32_t smem;
  int group;

  // This thread's values of a piece, of any block.
  static __device__ __forceinline__ uint32_t place(uint32_t smem, int group, int piece) {
    return smem + (group * kPairs * 2 + piece) * kPieceBytes + threadIdx.x % 128 * 16;
  }
  template <int kColumns>
  __device__ __forceinline__ void put(int piece, const float (&c)[kColumns / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
      ptx::st_shared_16(place(smem, group, piece + n), c[n][0], c[n][1], c[n][2], c[n][3]);
  }
  __device__ __forceinline__ float4 sum(int of_group, int piece) const {
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int split = 0; split < keys.splits; ++split) {
      const float4 x = ptx::ld_cluster_16(place(smem, of_group, piece), split);
      total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
    }
    return total;
  }
  // Two pieces of 64 keys: their first column of a gradient is `column`.
  __device__ __forceinline__ void store(const fagen_tensor& to, int of_group, int pair, int column, int columns,
                                        float scale) const {
    const int key = keys.n0 + of_group * kGroupKeys + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    store_rows<Element, 1>(to, keys.batch, keys.kv_head, key, p.seqlen_k, columns, column / 8, 2, scale,
                           [&](int n) { return sum(of_group, pair * 2 + n); });
  }

  // The producers' side: the whole cluster meets, twice.
  static __device__ __forceinline__ void attend() { ptx::cluster_sync(), ptx::cluster_sync(); }

  __device__ __forceinline__ void run(const float (&dk)[C::kHeadDim / 8][4], const float (&dv)[C::kHeadDimV / 8][4],
                                      int barrier) const {
    ptx::barrier_sync(barrier, kReaders);  // no tile is read any more
    put<C::kHeadDim>(0, dk);
    put<C::kHeadDimV>(C::kHeadDim / 8, dv);
    ptx::cluster_sync();
#pragma unroll 1
    for (int i = keys.split * L::kGroups + group; i < L::kGroups * kPairs; i += keys.splits * L::kGroups) {
      const int of_group = i / kPairs, pair = i % kPairs, column = pair * 16;
      if (column < C::kHeadDim)
        store(p.dk, of_group, pair, column, p.head_dim, gradient_scale<C>(p));
      else
        store(p.dv, of_group, pair, column - C::kHeadDim, p.head_dim_v, scale_up_pairs<C, Element>(p, 1.f));
    }
    ptx::cluster_sync();  // none ends while others read its shared memory
  }
};

}  // namespace fagen
