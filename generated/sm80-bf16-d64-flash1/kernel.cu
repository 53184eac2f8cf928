// A kernel for attention forward, made by fagen. It needs the CUDA toolkit and nothing else: no torch, no Python.
//
// problem:  forward/bf16/d64/none, its config chosen for b4/h32-32/q4096-k4096
// config:   tile_m=32 tile_n=128 warps=4 partition=split_k loop_order=kv_outer stages=1 overlap=False q_source=shared smem_layout=swizzled blocks_per_sm=1 rescale=each block_order=ascending splits=none (as given)
// made by:  fagen emit --target sm_90 --dtype bf16 --head-dim 64 --mask none --seqlen 4096 --batch 4 --heads 32 --kv-heads 32 --family sm80_forward --config '{"block_order": "ascending", "blocks_per_sm": 1, "loop_order": "kv_outer", "overlap": false, "partition": "split_k", "q_source": "shared", "rescale": "each", "smem_layout": "swizzled", "splits": "none", "stages": 1, "tile_m": 32, "tile_n": 128, "warps": 4}' --out DIR
// build:    nvcc -gencode=arch=compute_90,code=sm_90 -O3 -std=c++17 --use_fast_math -lineinfo -shared -Xcompiler -fPIC -o kernel.so kernel.cu
// call:     fagen_launch(), declared in kernel.h beside this file

// sm80_forward: attention forward for forward/bf16/d64/none on sm_90
//
// Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.
// Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.
//
// Config: tile_m=32 tile_n=128 warps=4 partition=split_k loop_order=kv_outer stages=1 overlap=False q_source=shared smem_layout=swizzled blocks_per_sm=1 rescale=each block_order=ascending splits=none

namespace fagen {

enum class Mask { none, causal, window, intervals };
enum class Partition { split_q, split_k, pairs };
enum class LoopOrder { q_outer, kv_outer };
enum class QSource { shared, registers };
enum class SmemLayout { swizzled, padded };
enum class Rescale { each, deferred };
enum class BlockOrder { ascending, descending, longest_first, sectioned };

struct Config {
  static constexpr int kHeadDim = 64;  // of q and k, padded
  static constexpr int kHeadDimV = 64;  // of v and o, padded
  static constexpr Mask kMask = Mask::none;  // which cells are visible
  static constexpr bool kSoftcap = false;  // s -> softcap * tanh(s / softcap)
  static constexpr bool kAlibi = false;  // s -> s - slope * distance from the diagonal
  static constexpr bool kDropout = false;  // weights are dropped at random
  static constexpr bool kAligned = true;  // rows are whole, aligned 16-byte pieces
  static constexpr int kIntervalColumns = 0;  // bounds a key carries
  static constexpr int kLTS = -1;  // column of LTS in intervals, -1: absent
  static constexpr int kLTE = -1;  // column of LTE in intervals, -1: absent
  static constexpr int kUTS = -1;  // column of UTS in intervals, -1: absent
  static constexpr int kUTE = -1;  // column of UTE in intervals, -1: absent
  static constexpr int kTileM = 32;  // rows of q a block works on
  static constexpr int kTileN = 128;  // keys a block loads at a time
  static constexpr int kWarps = 4;  // warps of a block
  static constexpr Partition kPartition = Partition::split_k;  // what the warps of a block divide
  static constexpr LoopOrder kLoopOrder = LoopOrder::kv_outer;  // what stays while the other passes by
  static constexpr int kStages = 1;  // tiles of keys in shared memory
  static constexpr bool kOverlap = false;  // compute the next tile's scores under this one's softmax
  static constexpr QSource kQSource = QSource::shared;  // where q waits for its products
  static constexpr SmemLayout kSmemLayout = SmemLayout::swizzled;  // how shared memory avoids bank conflicts
  static constexpr int kBlocksPerSm = 1;  // blocks the register budget is cut for
  static constexpr Rescale kRescale = Rescale::each;  // when O follows a grown maximum
  static constexpr BlockOrder kBlockOrder = BlockOrder::ascending;  // order of row tiles and heads
};

// Sizes that fagen derived from the config before compiling; the kernel asserts that it agrees.
struct Derived {
  static constexpr int threads = 128;
  static constexpr int smem_bytes = 36864;
};

}  // namespace fagen

using namespace fagen;  // the kernel is this one file

#include <cuda_runtime.h>

// ---- fagen/abi/forward.h ---------------------------------------------------------------------------------
// The arguments of a forward kernel: the one struct that a caller passes. Plain C; no torch, no CUDA header.
// ---- fagen/abi/tensor.h ----------------------------------------------------------------------------------
// A tensor that a kernel reads or writes, as every op passes it. Plain C; no torch, no CUDA header.
#include <stdint.h>

typedef struct fagen_tensor {
  void* data;         // null if the call has none
  int64_t stride[3];  // in elements; the op says of which dimensions. The last dimension is contiguous.
} fagen_tensor;

// Strides of q, k, v and o are those of batch, row and head. A batch stride of 0 broadcasts.
typedef struct fagen_forward_params {
  fagen_tensor q;             // (batch, seqlen_q, heads, head_dim)
  fagen_tensor k;             // (batch, seqlen_k, kv_heads, head_dim)
  fagen_tensor v;             // (batch, seqlen_k, kv_heads, head_dim_v)
  fagen_tensor o;             // (batch, seqlen_q, heads, head_dim_v), written
  fagen_tensor intervals;     // int32 (batch, mask_heads, seqlen_k, columns); strides: batch (or 0), mask head, key
  fagen_tensor alibi_slopes;  // float (batch, heads); strides: batch (or 0), the others unused
  float* lse;                 // (batch, heads, seqlen_q) contiguous, natural log; null if not wanted
  void* workspace;            // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
  int32_t batch, heads, kv_heads, mask_heads;
  int32_t seqlen_q, seqlen_k;
  int32_t head_dim, head_dim_v;       // as the caller has them; the kernel works on padded sizes
  int32_t window_left, window_right;  // the band around the bottom-right aligned diagonal; -1: unbounded
  float scale;                        // multiplies q.k before the softmax
  float softcap;                      // s -> softcap * tanh(s / softcap); 0: off
  float dropout;                      // probability that a weight is dropped; read by kernels with dropout
  const uint64_t* rng;                // seed and offset of the random numbers, where the kernel reads; null without
} fagen_forward_params;

// ---- fagen/host/launch.cuh -------------------------------------------------------------------------------
// A launch on the host: sizes, the workspace, the start of a kernel.
#include <cuda_runtime.h>
#include <stdint.h>

namespace fagen {

template <class Int>
constexpr Int ceil_div(Int a, int b) {
  return (a + b - 1) / b;
}

// Parts of the workspace begin at multiples of 256 bytes.
constexpr uint64_t align_workspace(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

// Start a kernel, in clusters of so many blocks. With `early` it may begin before the last kernel of the stream has
// ended, ours or not, and waits for that itself.
template <class... Parameters, class... Arguments>
static cudaError_t launch_clusters(int cluster, bool early, void (*kernel)(Parameters...), int blocks, int threads,
                                   int smem, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = early;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
  const cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), size_t(smem),
                                     stream,       attributes,    cluster > 1 ? 2u : 1u};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <int kCluster = 1, bool kEarly = true, class... Parameters, class... Arguments>
static cudaError_t launch_kernel(void (*kernel)(Parameters...), int blocks, int threads, int smem, cudaStream_t stream,
                                 const Arguments&... arguments) {
  return launch_clusters(kCluster, kEarly, kernel, blocks, threads, smem, stream, arguments...);
}

}  // namespace fagen

// ---- fagen/host/prepare.cuh ------------------------------------------------------------------------------
// Facts about a device that a kernel asks for once.
#include <cuda_runtime.h>

namespace fagen {

// The facts of the present device. `find(index, facts)` finds them when the device is first used. Two threads may both
// come to do so; both must find the same.
template <class Facts, class Find>
static cudaError_t once_per_device(Facts* facts, Find find) {
  constexpr int kDevices = 64;
  static Facts known[kDevices];
  static volatile bool ready[kDevices];
  int index = 0;
  if (const cudaError_t e = cudaGetDevice(&index)) return e;
  if (index >= kDevices) return cudaErrorInvalidDevice;
  if (!ready[index]) {
    Facts found;
    if (const cudaError_t e = find(index, found)) return e;
    known[index] = found;
    ready[index] = true;
  }
  *facts = known[index];
  return cudaSuccess;
}

}  // namespace fagen

// ---- fagen/sm80/forward/q_outer.cuh ----------------------------------------------------------------------
// FlashAttention 2's order: a block keeps one tile of rows, and the keys pass by.
// ---- fagen/sm80/forward/epilogue.cuh ---------------------------------------------------------------------
// From the warps' unnormalised sums to O and LSE in device memory.
// ---- fagen/sm80/forward/pairs.cuh ------------------------------------------------------------------------
// Two warps share rows: each computes the scores of half of the keys and half of the columns of O. A warp then holds
// twice the rows for the same registers, so that every operand it reads from shared memory feeds twice the products.
// The price: the weights, and now and then the maxima, pass through shared memory.
// ---- fagen/sm80/forward/block.cuh ------------------------------------------------------------------------
// A block's tiles and a warp's share of them: sizes, shared memory, copies. Both loop orders use it.
// ---- fagen/common/warp_products.cuh ----------------------------------------------------------------------
// A warp's products on tensor cores, S = Q K^T and O += P V by ldmatrix and mma, on top of its row state.
// ---- fagen/common/dropout.cuh ----------------------------------------------------------------------------
// Dropout of the weights that a thread holds of a key tile, in the accumulators' order. Nothing where none is wanted.
// ---- fagen/common/element.cuh ----------------------------------------------------------------------------
// The 16-bit element types and their packing into the 32-bit registers of the tensor cores.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

namespace fagen {

using half_t = __half;
using bfloat_t = __nv_bfloat16;

// Two neighbouring columns; the first one in the low half.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<bfloat_t>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

template <>
__device__ __forceinline__ uint32_t pack<half_t>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

}  // namespace fagen

// ---- fagen/common/philox.h -------------------------------------------------------------------------------
// The weights that dropout drops: random numbers by Philox4x32-7, for device and host alike. Plain C++.
//
// A weight's number depends on the seed, the offset, its head, row and key alone: never on tiles, warps or the kernel.
// One call of Philox gives 16 bytes, a byte a weight. They belong to rows 2 a, 2 a + 1, 2 a + 8, 2 a + 9 of a block of
// 16 rows, and to keys 2 b, 2 b + 1, 2 b + 8, 2 b + 9 of a block of 16 keys. Word 2 * (row % 2) + row / 8 has a row,
// and byte 2 * (key / 8) + key % 2 of it a key. Rows and keys are alike in that, and so are the threads of mma.sync and
// wgmma: whether the lines of a matrix are rows or keys, a lane and its neighbour of the next line share a call in each
// block. Each makes that of one of two blocks, and they exchange halves.
//
// ops/attention/dropout.py is the same in Python.
#include <stdint.h>

#ifdef __CUDACC__
#define FAGEN_SHARED __host__ __device__ __forceinline__
#else
#define FAGEN_SHARED inline
#endif

namespace fagen {

struct RandomWords {
  uint32_t word[4];
};

// The keys of the rounds, that follow from a 64-bit key.
constexpr int kRounds = 7;
struct RoundKeys {
  uint32_t key[kRounds][2];

  static FAGEN_SHARED RoundKeys of(uint64_t first) {
    RoundKeys keys;
    for (int round = 0; round < kRounds; ++round) {
      keys.key[round][0] = uint32_t(first) + round * 0x9E3779B9u;
      keys.key[round][1] = uint32_t(first >> 32) + round * 0xBB67AE85u;
    }
    return keys;
  }
};

struct WideProduct {
  uint32_t high, low;
};
FAGEN_SHARED WideProduct multiply_wide(uint32_t a, uint32_t b) {
  const uint64_t product = uint64_t(a) * b;
  return {uint32_t(product >> 32), uint32_t(product)};
}
constexpr uint32_t kFactorA = 0xD2511F53u, kFactorB = 0xCD9E8D57u;  // of the first and the third counter

// Philox4x32-7 of a 64-bit key and a 128-bit counter. `from`: rounds that were done before.
FAGEN_SHARED RandomWords philox(const RoundKeys& keys, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                int from = 0) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = from; round < kRounds; ++round) {
    const WideProduct a = multiply_wide(kFactorA, c0), b = multiply_wide(kFactorB, c2);
    c0 = b.high ^ c1 ^ keys.key[round][0], c1 = b.low;
    c2 = a.high ^ c3 ^ keys.key[round][1], c3 = a.low;
  }
  return {{c0, c1, c2, c3}};
}

// The first rounds of a row alone, and of a key alone: a thread computes them once where its calls have a row, or a
// key, in common.
struct RowPart {
  uint32_t low[2];  // of products of the first two rounds
  WideProduct third;  // of the third round
};
struct KeyPart {
  WideProduct second;
};

// The dropout of one head: bytes below `kept` keep their weight; `scale` makes up for the dropped ones.
struct Dropout {
  RoundKeys keys;
  uint32_t offset, plane, kept;
  float scale;
  uint32_t lower_bits, sign_bits;  // of 256 - kept, in each byte
  uint32_t limits, above;  // two half floats 1024 + kept; four of the upper bytes of 1024 to 1279

  // The rate is rounded to 1/256; only 0 drops nothing, and only 1 all.
  static FAGEN_SHARED uint32_t kept_of(float rate) {
    const int nearest = int((1.f - rate) * 256.f + 0.5f);
    if (rate <= 0.f || rate >= 1.f) return rate <= 0.f ? 256 : 0;
    return nearest < 1 ? 1 : nearest > 255 ? 255 : nearest;
  }
  static FAGEN_SHARED float scale_of(uint32_t kept) { return kept ? 256.f / float(kept) : 0.f; }

  template <class Params>
  static FAGEN_SHARED Dropout of(const Params& p, int64_t batch, int64_t head) {
    const uint32_t kept = kept_of(p.dropout), least = 256 - kept;
    const uint32_t lower = kept ? (least & 127) * 0x01010101u : 0x80808080u, sign = (least & 384) ? 0x80808080u : 0;
    return {RoundKeys::of(p.rng[0]),
            uint32_t(p.rng[1]),
            uint32_t(batch * p.heads + head),
            kept,
            scale_of(kept),
            lower,
            sign,
            (0x6400 + kept) * 0x10001u,
            0x64646464u};
  }

  // The number that a call counts a row, or a key, by: 4 for each 16.
  static FAGEN_SHARED uint32_t counter(int line) { return uint32_t(line) / 16 * 4 + uint32_t(line) % 8 / 2; }
  FAGEN_SHARED RowPart of_row(uint32_t counter) const {
    const WideProduct a = multiply_wide(kFactorA, counter), of_plane = multiply_wide(kFactorB, plane);
    const WideProduct b = multiply_wide(kFactorB, a.high ^ offset ^ keys.key[0][1]);
    return {{a.low, b.low}, multiply_wide(kFactorA, b.high ^ of_plane.low ^ keys.key[1][0])};
  }
  FAGEN_SHARED KeyPart of_key(uint32_t counter) const {
    const WideProduct of_plane = multiply_wide(kFactorB, plane);
    return {multiply_wide(kFactorA, of_plane.high ^ counter ^ keys.key[0][0])};
  }
  // Philox of the counters of a row and a key, the plane and the offset.
  FAGEN_SHARED RandomWords words(const RowPart& row, const KeyPart& key) const {
    const WideProduct b = multiply_wide(kFactorB, key.second.high ^ row.low[0] ^ keys.key[1][1]);
    return philox(keys, b.high ^ row.low[1] ^ keys.key[2][0], b.low, row.third.high ^ key.second.low ^ keys.key[2][1],
                  row.third.low, 3);
  }
  // The call that has row `row` and key `key`.
  FAGEN_SHARED RandomWords words(int row, int key) const { return words(of_row(counter(row)), of_key(counter(key))); }
  // Whether a byte of a word keeps its weight.
  FAGEN_SHARED bool keeps(uint32_t word, int byte) const { return (word >> (8 * byte) & 255) < kept; }
  // The sign bit of a byte is set where it drops its weight: where 256 - kept, added to it, carries.
  FAGEN_SHARED uint32_t dropped(uint32_t word) const {
    const uint32_t sum = (word & 0x7f7f7f7fu) + lower_bits;
    return (word & sign_bits) | (word & sum) | (sign_bits & sum);
  }

  // Whether a weight is kept: the definition.
  FAGEN_SHARED bool keeps_weight(int row, int key) const {
    return keeps(words(row, key).word[row % 2 * 2 + row / 8 % 2], key / 8 % 2 * 2 + key % 2);
  }
};

}  // namespace fagen

// ---- fagen/ptx/math.cuh ----------------------------------------------------------------------------------
// Single-instruction functions: of the special-function unit, and of half floats.
#include <stdint.h>

namespace fagen::ptx {

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two half floats: 1 where that of `limits` is the greater one by 1 or more, 0 where it is not greater.
__device__ __forceinline__ uint32_t are_below(uint32_t x, uint32_t limits) {
  uint32_t y;
  asm("sub.sat.f16x2 %0, %1, %2;" : "=r"(y) : "r"(limits), "r"(x));
  return y;
}

}  // namespace fagen::ptx

namespace fagen {

// All lanes have the same: said to the compiler, which then keeps the keys of the rounds in uniform registers.
__device__ __forceinline__ Dropout make_uniform(Dropout dropout) {
  const auto uniform = [](uint32_t x) { return __reduce_or_sync(~0u, x); };
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int half = 0; half < 2; ++half) dropout.keys.key[round][half] = uniform(dropout.keys.key[round][half]);
  dropout.offset = uniform(dropout.offset);
  dropout.limits = uniform(dropout.limits), dropout.above = uniform(dropout.above);
  return dropout;
}

// The numbers of a thread's weights in a block of 16 rows and 16 keys, or if kPairs in two of them one behind the
// other: two words for each block, of lines r and r + 8 of 16, a byte a weight of two pieces of 8 columns. Lines are
// rows of q. If kTransposed they are keys, and the words are of the two pieces, with two bytes a line. `odd`: whether
// the thread's line is. With kPairs neighbouring lines make a call each, the odd one that of the second block, and
// exchange halves.
template <bool kTransposed, bool kPairs>
__device__ __forceinline__ void draw_blocks(const Dropout& dropout, const RowPart& row, const KeyPart& key, bool odd,
                                            uint32_t (&words)[2][2]) {
  const RandomWords drawn = dropout.words(row, key);
  const auto half = [&](int r, bool of_odd) {
    const uint32_t first = drawn.word[r], second = drawn.word[2 + r];
    return kTransposed ? __byte_perm(first, second, of_odd ? 0x7351 : 0x6240) : of_odd ? second : first;
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t mine = half(r, odd);
    if constexpr (kPairs) {
      const uint32_t received = __shfl_xor_sync(~0u, half(r, !odd), 4);
      words[0][r] = odd ? received : mine, words[1][r] = odd ? mine : received;
    } else {
      words[0][r] = mine;
    }
  }
}

// One row, wherever it lies in its block.
__device__ __forceinline__ uint32_t draw_row(const Dropout& dropout, int row, const KeyPart& key) {
  const RandomWords drawn = dropout.words(dropout.of_row(Dropout::counter(row)), key);
  const bool odd = row % 2, upper = row / 8 % 2;
  const uint32_t first = odd ? drawn.word[2] : drawn.word[0], second = odd ? drawn.word[3] : drawn.word[1];
  return upper ? second : first;
}

// Factors of two neighbouring weights, as half floats: 1, or 0 where they are dropped. Their numbers are bytes 2 h and
// 2 h + 1 of a word.
__device__ __forceinline__ uint32_t kept_factors(const Dropout& dropout, uint32_t word, int h) {
  return ptx::are_below(__byte_perm(word, dropout.above, h ? 0x4342 : 0x4140), dropout.limits);
}
// Two weights of 16 bits times their factors. Read as bfloat16 the half float 1 is 2^-7: `scale_up_pairs` makes up.
template <class Element>
__device__ __forceinline__ uint32_t multiply_factors(uint32_t pair, uint32_t factors);
template <>
__device__ __forceinline__ uint32_t multiply_factors<half_t>(uint32_t pair, uint32_t factors) {
  __half2 x, y;
  memcpy(&x, &pair, 4), memcpy(&y, &factors, 4);
  x = __hmul2(x, y);
  memcpy(&pair, &x, 4);
  return pair;
}
template <>
__device__ __forceinline__ uint32_t multiply_factors<bfloat_t>(uint32_t pair, uint32_t factors) {
  __nv_bfloat162 x, y;
  memcpy(&x, &pair, 4), memcpy(&y, &factors, 4);
  x = __hmul2(x, y);
  memcpy(&pair, &x, 4);
  return pair;
}
template <class Element>
constexpr float kInverseFactor = 1.f;
template <>
inline constexpr float kInverseFactor<bfloat_t> = 128.f;

// kPairs: steps of 16 keys come by two. kRowsAligned: slabs of rows begin at multiples of 16.
template <class C, class Element, int kSlabs, bool kPairs, bool kRowsAligned = true, bool kDropout = C::kDropout>
struct TileDropout {
  template <class Params>
  __device__ __forceinline__ void set_head(const Params& p, int batch, int head) {}
  __device__ __forceinline__ void set_place(int row, int key) {}
  __device__ __forceinline__ uint32_t kept(uint32_t pair, int slab, int step, int i) const { return pair; }
};

template <class C, class Element, int kSlabs, bool kPairs, bool kRowsAligned>
struct TileDropout<C, Element, kSlabs, kPairs, kRowsAligned, true> {
  static constexpr bool kExchanged = kPairs && kRowsAligned;

  Dropout dropout;
  int row;                       // of this thread's first weight
  uint32_t key;                  // the counter of its first call
  RowPart of_rows[kSlabs];       // if they are aligned
  uint32_t words[kSlabs][2][2];  // of two steps, rows r and r + 8

  template <class Params>
  __device__ __forceinline__ void set_head(const Params& p, int batch, int head) {
    dropout = make_uniform(Dropout::of(p, batch, head));
  }
  // `row` and `key`: the first weight of the lane, in its first slab and piece.
  __device__ __forceinline__ void set_place(int first_row, int first_key) {
    row = first_row, key = Dropout::counter(first_key) + (kExchanged && row % 2 ? 4 : 0);
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
      if constexpr (kRowsAligned) of_rows[s] = dropout.of_row(Dropout::counter(row) + s * 4);
  }

  // Two neighbouring weights of 16 bits, or 0 in place of those that are dropped: register i of the `step`-th 16 keys
  // of a slab. Registers come in order.
  __device__ __forceinline__ uint32_t kept(uint32_t pair, int slab, int step, int i) {
    if (i == 0 && (step % 2 == 0 || !kExchanged)) draw(slab, step);
    const uint32_t word = words[slab][kExchanged ? step % 2 : 0][i % 2];
    return multiply_factors<Element>(pair, kept_factors(dropout, word, i / 2));
  }

 private:
  __device__ __forceinline__ void draw(int slab, int step) {
    const KeyPart of_key = dropout.of_key(key + step * 4);
    if constexpr (kRowsAligned)
      draw_blocks<false, kExchanged>(dropout, of_rows[slab], of_key, row % 2, words[slab]);
    else
#pragma unroll
      for (int r = 0; r < 2; ++r) words[slab][0][r] = draw_row(dropout, row + slab * 16 + r * 8, of_key);
  }
};

// A factor of O, or of dV, times what makes up for the weights that were dropped.
template <class C, class Params>
__device__ __forceinline__ float scale_up(const Params& p, float factor) {
  if constexpr (C::kDropout) factor *= Dropout::scale_of(Dropout::kept_of(p.dropout));
  return factor;
}
// The same where weights were multiplied by factors in pairs.
template <class C, class Element, class Params>
__device__ __forceinline__ float scale_up_pairs(const Params& p, float factor) {
  return scale_up<C>(p, C::kDropout ? factor * kInverseFactor<Element> : factor);
}

}  // namespace fagen


// ---- fagen/common/row_state.cuh --------------------------------------------------------------------------
// The state that a warp's rows carry from key tile to key tile: O, softmax, and what is done to the scores of a tile.
// ---- fagen/common/softmax.cuh ----------------------------------------------------------------------------
// Online softmax of the rows that a thread shares with the three other lanes of its quad.
#include <math.h>


namespace fagen {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Scores come in raw; `scale_log2` takes them to the base-2 logarithm inside the exponential's one FMA.
// `reference` is subtracted before the exponential: the row's maximum, or a value near enough below it.
// The sum stays per thread until the end. Any reference gives the same O / sum, so keeping an old one is exact.
//
// The FMA subtracts reference * scale as rounded to float32. The rounding multiplies all weights of a row alike and
// cancels in O / sum, unless it is of whole powers of two: from |reference * scale| = 2^24 on. Long before that,
// references count as too large for the FMA: they are subtracted from the scores first, which is exact near them. Such
// rows, like those that have seen no key, have no limit, so every tile takes the path where references move.
template <int kRows, bool kDeferred>
struct OnlineSoftmax {
  // a weight may grow to 2^8 before a deferred reference moves: exact in float32, safe in 16 bits
  static constexpr float kSlackLog2 = 8.f;
  // an offset up to here rounds by no more than 2^-10
  static constexpr float kLargestLog2 = 16384.f;
  // the reference of rows that have seen no key: finite, so that no tile has to ask; scores below it count as hidden
  static constexpr float kNoKeys = -1e30f;

  float reference[kRows], limit[kRows], offset[kRows], sum[kRows];
  float scale_log2;

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) { reset(); }

  // Rows that have seen no key.
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) reference[r] = kNoKeys, limit[r] = -INFINITY, sum[r] = 0.f;
  }

  // True if a row of this thread is above its reference by more than the slack.
  __device__ __forceinline__ bool exceeds_slack(const float (&tile_max)[kRows]) const {
    bool exceeds = !kDeferred;
#pragma unroll
    for (int r = 0; r < kRows; ++r) exceeds |= tile_max[r] > limit[r];
    return exceeds;
  }

  // Raise the references to the rows' maxima; the caller multiplies O by `factor`, as the sums are here.
  __device__ __forceinline__ void set_reference(const float (&row_max)[kRows], float (&factor)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float next = fmaxf(reference[r], row_max[r]);
      factor[r] = ptx::ex2((reference[r] - next) * scale_log2);
      reference[r] = next;
      sum[r] *= factor[r];
    }
    refresh_limit();
  }

  // Compute offsets and limits from the references.
  __device__ __forceinline__ void refresh_limit() {
    refresh_offset();
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      limit[r] = fabsf(offset[r]) > kLargestLog2 ? -INFINITY : reference[r] + kSlackLog2 / scale_log2;
  }
  // The offset is added to the scaled scores.
  __device__ __forceinline__ void refresh_offset() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) offset[r] = -reference[r] * scale_log2;
  }
  __device__ __forceinline__ bool offset_too_large() const {
    bool large = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) large |= fabsf(offset[r]) > kLargestLog2 && reference[r] != kNoKeys;
    return large;
  }

  // The weight of a score of row r.
  __device__ __forceinline__ float exponentiate(float score, int r) const {
    return ptx::ex2(fmaf(score, scale_log2, offset[r]));
  }

  // Log-sum-exp of row r, natural, given the whole row's sum.
  __device__ __forceinline__ float lse(int r, float row_sum) const {
    return row_sum == 0.f ? -INFINITY : reference[r] * scale_log2 * 0.69314718056f + logf(row_sum);
  }
};

}  // namespace fagen

// ---- fagen/mask/mask.cuh ---------------------------------------------------------------------------------
// A mask as a type: which elements of a row are visible, and the walk over the key tiles that a row tile sees.
//
//   BandMask       none, causal, window: one range of keys a row
//   IntervalMask   column intervals, within a band
// ---- fagen/mask/band.cuh ---------------------------------------------------------------------------------
// The band around the diagonal (causal and window masks, the end of the keys), and the key tiles that rows see of it.
#include <stdint.h>


namespace fagen {

constexpr int kFar = 1 << 29;  // beyond every index, and safe to add to one

// Row m sees keys [m + first, m + last] of the band, and no key at or past seqlen_k.
struct Band {
  int first, last, seqlen_k;

  __device__ __forceinline__ explicit Band(const fagen_forward_params& p) : seqlen_k(p.seqlen_k) {
    const int shift = p.seqlen_k - p.seqlen_q;
    first = p.window_left < 0 ? -kFar : shift - p.window_left;
    last = p.window_right < 0 ? kFar : shift + p.window_right;
  }
  // the first key of row m, and one past its last
  __device__ __forceinline__ int begin(int m) const { return max(0, m + first); }
  __device__ __forceinline__ int end(int m) const { return max(0, min(seqlen_k, m + last + 1)); }

  // The keys that row m sees, relative to a column of the tile that begins at a key.
  struct Columns {
    int begin, end;
  };
  __device__ __forceinline__ Columns visible_columns(int m, int key, int column) const {
    return {begin(m) - key - column, end(m) - key - column};
  }
};

// Tiles [begin, end) hold every visible element of rows [m0, m1); those of [full_begin, full_end) hold no hidden one.
// Tiles are visited from the last to the first.
struct TileRange {
  int begin, end, full_begin, full_end;

  template <int kTileN>
  static __device__ __forceinline__ TileRange of(const Band& band, int m0, int m1) {
    TileRange r;
    const int keys_end = band.end(m1 - 1);
    r.end = (keys_end + kTileN - 1) / kTileN;
    r.begin = min(band.begin(m0) / kTileN, r.end);
    r.full_end = max(r.begin, min(band.end(m0), band.seqlen_k) / kTileN);
    r.full_begin = min(r.full_end, max(r.begin, (band.begin(m1 - 1) + kTileN - 1) / kTileN));
    return r;
  }
};

}  // namespace fagen

// ---- fagen/mask/intervals.cuh ----------------------------------------------------------------------------
// FlashMask's column intervals: each key is hidden from up to two intervals of rows.
#include <limits.h>
#include <stdint.h>


namespace fagen {

// The minimum and maximum of an interval bound over one tile of keys.
struct Extent {
  int low, high;
};

// Rows [ls, le) and [us, ue) do not see a key.
struct HiddenRows {
  int ls, le, us, ue;
  __device__ __forceinline__ bool contains(int m) const { return (m >= ls && m < le) || (m >= us && m < ue); }
  // one of the two intervals covers all rows [m0, m1)
  __device__ __forceinline__ bool covers(int m0, int m1) const {
    return (m0 >= ls && m1 <= le) || (m0 >= us && m1 <= ue);
  }
  __device__ __forceinline__ bool equals(const HiddenRows& other) const {
    return ls == other.ls && le == other.le && us == other.us && ue == other.ue;
  }
};

// The interval vectors of a mask head.
__device__ __forceinline__ const int32_t* bounds_of(const fagen_forward_params& p, int batch, int head) {
  const fagen_tensor& t = p.intervals;
  return static_cast<const int32_t*>(t.data) + batch * t.stride[0] + head * t.stride[1];
}

// A head's interval vectors, and their extents tile by tile.
template <class C>
struct Intervals {
  static constexpr int kColumns = C::kIntervalColumns;
  const int32_t* bounds;   // (seqlen_k, kColumns), keys `stride` apart
  int64_t stride;
  const Extent* extents;   // (tiles, kColumns)
  int last_key;

  // A bound that the vectors do not carry is a constant, and its comparisons fold away.
  template <int kColumn>
  __device__ __forceinline__ Extent extent(int tile, int absent) const {
    if constexpr (kColumn < 0)
      return {absent, absent};
    else
      return extents[tile * kColumns + kColumn];
  }
  template <int kColumn>
  __device__ __forceinline__ int bound(int key, int absent) const {
    if constexpr (kColumn < 0)
      return absent;
    else
      return bounds[key * stride + kColumn];
  }
  __device__ __forceinline__ HiddenRows at(int key) const {
    return {bound<C::kLTS>(key, kFar), bound<C::kLTE>(key, kFar), bound<C::kUTS>(key, -kFar),
            bound<C::kUTE>(key, -kFar)};
  }

  // Rows [m0, m1) against a tile of keys: no element is visible, or some element is hidden.
  __device__ __forceinline__ void classify(int tile, int m0, int m1, bool& empty, bool& partial) const {
    const Extent ls = extent<C::kLTS>(tile, kFar), le = extent<C::kLTE>(tile, kFar);
    const Extent us = extent<C::kUTS>(tile, -kFar), ue = extent<C::kUTE>(tile, -kFar);
    empty = (m0 >= ls.high && m1 <= le.low) || (m0 >= us.high && m1 <= ue.low);
    partial = (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
  }
};

// Extents of every tile of keys: one warp a tile, one pass over the vectors. The body of a kernel of its own.
template <class C>
__device__ __forceinline__ void find_extents(const fagen_forward_params& p, Extent* extents, int tiles) {
  constexpr int kColumns = C::kIntervalColumns;
  const int64_t index = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (index >= int64_t(p.batch) * p.mask_heads * tiles) return;
  const int tile = index % tiles, head = index / tiles % p.mask_heads, batch = index / tiles / p.mask_heads;
  const int32_t* bounds = bounds_of(p, batch, head);
  const int end = min(p.seqlen_k, (tile + 1) * C::kTileN);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    int low = INT_MAX, high = INT_MIN;
    for (int key = tile * C::kTileN + lane; key < end; key += 32) {
      const int value = bounds[key * p.intervals.stride[2] + c];
      low = min(low, value);
      high = max(high, value);
    }
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (lane == 0) extents[index * kColumns + c] = {low, high};
  }
}

}  // namespace fagen

namespace fagen {

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

template <class C>
struct BandMask {
  static constexpr bool kIntervals = false;
  static constexpr bool kHasBegin = C::kMask == Mask::window;  // rows may not see the first keys
  static constexpr bool kHasEnd = C::kMask != Mask::none;      // nor the last ones
  Band band;

  // The walk over a row tile's key tiles, and its present one.
  struct Walk {
    int tile, begin;

    __device__ __forceinline__ bool valid() const { return tile >= begin; }
    __device__ __forceinline__ bool partial(const TileRange& range) const {
      return tile < range.full_begin || tile >= range.full_end;
    }
    __device__ __forceinline__ void advance() { --tile; }

    // Call visit(tile, partial) for the rest of the walk, with a loop of its own for tiles that need no mask.
    template <class Visit>
    __device__ __forceinline__ void visit_rest(const TileRange& range, Visit visit) {
      for (; valid() && tile >= range.full_end; advance()) visit(tile, Constant<true>{});
      for (; tile >= range.full_begin; advance()) visit(tile, Constant<false>{});
      if constexpr (kHasBegin)
        for (; valid(); advance()) visit(tile, Constant<true>{});
    }
  };

  __device__ __forceinline__ explicit BandMask(const fagen_forward_params& p) : band(p) {}
  __device__ __forceinline__ Walk walk(const TileRange& range, int, int) const { return {range.end - 1, range.begin}; }
};

template <class C>
struct IntervalMask {
  static constexpr bool kIntervals = true, kHasBegin = true, kHasEnd = true;
  Band band;
  Intervals<C> intervals;

  // The same walk. The lanes of a warp classify 32 tiles at once; the visible ones are then taken from the last to the
  // first.
  struct Walk {
    const Intervals<C>& intervals;
    TileRange range;
    int m0, m1, group;      // tiles [group, group + 32) are classified
    uint32_t seen, hidden;  // bits of tiles still to visit, and of those that need the mask
    int tile;               // present tile, or -1

    __device__ __forceinline__ Walk(const Intervals<C>& intervals, TileRange range, int m0, int m1)
        : intervals(intervals), range(range), m0(m0), m1(m1), group(range.end), seen(0), hidden(0) {
      advance();
    }
    __device__ __forceinline__ bool valid() const { return tile >= 0; }
    __device__ __forceinline__ bool partial(const TileRange&) const {
      return tile < range.full_begin || tile >= range.full_end || (hidden >> (tile - group) & 1);
    }
    __device__ __forceinline__ void advance() {
      while (seen == 0) {
        if (group <= range.begin) {
          tile = -1;
          return;
        }
        group -= 32;
        const int mine = group + int(threadIdx.x % 32);
        bool empty = true, partly = false;
        if (mine >= range.begin && mine < range.end) intervals.classify(mine, m0, m1, empty, partly);
        seen = __ballot_sync(~0u, !empty);
        hidden = __ballot_sync(~0u, partly);
      }
      const int bit = 31 - __clz(seen);
      seen ^= 1u << bit;
      tile = group + bit;
    }
    template <class Visit>
    __device__ __forceinline__ void visit_rest(const TileRange&, Visit visit) {
      for (; valid(); advance()) partial(range) ? visit(tile, Constant<true>{}) : visit(tile, Constant<false>{});
    }
  };

  __device__ __forceinline__ explicit IntervalMask(const fagen_forward_params& p) : band(p) {}
  __device__ __forceinline__ Walk walk(const TileRange& range, int m0, int m1) const {
    return Walk(intervals, range, m0, m1);
  }
};

// The config's mask.
template <class C, bool kIntervals = C::kMask == Mask::intervals>
struct SelectMask {
  using Type = BandMask<C>;
};
template <class C>
struct SelectMask<C, true> {
  using Type = IntervalMask<C>;
};
template <class C>
using MaskOf = typename SelectMask<C>::Type;

}  // namespace fagen

namespace fagen {

// Changes of a score beyond the product: softcap, ALiBi. With either, scores are turned to base-2 logarithms here, and
// the softmax's own scale is 1.
template <class C>
struct ScoreMod {
  static constexpr bool kActive = C::kSoftcap || C::kAlibi;
  static constexpr float kLog2e = 1.4426950408889634f;
  float scale, cap_log2, slope_log2;
  int shift;

  __device__ __forceinline__ ScoreMod(const fagen_forward_params& p, int batch, int head)
      : shift(p.seqlen_k - p.seqlen_q) {
    scale = C::kSoftcap ? p.scale / p.softcap : p.scale * kLog2e;
    cap_log2 = p.softcap * kLog2e;
    const float* slopes = static_cast<const float*>(p.alibi_slopes.data);
    slope_log2 = C::kAlibi ? slopes[batch * p.alibi_slopes.stride[0] + head] * kLog2e : 0.f;
  }
  static __device__ __forceinline__ float softmax_scale_log2(const fagen_forward_params& p) {
    return kActive ? 1.f : p.scale * kLog2e;
  }
  __device__ __forceinline__ float operator()(float score, int m, int key) const {
    score *= scale;
    if constexpr (C::kSoftcap) score = cap_log2 * ptx::tanh_approx(score);
    if constexpr (C::kAlibi) score -= slope_log2 * fabsf(float(m + shift - key));
    return score;
  }
};

// A thread's place in an accumulator piece of 16 rows and 8 columns: it holds rows `row` and `row` + 8, columns
// `column` and `column` + 1.
struct Lane {
  int id = threadIdx.x % 32;
  int row = id / 4, column = id % 4 * 2;
};

template <int kPieces>
__device__ __forceinline__ void clear(float (&pieces)[kPieces][4]) {
#pragma unroll
  for (auto& piece : pieces) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
}

// kSlabs slabs of 16 rows: kColumns columns of O, unnormalised, in accumulators, and the softmax. kKeys keys a tile.
template <class C, int kSlabs, int kKeys, int kColumns>
struct RowState {
  static constexpr int kRows = kSlabs * 2;  // rows a thread shares
  using Scores = float[kSlabs][kKeys / 8][4];
  using Softmax = OnlineSoftmax<kRows, C::kRescale == Rescale::deferred>;

  Lane lane;
  float o[kSlabs][kColumns / 8][4];
  Softmax softmax;

  __device__ __forceinline__ explicit RowState(const fagen_forward_params& p)
      : softmax(ScoreMod<C>::softmax_scale_log2(p)) {
#pragma unroll
    for (auto& slab : o) clear(slab);
  }

  // Score mods alone. `m` is the warp's first row of q, `key` its first key.
  __device__ __forceinline__ void apply_score_mod(Scores& s_acc, const ScoreMod<C>& mod, int m, int key) {
    if constexpr (ScoreMod<C>::kActive) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = m + s * 16 + half * 8 + lane.row;
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& score = s_acc[s][n][half * 2 + e];
              score = mod(score, row, key + lane.column + n * 8 + e);
            }
        }
    }
  }

  // Score mods and, on partial tiles, the mask. `m` is the warp's first row of q, `key` its first key.
  template <bool kMasked>
  __device__ __forceinline__ void modify(Scores& s_acc, const ScoreMod<C>& mod, const MaskOf<C>& mask, int m, int key) {
    if constexpr (kMasked || ScoreMod<C>::kActive) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = m + s * 16 + half * 8 + lane.row;
          // thresholds relative to the thread's first column: one comparison with a constant a side
          const Band::Columns visible = mask.band.visible_columns(row, key, lane.column);
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& score = s_acc[s][n][half * 2 + e];
              if constexpr (ScoreMod<C>::kActive) score = mod(score, row, key + lane.column + n * 8 + e);
              if constexpr (kMasked) {
                bool hidden = n * 8 + e >= visible.end;
                if constexpr (MaskOf<C>::kHasBegin) hidden |= n * 8 + e < visible.begin;
                if (hidden) score = -INFINITY;
              }
            }
        }
      if constexpr (kMasked && MaskOf<C>::kIntervals) hide_intervals(s_acc, mask.intervals, m, key);
    }
  }

  __device__ __forceinline__ void hide_intervals(Scores& s_acc, const Intervals<C>& intervals, int m, int key) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = min(key + lane.column + n * 8 + e, intervals.last_key);
        const HiddenRows hidden = intervals.at(column);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (hidden.contains(m + s * 16 + half * 8 + lane.row)) s_acc[s][n][half * 2 + e] = -INFINITY;
      }
  }

  __device__ __forceinline__ void thread_maxima(const Scores& s_acc, float (&tile_max)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      tile_max[r] = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
        tile_max[r] = fmaxf(tile_max[r], fmaxf(s_acc[r / 2][n][r % 2 * 2], s_acc[r / 2][n][r % 2 * 2 + 1]));
    }
  }

  // Take a new tile's maxima into the softmax; O follows.
  __device__ __forceinline__ void update_max(Scores& s_acc) {
    float tile_max[kRows], factor[kRows];
    thread_maxima(s_acc, tile_max);
    if (__any_sync(~0u, softmax.exceeds_slack(tile_max))) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) tile_max[r] = quad_max(tile_max[r]);
      set_reference(s_acc, tile_max, factor);
      rescale(factor);
    } else {
      softmax.refresh_offset();
    }
  }

  // Raise the references to the rows' maxima, and subtract those that are too large for the exponential's FMA from the
  // scores. Score mods leave a scale of 1, by which no product rounds.
  __device__ __forceinline__ void set_reference(Scores& s_acc, const float (&row_max)[kRows], float (&factor)[kRows]) {
    softmax.set_reference(row_max, factor);
    if constexpr (!ScoreMod<C>::kActive)
      while (__any_sync(~0u, softmax.offset_too_large())) {  // once; as a loop it stays out of the common tile's way
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (auto& piece : s_acc[r / 2])
            piece[r % 2 * 2] -= softmax.reference[r], piece[r % 2 * 2 + 1] -= softmax.reference[r];
          softmax.offset[r] = 0.f;
        }
      }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (auto& piece : o[r / 2]) piece[r % 2 * 2] *= factor[r], piece[r % 2 * 2 + 1] *= factor[r];
  }
};

}  // namespace fagen

// ---- fagen/ptx/mma_sync.cuh ------------------------------------------------------------------------------
// Tensor-core products of one warp (sm_80 and up): m16n8k16, 16-bit operands, float32 sums; and their operand loads.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace fagen::ptx {

// c += a b. Lane l holds of c: rows l/4 and l/4+8, columns 2(l%4) and +1, as (r,c) (r,c+1) (r+8,c) (r+8,c+1).
template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Load four 8x8 matrices; lanes 8i..8i+7 give the row addresses of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

}  // namespace fagen::ptx

namespace fagen {

// This lane's address of a 16 x 16 piece for ldmatrix, rows down, pieces across: q, and v transposed on the way.
template <class Tile>
__device__ __forceinline__ uint32_t row_major_address(const Lane& lane, uint32_t tile, int row) {
  return tile + Tile::offset(row + lane.id % 16, lane.id / 16);
}
// The same of a 16 x 16 piece whose rows are the product's columns: k.
template <class Tile>
__device__ __forceinline__ uint32_t column_major_address(const Lane& lane, uint32_t tile, int row) {
  return tile + Tile::offset(row + lane.id / 16 * 8 + lane.id % 8, lane.id / 8 % 2);
}

template <class C, class Element, class TileQ, class TileK, class TileV, int kSlabs, int kKeys, int kColumns>
struct WarpProducts : RowState<C, kSlabs, kKeys, kColumns> {
  using State = RowState<C, kSlabs, kKeys, kColumns>;
  using Scores = typename State::Scores;
  using Weights = uint32_t[kKeys / 16][kSlabs][4];
  using State::lane;
  using State::o;
  using State::softmax;
  static constexpr int kDepth = C::kHeadDim / 16;
  static constexpr bool kQInRegisters = C::kQSource == QSource::registers;

  uint32_t q_registers[kSlabs][kQInRegisters ? kDepth : 1][4];
  TileDropout<C, Element, kSlabs, kKeys % 32 == 0> dropout;

  __device__ __forceinline__ WarpProducts(const fagen_forward_params& p, int batch, int head) : State(p) {
    dropout.set_head(p, batch, head);
  }

  // Score mods and the mask on the scores of a tile, whose place in the matrix is known from then on.
  template <bool kMasked>
  __device__ __forceinline__ void modify(Scores& s_acc, const ScoreMod<C>& mod, const MaskOf<C>& mask, int m, int key) {
    State::template modify<kMasked>(s_acc, mod, mask, m, key);
    dropout.set_place(m + lane.row, key + lane.column);
  }

  __device__ __forceinline__ void load_q_registers(uint32_t q_tile, int first_row) {
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int d = 0; d < kDepth; ++d)
          ptx::ldmatrix_x4(q_registers[s][d],
                           TileQ::step(row_major_address<TileQ>(lane, q_tile, first_row), s * 16, d));
    }
  }

  // One step of S = Q K^T: the 16 columns of q and k that start at 16 d.
  template <class Between>
  __device__ __forceinline__ void score_step(Scores& s_acc, uint32_t q_lane, uint32_t k_lane, int d, Between between) {
    uint32_t q_frag[kSlabs][4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      if constexpr (kQInRegisters)
        for (int i = 0; i < 4; ++i) q_frag[s][i] = q_registers[s][d][i];
      else
        ptx::ldmatrix_x4(q_frag[s], TileQ::step(q_lane, s * 16, d));
    }
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t k_frag[4];
      ptx::ldmatrix_x4(k_frag, TileK::step(k_lane, n * 16, d));
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        ptx::mma_m16n8k16<Element>(s_acc[s][2 * n], q_frag[s], k_frag[0], k_frag[1]);
        ptx::mma_m16n8k16<Element>(s_acc[s][2 * n + 1], q_frag[s], k_frag[2], k_frag[3]);
      }
      between(d * (kKeys / 16) + n);
    }
  }

  // S = Q K^T for the warp's rows and the kKeys keys that start at row `first_key` of the tile. `between` is called
  // kDepth * kKeys / 16 times with its number, to fill the gaps between products.
  template <class Between>
  __device__ __forceinline__ void compute_scores(Scores& s_acc, uint32_t q_tile, int first_row, uint32_t k_tile,
                                                 int first_key, Between between) {
    const uint32_t q_lane = row_major_address<TileQ>(lane, q_tile, first_row);
    const uint32_t k_lane = column_major_address<TileK>(lane, k_tile, first_key);
#pragma unroll
    for (auto& slab : s_acc)
#pragma unroll
      for (auto& piece : slab) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) score_step(s_acc, q_lane, k_lane, d, between);
  }

  // One register of P = exp(S - reference): two columns of row i % 2 of piece 2 n + i / 2. The accumulator of S already
  // has the order of P's operand.
  __device__ __forceinline__ void exponentiate(const Scores& s_acc, Weights& p_frag, int s, int n, int i) {
    const float* pair = &s_acc[s][2 * n + i / 2][i % 2 * 2];
    const int r = s * 2 + i % 2;
    const float first = softmax.exponentiate(pair[0], r), second = softmax.exponentiate(pair[1], r);
    softmax.sum[r] += first + second;
    p_frag[n][s][i] = dropout.kept(pack<Element>(first, second), s, n, i);
  }

  // O += P V for 16 keys: `p_frag` their weights, `v_lane` this lane's address of their first 16 columns of v.
  __device__ __forceinline__ void value_step(const uint32_t (&p_frag)[kSlabs][4], uint32_t v_lane) {
#pragma unroll
    for (int d = 0; d < kColumns / 16; ++d) {
      uint32_t v_frag[4];
      ptx::ldmatrix_x4_trans(v_frag, TileV::step(v_lane, 0, d));
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        ptx::mma_m16n8k16<Element>(o[s][2 * d], p_frag[s], v_frag[0], v_frag[1]);
        ptx::mma_m16n8k16<Element>(o[s][2 * d + 1], p_frag[s], v_frag[2], v_frag[3]);
      }
    }
  }

  // The whole softmax and second product of a tile.
  __device__ __forceinline__ void add_values(Scores& s_acc, uint32_t v_tile, int first_key) {
    this->update_max(s_acc);
    const uint32_t v_lane = row_major_address<TileV>(lane, v_tile, first_key);
    Weights p_frag;
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) exponentiate(s_acc, p_frag, s, n, i);
      value_step(p_frag[n], v_lane + n * 16 * TileV::kPitch);
    }
  }

  // O += P V of one tile while S of the next is computed: the exponentials fill the gaps between its products.
  __device__ __forceinline__ void add_values_under_scores(const Scores& s_acc, uint32_t v_tile, Scores& s_next,
                                                          uint32_t q_tile, int first_row, uint32_t k_next,
                                                          int first_key) {
    constexpr int kWeights = kKeys / 16 * kSlabs * 4, kGaps = kDepth * (kKeys / 16);
    Weights p_frag;
    compute_scores(s_next, q_tile, first_row, k_next, first_key, [&](int gap) {
#pragma unroll
      for (int w = gap * kWeights / kGaps; w < (gap + 1) * kWeights / kGaps; ++w)
        exponentiate(s_acc, p_frag, w / 4 % kSlabs, w / 4 / kSlabs, w % 4);
    });
    const uint32_t v_lane = row_major_address<TileV>(lane, v_tile, first_key);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) value_step(p_frag[n], v_lane + n * 16 * TileV::kPitch);
  }
};

}  // namespace fagen

// ---- fagen/ptx/barrier.cuh -------------------------------------------------------------------------------
// Named barriers among some of a block's warps (1-15; 0 is __syncthreads).

namespace fagen::ptx {

// Wait for `threads` threads on barrier `id`, and order their shared-memory accesses.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same; returns whether `vote` is true in any of them.
__device__ __forceinline__ bool barrier_any(int id, int threads, bool vote) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.s32 mine, %3, 0;\n"
      "barrier.red.or.pred all, %1, %2, mine;\n"
      "selp.s32 %0, 1, 0, all;\n"
      "}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(int(vote))
      : "memory");
  return any != 0;
}

}  // namespace fagen::ptx

// ---- fagen/schedule/tile_order.cuh -----------------------------------------------------------------------
// The order in which row tiles are worked through: by batch, head and row, or the longest rows first.
#include <stdint.h>


namespace fagen {

struct TileCoord {
  int row_tile, head, batch;
};

// Division by a number that the host knows before a launch, as a product and a shift, of a number below 2^31.
struct Divisor {
  uint32_t by, shift, factor;

  Divisor() = default;
  explicit Divisor(uint32_t by) : by(by), shift(31) {
    while (1ull << (shift - 31) < by) ++shift;
    factor = uint32_t(((1ull << shift) + by - 1) / by);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const { return uint64_t(n) * factor >> shift; }
  __device__ __forceinline__ uint32_t remainder(uint32_t n, uint32_t quotient) const { return n - quotient * by; }
};

// The `index`-th tile of the order, by divisions, for kernels that find one tile a block. `heads_at_once` (sectioned
// order): as many heads as have their keys and values in L2 together.
template <BlockOrder kOrder>
__device__ __forceinline__ TileCoord tile_at(const fagen_forward_params& p, uint32_t index, int row_tiles,
                                             int heads_at_once) {
  const uint32_t heads = p.heads * p.batch;
  uint32_t row, head;
  if constexpr (kOrder == BlockOrder::ascending || kOrder == BlockOrder::descending) {
    row = index % row_tiles;
    head = index / row_tiles;
    if (kOrder == BlockOrder::descending) row = row_tiles - 1 - row;
  } else {  // longest rows of all heads first, section of heads by section
    const uint32_t section = kOrder == BlockOrder::sectioned ? heads_at_once : heads;
    const uint32_t number = index / (section * row_tiles);
    const uint32_t here = min(section, heads - number * section), rest = index - number * section * row_tiles;
    head = number * section + rest % here;
    row = row_tiles - 1 - rest / here;
  }
  return {int(row), int(head % p.heads), int(head / p.heads)};
}

// The same order for kernels whose blocks look for tile after tile: the host prepares the divisors, and the device
// divides nothing.
struct TileOrder {
  Divisor heads, row_tiles;       // heads per batch, row tiles per head
  Divisor section, last_section;  // heads per section, heads in the last one
  Divisor section_tiles;          // row tiles per section
  uint32_t last;                  // the first tile of the last section

  TileOrder() = default;
  template <BlockOrder kOrder>
  static TileOrder of(int row_tiles, int heads, int batch, int heads_at_once) {
    const uint32_t all = heads * batch, section = kOrder == BlockOrder::sectioned ? heads_at_once : all;
    const uint32_t before = (all - 1) / section * section;  // heads before the last section
    TileOrder order;
    order.heads = Divisor(heads), order.row_tiles = Divisor(row_tiles);
    order.section = Divisor(section), order.last_section = Divisor(all - before);
    order.section_tiles = Divisor(section * row_tiles), order.last = before * row_tiles;
    return order;
  }

  template <BlockOrder kOrder>
  __device__ __forceinline__ TileCoord tile_at(uint32_t index) const {
    uint32_t row, head;
    if constexpr (kOrder == BlockOrder::ascending || kOrder == BlockOrder::descending) {
      head = row_tiles.quotient(index), row = row_tiles.remainder(index, head);
      if (kOrder == BlockOrder::descending) row = row_tiles.by - 1 - row;
    } else {  // longest rows of all heads first, section of heads by section
      const uint32_t number = section_tiles.quotient(index), rest = section_tiles.remainder(index, number);
      const Divisor& here = index < last ? section : last_section;
      const uint32_t turn = here.quotient(rest);
      head = number * section.by + here.remainder(rest, turn);
      row = row_tiles.by - 1 - turn;
    }
    const uint32_t batch = heads.quotient(head);
    return {int(row), int(heads.remainder(head, batch)), int(batch)};
  }
};

}  // namespace fagen

// ---- fagen/sm80/copy.cuh ---------------------------------------------------------------------------------
// Tiles from global to shared memory, copied by all threads of a block together.
#include <stdint.h>

// ---- fagen/ptx/cp_async.cuh ------------------------------------------------------------------------------
// Asynchronous copies from global to shared memory (sm_80 and up).
#include <stdint.h>

namespace fagen::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copy 16 bytes, not through L1; where `valid` is false nothing is read and zeros are written.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most kPending of this thread's newest groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void st_shared_16(uint32_t to, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint4 ld_shared_16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ void st_shared_4(uint32_t to, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

}  // namespace fagen::ptx

namespace fagen {

// A matrix in global memory whose rows are `stride` elements apart; rows and columns outside read as zero.
template <class Element>
struct GlobalMatrix {
  const Element* base;
  int64_t stride;
  int rows, cols;  // a tile may be wider
};

template <class Element>
__device__ __forceinline__ uint4 gather_chunk(const Element* from, int count) {
  union {
    Element e[8];
    uint4 all;
  } chunk;
  chunk.all = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) chunk.e[i] = from[i];
  return chunk.all;
}

// Start copying tile rows [first, first + kRows) to shared memory; complete after cp_async_wait and a barrier.
template <class Tile, int kRows, int kThreads, bool kAligned, class Element>
__device__ __forceinline__ void load_tile(uint32_t to, const GlobalMatrix<Element>& from, int first, int thread) {
  constexpr int kChunks = Tile::kChunks;
  constexpr int kCount = kRows * kChunks;
  constexpr bool kSameColumn = kThreads % kChunks == 0;  // each thread stays in one column of chunks
  constexpr int kRowStep = kSameColumn ? kThreads / kChunks : 0;
  if constexpr (kSameColumn && kAligned) {
    const int chunk = thread % kChunks;
    const bool in_columns = chunk * 8 < from.cols;
    int row = thread / kChunks;
    const Element* source = from.base + (first + row) * from.stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < (kRows + kRowStep - 1) / kRowStep; ++i) {
      if (kRows % kRowStep == 0 || row < kRows)
        ptx::cp_async_16(to + Tile::offset(row, chunk), source, in_columns && first + row < from.rows);
      row += kRowStep;
      source += kRowStep * from.stride;
    }
  } else {
#pragma unroll 4
    for (int i = thread; i < kCount; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool there = first + row < from.rows && chunk * 8 < from.cols;
      const Element* source = from.base + (there ? (first + row) * from.stride + chunk * 8 : 0);
      const uint32_t at = to + Tile::offset(row, chunk);
      if constexpr (kAligned)
        ptx::cp_async_16(at, source, there);
      else
        ptx::st_shared_16(at, gather_chunk(source, there ? from.cols - chunk * 8 : 0));
    }
  }
}

}  // namespace fagen

// ---- fagen/sm80/smem_tile.cuh ----------------------------------------------------------------------------
// The layout of a tile in shared memory: eight rows of one 16-byte column fall into different banks.
#include <stdint.h>

namespace fagen {

// kSwizzled: the 16-byte pieces of a row are exchanged by bits of the row number; else each row is 16 bytes longer.
template <int kRows, int kCols, bool kSwizzled>
struct SmemTile {
  static constexpr int kChunks = kCols / 8;  // 16-byte pieces of a row
  static constexpr int kPitch = kCols * 2 + (kSwizzled ? 0 : 16);
  static constexpr int kBytes = kRows * kPitch;

  // as many exchanged bits as the row's length leaves free: 3 for multiples of 64 columns, 2 for 32, 1 for 16
  static constexpr int kBits = !kSwizzled ? 0 : kChunks % 8 == 0 ? 3 : kChunks % 4 == 0 ? 2 : 1;
  static constexpr uint32_t kExchanged = ((1u << kBits) - 1u) << 4;
  static_assert(kCols % 16 == 0, "rows are whole 32-byte pieces");

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    const int exchange = kSwizzled ? (row >> (3 - kBits)) & ((1 << kBits) - 1) : 0;
    return row * kPitch + ((chunk ^ exchange) << 4);
  }

  // From the address of (row, chunk 0 or 1) to (row + down, chunk + 2 * right); `down` is a multiple of 8.
  static __device__ __forceinline__ uint32_t step(uint32_t address, int down, int right) {
    const uint32_t across = right * 32;
    return (address ^ (across & kExchanged)) + (across & ~kExchanged) + down * kPitch;
  }
};

}  // namespace fagen

namespace fagen {

constexpr int larger(int a, int b) { return a > b ? a : b; }

// Sizes that follow from the config; Python derives the same ones, and the asserts below hold the two together.
template <class C>
struct BlockShape {
  static constexpr int kThreads = C::kWarps * 32;
  static constexpr bool kSplitKeys = C::kPartition == Partition::split_k;
  static constexpr bool kPairs = C::kPartition == Partition::pairs;
  // a warp's share: rows of q, keys of a tile (for S), columns of v (for O)
  static constexpr int kWarpRows = kSplitKeys ? C::kTileM : C::kTileM / C::kWarps * (kPairs ? 2 : 1);
  static constexpr int kWarpKeys = kSplitKeys ? C::kTileN / C::kWarps : C::kTileN / (kPairs ? 2 : 1);
  static constexpr int kWarpColumns = C::kHeadDimV / (kPairs ? 2 : 1);
  static constexpr int kSlabs = kWarpRows / 16;
  static_assert(kWarpRows % 16 == 0 && kWarpKeys % 16 == 0 && kWarpColumns % 16 == 0,
                "a warp's share is made of 16 x 16 pieces");

  static constexpr bool kSwizzled = C::kSmemLayout == SmemLayout::swizzled;
  using TileQ = SmemTile<C::kTileM, C::kHeadDim, kSwizzled>;
  using TileK = SmemTile<C::kTileN, C::kHeadDim, kSwizzled>;
  using TileV = SmemTile<C::kTileN, C::kHeadDimV, kSwizzled>;
  using TileO = SmemTile<C::kTileM, C::kHeadDimV, kSwizzled>;

  // q held in registers passes through the stages before the first keys arrive, so it needs no room of its own
  static constexpr bool kQAliasesStages = C::kLoopOrder == LoopOrder::q_outer && C::kQSource == QSource::registers;
  static constexpr int kStageBytes = TileK::kBytes + TileV::kBytes;
  static constexpr int kStagesBegin = kQAliasesStages ? 0 : TileQ::kBytes;  // the stages of K and V
  static constexpr int kStagesEnd = kStagesBegin + C::kStages * kStageBytes;
  // pairs: the weights that two warps exchange, and their rows' maxima and sums
  using TileP = SmemTile<C::kTileM, C::kTileN, kSwizzled>;
  static constexpr int kPairStats = kStagesEnd + (kPairs ? TileP::kBytes : 0);
  static constexpr int kPairEnd = kPairStats + (kPairs ? 2 * C::kTileM * 4 : 0);
  static constexpr int kMergeStats = C::kTileM * C::kHeadDimV * 4;  // split_k: sums of O, then maxima and sums
  static constexpr int kMergeBytes = kSplitKeys ? kMergeStats + C::kWarps * C::kTileM * 8 : 0;
  static constexpr int kSmemBytes = larger(larger(kPairEnd, TileQ::kBytes), larger(TileO::kBytes, kMergeBytes));

  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
};

// Computed once on the host for a launch.
struct GridArgs {
  int row_tiles;       // per head
  int blocks_of_rows;  // blocks a head gets: row_tiles, or fewer when a block loops over rows
  int key_tiles;
  int heads_at_once;   // sectioned order
  Extent* extents;     // intervals: of each key tile
  float4* state;       // kv_outer: O, maxima and sums between the passes
};

template <class C, class Element>
struct Block {
  using S = BlockShape<C>;
  using State = WarpProducts<C, Element, typename S::TileQ, typename S::TileK, typename S::TileV, S::kSlabs,
                             S::kWarpKeys, S::kWarpColumns>;

  const fagen_forward_params& p;
  const GridArgs& grid;
  TileCoord coord;
  int warp, first_row, first_key, first_column;  // the warp's share of the tiles
  uint32_t smem;
  unsigned char* smem_bytes;
  GlobalMatrix<Element> q, k, v;
  MaskOf<C> mask;
  ScoreMod<C> mod;

  __device__ __forceinline__ Block(const fagen_forward_params& p, const GridArgs& grid, unsigned char* shared)
      : p(p),
        grid(grid),
        coord(tile_at<C::kBlockOrder>(p, blockIdx.x, grid.blocks_of_rows, grid.heads_at_once)),
        warp(__shfl_sync(~0u, threadIdx.x / 32, 0)),  // warp-uniform for the compiler as well
        smem(ptx::shared_address(shared)),
        smem_bytes(shared),
        mask(p),
        mod(p, coord.batch, coord.head) {
    first_row = S::kSplitKeys ? 0 : (S::kPairs ? warp / 2 : warp) * S::kWarpRows;
    first_key = S::kSplitKeys ? warp * S::kWarpKeys : S::kPairs ? warp % 2 * S::kWarpKeys : 0;
    first_column = S::kPairs ? warp % 2 * S::kWarpColumns : 0;
    const int kv_head = coord.head / (p.heads / p.kv_heads);
    q = matrix(p.q.data, p.q.stride, coord.head, p.seqlen_q, p.head_dim);
    k = matrix(p.k.data, p.k.stride, kv_head, p.seqlen_k, p.head_dim);
    v = matrix(p.v.data, p.v.stride, kv_head, p.seqlen_k, p.head_dim_v);
    if constexpr (MaskOf<C>::kIntervals) {
      const int head = p.mask_heads == 1 ? 0 : kv_head;
      mask.intervals.bounds = bounds_of(p, coord.batch, head);
      mask.intervals.stride = p.intervals.stride[2];
      mask.intervals.extents =
          grid.extents + int64_t(coord.batch * p.mask_heads + head) * grid.key_tiles * C::kIntervalColumns;
      mask.intervals.last_key = p.seqlen_k - 1;
    }
  }

  __device__ __forceinline__ GlobalMatrix<Element> matrix(const void* base, const int64_t (&stride)[3], int head,
                                                          int rows, int cols) const {
    const Element* first = static_cast<const Element*>(base) + coord.batch * stride[0] + head * stride[2];
    return {first, stride[1], rows, cols};
  }

  // ---- copies: each is one part of a group that the caller commits
  __device__ __forceinline__ void load_q(uint32_t to, int row_tile) const {
    load_tile<typename S::TileQ, C::kTileM, S::kThreads, C::kAligned>(to, q, row_tile * C::kTileM, threadIdx.x);
  }
  __device__ __forceinline__ uint32_t k_tile(int stage) const {
    return smem + S::kStagesBegin + stage * S::kStageBytes;
  }
  __device__ __forceinline__ uint32_t v_tile(int stage) const { return k_tile(stage) + S::TileK::kBytes; }
  __device__ __forceinline__ void load_k(int stage, int tile) const {
    load_tile<typename S::TileK, C::kTileN, S::kThreads, C::kAligned>(k_tile(stage), k, tile * C::kTileN, threadIdx.x);
  }
  __device__ __forceinline__ void load_v(int stage, int tile) const {
    load_tile<typename S::TileV, C::kTileN, S::kThreads, C::kAligned>(v_tile(stage), v, tile * C::kTileN, threadIdx.x);
  }
  // Wait until all copies of the block but each thread's newest kPending groups have landed.
  template <int kPending>
  __device__ __forceinline__ void wait_copies() const {
    ptx::cp_async_wait<kPending>();
    __syncthreads();
  }
};

template <class C>
__device__ __forceinline__ int next_stage(int stage) {
  return stage == C::kStages - 1 ? 0 : stage + 1;
}

}  // namespace fagen

namespace fagen {

template <class C, class Element>
struct Pair {
  using B = Block<C, Element>;
  using S = BlockShape<C>;
  using State = typename B::State;
  using TileP = typename S::TileP;
  static constexpr int kRows = State::kRows, kPieces = S::kWarpKeys / 16;

  const B& block;
  const Lane lane;
  int barrier = 1 + block.warp / 2;
  uint32_t p_tile = block.smem + S::kStagesEnd;
  float* mine = reinterpret_cast<float*>(block.smem_bytes + S::kPairStats) + block.warp * S::kWarpRows;
  const float* partner = reinterpret_cast<float*>(block.smem_bytes + S::kPairStats) + (block.warp ^ 1) * S::kWarpRows;

  __device__ __forceinline__ static int row(const Lane& lane, int r) { return r / 2 * 16 + r % 2 * 8 + lane.row; }

  // Exchange one number a row with the partner.
  __device__ __forceinline__ void exchange(const float (&sent)[kRows], float (&received)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (lane.id % 4 == 0) mine[row(lane, r)] = sent[r];
    ptx::barrier_sync(barrier, 64);
#pragma unroll
    for (int r = 0; r < kRows; ++r) received[r] = partner[row(lane, r)];
  }

  // Both warps keep the same references: they move together or not at all.
  __device__ __forceinline__ void update_max(State& state, typename State::Scores& s_acc) const {
    float row_max[kRows], other[kRows], factor[kRows];
    state.thread_maxima(s_acc, row_max);
    if (ptx::barrier_any(barrier, 64, state.softmax.exceeds_slack(row_max))) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) row_max[r] = quad_max(row_max[r]);
      exchange(row_max, other);
#pragma unroll
      for (int r = 0; r < kRows; ++r) row_max[r] = fmaxf(row_max[r], other[r]);
      state.set_reference(s_acc, row_max, factor);
      state.rescale(factor);
    } else {
      state.softmax.refresh_offset();
    }
  }

  // Softmax of this warp's half of the keys, O += P V of all of them for its half of the columns.
  __device__ __forceinline__ void add_values(State& state, typename State::Scores& s_acc, uint32_t v_tile) const {
    update_max(state, s_acc);  // its barrier also says that the partner has read the weights of the tile before
    typename State::Weights own_weights;
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          state.exponentiate(s_acc, own_weights, s, n, i);
          const int chunk = (block.first_key + n * 16) / 8 + i / 2;
          ptx::st_shared_4(p_tile + TileP::offset(block.first_row + row(lane, s * 2 + i % 2), chunk) + lane.column * 2,
                           own_weights[n][s][i]);
        }
    const uint32_t v_lane =
        S::TileV::step(row_major_address<typename S::TileV>(lane, v_tile, 0), 0, block.first_column / 16);
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
      state.value_step(own_weights[n], v_lane + (block.first_key + n * 16) * S::TileV::kPitch);
    ptx::barrier_sync(barrier, 64);  // the partner's weights are there
    const int other_key = block.first_key ^ S::kWarpKeys;
    const uint32_t p_lane = row_major_address<TileP>(lane, p_tile, block.first_row);
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      uint32_t other_weights[S::kSlabs][4];
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s)
        ptx::ldmatrix_x4(other_weights[s], TileP::step(p_lane, s * 16, other_key / 16 + n));
      state.value_step(other_weights, v_lane + (other_key + n * 16) * S::TileV::kPitch);
    }
  }
};

}  // namespace fagen

namespace fagen {

// split_k: every warp has seen its own share of the keys for the same rows. Bring the sums to one reference and add
// them up in warp 0, one warp after the other, so that the result never depends on timing.
template <class B>
__device__ __forceinline__ void merge_warps(const B& block, typename B::State& state,
                                            float (&row_sum)[B::State::kRows]) {
  using S = typename B::S;
  constexpr int kWarps = S::kThreads / 32, kTileRows = S::kWarpRows;
  float4* pieces = reinterpret_cast<float4*>(block.smem_bytes);
  float2* stats = reinterpret_cast<float2*>(block.smem_bytes + S::kMergeStats);  // (warp, row): reference, sum
  const Lane lane = state.lane;
  const float scale_log2 = state.softmax.scale_log2;
#pragma unroll
  for (int r = 0; r < B::State::kRows; ++r)
    if (lane.id % 4 == 0)
      stats[block.warp * kTileRows + r / 2 * 16 + r % 2 * 8 + lane.row] =
          make_float2(state.softmax.reference[r], row_sum[r]);
  __syncthreads();
  float factor[B::State::kRows];
#pragma unroll
  for (int r = 0; r < B::State::kRows; ++r) {
    const float2* row = stats + r / 2 * 16 + r % 2 * 8 + lane.row;
    float top = B::State::Softmax::kNoKeys, sum = 0.f;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, row[w * kTileRows].x);
    for (int w = 0; w < kWarps; ++w) sum += row[w * kTileRows].y * ptx::ex2((row[w * kTileRows].x - top) * scale_log2);
    factor[r] = ptx::ex2((state.softmax.reference[r] - top) * scale_log2);
    state.softmax.reference[r] = top;
    row_sum[r] = sum;
  }
  state.rescale(factor);
  for (int turn = kWarps - 1; turn >= 0; --turn) {
    if (block.warp == turn) {
      int i = lane.id;
#pragma unroll
      for (auto& slab : state.o)
#pragma unroll
        for (auto& piece : slab) {
          if (turn < kWarps - 1) {
            const float4 so_far = pieces[i];
            piece[0] += so_far.x, piece[1] += so_far.y, piece[2] += so_far.z, piece[3] += so_far.w;
          }
          if (turn > 0) pieces[i] = make_float4(piece[0], piece[1], piece[2], piece[3]);
          i += 32;
        }
    }
    __syncthreads();
  }
}

// Normalise, and store through shared memory so that every store is a whole 16-byte piece of a row.
template <class C, class Element>
__device__ __forceinline__ void store_rows(const Block<C, Element>& block, typename Block<C, Element>::State& state,
                                           int row_tile) {
  using S = BlockShape<C>;
  using TileO = typename S::TileO;
  constexpr int kRows = S::kSlabs * 2, kChunks = S::kWarpColumns / 8;
  const fagen_forward_params& p = block.p;
  const Lane lane = state.lane;
  float row_sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) row_sum[r] = quad_sum(state.softmax.sum[r]);
  ptx::cp_async_wait<0>();
  __syncthreads();  // the stages are free: O and the merge lie over them
  if constexpr (S::kSplitKeys) {
    merge_warps(block, state, row_sum);
    if (block.warp != 0) return;
  } else if constexpr (S::kPairs) {
    float other[kRows];
    Pair<C, Element>{block, lane}.exchange(row_sum, other);
#pragma unroll
    for (int r = 0; r < kRows; ++r) row_sum[r] += other[r];
    __syncthreads();
  }
  const int m0 = row_tile * C::kTileM;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = block.first_row + r / 2 * 16 + r % 2 * 8 + lane.row;
    const float inverse = scale_up_pairs<C, Element>(p, row_sum[r] == 0.f ? 0.f : 1.f / row_sum[r]);
    if (p.lse && block.first_column == 0 && lane.id % 4 == 0 && m0 + row < p.seqlen_q)
      p.lse[(int64_t(block.coord.batch) * p.heads + block.coord.head) * p.seqlen_q + m0 + row] =
          state.softmax.lse(r, row_sum[r]);
#pragma unroll
    for (int n = 0; n < S::kWarpColumns / 8; ++n) {
      const float* pair = &state.o[r / 2][n][r % 2 * 2];
      ptx::st_shared_4(block.smem + TileO::offset(row, block.first_column / 8 + n) + lane.column * 2,
                       pack<Element>(pair[0] * inverse, pair[1] * inverse));
    }
  }
  __syncwarp();  // a warp reads back only what it wrote
  Element* out = static_cast<Element*>(p.o.data) + block.coord.batch * p.o.stride[0] + block.coord.head * p.o.stride[2];
#pragma unroll 4
  for (int i = lane.id; i < S::kWarpRows * kChunks; i += 32) {
    const int row = block.first_row + i / kChunks, chunk = block.first_column / 8 + i % kChunks;
    const int cols = p.head_dim_v - chunk * 8;
    if (m0 + row >= p.seqlen_q || cols <= 0) continue;
    uint4 value = ptx::ld_shared_16(block.smem + TileO::offset(row, chunk));
    Element* to = out + (m0 + row) * p.o.stride[1] + chunk * 8;
    if constexpr (C::kAligned) {
      *reinterpret_cast<uint4*>(to) = value;
    } else {
      Element e[8];
      memcpy(e, &value, 16);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < cols) to[j] = e[j];
    }
  }
}

}  // namespace fagen

namespace fagen {

template <class C, class Element>
__device__ __forceinline__ void run_q_outer(const Block<C, Element>& block) {
  using S = BlockShape<C>;
  typename Block<C, Element>::State state(block.p, block.coord.batch, block.coord.head);
  const int row_tile = block.coord.row_tile;
  const int m0 = row_tile * C::kTileM, m1 = min(m0 + C::kTileM, block.p.seqlen_q);
  const TileRange range = TileRange::of<C::kTileN>(block.mask.band, m0, m1);

  auto walk = block.mask.walk(range, m0, m1);   // the tile that is computed
  auto ahead = block.mask.walk(range, m0, m1);  // the next tile to be loaded

  block.load_q(block.smem, row_tile);
  if constexpr (C::kQSource == QSource::registers) {
    ptx::cp_async_commit();
    block.template wait_copies<0>();
    state.load_q_registers(block.smem, block.first_row);
    __syncthreads();
  }
  if constexpr (C::kStages == 1) {
    if (ahead.valid()) block.load_k(0, ahead.tile);
    ptx::cp_async_commit();
  } else {
#pragma unroll
    for (int stage = 0; stage < C::kStages - 1; ++stage) {
      if (ahead.valid()) {
        block.load_k(stage, ahead.tile);
        block.load_v(stage, ahead.tile);
        ahead.advance();
      }
      ptx::cp_async_commit();
    }
  }

  int stage = 0, free_stage = C::kStages - 1;
  const auto visit = [&](int tile, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    const int key = tile * C::kTileN + block.first_key;
    typename Block<C, Element>::State::Scores s_acc;
    if constexpr (C::kStages == 1) {  // V lands while S is computed, the next K while O is
      block.template wait_copies<0>();
      block.load_v(0, tile);
      ptx::cp_async_commit();
    } else {  // the stage that everyone left a tile ago takes the newest tile
      block.template wait_copies<C::kStages - 2>();
      if (ahead.valid()) {
        block.load_k(free_stage, ahead.tile);
        block.load_v(free_stage, ahead.tile);
        ahead.advance();
      }
      ptx::cp_async_commit();
    }
    state.compute_scores(s_acc, block.smem, block.first_row, block.k_tile(stage), block.first_key, [](int) {});
    state.template modify<kMasked>(s_acc, block.mod, block.mask, m0 + block.first_row, key);
    if constexpr (C::kStages == 1) {
      block.template wait_copies<0>();
      ahead.advance();
      if (ahead.valid()) block.load_k(0, ahead.tile);
      ptx::cp_async_commit();
    }
    if constexpr (S::kPairs)
      Pair<C, Element>{block, state.lane}.add_values(state, s_acc, block.v_tile(stage));
    else
      state.add_values(s_acc, block.v_tile(stage), block.first_key);
    if constexpr (C::kStages > 1) {
      free_stage = stage;
      stage = next_stage<C>(stage);
    }
  };

  walk.visit_rest(range, visit);
  store_rows(block, state, row_tile);
}

}  // namespace fagen

// ---- fagen/sm80/forward/q_outer_overlapped.cuh -----------------------------------------------------------
// FlashAttention 2's order with FlashAttention 3's overlap inside a warp: the scores of the next tile are computed
// under the softmax of this one, so keys are needed one tile earlier than values.

namespace fagen {

template <class C, class Element>
__device__ __forceinline__ void run_q_outer_overlapped(const Block<C, Element>& block) {
  using Scores = typename Block<C, Element>::State::Scores;
  static_assert(!C::kOverlap || C::kStages > 1, "the next keys need a stage of their own");
  typename Block<C, Element>::State state(block.p, block.coord.batch, block.coord.head);
  const int row_tile = block.coord.row_tile;
  const int m0 = row_tile * C::kTileM, m1 = min(m0 + C::kTileM, block.p.seqlen_q);
  const TileRange range = TileRange::of<C::kTileN>(block.mask.band, m0, m1);
  auto walk = block.mask.walk(range, m0, m1);   // the tile whose scores are next
  auto ahead = block.mask.walk(range, m0, m1);  // the next tile of keys to be loaded

  // A group of copies: the keys of one tile, and the values of the tile before it.
  int k_slot = 0, v_slot = 0, v_ahead = -1;
  const auto load_next = [&] {
    if (v_ahead >= 0) {
      block.load_v(v_slot, v_ahead);
      v_slot = next_stage<C>(v_slot);
    }
    v_ahead = -1;
    if (ahead.valid()) {
      block.load_k(k_slot, ahead.tile);
      k_slot = next_stage<C>(k_slot);
      v_ahead = ahead.tile;
      ahead.advance();
    }
    ptx::cp_async_commit();
  };

  block.load_q(block.smem, row_tile);
  if constexpr (C::kQSource == QSource::registers) {
    ptx::cp_async_commit();
    block.template wait_copies<0>();
    state.load_q_registers(block.smem, block.first_row);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < C::kStages; ++i) load_next();

  int stage = 0;
  const auto modify = [&](Scores& s_acc, int tile, auto masked) {
    state.template modify<decltype(masked)::value>(s_acc, block.mod, block.mask, m0 + block.first_row,
                                                   tile * C::kTileN + block.first_key);
  };
  Scores s_acc;
  if (walk.valid()) {
    block.template wait_copies<C::kStages - 1>();
    state.compute_scores(s_acc, block.smem, block.first_row, block.k_tile(0), block.first_key, [](int) {});
    walk.partial(range) ? modify(s_acc, walk.tile, Constant<true>{}) : modify(s_acc, walk.tile, Constant<false>{});
    walk.advance();
  } else {
    store_rows(block, state, row_tile);
    return;
  }
  // S of `tile` is computed while the tile before it goes through softmax and second product.
  const auto visit = [&](int tile, auto masked) {
    const int next = next_stage<C>(stage);
    state.update_max(s_acc);
    block.template wait_copies<C::kStages - 2>();
    load_next();
    Scores s_next;
    state.add_values_under_scores(s_acc, block.v_tile(stage), s_next, block.smem, block.first_row, block.k_tile(next),
                                  block.first_key);
    modify(s_next, tile, masked);
#pragma unroll
    for (int s = 0; s < BlockShape<C>::kSlabs; ++s)
#pragma unroll
      for (int n = 0; n < BlockShape<C>::kWarpKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s_acc[s][n][i] = s_next[s][n][i];
    stage = next;
  };
  walk.visit_rest(range, visit);
  block.template wait_copies<0>();
  state.add_values(s_acc, block.v_tile(stage), block.first_key);
  store_rows(block, state, row_tile);
}

}  // namespace fagen

// ---- fagen/sm80/forward/kv_outer.cuh ---------------------------------------------------------------------
// FlashAttention 1's order: a block keeps one tile of keys and the rows pass by; O, maxima and sums wait in device
// memory between two visits. A block owns a run of row tiles, so nothing is shared between blocks.

namespace fagen {

// A row tile's state as its threads hold it: 16 bytes a thread at a time, neighbours side by side.
template <class C, class Element>
struct StoredState {
  using State = typename Block<C, Element>::State;
  static constexpr int kColumnPieces = BlockShape<C>::kWarpColumns / 8;
  static constexpr int kPieces = BlockShape<C>::kSlabs * kColumnPieces, kStats = BlockShape<C>::kSlabs;
  static constexpr int kFloat4s = (kPieces + kStats) * BlockShape<C>::kThreads;  // per row tile

  static __device__ __forceinline__ void save(float4* to, const State& state) {
    to += threadIdx.x;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float (&x)[4] = state.o[i / kColumnPieces][i % kColumnPieces];
      to[i * BlockShape<C>::kThreads] = make_float4(x[0], x[1], x[2], x[3]);
    }
#pragma unroll
    for (int i = 0; i < kStats; ++i)
      to[(kPieces + i) * BlockShape<C>::kThreads] =
          make_float4(state.softmax.reference[2 * i], state.softmax.reference[2 * i + 1], state.softmax.sum[2 * i],
                      state.softmax.sum[2 * i + 1]);
  }
  static __device__ __forceinline__ void restore(const float4* from, State& state) {
    from += threadIdx.x;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      float (&x)[4] = state.o[i / kColumnPieces][i % kColumnPieces];
      const float4 value = from[i * BlockShape<C>::kThreads];
      x[0] = value.x, x[1] = value.y, x[2] = value.z, x[3] = value.w;
    }
#pragma unroll
    for (int i = 0; i < kStats; ++i) {
      const float4 value = from[(kPieces + i) * BlockShape<C>::kThreads];
      state.softmax.reference[2 * i] = value.x, state.softmax.reference[2 * i + 1] = value.y;
      state.softmax.sum[2 * i] = value.z, state.softmax.sum[2 * i + 1] = value.w;
    }
    state.softmax.refresh_limit();
  }
};

template <class C, class Element>
__device__ __forceinline__ void run_kv_outer(const Block<C, Element>& block) {
  using S = BlockShape<C>;
  using Stored = StoredState<C, Element>;
  const GridArgs& grid = block.grid;
  const int per_block = (grid.row_tiles + grid.blocks_of_rows - 1) / grid.blocks_of_rows;
  const int first_tile = block.coord.row_tile * per_block, end_tile = min(first_tile + per_block, grid.row_tiles);
  if (first_tile >= end_tile) return;
  const int64_t head = int64_t(block.coord.batch) * block.p.heads + block.coord.head;
  const auto stored = [&](int row_tile) { return grid.state + (head * grid.row_tiles + row_tile) * Stored::kFloat4s; };
  const auto range_of = [&](int first, int end) {
    return TileRange::of<C::kTileN>(block.mask.band, first * C::kTileM, min(end * C::kTileM, block.p.seqlen_q));
  };
  typename Block<C, Element>::State state(block.p, block.coord.batch, block.coord.head);
  for (int row_tile = first_tile; row_tile < end_tile; ++row_tile) Stored::save(stored(row_tile), state);

  const TileRange keys = range_of(first_tile, end_tile);
  for (int tile = keys.begin; tile < keys.end; ++tile) {
    block.template wait_copies<0>();  // everyone is done with the previous keys, and no copy of theirs is under way
    block.load_k(0, tile);
    block.load_v(0, tile);
    ptx::cp_async_commit();
    for (int row_tile = first_tile; row_tile < end_tile; ++row_tile) {
      const int m0 = row_tile * C::kTileM, m1 = min(m0 + C::kTileM, block.p.seqlen_q);
      const TileRange range = range_of(row_tile, row_tile + 1);
      bool skip = tile < range.begin || tile >= range.end;
      bool partial = tile < range.full_begin || tile >= range.full_end;
      if constexpr (MaskOf<C>::kIntervals) {
        bool empty, hidden;
        block.mask.intervals.classify(tile, m0, m1, empty, hidden);
        skip |= empty;
        partial |= hidden;
      }
      if (skip) continue;
      __syncthreads();  // and with the previous rows
      block.load_q(block.smem, row_tile);
      ptx::cp_async_commit();
      Stored::restore(stored(row_tile), state);
      block.template wait_copies<0>();
      state.load_q_registers(block.smem, block.first_row);
      const auto visit = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        typename Block<C, Element>::State::Scores s_acc;
        state.compute_scores(s_acc, block.smem, block.first_row, block.k_tile(0), block.first_key, [](int) {});
        state.template modify<kMasked>(s_acc, block.mod, block.mask, m0 + block.first_row,
                                       tile * C::kTileN + block.first_key);
        state.add_values(s_acc, block.v_tile(0), block.first_key);
      };
      partial ? visit(Constant<true>{}) : visit(Constant<false>{});
      Stored::save(stored(row_tile), state);
    }
  }
  for (int row_tile = first_tile; row_tile < end_tile; ++row_tile) {
    Stored::restore(stored(row_tile), state);
    store_rows(block, state, row_tile);
    __syncthreads();  // the next tile's O goes through the same shared memory
  }
}

}  // namespace fagen

namespace fagen {

using Element = bfloat_t;
using Shape = BlockShape<Config>;

// One block takes one row tile of one head (q_outer), or a run of them (kv_outer).
__global__ void __launch_bounds__(Shape::kThreads, Config::kBlocksPerSm)
forward_kernel(const __grid_constant__ fagen_forward_params p, const __grid_constant__ GridArgs grid) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const Block<Config, Element> block(p, grid, shared);
  if constexpr (Config::kLoopOrder == LoopOrder::kv_outer)
    run_kv_outer(block);
  else if constexpr (Config::kOverlap)
    run_q_outer_overlapped(block);
  else
    run_q_outer(block);
}

__global__ void extents_kernel(const __grid_constant__ fagen_forward_params p, Extent* extents, int tiles) {
  find_extents<Config>(p, extents, tiles);
}

// ---- host ----------------------------------------------------------------------------------------------------------

static uint64_t extents_bytes(const fagen_forward_params& p) {
  if (!MaskOf<Config>::kIntervals) return 0;
  const uint64_t tiles = ceil_div(p.seqlen_k, Config::kTileN);
  return align_workspace(sizeof(Extent) * tiles * p.batch * p.mask_heads * Config::kIntervalColumns);
}

static uint64_t state_bytes(const fagen_forward_params& p) {
  if (Config::kLoopOrder != LoopOrder::kv_outer) return 0;
  const uint64_t tiles = ceil_div(p.seqlen_q, Config::kTileM);
  return align_workspace(sizeof(float4) * StoredState<Config, Element>::kFloat4s * tiles * p.batch * p.heads);
}

struct Device {
  int units, l2_bytes;
};

// Asks the device for its numbers, and for more shared memory than the default.
static cudaError_t prepare(int index, Device& device) {
  if (const cudaError_t e = cudaDeviceGetAttribute(&device.units, cudaDevAttrMultiProcessorCount, index)) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&device.l2_bytes, cudaDevAttrL2CacheSize, index)) return e;
  return cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSmemBytes);
}

static cudaError_t launch_forward(const fagen_forward_params& p, cudaStream_t stream) {
  Device device;
  if (const cudaError_t e = once_per_device(&device, prepare)) return e;
  const int heads = p.heads * p.batch;
  GridArgs grid;
  grid.row_tiles = ceil_div(p.seqlen_q, Config::kTileM);
  grid.key_tiles = ceil_div(p.seqlen_k, Config::kTileN);
  grid.blocks_of_rows = grid.row_tiles;
  if (Config::kLoopOrder == LoopOrder::kv_outer) {  // as few blocks a head as still fill the machine
    const int wanted = ceil_div(device.units * Config::kBlocksPerSm, heads);
    grid.blocks_of_rows = wanted < grid.row_tiles ? wanted : grid.row_tiles;
  }
  // as many heads at once as fit half of L2 with their keys and values, whole groups of heads that share them
  const int64_t head_bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v) * sizeof(Element);
  const int64_t fit = device.l2_bytes / 2 / head_bytes;
  const int64_t at_once = (fit < 1 ? 1 : fit) * (p.heads / p.kv_heads);
  grid.heads_at_once = at_once < heads ? int(at_once) : heads;
  grid.extents = static_cast<Extent*>(p.workspace);
  grid.state = reinterpret_cast<float4*>(static_cast<char*>(p.workspace) + extents_bytes(p));
  if constexpr (MaskOf<Config>::kIntervals) {
    const int64_t warps = int64_t(grid.key_tiles) * p.batch * p.mask_heads;
    extents_kernel<<<unsigned(ceil_div(warps, 8)), 256, 0, stream>>>(p, grid.extents, grid.key_tiles);
  }
  forward_kernel<<<unsigned(grid.blocks_of_rows) * heads, Shape::kThreads, Shape::kSmemBytes, stream>>>(p, grid);
  return cudaGetLastError();
}

}  // namespace fagen

extern "C" uint64_t fagen_workspace_bytes(const fagen_forward_params* p) {
  return fagen::extents_bytes(*p) + fagen::state_bytes(*p);
}

extern "C" const char* fagen_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

extern "C" int fagen_launch(const fagen_forward_params* p, void* stream) {
  return fagen::launch_forward(*p, static_cast<cudaStream_t>(stream));
}

// Name, offset and size of every field of the params, as this compiler laid them out.
#include <stddef.h>
#include <stdio.h>

extern "C" const char* fagen_params_layout(void) {
  static char text[943];
  static const char* const told = [] {
    char* end = text;
#define FAGEN_FIELD(field) \
  end += snprintf(end, text + sizeof text - end, "%s %zu %zu; ", #field, offsetof(fagen_forward_params, field), \
                  sizeof(fagen_forward_params::field))
    FAGEN_FIELD(q.data); FAGEN_FIELD(q.stride); FAGEN_FIELD(k.data); FAGEN_FIELD(k.stride); FAGEN_FIELD(v.data);
    FAGEN_FIELD(v.stride); FAGEN_FIELD(o.data); FAGEN_FIELD(o.stride); FAGEN_FIELD(intervals.data);
    FAGEN_FIELD(intervals.stride); FAGEN_FIELD(alibi_slopes.data); FAGEN_FIELD(alibi_slopes.stride);
    FAGEN_FIELD(lse); FAGEN_FIELD(workspace); FAGEN_FIELD(batch); FAGEN_FIELD(heads); FAGEN_FIELD(kv_heads);
    FAGEN_FIELD(mask_heads); FAGEN_FIELD(seqlen_q); FAGEN_FIELD(seqlen_k); FAGEN_FIELD(head_dim);
    FAGEN_FIELD(head_dim_v); FAGEN_FIELD(window_left); FAGEN_FIELD(window_right); FAGEN_FIELD(scale);
    FAGEN_FIELD(softcap); FAGEN_FIELD(dropout); FAGEN_FIELD(rng);
#undef FAGEN_FIELD
    snprintf(end, text + sizeof text - end, "sizeof %zu", sizeof(fagen_forward_params));
    return text;
  }();
  return told;
}
