// An attention kernel made by fagen. It needs the CUDA toolkit and nothing else: no torch, no Python.
//
// problem:  forward/bf16/d64/none, its config chosen for b4/h32-32/q4096-k4096
// config:   tile_m=192 tile_n=128 stages=2 q_stages=2 overlap=True rescale=deferred ping_pong=True blocks_per_sm=1 schedule=dynamic block_order=ascending section_mb=32 cluster=1 shared_weights=False pack_heads=False (the family's default)
// made by:  fagen emit --target sm_90 --dtype bf16 --head-dim 64 --mask none --seqlen 4096 --batch 4 --heads 32 --kv-heads 32 --family sm90_forward --config '{"block_order": "ascending", "blocks_per_sm": 1, "cluster": 1, "overlap": true, "pack_heads": false, "ping_pong": true, "q_stages": 2, "rescale": "deferred", "schedule": "dynamic", "section_mb": 32, "shared_weights": false, "stages": 2, "tile_m": 192, "tile_n": 128}' --out DIR
// build:    nvcc -gencode=arch=compute_90a,code=sm_90a -O3 -std=c++17 --use_fast_math -lineinfo -shared -Xcompiler -fPIC -o kernel.so kernel.cu
// call:     fagen_launch(), declared in kernel.h beside this file

// sm90_forward: attention forward for forward/bf16/d64/none on sm_90
//
// Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.
// Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.
//
// Config: tile_m=192 tile_n=128 stages=2 q_stages=2 overlap=True rescale=deferred ping_pong=True blocks_per_sm=1 schedule=dynamic block_order=ascending section_mb=32 cluster=1 shared_weights=False pack_heads=False

enum class Mask { none, causal, window, intervals };
enum class Rescale { each, deferred };
enum class Schedule { single, balanced, dynamic };
enum class BlockOrder { ascending, descending, longest_first, sectioned };

struct Config {
  static constexpr int kHeadDim = 64;  // of q and k, padded
  static constexpr int kHeadDimV = 64;  // of v and o, padded
  static constexpr Mask kMask = Mask::none;  // which cells are visible
  static constexpr bool kSoftcap = false;  // s -> softcap * tanh(s / softcap)
  static constexpr bool kAlibi = false;  // s -> s - slope * distance from the diagonal
  static constexpr bool kAligned = true;  // rows are whole, aligned 16-byte pieces
  static constexpr int kIntervalColumns = 0;  // bounds a key carries
  static constexpr int kLTS = -1;  // column of LTS in intervals, -1: absent
  static constexpr int kLTE = -1;  // column of LTE in intervals, -1: absent
  static constexpr int kUTS = -1;  // column of UTS in intervals, -1: absent
  static constexpr int kUTE = -1;  // column of UTE in intervals, -1: absent
  static constexpr int kTileM = 192;  // rows of q a block works on, 64 a warpgroup
  static constexpr int kTileN = 128;  // keys of a tile
  static constexpr int kStages = 2;  // tiles of keys, and of values, in shared memory
  static constexpr int kQStages = 2;  // tiles of q in shared memory
  static constexpr bool kOverlap = true;  // add up O under the softmax of the next tile
  static constexpr Rescale kRescale = Rescale::deferred;  // when O follows a grown maximum
  static constexpr bool kPingPong = true;  // warpgroups take turns at starting products
  static constexpr int kBlocksPerSm = 1;  // blocks that share an SM
  static constexpr Schedule kSchedule = Schedule::dynamic;  // a block takes a tile of rows, a share, or what is next
  static constexpr BlockOrder kBlockOrder = BlockOrder::ascending;  // order of row tiles and heads
  static constexpr int kSectionMb = 32;  // megabytes of keys and values that a section of heads may have
  static constexpr int kCluster = 1;  // blocks that share each tile of keys and values
  static constexpr bool kSharedWeights = false;  // P goes by shared memory, not registers
  static constexpr bool kPackHeads = false;  // rows of heads that share keys go into one tile
};

// What fagen derived from the config before compiling; the kernel asserts that it agrees.
struct Derived {
  static constexpr int threads = 512;
  static constexpr int smem_bytes = 116096;
  static constexpr int registers = 160;
};
enum class QSource { shared, registers };  // q is never held in registers here; the shared headers ask

#include <cuda.h>
#include <cuda_runtime.h>

// ---- fagen/params.h --------------------------------------------------------------------------------------
// The one struct that crosses from a caller into a kernel. Plain C; no torch, no CUDA header.
// Strides count elements, and the last dimension of q, k, v and o is contiguous.
#include <stdint.h>

typedef struct fagen_params {
  const void* q;               // (batch, seqlen_q, heads, head_dim) by strides
  const void* k;               // (batch, seqlen_k, kv_heads, head_dim)
  const void* v;               // (batch, seqlen_k, kv_heads, head_dim_v)
  void* o;                     // (batch, seqlen_q, heads, head_dim_v)
  float* lse;                  // (batch, heads, seqlen_q) contiguous, natural log; null if not wanted
  const int32_t* intervals;    // (batch, mask_heads, seqlen_k, columns), last dimension contiguous; or null
  const float* alibi_slopes;   // (batch, heads), last dimension contiguous; or null
  void* workspace;             // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
  int64_t q_stride[3];         // batch, row, head
  int64_t k_stride[3];
  int64_t v_stride[3];
  int64_t o_stride[3];
  int64_t intervals_stride[3]; // batch (0 to broadcast), mask head, key
  int64_t alibi_stride;        // batch (0 to broadcast)
  int32_t batch, heads, kv_heads, mask_heads;
  int32_t seqlen_q, seqlen_k;
  int32_t head_dim, head_dim_v;       // as the caller has them; the kernel works on padded sizes
  int32_t window_left, window_right;  // the band around the bottom-right aligned diagonal; -1: unbounded
  float scale;                        // multiplies q.k before the softmax
  float softcap;                      // s -> softcap * tanh(s / softcap); 0: off
} fagen_params;

// ---- fagen/element.cuh -----------------------------------------------------------------------------------
// The 16-bit element types and their packing into the 32-bit registers of the tensor cores.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

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

// ---- fagen/ptx/cp_async.cuh ------------------------------------------------------------------------------
// Asynchronous copies from global to shared memory (sm_80 and up).
#include <stdint.h>

namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes past L1; where `valid` is false nothing is read and zeros are written.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's newest groups are still under way.
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

}  // namespace ptx

// ---- fagen/ptx/mbarrier.cuh ------------------------------------------------------------------------------
// Barriers in shared memory that count arrivals and bytes (sm_90). Addresses are shared-memory ones.
#include <stdint.h>

namespace ptx {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At the barrier that lies at the same place in another block of the cluster, or in this one. What it speaks for are
// reads of shared memory that are over: nothing is released to the whole cluster, which would cost a fence.
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, int block) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

// Arrive, and let the phase wait for so many bytes of copies as well.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity is over. A fresh barrier counts as past its phase of parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A word that a barrier speaks for.
__device__ __forceinline__ uint32_t ld_shared_4(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
  return value;
}

}  // namespace ptx

// ---- fagen/ptx/tma.cuh -----------------------------------------------------------------------------------
// The copy engine of sm_90: boxes of a tensor that a map describes.
#include <cuda.h>
#include <stdint.h>

namespace ptx {

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// One box of a 4-dimensional tensor to shared memory; `barrier` learns of its bytes. Outside the tensor reads zero.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row,
                                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// The same box to the same place of several blocks of the cluster, a bit of `blocks` each; the barrier of each learns
// of it.
__device__ __forceinline__ void tma_load_to_all(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                                int row, int head, int batch, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(blocks)
      : "memory");
}

// One box of a 5-dimensional tensor, whose second dimension is taken whole.
__device__ __forceinline__ void tma_load_packed(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                                int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %7, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(0)
      : "memory");
}

}  // namespace ptx

// ---- fagen/ptx/warpgroup.cuh -----------------------------------------------------------------------------
// What Hopper adds beside copies and products: registers by role, turns, tiles stored, kernels that overlap (sm_90a).

namespace ptx {

// Registers of the warpgroup's threads, taken from or given back to the block's pool.
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Counts this warp's threads as there on barrier `id`, and goes on; others wait with barrier_sync.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// All threads of the cluster's blocks; what each wrote before is seen by all after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// A warp's four 8 x 8 tiles of 16 bits from registers (ldmatrix's order) to the rows that its lanes name.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
// What this thread wrote to shared memory is there for products, and for the copy engine.
__device__ __forceinline__ void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product of a group, and after ordinary code has touched its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending of the newest groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of a register across a wait or a fence.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin(unsigned& x) { asm volatile("" : "+r"(x)::"memory"); }

// Two kernels in a stream, the second launched to start early: the first lets it, the second waits for the first's end.
__device__ __forceinline__ void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace ptx

namespace ptx {

// c (64 x columns, float32, pieces of 8 columns as in mma_m16n8k16) = [c +] a b; `more` false starts from zero.
// Both operands in shared memory, each row 16 elements long in k.
template <int kColumns>
__device__ __forceinline__ void wgmma_shared(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b, bool more);
// b with its columns side by side, 16 rows deep in k.
template <int kColumns>
__device__ __forceinline__ void wgmma_shared_columns(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b);
// The same, a in registers (the accumulator's order).
template <int kColumns>
__device__ __forceinline__ void wgmma_registers(float (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b);

template <>
__device__ __forceinline__ void wgmma_shared<128>(float (&c)[16][4], uint64_t a, uint64_t b, bool more) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
      : "l"(a), "l"(b), "r"(int(more)));
}

template <>
__device__ __forceinline__ void wgmma_registers<64>(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

}  // namespace ptx
// ---- fagen/sm90/layout.cuh -------------------------------------------------------------------------------
// How the tiles of a block lie in shared memory: columns in slabs of 64, rows of 128 bytes, exchanged as the copy
// engine and the tensor cores both expect (128-byte swizzle). And the rings that the tiles go round in.
// ---- fagen/attend.cuh ------------------------------------------------------------------------------------
// One warp's part of attention: its rows of q against a tile of keys, and the sums that it carries along.

// ---- fagen/mask.cuh --------------------------------------------------------------------------------------
// Which cells of the score matrix are visible: the band around the diagonal, and FlashMask's column intervals.
#include <limits.h>
#include <math.h>
#include <stdint.h>


constexpr int kFar = 1 << 29;  // beyond every index, and safe to add to one

// Row m sees keys [m + first, m + last] of the band, and no key at or past seqlen_k.
struct Band {
  int first, last, seqlen_k;

  __device__ __forceinline__ explicit Band(const fagen_params& p) : seqlen_k(p.seqlen_k) {
    const int shift = p.seqlen_k - p.seqlen_q;
    first = p.window_left < 0 ? -kFar : shift - p.window_left;
    last = p.window_right < 0 ? kFar : shift + p.window_right;
  }
  // the first key of row m, and one past its last
  __device__ __forceinline__ int begin(int m) const { return max(0, m + first); }
  __device__ __forceinline__ int end(int m) const { return max(0, min(seqlen_k, m + last + 1)); }
};

// The minima and maxima of the interval bounds over one tile of keys.
struct Extent {
  int low, high;
};

// Rows [ls, le) and [us, ue) do not see a key.
struct Hidden {
  int ls, le, us, ue;
  __device__ __forceinline__ bool hides(int m) const { return (m >= ls && m < le) || (m >= us && m < ue); }
};

// A head's interval vectors, and their extents tile by tile.
template <class Config>
struct Intervals {
  static constexpr int kColumns = Config::kIntervalColumns;
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
  __device__ __forceinline__ Hidden at(int key) const {
    return {bound<Config::kLTS>(key, kFar), bound<Config::kLTE>(key, kFar), bound<Config::kUTS>(key, -kFar),
            bound<Config::kUTE>(key, -kFar)};
  }

  // Rows [m0, m1) against a tile of keys: is no cell visible, and is any cell hidden?
  __device__ __forceinline__ void classify(int tile, int m0, int m1, bool& empty, bool& partial) const {
    const Extent ls = extent<Config::kLTS>(tile, kFar), le = extent<Config::kLTE>(tile, kFar);
    const Extent us = extent<Config::kUTS>(tile, -kFar), ue = extent<Config::kUTE>(tile, -kFar);
    empty = (m0 >= ls.high && m1 <= le.low) || (m0 >= us.high && m1 <= ue.low);
    partial = (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
  }
};

// Minima and maxima per tile of keys: one warp a tile, one pass over the vectors. Body of a kernel of its own.
template <class Config>
__device__ __forceinline__ void find_extents(const fagen_params& p, Extent* extents, int tiles) {
  constexpr int kColumns = Config::kIntervalColumns;
  const int64_t index = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (index >= int64_t(p.batch) * p.mask_heads * tiles) return;
  const int tile = index % tiles, head = index / tiles % p.mask_heads, batch = index / tiles / p.mask_heads;
  const int32_t* bounds = p.intervals + batch * p.intervals_stride[0] + head * p.intervals_stride[1];
  const int end = min(p.seqlen_k, (tile + 1) * Config::kTileN);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    int low = INT_MAX, high = INT_MIN;
    for (int key = tile * Config::kTileN + lane; key < end; key += 32) {
      const int value = bounds[key * p.intervals_stride[2] + c];
      low = min(low, value);
      high = max(high, value);
    }
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (lane == 0) extents[index * kColumns + c] = {low, high};
  }
}

// ---- fagen/ptx/barrier.cuh -------------------------------------------------------------------------------
// Barriers among some of a block's warps (named barriers 1-15; 0 is __syncthreads).

namespace ptx {

// Waits for `threads` threads on barrier `id`, and orders their shared-memory accesses.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same, and whether `vote` is true in any of them.
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

}  // namespace ptx

// ---- fagen/ptx/mma_sync.cuh ------------------------------------------------------------------------------
// Tensor-core products of one warp (sm_80 and up): m16n8k16, 16-bit operands, float32 sums, and their operand loads.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace ptx {

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

// Four 8x8 matrices; lanes 8i..8i+7 give the row addresses of matrix i.
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

}  // namespace ptx

// ---- fagen/smem.cuh --------------------------------------------------------------------------------------
// How a tile of rows lies in shared memory so that eight rows of one 16-byte column fall into different banks.
#include <stdint.h>

// kSwizzled: the 16-byte pieces of a row are exchanged by bits of the row number; else each row is 16 bytes longer.
template <int kRows, int kCols, bool kSwizzled>
struct SharedTile {
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

// ---- fagen/softmax.cuh -----------------------------------------------------------------------------------
// Online softmax over the rows that one thread shares with the three other lanes of its quad.
#include <math.h>

// ---- fagen/ptx/math.cuh ----------------------------------------------------------------------------------
// Single-instruction functions of the special-function unit.

namespace ptx {

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

}  // namespace ptx

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Scores come in raw; `scale_log2` takes them to the base-2 logarithm inside the exponential's one FMA.
// `reference` is what is subtracted before the exponential: the rows' maximum, or one that is near enough below it.
// The sum stays per thread until the end. Any reference gives the same O / sum, so keeping an old one is exact.
//
// The FMA subtracts reference * scale as rounded to float32. The rounding multiplies all weights of a row alike and
// cancels in O / sum, unless it is of whole powers of two: from |reference * scale| = 2^24 on. Long before that,
// references count as too large for the FMA: they are subtracted from the scores first, which is exact near them. Such
// rows, like those that have seen no key, have no limit, so that every tile comes to where references move.
template <int kRows, bool kDeferred>
struct OnlineSoftmax {
  // a weight may grow to 2^8 before a deferred reference moves: exact in float32, safe in 16 bits
  static constexpr float kSlack_log2 = 8.f;
  // an offset up to here rounds by no more than 2^-10
  static constexpr float kLargest_log2 = 16384.f;
  // the reference of rows that have seen no key: finite, so that no tile has to ask; scores below it count as hidden
  static constexpr float kNothing = -1e30f;

  float reference[kRows], limit[kRows], offset[kRows], sum[kRows];
  float scale_log2;

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) { begin(); }

  // Rows that have seen no key.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) reference[r] = kNothing, limit[r] = -INFINITY, sum[r] = 0.f;
  }

  // Whether a row of this thread has outgrown its reference.
  __device__ __forceinline__ bool outgrown(const float (&tile_max)[kRows]) const {
    bool grown = !kDeferred;
#pragma unroll
    for (int r = 0; r < kRows; ++r) grown |= tile_max[r] > limit[r];
    return grown;
  }

  // Move the references to the rows' maxima; O is to be multiplied by `factor`, as the sums are here.
  __device__ __forceinline__ void move(const float (&row_max)[kRows], float (&factor)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float next = fmaxf(reference[r], row_max[r]);
      factor[r] = ptx::ex2((reference[r] - next) * scale_log2);
      reference[r] = next;
      sum[r] *= factor[r];
    }
    follow_references();
  }

  // Offsets and limits of the references as they stand.
  __device__ __forceinline__ void follow_references() {
    set_offsets();
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      limit[r] = fabsf(offset[r]) > kLargest_log2 ? -INFINITY : reference[r] + kSlack_log2 / scale_log2;
  }
  // What is added to the scaled scores.
  __device__ __forceinline__ void set_offsets() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) offset[r] = -reference[r] * scale_log2;
  }
  __device__ __forceinline__ bool too_large() const {
    bool large = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) large |= fabsf(offset[r]) > kLargest_log2 && reference[r] != kNothing;
    return large;
  }

  __device__ __forceinline__ float weight(float score, int r) const {
    return ptx::ex2(fmaf(score, scale_log2, offset[r]));
  }

  // log sum exp of row r in natural logarithm, given the whole row's sum
  __device__ __forceinline__ float lse(int r, float row_sum) const {
    return row_sum == 0.f ? -INFINITY : reference[r] * scale_log2 * 0.69314718056f + logf(row_sum);
  }
};

// What is done to a score beyond the product: softcap, ALiBi. With either, scores are turned to base-2 logarithms
// here, and the softmax's own scale is 1.
template <class Config>
struct ScoreMod {
  static constexpr bool kActive = Config::kSoftcap || Config::kAlibi;
  static constexpr float kLog2e = 1.4426950408889634f;
  float scale, cap_log2, slope_log2;
  int shift;

  __device__ __forceinline__ ScoreMod(const fagen_params& p, int batch, int head) : shift(p.seqlen_k - p.seqlen_q) {
    scale = Config::kSoftcap ? p.scale / p.softcap : p.scale * kLog2e;
    cap_log2 = p.softcap * kLog2e;
    slope_log2 = Config::kAlibi ? p.alibi_slopes[batch * p.alibi_stride + head] * kLog2e : 0.f;
  }
  static __device__ __forceinline__ float softmax_scale_log2(const fagen_params& p) {
    return kActive ? 1.f : p.scale * kLog2e;
  }
  __device__ __forceinline__ float operator()(float score, int m, int key) const {
    score *= scale;
    if constexpr (Config::kSoftcap) score = cap_log2 * ptx::tanh_approx(score);
    if constexpr (Config::kAlibi) score -= slope_log2 * fabsf(float(m + shift - key));
    return score;
  }
};

// Lane addresses: the operand tiles of `ldmatrix` seen from this lane.
struct Lane {
  int id = threadIdx.x % 32;
  int row = id / 4, column = id % 4 * 2;  // of an accumulator: rows row and row + 8, columns column and column + 1

  template <class Tile>  // a 16 x 16 piece, rows down, pieces across: q, and v transposed on the way
  __device__ __forceinline__ uint32_t row_major(uint32_t tile, int row) const {
    return tile + Tile::offset(row + id % 16, id / 16);
  }
  template <class Tile>  // a 16 x 16 piece whose rows are the product's columns: k
  __device__ __forceinline__ uint32_t column_major(uint32_t tile, int row) const {
    return tile + Tile::offset(row + id / 16 * 8 + id % 8, id / 8 % 2);
  }
};

// State of kSlabs slabs of 16 rows: kColumns columns of O unnormalised in accumulators, and the softmax.
template <class Config, int kSlabs, int kKeys, int kColumns, class Element, class TileQ, class TileK, class TileV>
struct Attend {
  static constexpr int kDepth = Config::kHeadDim / 16;
  static constexpr int kRows = kSlabs * 2;  // rows a thread shares
  static constexpr bool kQInRegisters = Config::kQSource == QSource::registers;
  using Scores = float[kSlabs][kKeys / 8][4];
  using Weights = uint32_t[kKeys / 16][kSlabs][4];
  using Softmax = OnlineSoftmax<kRows, Config::kRescale == Rescale::deferred>;

  Lane lane;
  float o[kSlabs][kColumns / 8][4];
  Softmax softmax;
  uint32_t q_registers[kSlabs][kQInRegisters ? kDepth : 1][4];

  __device__ __forceinline__ explicit Attend(const fagen_params& p) : softmax(ScoreMod<Config>::softmax_scale_log2(p)) {
#pragma unroll
    for (auto& slab : o)
#pragma unroll
      for (auto& piece : slab) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
  }

  __device__ __forceinline__ void hold_q(uint32_t q_tile, int first_row) {
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int d = 0; d < kDepth; ++d)
          ptx::ldmatrix_x4(q_registers[s][d], TileQ::step(lane.row_major<TileQ>(q_tile, first_row), s * 16, d));
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
  __device__ __forceinline__ void scores(Scores& s_acc, uint32_t q_tile, int first_row, uint32_t k_tile, int first_key,
                                         Between between) {
    const uint32_t q_lane = lane.row_major<TileQ>(q_tile, first_row);
    const uint32_t k_lane = lane.column_major<TileK>(k_tile, first_key);
#pragma unroll
    for (auto& slab : s_acc)
#pragma unroll
      for (auto& piece : slab) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) score_step(s_acc, q_lane, k_lane, d, between);
  }

  // Score mods and, on partial tiles, the mask. `m` is the warp's first row of q, `key` its first key.
  template <bool kMasked>
  __device__ __forceinline__ void modify(Scores& s_acc, const ScoreMod<Config>& mod, const Band& band,
                                         const Intervals<Config>& intervals, int m, int key) {
    if constexpr (kMasked || ScoreMod<Config>::kActive) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = m + s * 16 + half * 8 + lane.row;
          // thresholds relative to the thread's first column: one comparison with a constant a side
          const int begin = band.begin(row) - key - lane.column, end = band.end(row) - key - lane.column;
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& score = s_acc[s][n][half * 2 + e];
              if constexpr (ScoreMod<Config>::kActive) score = mod(score, row, key + lane.column + n * 8 + e);
              if constexpr (kMasked) {
                bool hidden = n * 8 + e >= end;
                if constexpr (Config::kMask == Mask::window || Config::kMask == Mask::intervals)
                  hidden |= n * 8 + e < begin;
                if (hidden) score = -INFINITY;
              }
            }
        }
      if constexpr (kMasked && Config::kMask == Mask::intervals) hide_intervals(s_acc, intervals, m, key);
    }
  }

  __device__ __forceinline__ void hide_intervals(Scores& s_acc, const Intervals<Config>& intervals, int m, int key) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = min(key + lane.column + n * 8 + e, intervals.last_key);
        const auto bounds = intervals.at(column);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (bounds.hides(m + s * 16 + half * 8 + lane.row)) s_acc[s][n][half * 2 + e] = -INFINITY;
      }
  }

  __device__ __forceinline__ void tile_maxima(const Scores& s_acc, float (&tile_max)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      tile_max[r] = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
        tile_max[r] = fmaxf(tile_max[r], fmaxf(s_acc[r / 2][n][r % 2 * 2], s_acc[r / 2][n][r % 2 * 2 + 1]));
    }
  }

  // Take a new tile's maxima into the softmax; O follows.
  __device__ __forceinline__ void observe(Scores& s_acc) {
    float tile_max[kRows], factor[kRows];
    tile_maxima(s_acc, tile_max);
    if (__any_sync(~0u, softmax.outgrown(tile_max))) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) tile_max[r] = quad_max(tile_max[r]);
      move(s_acc, tile_max, factor);
      rescale(factor);
    } else {
      softmax.set_offsets();
    }
  }

  // Move the references to the rows' maxima, and subtract those from the scores that are too large for the
  // exponential's FMA. Score mods leave a scale of 1, by which no product rounds.
  __device__ __forceinline__ void move(Scores& s_acc, const float (&row_max)[kRows], float (&factor)[kRows]) {
    softmax.move(row_max, factor);
    if constexpr (!ScoreMod<Config>::kActive)
      while (__any_sync(~0u, softmax.too_large())) {  // once; as a loop it stays out of the common tile's way
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (auto& piece : s_acc[r / 2])
            piece[r % 2 * 2] -= softmax.reference[r], piece[r % 2 * 2 + 1] -= softmax.reference[r];
          softmax.offset[r] = 0.f;
        }
      }
  }

  // One register of P = exp(S - reference): two columns of row i % 2 of piece 2 n + i / 2. The accumulator of S is
  // already in the order of P's operand.
  __device__ __forceinline__ void weigh(const Scores& s_acc, Weights& p_frag, int s, int n, int i) {
    const float* pair = &s_acc[s][2 * n + i / 2][i % 2 * 2];
    const int r = s * 2 + i % 2;
    const float first = softmax.weight(pair[0], r), second = softmax.weight(pair[1], r);
    softmax.sum[r] += first + second;
    p_frag[n][s][i] = pack<Element>(first, second);
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
  __device__ __forceinline__ void values(Scores& s_acc, uint32_t v_tile, int first_key) {
    observe(s_acc);
    const uint32_t v_lane = lane.row_major<TileV>(v_tile, first_key);
    Weights p_frag;
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) weigh(s_acc, p_frag, s, n, i);
      value_step(p_frag[n], v_lane + n * 16 * TileV::kPitch);
    }
  }

  // O += P V of one tile while S of the next is computed: the exponentials fill the gaps between its products.
  __device__ __forceinline__ void values_under_scores(const Scores& s_acc, uint32_t v_tile, Scores& s_next,
                                                      uint32_t q_tile, int first_row, uint32_t k_next, int first_key) {
    constexpr int kWeights = kKeys / 16 * kSlabs * 4, kGaps = kDepth * (kKeys / 16);
    Weights p_frag;
    scores(s_next, q_tile, first_row, k_next, first_key, [&](int gap) {
#pragma unroll
      for (int w = gap * kWeights / kGaps; w < (gap + 1) * kWeights / kGaps; ++w)
        weigh(s_acc, p_frag, w / 4 % kSlabs, w / 4 / kSlabs, w % 4);
    });
    const uint32_t v_lane = lane.row_major<TileV>(v_tile, first_key);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) value_step(p_frag[n], v_lane + n * 16 * TileV::kPitch);
  }

  __device__ __forceinline__ void rescale(const float (&factor)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (auto& piece : o[r / 2]) piece[r % 2 * 2] *= factor[r], piece[r % 2 * 2 + 1] *= factor[r];
  }
};

// ---- fagen/schedule.cuh ----------------------------------------------------------------------------------
// Which tile of rows, head and batch a block takes.
#include <stdint.h>


struct Work {
  int row_tile, head, batch;
};

// `heads_at_once` (sectioned order): as many heads as have their keys and values in L2 together.
template <BlockOrder kOrder>
__device__ __forceinline__ Work take_work(const fagen_params& p, uint32_t index, int row_tiles, int heads_at_once) {
  const uint32_t heads = p.heads * p.batch;
  uint32_t row, head;
  if constexpr (kOrder == BlockOrder::ascending || kOrder == BlockOrder::descending) {
    row = index % row_tiles;
    head = index / row_tiles;
    if (kOrder == BlockOrder::descending) row = row_tiles - 1 - row;
  } else {  // longest rows of all heads first, section of heads by section
    const uint32_t section = kOrder == BlockOrder::sectioned ? heads_at_once : heads;
    const uint32_t whole = index / (section * row_tiles);
    const uint32_t here = min(section, heads - whole * section), rest = index - whole * section * row_tiles;
    head = whole * section + rest % here;
    row = row_tiles - 1 - rest / here;
  }
  return {int(row), int(head % p.heads), int(head / p.heads)};
}

template <class C>
struct Shape {
  static constexpr int kGroups = C::kTileM / 64;  // warpgroups that compute, each 64 rows of q
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kSlabs = (C::kHeadDim + 63) / 64, kSlabsV = (C::kHeadDimV + 63) / 64;
  static constexpr int kQBytes = C::kTileM * 128 * kSlabs;
  static constexpr int kKBytes = C::kTileN * 128 * kSlabs, kVBytes = C::kTileN * 128 * kSlabsV;
  static constexpr int kWeightSlab = 64 * 128;  // of a warpgroup's 64 rows
  static constexpr int kWeightBytes = C::kSharedWeights ? (C::kTileN + 63) / 64 * kWeightSlab : 0;

  // in this order: tiles of q, of k, of v, of each warpgroup's weights, a full and an empty barrier for each, the mail
  // with its own, and what is told of each tile of k
  static constexpr int kQ = 0, kK = kQ + C::kQStages * kQBytes, kV = kK + C::kStages * kKBytes;
  static constexpr int kWeights = kV + C::kStages * kVBytes, kBarriers = kWeights + kGroups * kWeightBytes;
  static constexpr int kMail = kBarriers + 16 * (C::kQStages + 2 * C::kStages);
  static constexpr int kTold = kMail + 96;
  static constexpr int kSmemBytes = kTold + 96 * C::kStages + 1024;  // and room to align

  // Registers of a thread: what the block is compiled for, and how the roles divide them.
  static constexpr int kEach = 65536 / (C::kBlocksPerSm * kThreads) / 8 * 8;
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kShare = ((kGroups + 1) * kEach - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kShare > 240 ? 240 : kShare;

  static_assert(C::kTileM % 64 == 0 && C::kTileN % 16 == 0, "a warpgroup's product is 64 rows, 16 keys deep");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

// A wgmma operand in shared memory: where it begins, and how it goes on from there.
struct Operand {
  uint32_t low, high;

  static constexpr uint32_t kSwizzle128 = 1u << 30, kGroupOf8Rows = 1024 >> 4;
  static constexpr uint32_t kOwn = 0x3ffff;  // of an address: without the block's rank in its cluster, which is above

  // 16 elements of k lie in a row (q, k); slabs are separate operands
  static __device__ __forceinline__ Operand of_rows(uint32_t address) {
    return {(address & kOwn) >> 4 | 1u << 16, kSwizzle128 | kGroupOf8Rows};
  }
  // columns lie in a row, 16 rows deep in k (v); slabs `slab_bytes` apart
  static __device__ __forceinline__ Operand of_columns(uint32_t address, int slab_bytes) {
    return {(address & kOwn) >> 4 | uint32_t(slab_bytes >> 4) << 16, kSwizzle128 | kGroupOf8Rows};
  }
  // the one that begins so many bytes later
  __device__ __forceinline__ uint64_t at(int bytes) const { return uint64_t(high) << 32 | (low + (bytes >> 4)); }
};

// A ring of tiles, each with a barrier that says it is full and one that says it is empty. The producer and the
// consumers each step through it on their own. Blocks of a cluster that share tiles each load a part of all: then the
// place of a tile is free when the consumers of all of them have read it.
template <int kStages, int kBytes, int kSharers = 1>
struct Ring {
  uint32_t tiles, barriers;  // of stage 0; the empty barrier lies behind the full one
  int stage = 0, phase = 0;

  static constexpr int kBlocks = kSharers;

  __device__ __forceinline__ void init(int consumers, int producers = 1) const {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(barriers + s * 16, producers);
      ptx::mbarrier_init(barriers + s * 16 + 8, consumers * kSharers);
    }
  }
  __device__ __forceinline__ uint32_t tile() const { return tiles + stage * kBytes; }
  __device__ __forceinline__ uint32_t full() const { return barriers + stage * 16; }
  __device__ __forceinline__ uint32_t empty() const { return barriers + stage * 16 + 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }

  // for the producer: the next tile's place is free; and its bytes are announced
  __device__ __forceinline__ void acquire() const { ptx::mbarrier_wait(empty(), phase ^ 1); }
  __device__ __forceinline__ void announce() const { ptx::mbarrier_arrive_expect(full(), kBytes); }
  // for consumers: the tile is there; and has been read by this warp
  __device__ __forceinline__ void wait() const { ptx::mbarrier_wait(full(), phase); }
  __device__ __forceinline__ void release() {
    if constexpr (kSharers == 1) {
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty());
    } else {
      if (threadIdx.x % 32 < kSharers) ptx::mbarrier_arrive_at(empty(), threadIdx.x % 32);
    }
    advance();
  }
};

// With intervals: rows [m0, m1). Of so many tiles of keys that they see, something is hidden of `cut` and nothing of
// `whole`.
struct alignas(16) Span {
  int m0, m1, cut, whole;
};

// Which tile of rows comes next: the warp that finds it tells the others. A row_tile of -1 is the end.
struct Letter {
  Work work;
  int kv_head;
  Span span;
};

// A ring of two.
template <bool kIntervals>
struct Mail {
  uint32_t places, barriers;
  int count = 0;  // of letters so far, which says all: some that hear them have no register to spare

  __device__ __forceinline__ Ring<2, 32> ring() const { return {places, barriers, count % 2, count / 2 % 2}; }

  __device__ __forceinline__ void send(const Letter& letter) {
    if (threadIdx.x % 32 == 0) {
      const auto place = ring();
      place.acquire();
      ptx::st_shared_16(place.tile(),
                        make_uint4(letter.work.row_tile, letter.work.head, letter.work.batch, letter.kv_head));
      const Span& span = letter.span;
      if (kIntervals) ptx::st_shared_16(place.tile() + 16, make_uint4(span.m0, span.m1, span.cut, span.whole));
      ptx::mbarrier_arrive(place.full());
    }
    ++count;
  }
  __device__ __forceinline__ Letter receive() {
    auto place = ring();
    place.wait();
    const uint4 work = ptx::ld_shared_16(place.tile());
    const uint4 seen = kIntervals ? ptx::ld_shared_16(place.tile() + 16) : make_uint4(0, 0, 0, 0);
    __syncwarp();  // every lane has read before the first one gives the place back
    place.release();
    ++count;
    // broadcast, so that the compiler as well knows it to be the same in all lanes
    const auto uniform = [](uint32_t x) { return int(__shfl_sync(~0u, x, 0)); };
    return {{uniform(work.x), uniform(work.y), uniform(work.z)},
            uniform(work.w),
            {uniform(seen.x), uniform(seen.y), uniform(seen.z), uniform(seen.w)}};
  }
};

template <class C>
struct Rings {
  using S = Shape<C>;
  Ring<C::kQStages, S::kQBytes> q;
  Ring<C::kStages, S::kKBytes, C::kCluster> k;
  Ring<C::kStages, S::kVBytes, C::kCluster> v;
  Mail<C::kMask == Mask::intervals> mail;
  uint32_t told;  // places for what is told: two a stage of k, so that one outlives its tile until the softmax is done

  __device__ __forceinline__ explicit Rings(uint32_t smem)
      : q{smem + S::kQ, smem + S::kBarriers},
        k{smem + S::kK, smem + S::kBarriers + 16 * C::kQStages},
        v{smem + S::kV, smem + S::kBarriers + 16 * (C::kQStages + C::kStages)},
        mail{smem + S::kMail, smem + S::kMail + 64},
        told(smem + S::kTold) {}

  __device__ __forceinline__ uint32_t told_place() const { return told + (k.stage + k.phase * C::kStages) * 48; }

  // A tile, or a letter, is given back with one arrival a warp. With intervals there is a warp that tells of tiles of
  // keys. It hears of tiles of rows, as the one does that loads values.
  __device__ __forceinline__ void init() const {
    constexpr bool kTold = C::kMask == Mask::intervals;
    q.init(S::kGroups * 4);
    k.init(S::kGroups * 4, 1 + kTold);
    v.init(S::kGroups * 4);
    mail.ring().init(S::kGroups * 4 + 1 + kTold);
    ptx::fence_mbarrier_init();
  }
};

// ---- fagen/sm90/forward.cuh ------------------------------------------------------------------------------
// The forward kernel for Hopper: two warps feed the copy engine, one to three warpgroups compute 64 rows of q each.
//
// A block works through tiles of rows without a pause: the product that ends one tile, its O on the way to memory, and
// the first scores of the next are under way together.
// ---- fagen/sm90/epilogue.cuh -----------------------------------------------------------------------------
// O and LSE of a tile of rows on their way from registers to memory.
// ---- fagen/sm90/rows.cuh ---------------------------------------------------------------------------------
// The tiles of rows that a block works through, and the keys that each of them sees.

// ---- fagen/sm90/intervals.cuh ----------------------------------------------------------------------------
// FlashMask's intervals: which tiles of keys a tile of rows sees, in which order it visits them, and what consumers are
// told of each. Here a tile of keys may begin anywhere: a tile of rows begins with the first key it sees.


// A key is hidden from all of rows [m0, m1), by one of its two intervals.
__device__ __forceinline__ bool hides_all(const Hidden& hidden, int m0, int m1) {
  return (m0 >= hidden.ls && m1 <= hidden.le) || (m0 >= hidden.us && m1 <= hidden.ue);
}

__device__ __forceinline__ bool alike(const Hidden& a, const Hidden& b) {
  return a.ls == b.ls && a.le == b.le && a.us == b.us && a.ue == b.ue;
}

// One tile of keys against one of rows.
template <class C>
struct IntervalTile {
  Extent ls, le, us, ue;  // of its keys' bounds; from two tiles of the extents where it lies across them

  __device__ __forceinline__ IntervalTile(const Intervals<C>& intervals, int first) {
    const int tile = first / C::kTileN, next = min((first + C::kTileN - 1) / C::kTileN, intervals.last_key / C::kTileN);
    const auto both = [](Extent a, Extent b) { return Extent{min(a.low, b.low), max(a.high, b.high)}; };
    ls = both(intervals.template extent<C::kLTS>(tile, kFar), intervals.template extent<C::kLTS>(next, kFar));
    le = both(intervals.template extent<C::kLTE>(tile, kFar), intervals.template extent<C::kLTE>(next, kFar));
    us = both(intervals.template extent<C::kUTS>(tile, -kFar), intervals.template extent<C::kUTS>(next, -kFar));
    ue = both(intervals.template extent<C::kUTE>(tile, -kFar), intervals.template extent<C::kUTE>(next, -kFar));
  }
  // all is hidden from rows [m0, m1); or any may be
  __device__ __forceinline__ bool empty(int m0, int m1) const {
    return (m0 >= ls.high && m1 <= le.low) || (m0 >= us.high && m1 <= ue.low);
  }
  __device__ __forceinline__ bool touched(int m0, int m1) const {
    return (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
  }
};

// A part of a walk: of 32 neighbouring tiles of keys those of a kind, a bit each. A tile is cut by the band, at least;
// by intervals only; or whole.
struct Part {
  uint32_t word;  // the first key of the 32, the kind
  uint32_t tiles;

  enum Kind { kBanded, kCut, kWhole, kKinds };

  __device__ __forceinline__ int key() const { return word >> 2; }
  __device__ __forceinline__ Kind kind() const { return Kind(word & 3); }
};

// The tiles of keys that a tile of rows sees, kind by kind, so that the consumers have a loop for the cut ones and one
// for the whole ones; those of a kind from the last to the first.
template <class C>
struct IntervalTiles {
  const Part* parts;
  unsigned next;  // of them
  Part part;  // the present one, and which tiles of it are still to visit
  int key;  // the present tile's first

  __device__ __forceinline__ IntervalTiles(const Part* parts, unsigned first) : parts(parts), next(first), part{0, 0} {}

  __device__ __forceinline__ void advance() {
    while (part.tiles == 0) part = parts[next++];
    const int tile = 31 - __clz(part.tiles);
    part.tiles ^= 1u << tile;
    key = part.key() + tile * C::kTileN;
  }
};

// Rows at which one tile of rows had better end and the next begin, as a bit each: where something begins or ends to be
// hidden of a whole tile of keys (with packed documents, where one ends).
constexpr int kMostRows = 1 << 17;  // more than that are not looked at
struct Borders {
  uint32_t bits[kMostRows / 32];

  // A block's work.
  template <class C>
  __device__ __forceinline__ void find(const Intervals<C>& intervals, int seqlen_q) {
    const int words = min(seqlen_q, kMostRows) / 32 + 1;
    for (int i = threadIdx.x; i < words && i < kMostRows / 32; i += blockDim.x) bits[i] = 0;
    __syncthreads();
    const int extents = (intervals.last_key + C::kTileN) / C::kTileN * C::kIntervalColumns;
    for (int i = threadIdx.x; i < extents; i += blockDim.x) {
      const Extent of = intervals.extents[i];
      if (of.low == of.high && of.low > 0 && of.low < min(seqlen_q, kMostRows))
        atomicOr(&bits[of.low / 32], 1u << of.low % 32);
    }
    __syncthreads();
  }
  // A warp's work: the `index`-th tile of at most `tiles`; {0, 0} if there are fewer.
  template <int kTileM>
  __device__ __forceinline__ int2 rows(int index, int tiles, int seqlen_q) const {
    const auto count = [](int rows) { return (rows + kTileM - 1) / kTileM; };
    const int words = min(seqlen_q, kMostRows) / 32 + 1, lane = threadIdx.x % 32;
    int begin = 0, before = 0;  // the last border, and how many tiles end there or sooner
    for (int word = 0; word < words; word += 32) {
      const uint32_t mine = word + lane < words && word + lane < kMostRows / 32 ? bits[word + lane] : 0;
      for (uint32_t lanes = __ballot_sync(~0u, mine != 0); lanes; lanes &= lanes - 1) {
        const int from = __ffs(lanes) - 1;
        for (uint32_t left = __shfl_sync(~0u, mine, from); left; left &= left - 1) {
          const int border = (word + from) * 32 + __ffs(left) - 1, more = count(border - begin);
          if (before + more + count(seqlen_q - border) > tiles) continue;  // there is no room for this one
          if (index < before + more) {
            const int m0 = begin + (index - before) * kTileM;
            return make_int2(m0, min(m0 + kTileM, border));
          }
          begin = border, before += more;
        }
      }
    }
    const int m0 = begin + (index - before) * kTileM;
    return m0 < seqlen_q ? make_int2(m0, min(m0 + kTileM, seqlen_q)) : make_int2(0, 0);
  }
};

// A warp finds out what rows [m0, m1) see, and writes down their walk. The code is short rather than fast: it comes
// from memory each time, and that is what most of the time goes to.
template <class C>
__device__ __forceinline__ Span find_span(const Intervals<C>& intervals, const Band& band, int m0, int m1,
                                          Part* parts) {
  const int lane = threadIdx.x % 32;
  const int begin = band.begin(m0), end = band.end(m1 - 1);
  const int tiles_end = (end + C::kTileN - 1) / C::kTileN;
  int first = -1, last = -1;  // tiles of the extents
#pragma unroll 1
  for (int group = begin / C::kTileN; group < tiles_end; group += 32) {
    const int mine = group + lane;
    const bool some = mine < tiles_end && !IntervalTile<C>(intervals, mine * C::kTileN).empty(m0, m1);
    const uint32_t seen = __ballot_sync(~0u, some);
    if (seen && first < 0) first = group + __ffs(seen) - 1;
    if (seen) last = group + 31 - __clz(seen);
  }
  Span span = {m0, m1, 0, 0};
  if (first < 0) return span;
  // and the first and last keys in those tiles, if any of theirs is seen after all
  int first_key = first * C::kTileN, last_key = min((last + 1) * C::kTileN, end) - 1;
#pragma unroll 1
  for (const bool ahead : {true, false}) {
    const int key0 = (ahead ? first : last) * C::kTileN;
    int low = INT_MAX, high = -1;
#pragma unroll
    for (int i = 0; i < C::kTileN; i += 32) {
      const int key = key0 + i + lane;
      const Hidden hidden = intervals.at(min(key, intervals.last_key));
      // no && before the load, or each load would wait for the one before
      const bool seen = (i + lane < C::kTileN) & (key >= begin) & (key < end) & !hides_all(hidden, m0, m1);
      low = min(low, seen ? key : INT_MAX), high = seen ? key : high;
    }
    low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
    if (high >= 0) (ahead ? first_key : last_key) = ahead ? low : high;
  }
  // the walk's tiles begin with the first key; the lanes look at 32 of them at once
  constexpr int kGroup = 32 * C::kTileN;
  const int groups = (last_key - first_key) / kGroup + 1;
#pragma unroll 1
  for (int group = groups - 1; group >= 0; --group, ++parts) {
    const int key0 = first_key + group * kGroup, key = key0 + lane * C::kTileN;
    int kind = Part::kKinds;
    if (key <= last_key) {
      const IntervalTile<C> tile(intervals, key);
      const bool banded = key + C::kTileN > band.end(m0) || key < band.begin(m1 - 1);
      if (!tile.empty(m0, m1)) kind = banded ? Part::kBanded : tile.touched(m0, m1) ? Part::kCut : Part::kWhole;
    }
#pragma unroll 1
    for (int i = 0; i < Part::kKinds; ++i) {
      const uint32_t tiles = __ballot_sync(~0u, kind == i);
      (i == Part::kWhole ? span.whole : span.cut) += __popc(tiles);
      if (lane == 0) parts[i * groups] = {uint32_t(key0 << 2 | i), tiles};
    }
  }
  return span;
}

// What is hidden of a tile of keys: by the band or not, and by the intervals nothing, whole rows, whole columns, or
// single cells.
enum Cut { kNothing, kRows, kColumns, kCells };

// How consumers hear it through shared memory.
struct Told {
  uint32_t place;
  uint32_t word;  // the first key, whether the band hides any of it, the cut

  static constexpr int kBytes = 48, kWord = 32;  // of a place; where the word is, behind what the cut needs

  static __device__ __forceinline__ Told hear(uint32_t place) {
    // read by the lane that gives the tile back
    return {place, __shfl_sync(~0u, threadIdx.x % 32 == 0 ? ptx::ld_shared_4(place + kWord) : 0, 0)};
  }
  __device__ __forceinline__ int key() const { return word >> 3; }
  __device__ __forceinline__ bool banded() const { return word & 4; }
  __device__ __forceinline__ bool hides_nothing() const { return (word & 7) == kNothing; }
  __device__ __forceinline__ Cut cut() const { return Cut(word & 3); }
  // the rows that are hidden
  __device__ __forceinline__ Hidden rows() const {
    const uint4 x = ptx::ld_shared_16(place);
    return {int(x.x), int(x.y), int(x.z), int(x.w)};
  }
  // the columns that are seen, as the accumulators of the `quad_lane`-th lane of a quad hold them: a bit for each of
  // two columns of 16 pieces of 8
  __device__ __forceinline__ uint32_t columns(int word, int quad_lane) const {
    return ptx::ld_shared_4(place + word * 16 + quad_lane * 4);
  }
};

// The other side: a warp finds out together, one lane says it.
template <class C>
struct Telling {
  static constexpr int kWords = (C::kTileN + 127) / 128 * 4;
  uint32_t word;
  uint32_t mine;  // of the words that the cut needs, hidden rows or seen columns, one a lane

  // Of the tile of keys from `key` on.
  __device__ __forceinline__ Telling(const Intervals<C>& intervals, int m0, int m1, int key, Part::Kind kind)
      : word(key << 3), mine(0) {
    if (kind == Part::kWhole) return;
    word |= find(intervals, m0, m1, key) | (kind == Part::kBanded ? 4 : 0);
  }

  // A column is hidden from all rows, from some, or from none. Those that are hidden from some must all have the same
  // bounds, or the consumers look for themselves. Nothing may be hidden at all: the walk knows extents only.
  __device__ __forceinline__ Cut find(const Intervals<C>& intervals, int m0, int m1, int key) {
    const int lane = threadIdx.x % 32, lane_column = lane / 2 * 8 + lane % 2;
    const Hidden first = intervals.at(key);
    enum { kSome = 1, kMixed = 2, kDiffer = 4 };
    unsigned found = 0;
#pragma unroll 1
    for (int i = 0; i < kWords; ++i) {
      const int column = i / 4 * 128 + i % 4 * 2 + lane_column;
      const Hidden hidden = intervals.at(min(key + column, intervals.last_key));
      const bool all = hides_all(hidden, m0, m1);
      const bool any = (m0 < hidden.le && m1 > hidden.ls) || (m0 < hidden.ue && m1 > hidden.us);
      if (column < C::kTileN)
        found |= (any ? kSome : 0) | (any != all ? kMixed : 0) | (alike(hidden, first) ? 0 : kDiffer);
      const uint32_t seen = __ballot_sync(~0u, !all);
      mine = lane == i ? seen : mine;
    }
    found = __reduce_or_sync(~0u, found);
    if (!(found & kSome)) return kNothing;
    if (!(found & kMixed)) return kColumns;
    if (found & kDiffer) return kCells;
    mine = lane == 0 ? first.ls : lane == 1 ? first.le : lane == 2 ? first.us : first.ue;
    return kRows;
  }

  __device__ __forceinline__ void say(uint32_t place) const {
    const bool speaks = threadIdx.x % 32 == 0;
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const auto of = [&](int lane) { return __shfl_sync(~0u, mine, i + lane); };
      const uint4 four = make_uint4(of(0), of(1), of(2), of(3));
      if (speaks) ptx::st_shared_16(place + i * 4, four);
    }
    if (speaks) ptx::st_shared_4(place + Told::kWord, word);
  }
};


// ---- fagen/sm90/order.cuh --------------------------------------------------------------------------------
// In which order the tiles of rows are worked through. It is on the way to each next tile of rows, so that nothing is
// divided on it.
#include <stdint.h>


// Division by what is known before a launch, as a product and a shift, of a number below 2^31.
struct Divisor {
  uint32_t by, shift, factor;

  Divisor() = default;
  explicit Divisor(uint32_t by) : by(by), shift(31) {
    while (1ull << (shift - 31) < by) ++shift;
    factor = uint32_t(((1ull << shift) + by - 1) / by);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const { return uint64_t(n) * factor >> shift; }
  __device__ __forceinline__ uint32_t rest(uint32_t n, uint32_t quotient) const { return n - quotient * by; }
};

struct Order {
  Divisor heads, row_tiles;       // of a batch, of a head
  Divisor section, last_section;  // heads of a section, of the last one
  Divisor section_tiles;          // tiles of rows of a section
  uint32_t last;                  // the first one of the last section

  Order() = default;
  // `heads_at_once` (sectioned order): as many as have their keys and values in L2 together.
  template <BlockOrder kOrder>
  static Order of(int row_tiles, int heads, int batch, int heads_at_once) {
    const uint32_t all = heads * batch, section = kOrder == BlockOrder::sectioned ? heads_at_once : all;
    const uint32_t before = (all - 1) / section * section;  // the last section
    Order order;
    order.heads = Divisor(heads), order.row_tiles = Divisor(row_tiles);
    order.section = Divisor(section), order.last_section = Divisor(all - before);
    order.section_tiles = Divisor(section * row_tiles), order.last = before * row_tiles;
    return order;
  }

  template <BlockOrder kOrder>
  __device__ __forceinline__ Work take(uint32_t index) const {
    uint32_t row, head;
    if constexpr (kOrder == BlockOrder::ascending || kOrder == BlockOrder::descending) {
      head = row_tiles.quotient(index), row = row_tiles.rest(index, head);
      if (kOrder == BlockOrder::descending) row = row_tiles.by - 1 - row;
    } else {  // longest rows of all heads first, section of heads by section
      const uint32_t whole = section_tiles.quotient(index), rest = section_tiles.rest(index, whole);
      const Divisor& here = index < last ? section : last_section;
      const uint32_t turn = here.quotient(rest);
      head = whole * section.by + here.rest(rest, turn);
      row = row_tiles.by - 1 - turn;
    }
    const uint32_t batch = heads.quotient(head);
    return {int(row), int(heads.rest(head, batch)), int(batch)};
  }
};

// ---- fagen/walk.cuh --------------------------------------------------------------------------------------
// The tiles of keys that a tile of rows visits, from the last to the first, and which of them need mask arithmetic.

// Tiles [begin, end) hold every visible cell of rows [m0, m1); those of [full_begin, full_end) hold no hidden one.
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

// Band masks: every tile of the range is visited.
struct RangeWalk {
  int tile, begin;
  __device__ __forceinline__ bool valid() const { return tile >= begin; }
  __device__ __forceinline__ void advance() { --tile; }
};
__device__ __forceinline__ bool needs_mask(const RangeWalk& walk, const TileRange& range) {
  return walk.tile < range.full_begin || walk.tile >= range.full_end;
}

// Intervals: the lanes of a warp classify 32 tiles at once; the visible ones are then taken from the top.
template <class Config>
struct IntervalWalk {
  const Intervals<Config>& intervals;
  TileRange range;
  int m0, m1, group;        // tiles [group, group + 32) are classified
  uint32_t seen, hidden;    // bits of tiles still to visit, and of those that need the mask
  int tile;                 // present tile, or -1

  __device__ __forceinline__ IntervalWalk(const Intervals<Config>& intervals, TileRange range, int m0, int m1)
      : intervals(intervals), range(range), m0(m0), m1(m1), group(range.end), seen(0), hidden(0) {
    advance();
  }
  __device__ __forceinline__ bool valid() const { return tile >= 0; }
  __device__ __forceinline__ bool partial() const {
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
};
template <class Config>
__device__ __forceinline__ bool needs_mask(const IntervalWalk<Config>& walk, const TileRange&) {
  return walk.partial();
}

struct Launch {
  CUtensorMap q, k, v;
  int packed;                // log2 of the heads of q whose rows lie side by side in a tile
  int row_tiles, key_tiles;  // tiles of a head
  int tiles;                 // tiles of rows in all
  Order order;               // in which they are taken
  Divisor sharers;           // heads of q that share keys
  Extent* extents;           // of the intervals, tile by tile
  Span* spans;               // of each mask head, by tile of rows: how many tiles of keys it sees,
  Part* parts;               // which,
  int* ranks;                // and which tile of rows sees the most, the next most, ...
  unsigned* taken;           // dynamic schedule: tiles of rows that blocks have come for, beside each one's first
};

// Blocks of a cluster are a team: they take neighbouring tiles of rows together, which count as one.
template <class C>
__device__ __forceinline__ int team() {
  return blockIdx.x / C::kCluster;
}
template <class C>
__device__ __forceinline__ int teams() {
  return gridDim.x / C::kCluster;
}

// Whether a small kernel runs before this one. It begins when all kernels before it have ended.
template <class C>
__device__ __forceinline__ bool prepared(const Launch& launch) {
  return C::kMask == Mask::intervals || (C::kSchedule == Schedule::dynamic && launch.tiles > teams<C>());
}

// Which tile of rows a block takes after its first: none, every so many-th of the order, turning at its ends so that
// all blocks get as much of what is long as of what is short; or the next that nobody has taken.
template <class C>
struct Share {
  int round = 0;

  __device__ __forceinline__ int next(const Launch& launch) {
    if constexpr (C::kSchedule == Schedule::single) {
      return launch.tiles;
    } else if constexpr (C::kSchedule == Schedule::balanced) {
      ++round;
      return round * teams<C>() + (round % 2 ? teams<C>() - 1 - team<C>() : team<C>());
    } else {
      if (!prepared<C>(launch)) return launch.tiles;      // there is no counter
      if (round++ == 0) ptx::wait_for_previous_kernel();  // which sets it to zero
      return teams<C>() + (threadIdx.x % 32 == 0 ? atomicAdd(launch.taken, 1) : 0);
    }
  }
};

// With intervals, the longest tile of rows is not simply the last: they are counted and ranked.
template <class C>
constexpr bool kRanked = C::kMask == Mask::intervals &&
                         (C::kBlockOrder == BlockOrder::longest_first || C::kBlockOrder == BlockOrder::sectioned);

// Intervals may differ by batch and by kv head.
__device__ __forceinline__ int mask_head(const fagen_params& p, int kv_head) { return p.mask_heads == 1 ? 0 : kv_head; }
__device__ __forceinline__ int64_t mask_plane(const fagen_params& p, int batch, int kv_head) {
  return int64_t(batch) * p.mask_heads + mask_head(p, kv_head);
}

// Which of all that were planned a tile of rows is, and where the walk of one begins.
__device__ __forceinline__ int planned(const fagen_params& p, const Launch& launch, int batch, int kv_head, int tile) {
  return mask_plane(p, batch, kv_head) * launch.row_tiles + tile;
}
__device__ __forceinline__ unsigned walk(const Launch& launch, int planned) {
  return unsigned(planned) * Part::kKinds * ((launch.key_tiles + 31) / 32);
}

template <class C>
__device__ __forceinline__ Intervals<C> intervals_of(const fagen_params& p, const Launch& launch, int batch, int head) {
  Intervals<C> intervals;
  intervals.bounds = p.intervals + batch * p.intervals_stride[0] + head * p.intervals_stride[1];
  intervals.stride = p.intervals_stride[2];
  intervals.extents = launch.extents + (int64_t(batch) * p.mask_heads + head) * launch.key_tiles * C::kIntervalColumns;
  intervals.last_key = p.seqlen_k - 1;
  return intervals;
}

// Heads of q that share keys may be packed: 2^n of them count as one head, with as many rows to a row of q. That many
// of the last bits of a row are its head's.
template <class C>
struct Packing {
  int log2;

  __device__ __forceinline__ explicit Packing(const Launch& launch) : log2(C::kPackHeads ? launch.packed : 0) {}
  __device__ __forceinline__ int rows(int rows) const { return rows << log2; }
  // of a packed head and row: which they are in q
  __device__ __forceinline__ int head(int head, int m) const { return head << log2 | (m & ((1 << log2) - 1)); }
  __device__ __forceinline__ int row(int m) const { return m >> log2; }
  // the tiles of keys that packed rows [m0, m1) see
  __device__ __forceinline__ TileRange range(const Band& band, int m0, int m1) const {
    if constexpr (C::kMask == Mask::none)
      return {0, (band.seqlen_k + C::kTileN - 1) / C::kTileN, 0, band.seqlen_k / C::kTileN};
    TileRange range = TileRange::of<C::kTileN>(band, row(m0), row(m1 - 1) + 1);
    if (C::kMask == Mask::causal) range.begin = range.full_begin = 0;
    return range;
  }
};

// The `index`-th tile of rows in the order of work, and what there is to say of it.
template <class C>
__device__ __forceinline__ Letter take(const fagen_params& p, const Launch& launch, int index) {
  Letter letter;
  Work& work = letter.work = launch.order.take<C::kBlockOrder>(index);
  letter.kv_head = launch.sharers.quotient(work.head);
  if constexpr (C::kMask == Mask::intervals) {
    const int first = planned(p, launch, work.batch, letter.kv_head, 0);
    if constexpr (kRanked<C>) work.row_tile = launch.ranks[first + launch.row_tiles - 1 - work.row_tile];
    letter.span = launch.spans[first + work.row_tile];
  }
  return letter;
}

// The tiles of keys that a band shows to a tile of rows, from the last to the first.
template <class C>
struct BandTiles {
  int key;  // the present tile's first
  __device__ __forceinline__ void advance() { key -= C::kTileN; }
};

// One tile of rows: [m0, m1) of a head, and its walk over tiles of keys.
template <class C>
struct Rows {
  Work work;
  int m0, m1, kv_head;
  TileRange range;
  // with intervals
  int cut, whole;
  const Part* parts;
  unsigned walk_begin;
  Intervals<C> intervals;

  Rows() = default;
  __device__ __forceinline__ Rows(const fagen_params& p, const Launch& launch, const Band& band, const Letter& letter)
      : work(letter.work), kv_head(letter.kv_head) {
    const Packing<C> packing(launch);
    if constexpr (C::kMask == Mask::intervals) {
      m0 = letter.span.m0, m1 = letter.span.m1, cut = letter.span.cut, whole = letter.span.whole;
      parts = launch.parts, walk_begin = walk(launch, planned(p, launch, work.batch, kv_head, work.row_tile));
      intervals = intervals_of<C>(p, launch, work.batch, mask_head(p, kv_head));
    } else {
      m0 = (work.row_tile * C::kCluster + blockIdx.x % C::kCluster) * C::kTileM,
      m1 = min(m0 + C::kTileM, packing.rows(p.seqlen_q));
      range = packing.range(band, m0, m1);
    }
  }
  // tiles of keys
  __device__ __forceinline__ int count() const {
    if constexpr (C::kMask == Mask::intervals)
      return cut + whole;
    else
      return range.end - range.begin;
  }
  // for those that load them, before the first one
  __device__ __forceinline__ auto tiles() const {
    if constexpr (C::kMask == Mask::intervals)
      return IntervalTiles<C>(parts, walk_begin);
    else
      return BandTiles<C>{range.end * C::kTileN};
  }
};

// The tiles of keys that a tile of rows sees, as the consumers count them.
template <class C, bool kIntervals = C::kMask == Mask::intervals>
struct Keys {
  const TileRange range;
  int tile;  // the present one

  __device__ __forceinline__ explicit Keys(const Rows<C>& rows) : range(rows.range), tile(range.end - 1) {}
  __device__ __forceinline__ bool last() const { return tile == range.begin; }
  __device__ __forceinline__ bool partial() const { return tile < range.full_begin || tile >= range.full_end; }
  __device__ __forceinline__ void advance() { --tile; }

  // Call visit(partial) for the present tile and the rest, with a loop of its own for tiles that need no mask.
  template <class Visit>
  __device__ __forceinline__ void visit_rest(Visit visit) {
    for (; tile >= range.begin && tile >= range.full_end; advance()) visit(true);
    for (; tile >= range.full_begin; advance()) visit(false);
    if constexpr (C::kMask == Mask::window)
      for (; tile >= range.begin; advance()) visit(true);
  }
};

// Of intervals they know only how many are left; which they are, they are told.
template <class C>
struct Keys<C, true> {
  int cut, whole;

  __device__ __forceinline__ explicit Keys(const Rows<C>& rows) : cut(rows.cut), whole(rows.whole) {}
  __device__ __forceinline__ bool last() const { return cut + whole == 1; }
  __device__ __forceinline__ bool partial() const { return cut > 0; }
  __device__ __forceinline__ void advance() { partial() ? --cut : --whole; }

  template <class Visit>
  __device__ __forceinline__ void visit_rest(Visit visit) {
    for (; cut > 0; --cut) visit(true);
    for (; whole > 0; --whole) visit(false);
  }
};

// A tile of rows that is computed, but not stored yet.
struct Done {
  int m0, m1, head, batch;
};

// The 64 rows of a warpgroup: two of a thread's. Lanes of a quad hold two columns each of pieces of 8; neighbours trade
// until each has four of one piece, so that a quad writes 32 whole bytes at once.
template <class C, class Element, class State>
__device__ __forceinline__ void store_rows(const fagen_params& p, const Packing<C>& packing, State& state,
                                           const Done& done, int group) {
  const Lane lane;
  const bool odd = lane.id % 2;
  const int end = C::kMask == Mask::intervals ? done.m1 : min(done.m0 + C::kTileM, packing.rows(p.seqlen_q));
  const int first = done.m0 + group * 64 + threadIdx.x / 32 % 4 * 16 + lane.row;
  const int column = odd * 8 + lane.id % 4 / 2 * 4;  // of two pieces
  Element* out = static_cast<Element*>(p.o) + done.batch * p.o_stride[0];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int m = first + r * 8, row_of_q = packing.row(m), head = packing.head(done.head, m);
    const float row_sum = quad_sum(state.softmax.sum[r]), inverse = row_sum == 0.f ? 0.f : 1.f / row_sum;
    if (p.lse && lane.id % 4 == 0 && m < end)
      p.lse[(int64_t(done.batch) * p.heads + head) * p.seqlen_q + row_of_q] = state.softmax.lse(r, row_sum);
    Element* row = out + row_of_q * p.o_stride[1] + head * p.o_stride[2] + column;
    const int columns = m < end ? p.head_dim_v - column : 0;
    const auto word = [&](int n) {
      return pack<Element>(state.o[0][n][r * 2] * inverse, state.o[0][n][r * 2 + 1] * inverse);
    };
#pragma unroll
    for (int n = 0; n < C::kHeadDimV / 8; n += 2) {
      const uint32_t mine[2] = {word(n), word(n + 1)};
      const uint32_t got = __shfl_xor_sync(~0u, odd ? mine[0] : mine[1], 1);
      if (n * 8 < columns)
        *reinterpret_cast<uint2*>(row + n * 8) = odd ? make_uint2(got, mine[1]) : make_uint2(mine[0], got);
    }
  }
}

// Rows that see no key at all, which neither producer nor consumers come by: O = 0, LSE = -inf. One warp's work.
template <class C, class Element>
__device__ __forceinline__ void store_nothing(const fagen_params& p, const Launch& launch) {
  const Band band(p);
  const Packing<C> packing(launch);
  if (C::kMask == Mask::intervals) ptx::wait_for_previous_kernel();
  for (int index = blockIdx.x; index < launch.tiles; index += gridDim.x) {
    const Rows<C> rows(p, launch, band, take<C>(p, launch, index));
    const Work& work = rows.work;
    if (rows.count() > 0) continue;
    for (int m = rows.m0; m < rows.m1; ++m) {
      const int row = packing.row(m), head = packing.head(work.head, m);
      Element* out =
          static_cast<Element*>(p.o) + work.batch * p.o_stride[0] + row * p.o_stride[1] + head * p.o_stride[2];
      for (int column = threadIdx.x % 32 * 8; column < p.head_dim_v; column += 256)
        *reinterpret_cast<uint4*>(out + column) = make_uint4(0, 0, 0, 0);
      if (p.lse && threadIdx.x % 32 == 0) p.lse[(int64_t(work.batch) * p.heads + head) * p.seqlen_q + row] = -INFINITY;
    }
  }
}

// Where there are no keys at all, all rows are such. A grid's work, a warp a row.
template <class Element>
__device__ __forceinline__ void store_zeros(const fagen_params& p) {
  const int64_t rows = int64_t(p.batch) * p.heads * p.seqlen_q;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; i < rows; i += gridDim.x * blockDim.x / 32) {
    const int64_t m = i % p.seqlen_q, head = i / p.seqlen_q % p.heads, batch = i / p.seqlen_q / p.heads;
    Element* out = static_cast<Element*>(p.o) + batch * p.o_stride[0] + m * p.o_stride[1] + head * p.o_stride[2];
    for (int column = threadIdx.x % 32 * 8; column < p.head_dim_v; column += 256)
      *reinterpret_cast<uint4*>(out + column) = make_uint4(0, 0, 0, 0);
    if (p.lse && threadIdx.x % 32 == 0) p.lse[i] = -INFINITY;
  }
}


// ---- fagen/sm90/producer.cuh -----------------------------------------------------------------------------
// The warps that feed the others: each walks over the tiles on its own, and loads keys, or values, or tells of them.
// One lane of it talks to the copy engine.


template <class C>
struct Producer {
  static constexpr int kLate = 2;  // tiles of keys that are left when the next tile of rows is taken

  const fagen_params& p;
  const Launch& launch;
  Rings<C> rings;
  const Band band;
  Share<C> share;

  // One tile of `kSlabs` slabs, `kRows` rows each, or this block's part of it, to all that share it.
  template <int kSlabs, int kRows, bool kPacked = false, class Ring>
  __device__ __forceinline__ void load(const CUtensorMap& map, Ring& ring, int row, int head, int batch) const {
    if (threadIdx.x % 32 == 0) {
      ring.acquire();
      ring.announce();
      constexpr int kPart = kRows / Ring::kBlocks;
      const int part = Ring::kBlocks > 1 ? blockIdx.x % Ring::kBlocks * kPart : 0;
      for (int slab = 0; slab < kSlabs; ++slab) {
        const uint32_t to = ring.tile() + (slab * kRows + part) * 128;
        if constexpr (Ring::kBlocks > 1)
          ptx::tma_load_to_all(to, &map, ring.full(), slab * 64, row + part, head, batch, (1 << Ring::kBlocks) - 1);
        else if constexpr (kPacked)
          ptx::tma_load_packed(to, &map, ring.full(), slab * 64, row, head, batch);
        else
          ptx::tma_load(to, &map, ring.full(), slab * 64, row, head, batch);
      }
    }
    ring.advance();
  }
  __device__ __forceinline__ void load_q(const Rows<C>& rows) {
    load<Shape<C>::kSlabs, C::kTileM, C::kPackHeads>(launch.q, rings.q, Packing<C>(launch).row(rows.m0), rows.work.head,
                                                     rows.work.batch);
  }
  __device__ __forceinline__ void load_k(const Rows<C>& rows, int key) {
    load<Shape<C>::kSlabs, C::kTileN>(launch.k, rings.k, key, rows.kv_head, rows.work.batch);
  }
  __device__ __forceinline__ void load_v(const Rows<C>& rows, int key) {
    load<Shape<C>::kSlabsV, C::kTileN>(launch.v, rings.v, key, rows.kv_head, rows.work.batch);
  }

  // The next tile of rows that sees any key; row_tile is -1 if there is none.
  __device__ __forceinline__ Letter find(int next) {
    for (;;) {
      const int index = __shfl_sync(~0u, next, 0);
      if (index >= launch.tiles) return {{-1, 0, 0}, 0, {0, 0, 0, 0}};
      const Letter letter = take<C>(p, launch, index);
      if (Rows<C>(p, launch, band, letter).count() > 0) return letter;
      next = share.next(launch);
    }
  }

  // One warp takes tiles of rows, and loads q and keys. The next is taken and looked for when few keys of the present
  // one are left, so that who is done first gets what is next, and yet while the rings are full. The others hear of the
  // first when its q and first keys are on their way, since values would only delay those.
  __device__ __forceinline__ void run_keys() {
    if (C::kMask == Mask::intervals) ptx::wait_for_previous_kernel();
    Letter letter = find(team<C>());
    bool told = false;
    while (letter.work.row_tile >= 0) {
      const Rows<C> rows(p, launch, band, letter);
      auto tiles = rows.tiles();
      const auto load_next = [&] {
        tiles.advance();
        load_k(rows, tiles.key);
      };
      load_next();
      load_q(rows);
      if (!told) rings.mail.send(letter);
      told = true;
      int left = rows.count() - 1;
#pragma unroll 1
      for (bool found = false; left > 0 || !found;) {
        if (left > 0) load_next(), --left;
        if (!found && left <= kLate) {
          letter = find(share.next(launch));
          rings.mail.send(letter);
          found = true;
        }
      }
    }
    if (!told) rings.mail.send(letter);
  }

  // Others hear of them, and visit the same tiles of keys.
  template <class Visit>
  __device__ __forceinline__ void follow(Visit visit) {
    if (C::kMask == Mask::intervals) ptx::wait_for_previous_kernel();
    for (;;) {
      const Letter letter = rings.mail.receive();
      if (letter.work.row_tile < 0) return;
      const Rows<C> rows(p, launch, band, letter);
      auto tiles = rows.tiles();
#pragma unroll 1
      for (int left = rows.count(); left > 0; --left) {
        tiles.advance();
        visit(rows, tiles);
      }
    }
  }
  // One loads values, whose places become free at other times than those of keys.
  __device__ __forceinline__ void run_values() {
    follow([&](const Rows<C>& rows, const auto& tiles) { load_v(rows, tiles.key); });
  }
  // And with intervals one tells the consumers which keys these are, and what is hidden of them.
  __device__ __forceinline__ void run_telling() {
    if constexpr (C::kMask == Mask::intervals)
      follow([&](const Rows<C>& rows, const auto& tiles) {
        const Telling<C> telling(rows.intervals, rows.m0, rows.m1, tiles.key, tiles.part.kind());
        rings.k.acquire();
        telling.say(rings.told_place());
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(rings.k.full());
        rings.k.advance();
      });
  }
};


// ---- fagen/sm90/weights.cuh ------------------------------------------------------------------------------
// The weights P as the first operand of O += P V: in registers, or in shared memory, in a tile of the warpgroup's own.

// Every register of a fragment stays where it is, and is written, before what follows.
template <class X, int kPieces>
__device__ __forceinline__ void pin(X (&fragment)[kPieces][4]) {
#pragma unroll
  for (int i = 0; i < kPieces * 4; ++i) ptx::pin(fragment[i / 4][i % 4]);
}

template <class C>
struct WeightOperand {
  static constexpr int kSteps = C::kTileN / 16;  // of 16 keys
  static constexpr int kSlab = Shape<C>::kWeightSlab;

  uint32_t tile;  // if they go through shared memory
  uint32_t kept[kSteps][4];

  // word(n, i): what register i of a thread holds of 16 keys. Registers may not change while any product is under way.
  template <class Word>
  __device__ __forceinline__ void put(Word word) {
    if constexpr (C::kSharedWeights) {
      // a lane's row, one of the 16 that its warp stores and multiplies, and the swizzled place of its half of 16 keys
      const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
      const uint32_t place = tile + row * 128 + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
      for (int n = 0; n < kSteps; ++n)
        ptx::stmatrix_x4((place ^ n % 4 * 32) + n / 4 * kSlab, {word(n, 0), word(n, 1), word(n, 2), word(n, 3)});
      ptx::fence_shared_writes();
      __syncwarp();
    } else {
#pragma unroll
      for (int n = 0; n < kSteps; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[n][i] = word(n, i);
    }
  }
  // o += P v, started
  template <class O>
  __device__ __forceinline__ void start_product(O& o, const Operand& v) {
    if constexpr (C::kSharedWeights) {
      const Operand own = Operand::of_rows(tile);
      ptx::wgmma_fence();
#pragma unroll
      for (int n = 0; n < kSteps; ++n)
        ptx::wgmma_shared_columns<C::kHeadDimV>(o, own.at(n / 4 * kSlab + n % 4 * 32), v.at(n * 2048));
    } else {
      pin(kept);
      ptx::wgmma_fence();
#pragma unroll
      for (int n = 0; n < kSteps; ++n) ptx::wgmma_registers<C::kHeadDimV>(o, kept[n], v.at(n * 2048));
    }
  }
};

// What a warpgroup that computes does.
template <class C, class Element>
struct Consumer {
  using S = Shape<C>;
  using State = Attend<C, 1, C::kTileN, C::kHeadDimV, Element, void, void, void>;
  using Scores = typename State::Scores;  // [1][keys / 8][4]

  static constexpr int kPieces = C::kTileN / 8;  // of 8 keys

  const fagen_params& p;
  const Launch& launch;
  Rings<C> rings;
  const Band band;
  const Packing<C> packing;
  const int group;  // of warps, from 0
  Rows<C> rows;
  int unseen;  // tiles of keys to let pass
  Told told;   // intervals: about the tile of keys whose scores are under way
  State state;
  Scores s_acc;
  WeightOperand<C> weights;

  __device__ __forceinline__ Consumer(const fagen_params& p, const Launch& launch, uint32_t smem, int group)
      : p(p), launch(launch), rings(smem), band(p), packing(launch), group(group), state(p) {
    weights.tile = smem + S::kWeights + group * S::kWeightBytes;
  }

  // Before the first keys of a tile of rows.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& piece : state.o[0]) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
    state.softmax.begin();
  }

  // Warpgroups take turns at starting products, so that the softmax of one runs under the products of the others.
  __device__ __forceinline__ void await_turn() const {
    if constexpr (C::kPingPong) ptx::barrier_sync(1 + group, 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (C::kPingPong) ptx::barrier_arrive(1 + (group + 1 == S::kGroups ? 0 : group + 1), 256);
  }

  // S = Q K^T, started
  __device__ __forceinline__ void start_scores() {
    const Operand q = Operand::of_rows(rings.q.tile() + group * 64 * 128), k = Operand::of_rows(rings.k.tile());
    pin(s_acc[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < C::kHeadDim / 16; ++d) {
      const uint32_t within = d % 4 * 32;  // of a slab's 128-byte rows
      ptx::wgmma_shared<C::kTileN>(s_acc[0], q.at(d / 4 * C::kTileM * 128 + within),
                                   k.at(d / 4 * C::kTileN * 128 + within), d > 0);
    }
  }
  // O += P V, started
  __device__ __forceinline__ void start_values() {
    const Operand v = Operand::of_columns(rings.v.tile(), C::kTileN * 128);
    pin(state.o[0]);
    weights.start_product(state.o[0], v);
  }
  // Either is there, while up to kPending younger products go on; its tile may be overwritten.
  template <int kPending>
  __device__ __forceinline__ void wait_scores() {
    ptx::wgmma_wait<kPending>();
    pin(s_acc[0]);
    rings.k.release();
  }
  template <int kPending>
  __device__ __forceinline__ void wait_values() {
    ptx::wgmma_wait<kPending>();
    pin(state.o[0]);
    rings.v.release();
  }

  // Which scores of the thread are seen, a bit each: of each of its two rows, two of every piece of 8 keys.
  static constexpr int kSeenWords = (kPieces + 15) / 16;
  using Seen = uint32_t[2][kSeenWords];

  // By the band: of the keys from `key` on, row m sees [begin(m), end(m)).
  __device__ __forceinline__ void see_band(Seen& seen, int row0, int key) const {
    const Lane lane;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = packing.row(row0 + r * 8 + lane.row), first = key + lane.column;
      // of the thread's columns, how many lie before x
      const auto before = [&](int x) { return x <= 0 ? 0 : x / 8 * 2 + min(x % 8, 2); };
      const int begin = before(band.begin(row) - first);
      const int end = before((C::kMask == Mask::none ? band.seqlen_k : band.end(row)) - first);
#pragma unroll
      for (int w = 0; w < kSeenWords; ++w) {
        const auto bits = [&](int n) { return n <= w * 32 ? 0u : n >= w * 32 + 32 ? ~0u : (1u << (n - w * 32)) - 1u; };
        seen[r][w] = bits(end);
        if (C::kMask == Mask::window || C::kMask == Mask::intervals) seen[r][w] &= ~bits(begin);
      }
    }
  }
  // By the intervals, as told.
  __device__ __forceinline__ void see_intervals(Seen& seen, int row0) const {
    const Lane lane;
    const Cut cut = told.cut();
    if (cut == kColumns) {
#pragma unroll
      for (int w = 0; w < kSeenWords; ++w) {
        const uint32_t columns = told.columns(w, lane.column / 2);
        seen[0][w] &= columns, seen[1][w] &= columns;
      }
    } else if (cut == kRows) {
      const Hidden bounds = told.rows();
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (bounds.hides(row0 + r * 8 + lane.row))
          for (int w = 0; w < kSeenWords; ++w) seen[r][w] = 0;
    } else if (cut == kCells) {
#pragma unroll
      for (int w = 0; w < kSeenWords; ++w)
#pragma unroll 1
        for (int bit = 0; bit < 32 && w * 32 + bit < kPieces * 2; ++bit) {
          const int key = told.key() + (w * 16 + bit / 2) * 8 + lane.column + bit % 2;
          const Hidden bounds = rows.intervals.at(min(key, rows.intervals.last_key));
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (bounds.hides(row0 + r * 8 + lane.row)) seen[r][w] &= ~(1u << bit);
        }
    }
    __syncwarp();  // every lane has read what was told before the first one gives a later tile back
  }
  __device__ __forceinline__ void hide_others(const Seen& seen) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int bit = 0; bit < kPieces * 2; ++bit) {
        float& x = s_acc[0][bit / 2][r * 2 + bit % 2];
        x = seen[r][bit / 32] & 1u << bit % 32 ? x : -INFINITY;
      }
  }

  // Take the maxima of a tile into the softmax: true if O must follow by `factor`, once it is at rest.
  __device__ __forceinline__ bool observe(float (&factor)[2]) {
    constexpr int kChains = 4;  // of comparisons side by side, since each waits for the one before
    float row_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float chain[kChains];
#pragma unroll
      for (int n = 0; n < kPieces; ++n) {
        const float pair = fmaxf(s_acc[0][n][r * 2], s_acc[0][n][r * 2 + 1]);
        chain[n % kChains] = n < kChains ? pair : fmaxf(chain[n % kChains], pair);
      }
      row_max[r] = fmaxf(fmaxf(chain[0], chain[1]), fmaxf(chain[2], chain[3]));
    }
    const bool moved = C::kRescale == Rescale::each || __any_sync(~0u, state.softmax.outgrown(row_max));
    if (moved) {
      for (float& x : row_max) x = quad_max(x);
      state.move(s_acc, row_max, factor);
    } else {
      state.softmax.set_offsets();
    }
    return moved;
  }
  // S becomes the weights.
  __device__ __forceinline__ void weigh() {
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s_acc[0][n][i];
        x = state.softmax.weight(x, i / 2);
        state.softmax.sum[i / 2] += x;
      }
  }
  // The weights as an operand.
  __device__ __forceinline__ void pack_weights() {
    weights.put([&](int n, int i) {
      const float* pair = &s_acc[0][2 * n + i / 2][i % 2 * 2];
      return pack<Element>(pair[0], pair[1]);
    });
  }

  // S of a tile of rows' first keys, started
  __device__ __forceinline__ void start_first_scores() {
    rings.q.wait();
    rings.k.wait();
    hear(true);
    start_scores();
    ptx::wgmma_commit();
  }

  // What this warpgroup's rows see of the keys that the block walks over. The last tiles may lie behind all of it. And
  // of the last rows there may be none left for it.
  static constexpr bool kNarrows = S::kGroups > 1 && (C::kMask == Mask::causal || C::kMask == Mask::window);
  static constexpr bool kIdles = S::kGroups > 1;

  __device__ __forceinline__ bool idle() const { return kIdles && rows.m0 + group * 64 >= rows.m1; }

  __device__ __forceinline__ void narrow() {
    unseen = idle() ? rows.count() : 0;
    if constexpr (kNarrows) {
      if (idle()) return;
      const int first_row = rows.m0 + group * 64;
      const TileRange block = rows.range, mine = packing.range(band, first_row, first_row + 64);
      const int end = max(block.begin + 1, min(mine.end, block.end));
      rows.range = {block.begin, end, max(mine.full_begin, block.begin), min(mine.full_end, end)};
      unseen = block.end - end;
    }
  }
  // It lets those pass as if it visited them, the keys of one and the values of the one before, so that their places
  // become free. The first one's turn may have been used already.
  __device__ __forceinline__ void let_pass(bool turn_used) {
    if constexpr (kIdles)
#pragma unroll 1
      for (int i = 0; i < unseen; ++i) {
        if (i > 0 || !turn_used) {
          await_turn();
          pass_turn();
        }
        if (i > 0) pass_values();
        rings.k.wait();
        rings.k.release();
      }
  }
  __device__ __forceinline__ void pass_values() {
    rings.v.wait();
    rings.v.release();
  }

  // The next tile of rows, if there is one.
  __device__ __forceinline__ bool next() {
    const Letter letter = rings.mail.receive();
    if (letter.work.row_tile < 0) return false;
    rows = Rows<C>(p, launch, band, letter);
    narrow();
    return true;
  }

  // What is told of a tile of k that is there, where anybody asks.
  __device__ __forceinline__ void hear(bool partial) {
    if constexpr (C::kMask == Mask::intervals)
      if (partial || ScoreMod<C>::kActive) told = Told::hear(rings.told_place());
  }

  // What score changes and mask make of the scores of a tile of keys.
  __device__ __forceinline__ void modify(const ScoreMod<C>& mod, int row0, const Keys<C>& keys, bool partial) {
    constexpr bool kIntervals = C::kMask == Mask::intervals;
    int key;  // the first
    if constexpr (kIntervals)
      key = told.key();
    else
      key = keys.tile * C::kTileN;
    if constexpr (ScoreMod<C>::kActive) state.template modify<false>(s_acc, mod, band, rows.intervals, row0, key);
    if (!partial || (kIntervals && told.hides_nothing())) return;
    Seen seen;
    if (kIntervals && !told.banded())
      for (auto& row : seen)
        for (uint32_t& word : row) word = ~0u;
    else
      see_band(seen, row0, key);
    if constexpr (kIntervals) see_intervals(seen, row0);
    hide_others(seen);
  }

  // All keys of a tile of rows. Its first scores are under way already, its last product still is at the end.
  __device__ __forceinline__ void attend() {
    const int row0 = rows.m0 + group * 64 + threadIdx.x / 32 % 4 * 16;
    const ScoreMod<C> mod(p, rows.work.batch, rows.work.head);
    Keys<C> keys(rows);
    float factor[2];
    clear();
    if (keys.last()) rings.q.release();  // q has been read once the scores of the last tile are there
    keys.partial() ? modify(mod, row0, keys, true) : modify(mod, row0, keys, false);
    observe(factor);  // O is still zero: nothing to rescale
    weigh();
    pack_weights();
    if (kNarrows && unseen > 0) pass_values();  // of the last tile that was let pass
    keys.advance();
    keys.visit_rest([&](bool partial) {
      await_turn();
      rings.k.wait();
      hear(partial);
      start_scores();
      ptx::wgmma_commit();
      rings.v.wait();
      start_values();
      ptx::wgmma_commit();
      pass_turn();
      wait_scores<C::kOverlap ? 1 : 0>();  // with overlap, O += P V goes on under the maxima of this tile
      if (keys.last()) rings.q.release();
      modify(mod, row0, keys, partial);
      const bool moved = observe(factor);
      rings.v.wait();  // it has long been there; without this branch ptxas keeps the rings' state lane by lane
      wait_values<0>();
      if (moved) state.rescale(factor);
      weigh();
      pack_weights();
    });
  }

  // Tile of rows by tile of rows: the last product of one, its way out, and the first scores of the next go together.
  // They do not where the next rows' first tile of keys is not seen: then that tile's turn is the last product's. A
  // turn is also taken where there is no product, so that all warpgroups take as many.
  __device__ __forceinline__ void run() {
    if (C::kPingPong && group == S::kGroups - 1) pass_turn();  // the first warpgroup begins
    bool begun = false, idled = false;
    Done done;
    for (;;) {
      const bool more = !(C::kSchedule == Schedule::single && (begun || idled)) && next();
      const bool apart = begun && (!more || (kIdles && unseen > 0));
      if (apart) {
        await_turn();
        rings.v.wait();
        start_values();
        ptx::wgmma_commit();
        pass_turn();
        wait_values<0>();
        store_rows<C, Element>(p, packing, state, done, group);
        begun = false;
      }
      if (!more) {
        if (idled) await_turn(), pass_turn();
        return;
      }
      let_pass(apart);
      idled = idle();
      if (idled) {
        pass_values();
        rings.q.wait();
        rings.q.release();
        continue;
      }
      await_turn();
      if (begun) {
        rings.v.wait();
        start_values();
        ptx::wgmma_commit();
        start_first_scores();
        pass_turn();
        wait_values<1>();
        store_rows<C, Element>(p, packing, state, done, group);
        wait_scores<0>();
      } else {
        start_first_scores();
        pass_turn();
        wait_scores<0>();
      }
      attend();
      done = {rows.m0, rows.m1, rows.work.head, rows.work.batch};
      begun = true;
    }
  }
};

template <class C, class Element>
__device__ __forceinline__ void attend(const fagen_params& p, const Launch& launch, unsigned char* shared) {
  using S = Shape<C>;
  const uint32_t smem = (ptx::shared_address(shared) + 1023) & ~1023u;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well; the last produces
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&launch.q);
    ptx::prefetch_map(&launch.k);
    ptx::prefetch_map(&launch.v);
    Rings<C>(smem).init();
  }
  C::kCluster > 1 ? ptx::cluster_sync() : __syncthreads();
  ptx::start_next_kernel();
  if (!prepared<C>(launch)) ptx::wait_for_previous_kernel();
  if (group == S::kGroups) {
    ptx::fewer_registers<S::kProducerRegisters>();
    Producer<C> producer{p, launch, Rings<C>(smem), Band(p)};
    switch (__shfl_sync(~0u, threadIdx.x % 128 / 32, 0)) {
      case 0:
        producer.run_keys();
        break;
      case 1:
        producer.run_values();
        break;
      case 2:
        producer.run_telling();
        break;
      default:
        if (C::kMask != Mask::none) store_nothing<C, Element>(p, launch);
    }
  } else {
    ptx::more_registers<S::kConsumerRegisters>();
    Consumer<C, Element>(p, launch, smem, group).run();
  }
  if (C::kCluster > 1) ptx::cluster_sync();  // none ends while another fills its tiles or arrives at its barriers
}

// ---- fagen/sm90/host.cuh ---------------------------------------------------------------------------------
// From a call to a launch: tensor maps, grid, workspace.
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>


// ---- fagen/sm90/plan.cuh ---------------------------------------------------------------------------------
// What a small kernel finds out before the forward one, where it needs anything: a counter at zero, or for intervals
// their extents, what each tile of rows sees, and the order of these. The forward kernel starts beside it and waits for
// its end.


// One block's work, without intervals.
template <class C, class Element>
__device__ __forceinline__ void begin(const fagen_params& p, const Launch& launch) {
  ptx::wait_for_previous_kernel();
  ptx::start_next_kernel();
  if (p.seqlen_k == 0) return store_zeros<Element>(p);
  if (threadIdx.x == 0) *launch.taken = 0;
}

// A mask head is planned by a cluster of blocks, whose warps share out the tiles of keys, then those of rows.
constexpr int kPlanners = 8, kPlannerThreads = 512;

// The minima and maxima of the bounds in each tile of keys: one pass over the vectors, a warp a tile.
template <class C>
__device__ __forceinline__ void find_key_extents(const Intervals<C>& intervals, Extent* extents, int key_tiles,
                                                 int warp, int warps) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int tile = warp; tile < key_tiles; tile += warps)
#pragma unroll
    for (int c = 0; c < C::kIntervalColumns; ++c) {
      int low = INT_MAX, high = INT_MIN;
#pragma unroll
      for (int i = lane; i < C::kTileN; i += 32) {
        const int key = min(tile * C::kTileN + i, intervals.last_key);
        const int value = intervals.bounds[key * intervals.stride + c];
        low = min(low, value), high = max(high, value);
      }
      low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
      if (lane == 0) extents[tile * C::kIntervalColumns + c] = {low, high};
    }
}

// The tiles of rows by how many tiles of keys they see, the most first, later rows first among equals. A warp finds the
// place of a tile by counting those before it.
__device__ __forceinline__ void put_in_order(const Span* spans, int* order, int row_tiles, int warp, int warps) {
  constexpr int kAtOnce = 8;  // of a lane's loads
  const auto count = [&](int i) {
    if (i >= row_tiles) return -1;
    const int2 seen = __ldcg(reinterpret_cast<const int2*>(&spans[i].cut));
    return seen.x + seen.y;
  };
  for (int mine = warp; mine < row_tiles; mine += warps) {
    const int my_count = count(mine);
    int before = 0;
#pragma unroll 1
    for (int some = threadIdx.x % 32; some < row_tiles; some += 32 * kAtOnce) {
      int counts[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) counts[i] = count(some + i * 32);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        before += counts[i] > my_count || (counts[i] == my_count && some + i * 32 > mine);
    }
    before = __reduce_add_sync(~0u, before);
    if (threadIdx.x % 32 == 0) order[before] = mine;
  }
}

template <class C>
__device__ __forceinline__ void plan(const fagen_params& p, const Launch& launch) {
  constexpr int kWarps = kPlannerThreads / 32;
  const int plane = blockIdx.x / kPlanners, warp = blockIdx.x % kPlanners * kWarps + threadIdx.x / 32;
  const auto intervals = intervals_of<C>(p, launch, plane / p.mask_heads, plane % p.mask_heads);

  ptx::wait_for_previous_kernel();
  ptx::start_next_kernel();
  if (C::kSchedule == Schedule::dynamic && blockIdx.x == 0 && threadIdx.x == 0) *launch.taken = 0;
  find_key_extents(intervals, const_cast<Extent*>(intervals.extents), launch.key_tiles, warp, kPlanners * kWarps);
  ptx::cluster_sync();

  __shared__ Borders borders;
  borders.find(intervals, p.seqlen_q);
  for (int row_tile = warp; row_tile < launch.row_tiles; row_tile += kPlanners * kWarps) {
    const int2 rows = borders.rows<C::kTileM>(row_tile, launch.row_tiles, p.seqlen_q);
    const int index = plane * launch.row_tiles + row_tile;
    Span span = {0, 0, 0, 0};
    if (rows.x < rows.y) span = find_span<C>(intervals, Band(p), rows.x, rows.y, launch.parts + walk(launch, index));
    if (threadIdx.x % 32 == 0) launch.spans[index] = span;
  }
  if constexpr (kRanked<C>) {
    ptx::cluster_sync();
    const int first = plane * launch.row_tiles;
    put_in_order(launch.spans + first, launch.ranks + first, launch.row_tiles, warp, kPlanners * kWarps);
  }
}

// With heads packed, log2 of how many: of those that share keys, as many as a tile of rows can hold evenly.
template <class C>
static int packed_heads(const fagen_params& p) {
  int log2 = 0;
  while (C::kPackHeads && log2 < 6 && p.heads / p.kv_heads % (2 << log2) == 0) ++log2;
  return log2;
}

// Tiles of rows of a head, or of heads that are packed; what a cluster takes together is one. With intervals, some may
// end early where a document does: there is room for some more of them.
template <class C>
static int count_row_tiles(const fagen_params& p) {
  const int rows = p.seqlen_q << packed_heads<C>(p), each = C::kTileM * C::kCluster, tiles = (rows + each - 1) / each;
  return C::kMask == Mask::intervals ? tiles + tiles / 8 + 1 : tiles;
}

// The workspace: a counter; and for intervals their extents, what the tiles of rows see of them, and in which order
// these are taken.
template <class C>
struct Workspace {
  static constexpr bool kCounter = C::kSchedule == Schedule::dynamic, kExtents = C::kMask == Mask::intervals;
  uint64_t extents, spans, parts, ranks, end;  // where each begins

  explicit Workspace(const fagen_params& p) {
    const auto tiles = [](int length, int tile) { return uint64_t(length + tile - 1) / tile; };
    const auto next = [](uint64_t begin, uint64_t bytes) { return (begin + bytes + 255) / 256 * 256; };
    const uint64_t planes = kExtents ? uint64_t(p.batch) * p.mask_heads : 0;
    const uint64_t rows = planes * count_row_tiles<C>(p);
    extents = kCounter ? 256 : 0;
    spans = next(extents, planes * tiles(p.seqlen_k, C::kTileN) * C::kIntervalColumns * sizeof(Extent));
    parts = next(spans, rows * sizeof(Span));
    ranks = next(parts, rows * Part::kKinds * tiles(p.seqlen_k, 32 * C::kTileN) * sizeof(Part));
    end = next(ranks, rows * sizeof(int));
  }
};

// The driver's encoder, found at run time so that nothing links against the driver.
static PFN_cuTensorMapEncodeTiled_v12000 map_encoder() {
  static PFN_cuTensorMapEncodeTiled_v12000 found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

// A dimension of a tensor map: its size, the elements from one to the next, and how many of it are in a box.
struct Dimension {
  int size;
  int64_t stride;
  int box;
};

// A tensor of rows of `columns` elements, in boxes of 64 of them.
template <int kDimensions>
static cudaError_t make_map(CUtensorMap* map, CUtensorMapDataType type, const void* base, int columns,
                            const Dimension (&dimensions)[kDimensions]) {
  const auto encode = map_encoder();
  if (!encode) return cudaErrorNotSupported;
  cuuint64_t size[kDimensions + 1] = {cuuint64_t(columns)}, strides[kDimensions];
  cuuint32_t box[kDimensions + 1] = {64}, steps[kDimensions + 1] = {1};
  for (int i = 0; i < kDimensions; ++i) {
    const Dimension& d = dimensions[i];
    size[i + 1] = d.size, box[i + 1] = d.box, steps[i + 1] = 1;
    // a dimension of one never steps, and its stride may be anything; the map wants one that is legal
    strides[i] = d.size > 1 ? d.stride * 2 : 16;
  }
  const CUresult result = encode(map, type, kDimensions + 1, const_cast<void*>(base), size, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The maps of q, k and v.
template <class C>
static cudaError_t make_maps(const fagen_params& p, CUtensorMapDataType type, Launch& launch) {
  const auto keys = [&](CUtensorMap* map, const void* base, const int64_t (&stride)[3], int columns) {
    const Dimension rows = {p.seqlen_k, stride[1], C::kTileN / C::kCluster}, heads = {p.kv_heads, stride[2], 1};
    return make_map(map, type, base, columns, {rows, heads, {p.batch, stride[0], 1}});
  };
  if (const cudaError_t e = keys(&launch.k, p.k, p.k_stride, p.head_dim)) return e;
  if (const cudaError_t e = keys(&launch.v, p.v, p.v_stride, p.head_dim_v)) return e;
  const int packed = 1 << launch.packed;
  const Dimension rows = {p.seqlen_q, p.q_stride[1], C::kTileM / packed};
  const Dimension heads = {p.heads / packed, p.q_stride[2] * packed, 1}, batch = {p.batch, p.q_stride[0], 1};
  if constexpr (C::kPackHeads)
    return make_map(&launch.q, type, p.q, p.head_dim, {{packed, p.q_stride[2], packed}, rows, heads, batch});
  else
    return make_map(&launch.q, type, p.q, p.head_dim, {rows, heads, batch});
}

// How many blocks, or clusters of them, run at once; found out once a device, which is given more shared memory than
// the default as well. Clusters may be fewer than the SMs suggest, since those of one lie close together.
template <class C, class Forward>
static cudaError_t prepare(Forward forward, int* teams) {
  constexpr int kDevices = 64;
  static int known[kDevices];
  static volatile bool ready[kDevices];
  int index = 0;
  if (const cudaError_t e = cudaGetDevice(&index)) return e;
  if (index >= kDevices) return cudaErrorInvalidDevice;
  if (!ready[index]) {  // two threads may both come here; both write the same
    int sms;
    if (const cudaError_t e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index)) return e;
    if (const cudaError_t e =
            cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<C>::kSmemBytes))
      return e;
    known[index] = sms * C::kBlocksPerSm;
    if (C::kCluster > 1) {
      cudaLaunchAttribute cluster;
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {C::kCluster, 1, 1};
      const cudaLaunchConfig_t config = {
          dim3(C::kCluster), dim3(Shape<C>::kThreads), Shape<C>::kSmemBytes, nullptr, &cluster, 1};
      if (const cudaError_t e = cudaOccupancyMaxActiveClusters(&known[index], forward, &config)) return e;
      if (known[index] == 0) return cudaErrorInvalidConfiguration;
    }
    ready[index] = true;
  }
  *teams = known[index];
  return cudaSuccess;
}

// Of the sectioned order: as many heads at once as their keys and values leave room for, whole groups of heads that
// share them, and such that the last section is not much smaller than the others, since it ends the kernel.
static int section(int heads, int group, int64_t fit) {
  const int groups = heads / group;
  const int most = fit < 1 ? 1 : fit < groups ? int(fit) : groups;
  int best = most;
  for (int n = most; 2 * n >= most && n > 0; --n) {
    const auto left = [&](int at_once) { return (at_once - groups % at_once) % at_once * best; };  // short of whole
    if (left(n) < left(best)) best = n;
  }
  return best * group;
}

// Start a kernel, which may begin before the last one of the stream has ended, ours or not, and waits for that itself.
template <int kCluster = 1, bool kEarly = true, class... Parameters, class... Arguments>
static cudaError_t start(void (*kernel)(Parameters...), int blocks, int threads, int smem, cudaStream_t stream,
                         const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = kEarly;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kCluster, 1, 1};
  const cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), size_t(smem),
                                     stream,       attributes,    kCluster > 1 ? 2u : 1u};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

using Body = void (*)(fagen_params, Launch);  // of a kernel

template <class C, class Element>
static int launch_forward(const fagen_params& p, cudaStream_t stream, CUtensorMapDataType type, Body begin, Body plan,
                          Body forward) {
  int resident;  // blocks, or clusters
  if (const cudaError_t e = prepare<C>(forward, &resident)) return e;
  Launch launch;
  if (p.batch == 0 || p.seqlen_q == 0) return cudaSuccess;
  if (p.seqlen_k == 0) return start(begin, resident, 256, 0, stream, p, launch);
  launch.packed = packed_heads<C>(p);
  if (const cudaError_t e = make_maps<C>(p, type, launch)) return e;
  const int heads = (p.heads >> launch.packed) * p.batch, planes = p.batch * p.mask_heads;
  launch.row_tiles = count_row_tiles<C>(p);
  launch.tiles = launch.row_tiles * heads;
  launch.key_tiles = (p.seqlen_k + C::kTileN - 1) / C::kTileN;
  const int64_t head_bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v) * sizeof(Element);
  const int sharers = (p.heads / p.kv_heads) >> launch.packed;
  const int heads_at_once = section(heads, sharers, (int64_t(C::kSectionMb) << 20) / head_bytes);
  launch.order = Order::of<C::kBlockOrder>(launch.row_tiles, p.heads >> launch.packed, p.batch, heads_at_once);
  launch.sharers = Divisor(sharers);

  using W = Workspace<C>;
  const W places(p);
  char* workspace = static_cast<char*>(p.workspace);
  launch.taken = reinterpret_cast<unsigned*>(workspace);
  launch.extents = reinterpret_cast<Extent*>(workspace + places.extents);
  launch.spans = reinterpret_cast<Span*>(workspace + places.spans);
  launch.parts = reinterpret_cast<Part*>(workspace + places.parts);
  launch.ranks = reinterpret_cast<int*>(workspace + places.ranks);
  if (W::kExtents || (W::kCounter && launch.tiles > resident))
    if (const cudaError_t e = W::kExtents
                                  ? start<kPlanners>(plan, kPlanners * planes, kPlannerThreads, 0, stream, p, launch)
                                  : start(begin, 1, 32, 0, stream, p, launch))
      return e;

  constexpr bool kSingle = C::kSchedule == Schedule::single;
  constexpr bool kEarly = W::kExtents || !kSingle;  // many short blocks are not the faster for it
  const int teams = kSingle || launch.tiles < resident ? launch.tiles : resident;
  return start<C::kCluster, kEarly>(forward, teams * C::kCluster, Shape<C>::kThreads, Shape<C>::kSmemBytes, stream, p,
                                    launch);
}

using Element = bfloat_t;
constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
struct Kernel : Config {
  static constexpr QSource kQSource = QSource::shared;
};

__global__ void __launch_bounds__(Shape<Kernel>::kThreads, Kernel::kBlocksPerSm)
forward_kernel(const __grid_constant__ fagen_params p, const __grid_constant__ Launch launch) {
  extern __shared__ unsigned char shared[];
  attend<Kernel, Element>(p, launch, shared);
}

__global__ void begin_kernel(const __grid_constant__ fagen_params p, const __grid_constant__ Launch launch) {
  begin<Kernel, Element>(p, launch);
}

__global__ void plan_kernel(const __grid_constant__ fagen_params p, const __grid_constant__ Launch launch) {
}

extern "C" uint32_t fagen_params_size(void) { return sizeof(fagen_params); }

extern "C" uint64_t fagen_workspace_bytes(const fagen_params* p) { return Workspace<Kernel>(*p).end; }

extern "C" const char* fagen_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

extern "C" int fagen_launch(const fagen_params* p, void* stream) {
  return launch_forward<Kernel, Element>(*p, static_cast<cudaStream_t>(stream), kMapType, begin_kernel,
                                         plan_kernel, forward_kernel);
}
