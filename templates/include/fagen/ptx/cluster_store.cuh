// Stores into shared memory of another block of a cluster, counted by a barrier there (sm_90).
#pragma once
#include <stdint.h>

namespace fagen::ptx {

// Store a number to the same place in block `rank`; the barrier at the same place there counts its four bytes.
__device__ __forceinline__ void store_to_block(uint32_t to, float x, uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there, barrier_there;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 barrier_there, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %1, [barrier_there];\n"
      "}" ::"r"(to),
      "f"(x), "r"(barrier), "r"(rank)
      : "memory");
}

// Copy `bytes` (a multiple of 16) to the same place in block `rank`; the barrier at the same place there counts them.
__device__ __forceinline__ void copy_to_block(uint32_t at, int bytes, uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there, barrier_there;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 barrier_there, %2, %3;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%0], %1, [barrier_there];\n"
      "}" ::"r"(at),
      "r"(bytes), "r"(barrier), "r"(rank)
      : "memory");
}

}  // namespace fagen::ptx
