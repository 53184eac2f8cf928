// The copy engine of sm_90: boxes that go to L2 alone, ahead of their copies.
#pragma once
#include <cuda.h>
#include <stdint.h>

namespace fagen::ptx {

// Start bringing one box of a 4-dimensional tensor to L2; nobody waits for it.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(column), "r"(row),
               "r"(head), "r"(batch)
               : "memory");
}

}  // namespace fagen::ptx
