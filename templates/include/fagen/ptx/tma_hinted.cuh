// Copies of the copy engine with a word to L2 about what comes after.
#pragma once
#include <cuda.h>
#include <stdint.h>

namespace fagen::ptx {

// The policy by which L2 gives up a line first: it is loaded once.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// As tma_load.
__device__ __forceinline__ void tma_load_hinted(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                                int row, int head, int batch, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}

}  // namespace fagen::ptx
