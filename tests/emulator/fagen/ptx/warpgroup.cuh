#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace emulator {

// A tile in shared memory as a product's descriptor names it, 128-byte swizzled.
struct Tile {
  uint32_t address, leading, stride;
  explicit Tile(uint64_t descriptor)
      : address(uint32_t(descriptor & 0x3fff) << 4),
        leading(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        stride(uint32_t(descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) fail("an operand is not swizzled by 128 bytes");
  }
  uint16_t at(uint32_t offset) const { return shared_at<uint16_t>(swizzled(address + offset)); }
  uint16_t row_major(int row, int k) const { return at(row / 8 * stride + row % 8 * 128 + k * 2); }
  uint16_t column_major(int column, int k) const {
    return at(column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2);
  }
};

// The registers of a thread hold two rows of a, b is read when the product is done: when it is waited for, or sooner.
template <int kColumns, bool kRowMajor, class A>
void add_product(float (&c)[kColumns / 8][4], uint64_t b, bool more, A a) {
  float* sums = &c[0][0];
  const Tile tile(b);
  const int lane = now->thread.x % 32;
  now->products.open.push_back([=] {
    float rows[2][16];
    a(rows);
    for (int piece = 0; piece < kColumns / 8; ++piece)
      for (int side = 0; side < 2; ++side) {
        const int column = piece * 8 + lane % 4 * 2 + side;
        float found[2] = {0, 0};
        for (int k = 0; k < 16; ++k) {
          const uint16_t bits = kRowMajor ? tile.row_major(column, k) : tile.column_major(column, k);
          const float y = value<EMULATOR_ELEMENT>(bits);
          for (int r = 0; r < 2; ++r) found[r] += rows[r][k] * y;
        }
        for (int r = 0; r < 2; ++r) {
          float& sum = sums[piece * 4 + r * 2 + side];
          sum = more ? sum + found[r] : found[r];
        }
      }
  });
}
// a in shared memory, of which a thread reads two rows
inline auto rows_at(uint64_t a) {
  const Tile tile(a);
  const int first = now->thread.x / 32 % 4 * 16 + now->thread.x % 32 / 4;
  return [=](float (&rows)[2][16]) {
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < 16; ++k) rows[r][k] = value<EMULATOR_ELEMENT>(tile.row_major(first + r * 8, k));
  };
}
// a in registers, of which a quad holds two rows
inline auto rows_of(const uint32_t (&a)[4]) {
  uint64_t held[2][4];
  for (int half = 0; half < 2; ++half) {
    const uint64_t* all = exchange(uint64_t(a[half * 2 + 1]) << 32 | a[half * 2], half ? "wgmma a2 a3" : "wgmma a0 a1");
    for (int i = 0; i < 4; ++i) held[half][i] = all[now->thread.x % 32 / 4 * 4 + i];
  }
  struct Held {
    uint64_t words[2][4];
  } copy;
  memcpy(&copy, held, sizeof held);
  return [copy](float (&rows)[2][16]) {
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < 16; ++k)
        rows[r][k] = value<EMULATOR_ELEMENT>(uint16_t(copy.words[k / 8][k % 8 / 2] >> (r * 32 + k % 2 * 16)));
  };
}

}  // namespace emulator

namespace ptx {

template <int kRegisters>
void more_registers() {}
template <int kRegisters>
void fewer_registers() {}
inline void barrier_arrive(int id, int threads) {
  auto& meeting = emulator::now->block->meetings[id];
  emulator::arrive(meeting, threads);
}
inline void cluster_sync() {
  emulator::Team& team = *emulator::now->block->team;
  emulator::meet(team.meeting, team.threads, "all of the cluster", 0);
}
inline void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  const uint64_t* rows = emulator::exchange(address, "stmatrix");
  const int lane = emulator::now->thread.x % 32;
  for (int i = 0; i < 4; ++i) emulator::shared_at<uint32_t>(uint32_t(rows[i * 8 + lane / 4]) + lane % 4 * 4) = r[i];
}
inline void fence_shared_writes() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  emulator::now->products.commit();
  if (emulator::chance(2)) emulator::now->products.finish(0);
}
template <int kPending>
void wgmma_wait() {
  emulator::pause();
  emulator::now->products.finish(kPending);
  emulator::exchange(0, "wgmma_wait");  // no lane goes on before all have
}
inline void pin(float& x) { asm volatile("" : "+m"(x)::"memory"); }
inline void pin(unsigned& x) { asm volatile("" : "+m"(x)::"memory"); }
inline void start_next_kernel() {}
inline void wait_for_previous_kernel() {}

template <int kColumns>
void wgmma_shared(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b, bool more) {
  emulator::add_product<kColumns, true>(c, b, more, emulator::rows_at(a));
}
template <int kColumns>
void wgmma_shared_columns(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b) {
  emulator::add_product<kColumns, false>(c, b, true, emulator::rows_at(a));
}
template <int kColumns>
void wgmma_registers(float (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
  emulator::add_product<kColumns, false>(c, b, true, emulator::rows_of(a));
}

}  // namespace ptx
