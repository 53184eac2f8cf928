#pragma once
#include "fagen/ptx/mbarrier.cuh"

namespace fagen::ptx {

inline void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  emulator::Block* block = emulator::now->block;
  emulator::Barrier* told = &emulator::barrier(barrier);
  if (to % 16 || uintptr_t(from) % 16 || bytes % 16) emulator::fail("a bulk copy is not aligned");
  block->at(to, 16), block->at(to + bytes - 16, 16);
  block->cluster->copies.push_back([=] {
    memcpy(block->shared.data() + emulator::offset_of(to), from, bytes);
    told->bytes -= bytes;
    told->settle();
  });
}
// The sums happen when they are waited for, or sooner.
inline void bulk_add(float* to, uint32_t from, int bytes) {
  emulator::Block* block = emulator::now->block;
  if (from % 16 || uintptr_t(to) % 16 || bytes % 16) emulator::fail("a bulk sum is not aligned");
  block->at(from, 16), block->at(from + bytes - 16, 16);
  emulator::now->sums.open.push_back([=] {
    const unsigned char* values = block->shared.data() + emulator::offset_of(from);
    for (int i = 0; i < bytes / 4; ++i) {
      float value;
      memcpy(&value, values + i * 4, 4);
      to[i] += value;
    }
  });
}
inline void bulk_store(float* to, uint32_t from, int bytes) {
  emulator::Block* block = emulator::now->block;
  if (from % 16 || uintptr_t(to) % 16 || bytes % 16) emulator::fail("a bulk copy is not aligned");
  block->at(from, 16), block->at(from + bytes - 16, 16);
  emulator::now->sums.open.push_back([=] { memcpy(to, block->shared.data() + emulator::offset_of(from), bytes); });
}
inline void bulk_commit() {
  emulator::now->sums.commit();
  if (emulator::chance(2)) emulator::now->sums.finish(0);
}
inline void bulk_wait_read() {
  emulator::pause();
  emulator::now->sums.finish(0);
}
inline void bulk_wait() { bulk_wait_read(); }

}  // namespace fagen::ptx
