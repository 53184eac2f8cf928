// The weights P as the first operand of O += P V: in registers, or in shared memory, in the warpgroup's own tile.
#pragma once
#include "fagen/ptx/warpgroup.cuh"
#include "fagen/sm90/operand.cuh"
#include "fagen/sm90/smem_layout.cuh"

namespace fagen {

template <class C>
struct WeightOperand {
  static constexpr int kSteps = C::kTileN / 16;  // 16 keys each
  static constexpr int kSlab = BlockLayout<C>::kWeightSlabBytes;

  uint32_t tile;  // in shared memory, if they go there
  uint32_t fragments[kSteps][4];

  // word(n, i): register i of a thread for the n-th 16 keys. Registers may not change while any product is under way.
  template <class Word>
  __device__ __forceinline__ void store(Word word) {
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
        for (int i = 0; i < 4; ++i) fragments[n][i] = word(n, i);
    }
  }
  // Start o += P v.
  template <class O>
  __device__ __forceinline__ void start_product(O& o, const Operand& v) {
    if constexpr (C::kSharedWeights) {
      const Operand own = Operand::of_rows(tile);
      ptx::wgmma_fence();
#pragma unroll
      for (int n = 0; n < kSteps; ++n)
        ptx::wgmma_shared_columns<C::kHeadDimV>(o, own.at(n / 4 * kSlab + n % 4 * 32), v.at(n * 2048));
    } else {
      pin(fragments);
      ptx::wgmma_fence();
#pragma unroll
      for (int n = 0; n < kSteps; ++n) ptx::wgmma_registers<C::kHeadDimV>(o, fragments[n], v.at(n * 2048));
    }
  }
};

}  // namespace fagen
