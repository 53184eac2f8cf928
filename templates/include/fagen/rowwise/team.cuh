// The threads that share a line, and what they reduce together. A block has kLines teams of kThreads threads.
// Every thread gets the same bits: sums are added in one order.
#pragma once
#include <math.h>

namespace fagen {

// Rows: a team's threads are neighbours. Columns: neighbouring threads are of neighbouring teams.
template <int kThreads, int kLines, bool kNeighbours>
struct Team {
  static constexpr int kInWarp = !kNeighbours ? 1 : kThreads < 32 ? kThreads : 32;  // reduced by shuffles
  static constexpr int kParts = kThreads / kInWarp;                                 // then through shared memory
  static constexpr int kSlots = kParts * kLines;
  static constexpr int kSharedFloats = kParts > 1 ? 2 * kSlots : 1;

  float* shared;  // two halves in turn: one is read while the next is written
  int line, member, turn = 0;

  __device__ explicit Team(float* shared)
      : shared(shared),
        line(kNeighbours ? threadIdx.x / kThreads : threadIdx.x % kLines),
        member(kNeighbours ? threadIdx.x % kThreads : threadIdx.x / kLines) {}

  __device__ float reduce_max(float x) {
    return reduce(x, [](float a, float b) { return fmaxf(a, b); });
  }
  __device__ float reduce_sum(float x) {
    return reduce(x, [](float a, float b) { return a + b; });
  }

 private:
  template <class Combine>
  __device__ float reduce(float x, Combine combine) {
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
