// Turns of blocks at a place in global memory (sm_90): each waits for its number, and passes the next one on.
#pragma once

namespace fagen::ptx {

// Wait until the counter is at `turn`; what was added before it got there is visible.
__device__ __forceinline__ void wait_for_turn(const unsigned* counter, unsigned turn) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen != turn);
}
// Pass the turn on, after all that this thread has added.
__device__ __forceinline__ void pass_turn(unsigned* counter) {
  asm volatile("fence.proxy.async.global;\nred.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

}  // namespace fagen::ptx
