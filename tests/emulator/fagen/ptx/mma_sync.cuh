#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace ptx {

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
  const int lane = emulator::now->thread.x % 32;
  const uint64_t* low = emulator::exchange(uint64_t(a[1]) << 32 | a[0], "mma a0 a1");
  uint64_t rows[2][4];  // of a: this quad's registers
  for (int i = 0; i < 4; ++i) rows[0][i] = low[lane / 4 * 4 + i];
  const uint64_t* high = emulator::exchange(uint64_t(a[3]) << 32 | a[2], "mma a2 a3");
  for (int i = 0; i < 4; ++i) rows[1][i] = high[lane / 4 * 4 + i];
  const uint64_t* b = emulator::exchange(uint64_t(b1) << 32 | b0, "mma b");
  const auto element = [](uint64_t word, int half) { return emulator::value<Element>(uint16_t(word >> half * 16)); };
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const float x = element(rows[k / 8][k % 8 / 2] >> i / 2 * 32, k % 2);
      const float y = element(b[column * 4 + k % 8 / 2] >> k / 8 * 32, k % 2);
      sum += x * y;
    }
    c[i] += sum;
  }
}

}  // namespace ptx
