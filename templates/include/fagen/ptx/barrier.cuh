// Named barriers among some of a block's warps (1-15; 0 is __syncthreads).
#pragma once

namespace fagen::ptx {

// Wait for `threads` threads on barrier `id`, and order their shared-memory accesses.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same; returns whether `vote` is true in any of them.
__device__ __forceinline__ bool barrier_any(int id, int threads, bool vote) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.s32 mine, %3, 0;\n"
      "barrier.red.or.pred all, %1, %2, mine;\n"
      "selp.s32 %0, 1, 0, all;\n"
      "}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(int(vote))
      : "memory");
  return any != 0;
}

}  // namespace fagen::ptx
