// The threads of a block as a grid over a tile: each computes a rectangle of it in registers.
#pragma once

namespace fagen {

// kLanes threads share kRows rows and divide their columns. A warp's rows lie side by side, and a thread's own rows are
// kRowStep apart. Threads that read the same 16 bytes of shared memory are lanes l and l ^ 1, or l and l ^ 2: only such
// reads are served together.
template <int kThreads, int kTileRows, int kThreadRows>
struct ThreadGrid {
  static constexpr int kRows = kThreadRows;
  static constexpr int kLanes = kThreads * kRows / kTileRows;
  static constexpr int kWarpLanes = kLanes < 32 ? kLanes : 32;
  static constexpr int kWarpsPerRow = kLanes / kWarpLanes;
  static constexpr int kRowStep = 32 / kWarpLanes;
  static_assert(kLanes >= 2 && kLanes * kTileRows == kThreads * kRows && kLanes % kWarpLanes == 0 &&
                    32 % kWarpLanes == 0,
                "the threads do not share the rows evenly");

  int first_row, lane;

  __device__ __forceinline__ ThreadGrid() {
    const int warp = threadIdx.x / 32, thread = threadIdx.x % 32;
    const int row = kRowStep == 1 ? 0 : thread % 2 + thread / (2 * kWarpLanes) * 2;
    const int column = kRowStep == 1 ? thread : thread / 2 % kWarpLanes;
    first_row = warp / kWarpsPerRow * (kRows * kRowStep) + row;
    lane = warp % kWarpsPerRow * kWarpLanes + column;
  }
  __device__ __forceinline__ int row(int i) const { return first_row + i * kRowStep; }

  // Combine a value over the lanes of a row. They must be of one warp.
  template <class Combine>
  static __device__ __forceinline__ float over_lanes(float x, Combine combine) {
    static_assert(kWarpsPerRow == 1, "the lanes of a row are of several warps");
#pragma unroll
    for (int step = 1; step < kWarpLanes; step *= 2)
      x = combine(x, __shfl_xor_sync(~0u, x, kRowStep == 1 ? step : 2 * step));
    return x;
  }
  static __device__ __forceinline__ float max_over_lanes(float x) {
    return over_lanes(x, [](float a, float b) { return fmaxf(a, b); });
  }
  static __device__ __forceinline__ float sum_over_lanes(float x) {
    return over_lanes(x, [](float a, float b) { return a + b; });
  }
};

}  // namespace fagen
