#pragma once
#include <cuda_runtime.h>

namespace fagen::ptx {

inline float4 ld_cluster_16(uint32_t from, uint32_t rank) {
  return *reinterpret_cast<float4*>(emulator::now->block->cluster->blocks[rank]->at(from, 16));
}

}  // namespace fagen::ptx
