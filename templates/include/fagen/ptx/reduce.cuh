// Sums in global memory (sm_90), and turns at adding to them.
#pragma once

namespace fagen::ptx {

// Add four neighbouring float32 values.
__device__ __forceinline__ void add_4(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

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
