// The weights P of a warpgroup as the first operand of O += P V: e4m3 numbers in registers.
#pragma once
#include "fagen/ptx/e4m3.cuh"
#include "fagen/sm90/forward_fp8/value_order.cuh"
#include "fagen/sm90/operand.cuh"

namespace fagen {

// Weights are at most 1. The largest, 1 itself, becomes 256 of e4m3's 448, without a rounding, and those down to 2^-14
// keep all their bits.
constexpr float kWeightScaleLog2 = 8.f, kWeightScale = 256.f;

// An operand of values in shared memory, in the order of value_order.cuh.
__device__ __forceinline__ Operand operand_of_values(uint32_t address) {
  return {(address & Operand::kInBlock) >> 4 | uint32_t(kCoreBytes >> 4) << 16, kGroupBytes >> 4};
}

template <class C>
struct Fp8Weights {
  static constexpr int kSteps = C::kTileN / kBlockKeys;

  uint32_t fragments[kSteps][4];

  // A step of 32 keys takes four pieces of the scores that the thread holds: the places of a core are the keys of two
  // pieces, as key_in_place has them. Registers may not change while any product is under way.
  __device__ __forceinline__ void store(const float (&weights)[C::kTileN / 8][4]) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float *low = &weights[4 * n + i / 2 * 2][i % 2 * 2], *high = &weights[4 * n + i / 2 * 2 + 1][i % 2 * 2];
        fragments[n][i] = ptx::pack_e4m3(low[0], low[1], high[0], high[1]);
      }
  }
  // Start sums = [sums +] P v.
  __device__ __forceinline__ void start_product(float (&sums)[C::kHeadDimV / 8][4], const Operand& v, bool more) {
    pin(fragments);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
      ptx::wgmma_e4m3_registers<C::kHeadDimV>(sums, fragments[n], v.at(n * kBlockKeys * C::kHeadDimV), more || n > 0);
  }
};

}  // namespace fagen
