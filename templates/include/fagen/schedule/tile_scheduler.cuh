// Row tiles dealt out to blocks that stay: a block asks for the next one until there is none.
#pragma once
#include "fagen/ptx/warpgroup.cuh"

namespace fagen {

// Blocks of a cluster take neighbouring row tiles together, which count as one tile of the schedule.
template <class C>
__device__ __forceinline__ int cluster_index() {
  return blockIdx.x / C::kCluster;
}
template <class C>
__device__ __forceinline__ int cluster_count() {
  return gridDim.x / C::kCluster;
}

// The tiles of a cluster after its first, cluster_index(), by their number in the order:
//   single    none
//   balanced  every so many-th, turning at the ends of the order, so that all get as much of the long as of the short
//   dynamic   the next one that no cluster has taken, by a counter in global memory
template <class C>
struct TileScheduler {
  int round = 0;

  // The counter starts at zero, set by a prologue kernel. Without one every cluster has a tile at once, and no other.
  __device__ __forceinline__ int next(int tiles, unsigned* next_tile_counter, bool has_prologue) {
    if constexpr (C::kSchedule == Schedule::single) {
      return tiles;
    } else if constexpr (C::kSchedule == Schedule::balanced) {
      ++round;
      return round * cluster_count<C>() +
             (round % 2 ? cluster_count<C>() - 1 - cluster_index<C>() : cluster_index<C>());
    } else {
      if (!has_prologue) return tiles;
      if (round++ == 0) ptx::wait_for_previous_kernel();
      return cluster_count<C>() + (threadIdx.x % 32 == 0 ? atomicAdd(next_tile_counter, 1) : 0);
    }
  }
};

}  // namespace fagen
