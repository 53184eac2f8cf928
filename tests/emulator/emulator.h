// A GPU in one thread: enough of CUDA to run our kernels on the CPU, slowly, and to find out what they wait for.
//
// Every CUDA thread is a fiber. They run in an order drawn by chance, one at a time, until each waits for another; what
// is asynchronous on a GPU (copies, warpgroup products, blocks beside each other) happens at a moment drawn by chance.
// Where nothing can go on any more, the launch fails and says who waits for what. The functions of fagen/ptx/ stand in
// headers of the same names beside this one. What is the same for every kernel is in emulator.cpp, compiled once.
#pragma once
#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

// ---- blocks, warps, threads

struct uint3 {
  unsigned x, y, z;
};

namespace emulator {

extern uint32_t shared_base;  // of a block's dynamic shared memory: aligned only as declared

using Work = std::vector<std::function<void()>>;

template <class Element>
float value(uint16_t bits);  // of a 16-bit element

struct Barrier {  // of the copy engine's kind, in shared memory
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
  void settle() {
    if (pending == 0 && bytes == 0) ++phase, pending = expected;
  }
};
struct Meeting {  // of threads, by number
  int arrived = 0;
  unsigned generation = 0;
};
struct Warp {
  uint64_t slots[2][32];
  int arrived = 0;
  unsigned generation = 0;
  const char* what = "";
};
struct Block;
struct Cluster {  // blocks that run side by side
  std::vector<std::unique_ptr<Block>> blocks;
  Work copies;  // under way
  Meeting meeting;
  int threads = 0;
};
struct Block {
  Cluster* cluster;
  unsigned index, rank;  // in the grid, in the cluster
  std::vector<unsigned char> shared;
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Meeting> meetings;
  std::map<int, bool[3]> votes;  // of a meeting, the one before, and the next
  std::map<std::string, std::vector<unsigned char>> variables;
  std::vector<Warp> warps;
  int threads;

  unsigned char* at(uint32_t address, int bytes);
};
struct Groups {  // of what a thread has started and will wait for, the oldest first
  Work open;
  std::deque<Work> committed;
  void commit();
  void finish(size_t pending);
};
struct Waiting {  // until a count differs from `seen` in the bits of `mask`
  const unsigned* count = nullptr;
  unsigned seen = 0, mask = ~0u;
  const char* what = "";
  uint32_t which = 0;
  bool over() const { return !count || (*count ^ seen) & mask; }
};
struct Fiber {
  ucontext_t context;  // to begin
  jmp_buf place;  // to go on, without the system call
  bool begun = false;
  void* stack;
  Block* block;
  uint3 thread;
  bool done = false;
  Waiting waiting;
  Groups products, copies, sums;  // sums: bulk ones, from shared memory into memory
};

extern Fiber* now;
extern std::string report;  // of the last failure
extern int units;  // SMs; the device of that number has so many, since kernels ask a device only once

void begin(uint64_t seed, int units, uint32_t shared_base);  // all chance, and the GPU that kernels see
uint32_t chance(uint32_t below);
void pause();  // others may come first
[[noreturn]] void fail(const std::string& why);
void wait(const Waiting& waiting);

// An address is an offset, and above it the block's rank in the cluster.
inline uint32_t offset_of(uint32_t address) { return (address & 0xffffff) - shared_base; }

template <class T>
T& shared_at(uint32_t address, Block* block = now->block) {
  return *reinterpret_cast<T*>(block->at(address, sizeof(T)));
}

// The values that all lanes of a warp give.
const uint64_t* exchange(uint64_t mine, const char* what);

template <class T>
uint64_t bits_of(T x) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <class T>
T of_bits(uint64_t bits) {
  T x;
  memcpy(&x, &bits, sizeof(T));
  return x;
}

// The number of fp8 (e4m3) that a byte is, and the byte that is nearest to a number: 448 where it is larger.
float e4m3_value(uint8_t bits);
uint8_t e4m3_nearest(float x);

// Where the copy engine and the products find what lies at an address: 128-byte swizzle.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

void arrive(Meeting& meeting, int threads);
void meet(Meeting& meeting, int threads, const char* what, int id);

// A variable that is declared __shared__.
unsigned char* shared_variable(const char* name, size_t bytes);
template <class T>
T& shared_variable(const char* name) {
  return *reinterpret_cast<T*>(shared_variable(name, sizeof(T)));
}
inline unsigned char* dynamic_shared() { return now->block->shared.data(); }

// ---- barriers of the copy engine, products

Barrier& barrier(uint32_t address, Block* block = now->block);
void arrive_at(Barrier& barrier);

// c += a b of 16 x 16 and 16 x 8 elements, whose parts a warp's threads hold as mma.sync has them.
template <class Element>
void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
// The same of 16 x 8 and 8 x 8 tf32 numbers. The last 13 bits of an operand are not read, and sums are cut, not
// rounded.
void multiply_tf32_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// One thread's share of a warpgroup's product: two rows of a, from shared memory where `held` is null, and a quarter of
// the columns.
template <class Element>
void start_product(float* sums, int columns, bool b_row_major, uint64_t a, const uint32_t* held, uint64_t b, bool more,
                   bool a_row_major = true);
// The same of e4m3 numbers, 32 deep: k lies in a row of both operands, swizzled by 128 bytes or, of b, not at all.
void start_e4m3_product(float* sums, int columns, uint64_t a, const uint32_t* held, uint64_t b, bool more);

// ---- launches

// Runs `body` as every thread of a grid. False if they get stuck: `report` says who waits for what.
bool launch(uint3 grid, unsigned threads, unsigned cluster_size, size_t shared_bytes,
            const std::function<void()>& body);

}  // namespace emulator
