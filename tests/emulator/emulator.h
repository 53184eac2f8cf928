// A GPU in one thread: enough of CUDA to run our kernels on the CPU, slowly, and to find out what they wait for.
//
// Every CUDA thread is a fiber. They run in an order drawn by chance, one at a time, until each waits for another; what
// is asynchronous on a GPU (copies, warpgroup products, blocks beside each other) happens at a moment drawn by chance.
// Where nothing can go on any more, the launch fails and says who waits for what. The functions of fagen/ptx/ stand in
// headers of the same names beside this one.
#pragma once
#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

// ---- blocks, warps, threads

struct uint3 {
  unsigned x, y, z;
};

namespace emulator {

constexpr uint32_t kSharedBase = EMULATOR_SHARED_BASE;  // of a block's dynamic shared memory: aligned only as declared
constexpr int kStackBytes = 96 << 10;

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
struct Team {  // a cluster of blocks
  std::vector<std::unique_ptr<Block>> blocks;
  Work copies;  // under way
  Meeting meeting;
  int threads = 0;
};
struct Block {
  Team* team;
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
  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  void finish(size_t pending) {
    for (; committed.size() > pending; committed.pop_front())
      for (auto& work : committed.front()) work();
  }
};
struct Fiber {
  ucontext_t context;  // to begin
  jmp_buf place;  // to go on, without the system call
  bool begun = false;
  void* stack;
  Block* block;
  uint3 thread;
  bool done = false;
  std::function<bool()> ready;
  std::string waits;
  Groups products, copies;
};

inline jmp_buf scheduler;
inline Fiber* now = nullptr;
inline std::string report;  // of the last failure
inline uint64_t chance_state = 1;
inline int units = 3;  // SMs; the device of that number has so many, since kernels ask a device only once

inline uint32_t chance(uint32_t below) {
  chance_state = chance_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(chance_state >> 33) % below;
}

__attribute__((noinline)) inline void leave() {
  if (!_setjmp(now->place)) _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void go_on(Fiber& fiber) {
  now = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}
inline void pause() {  // others may come first
  if (chance(2)) leave();
}
[[noreturn]] inline void fail(const std::string& why) {
  char where[96];
  snprintf(where, sizeof where, " (block %u, thread %u)", now->block->index, now->thread.x);
  report = why + where;
  for (;;) leave();
}
template <class Condition>
void wait(const char* what, uint32_t which, Condition condition) {
  if (condition()) return;
  now->ready = condition;
  now->waits = std::string(what) + (which ? " " + std::to_string(which) : "");
  leave();
}

// An address is an offset, and above it the block's rank in the cluster.
inline uint32_t offset_of(uint32_t address) { return (address & 0xffffff) - kSharedBase; }

inline unsigned char* Block::at(uint32_t address, int bytes) {
  const uint32_t offset = offset_of(address);
  if (offset >= shared.size() || offset + bytes > shared.size())
    fail("shared memory is left at " + std::to_string(offset));
  if (address % bytes) fail("shared memory is not aligned at " + std::to_string(offset));
  return shared.data() + offset;
}
template <class T>
T& shared_at(uint32_t address, Block* block = now->block) {
  return *reinterpret_cast<T*>(block->at(address, sizeof(T)));
}

// The values that all lanes of a warp give.
inline const uint64_t* exchange(uint64_t mine, const char* what) {
  Warp& warp = now->block->warps[now->thread.x / 32];
  const unsigned generation = warp.generation;
  if (warp.arrived && strcmp(warp.what, what))
    fail(std::string("the lanes of a warp are at different places: ") + warp.what + ", " + what);
  warp.what = what;
  warp.slots[generation % 2][now->thread.x % 32] = mine;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait(what, 0, [&warp, generation] { return warp.generation != generation; });
  }
  return warp.slots[generation % 2];
}
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

// Where the copy engine and the products find what lies at an address: 128-byte swizzle.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

inline void arrive(Meeting& meeting, int threads) {
  if (++meeting.arrived == threads) meeting.arrived = 0, ++meeting.generation;
}
inline void meet(Meeting& meeting, int threads, const char* what, int id) {
  const unsigned generation = meeting.generation;
  arrive(meeting, threads);
  wait(what, id, [&meeting, generation] { return meeting.generation != generation; });
}

// A variable that is declared __shared__.
template <class T>
T& shared_variable(const char* name) {
  auto& memory = now->block->variables[name];
  if (memory.empty()) memory.resize(sizeof(T) + 16);
  return *reinterpret_cast<T*>(memory.data());
}
inline unsigned char* dynamic_shared() { return now->block->shared.data(); }

// ---- launches

inline std::vector<void*> stacks;  // not in use
inline void* take_stack() {
  if (stacks.empty()) return mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  void* stack = stacks.back();
  stacks.pop_back();
  return stack;
}

inline const std::function<void()>* body;
inline void enter() {
  (*body)();
  now->done = true;
  for (;;) leave();
}

inline std::string stuck(const std::vector<std::unique_ptr<Fiber>>& fibers) {
  std::map<std::string, std::set<unsigned>> who;
  for (const auto& f : fibers)
    if (!f->done)
      who["waits for " + f->waits + ": warps of block " + std::to_string(f->block->index)].insert(f->thread.x / 32);
  std::string text = "nothing can go on";
  for (const auto& [what, warps] : who) {
    text += "\n  " + what;
    for (unsigned warp : warps) text += " " + std::to_string(warp);
  }
  return text;
}

// Some clusters side by side, to their end; false if they get stuck.
inline bool run(std::vector<std::unique_ptr<Team>>& teams) {
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (auto& team : teams)
    for (auto& block : team->blocks)
      for (int t = 0; t < block->threads; ++t) {
        auto fiber = std::make_unique<Fiber>();
        fiber->block = block.get(), fiber->thread = {unsigned(t), 0, 0}, fiber->stack = take_stack();
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack, fiber->context.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber->context, enter, 0);
        fibers.push_back(std::move(fiber));
      }
  const auto copy_one = [&](Team& team) {
    std::swap(team.copies.back(), team.copies[chance(team.copies.size())]);
    const auto copy = std::move(team.copies.back());
    team.copies.pop_back();
    copy();
  };
  const auto warps = fibers.size() / 32;
  size_t left = fibers.size();
  bool fine = true;
  while (left && fine) {
    bool moved = false;
    const size_t first = chance(warps), step = chance(2) ? 1 : warps - 1;
    for (size_t w = 0; w < warps && fine; ++w)
      for (size_t lane = 0; lane < 32 && fine; ++lane) {
        Fiber& fiber = *fibers[(first + w * step) % warps * 32 + lane];
        if (fiber.done || (fiber.ready && !fiber.ready())) continue;
        moved = true;
        fiber.ready = nullptr;
        go_on(fiber);
        left -= fiber.done;
        fine = report.empty();
      }
    for (auto& team : teams)
      while (!team->copies.empty() && (!moved || !chance(8))) copy_one(*team), moved = true;
    if (!moved && fine) report = stuck(fibers), fine = false;
  }
  for (auto& fiber : fibers) stacks.push_back(fiber->stack);
  return fine;
}

}  // namespace emulator
