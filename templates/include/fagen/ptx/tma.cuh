// The copy engine of sm_90: boxes of a tensor that a map describes.
#pragma once
#include <cuda.h>
#include <stdint.h>

namespace fagen::ptx {

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copy one box of a 4-dimensional tensor to shared memory; `barrier` counts its bytes. Outside the tensor reads zero.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row,
                                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Copy a box to the same place of several blocks of the cluster, a bit of `blocks` each; each one's barrier counts it.
__device__ __forceinline__ void tma_load_to_all(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                                int row, int head, int batch, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(blocks)
      : "memory");
}

// Copy one box of a 5-dimensional tensor, the whole of its second dimension.
__device__ __forceinline__ void tma_load_packed(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                                int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %7, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(0)
      : "memory");
}

}  // namespace fagen::ptx
