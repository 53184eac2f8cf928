// The threads that share a line, and what they reduce together. A block has kLines teams of kThreads threads.
// Every thread gets the same bits: sums are added in one order.
#pragma once
#include <math.h>

#include "fagen/ptx/cluster.cuh"
#include "fagen/ptx/cp_async.cuh"
#include "fagen/ptx/warpgroup.cuh"

namespace fagen {

// Rows: a team's threads are neighbours. Columns: neighbouring threads are of neighbouring teams. With kCluster > 1 the
// teams of a cluster's blocks are one, which reads what each block has reduced from its shared memory (sm_90).
template <int kThreads, int kLines, bool kNeighbours, int kCluster>
struct Team {
  static_assert(kCluster == 1 || kLines == 1, "a cluster has one line");

  static constexpr int kInWarp = !kNeighbours ? 1 : kThreads < 32 ? kThreads : 32;  // reduced by shuffles
  static constexpr int kParts = kThreads / kInWarp;                                 // then through shared memory
  static constexpr int kSlots = kParts * kLines;
  static constexpr int kSharedFloats = kParts > 1 ? 2 * kSlots : 1;

  static constexpr int kSlotBytes = kCluster > 1 ? 2 * int(sizeof(float4)) : 0;

  float* shared;  // two halves in turn: one is read while the next is written
  float4* slots;  // the same for the cluster, in dynamic shared memory: it lies at the same place in each block
  int line, member, turn = 0, slot = 0;

  __device__ Team(float* shared, unsigned char* slots)
      : shared(shared),
        slots(reinterpret_cast<float4*>(slots)),
        line(kNeighbours ? threadIdx.x / kThreads : threadIdx.x % kLines),
        member(kNeighbours ? threadIdx.x % kThreads : threadIdx.x / kLines) {}

  __device__ float reduce_max(float x) {
    return reduce(x, [](float a, float b) { return fmaxf(a, b); });
  }
  __device__ float reduce_sum(float x) {
    return reduce(x, [](float a, float b) { return a + b; });
  }

  // No block ends while another reads its shared memory.
  __device__ void finish() const {
    if constexpr (kCluster > 1) ptx::cluster_sync();
  }

 private:
  template <class Combine>
  __device__ float reduce(float x, Combine combine) {
    x = reduce_block(x, combine);
    if constexpr (kCluster > 1) {
      if (threadIdx.x == 0) slots[slot] = make_float4(x, 0.f, 0.f, 0.f);
      ptx::cluster_sync();
      const uint32_t address = ptx::shared_address(slots + slot);
      slot ^= 1;
      x = ptx::ld_cluster_16(address, 0).x;
#pragma unroll
      for (int rank = 1; rank < kCluster; ++rank) x = combine(x, ptx::ld_cluster_16(address, rank).x);
    }
    return x;
  }

  template <class Combine>
  __device__ float reduce_block(float x, Combine combine) {
#pragma unroll
    for (int lanes = kInWarp / 2; lanes > 0; lanes /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    if constexpr (kParts > 1) {
      float* half = shared + turn * kSlots;
      turn ^= 1;
      if (member % kInWarp == 0) half[member / kInWarp * kLines + line] = x;
      __syncthreads();
      x = half[line];
#pragma unroll
      for (int part = 1; part < kParts; ++part) x = combine(x, half[part * kLines + line]);
    }
    return x;
  }
};

}  // namespace fagen
