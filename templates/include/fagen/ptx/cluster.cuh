// Shared memory of other blocks of a cluster (sm_90).
#pragma once
#include <stdint.h>

namespace fagen::ptx {

// Load 16 bytes from the same place in block `rank` of the cluster.
__device__ __forceinline__ float4 ld_cluster_16(uint32_t from, uint32_t rank) {
  float4 x;
  asm volatile(
      "{\n"
      ".reg .u32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n"
      "}"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(from), "r"(rank)
      : "memory");
  return x;
}

}  // namespace fagen::ptx
