// Asynchronous copies of four bytes, for rows that begin anywhere (sm_80 and up).
#pragma once
#include "fagen/ptx/cp_async.cuh"

namespace fagen::ptx {

// Copy 4 bytes; where `valid` is false nothing is read and zeros are written.
__device__ __forceinline__ void cp_async_4(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

}  // namespace fagen::ptx
