#pragma once
#include "fagen/ptx/mbarrier.cuh"

namespace fagen::ptx {

// Both happen at a later moment.
inline void store_to_block(uint32_t to, float x, uint32_t barrier, int rank) {
  emulator::Cluster* cluster = emulator::now->block->cluster;
  emulator::Block* block = cluster->blocks[rank].get();
  emulator::Barrier* told = &emulator::barrier(barrier, block);
  block->at(to, 4);
  cluster->copies.push_back([=] {
    memcpy(block->shared.data() + emulator::offset_of(to), &x, 4);
    told->bytes -= 4;
    told->settle();
  });
}
inline void copy_to_block(uint32_t at, int bytes, uint32_t barrier, int rank) {
  emulator::Block* from = emulator::now->block;
  emulator::Cluster* cluster = from->cluster;
  emulator::Block* block = cluster->blocks[rank].get();
  emulator::Barrier* told = &emulator::barrier(barrier, block);
  if (at % 16 || bytes % 16) emulator::fail("a copy to another block is not aligned");
  from->at(at, 16), from->at(at + bytes - 16, 16);
  cluster->copies.push_back([=] {
    const uint32_t offset = emulator::offset_of(at);
    memcpy(block->shared.data() + offset, from->shared.data() + offset, bytes);
    told->bytes -= bytes;
    told->settle();
  });
}

}  // namespace fagen::ptx
