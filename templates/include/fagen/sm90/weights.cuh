// The weights P as the first operand of O += P V: in registers, or in shared memory, in a tile of the warpgroup's own.
#pragma once
#include "fagen/sm90/layout.cuh"

// Every register of a fragment stays where it is, and is written, before what follows.
template <class X, int kPieces>
__device__ __forceinline__ void pin(X (&fragment)[kPieces][4]) {
#pragma unroll
  for (int i = 0; i < kPieces * 4; ++i) ptx::pin(fragment[i / 4][i % 4]);
}

template <class C>
struct WeightOperand {
  static constexpr int kSteps = C::kTileN / 16;  // of 16 keys
  static constexpr int kSlab = Shape<C>::kWeightSlab;

  uint32_t tile;  // if they go through shared memory
  uint32_t kept[kSteps][4];

  // word(n, i): what register i of a thread holds of 16 keys. Registers may not change while any product is under way.
  template <class Word>
  __device__ __forceinline__ void put(Word word) {
    if constexpr (C::kSharedWeights) {
      // a lane's row, one of the 16 that its warp stores and multiplies, and the swizzled place of its half of 16 keys
      const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
      const uint32_t place = tile + row * 128 + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
      for (int n = 0; n < kSteps; ++n)
        ptx::stmatrix_x4((place ^ n % 4 * 32) + n / 4 * kSlab, {word(n, 0), word(n, 1), word(n, 2), word(n, 3)});
      ptx::fence_shared_writes();
      __syncwarp();
    } else {
#pragma unroll
      for (int n = 0; n < kSteps; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[n][i] = word(n, i);
    }
  }
  // o += P v, started
  template <class O>
  __device__ __forceinline__ void start_product(O& o, const Operand& v) {
    if constexpr (C::kSharedWeights) {
      const Operand own = Operand::of_rows(tile);
      ptx::wgmma_fence();
#pragma unroll
      for (int n = 0; n < kSteps; ++n)
        ptx::wgmma_shared_columns<C::kHeadDimV>(o, own.at(n / 4 * kSlab + n % 4 * 32), v.at(n * 2048));
    } else {
      pin(kept);
      ptx::wgmma_fence();
#pragma unroll
      for (int n = 0; n < kSteps; ++n) ptx::wgmma_registers<C::kHeadDimV>(o, kept[n], v.at(n * 2048));
    }
  }
};
