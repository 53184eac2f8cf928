// A kernel for attention backward, made by fagen. It needs the CUDA toolkit and nothing else: no torch, no Python.
//
// problem:  backward/bf16/d64/none, its config chosen for b4/h32-32/q4096-k4096
// config:   tile_m=64 tile_n=128 warps=8 weights_source=shared row_warps=2 key_warps=4 dq_route=atomics dq_row_warps=4 dq_tile_m=64 dq_tile_n=16 v_source=shared blocks_per_sm=1 smem_layout=swizzled q_stages=2 dout_stages=2 gqa=in_block block_order=ascending (the family's default)
// made by:  fagen emit --target sm_90 --op backward --dtype bf16 --head-dim 64 --mask none --seqlen 4096 --batch 4 --heads 32 --kv-heads 32 --family sm80_backward --config '{"block_order": "ascending", "blocks_per_sm": 1, "dout_stages": 2, "dq_route": "atomics", "dq_row_warps": 4, "dq_tile_m": 64, "dq_tile_n": 16, "gqa": "in_block", "key_warps": 4, "q_stages": 2, "row_warps": 2, "smem_layout": "swizzled", "tile_m": 64, "tile_n": 128, "v_source": "shared", "warps": 8, "weights_source": "shared"}' --out DIR
// build:    nvcc -gencode=arch=compute_90,code=sm_90 -O3 -std=c++17 --use_fast_math -lineinfo -shared -Xcompiler -fPIC -o kernel.so kernel.cu
// call:     fagen_launch(), declared in kernel.h beside this file

// sm80_backward: attention backward for backward/bf16/d64/none on sm_90
//
// Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.
// Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.
//
// Config: tile_m=64 tile_n=128 warps=8 weights_source=shared row_warps=2 key_warps=4 dq_route=atomics dq_row_warps=4 dq_tile_m=64 dq_tile_n=16 v_source=shared blocks_per_sm=1 smem_layout=swizzled q_stages=2 dout_stages=2 gqa=in_block block_order=ascending

namespace fagen {

enum class Mask { none, causal, window, intervals };
enum class WeightsSource { shared, registers };
enum class DqRoute { atomics, own_kernel };
enum class VSource { shared, registers };
enum class SmemLayout { swizzled, padded };
enum class Gqa { in_block, atomics };
enum class BlockOrder { ascending, longest_first };

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
  static constexpr bool kDeterministic = false;  // bitwise
  static constexpr int kTileM = 64;  // rows of q that pass by at a time
  static constexpr int kTileN = 128;  // keys a block works on
  static constexpr int kWarps = 8;  // warps of a block
  static constexpr WeightsSource kWeightsSource = WeightsSource::shared;  // where P and dS wait for dV and dK
  static constexpr int kRowWarps = 2;  // warps along the rows of S and dP
  static constexpr int kKeyWarps = 4;  // warps along the keys of dK and dV
  static constexpr DqRoute kDqRoute = DqRoute::atomics;  // dQ by float32 additions, or by blocks of its own
  static constexpr int kDqRowWarps = 4;  // atomics: warps along the rows of dQ
  static constexpr int kDqTileM = 64;  // own_kernel: rows of its blocks
  static constexpr int kDqTileN = 16;  // own_kernel: keys that pass by at a time
  static constexpr VSource kVSource = VSource::shared;  // where v waits for its products
  static constexpr int kBlocksPerSm = 1;  // blocks the register budget is cut for
  static constexpr SmemLayout kSmemLayout = SmemLayout::swizzled;  // how shared memory avoids bank conflicts
  static constexpr int kQStages = 2;  // tiles of q in shared memory
  static constexpr int kDoutStages = 2;  // tiles of dO in shared memory
  static constexpr Gqa kGqa = Gqa::in_block;  // heads of a group one after the other, or by float32 additions
  static constexpr BlockOrder kBlockOrder = BlockOrder::ascending;  // order of key tiles and heads
};

// Sizes that fagen derived from the config before compiling; the kernel asserts that it agrees.
struct Derived {
  static constexpr int threads = 256;
  static constexpr int smem_bytes = 99328;
  static constexpr int dq_smem_bytes = 24576;
};

}  // namespace fagen

using namespace fagen;  // the kernel is this one file

#include <cuda_runtime.h>

// ---- fagen/abi/backward.h --------------------------------------------------------------------------------
// The arguments of a backward kernel: the one struct that a caller passes. Plain C; no torch, no CUDA header.
// ---- fagen/abi/tensor.h ----------------------------------------------------------------------------------
// A tensor that a kernel reads or writes, as every op passes it. Plain C; no torch, no CUDA header.
#include <stdint.h>

typedef struct fagen_tensor {
  void* data;         // null if the call has none
  int64_t stride[3];  // in elements; the op says of which dimensions. The last dimension is contiguous.
} fagen_tensor;

// Strides of q, k, v, o and their gradients are those of batch, row and head. A batch stride of 0 broadcasts.
typedef struct fagen_backward_params {
  fagen_tensor q;     // (batch, seqlen_q, heads, head_dim)
  fagen_tensor k;     // (batch, seqlen_k, kv_heads, head_dim)
  fagen_tensor v;     // (batch, seqlen_k, kv_heads, head_dim_v)
  fagen_tensor o;     // (batch, seqlen_q, heads, head_dim_v), what forward made
  fagen_tensor dout;  // its gradient
  fagen_tensor dq;    // written: each like its own
  fagen_tensor dk;
  fagen_tensor dv;
  fagen_tensor intervals;     // int32 (batch, mask_heads, seqlen_k, columns); strides: batch (or 0), mask head, key
  fagen_tensor alibi_slopes;  // float (batch, heads); strides: batch (or 0), the others unused
  const float* lse;    // (batch, heads, seqlen_q) contiguous, natural log, made by forward; -inf: sees nothing
  const float* dlse; // its gradient, contiguous; null if the call has none
  void* workspace;     // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
  int32_t batch, heads, kv_heads, mask_heads;
  int32_t seqlen_q, seqlen_k;
  int32_t head_dim, head_dim_v;       // as the caller has them; the kernel works on padded sizes
  int32_t window_left, window_right;  // the band around the bottom-right aligned diagonal; -1: unbounded
  float scale;                        // multiplies q.k before the softmax
  float softcap;                      // s -> softcap * tanh(s / softcap); 0: off
  float dropout;                      // probability that a weight is dropped; read by kernels with dropout
  const uint64_t* rng;                // seed and offset of the random numbers, where the kernel reads; null without
} fagen_backward_params;

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

// ---- fagen/sm80/backward/finish.cuh ----------------------------------------------------------------------
// After the main kernel: dQ, dK and dV from the sums of many blocks; or dQ from blocks of its own.
// ---- fagen/sm80/backward/key_block.cuh -------------------------------------------------------------------
// The main kernel: a block keeps one tile of keys, with dK and dV in registers, and the rows that see it pass by.
// ---- fagen/sm80/backward/sums.cuh ------------------------------------------------------------------------
// Accumulators on their way to global memory: added up in float32 across blocks, or rounded and stored as rows.
// ---- fagen/ptx/reduce.cuh --------------------------------------------------------------------------------
// Additions to float32 numbers in global memory that many blocks add to, in no order; nothing is returned.

namespace fagen::ptx {

// Numbers that one instruction adds: four neighbours from sm_90 up, else one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr int kReduceWidth = 4;
#else
inline constexpr int kReduceWidth = 1;
#endif

__device__ __forceinline__ void reduce_add(float* to, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}

// `to` is aligned to 16 bytes.
__device__ __forceinline__ void reduce_add_4(float* to, const float (&x)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
#endif
}

}  // namespace fagen::ptx

// ---- fagen/sm80/backward/block.cuh -----------------------------------------------------------------------
// The calls of the kernels: their arguments, the tensors of a head, the copies of a block's tiles.

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

// ---- fagen/sm80/backward/cells.cuh -----------------------------------------------------------------------
// From scores to weights and their gradients, cell by cell: softcap, ALiBi, the mask, exp, dS = P (dP - delta).
#include <math.h>

// ---- fagen/common/cell_dropout.cuh -----------------------------------------------------------------------
// Dropout of a warp's cells of S and dP: which cells are kept, piece by piece of 8 columns.
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

namespace fagen {

// kSlabs x 16 lines of cells. A line is a row of q, or a key if kTransposed. kPairs: pieces come by four. Rows and keys
// always begin at multiples of 16.
template <bool kTransposed, bool kPairs, int kSlabs>
struct CellDropout {
  uint32_t dropped[kSlabs][2][2];  // a sign bit a weight, in the order of `draw_blocks`

  // Draw for piece `n`, whose warp's first row and key are given. Pieces come in order.
  template <class Lane>
  __device__ __forceinline__ void load(const Dropout& dropout, const Lane& lane, int row, int key, int n) {
    if (n % (kPairs ? 4 : 2)) return;
    const bool odd = lane.row % 2;
    const int columns = n * 8 + (kPairs && odd ? 16 : 0) + lane.column;
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const int lines = s * 16 + lane.row;
      const RowPart of_row = dropout.of_row(Dropout::counter(row + (kTransposed ? columns : lines)));
      const KeyPart of_key = dropout.of_key(Dropout::counter(key + (kTransposed ? lines : columns)));
      draw_blocks<kTransposed, kPairs>(dropout, of_row, of_key, odd, dropped[s]);
#pragma unroll
      for (int block = 0; block < (kPairs ? 2 : 1); ++block)
        for (uint32_t& word : dropped[s][block]) word = dropout.dropped(word);
    }
  }
  // Whether cell e of line i of piece n is kept; lines are r and r + 8 of each slab.
  __device__ __forceinline__ bool kept(int i, int n, int e) const {
    const uint32_t word = dropped[i / 2][kPairs ? n / 2 % 2 : 0][kTransposed ? n % 2 : i % 2];
    const int byte = (kTransposed ? i % 2 : n % 2) * 2 + e;
    return !(word >> (8 * byte + 7) & 1);
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

// ---- fagen/abi/forward.h ---------------------------------------------------------------------------------
// The arguments of a forward kernel: the one struct that a caller passes. Plain C; no torch, no CUDA header.

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


// ---- fagen/sm80/backward/products.cuh --------------------------------------------------------------------
// A warp's products on tensor cores, by ldmatrix and mma, from operands in shared memory or in registers.


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

// A thread's place in an accumulator piece of 16 rows and 8 columns: it holds rows `row` and `row` + 8, columns
// `column` and `column` + 1.
struct Lane {
  int id = threadIdx.x % 32;
  int row = id / 4, column = id % 4 * 2;
};

template <int kSlabs, int kPieces>
__device__ __forceinline__ void clear(float (&sums)[kSlabs][kPieces][4]) {
#pragma unroll
  for (auto& slab : sums)
#pragma unroll
    for (auto& piece : slab) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
}

template <bool kFirst, class First, class Second>
struct Selected {
  using Type = First;
};
template <class First, class Second>
struct Selected<false, First, Second> {
  using Type = Second;
};
template <bool kFirst, class First, class Second>
using Select = typename Selected<kFirst, First, Second>::Type;

// An operand in shared memory, seen from this lane. `down` and `right` count 16 x 16 pieces of the tile. The lane's
// place is kept apart from the tile's, so that tiles of equal rows share it.
template <class Tile>
struct Operand {
  uint32_t tile, place;

  // Lanes 0-15 take the rows of the two left 8 x 8 matrices of a piece: A as it lies, or B transposed on the way.
  static __device__ __forceinline__ Operand rows_first(const Lane& lane, uint32_t tile, int row, int right) {
    return {tile, Tile::step(Tile::offset(row + lane.id % 16, lane.id / 16), 0, right)};
  }
  // Lanes 0-15 take the two upper matrices: B as it lies, or A transposed on the way.
  static __device__ __forceinline__ Operand columns_first(const Lane& lane, uint32_t tile, int row, int right) {
    return {tile, Tile::step(Tile::offset(row + lane.id / 16 * 8 + lane.id % 8, lane.id / 8 % 2), 0, right)};
  }
  __device__ __forceinline__ void load(uint32_t (&fragment)[4], int down, int right) const {
    ptx::ldmatrix_x4(fragment, tile + Tile::step(place, down * 16, right));
  }
  __device__ __forceinline__ void load_transposed(uint32_t (&fragment)[4], int down, int right) const {
    ptx::ldmatrix_x4_trans(fragment, tile + Tile::step(place, down * 16, right));
  }
};

// sums += A B, A of kSlabs x 16 rows, B of kPieces x 8 columns, over kSteps x 16. `load_a(fragment, slab, step)` and
// `load_b(fragment, pair of pieces, step)` give the operands.
template <class Element, int kSteps, int kSlabs, int kPieces, class LoadA, class LoadB>
__device__ __forceinline__ void multiply(float (&sums)[kSlabs][kPieces][4], LoadA load_a, LoadB load_b) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[kSlabs][4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) load_a(a[s], s, step);
#pragma unroll
    for (int n = 0; n < kPieces / 2; ++n) {
      uint32_t b[4];
      load_b(b, n, step);
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        ptx::mma_m16n8k16<Element>(sums[s][2 * n], a[s], b[0], b[1]);
        ptx::mma_m16n8k16<Element>(sums[s][2 * n + 1], a[s], b[2], b[3]);
      }
    }
  }
}

// Accumulators rounded to 16 bits: two columns a register, rows `row` and `row` + 8 of each piece. The order is that of
// the A operand, so that they can go straight into the next product.
template <int kSlabs, int kColumns>
struct Packed {
  uint32_t pairs[kSlabs][kColumns / 8][2];

  __device__ __forceinline__ void operand(uint32_t (&a)[4], int slab, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pairs[slab][2 * step + i / 2][i % 2];
  }

  // Store to a tile in shared memory, from row `row` and column `column` of it on.
  template <class Tile>
  __device__ __forceinline__ void store(const Lane& lane, uint32_t tile, int row, int column) const {
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          ptx::st_shared_4(tile + Tile::offset(row + s * 16 + half * 8 + lane.row, column / 8 + n) + lane.column * 2,
                           pairs[s][n][half]);
  }
};

}  // namespace fagen

namespace fagen {

// A row's logsumexp in base-2 logarithms, and delta = sum of dO * O, less the gradient of the logsumexp. Rows that see
// nothing, and those past the last, have an infinite one: their weights are 0.
struct RowStats {
  float lse_log2, delta;
};

// A score q.k of a head to its weight, and the gradient of the weight to that of scale * q.k.
template <class C>
struct ScoreGradient {
  static constexpr float kLog2e = 1.4426950408889634f;
  float scale, cap_log2, slope_log2;
  int shift;
  Dropout dropout;

  __device__ __forceinline__ ScoreGradient(const fagen_forward_params& p, int batch, int head)
      : shift(p.seqlen_k - p.seqlen_q) {
    scale = C::kSoftcap ? p.scale / p.softcap : p.scale * kLog2e;
    cap_log2 = p.softcap * kLog2e;
    const float* slopes = static_cast<const float*>(p.alibi_slopes.data);
    slope_log2 = C::kAlibi ? slopes[batch * p.alibi_slopes.stride[0] + head] * kLog2e : 0.f;
    if constexpr (C::kDropout) dropout = Dropout::of(p, batch, head);
  }

  // `score` becomes P and `gradient`, which comes in as dP, becomes dS. Where the weight was dropped, dP counts as
  // 0, and so does the P that is left, which is for dV.
  __device__ __forceinline__ void apply(float& score, float& gradient, const RowStats& row, int m, int key, bool hidden,
                                        bool kept) const {
    float slope = 1.f, exponent;
    if constexpr (C::kSoftcap) {
      const float capped = ptx::tanh_approx(score * scale);
      slope = 1.f - capped * capped;
      exponent = fmaf(capped, cap_log2, -row.lse_log2);
    } else {
      exponent = fmaf(score, scale, -row.lse_log2);
    }
    if constexpr (C::kAlibi) exponent -= slope_log2 * fabsf(float(m + shift - key));
    score = hidden ? 0.f : ptx::ex2(exponent);
    if constexpr (C::kDropout) gradient = kept ? gradient * dropout.scale : 0.f;
    gradient = score * (gradient - row.delta);
    if constexpr (C::kSoftcap) gradient *= slope;
    if constexpr (C::kDropout) score = kept ? score : 0.f;
  }
};

// A warp's cells of S and dP: kSlabs x 16 lines of kColumns cells. A line is a row of q, or a key if kTransposed.
template <class C, class Element, bool kTransposed, int kSlabs, int kColumns>
struct Cells {
  using Sums = float[kSlabs][kColumns / 8][4];
  using Pairs = Packed<kSlabs, kColumns>;
  static constexpr int kLines = kSlabs * 2;  // lines a thread shares
  // whether a line may have hidden cells before its visible ones, and after them; keys end somewhere in any case
  static constexpr bool kHidesFirst = kTransposed || MaskOf<C>::kHasBegin;
  static constexpr bool kHidesLast = !kTransposed || MaskOf<C>::kHasBegin;

  // Where this lane's first cell lies in the matrix; the stats of its rows.
  const Lane& lane;
  const ScoreGradient<C>& score;
  const MaskOf<C>& mask;
  const RowStats* stats;  // of the warp's first row
  int row, key;           // the warp's first ones

  static __device__ __forceinline__ int line(int i) { return i / 2 * 16 + i % 2 * 8; }

  // The visible cells of a line, counted from this lane's first column: rows of a key, or keys of a row.
  __device__ __forceinline__ Band::Columns visible(int i) const {
    if constexpr (!kTransposed) return mask.band.visible_columns(row + line(i) + lane.row, key, lane.column);
    const int n = key + line(i) + lane.row, first = row + lane.column;
    return {n < mask.band.seqlen_k ? n - mask.band.last - first : kFar, n - mask.band.first + 1 - first};
  }

  // P and dS in 16 bits, from S and dP.
  template <bool kMasked>
  __device__ __forceinline__ void differentiate(Sums& s_acc, Sums& dp_acc, Pairs& weights, Pairs& gradients) const {
    CellDropout<kTransposed, kColumns % 32 == 0, kSlabs> dropout;
    Band::Columns seen[kLines];
    HiddenRows hidden_rows[kLines];  // transposed: of each line's key
    if constexpr (kMasked) {
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        seen[i] = visible(i);
        if constexpr (kTransposed && MaskOf<C>::kIntervals) hidden_rows[i] = hidden_at(line(i) + lane.row);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      HiddenRows hidden_keys[2];  // else: of each column's key
      if constexpr (kMasked && !kTransposed && MaskOf<C>::kIntervals)
        for (int e = 0; e < 2; ++e) hidden_keys[e] = hidden_at(lane.column + n * 8 + e);
      if constexpr (C::kDropout) dropout.load(score.dropout, lane, row, key, n);
      RowStats column_stats[2];
      if constexpr (kTransposed) load_pair(column_stats, stats + lane.column + n * 8);
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        float* s = &s_acc[i / 2][n][i % 2 * 2];
        float* dp = &dp_acc[i / 2][n][i % 2 * 2];
        const int at = line(i) + lane.row;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = n * 8 + e, m = row + (kTransposed ? lane.column + column : at);
          const int cell_key = key + (kTransposed ? at : lane.column + column);
          bool hidden = false;
          if constexpr (kMasked) {
            if constexpr (kHidesFirst) hidden = column < seen[i].begin;
            if constexpr (kHidesLast) hidden |= column >= seen[i].end;
            if constexpr (MaskOf<C>::kIntervals) hidden |= (kTransposed ? hidden_rows[i] : hidden_keys[e]).contains(m);
          }
          bool kept = true;
          if constexpr (C::kDropout) kept = dropout.kept(i, n, e);
          if constexpr (kTransposed)
            score.apply(s[e], dp[e], column_stats[e], m, cell_key, hidden, kept);
          else
            score.apply(s[e], dp[e], stats[at], m, cell_key, hidden, kept);
        }
        weights.pairs[i / 2][n][i % 2] = pack<Element>(s[0], s[1]);
        gradients.pairs[i / 2][n][i % 2] = pack<Element>(dp[0], dp[1]);
      }
    }
  }

  // The bounds of a key of the warp's; keys past the last are hidden by the band.
  __device__ __forceinline__ HiddenRows hidden_at(int n) const {
    return mask.intervals.at(min(key + n, mask.intervals.last_key));
  }

  static __device__ __forceinline__ void load_pair(RowStats (&pair)[2], const RowStats* from) {
    const float4 both = *reinterpret_cast<const float4*>(from);
    pair[0] = {both.x, both.y}, pair[1] = {both.z, both.w};
  }
};

}  // namespace fagen

// ---- fagen/sm80/backward/row_walk.cuh --------------------------------------------------------------------
// The row tiles that see a tile of keys: forward's walk over keys, the other way round.

namespace fagen {

// Row tiles [begin, end) hold every visible element of keys [n0, n0 + kTileN); those of [full_begin, full_end) hold no
// hidden one, by the band. Rows past the last count as seeing everything: their weights are 0 anyway.
struct RowRange {
  int begin, full_begin, full_end, end;

  template <int kTileM, int kTileN>
  static __device__ __forceinline__ RowRange of(const Band& band, int n0, int seqlen_q) {
    const int n1 = n0 + kTileN;
    const int first_row = max(0, n0 - band.last), last_row = min(seqlen_q, min(n1, band.seqlen_k) - band.first);
    const int full_row = max(0, n1 - 1 - band.last), full_rows_end = max(0, n0 - band.first + 1);
    RowRange r;
    r.end = (max(0, last_row) + kTileM - 1) / kTileM;
    r.begin = min(first_row / kTileM, r.end);
    r.full_begin = n1 > band.seqlen_k ? r.end : min(r.end, max(r.begin, (full_row + kTileM - 1) / kTileM));
    r.full_end = full_rows_end >= seqlen_q ? r.end : min(r.end, full_rows_end / kTileM);
    r.full_end = max(r.full_begin, r.full_end);
    return r;
  }
};

// The mask of one tile of keys: its row tiles, and for intervals the extents of its bounds.
template <class C>
struct KeyTileMask {
  static constexpr bool kIntervals = MaskOf<C>::kIntervals;
  RowRange range;
  int seqlen_q;
  Extent extents[kIntervals ? C::kIntervalColumns : 1];

  __device__ __forceinline__ KeyTileMask(const MaskOf<C>& mask, int n0, int seqlen_q)
      : range(RowRange::of<C::kTileM, C::kTileN>(mask.band, n0, seqlen_q)), seqlen_q(seqlen_q) {
    if constexpr (kIntervals) find(mask.intervals, n0);
  }

  // Every warp looks at all keys of the tile.
  __device__ __forceinline__ void find(const Intervals<C>& intervals, int n0) {
    const int end = min(intervals.last_key + 1, n0 + C::kTileN);
#pragma unroll
    for (int c = 0; c < C::kIntervalColumns; ++c) {
      int low = INT_MAX, high = INT_MIN;
      for (int key = n0 + int(threadIdx.x % 32); key < end; key += 32) {
        const int value = intervals.bounds[key * intervals.stride + c];
        low = min(low, value);
        high = max(high, value);
      }
      extents[c] = {__reduce_min_sync(~0u, low), __reduce_max_sync(~0u, high)};
    }
  }

  // Whether a row tile has no visible element, or some hidden one.
  __device__ __forceinline__ void classify(const MaskOf<C>& mask, int tile, bool& empty, bool& partial) const {
    empty = false, partial = tile < range.full_begin || tile >= range.full_end;
    if constexpr (kIntervals) {
      bool some_hidden;
      Intervals<C> here = mask.intervals;
      here.extents = extents;
      here.classify(0, tile * C::kTileM, min((tile + 1) * C::kTileM, seqlen_q), empty, some_hidden);
      partial |= some_hidden;
    }
  }

  // The first row tile from `tile` on that sees a key; range.end: none does.
  __device__ __forceinline__ int next(const MaskOf<C>& mask, int tile) const {
    if constexpr (kIntervals)
      for (bool empty, partial; tile < range.end; ++tile) {
        classify(mask, tile, empty, partial);
        if (!empty) break;
      }
    return tile;
  }

  // Call visit(tile, partial) for all of them, with a loop of its own for tiles that need no mask.
  template <class Visit>
  __device__ __forceinline__ void visit_all(const MaskOf<C>& mask, Visit visit) const {
    if constexpr (kIntervals) {
      for (int tile = next(mask, range.begin); tile < range.end; tile = next(mask, tile + 1)) {
        bool empty, partial;
        classify(mask, tile, empty, partial);
        partial ? visit(tile, Constant<true>{}) : visit(tile, Constant<false>{});
      }
    } else {
      int tile = range.begin;
      for (; tile < range.full_begin; ++tile) visit(tile, Constant<true>{});
      for (; tile < range.full_end; ++tile) visit(tile, Constant<false>{});
      if constexpr (MaskOf<C>::kHasBegin)
        for (; tile < range.end; ++tile) visit(tile, Constant<true>{});
    }
  }
};

}  // namespace fagen

// ---- fagen/sm80/backward/shape.cuh -----------------------------------------------------------------------
// Sizes that follow from the config: each warp's share of every product, and the plan of shared memory. Python derives
// the same sizes, and the asserts below hold the two together.

namespace fagen {

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int round_up(int a, int unit) { return (a + unit - 1) / unit * unit; }

// The kernel whose blocks own a tile of keys: dK, dV, and unless it has a kernel of its own, dQ.
template <class C>
struct KeyBlockShape {
  static constexpr int kThreads = C::kWarps * 32;
  static constexpr bool kAddsDq = C::kDqRoute == DqRoute::atomics;
  // S and dP are computed as rows x keys and go through shared memory, or as keys x rows and stay in registers
  static constexpr bool kTransposed = C::kWeightsSource == WeightsSource::registers;
  static constexpr bool kVInRegisters = C::kVSource == VSource::registers;

  // the warps of a product make a grid: some share its rows, the others its columns
  static constexpr int kKeyWarps = C::kKeyWarps, kColumnWarps = C::kWarps / kKeyWarps;       // dK, dV
  static constexpr int kDqRowWarps = C::kDqRowWarps, kDqColumnWarps = C::kWarps / kDqRowWarps;  // dQ
  static constexpr int kSplit = kAddsDq ? larger(kColumnWarps, kDqColumnWarps) : kColumnWarps;
  // head dims in shared memory: zeros fill up what the warps could not share evenly
  static constexpr int kD = round_up(C::kHeadDim, 16 * kSplit), kDv = round_up(C::kHeadDimV, 16 * kColumnWarps);

  // S and dP: a warp's lines (rows, or keys if transposed) and its cells of each
  static constexpr int kLines = kTransposed ? C::kTileN / C::kWarps : C::kTileM / C::kRowWarps;
  static constexpr int kCells = kTransposed ? C::kTileM : C::kTileN / (C::kWarps / C::kRowWarps);
  static constexpr int kSlabs = kLines / 16;
  static constexpr int kKeySlabs = C::kTileN / kKeyWarps / 16;
  static constexpr int kDkColumns = kD / kColumnWarps, kDvColumns = kDv / kColumnWarps;
  static constexpr int kDqSlabs = C::kTileM / kDqRowWarps / 16, kDqColumns = kD / kDqColumnWarps;
  static_assert(kLines % 16 == 0 && kCells % 16 == 0 && kDkColumns % 16 == 0 && kDvColumns % 16 == 0,
                "a warp's share is made of 16 x 16 pieces");
  static_assert(!kTransposed || kKeyWarps == C::kWarps, "P and dS in registers are of the warp's own keys");

  static constexpr bool kSwizzled = C::kSmemLayout == SmemLayout::swizzled;
  using TileQ = SmemTile<C::kTileM, kD, kSwizzled>;
  using TileDout = SmemTile<C::kTileM, kDv, kSwizzled>;
  using TileK = SmemTile<C::kTileN, kD, kSwizzled>;
  using TileV = SmemTile<C::kTileN, kDv, kSwizzled>;
  using TileS = SmemTile<kTransposed ? C::kTileN : C::kTileM, kTransposed ? C::kTileM : C::kTileN, kSwizzled>;

  static constexpr int kStatsBytes = C::kTileM * 8;
  static constexpr int kV = TileK::kBytes;
  // v in registers passes through the room of q and dO before they arrive
  static constexpr int kQ = kV + (kVInRegisters ? 0 : TileV::kBytes);
  static constexpr int kDout = kQ + C::kQStages * TileQ::kBytes;
  static constexpr int kStats = kDout + C::kDoutStages * TileDout::kBytes;
  static constexpr int kWeights = kStats + C::kQStages * kStatsBytes;
  static constexpr int kGradients = kWeights + (kTransposed ? 0 : TileS::kBytes);
  static constexpr int kEnd = kGradients + (kTransposed && !kAddsDq ? 0 : TileS::kBytes);
  static constexpr int kSmemBytes = larger(kEnd, kV + TileV::kBytes);  // dK and dV leave through the room of K and V

  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
};

// The kernel whose blocks own a tile of rows: dQ alone. A warp's rows are its own.
template <class C>
struct RowBlockShape {
  static constexpr int kThreads = C::kWarps * 32;
  static constexpr int kTileM = C::kDqTileM, kTileN = C::kDqTileN, kStages = 2;
  static constexpr int kSlabs = kTileM / C::kWarps / 16;
  static_assert(C::kDqRoute == DqRoute::atomics || kTileM % (16 * C::kWarps) == 0, "a warp's rows are slabs of 16");

  static constexpr bool kSwizzled = C::kSmemLayout == SmemLayout::swizzled;
  using TileQ = SmemTile<kTileM, C::kHeadDim, kSwizzled>;
  using TileDout = SmemTile<kTileM, C::kHeadDimV, kSwizzled>;
  using TileK = SmemTile<kTileN, C::kHeadDim, kSwizzled>;
  using TileV = SmemTile<kTileN, C::kHeadDimV, kSwizzled>;

  static constexpr int kDout = TileQ::kBytes;
  static constexpr int kKeys = kDout + TileDout::kBytes;  // the stages of K and V
  static constexpr int kStageBytes = TileK::kBytes + TileV::kBytes;
  static constexpr int kSmemBytes = kKeys + kStages * kStageBytes;
  static_assert(C::kDqRoute == DqRoute::atomics || kSmemBytes == Derived::dq_smem_bytes,
                "Python and CUDA disagree about the shared memory of dQ");
};

}  // namespace fagen

// ---- fagen/sm80/copy.cuh ---------------------------------------------------------------------------------
// Tiles from global to shared memory, copied by all threads of a block together.
#include <stdint.h>


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

namespace fagen {

// Computed once on the host for a launch.
struct GradientArgs {
  fagen_forward_params forward;  // the forward call as masks and scores read it
  int row_tiles, key_tiles;
  int stats_rows;     // a head's rows of stats: whole tiles
  RowStats* stats;    // (batch, heads, stats_rows)
  float* dq_sum;      // (batch, heads, row_tiles) tiles of fragments, see sums.cuh; null with a kernel of its own
  float* dk_sum;      // (batch, kv_heads, key_tiles) tiles of fragments; null where blocks own whole groups
  float* dv_sum;
  Extent* extents;    // intervals: of each key tile of the kernel for dQ
  float4* zeros;      // the sums, which the prologue clears
  int64_t zero_count;
};

template <class Element>
__device__ __forceinline__ GlobalMatrix<Element> matrix(const fagen_tensor& t, int batch, int head, int rows,
                                                        int cols) {
  return {static_cast<const Element*>(t.data) + batch * t.stride[0] + head * t.stride[2], t.stride[1], rows, cols};
}

// A head's mask, its intervals included. `extents` are those of (batch, mask_heads, key tiles).
template <class C>
__device__ __forceinline__ MaskOf<C> mask_of(const GradientArgs& args, int batch, int kv_head, const Extent* extents,
                                             int key_tiles) {
  const fagen_forward_params& p = args.forward;
  MaskOf<C> mask(p);
  if constexpr (MaskOf<C>::kIntervals) {
    const int head = p.mask_heads == 1 ? 0 : kv_head;
    mask.intervals.bounds = bounds_of(p, batch, head);
    mask.intervals.stride = p.intervals.stride[2];
    mask.intervals.extents = extents + int64_t(batch * p.mask_heads + head) * key_tiles * C::kIntervalColumns;
    mask.intervals.last_key = p.seqlen_k - 1;
  }
  return mask;
}

// The tile of a block: all of a head side by side, or each tile of all heads, the longest ones first.
struct BlockCoord {
  int tile, head, batch;

  template <BlockOrder kOrder, bool kLongestLast>
  static __device__ __forceinline__ BlockCoord of(unsigned index, int tiles, int heads, int batch) {
    const unsigned all = heads * batch;
    unsigned tile = index % tiles, head = index / tiles;
    if constexpr (kOrder == BlockOrder::longest_first) {
      tile = index / all, head = index % all;
      if constexpr (kLongestLast) tile = tiles - 1 - tile;
    }
    return {int(tile), int(head % heads), int(head / heads)};
  }
};

// Start copying `kRows` rows' stats to shared memory.
template <int kRows, int kThreads>
__device__ __forceinline__ void load_stats(uint32_t to, const RowStats* from) {
  static_assert(kRows / 2 <= kThreads, "one copy a thread");
  const int i = threadIdx.x;
  if (i < kRows / 2) ptx::cp_async_16(to + i * 16, from + i * 2, true);
}

}  // namespace fagen

namespace fagen {

// A tile of float32 sums in the order of a block's accumulators, so that a warp adds to neighbours.
template <int kThreads, int kSlabs, int kPieces>
struct FragmentSums {
  static constexpr int kFloats = kThreads * kSlabs * kPieces * 4;
  using Sums = float[kSlabs][kPieces][4];

  // This thread's first number, and the others from there.
  static __device__ __forceinline__ int first() { return int(threadIdx.x) * ptx::kReduceWidth; }
  static __device__ __forceinline__ constexpr int offset(int piece, int i) {
    return ptx::kReduceWidth == 4 ? piece * kThreads * 4 + i : (piece * 4 + i) * kThreads;
  }
  static __device__ __forceinline__ void add(float* tile, const Sums& sums) {
    float* mine = tile + first();
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
#pragma unroll
      for (int n = 0; n < kPieces; ++n) {
        const int piece = s * kPieces + n;
        if constexpr (ptx::kReduceWidth == 4) {
          ptx::reduce_add_4(mine + offset(piece, 0), sums[s][n]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) ptx::reduce_add(mine + offset(piece, i), sums[s][n][i]);
        }
      }
  }
  static __device__ __forceinline__ void load(const float* tile, Sums& sums) {
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
#pragma unroll
      for (int n = 0; n < kPieces; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[s][n][i] = tile[first() + offset(s * kPieces + n, i)];
  }
};

// Store a warp's part of a tile, times `factor`, through shared memory so that every store is a whole 16-byte piece of
// a row. The part starts at row `row` and column `column` of the tile, the tile at row `first` of the matrix.
template <class Tile, bool kAligned, int kSlabs, int kPieces, class Element>
__device__ __forceinline__ void store_part(const Lane& lane, uint32_t tile, int row, int column,
                                           const float (&sums)[kSlabs][kPieces][4], float factor,
                                           const GlobalMatrix<Element>& to, int first) {
  Packed<kSlabs, kPieces * 8> packed;
#pragma unroll
  for (int s = 0; s < kSlabs; ++s)
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        packed.pairs[s][n][half] = pack<Element>(sums[s][n][half * 2] * factor, sums[s][n][half * 2 + 1] * factor);
  packed.template store<Tile>(lane, tile, row, column);
  __syncwarp();  // a warp reads back only what it wrote
#pragma unroll 4
  for (int i = lane.id; i < kSlabs * 16 * kPieces; i += 32) {
    const int at = row + i / kPieces, chunk = column / 8 + i % kPieces, cols = to.cols - chunk * 8;
    if (first + at >= to.rows || cols <= 0) continue;
    const uint4 value = ptx::ld_shared_16(tile + Tile::offset(at, chunk));
    Element* out = const_cast<Element*>(to.base) + (first + at) * to.stride + chunk * 8;
    if constexpr (kAligned) {
      *reinterpret_cast<uint4*>(out) = value;
    } else {
      Element e[8];
      memcpy(e, &value, 16);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < cols) out[j] = e[j];
    }
  }
}

}  // namespace fagen

namespace fagen {

// Where a warp's share of dK, dV and dQ begins.
template <class C>
struct KeyBlockShare {
  using S = KeyBlockShape<C>;
  int warp = threadIdx.x / 32;
  int line = (S::kTransposed ? warp : warp % C::kRowWarps) * S::kLines;           // of S and dP
  int cell = S::kTransposed ? 0 : warp / C::kRowWarps * S::kCells;
  int key = warp % S::kKeyWarps * S::kKeySlabs * 16, part = warp / S::kKeyWarps;  // of dK and dV
  int dq_row = warp % S::kDqRowWarps * S::kDqSlabs * 16, dq_part = warp / S::kDqRowWarps;
};

// The block's part of dK and dV, as rows.
template <class C, class Element, int kSlabs, int kDkPieces, int kDvPieces>
__device__ __forceinline__ void store_keys(const fagen_backward_params& p, const Lane& lane,
                                           const KeyBlockShare<C>& share, uint32_t smem, int batch, int kv_head,
                                           int first_key, const float (&dk)[kSlabs][kDkPieces][4],
                                           const float (&dv)[kSlabs][kDvPieces][4]) {
  using S = KeyBlockShape<C>;
  const auto to_dk = matrix<Element>(p.dk, batch, kv_head, p.seqlen_k, p.head_dim);
  const auto to_dv = matrix<Element>(p.dv, batch, kv_head, p.seqlen_k, p.head_dim_v);
  store_part<typename S::TileK, C::kAligned>(lane, smem, share.key, share.part * S::kDkColumns, dk, p.scale, to_dk,
                                             first_key);
  store_part<typename S::TileV, C::kAligned>(lane, smem + S::kV, share.key, share.part * S::kDvColumns, dv,
                                             scale_up<C>(p, 1.f), to_dv, first_key);
}

// One tile of keys: its operands in shared memory, its sums in registers, and one step a tile of rows.
template <class C, class Element>
struct KeyBlock {
  using S = KeyBlockShape<C>;
  using WarpCells = Cells<C, Element, S::kTransposed, S::kSlabs, S::kCells>;
  using DqSums = FragmentSums<S::kThreads, S::kDqSlabs, S::kDqColumns / 8>;
  using DkSums = FragmentSums<S::kThreads, S::kKeySlabs, S::kDkColumns / 8>;
  using DvSums = FragmentSums<S::kThreads, S::kKeySlabs, S::kDvColumns / 8>;
  static constexpr int kVSlabs = S::kTransposed ? S::kSlabs : S::kCells / 16;

  const fagen_backward_params& p;
  const GradientArgs& args;
  BlockCoord coord;  // of a key tile; its head is a kv head where a block works for a whole group
  uint32_t smem;
  unsigned char* smem_bytes;
  int group, kv_head, first_head, heads;  // the heads that this block adds up
  MaskOf<C> mask;
  Lane lane;
  KeyBlockShare<C> share;
  uint32_t v_registers[S::kVInRegisters ? kVSlabs : 1][S::kVInRegisters ? S::kDv / 16 : 1][4];
  typename DkSums::Sums dk;
  typename DvSums::Sums dv;

  __device__ __forceinline__ KeyBlock(const fagen_backward_params& p, const GradientArgs& args, unsigned char* shared)
      : p(p),
        args(args),
        coord(BlockCoord::of<C::kBlockOrder, false>(blockIdx.x, args.key_tiles, args.dk_sum ? p.heads : p.kv_heads,
                                                    p.batch)),
        smem(ptx::shared_address(shared)),
        smem_bytes(shared),
        group(p.heads / p.kv_heads),
        kv_head(args.dk_sum ? coord.head / group : coord.head),
        first_head(args.dk_sum ? coord.head : coord.head * group),
        heads(args.dk_sum ? 1 : group),
        mask(mask_of<C>(args, coord.batch, kv_head, nullptr, 0)) {
    clear(dk);
    clear(dv);
  }

  __device__ __forceinline__ int first_key() const { return coord.tile * C::kTileN; }
  __device__ __forceinline__ uint32_t q_tile(int stage) const { return smem + S::kQ + stage * S::TileQ::kBytes; }
  __device__ __forceinline__ uint32_t dout_tile(int stage) const {
    return smem + S::kDout + stage * S::TileDout::kBytes;
  }
  __device__ __forceinline__ const RowStats* stats(int stage) const {
    return reinterpret_cast<const RowStats*>(smem_bytes + S::kStats + stage * S::kStatsBytes);
  }

  // ---- copies

  __device__ __forceinline__ void load_keys() {
    const auto k = matrix<Element>(p.k, coord.batch, kv_head, p.seqlen_k, p.head_dim);
    const auto v = matrix<Element>(p.v, coord.batch, kv_head, p.seqlen_k, p.head_dim_v);
    load_tile<typename S::TileK, C::kTileN, S::kThreads, C::kAligned>(smem, k, first_key(), threadIdx.x);
    load_tile<typename S::TileV, C::kTileN, S::kThreads, C::kAligned>(smem + S::kV, v, first_key(), threadIdx.x);
    ptx::cp_async_commit();
    if constexpr (S::kVInRegisters) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      hold_v();
      __syncthreads();  // q and dO may lie over v
    }
  }
  // q with the stats of its rows.
  __device__ __forceinline__ void load_q(int stage, int head, int tile) const {
    const auto q = matrix<Element>(p.q, coord.batch, head, p.seqlen_q, p.head_dim);
    load_tile<typename S::TileQ, C::kTileM, S::kThreads, C::kAligned>(q_tile(stage), q, tile * C::kTileM, threadIdx.x);
    const int64_t row = (int64_t(coord.batch) * p.heads + head) * args.stats_rows + int64_t(tile) * C::kTileM;
    load_stats<C::kTileM, S::kThreads>(smem + S::kStats + stage * S::kStatsBytes, args.stats + row);
  }
  __device__ __forceinline__ void load_dout(int stage, int head, int tile) const {
    const auto dout = matrix<Element>(p.dout, coord.batch, head, p.seqlen_q, p.head_dim_v);
    load_tile<typename S::TileDout, C::kTileM, S::kThreads, C::kAligned>(dout_tile(stage), dout, tile * C::kTileM,
                                                                         threadIdx.x);
  }

  // ---- products

  // V's fragments: it is the A operand of dP transposed, else B.
  __device__ __forceinline__ void hold_v() {
    const uint32_t tile = smem + S::kV;
    const auto v = S::kTransposed ? Operand<typename S::TileV>::rows_first(lane, tile, share.line, 0)
                                  : Operand<typename S::TileV>::columns_first(lane, tile, share.cell, 0);
#pragma unroll
    for (int s = 0; s < kVSlabs; ++s)
#pragma unroll
      for (int d = 0; d < S::kDv / 16; ++d) v.load(v_registers[s][d], s, d);
  }

  // S, or its transpose: head dims lie across in both operands.
  __device__ __forceinline__ void compute_scores(typename WarpCells::Sums& sums, int stage) const {
    using TileA = Select<S::kTransposed, typename S::TileK, typename S::TileQ>;
    using TileB = Select<S::kTransposed, typename S::TileQ, typename S::TileK>;
    const auto a = Operand<TileA>::rows_first(lane, S::kTransposed ? smem : q_tile(stage), share.line, 0);
    const auto b = Operand<TileB>::columns_first(lane, S::kTransposed ? q_tile(stage) : smem, share.cell, 0);
    clear(sums);
    multiply<Element, S::kD / 16>(
        sums, [&](uint32_t (&f)[4], int s, int d) { a.load(f, s, d); },
        [&](uint32_t (&f)[4], int n, int d) { b.load(f, n, d); });
  }

  // dP = dO V^T, or its transpose.
  __device__ __forceinline__ void compute_dp(typename WarpCells::Sums& sums, int stage) const {
    using TileA = Select<S::kTransposed, typename S::TileV, typename S::TileDout>;
    using TileB = Select<S::kTransposed, typename S::TileDout, typename S::TileV>;
    const uint32_t v = smem + S::kV, dout = dout_tile(stage);
    const auto a = Operand<TileA>::rows_first(lane, S::kTransposed ? v : dout, share.line, 0);
    const auto b = Operand<TileB>::columns_first(lane, S::kTransposed ? dout : v, share.cell, 0);
    clear(sums);
    multiply<Element, S::kDv / 16>(
        sums,
        [&](uint32_t (&f)[4], int s, int d) {
          if constexpr (S::kVInRegisters && S::kTransposed)
            copy_v(f, s, d);
          else
            a.load(f, s, d);
        },
        [&](uint32_t (&f)[4], int n, int d) {
          if constexpr (S::kVInRegisters && !S::kTransposed)
            copy_v(f, n, d);
          else
            b.load(f, n, d);
        });
  }
  __device__ __forceinline__ void copy_v(uint32_t (&f)[4], int s, int d) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) f[i] = v_registers[s][d][i];
  }

  // sums += X^T B over the rows of the tile: P^T dO is dV, dS^T Q is dK. X waits in registers or at `x_tile`.
  template <class TileB, int kColumns>
  __device__ __forceinline__ void add_over_rows(float (&sums)[S::kKeySlabs][kColumns / 8][4],
                                                const typename WarpCells::Pairs& x, uint32_t x_tile,
                                                uint32_t b_tile) const {
    const auto a = Operand<typename S::TileS>::columns_first(lane, x_tile, 0, share.key / 16);
    const auto b = Operand<TileB>::rows_first(lane, b_tile, 0, share.part * (kColumns / 16));
    multiply<Element, C::kTileM / 16>(
        sums,
        [&](uint32_t (&f)[4], int s, int step) {
          if constexpr (S::kTransposed)
            x.operand(f, s, step);
          else
            a.load_transposed(f, step, s);
        },
        [&](uint32_t (&f)[4], int n, int step) { b.load_transposed(f, step, n); });
  }

  // dQ of a tile of rows += dS K, over this block's keys.
  __device__ __forceinline__ void add_dq(int head, int tile) const {
    using Sums = typename DqSums::Sums;
    using DsOperand = Operand<typename S::TileS>;
    const uint32_t ds = smem + S::kGradients;
    const auto a = S::kTransposed ? DsOperand::columns_first(lane, ds, 0, share.dq_row / 16)
                                  : DsOperand::rows_first(lane, ds, share.dq_row, 0);
    const auto b = Operand<typename S::TileK>::rows_first(lane, smem, 0, share.dq_part * (S::kDqColumns / 16));
    Sums sums;
    clear(sums);
    multiply<Element, C::kTileN / 16>(
        sums,
        [&](uint32_t (&f)[4], int s, int step) {
          if constexpr (S::kTransposed)
            a.load_transposed(f, step, s);
          else
            a.load(f, s, step);
        },
        [&](uint32_t (&f)[4], int n, int step) { b.load_transposed(f, step, n); });
    const int64_t index = (int64_t(coord.batch) * p.heads + head) * args.row_tiles + tile;
    DqSums::add(args.dq_sum + index * DqSums::kFloats, sums);
  }

  // ---- one tile of rows: `load_next` starts the copies that need the room of q and dO

  template <bool kMasked, class LoadNext>
  __device__ __forceinline__ void visit(const ScoreGradient<C>& score, int head, int tile, int parity,
                                        LoadNext load_next) {
    const int q_stage = C::kQStages == 2 ? parity : 0, dout_stage = C::kDoutStages == 2 ? parity : 0;
    const uint32_t weights_tile = smem + S::kWeights, gradients_tile = smem + S::kGradients;
    typename WarpCells::Pairs weights, gradients;
    {
      typename WarpCells::Sums s_acc, dp_acc;
      compute_scores(s_acc, q_stage);
      compute_dp(dp_acc, dout_stage);
      const int row = S::kTransposed ? share.cell : share.line, key = S::kTransposed ? share.line : share.cell;
      const WarpCells cells{lane, score, mask, stats(q_stage) + row, tile * C::kTileM + row, first_key() + key};
      cells.template differentiate<kMasked>(s_acc, dp_acc, weights, gradients);
    }
    if constexpr (!S::kTransposed)
      weights.template store<typename S::TileS>(lane, weights_tile, share.line, share.cell);
    if constexpr (!S::kTransposed || S::kAddsDq)
      gradients.template store<typename S::TileS>(lane, gradients_tile, share.line, share.cell);
    if constexpr (!S::kTransposed) __syncthreads();
    add_over_rows<typename S::TileDout, S::kDvColumns>(dv, weights, weights_tile, dout_tile(dout_stage));
    add_over_rows<typename S::TileQ, S::kDkColumns>(dk, gradients, gradients_tile, q_tile(q_stage));
    load_next();
    if constexpr (S::kAddsDq) add_dq(head, tile);
  }

  // ---- the end: dK and dV

  __device__ __forceinline__ void store() {
    if constexpr (C::kGqa == Gqa::atomics)
      if (args.dk_sum) {
        const int64_t index = (int64_t(coord.batch) * p.kv_heads + kv_head) * args.key_tiles + coord.tile;
        DkSums::add(args.dk_sum + index * DkSums::kFloats, dk);
        DvSums::add(args.dv_sum + index * DvSums::kFloats, dv);
        return;
      }
    ptx::cp_async_wait<0>();
    __syncthreads();  // nobody reads K and V any more
    store_keys<C, Element>(p, lane, share, smem, coord.batch, kv_head, first_key(), dk, dv);
  }
};

template <class C, class Element>
__device__ __forceinline__ void run_key_block(KeyBlock<C, Element>& block) {
  using S = KeyBlockShape<C>;
  const KeyTileMask<C> tiles(block.mask, block.first_key(), block.p.seqlen_q);
  const int first = tiles.next(block.mask, tiles.range.begin), heads_end = block.first_head + block.heads;
  int parity = 0;  // of the tile: its stage, where there are two

  block.load_keys();
  if (first < tiles.range.end) {
    block.load_q(0, block.first_head, first);
    block.load_dout(0, block.first_head, first);
  }
  ptx::cp_async_commit();

  for (int head = block.first_head; head < heads_end; ++head) {
    const ScoreGradient<C> score(block.args.forward, block.coord.batch, head);
    tiles.visit_all(block.mask, [&](int tile, auto masked) {
      constexpr bool kOneStage = C::kQStages == 1 || C::kDoutStages == 1;
      // the copies are one tile ahead of the products, through all heads of the group
      int next = tiles.next(block.mask, tile + 1), next_head = head;
      if (next >= tiles.range.end) next = first, ++next_head;
      const bool more = next_head < heads_end;
      ptx::cp_async_wait<0>();
      __syncthreads();  // the tile is there, and nobody works on the one before
      if (C::kQStages == 2 && more) block.load_q(parity ^ 1, next_head, next);
      if (C::kDoutStages == 2 && more) block.load_dout(parity ^ 1, next_head, next);
      block.template visit<decltype(masked)::value>(score, head, tile, parity, [&] {
        if constexpr (kOneStage || (S::kTransposed && S::kAddsDq)) __syncthreads();
        if (C::kQStages == 1 && more) block.load_q(0, next_head, next);
        if (C::kDoutStages == 1 && more) block.load_dout(0, next_head, next);
        ptx::cp_async_commit();
      });
      parity ^= 1;
    });
  }
  block.store();
}

}  // namespace fagen

// ---- fagen/sm80/backward/row_block.cuh -------------------------------------------------------------------
// dQ in a kernel of its own: a block keeps one tile of rows, and the keys pass by as in forward. S and dP are computed
// a second time, and nothing is added across blocks: two runs agree in every bit.

namespace fagen {

// The config of this kernel's tiles, for the masks.
template <class C>
struct RowBlockConfig : C {
  static constexpr int kTileM = C::kDqTileM, kTileN = C::kDqTileN;
};

template <class C, class Element>
struct RowBlock {
  using S = RowBlockShape<C>;
  using R = RowBlockConfig<C>;
  using WarpCells = Cells<R, Element, false, S::kSlabs, S::kTileN>;

  const fagen_backward_params& p;
  BlockCoord coord;  // of a row tile
  uint32_t smem;
  int kv_head, first_row;  // the warp's first row in the tile
  MaskOf<R> mask;
  ScoreGradient<R> score;
  const RowStats* stats;  // of the warp's first row
  Lane lane;
  float dq[S::kSlabs][C::kHeadDim / 8][4];

  __device__ __forceinline__ RowBlock(const fagen_backward_params& p, const GradientArgs& args, unsigned char* shared)
      : p(p),
        coord(BlockCoord::of<C::kBlockOrder, true>(blockIdx.x, args.row_tiles, p.heads, p.batch)),
        smem(ptx::shared_address(shared)),
        kv_head(coord.head / (p.heads / p.kv_heads)),
        first_row(threadIdx.x / 32 * S::kSlabs * 16),
        mask(mask_of<R>(args, coord.batch, kv_head, args.extents, (p.seqlen_k + S::kTileN - 1) / S::kTileN)),
        score(args.forward, coord.batch, coord.head),
        stats(args.stats + (int64_t(coord.batch) * p.heads + coord.head) * args.stats_rows +
              int64_t(coord.tile) * S::kTileM + first_row) {
    clear(dq);
  }

  __device__ __forceinline__ uint32_t k_tile(int stage) const { return smem + S::kKeys + stage * S::kStageBytes; }
  __device__ __forceinline__ uint32_t v_tile(int stage) const { return k_tile(stage) + S::TileK::kBytes; }

  __device__ __forceinline__ void load_rows() const {
    const auto q = matrix<Element>(p.q, coord.batch, coord.head, p.seqlen_q, p.head_dim);
    const auto dout = matrix<Element>(p.dout, coord.batch, coord.head, p.seqlen_q, p.head_dim_v);
    const int first = coord.tile * S::kTileM;
    load_tile<typename S::TileQ, S::kTileM, S::kThreads, C::kAligned>(smem, q, first, threadIdx.x);
    load_tile<typename S::TileDout, S::kTileM, S::kThreads, C::kAligned>(smem + S::kDout, dout, first, threadIdx.x);
  }
  __device__ __forceinline__ void load_keys(int stage, int tile) const {
    const auto k = matrix<Element>(p.k, coord.batch, kv_head, p.seqlen_k, p.head_dim);
    const auto v = matrix<Element>(p.v, coord.batch, kv_head, p.seqlen_k, p.head_dim_v);
    const int first = tile * S::kTileN;
    load_tile<typename S::TileK, S::kTileN, S::kThreads, C::kAligned>(k_tile(stage), k, first, threadIdx.x);
    load_tile<typename S::TileV, S::kTileN, S::kThreads, C::kAligned>(v_tile(stage), v, first, threadIdx.x);
  }

  // The product of the warp's rows with all keys of a tile, head dims across in both.
  template <class TileA, class TileB, int kSteps>
  __device__ __forceinline__ void row_product(typename WarpCells::Sums& sums, uint32_t rows, uint32_t keys) const {
    const auto a = Operand<TileA>::rows_first(lane, rows, first_row, 0);
    const auto b = Operand<TileB>::columns_first(lane, keys, 0, 0);
    clear(sums);
    multiply<Element, kSteps>(
        sums, [&](uint32_t (&f)[4], int s, int d) { a.load(f, s, d); },
        [&](uint32_t (&f)[4], int n, int d) { b.load(f, n, d); });
  }

  template <bool kMasked>
  __device__ __forceinline__ void visit(int stage, int tile) {
    typename WarpCells::Pairs weights, gradients;
    typename WarpCells::Sums s_acc, dp_acc;
    row_product<typename S::TileQ, typename S::TileK, C::kHeadDim / 16>(s_acc, smem, k_tile(stage));
    row_product<typename S::TileDout, typename S::TileV, C::kHeadDimV / 16>(dp_acc, smem + S::kDout, v_tile(stage));
    const WarpCells cells{lane, score, mask, stats, coord.tile * S::kTileM + first_row, tile * S::kTileN};
    cells.template differentiate<kMasked>(s_acc, dp_acc, weights, gradients);
    const auto b = Operand<typename S::TileK>::rows_first(lane, k_tile(stage), 0, 0);
    multiply<Element, S::kTileN / 16>(
        dq, [&](uint32_t (&f)[4], int s, int step) { gradients.operand(f, s, step); },
        [&](uint32_t (&f)[4], int n, int step) { b.load_transposed(f, step, n); });
  }

  __device__ __forceinline__ void store() const {
    ptx::cp_async_wait<0>();
    __syncthreads();  // nobody reads q any more
    const auto to = matrix<Element>(p.dq, coord.batch, coord.head, p.seqlen_q, p.head_dim);
    store_part<typename S::TileQ, C::kAligned>(lane, smem, first_row, 0, dq, p.scale, to, coord.tile * S::kTileM);
  }
};

template <class C, class Element>
__device__ __forceinline__ void run_row_block(RowBlock<C, Element>& block) {
  using S = RowBlockShape<C>;
  const int m0 = block.coord.tile * S::kTileM, m1 = min(m0 + S::kTileM, block.p.seqlen_q);
  const TileRange range = TileRange::of<S::kTileN>(block.mask.band, m0, m1);
  auto walk = block.mask.walk(range, m0, m1);   // the tile that is computed
  auto ahead = block.mask.walk(range, m0, m1);  // the next tile to be loaded
  int stage = 0;

  block.load_rows();
  if (ahead.valid()) {
    block.load_keys(0, ahead.tile);
    ahead.advance();
  }
  ptx::cp_async_commit();
  walk.visit_rest(range, [&](int tile, auto masked) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody works on the one before
    if (ahead.valid()) {
      block.load_keys(stage ^ 1, ahead.tile);
      ahead.advance();
    }
    ptx::cp_async_commit();
    block.template visit<decltype(masked)::value>(stage, tile);
    stage ^= 1;
  });
  block.store();
}

}  // namespace fagen

namespace fagen {

// dQ of a tile of rows from the sums of all tiles of keys.
template <class C, class Element>
__device__ __forceinline__ void store_dq_sums(const fagen_backward_params& p, const GradientArgs& args,
                                              unsigned char* shared) {
  using S = KeyBlockShape<C>;
  using DqSums = typename KeyBlock<C, Element>::DqSums;
  const KeyBlockShare<C> share;
  const int tile = blockIdx.x % args.row_tiles, head = blockIdx.x / args.row_tiles;
  typename DqSums::Sums dq;
  DqSums::load(args.dq_sum + int64_t(blockIdx.x) * DqSums::kFloats, dq);
  const auto to = matrix<Element>(p.dq, head / p.heads, head % p.heads, p.seqlen_q, p.head_dim);
  store_part<typename S::TileQ, C::kAligned>(Lane(), ptx::shared_address(shared), share.dq_row,
                                             share.dq_part * S::kDqColumns, dq, p.scale, to, tile * C::kTileM);
}

template <class C, class Element>
__device__ __forceinline__ void run_dq(const fagen_backward_params& p, const GradientArgs& args,
                                       unsigned char* shared) {
  if constexpr (KeyBlockShape<C>::kAddsDq) {
    store_dq_sums<C, Element>(p, args, shared);
  } else {
    RowBlock<C, Element> block(p, args, shared);
    run_row_block(block);
  }
}

// dK and dV of a tile of keys from the sums of all heads of a group.
template <class C, class Element>
__device__ __forceinline__ void run_dkv(const fagen_backward_params& p, const GradientArgs& args,
                                        unsigned char* shared) {
  if constexpr (C::kGqa == Gqa::atomics) {
    using Block = KeyBlock<C, Element>;
    const int tile = blockIdx.x % args.key_tiles, head = blockIdx.x / args.key_tiles;
    typename Block::DkSums::Sums dk;
    typename Block::DvSums::Sums dv;
    Block::DkSums::load(args.dk_sum + int64_t(blockIdx.x) * Block::DkSums::kFloats, dk);
    Block::DvSums::load(args.dv_sum + int64_t(blockIdx.x) * Block::DvSums::kFloats, dv);
    store_keys<C, Element>(p, Lane(), KeyBlockShare<C>(), ptx::shared_address(shared), head / p.kv_heads,
                           head % p.kv_heads, tile * C::kTileN, dk, dv);
  }
}

}  // namespace fagen


// ---- fagen/sm80/backward/prologue.cuh --------------------------------------------------------------------
// Before the main kernel: the stats of every row, and zeros where blocks will add.

namespace fagen {

constexpr int kPrologueThreads = 256;
constexpr int kLanesPerRow = 8;
constexpr int kPrologueRows = kPrologueThreads / kLanesPerRow;  // rows of a block

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack<bfloat_t>(uint32_t pair) {
  __nv_bfloat162 both;
  memcpy(&both, &pair, 4);
  return __bfloat1622float2(both);
}

template <>
__device__ __forceinline__ float2 unpack<half_t>(uint32_t pair) {
  __half2 both;
  memcpy(&both, &pair, 4);
  return __half22float2(both);
}

// Eight neighbouring elements of a row as numbers; those past `count` are 0.
template <bool kAligned, class Element>
__device__ __forceinline__ void load_chunk(float (&x)[8], const Element* from, int count) {
  uint4 chunk;
  if constexpr (kAligned)
    chunk = *reinterpret_cast<const uint4*>(from);
  else
    chunk = gather_chunk(from, count);
  const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = unpack<Element>(pairs[i]);
    x[2 * i] = both.x, x[2 * i + 1] = both.y;
  }
}

// A row's sum of dO * O, eight lanes together.
template <class C, class Element>
__device__ __forceinline__ float dot(const GlobalMatrix<Element>& o, const GlobalMatrix<Element>& dout, int row,
                                     int lane) {
  float sum = 0.f;
#pragma unroll
  for (int first = 0; first < C::kHeadDimV; first += kLanesPerRow * 8) {
    const int column = first + lane * 8;
    if (row >= o.rows || column >= o.cols) continue;
    float x[8], y[8];
    load_chunk<C::kAligned>(x, o.base + row * o.stride + column, o.cols - column);
    load_chunk<C::kAligned>(y, dout.base + row * dout.stride + column, o.cols - column);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
  }
#pragma unroll
  for (int step = kLanesPerRow / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// Rows count those that fill up the last tile of each head.
template <class C, class Element>
__device__ __forceinline__ void run_prologue(const fagen_backward_params& p, const GradientArgs& args) {
  for (int64_t i = int64_t(blockIdx.x) * kPrologueThreads + threadIdx.x; i < args.zero_count;
       i += int64_t(gridDim.x) * kPrologueThreads)
    args.zeros[i] = make_float4(0.f, 0.f, 0.f, 0.f);

  const int lane = threadIdx.x % kLanesPerRow;
  const int64_t index = int64_t(blockIdx.x) * kPrologueRows + threadIdx.x / kLanesPerRow;
  const int64_t all = int64_t(p.batch) * p.heads * args.stats_rows;
  const int64_t head = (index < all ? index : all - 1) / args.stats_rows;  // every lane takes part in the sum
  const int row = index < all ? int(index - head * args.stats_rows) : p.seqlen_q;
  const int b = int(head / p.heads), h = int(head % p.heads);
  const auto o = matrix<Element>(p.o, b, h, p.seqlen_q, p.head_dim_v);
  const auto dout = matrix<Element>(p.dout, b, h, p.seqlen_q, p.head_dim_v);
  RowStats stats = {INFINITY, dot<C>(o, dout, row, lane)};
  if (index >= all || lane != 0) return;
  if (row < p.seqlen_q) {
    const int64_t at = head * p.seqlen_q + row;
    if (p.dlse) stats.delta -= p.dlse[at];
    if (p.lse[at] == -INFINITY)
      stats.delta = 0.f;  // nothing that was computed from this row depends on anything
    else
      stats.lse_log2 = p.lse[at] * ScoreGradient<C>::kLog2e;
  }
  args.stats[index] = stats;
}

}  // namespace fagen


namespace fagen {

using Element = bfloat_t;
using KeyShape = KeyBlockShape<Config>;
using RowShape = RowBlockShape<Config>;
static_assert(!Config::kDeterministic || (!KeyShape::kAddsDq && Config::kGqa == Gqa::in_block),
              "float32 additions of blocks come in any order");

// 1. The stats of rows; zeros for the sums.
__global__ void __launch_bounds__(kPrologueThreads)
prologue_kernel(const __grid_constant__ fagen_backward_params p, const __grid_constant__ GradientArgs args) {
  run_prologue<Config, Element>(p, args);
}

// 2. dK and dV: one block takes one tile of keys of a group of heads, or of one head. It may add its part of dQ.
__global__ void __launch_bounds__(KeyShape::kThreads, Config::kBlocksPerSm)
main_kernel(const __grid_constant__ fagen_backward_params p, const __grid_constant__ GradientArgs args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  KeyBlock<Config, Element> block(p, args, shared);
  run_key_block(block);
}

// 3. dQ: from the sums, or computed by blocks of its own.
__global__ void __launch_bounds__(RowShape::kThreads)
dq_kernel(const __grid_constant__ fagen_backward_params p, const __grid_constant__ GradientArgs args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  run_dq<Config, Element>(p, args, shared);
}

// Intervals: the extents of each key tile, for the kernel of dQ.
__global__ void extents_kernel(const __grid_constant__ fagen_forward_params p, Extent* extents, int tiles) {
  find_extents<RowBlockConfig<Config>>(p, extents, tiles);
}

// 4. dK and dV from the sums of a group's heads.
__global__ void __launch_bounds__(KeyShape::kThreads)
dkv_kernel(const __grid_constant__ fagen_backward_params p, const __grid_constant__ GradientArgs args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  run_dkv<Config, Element>(p, args, shared);
}

// ---- host ----------------------------------------------------------------------------------------------------------

constexpr int kRowTile = KeyShape::kAddsDq ? Config::kTileM : RowShape::kTileM;  // rows of a block of dq_kernel
constexpr int kDqBytes = KeyShape::kAddsDq ? KeyShape::TileQ::kBytes : RowShape::kSmemBytes;
constexpr int kDkvBytes = KeyShape::kV + KeyShape::TileV::kBytes;

// The workspace: stats, then the sums of dQ, dK and dV, then extents.
struct Workspace {
  int row_tiles, key_tiles, extent_tiles, stats_rows;
  uint64_t stats, dq, dk, dv, extents;  // bytes of each

  explicit Workspace(const fagen_backward_params& p) : dq(0), dk(0), dv(0), extents(0) {
    const uint64_t heads = uint64_t(p.batch) * p.heads, kv_heads = uint64_t(p.batch) * p.kv_heads;
    row_tiles = ceil_div(p.seqlen_q, kRowTile), key_tiles = ceil_div(p.seqlen_k, Config::kTileN);
    extent_tiles = ceil_div(p.seqlen_k, RowShape::kTileN);
    stats_rows = round_up(p.seqlen_q, larger(kRowTile, Config::kTileM));
    stats = align_workspace(heads * stats_rows * sizeof(RowStats));
    if (KeyShape::kAddsDq) dq = align_workspace(heads * row_tiles * Config::kTileM * KeyShape::kD * sizeof(float));
    if (Config::kGqa == Gqa::atomics && p.heads > p.kv_heads) {
      dk = align_workspace(kv_heads * key_tiles * Config::kTileN * KeyShape::kD * sizeof(float));
      dv = align_workspace(kv_heads * key_tiles * Config::kTileN * KeyShape::kDv * sizeof(float));
    }
    if (MaskOf<Config>::kIntervals && !KeyShape::kAddsDq)
      extents = align_workspace(uint64_t(p.batch) * p.mask_heads * extent_tiles * Config::kIntervalColumns *
                                sizeof(Extent));
  }
  uint64_t bytes() const { return stats + dq + dk + dv + extents; }
};

// Masks and scores are those of the forward call.
static fagen_forward_params forward_of(const fagen_backward_params& p) {
  fagen_forward_params f = {};
  f.intervals = p.intervals, f.alibi_slopes = p.alibi_slopes;
  f.batch = p.batch, f.heads = p.heads, f.kv_heads = p.kv_heads, f.mask_heads = p.mask_heads;
  f.seqlen_q = p.seqlen_q, f.seqlen_k = p.seqlen_k;
  f.window_left = p.window_left, f.window_right = p.window_right;
  f.scale = p.scale, f.softcap = p.softcap, f.dropout = p.dropout, f.rng = p.rng;
  return f;
}

static GradientArgs args_of(const fagen_backward_params& p, const Workspace& w) {
  char* at = static_cast<char*>(p.workspace);
  const auto take = [&](uint64_t bytes) {
    char* here = at;
    at += bytes;
    return bytes ? here : nullptr;
  };
  GradientArgs args = {};
  args.forward = forward_of(p);
  args.row_tiles = w.row_tiles, args.key_tiles = w.key_tiles, args.stats_rows = w.stats_rows;
  args.stats = reinterpret_cast<RowStats*>(take(w.stats));
  args.zeros = reinterpret_cast<float4*>(at);
  args.zero_count = int64_t((w.dq + w.dk + w.dv) / sizeof(float4));
  args.dq_sum = reinterpret_cast<float*>(take(w.dq));
  args.dk_sum = reinterpret_cast<float*>(take(w.dk));
  args.dv_sum = reinterpret_cast<float*>(take(w.dv));
  args.extents = reinterpret_cast<Extent*>(take(w.extents));
  return args;
}

// More shared memory than the default, once a device.
static cudaError_t prepare(int, bool& ready) {
  constexpr auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  ready = true;
  if (const cudaError_t e = cudaFuncSetAttribute(main_kernel, attribute, KeyShape::kSmemBytes)) return e;
  if (const cudaError_t e = cudaFuncSetAttribute(dkv_kernel, attribute, kDkvBytes)) return e;
  return cudaFuncSetAttribute(dq_kernel, attribute, kDqBytes);
}

static cudaError_t launch_backward(const fagen_backward_params& p, cudaStream_t stream) {
  bool ready;
  if (const cudaError_t e = once_per_device(&ready, prepare)) return e;
  const Workspace w(p);
  const GradientArgs args = args_of(p, w);
  const int64_t heads = int64_t(p.batch) * p.heads, kv_heads = int64_t(p.batch) * p.kv_heads;
  const auto blocks = [](int64_t n) { return unsigned(n); };
  if (const int64_t rows = heads * w.stats_rows)
    prologue_kernel<<<blocks(ceil_div(rows, kPrologueRows)), kPrologueThreads, 0, stream>>>(p, args);
  if (const int64_t tiles = (w.dk ? heads : kv_heads) * w.key_tiles)
    main_kernel<<<blocks(tiles), KeyShape::kThreads, KeyShape::kSmemBytes, stream>>>(p, args);
  if (w.extents) {
    const int64_t warps = int64_t(w.extent_tiles) * p.batch * p.mask_heads;
    extents_kernel<<<blocks(ceil_div(warps, 8)), 256, 0, stream>>>(args.forward, args.extents, w.extent_tiles);
  }
  if (const int64_t tiles = heads * w.row_tiles)
    dq_kernel<<<blocks(tiles), RowShape::kThreads, kDqBytes, stream>>>(p, args);
  if (w.dk) dkv_kernel<<<blocks(kv_heads * w.key_tiles), KeyShape::kThreads, kDkvBytes, stream>>>(p, args);
  return cudaGetLastError();
}

}  // namespace fagen

extern "C" uint64_t fagen_workspace_bytes(const fagen_backward_params* p) { return fagen::Workspace(*p).bytes(); }

extern "C" const char* fagen_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

extern "C" int fagen_launch(const fagen_backward_params* p, void* stream) {
  return fagen::launch_backward(*p, static_cast<cudaStream_t>(stream));
}

// Name, offset and size of every field of the params, as this compiler laid them out.
#include <stddef.h>
#include <stdio.h>

extern "C" const char* fagen_params_layout(void) {
  static char text[1231];
  static const char* const told = [] {
    char* end = text;
#define FAGEN_FIELD(field) \
  end += snprintf(end, text + sizeof text - end, "%s %zu %zu; ", #field, offsetof(fagen_backward_params, field), \
                  sizeof(fagen_backward_params::field))
    FAGEN_FIELD(q.data); FAGEN_FIELD(q.stride); FAGEN_FIELD(k.data); FAGEN_FIELD(k.stride); FAGEN_FIELD(v.data);
    FAGEN_FIELD(v.stride); FAGEN_FIELD(o.data); FAGEN_FIELD(o.stride); FAGEN_FIELD(dout.data);
    FAGEN_FIELD(dout.stride); FAGEN_FIELD(dq.data); FAGEN_FIELD(dq.stride); FAGEN_FIELD(dk.data);
    FAGEN_FIELD(dk.stride); FAGEN_FIELD(dv.data); FAGEN_FIELD(dv.stride); FAGEN_FIELD(intervals.data);
    FAGEN_FIELD(intervals.stride); FAGEN_FIELD(alibi_slopes.data); FAGEN_FIELD(alibi_slopes.stride);
    FAGEN_FIELD(lse); FAGEN_FIELD(dlse); FAGEN_FIELD(workspace); FAGEN_FIELD(batch); FAGEN_FIELD(heads);
    FAGEN_FIELD(kv_heads); FAGEN_FIELD(mask_heads); FAGEN_FIELD(seqlen_q); FAGEN_FIELD(seqlen_k);
    FAGEN_FIELD(head_dim); FAGEN_FIELD(head_dim_v); FAGEN_FIELD(window_left); FAGEN_FIELD(window_right);
    FAGEN_FIELD(scale); FAGEN_FIELD(softcap); FAGEN_FIELD(dropout); FAGEN_FIELD(rng);
#undef FAGEN_FIELD
    snprintf(end, text + sizeof text - end, "sizeof %zu", sizeof(fagen_backward_params));
    return text;
  }();
  return told;
}
