#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fagen::ptx {

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  const uint64_t* rows = emulator::exchange(address, "ldmatrix");
  const int lane = emulator::now->thread.x % 32;
  for (int i = 0; i < 4; ++i) r[i] = emulator::shared_at<uint32_t>(uint32_t(rows[i * 8 + lane / 4]) + lane % 4 * 4);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  const uint64_t* rows = emulator::exchange(address, "ldmatrix.trans");
  const int lane = emulator::now->thread.x % 32;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int row) {
      return uint32_t(emulator::shared_at<uint16_t>(uint32_t(rows[i * 8 + row]) + lane / 4 * 2));
    };
    r[i] = at(lane % 4 * 2) | at(lane % 4 * 2 + 1) << 16;
  }
}
template <class Element>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_tile<Element>(c, a, b0, b1);
}

}  // namespace fagen::ptx
