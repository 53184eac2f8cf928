#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fagen::ptx {

template <int kRegisters>
void more_registers() {}
template <int kRegisters>
void fewer_registers() {}
inline void barrier_arrive(int id, int threads) {
  auto& meeting = emulator::now->block->meetings[id];
  emulator::arrive(meeting, threads);
}
inline void cluster_sync() {
  emulator::Cluster& cluster = *emulator::now->block->cluster;
  emulator::meet(cluster.meeting, cluster.threads, "all of the cluster", 0);
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
  emulator::start_product<EMULATOR_ELEMENT>(&c[0][0], kColumns, true, a, nullptr, b, more);
}
template <int kColumns>
void wgmma_shared_columns(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b) {
  emulator::start_product<EMULATOR_ELEMENT>(&c[0][0], kColumns, false, a, nullptr, b, true);
}
template <int kColumns>
void wgmma_registers(float (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
  emulator::start_product<EMULATOR_ELEMENT>(&c[0][0], kColumns, false, 0, a, b, true);
}
template <int kColumns, bool kATransposed, bool kBTransposed>
void wgmma(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b, bool more) {
  emulator::start_product<EMULATOR_ELEMENT>(&c[0][0], kColumns, !kBTransposed, a, nullptr, b, more, !kATransposed);
}
template <int kColumns, bool kBTransposed>
void wgmma(float (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool more) {
  emulator::start_product<EMULATOR_ELEMENT>(&c[0][0], kColumns, !kBTransposed, 0, a, b, more);
}
template <int kColumns>
void wgmma_e4m3_shared(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b, bool more) {
  emulator::start_e4m3_product(&c[0][0], kColumns, a, nullptr, b, more);
}
template <int kColumns>
void wgmma_e4m3_registers(float (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool more) {
  emulator::start_e4m3_product(&c[0][0], kColumns, 0, a, b, more);
}

}  // namespace fagen::ptx
