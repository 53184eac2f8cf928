// What all kernels share of the emulator: the scheduler of fibers, who waits for whom, the asynchronous units.
#include "emulator.h"

#include <sys/mman.h>

#include <set>

#include "cuda/all.h"

namespace emulator {

uint32_t shared_base;
Fiber* now = nullptr;
std::string report;
int units = 3;

constexpr int kStackBytes = 96 << 10;
static jmp_buf scheduler;
static uint64_t chance_state = 1;

// ---- fibers

uint32_t chance(uint32_t below) {
  chance_state = chance_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(chance_state >> 33) % below;
}

__attribute__((noinline)) static void leave() {
  if (!_setjmp(now->place)) _longjmp(scheduler, 1);
}
__attribute__((noinline)) static void go_on(Fiber& fiber) {
  now = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}
void begin(uint64_t seed, int multiprocessors, uint32_t base) {
  chance_state = seed * 2654435769u + 1, units = multiprocessors, shared_base = base;
}
void pause() {
  if (chance(2)) leave();
}
void fail(const std::string& why) {
  char where[96];
  snprintf(where, sizeof where, " (block %u, thread %u)", now->block->index, now->thread.x);
  report = why + where;
  for (;;) leave();
}
void wait(const Waiting& waiting) {
  if (waiting.over()) return;
  now->waiting = waiting;
  leave();
}

void Groups::commit() {
  committed.push_back(std::move(open));
  open.clear();
}
void Groups::finish(size_t pending) {
  for (; committed.size() > pending; committed.pop_front())
    for (auto& work : committed.front()) work();
}

// ---- shared memory, warps, blocks

unsigned char* Block::at(uint32_t address, int bytes) {
  const uint32_t offset = offset_of(address);
  if (offset >= shared.size() || offset + bytes > shared.size())
    fail("shared memory is left at " + std::to_string(offset));
  if (address % bytes) fail("shared memory is not aligned at " + std::to_string(offset));
  return shared.data() + offset;
}
unsigned char* shared_variable(const char* name, size_t bytes) {
  auto& memory = now->block->variables[name];
  if (memory.empty()) memory.resize(bytes + 16);
  return memory.data();
}

const uint64_t* exchange(uint64_t mine, const char* what) {
  Warp& warp = now->block->warps[now->thread.x / 32];
  const unsigned generation = warp.generation;
  if (warp.arrived && warp.what != what && strcmp(warp.what, what))
    fail(std::string("the lanes of a warp are at different places: ") + warp.what + ", " + what);
  warp.what = what;
  warp.slots[generation % 2][now->thread.x % 32] = mine;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait({&warp.generation, generation, ~0u, what});
  }
  return warp.slots[generation % 2];
}
void arrive(Meeting& meeting, int threads) {
  if (++meeting.arrived == threads) meeting.arrived = 0, ++meeting.generation;
}
void meet(Meeting& meeting, int threads, const char* what, int id) {
  const unsigned generation = meeting.generation;
  arrive(meeting, threads);
  wait({&meeting.generation, generation, ~0u, what, uint32_t(id)});
}

Barrier& barrier(uint32_t address, Block* block) {
  const auto found = block->barriers.find(offset_of(address));
  if (found == block->barriers.end()) fail("there is no barrier at " + std::to_string(offset_of(address)));
  return found->second;
}
void arrive_at(Barrier& barrier) {
  if (barrier.pending == 0) fail("more arrive at a barrier than it waits for");
  --barrier.pending;
  barrier.settle();
}

// ---- the copy engine

void copy(uint32_t to, const CUtensorMap* map, uint32_t barrier_address, std::initializer_list<int> where,
          unsigned blocks) {
  Cluster* cluster = now->block->cluster;
  const unsigned mask = blocks ? blocks : 1u << now->block->rank;
  const CUtensorMap m = *map;
  const std::vector<int> begin = where;
  if (int(begin.size()) != m.rank) fail("a map has another number of dimensions");
  if (to % 128) fail("a copy goes to a place that is not aligned");
  uint32_t rows = 1;
  for (int i = 1; i < m.rank; ++i) rows *= m.box[i];
  const uint32_t pitch = m.swizzled ? 128 : m.box[0] * 2;
  for (unsigned rank = 0; rank < cluster->blocks.size(); ++rank)
    if (mask >> rank & 1) {
      Block* block = cluster->blocks[rank].get();
      Barrier* told = &barrier(barrier_address, block);
      block->at(to, 16), block->at(to + rows * pitch - 16, 16);
      cluster->copies.push_back([=] {
        for (uint32_t row = 0; row < rows; ++row) {
          const unsigned char* from = m.base;
          bool inside = true;
          uint32_t rest = row;
          for (int i = 1; i < m.rank; ++i) {
            const int64_t index = begin[i] + int64_t(rest % m.box[i]);
            rest /= m.box[i];
            inside &= index >= 0 && uint64_t(index) < m.size[i];
            if (inside) from += index * m.stride[i];
          }
          for (uint32_t column = 0; column < m.box[0]; ++column) {
            const int64_t index = begin[0] + int64_t(column);
            uint16_t element = 0;
            if (inside && index >= 0 && uint64_t(index) < m.size[0]) memcpy(&element, from + index * 2, 2);
            const uint32_t place = to + row * pitch + column * 2;
            memcpy(block->shared.data() + offset_of(m.swizzled ? swizzled(place) : place), &element, 2);
          }
        }
        told->bytes -= int64_t(rows) * m.box[0] * 2;
        told->settle();
      });
    }
}

// ---- products of a warp, of a warpgroup

template <class Element>
void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = now->thread.x % 32;
  const uint64_t* low = exchange(uint64_t(a[1]) << 32 | a[0], "mma a0 a1");
  uint64_t rows[2][4];  // of a: this quad's registers
  for (int i = 0; i < 4; ++i) rows[0][i] = low[lane / 4 * 4 + i];
  const uint64_t* high = exchange(uint64_t(a[3]) << 32 | a[2], "mma a2 a3");
  for (int i = 0; i < 4; ++i) rows[1][i] = high[lane / 4 * 4 + i];
  const uint64_t* b = exchange(uint64_t(b1) << 32 | b0, "mma b");
  const auto element = [](uint64_t word, int half) { return value<Element>(uint16_t(word >> half * 16)); };
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
template void multiply_tile<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void multiply_tile<__half>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);

// The float32 number next to x on the way to 0, as the tensor cores end a sum.
static float cut(double x) {
  const float near = float(x);
  return std::fabs(double(near)) > std::fabs(x) ? std::nextafter(near, 0.f) : near;
}
void multiply_tf32_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto number = [](uint64_t word, int half) { return of_bits<float>(word >> half * 32 & 0xffffe000u); };
  const int lane = now->thread.x % 32;
  float rows[2][8], columns[2][8];
  for (int k = 0; k < 8; k += 4) {
    const uint64_t* words = exchange(uint64_t(a[k / 2 + 1]) << 32 | a[k / 2], k ? "mma a2 a3" : "mma a0 a1");
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half) rows[half][k + i] = number(words[lane / 4 * 4 + i], half);
  }
  const uint64_t* words = exchange(uint64_t(b[1]) << 32 | b[0], "mma b");
  for (int column = 0; column < 2; ++column)
    for (int k = 0; k < 8; ++k) columns[column][k] = number(words[(lane % 4 * 2 + column) * 4 + k % 4], k / 4);
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 8; ++k) sum += double(rows[i / 2][k]) * columns[i % 2][k];
    c[i] = cut(sum);
  }
}

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
struct Words {  // of two rows, as a quad's registers hold them
  uint64_t words[2][4];
};

// What lies in shared memory is read when the product is done: when it is waited for, or sooner.
template <class Element>
void start_product(float* sums, int columns, bool b_row_major, uint64_t a, const uint32_t* held, uint64_t b, bool more,
                   bool a_row_major) {
  const Tile tile(b);
  const int lane = now->thread.x % 32, first = now->thread.x / 32 % 4 * 16 + lane / 4;
  std::function<void(float (&)[2][16])> read;
  if (held) {
    Words mine;
    for (int half = 0; half < 2; ++half) {
      const uint64_t* all =
          exchange(uint64_t(held[half * 2 + 1]) << 32 | held[half * 2], half ? "wgmma a2 a3" : "wgmma a0 a1");
      for (int i = 0; i < 4; ++i) mine.words[half][i] = all[lane / 4 * 4 + i];
    }
    read = [mine](float (&rows)[2][16]) {
      for (int r = 0; r < 2; ++r)
        for (int k = 0; k < 16; ++k)
          rows[r][k] = value<Element>(uint16_t(mine.words[k / 8][k % 8 / 2] >> (r * 32 + k % 2 * 16)));
    };
  } else {
    read = [from = Tile(a), first, a_row_major](float (&rows)[2][16]) {
      for (int r = 0; r < 2; ++r)
        for (int k = 0; k < 16; ++k) {
          const int row = first + r * 8;
          rows[r][k] = value<Element>(a_row_major ? from.row_major(row, k) : from.column_major(row, k));
        }
    };
  }
  now->products.open.push_back([=] {
    float rows[2][16];
    read(rows);
    for (int piece = 0; piece < columns / 8; ++piece)
      for (int side = 0; side < 2; ++side) {
        const int column = piece * 8 + lane % 4 * 2 + side;
        float found[2] = {0, 0};
        for (int k = 0; k < 16; ++k) {
          const uint16_t bits = b_row_major ? tile.row_major(column, k) : tile.column_major(column, k);
          const float y = value<Element>(bits);
          for (int r = 0; r < 2; ++r) found[r] += rows[r][k] * y;
        }
        for (int r = 0; r < 2; ++r) {
          float& sum = sums[piece * 4 + r * 2 + side];
          sum = more ? sum + found[r] : found[r];
        }
      }
  });
}
template void start_product<__nv_bfloat16>(float*, int, bool, uint64_t, const uint32_t*, uint64_t, bool, bool);
template void start_product<__half>(float*, int, bool, uint64_t, const uint32_t*, uint64_t, bool, bool);

float e4m3_value(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return bits & 0x80 ? -size : size;
}
uint8_t e4m3_nearest(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) return sign | 0x7f;
  int exponent;
  frexpf(x, &exponent);
  const float unit = ldexpf(1, std::max(exponent - 4, -9));  // between neighbours of x
  const float size = std::min(std::fabs(nearbyintf(x / unit) * unit), 448.f);
  for (uint8_t bits = 0; bits < 0x7f; ++bits)
    if (e4m3_value(bits) == size) return sign | bits;
  fail("a number has no nearest e4m3");
}

// A matrix of bytes in shared memory, k in a row: swizzled, rows of 128 bytes; or in cores of 8 rows of 16 bytes.
struct ByteTile {
  uint32_t address, leading, stride;
  bool in_cores;
  explicit ByteTile(uint64_t descriptor)
      : address(uint32_t(descriptor & 0x3fff) << 4),
        leading(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        stride(uint32_t(descriptor >> 32 & 0x3fff) << 4),
        in_cores(descriptor >> 62 == 0) {
    if (!in_cores && descriptor >> 62 != 1) fail("an operand is swizzled by other than 128 bytes");
  }
  float at(int row, int k) const {
    const uint32_t group = address + row / 8 * stride;
    if (in_cores) return e4m3_value(shared_at<uint8_t>(group + k / 16 * leading + row % 8 * 16 + k % 16));
    return e4m3_value(shared_at<uint8_t>(swizzled(group + row % 8 * 128 + k)));
  }
};

// As the tensor cores end a sum of e4m3 products: of some 14 bits, the others cut off.
static float cut_to_14_bits(float x) { return of_bits<float>(bits_of(x) & 0xfffffc00u); }

void start_e4m3_product(float* sums, int columns, uint64_t a, const uint32_t* held, uint64_t b, bool more) {
  const int lane = now->thread.x % 32, first = now->thread.x / 32 % 4 * 16 + lane / 4;
  const ByteTile of_a(held ? b : a), of_b(b);
  Words mine;  // of a: the row of this thread, and the one 8 further on
  if (held)
    for (int half = 0; half < 2; ++half) {
      const uint64_t* all =
          exchange(uint64_t(held[half * 2 + 1]) << 32 | held[half * 2], half ? "wgmma a2 a3" : "wgmma a0 a1");
      for (int i = 0; i < 4; ++i) mine.words[half][i] = all[lane / 4 * 4 + i];
    }
  now->products.open.push_back([=, in_registers = held != nullptr] {
    float rows[2][32];
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < 32; ++k)
        rows[r][k] = in_registers ? e4m3_value(uint8_t(mine.words[k / 16][k % 16 / 4] >> (r * 32 + k % 4 * 8)))
                                  : of_a.at(first + r * 8, k);
    for (int piece = 0; piece < columns / 8; ++piece)
      for (int side = 0; side < 2; ++side) {
        float found[2] = {0, 0};
        for (int k = 0; k < 32; ++k) {
          const float y = of_b.at(piece * 8 + lane % 4 * 2 + side, k);
          for (int r = 0; r < 2; ++r) found[r] += rows[r][k] * y;
        }
        for (int r = 0; r < 2; ++r) {
          float& sum = sums[piece * 4 + r * 2 + side];
          sum = cut_to_14_bits(more ? sum + found[r] : found[r]);
        }
      }
  });
}

// ---- launches

static std::vector<void*> stacks;  // not in use
static void* take_stack() {
  if (stacks.empty()) return mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  void* stack = stacks.back();
  stacks.pop_back();
  return stack;
}

static const std::function<void()>* entry;
static void enter() {
  (*entry)();
  if (!now->sums.open.empty() || !now->sums.committed.empty()) fail("a thread ends before its sums are in memory");
  now->done = true;
  for (;;) leave();
}

static std::string stuck(const std::vector<std::unique_ptr<Fiber>>& fibers) {
  std::map<std::string, std::set<unsigned>> who;
  for (const auto& f : fibers)
    if (!f->done) {
      const std::string which = f->waiting.which ? " " + std::to_string(f->waiting.which) : "";
      const std::string block = ": warps of block " + std::to_string(f->block->index);
      who[std::string("waits for ") + f->waiting.what + which + block].insert(f->thread.x / 32);
    }
  std::string text = "nothing can go on";
  for (const auto& [what, warps] : who) {
    text += "\n  " + what;
    for (unsigned warp : warps) text += " " + std::to_string(warp);
  }
  return text;
}

static void copy_one(Cluster& cluster) {
  std::swap(cluster.copies.back(), cluster.copies[chance(cluster.copies.size())]);
  const auto copy = std::move(cluster.copies.back());
  cluster.copies.pop_back();
  copy();
}

// Some clusters side by side, to their end; false if they get stuck.
static bool run(std::vector<std::unique_ptr<Cluster>>& clusters) {
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (auto& cluster : clusters)
    for (auto& block : cluster->blocks)
      for (int t = 0; t < block->threads; ++t) {
        auto fiber = std::make_unique<Fiber>();
        fiber->block = block.get(), fiber->thread = {unsigned(t), 0, 0}, fiber->stack = take_stack();
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack, fiber->context.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber->context, enter, 0);
        fibers.push_back(std::move(fiber));
      }
  const auto warps = fibers.size() / 32;
  size_t left = fibers.size();
  bool fine = true;
  size_t slow = 0, width = 1;  // now and then a warp or a warpgroup is left behind for some rounds
  int rounds = 0;
  while (left && fine) {
    bool moved = false;
    const size_t first = chance(warps), step = chance(2) ? 1 : warps - 1;
    if (rounds > 0)
      --rounds;
    else if (chance(32) == 0)
      rounds = 1 + chance(128), width = chance(2) ? 1 : 4, slow = chance(warps) / width;
    for (size_t w = 0; w < warps && fine; ++w)
      for (size_t lane = 0; lane < 32 && fine; ++lane) {
        const size_t warp = (first + w * step) % warps;
        Fiber& fiber = *fibers[warp * 32 + lane];
        if (rounds > 0 && warp / width == slow) continue;
        if (fiber.done || !fiber.waiting.over()) continue;
        moved = true;
        fiber.waiting.count = nullptr;
        go_on(fiber);
        left -= fiber.done;
        fine = report.empty();
      }
    for (auto& cluster : clusters)
      while (!cluster->copies.empty() && (!moved || !chance(8))) copy_one(*cluster), moved = true;
    if (!moved && rounds > 0)
      rounds = 0;
    else if (!moved && fine)
      report = stuck(fibers), fine = false;
  }
  for (auto& fiber : fibers) stacks.push_back(fiber->stack);
  return fine;
}

bool launch(uint3 grid, unsigned block_threads, unsigned cluster_size, size_t shared_bytes,
            const std::function<void()>& body) {
  const unsigned grid_blocks = grid.x * grid.y;
  entry = &body, gridDim = grid, blockDim = {block_threads, 1, 1};
  for (unsigned first = 0; first < grid_blocks;) {
    std::vector<std::unique_ptr<Cluster>> clusters;
    for (; first < grid_blocks && clusters.size() < std::max(1u, 2 * units / cluster_size); first += cluster_size) {
      auto cluster = std::make_unique<Cluster>();
      for (unsigned rank = 0; rank < cluster_size; ++rank) {
        auto block = std::make_unique<Block>();
        block->cluster = cluster.get(), block->index = first + rank, block->rank = rank, block->threads = block_threads;
        block->shared.assign(shared_bytes, 0xff);  // not a number, read as any element
        block->warps.resize((block_threads + 31) / 32);
        cluster->threads += block_threads;
        cluster->blocks.push_back(std::move(block));
      }
      clusters.push_back(std::move(cluster));
    }
    if (!run(clusters)) return false;
  }
  return true;
}

}  // namespace emulator

uint3 gridDim, blockDim;

CUresult emulator::encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base, const cuuint64_t* size,
                          const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                          CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                          CUtensorMapFloatOOBfill) {
  if (rank < 1 || rank > 5 || uintptr_t(base) % 16) return CUDA_ERROR_INVALID_VALUE;
  map->base = static_cast<const unsigned char*>(base), map->rank = rank;
  map->swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (map->swizzled ? box[0] * 2 > 128 : box[0] * 2 % 16) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < rank; ++i) {
    map->size[i] = size[i], map->box[i] = box[i], map->stride[i] = i ? strides[i - 1] : 2;
    if (!size[i] || size[i] > 1ull << 32 || !box[i] || box[i] > 256 || steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    if (i && (map->stride[i] % 16 || map->stride[i] >= 1ull << 40)) return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
