// dK and dV where the blocks of a cluster share the visits of a key tile: each puts its part into its own shared
// memory, where nothing else is any more, and adds up some units of all parts, in a fixed order.
#pragma once
#include "fagen/ptx/barrier.cuh"
#include "fagen/ptx/cluster.cuh"
#include "fagen/ptx/shared.cuh"
#include "fagen/ptx/warpgroup.cuh"
#include "fagen/sm90/backward/layout.cuh"

namespace fagen {

template <class C>
struct SplitSums {
  using L = BackwardLayout<C>;
  static constexpr int kReaders = (L::kGroups + kLoaderHasDq<C>)*128;  // threads that read tiles

  uint32_t smem;
  int split, splits;
  int group;

  // The producers' side: the whole cluster meets, twice.
  static __device__ __forceinline__ void attend() { ptx::cluster_sync(), ptx::cluster_sync(); }

  // Where this warpgroup's unit is, in every block.
  __device__ __forceinline__ uint32_t place(int unit) const {
    return smem + (group * kUnits<C> + unit) * SplitUnits<C>::kBytes;
  }
  __device__ __forceinline__ void put(int unit, int piece, const float (&c)[4]) const {
    ptx::st_shared_16(place(unit) + piece * kPieceBytes + threadIdx.x % 128 * 16, c[0], c[1], c[2], c[3]);
  }
  // When all have put theirs, call store(unit) for each of the warpgroup's units that this block adds up.
  template <class Store>
  __device__ __forceinline__ void finish(Store store) const {
    ptx::cluster_sync();
#pragma unroll 1
    for (int unit = (split + group * kUnits<C>) % splits; unit < kUnits<C>; unit += splits) store(unit);
    ptx::cluster_sync();  // none ends while others read its shared memory
  }
  // Begins with the block's own part, so that all do not read from one at the same time.
  __device__ __forceinline__ void sum(int unit, float (&c)[SplitUnits<C>::kPieces][4]) const {
#pragma unroll
    for (auto& piece : c) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
#pragma unroll 2
    for (int i = 0; i < splits; ++i) {
      const int part = split + i < splits ? split + i : split + i - splits;
#pragma unroll
      for (int n = 0; n < SplitUnits<C>::kPieces; ++n) {
        const float4 x = ptx::ld_cluster_16(place(unit) + n * kPieceBytes + threadIdx.x % 128 * 16, part);
        c[n][0] += x.x, c[n][1] += x.y, c[n][2] += x.z, c[n][3] += x.w;
      }
    }
  }
};

}  // namespace fagen
