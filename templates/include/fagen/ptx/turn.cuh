// Counters in global memory by which blocks agree (sm_90): whose turn it is, who is the first and who the last.
#pragma once

namespace fagen::ptx {

// Wait until the counter is at `turn`; what was added before it got there is visible.
__device__ __forceinline__ void wait_for_turn(const unsigned* counter, unsigned turn) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen != turn);
}
// Whether this thread's block is the first to claim what the counter stands for; no block is twice.
__device__ __forceinline__ bool claim(unsigned* counter, unsigned claimed) {
  unsigned before;
  asm volatile("atom.relaxed.gpu.global.or.b32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(claimed) : "memory");
  return !(before & claimed);
}
// Whether the bit is set; what was done before it was is visible, to the copy engine as well.
__device__ __forceinline__ bool has_bit(const unsigned* counter, unsigned bit) {
  unsigned seen;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\nfence.proxy.async.global;" : "=r"(seen) : "l"(counter) : "memory");
  return seen & bit;
}
__device__ __forceinline__ void wait_for_bit(const unsigned* counter, unsigned bit) {
  while (!has_bit(counter, bit)) {}
}
// Count what this thread has added, and return the count before. What others had counted is visible.
__device__ __forceinline__ unsigned count(unsigned* counter, unsigned number) {
  unsigned before;
  asm volatile(
      "fence.proxy.async.global;\n"
      "atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;\n"
      "fence.proxy.async.global;"
      : "=r"(before)
      : "l"(counter), "r"(number)
      : "memory");
  return before;
}
// Pass the turn on, after all that this thread has added.
__device__ __forceinline__ void pass_turn(unsigned* counter) {
  asm volatile("fence.proxy.async.global;\nred.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

}  // namespace fagen::ptx
