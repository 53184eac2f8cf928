// A kernel for attention forward, made by fagen. It needs the CUDA toolkit and nothing else: no torch, no Python.
//
// problem:  forward/bf16/d64/none, its config chosen for b4/h32-32/q4096-k4096
// config:   tile_m=192 tile_n=128 stages=2 q_stages=2 overlap=True rescale=deferred ping_pong=True blocks_per_sm=1 schedule=dynamic block_order=ascending section_mb=32 cluster=1 shared_weights=False pack_heads=False splits=none (the family's default)
// made by:  fagen emit --target sm_90 --dtype bf16 --head-dim 64 --mask none --seqlen 4096 --batch 4 --heads 32 --kv-heads 32 --family sm90_forward --config '{"block_order": "ascending", "blocks_per_sm": 1, "cluster": 1, "overlap": true, "pack_heads": false, "ping_pong": true, "q_stages": 2, "rescale": "deferred", "schedule": "dynamic", "section_mb": 32, "shared_weights": false, "splits": "none", "stages": 2, "tile_m": 192, "tile_n": 128}' --out DIR
// build:    nvcc -gencode=arch=compute_90a,code=sm_90a -O3 -std=c++17 --use_fast_math -lineinfo -shared -Xcompiler -fPIC -o kernel.so kernel.cu
// call:     fagen_launch(), declared in kernel.h beside this file

// sm90_forward: attention forward for forward/bf16/d64/none on sm_90
//
// Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.
// Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.
//
// Config: tile_m=192 tile_n=128 stages=2 q_stages=2 overlap=True rescale=deferred ping_pong=True blocks_per_sm=1 schedule=dynamic block_order=ascending section_mb=32 cluster=1 shared_weights=False pack_heads=False splits=none

namespace fagen {

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
  static constexpr bool kDropout = false;  // weights are dropped at random
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

// Sizes that fagen derived from the config before compiling; the kernel asserts that it agrees.
struct Derived {
  static constexpr int threads = 512;
  static constexpr int smem_bytes = 116096;
  static constexpr int registers = 160;
};

}  // namespace fagen

using namespace fagen;  // the kernel is this one file

#include <cuda.h>
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

// ---- fagen/ptx/mbarrier.cuh ------------------------------------------------------------------------------
// Barriers in shared memory that count arrivals and bytes (sm_90). Addresses are shared-memory ones.
#include <stdint.h>

namespace fagen::ptx {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Make initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive at the barrier at the same place in another block of the cluster, or in this one. It stands for reads of
// shared memory that are over: nothing is released to the whole cluster, which would cost a fence.
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

// Wait until the phase of this parity is over. A fresh barrier counts as past its phase of parity 1.
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

// Load a word from shared memory; a barrier has said that it is there.
__device__ __forceinline__ uint32_t ld_shared_4(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
  return value;
}

}  // namespace fagen::ptx

// ---- fagen/ptx/tma.cuh -----------------------------------------------------------------------------------
// The copy engine of sm_90: boxes of a tensor that a map describes.
#include <cuda.h>
#include <stdint.h>

namespace fagen::ptx {

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copy one box of a 4-dimensional tensor to shared memory; `barrier` counts its bytes. Outside the tensor reads zero.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row,
                                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Copy a box to the same place of several blocks of the cluster, a bit of `blocks` each; each one's barrier counts it.
__device__ __forceinline__ void tma_load_to_all(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                                int row, int head, int batch, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(blocks)
      : "memory");
}

// Copy one box of a 5-dimensional tensor, the whole of its second dimension.
__device__ __forceinline__ void tma_load_packed(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                                int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %7, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(0)
      : "memory");
}

}  // namespace fagen::ptx

// ---- fagen/ptx/warpgroup.cuh -----------------------------------------------------------------------------
// Instructions of sm_90a: registers by role, barriers, tile stores, waits for products, kernels that overlap.

namespace fagen::ptx {

// Take registers for the warpgroup's threads from the block's pool, or give them back.
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Count this warp's threads on barrier `id` without waiting; others wait with barrier_sync.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Wait for all threads of the cluster's blocks; writes before it are visible to all after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Store a warp's four 8 x 8 tiles of 16 bits from registers (ldmatrix's order) to the rows that its lanes name.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
// Make this thread's writes to shared memory visible to products and to the copy engine.
__device__ __forceinline__ void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Needed before the first product of a group, and after ordinary code has touched its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most kPending of the newest groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keep the compiler from moving uses of a register across a wait or a fence.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin(unsigned& x) { asm volatile("" : "+r"(x)::"memory"); }

// Two kernels in a stream, the second launched to start early: the first allows it, the second waits for its end.
__device__ __forceinline__ void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace fagen::ptx

namespace fagen::ptx {

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

}  // namespace fagen::ptx
// ---- fagen/sm90/forward/kernel.cuh -----------------------------------------------------------------------
// The forward kernel for Hopper: a block's entry, which gives its warps their roles.
//
//   warpgroups 0 .. kGroups - 1   consumers: 64 rows of q each                           consumer.cuh
//   the last one, warp 0          finds the next row tile, loads q and keys              producer.cuh
//                 warp 1          loads values                                           producer.cuh
//                 warp 2          intervals: writes the masks of the key tiles           producer.cuh, tile_mask.cuh
//                 warp 3          stores the rows that see no key                        epilogue.cuh
//
// A kernel before it sets a counter, or plans the visits of intervals: prologue.cuh. The host's part: launch.cuh.
// ---- fagen/sm90/forward/consumer.cuh ---------------------------------------------------------------------
// A consumer warpgroup: 64 rows of q against key tile after key tile, row tile by row tile without a pause. The product
// that ends one row tile, the store of its O, and the first scores of the next are under way together.
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

// ---- fagen/common/row_state.cuh --------------------------------------------------------------------------
// The state that a warp's rows carry from key tile to key tile: O, softmax, and what is done to the scores of a tile.
// ---- fagen/common/softmax.cuh ----------------------------------------------------------------------------
// Online softmax of the rows that a thread shares with the three other lanes of its quad.
#include <math.h>

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

// ---- fagen/sm90/forward/epilogue.cuh ---------------------------------------------------------------------
// O and LSE of a row tile, from registers to global memory.
// ---- fagen/common/dropout.cuh ----------------------------------------------------------------------------
// Dropout of the weights that a thread holds of a key tile, in the accumulators' order. Nothing where none is wanted.

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



// ---- fagen/sm90/forward/row_tile.cuh ---------------------------------------------------------------------
// The row tiles that a block works through, and the key tiles that each of them visits.

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

// ---- fagen/schedule/tile_scheduler.cuh -------------------------------------------------------------------
// Row tiles dealt out to blocks that stay: a block asks for the next one until there is none.

namespace fagen {

// Blocks of a cluster take neighbouring row tiles together, which count as one tile of the schedule.
template <class C>
__device__ __forceinline__ int cluster_index() {
  return blockIdx.x / C::kCluster;
}
template <class C>
__device__ __forceinline__ int cluster_count() {
  return gridDim.x / C::kCluster;
}

// The tiles of a cluster after its first, cluster_index(), by their number in the order:
//   single    none
//   balanced  every so many-th, turning at the ends of the order, so that all get as much of the long as of the short
//   dynamic   the next one that no cluster has taken, by a counter in global memory
template <class C>
struct TileScheduler {
  int round = 0;

  // The counter starts at zero, set by a prologue kernel. Without one every cluster has a tile at once, and no other.
  __device__ __forceinline__ int next(int tiles, unsigned* next_tile_counter, bool has_prologue) {
    if constexpr (C::kSchedule == Schedule::single) {
      return tiles;
    } else if constexpr (C::kSchedule == Schedule::balanced) {
      ++round;
      return round * cluster_count<C>() +
             (round % 2 ? cluster_count<C>() - 1 - cluster_index<C>() : cluster_index<C>());
    } else {
      if (!has_prologue) return tiles;
      if (round++ == 0) ptx::wait_for_previous_kernel();
      return cluster_count<C>() + (threadIdx.x % 32 == 0 ? atomicAdd(next_tile_counter, 1) : 0);
    }
  }
};

}  // namespace fagen

// ---- fagen/sm90/forward/visits.cuh -----------------------------------------------------------------------
// Intervals: the key tiles that a row tile visits, in which order. A key tile may begin at any key here: those of a row
// tile begin with the first key that it sees.

// ---- fagen/sm90/pipeline.cuh -----------------------------------------------------------------------------
// Pipelines between the warps of a block: stages of shared memory that producers fill and consumers free.




// ---- fagen/sm90/smem_layout.cuh --------------------------------------------------------------------------
// A block's shared memory, threads and registers. Tiles lie in slabs of 64 columns, rows of 128 bytes, swizzled as the
// copy engine and the tensor cores both expect (128-byte swizzle).
#include <stdint.h>

namespace fagen {

constexpr int kSlabColumns = 64, kRowBytes = 128;       // a slab's row
constexpr int kGroupRows = 64;                          // a warpgroup's rows of q
constexpr int kBarrierBytes = 16;                       // a stage's full and its empty barrier
constexpr int kQueueStages = 2, kAssignmentBytes = 32;  // the assignment queue
constexpr int kQueueBytes = kQueueStages * (kAssignmentBytes + kBarrierBytes);
constexpr int kTileMaskBytes = 48;                      // intervals: the mask of one key tile
constexpr int kMasksPerStage = 2;                       // a mask outlives its key tile until the softmax is done
constexpr int kSmemAlignment = 1024;

constexpr int slabs(int columns) { return (columns + kSlabColumns - 1) / kSlabColumns; }

template <class C>
struct BlockLayout {
  static constexpr int kGroups = C::kTileM / kGroupRows;  // consumer warpgroups
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kSlabs = slabs(C::kHeadDim), kSlabsV = slabs(C::kHeadDimV);
  static constexpr int kQBytes = C::kTileM * kRowBytes * kSlabs;
  static constexpr int kKBytes = C::kTileN * kRowBytes * kSlabs, kVBytes = C::kTileN * kRowBytes * kSlabsV;
  static constexpr int kWeightSlabBytes = kGroupRows * kRowBytes;
  static constexpr int kWeightBytes = C::kSharedWeights ? slabs(C::kTileN) * kWeightSlabBytes : 0;

  // Offsets, in this order: tiles of q, of k, of v, each warpgroup's weights, the barriers of q, k and v, the
  // assignment queue with its own, the masks of the key tiles.
  static constexpr int kQ = 0, kK = kQ + C::kQStages * kQBytes, kV = kK + C::kStages * kKBytes;
  static constexpr int kWeights = kV + C::kStages * kVBytes, kBarriers = kWeights + kGroups * kWeightBytes;
  static constexpr int kQueue = kBarriers + kBarrierBytes * (C::kQStages + 2 * C::kStages);
  static constexpr int kTileMasks = kQueue + kQueueBytes;
  static constexpr int kEnd = kTileMasks + kMasksPerStage * kTileMaskBytes * C::kStages;
  static constexpr int kSmemBytes = kEnd + kSmemAlignment;  // room to align

  // Registers of a thread: those that the block is compiled for, and how the roles divide them.
  static constexpr int kRegisters = 65536 / (C::kBlocksPerSm * kThreads) / 8 * 8;
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kConsumerShare = ((kGroups + 1) * kRegisters - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kConsumerShare > 240 ? 240 : kConsumerShare;

  static_assert(C::kTileM % 64 == 0 && C::kTileN % 16 == 0, "a warpgroup's product is 64 rows, 16 keys deep");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

}  // namespace fagen

namespace fagen {

// A ring of tiles. Each stage has a barrier that completes when the tile is full and one that completes when it is
// empty. Producer and consumers step through the stages on their own. Blocks of a cluster that share tiles each load a
// part of all: a stage is then empty when the consumers of all of them have read it.
template <int kStages, int kBytes, int kSharingBlocks = 1>
struct Pipeline {
  uint32_t tiles, barriers;  // stage 0's; the empty barrier lies behind the full one
  int stage = 0, phase = 0;

  static constexpr int kBlocks = kSharingBlocks;

  __device__ __forceinline__ void init(int consumers, int producers = 1) const {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(barriers + s * kBarrierBytes, producers);
      ptx::mbarrier_init(barriers + s * kBarrierBytes + 8, consumers * kBlocks);
    }
  }
  __device__ __forceinline__ uint32_t tile() const { return tiles + stage * kBytes; }
  __device__ __forceinline__ uint32_t full() const { return barriers + stage * kBarrierBytes; }
  __device__ __forceinline__ uint32_t empty() const { return barriers + stage * kBarrierBytes + 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }

  // for the producer: wait until the stage is empty; announce the tile's bytes
  __device__ __forceinline__ void acquire() const { ptx::mbarrier_wait(empty(), phase ^ 1); }
  __device__ __forceinline__ void expect_bytes() const { ptx::mbarrier_arrive_expect(full(), kBytes); }
  // for consumers: wait until the tile is full; free its stage, one arrival a warp
  __device__ __forceinline__ void wait() const { ptx::mbarrier_wait(full(), phase); }
  __device__ __forceinline__ void release() {
    if constexpr (kBlocks == 1) {
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty());
    } else {
      if (threadIdx.x % 32 < kBlocks) ptx::mbarrier_arrive_at(empty(), threadIdx.x % 32);
    }
    advance();
  }
};

// With intervals: rows [m0, m1), and how many key tiles they visit. Something may be hidden of the partial ones.
struct alignas(16) RowTileVisits {
  int m0, m1, partial, full;
};

// The next row tile of a block, as the producer of keys found it. A row_tile of -1 is the end.
struct TileAssignment {
  TileCoord coord;
  int kv_head;
  RowTileVisits visits;
};

// A pipeline of assignments.
template <bool kIntervals>
struct AssignmentQueue {
  uint32_t tiles, barriers;
  int count = 0;  // assignments popped so far; stage and phase derive from it to save registers

  __device__ __forceinline__ Pipeline<kQueueStages, kAssignmentBytes> pipeline() const {
    return {tiles, barriers, count % kQueueStages, count / kQueueStages % 2};
  }

  __device__ __forceinline__ void push(const TileAssignment& assignment) {
    if (threadIdx.x % 32 == 0) {
      const auto stage = pipeline();
      stage.acquire();
      const TileCoord& coord = assignment.coord;
      ptx::st_shared_16(stage.tile(), make_uint4(coord.row_tile, coord.head, coord.batch, assignment.kv_head));
      const RowTileVisits& visits = assignment.visits;
      if (kIntervals)
        ptx::st_shared_16(stage.tile() + 16, make_uint4(visits.m0, visits.m1, visits.partial, visits.full));
      ptx::mbarrier_arrive(stage.full());
    }
    ++count;
  }
  __device__ __forceinline__ TileAssignment pop() {
    auto stage = pipeline();
    stage.wait();
    const uint4 coord = ptx::ld_shared_16(stage.tile());
    const uint4 visits = kIntervals ? ptx::ld_shared_16(stage.tile() + 16) : make_uint4(0, 0, 0, 0);
    __syncwarp();  // every lane has read before the first one frees the stage
    stage.release();
    ++count;
    // broadcast, so that the compiler as well knows it to be the same in all lanes
    const auto uniform = [](uint32_t x) { return int(__shfl_sync(~0u, x, 0)); };
    return {{uniform(coord.x), uniform(coord.y), uniform(coord.z)},
            uniform(coord.w),
            {uniform(visits.x), uniform(visits.y), uniform(visits.z), uniform(visits.w)}};
  }
};

// The pipelines of a block, as one warp sees them.
template <class C>
struct Pipelines {
  static constexpr bool kIntervals = MaskOf<C>::kIntervals;
  using L = BlockLayout<C>;
  Pipeline<C::kQStages, L::kQBytes> q;
  Pipeline<C::kStages, L::kKBytes, C::kCluster> k;
  Pipeline<C::kStages, L::kVBytes, C::kCluster> v;
  AssignmentQueue<kIntervals> assignments;
  uint32_t tile_masks;  // intervals: kMasksPerStage for each stage of k

  __device__ __forceinline__ explicit Pipelines(uint32_t smem)
      : q{smem + L::kQ, smem + L::kBarriers},
        k{smem + L::kK, smem + L::kBarriers + kBarrierBytes * C::kQStages},
        v{smem + L::kV, smem + L::kBarriers + kBarrierBytes * (C::kQStages + C::kStages)},
        assignments{smem + L::kQueue, smem + L::kQueue + kQueueStages * kAssignmentBytes},
        tile_masks(smem + L::kTileMasks) {}

  // The mask of the present tile of k.
  __device__ __forceinline__ uint32_t tile_mask() const {
    return tile_masks + (k.stage + k.phase * C::kStages) * kTileMaskBytes;
  }

  // A tile or an assignment is freed with one arrival a warp. With intervals a warp writes the masks of the key tiles:
  // a tile of k is full when that is done as well, and that warp pops assignments, as the producer of values does.
  __device__ __forceinline__ void init() const {
    q.init(L::kGroups * 4);
    k.init(L::kGroups * 4, 1 + kIntervals);
    v.init(L::kGroups * 4);
    assignments.pipeline().init(L::kGroups * 4 + 1 + kIntervals);
    ptx::fence_mbarrier_init();
  }
};

}  // namespace fagen

namespace fagen {

// One key tile against one row tile.
template <class C>
struct IntervalKeyTile {
  Extent ls, le, us, ue;  // its keys' bounds; from two tiles of the extents where it lies across them

  __device__ __forceinline__ IntervalKeyTile(const Intervals<C>& intervals, int first) {
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
  __device__ __forceinline__ bool partial(int m0, int m1) const {
    return (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
  }
};

// The visited ones of 32 neighbouring key tiles, of one kind, a bit each.
struct VisitBits {
  uint32_t word;  // the first key of the 32, the kind
  uint32_t tiles;

  // partly hidden by the band, and perhaps by intervals; by intervals only; or full
  enum Kind { kBandPartial, kPartial, kFull, kKinds };

  __device__ __forceinline__ int key() const { return word >> 2; }
  __device__ __forceinline__ Kind kind() const { return Kind(word & 3); }
};

// A row tile's visits for the warps that load its key tiles: kind by kind, so that the consumers have one loop for
// partial tiles and one for full ones, and within a kind from the last to the first.
template <class C>
struct IntervalKeyWalk {
  const VisitBits* visits;
  unsigned next;  // index in `visits`
  VisitBits bits;  // the present ones: tiles still to visit
  int key;  // the present tile's first

  __device__ __forceinline__ IntervalKeyWalk(const VisitBits* visits, unsigned first)
      : visits(visits), next(first), bits{0, 0} {}

  __device__ __forceinline__ void advance() {
    while (bits.tiles == 0) bits = visits[next++];
    const int tile = 31 - __clz(bits.tiles);
    bits.tiles ^= 1u << tile;
    key = bits.key() + tile * C::kTileN;
  }
};

// Rows at which one row tile had better end and the next begin, a bit each: there the rows that whole key tiles are
// hidden from begin or end (with packed documents, a document ends).
constexpr int kMostRows = 1 << 17;  // later rows are not looked at
struct RowTileBoundaries {
  uint32_t bits[kMostRows / 32];

  // A block's work.
  template <class C>
  __device__ __forceinline__ void find(const Intervals<C>& intervals, int seqlen_q) {
    const int words = min(seqlen_q, kMostRows) / 32 + 1;
    for (int i = threadIdx.x; i < words && i < kMostRows / 32; i += blockDim.x) bits[i] = 0;
    __syncthreads();
    const int extents = (intervals.last_key + C::kTileN) / C::kTileN * C::kIntervalColumns;
    for (int i = threadIdx.x; i < extents; i += blockDim.x) {
      const Extent extent = intervals.extents[i];
      if (extent.low == extent.high && extent.low > 0 && extent.low < min(seqlen_q, kMostRows))
        atomicOr(&bits[extent.low / 32], 1u << extent.low % 32);
    }
    __syncthreads();
  }
  // A warp's work: rows of the `index`-th row tile of at most `tiles`; {0, 0} if there are fewer.
  template <int kTileM>
  __device__ __forceinline__ int2 rows(int index, int tiles, int seqlen_q) const {
    const auto count = [](int rows) { return (rows + kTileM - 1) / kTileM; };
    const int words = min(seqlen_q, kMostRows) / 32 + 1, lane = threadIdx.x % 32;
    int begin = 0, before = 0;  // the last boundary, and how many tiles end there or sooner
    for (int word = 0; word < words; word += 32) {
      const uint32_t mine = word + lane < words && word + lane < kMostRows / 32 ? bits[word + lane] : 0;
      for (uint32_t lanes = __ballot_sync(~0u, mine != 0); lanes; lanes &= lanes - 1) {
        const int from = __ffs(lanes) - 1;
        for (uint32_t left = __shfl_sync(~0u, mine, from); left; left &= left - 1) {
          const int boundary = (word + from) * 32 + __ffs(left) - 1, more = count(boundary - begin);
          if (before + more + count(seqlen_q - boundary) > tiles) continue;  // there is no room for this one
          if (index < before + more) {
            const int m0 = begin + (index - before) * kTileM;
            return make_int2(m0, min(m0 + kTileM, boundary));
          }
          begin = boundary, before += more;
        }
      }
    }
    const int m0 = begin + (index - before) * kTileM;
    return m0 < seqlen_q ? make_int2(m0, min(m0 + kTileM, seqlen_q)) : make_int2(0, 0);
  }
};

// Plan the visits of rows [m0, m1) and write their bits; a warp's work. The code is short rather than fast: it comes
// from memory each time, which takes most of the time.
template <class C>
__device__ __forceinline__ RowTileVisits plan_visits(const Intervals<C>& intervals, const Band& band, int m0, int m1,
                                                     VisitBits* bits) {
  const int lane = threadIdx.x % 32;
  const int begin = band.begin(m0), end = band.end(m1 - 1);
  const int tiles_end = (end + C::kTileN - 1) / C::kTileN;
  int first = -1, last = -1;  // tiles of the extents
#pragma unroll 1
  for (int group = begin / C::kTileN; group < tiles_end; group += 32) {
    const int mine = group + lane;
    const bool some = mine < tiles_end && !IntervalKeyTile<C>(intervals, mine * C::kTileN).empty(m0, m1);
    const uint32_t seen = __ballot_sync(~0u, some);
    if (seen && first < 0) first = group + __ffs(seen) - 1;
    if (seen) last = group + 31 - __clz(seen);
  }
  RowTileVisits visits = {m0, m1, 0, 0};
  if (first < 0) return visits;
  // and the first and last keys in those tiles, if any of theirs is seen after all
  int first_key = first * C::kTileN, last_key = min((last + 1) * C::kTileN, end) - 1;
#pragma unroll 1
  for (const bool ahead : {true, false}) {
    const int key0 = (ahead ? first : last) * C::kTileN;
    int low = INT_MAX, high = -1;
#pragma unroll
    for (int i = 0; i < C::kTileN; i += 32) {
      const int key = key0 + i + lane;
      const HiddenRows hidden = intervals.at(min(key, intervals.last_key));
      // no && before the load, or each load would wait for the one before
      const bool seen = (i + lane < C::kTileN) & (key >= begin) & (key < end) & !hidden.covers(m0, m1);
      low = min(low, seen ? key : INT_MAX), high = seen ? key : high;
    }
    low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
    if (high >= 0) (ahead ? first_key : last_key) = ahead ? low : high;
  }
  if constexpr (C::kDropout) first_key &= ~31;  // where the random numbers of neighbouring keys are made together
  // the key tiles begin with the first key; the lanes look at 32 of them at once
  constexpr int kGroup = 32 * C::kTileN;
  const int groups = (last_key - first_key) / kGroup + 1;
#pragma unroll 1
  for (int group = groups - 1; group >= 0; --group, ++bits) {
    const int key0 = first_key + group * kGroup, key = key0 + lane * C::kTileN;
    int kind = VisitBits::kKinds;
    if (key <= last_key) {
      const IntervalKeyTile<C> tile(intervals, key);
      const bool by_band = key + C::kTileN > band.end(m0) || key < band.begin(m1 - 1);
      if (!tile.empty(m0, m1))
        kind = by_band ? VisitBits::kBandPartial : tile.partial(m0, m1) ? VisitBits::kPartial : VisitBits::kFull;
    }
#pragma unroll 1
    for (int i = 0; i < VisitBits::kKinds; ++i) {
      const uint32_t tiles = __ballot_sync(~0u, kind == i);
      (i == VisitBits::kFull ? visits.full : visits.partial) += __popc(tiles);
      if (lane == 0) bits[i * groups] = {uint32_t(key0 << 2 | i), tiles};
    }
  }
  return visits;
}

}  // namespace fagen


namespace fagen {

// Memory is read in sectors of 32 bytes, 16 elements. A head that begins in the middle of one is loaded from 8 columns
// before its first, which the copy engine fills with zeros as outside of the row. Bits of 8: of the first element, and
// of the steps to the next sequence and the next head.
struct EarlyColumns {
  int base = 0, batch = 0, head = 0;

  __device__ __forceinline__ int of(int head_index, int batch_index) const {
    return (base + head * head_index + batch * batch_index) & 8;
  }
};

constexpr bool is_power_of_two(int n) { return (n & (n - 1)) == 0; }
// Kernels for head dims of a power of two, which nearly all heads have, spend nothing on it.
template <class C>
constexpr bool kLoadsEarly = !is_power_of_two(C::kHeadDim) && !is_power_of_two(C::kHeadDimV);

// Computed once on the host for a launch.
struct LaunchArgs {
  CUtensorMap q, k, v;
  Divisor packed;               // heads of q whose rows lie side by side in a tile
  int tile_rows;                // of a tile that are there: whole rows of q of all of them
  int row_tiles, key_tiles;     // per head
  int tiles;                    // row tiles in all
  TileOrder order;
  Divisor heads_per_kv_head;
  Extent* extents;              // intervals: the extents of each key tile,
  RowTileVisits* visits;        // how many key tiles each row tile visits,
  VisitBits* visit_bits;        // which,
  int* ranks;                   // and the row tiles by their visits, the most first
  unsigned* next_tile_counter;  // dynamic schedule: row tiles taken, beside each cluster's first
  EarlyColumns k_early, v_early;  // of q's columns as of k's, and of O's as of v's
};

// True if a prologue kernel runs before this one. It begins when all kernels before it have ended.
template <class C>
__device__ __forceinline__ bool has_prologue(const LaunchArgs& launch) {
  return MaskOf<C>::kIntervals || (C::kSchedule == Schedule::dynamic && launch.tiles > cluster_count<C>());
}

// With intervals the last row tile need not be the longest: they are ranked by their visits.
template <class C>
constexpr bool kRanked =
    MaskOf<C>::kIntervals && (C::kBlockOrder == BlockOrder::longest_first || C::kBlockOrder == BlockOrder::sectioned);

// Intervals may differ by batch and by kv head.
__device__ __forceinline__ int mask_head(const fagen_forward_params& p, int kv_head) {
  return p.mask_heads == 1 ? 0 : kv_head;
}
__device__ __forceinline__ int64_t mask_plane(const fagen_forward_params& p, int batch, int kv_head) {
  return int64_t(batch) * p.mask_heads + mask_head(p, kv_head);
}

// The index of a row tile in `visits` and `ranks`, and of its first entry in `visit_bits`.
__device__ __forceinline__ int visits_index(const fagen_forward_params& p, const LaunchArgs& launch, int batch,
                                            int kv_head, int tile) {
  return mask_plane(p, batch, kv_head) * launch.row_tiles + tile;
}
__device__ __forceinline__ unsigned visit_bits_index(const LaunchArgs& launch, int visits_index) {
  return unsigned(visits_index) * VisitBits::kKinds * ((launch.key_tiles + 31) / 32);
}

template <class C>
__device__ __forceinline__ Intervals<C> intervals_of(const fagen_forward_params& p, const LaunchArgs& launch, int batch,
                                                     int head) {
  Intervals<C> intervals;
  intervals.bounds = bounds_of(p, batch, head);
  intervals.stride = p.intervals.stride[2];
  intervals.extents = launch.extents + (int64_t(batch) * p.mask_heads + head) * launch.key_tiles * C::kIntervalColumns;
  intervals.last_key = p.seqlen_k - 1;
  return intervals;
}

// Heads of q that share keys may be packed: n of them count as one head, with n packed rows to a row of q, a head each.
// A tile has whole rows of q: where n does not divide it, its last rows are nobody's.
template <class C>
struct HeadPacking {
  Divisor heads;
  int of_tile;

  __device__ __forceinline__ explicit HeadPacking(const LaunchArgs& launch)
      : heads(launch.packed), of_tile(launch.tile_rows) {}
  __device__ __forceinline__ int rows(int rows) const { return C::kPackHeads ? rows * int(heads.by) : rows; }
  __device__ __forceinline__ int tile_rows() const { return C::kPackHeads ? of_tile : C::kTileM; }
  // head and row of q for a packed head and row
  __device__ __forceinline__ int head(int head, int m) const {
    return C::kPackHeads ? head * int(heads.by) + int(heads.remainder(m, row(m))) : head;
  }
  __device__ __forceinline__ int row(int m) const { return C::kPackHeads ? int(heads.quotient(m)) : m; }
  // the key tiles that packed rows [m0, m1) see
  __device__ __forceinline__ TileRange range(const Band& band, int m0, int m1) const {
    if constexpr (!MaskOf<C>::kHasEnd)
      return {0, (band.seqlen_k + C::kTileN - 1) / C::kTileN, 0, band.seqlen_k / C::kTileN};
    TileRange range = TileRange::of<C::kTileN>(band, row(m0), row(m1 - 1) + 1);
    if (!MaskOf<C>::kHasBegin) range.begin = range.full_begin = 0;
    return range;
  }
};

// The `index`-th row tile in the order of work.
template <class C>
__device__ __forceinline__ TileAssignment assignment_at(const fagen_forward_params& p, const LaunchArgs& launch,
                                                        int index) {
  TileAssignment assignment;
  TileCoord& coord = assignment.coord = launch.order.tile_at<C::kBlockOrder>(index);
  assignment.kv_head = launch.heads_per_kv_head.quotient(coord.head);
  if constexpr (MaskOf<C>::kIntervals) {
    const int first = visits_index(p, launch, coord.batch, assignment.kv_head, 0);
    if constexpr (kRanked<C>) coord.row_tile = launch.ranks[first + launch.row_tiles - 1 - coord.row_tile];
    assignment.visits = launch.visits[first + coord.row_tile];
  }
  return assignment;
}

// The walk over a row tile's key tiles for the warps that load them: a band's from the last to the first.
template <class C>
struct BandKeyWalk {
  int key;  // the present tile's first
  __device__ __forceinline__ void advance() { key -= C::kTileN; }
};

// Rows [m0, m1) of a head, and the key tiles that they visit.
template <class C>
struct RowTile {
  TileCoord coord;
  int m0, m1, kv_head;
  TileRange range;  // a band's
  // intervals:
  int partial, full;  // how many key tiles
  const VisitBits* visit_bits;
  unsigned first_bits;
  Intervals<C> intervals;

  RowTile() = default;
  __device__ __forceinline__ RowTile(const fagen_forward_params& p, const LaunchArgs& launch, const Band& band,
                                     const TileAssignment& assignment)
      : coord(assignment.coord), kv_head(assignment.kv_head) {
    const HeadPacking<C> packing(launch);
    if constexpr (MaskOf<C>::kIntervals) {
      const RowTileVisits& visits = assignment.visits;
      m0 = visits.m0, m1 = visits.m1, partial = visits.partial, full = visits.full;
      visit_bits = launch.visit_bits;
      first_bits = visit_bits_index(launch, visits_index(p, launch, coord.batch, kv_head, coord.row_tile));
      intervals = intervals_of<C>(p, launch, coord.batch, mask_head(p, kv_head));
    } else {
      m0 = (coord.row_tile * C::kCluster + blockIdx.x % C::kCluster) * packing.tile_rows(),
      m1 = min(m0 + packing.tile_rows(), packing.rows(p.seqlen_q));
      range = packing.range(band, m0, m1);
    }
  }
  __device__ __forceinline__ int key_tiles() const {
    if constexpr (MaskOf<C>::kIntervals)
      return partial + full;
    else
      return range.end - range.begin;
  }
  __device__ __forceinline__ auto walk() const {
    if constexpr (MaskOf<C>::kIntervals)
      return IntervalKeyWalk<C>(visit_bits, first_bits);
    else
      return BandKeyWalk<C>{range.end * C::kTileN};
  }
};

// A row tile's key tiles as the consumers count them. Of a band each has its number.
template <class C, bool kIntervals = MaskOf<C>::kIntervals>
struct KeyTiles {
  const TileRange range;
  int tile;  // the present one

  __device__ __forceinline__ explicit KeyTiles(const RowTile<C>& row_tile)
      : range(row_tile.range), tile(range.end - 1) {}
  __device__ __forceinline__ bool last() const { return tile == range.begin; }
  __device__ __forceinline__ bool partial() const { return tile < range.full_begin || tile >= range.full_end; }
  __device__ __forceinline__ void advance() { --tile; }

  // Call visit(partial) for the present tile and the rest, with a loop of its own for tiles that need no mask.
  template <class Visit>
  __device__ __forceinline__ void visit_rest(Visit visit) {
    for (; tile >= range.begin && tile >= range.full_end; advance()) visit(true);
    for (; tile >= range.full_begin; advance()) visit(false);
    if constexpr (MaskOf<C>::kHasBegin)
      for (; tile >= range.begin; advance()) visit(true);
  }
};

// With intervals they count how many are left; a TileMask says which one is the present.
template <class C>
struct KeyTiles<C, true> {
  int partial_left, full_left;

  __device__ __forceinline__ explicit KeyTiles(const RowTile<C>& row_tile)
      : partial_left(row_tile.partial), full_left(row_tile.full) {}
  __device__ __forceinline__ bool last() const { return partial_left + full_left == 1; }
  __device__ __forceinline__ bool partial() const { return partial_left > 0; }
  __device__ __forceinline__ void advance() { partial() ? --partial_left : --full_left; }

  template <class Visit>
  __device__ __forceinline__ void visit_rest(Visit visit) {
    for (; partial_left > 0; --partial_left) visit(true);
    for (; full_left > 0; --full_left) visit(false);
  }
};

}  // namespace fagen

namespace fagen {

// A row tile that is computed, but not stored yet.
struct PendingTile {
  int m0, m1, head, batch;
};

// Store the 64 rows of a warpgroup, two a thread; some columns before the first are none of O's. Lanes of a quad hold
// two columns each of pieces of 8; neighbours swap so that each has four of one piece, and a quad writes 32 whole bytes
// at once.
template <class C, class Element, class State>
__device__ __forceinline__ void store_rows(const fagen_forward_params& p, const HeadPacking<C>& packing, State& state,
                                           const PendingTile& tile, int group, int early = 0) {
  const Lane lane;
  const bool odd = lane.id % 2;
  const int end = MaskOf<C>::kIntervals ? tile.m1 : min(tile.m0 + packing.tile_rows(), packing.rows(p.seqlen_q));
  const int first = tile.m0 + group * 64 + threadIdx.x / 32 % 4 * 16 + lane.row;
  const int column = odd * 8 + lane.id % 4 / 2 * 4 - early;  // in two pieces
  Element* out = static_cast<Element*>(p.o.data) + tile.batch * p.o.stride[0];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int m = first + r * 8, row_of_q = packing.row(m), head = packing.head(tile.head, m);
    const float row_sum = quad_sum(state.softmax.sum[r]);
    const float inverse = scale_up_pairs<C, Element>(p, row_sum == 0.f ? 0.f : 1.f / row_sum);
    if (p.lse && lane.id % 4 == 0 && m < end)
      p.lse[(int64_t(tile.batch) * p.heads + head) * p.seqlen_q + row_of_q] = state.softmax.lse(r, row_sum);
    Element* row = out + row_of_q * p.o.stride[1] + head * p.o.stride[2] + column;
    const int columns = m < end ? p.head_dim_v - column : 0;
    const auto word = [&](int n) {
      return pack<Element>(state.o[0][n][r * 2] * inverse, state.o[0][n][r * 2 + 1] * inverse);
    };
#pragma unroll
    for (int n = 0; n < C::kHeadDimV / 8; n += 2) {
      const uint32_t mine[2] = {word(n), word(n + 1)};
      const uint32_t other = __shfl_xor_sync(~0u, odd ? mine[0] : mine[1], 1);
      if (n * 8 < columns && (n > 0 || !kLoadsEarly<C> || column >= 0))
        *reinterpret_cast<uint2*>(row + n * 8) = odd ? make_uint2(other, mine[1]) : make_uint2(mine[0], other);
    }
  }
}

// Store rows that see no key at all, which neither producers nor consumers visit: O = 0, LSE = -inf. One warp's work.
template <class C, class Element>
__device__ __forceinline__ void store_empty_rows(const fagen_forward_params& p, const LaunchArgs& launch) {
  const Band band(p);
  const HeadPacking<C> packing(launch);
  if (MaskOf<C>::kIntervals) ptx::wait_for_previous_kernel();
  for (int index = blockIdx.x; index < launch.tiles; index += gridDim.x) {
    const RowTile<C> row_tile(p, launch, band, assignment_at<C>(p, launch, index));
    const TileCoord& coord = row_tile.coord;
    if (row_tile.key_tiles() > 0) continue;
    for (int m = row_tile.m0; m < row_tile.m1; ++m) {
      const int row = packing.row(m), head = packing.head(coord.head, m);
      Element* out =
          static_cast<Element*>(p.o.data) + coord.batch * p.o.stride[0] + row * p.o.stride[1] + head * p.o.stride[2];
      for (int column = threadIdx.x % 32 * 8; column < p.head_dim_v; column += 256)
        *reinterpret_cast<uint4*>(out + column) = make_uint4(0, 0, 0, 0);
      if (p.lse && threadIdx.x % 32 == 0) p.lse[(int64_t(coord.batch) * p.heads + head) * p.seqlen_q + row] = -INFINITY;
    }
  }
}

// Store all rows where there are no keys at all. A grid's work, a warp a row.
template <class Element>
__device__ __forceinline__ void store_all_empty(const fagen_forward_params& p) {
  const int64_t rows = int64_t(p.batch) * p.heads * p.seqlen_q;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; i < rows; i += gridDim.x * blockDim.x / 32) {
    const int64_t m = i % p.seqlen_q, head = i / p.seqlen_q % p.heads, batch = i / p.seqlen_q / p.heads;
    Element* out = static_cast<Element*>(p.o.data) + batch * p.o.stride[0] + m * p.o.stride[1] + head * p.o.stride[2];
    for (int column = threadIdx.x % 32 * 8; column < p.head_dim_v; column += 256)
      *reinterpret_cast<uint4*>(out + column) = make_uint4(0, 0, 0, 0);
    if (p.lse && threadIdx.x % 32 == 0) p.lse[i] = -INFINITY;
  }
}

}  // namespace fagen


// ---- fagen/sm90/forward/turns.cuh ------------------------------------------------------------------------
// Turns of the consumer warpgroups, and the key tiles that a warpgroup skips.
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



namespace fagen {

// With ping_pong, warpgroups take turns at starting products, so that the softmax of one runs under the products of the
// others.
template <class C>
struct Turns {
  const int group;

  __device__ __forceinline__ void wait() const {
    if constexpr (C::kPingPong) ptx::barrier_sync(1 + group, 256);
  }
  __device__ __forceinline__ void pass() const {
    constexpr int kGroups = BlockLayout<C>::kGroups;
    if constexpr (C::kPingPong) ptx::barrier_arrive(1 + (group + 1 == kGroups ? 0 : group + 1), 256);
  }
};

// A block walks over the key tiles that any of its rows sees. The last of them may be hidden from all rows of a
// warpgroup, and of the last row tile there may be no rows left for it: it skips those key tiles.
template <class C>
struct SkippedTiles {
  static constexpr bool kIdles = BlockLayout<C>::kGroups > 1;
  static constexpr bool kClips = kIdles && !MaskOf<C>::kIntervals && MaskOf<C>::kHasEnd;
  int count;

  static __device__ __forceinline__ bool idle(const RowTile<C>& row_tile, int group) {
    return kIdles && row_tile.m0 + group * kGroupRows >= row_tile.m1;
  }

  // Clip the row tile's keys to those that the warpgroup's rows see.
  __device__ __forceinline__ void clip_keys(RowTile<C>& row_tile, const Band& band, const HeadPacking<C>& packing,
                                            int group) {
    count = idle(row_tile, group) ? row_tile.key_tiles() : 0;
    if constexpr (kClips) {
      if (idle(row_tile, group)) return;
      const int first_row = row_tile.m0 + group * kGroupRows;
      const TileRange block = row_tile.range, mine = packing.range(band, first_row, first_row + kGroupRows);
      const int end = max(block.begin + 1, min(mine.end, block.end));
      row_tile.range = {block.begin, end, max(mine.full_begin, block.begin), min(mine.full_end, end)};
      count = block.end - end;
    }
  }
  // Skip them as if they were visited, the keys of one tile and the values of the one before, so that their stages
  // become empty. The first one's turn may have been used already.
  __device__ __forceinline__ void skip(const Turns<C>& turns, Pipelines<C>& pipelines, bool turn_used) const {
    if constexpr (kIdles)
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        if (i > 0 || !turn_used) {
          turns.wait();
          turns.pass();
        }
        if (i > 0) skip_values(pipelines);
        pipelines.k.wait();
        pipelines.k.release();
      }
  }
  static __device__ __forceinline__ void skip_values(Pipelines<C>& pipelines) {
    pipelines.v.wait();
    pipelines.v.release();
  }
};

}  // namespace fagen

// ---- fagen/sm90/forward/visibility.cuh -------------------------------------------------------------------
// The visible scores of a partial key tile, a bit each of the scores that a thread holds.


// ---- fagen/sm90/forward/tile_mask.cuh --------------------------------------------------------------------
// Intervals: the mask of one key tile in shared memory. A producer warp writes it, consumers read it.

namespace fagen {

// Hidden by the intervals: nothing, whole rows, whole columns, or single elements.
enum class Hides { nothing, rows, columns, elements };

// The consumers' side.
struct TileMask {
  uint32_t place;
  uint32_t word;  // the first key, whether the band hides any of it, what the intervals hide

  static constexpr int kWord = 32;  // its offset, behind the hidden rows or the visible columns

  static __device__ __forceinline__ TileMask load(uint32_t place) {
    // read by the lane that frees the key tile
    return {place, __shfl_sync(~0u, threadIdx.x % 32 == 0 ? ptx::ld_shared_4(place + kWord) : 0, 0)};
  }
  __device__ __forceinline__ int key() const { return word >> 3; }
  __device__ __forceinline__ bool by_band() const { return word & 4; }
  __device__ __forceinline__ bool hides_nothing() const { return (word & 7) == unsigned(Hides::nothing); }
  __device__ __forceinline__ Hides hides() const { return Hides(word & 3); }
  // the rows that are hidden
  __device__ __forceinline__ HiddenRows rows() const {
    const uint4 x = ptx::ld_shared_16(place);
    return {int(x.x), int(x.y), int(x.z), int(x.w)};
  }
  // the columns that are visible, as the accumulators of the `quad_lane`-th lane of a quad hold them: a bit for each of
  // two columns of 16 pieces of 8
  __device__ __forceinline__ uint32_t columns(int word, int quad_lane) const {
    return ptx::ld_shared_4(place + word * 16 + quad_lane * 4);
  }
};

// The producer's side: a warp finds the mask together, one lane stores it.
template <class C>
struct TileMaskWriter {
  static constexpr int kWords = (C::kTileN + 127) / 128 * 4;
  static_assert(kWords * 4 <= TileMask::kWord && TileMask::kWord + 4 <= kTileMaskBytes, "a mask fits its place");
  uint32_t word;
  uint32_t mine;  // one a lane of the hidden rows, or of the words of visible columns

  // The mask of the key tile that begins at `key`.
  __device__ __forceinline__ TileMaskWriter(const Intervals<C>& intervals, int m0, int m1, int key,
                                            VisitBits::Kind kind)
      : word(key << 3), mine(0) {
    if (kind == VisitBits::kFull) return;
    word |= unsigned(find(intervals, m0, m1, key)) | (kind == VisitBits::kBandPartial ? 4 : 0);
  }

  // A column is hidden from all rows, from some, or from none. Those that are hidden from some must all have the same
  // bounds, or the consumers read the intervals themselves. Perhaps nothing is hidden: visits are planned by extents.
  __device__ __forceinline__ Hides find(const Intervals<C>& intervals, int m0, int m1, int key) {
    const int lane = threadIdx.x % 32, lane_column = lane / 2 * 8 + lane % 2;
    const HiddenRows first = intervals.at(key);
    enum { kSome = 1, kMixed = 2, kDiffer = 4 };
    unsigned found = 0;
#pragma unroll 1
    for (int i = 0; i < kWords; ++i) {
      const int column = i / 4 * 128 + i % 4 * 2 + lane_column;
      const HiddenRows hidden = intervals.at(min(key + column, intervals.last_key));
      const bool all = hidden.covers(m0, m1);
      const bool any = (m0 < hidden.le && m1 > hidden.ls) || (m0 < hidden.ue && m1 > hidden.us);
      if (column < C::kTileN)
        found |= (any ? kSome : 0) | (any != all ? kMixed : 0) | (hidden.equals(first) ? 0 : kDiffer);
      const uint32_t seen = __ballot_sync(~0u, !all);
      mine = lane == i ? seen : mine;
    }
    found = __reduce_or_sync(~0u, found);
    if (!(found & kSome)) return Hides::nothing;
    if (!(found & kMixed)) return Hides::columns;
    if (found & kDiffer) return Hides::elements;
    mine = lane == 0 ? first.ls : lane == 1 ? first.le : lane == 2 ? first.us : first.ue;
    return Hides::rows;
  }

  __device__ __forceinline__ void store(uint32_t place) const {
    const bool stores = threadIdx.x % 32 == 0;
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const auto word_of = [&](int lane) { return __shfl_sync(~0u, mine, i + lane); };
      const uint4 four = make_uint4(word_of(0), word_of(1), word_of(2), word_of(3));
      if (stores) ptx::st_shared_16(place + i * 4, four);
    }
    if (stores) ptx::st_shared_4(place + TileMask::kWord, word);
  }
};

}  // namespace fagen

namespace fagen {

// Two bits for every piece of 8 keys, for each of the thread's two rows.
template <class C>
struct Visibility {
  static constexpr int kPieces = C::kTileN / 8, kWords = (kPieces + 15) / 16;
  uint32_t bits[2][kWords];

  __device__ __forceinline__ void show_all() {
    for (auto& row : bits)
      for (uint32_t& word : row) word = ~0u;
  }
  // The band's part: of the keys from `key` on, row m sees [begin(m), end(m)).
  __device__ __forceinline__ void set_band(const Band& band, const HeadPacking<C>& packing, int row0, int key) {
    const Lane lane;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = packing.row(row0 + r * 8 + lane.row), first = key + lane.column;
      // how many of the thread's columns lie before x
      const auto before = [&](int x) { return x <= 0 ? 0 : x / 8 * 2 + min(x % 8, 2); };
      const int begin = before(band.begin(row) - first);
      const int end = before((MaskOf<C>::kHasEnd ? band.end(row) : band.seqlen_k) - first);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const auto ones = [&](int n) { return n <= w * 32 ? 0u : n >= w * 32 + 32 ? ~0u : (1u << (n - w * 32)) - 1u; };
        bits[r][w] = ones(end);
        if (MaskOf<C>::kHasBegin) bits[r][w] &= ~ones(begin);
      }
    }
  }
  // The intervals' part, as the tile's mask has it.
  __device__ __forceinline__ void clear_intervals(const TileMask& mask, const Intervals<C>& intervals, int row0) {
    const Lane lane;
    const Hides hides = mask.hides();
    if (hides == Hides::columns) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t columns = mask.columns(w, lane.column / 2);
        bits[0][w] &= columns, bits[1][w] &= columns;
      }
    } else if (hides == Hides::rows) {
      const HiddenRows hidden = mask.rows();
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (hidden.contains(row0 + r * 8 + lane.row))
          for (int w = 0; w < kWords; ++w) bits[r][w] = 0;
    } else if (hides == Hides::elements) {
#pragma unroll
      for (int w = 0; w < kWords; ++w)
#pragma unroll 1
        for (int bit = 0; bit < 32 && w * 32 + bit < kPieces * 2; ++bit) {
          const int key = mask.key() + (w * 16 + bit / 2) * 8 + lane.column + bit % 2;
          const HiddenRows hidden = intervals.at(min(key, intervals.last_key));
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (hidden.contains(row0 + r * 8 + lane.row)) bits[r][w] &= ~(1u << bit);
        }
    }
    __syncwarp();  // every lane has read the mask before the first one frees a later tile
  }
  template <class Scores>
  __device__ __forceinline__ void apply(Scores& s_acc) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int bit = 0; bit < kPieces * 2; ++bit) {
        float& x = s_acc[0][bit / 2][r * 2 + bit % 2];
        x = bits[r][bit / 32] & 1u << bit % 32 ? x : -INFINITY;
      }
  }
};

}  // namespace fagen

// ---- fagen/sm90/forward/weights.cuh ----------------------------------------------------------------------
// The weights P as the first operand of O += P V: in registers, or in shared memory, in the warpgroup's own tile.

// ---- fagen/sm90/operand.cuh ------------------------------------------------------------------------------
// Operands of a warpgroup's products (wgmma): descriptors of tiles in shared memory, and fragments in registers.
#include <stdint.h>


namespace fagen {

// A descriptor: where the operand begins, and how it goes on from there.
struct Operand {
  uint32_t low, high;

  static constexpr uint32_t kSwizzle128 = 1u << 30, kGroupOf8Rows = 1024 >> 4;
  static constexpr uint32_t kInBlock = 0x3ffff;  // an address without the block's rank in its cluster, which is above

  // 16 elements of k lie in a row (q, k); slabs are separate operands
  static __device__ __forceinline__ Operand of_rows(uint32_t address) {
    return {(address & kInBlock) >> 4 | 1u << 16, kSwizzle128 | kGroupOf8Rows};
  }
  // columns lie in a row, 16 rows deep in k (v); slabs `slab_bytes` apart
  static __device__ __forceinline__ Operand of_columns(uint32_t address, int slab_bytes) {
    return {(address & kInBlock) >> 4 | uint32_t(slab_bytes >> 4) << 16, kSwizzle128 | kGroupOf8Rows};
  }
  // the operand that begins so many bytes later
  __device__ __forceinline__ uint64_t at(int bytes) const { return uint64_t(high) << 32 | (low + (bytes >> 4)); }
};

// Every register of a fragment stays where it is, and is written, before what follows.
template <class X, int kPieces>
__device__ __forceinline__ void pin(X (&fragment)[kPieces][4]) {
#pragma unroll
  for (int i = 0; i < kPieces * 4; ++i) ptx::pin(fragment[i / 4][i % 4]);
}

}  // namespace fagen


namespace fagen {

template <class C>
struct WeightOperand {
  static constexpr int kSteps = C::kTileN / 16;  // 16 keys each
  static constexpr int kSlab = BlockLayout<C>::kWeightSlabBytes;

  uint32_t tile;  // in shared memory, if they go there
  uint32_t fragments[kSteps][4];

  // word(n, i): register i of a thread for the n-th 16 keys. Registers may not change while any product is under way.
  template <class Word>
  __device__ __forceinline__ void store(Word word) {
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
        for (int i = 0; i < 4; ++i) fragments[n][i] = word(n, i);
    }
  }
  // Start o += P v.
  template <class O>
  __device__ __forceinline__ void start_product(O& o, const Operand& v) {
    if constexpr (C::kSharedWeights) {
      const Operand own = Operand::of_rows(tile);
      ptx::wgmma_fence();
#pragma unroll
      for (int n = 0; n < kSteps; ++n)
        ptx::wgmma_shared_columns<C::kHeadDimV>(o, own.at(n / 4 * kSlab + n % 4 * 32), v.at(n * 2048));
    } else {
      pin(fragments);
      ptx::wgmma_fence();
#pragma unroll
      for (int n = 0; n < kSteps; ++n) ptx::wgmma_registers<C::kHeadDimV>(o, fragments[n], v.at(n * 2048));
    }
  }
};

}  // namespace fagen


namespace fagen {

template <class C, class Element>
struct Consumer {
  using L = BlockLayout<C>;
  using M = MaskOf<C>;
  using State = RowState<C, 1, C::kTileN, C::kHeadDimV>;
  using Scores = typename State::Scores;  // [1][keys / 8][4]
  using Skipped = SkippedTiles<C>;

  static constexpr int kPieces = C::kTileN / 8;  // 8 keys each

  const fagen_forward_params& p;
  const LaunchArgs& launch;
  Pipelines<C> pipelines;
  const Band band;
  const HeadPacking<C> packing;
  const int group;  // among the consumers
  const Turns<C> turns;
  RowTile<C> row_tile;
  Skipped skipped;
  TileMask tile_mask;  // intervals: of the key tile whose scores are under way
  State state;
  Scores s_acc;
  WeightOperand<C> weights;
  // With intervals row tiles begin anywhere.
  TileDropout<C, Element, 1, C::kTileN % 32 == 0, !M::kIntervals> dropout;

  __device__ __forceinline__ Consumer(const fagen_forward_params& p, const LaunchArgs& launch, uint32_t smem, int group)
      : p(p), launch(launch), pipelines(smem), band(p), packing(launch), group(group), turns{group}, state(p) {
    weights.tile = smem + L::kWeights + group * L::kWeightBytes;
  }

  // ---- products: start, wait

  // S = Q K^T
  __device__ __forceinline__ void start_scores() {
    const Operand q = Operand::of_rows(pipelines.q.tile() + group * kGroupRows * kRowBytes);
    const Operand k = Operand::of_rows(pipelines.k.tile());
    pin(s_acc[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < C::kHeadDim / 16; ++d) {
      const uint32_t within = d % 4 * 32;  // bytes into a slab's row
      ptx::wgmma_shared<C::kTileN>(s_acc[0], q.at(d / 4 * C::kTileM * kRowBytes + within),
                                   k.at(d / 4 * C::kTileN * kRowBytes + within), d > 0);
    }
    ptx::wgmma_commit();
  }
  // O += P V
  __device__ __forceinline__ void start_values() {
    pipelines.v.wait();
    const Operand v = Operand::of_columns(pipelines.v.tile(), C::kTileN * kRowBytes);
    pin(state.o[0]);
    weights.start_product(state.o[0], v);
    ptx::wgmma_commit();
  }
  // Each waits while up to kPending younger products go on, and frees the stage that the product has read.
  template <int kPending>
  __device__ __forceinline__ void wait_scores() {
    ptx::wgmma_wait<kPending>();
    pin(s_acc[0]);
    pipelines.k.release();
  }
  template <int kPending>
  __device__ __forceinline__ void wait_values() {
    ptx::wgmma_wait<kPending>();
    pin(state.o[0]);
    pipelines.v.release();
  }

  // ---- softmax

  // Take the maxima of a tile into the softmax: true if O must be multiplied by `factor`, once it is at rest.
  __device__ __forceinline__ bool update_max(float (&factor)[2]) {
    constexpr int kChains = 4;  // comparisons side by side, since each waits for the one before
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
    const bool moved = C::kRescale == Rescale::each || __any_sync(~0u, state.softmax.exceeds_slack(row_max));
    if (moved) {
      for (float& x : row_max) x = quad_max(x);
      state.set_reference(s_acc, row_max, factor);
    } else {
      state.softmax.refresh_offset();
    }
    return moved;
  }
  // S becomes the weights, and these, less what is dropped, an operand.
  __device__ __forceinline__ void exponentiate() {
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s_acc[0][n][i];
        x = state.softmax.exponentiate(x, i / 2);
        state.softmax.sum[i / 2] += x;
      }
    weights.store([&](int n, int i) {
      const float* pair = &s_acc[0][2 * n + i / 2][i % 2 * 2];
      return dropout.kept(pack<Element>(pair[0], pair[1]), 0, n, i);
    });
  }

  // Score mods and the mask on the scores of a key tile.
  __device__ __forceinline__ void modify(const ScoreMod<C>& mod, int row0, const KeyTiles<C>& keys, bool partial) {
    int key;  // the first
    if constexpr (M::kIntervals)
      key = tile_mask.key();
    else
      key = keys.tile * C::kTileN;
    dropout.set_place(row0 + state.lane.row, key + state.lane.column);
    state.apply_score_mod(s_acc, mod, row0, key);
    if (!partial || (M::kIntervals && tile_mask.hides_nothing())) return;
    Visibility<C> visibility;
    if (M::kIntervals && !tile_mask.by_band())
      visibility.show_all();
    else
      visibility.set_band(band, packing, row0, key);
    if constexpr (M::kIntervals) visibility.clear_intervals(tile_mask, row_tile.intervals, row0);
    visibility.apply(s_acc);
  }

  // ---- a row tile

  // The next row tile, if there is one.
  __device__ __forceinline__ bool next() {
    const TileAssignment assignment = pipelines.assignments.pop();
    if (assignment.coord.row_tile < 0) return false;
    row_tile = RowTile<C>(p, launch, band, assignment);
    skipped.clip_keys(row_tile, band, packing, group);
    return true;
  }

  // Intervals: the mask of a tile of k that is there, where it is needed.
  __device__ __forceinline__ void load_tile_mask(bool partial) {
    if constexpr (M::kIntervals)
      if (partial || ScoreMod<C>::kActive || C::kDropout) tile_mask = TileMask::load(pipelines.tile_mask());
  }

  // S of a row tile's first keys
  __device__ __forceinline__ void start_first_scores() {
    pipelines.q.wait();
    pipelines.k.wait();
    load_tile_mask(true);
    start_scores();
  }

  // All key tiles of a row tile. Its first scores are under way already; its last product still is at the end.
  __device__ __forceinline__ void visit_keys() {
    const int row0 = row_tile.m0 + group * kGroupRows + threadIdx.x / 32 % 4 * 16;
    const ScoreMod<C> mod(p, row_tile.coord.batch, row_tile.coord.head);
    dropout.set_head(p, row_tile.coord.batch, row_tile.coord.head);
    KeyTiles<C> keys(row_tile);
    float factor[2];
    clear(state.o[0]);
    state.softmax.reset();
    if (keys.last()) pipelines.q.release();  // q has been read once the scores of the last tile are there
    keys.partial() ? modify(mod, row0, keys, true) : modify(mod, row0, keys, false);
    update_max(factor);  // O is still zero: nothing to rescale
    exponentiate();
    if (Skipped::kClips && skipped.count > 0) Skipped::skip_values(pipelines);  // the last skipped tile's
    keys.advance();
    keys.visit_rest([&](bool partial) {
      turns.wait();
      pipelines.k.wait();
      load_tile_mask(partial);
      start_scores();
      start_values();
      turns.pass();
      wait_scores<C::kOverlap ? 1 : 0>();  // with overlap, O += P V goes on under the maxima of this tile
      if (keys.last()) pipelines.q.release();
      modify(mod, row0, keys, partial);
      const bool moved = update_max(factor);
      pipelines.v.wait();  // it has long been there; without this branch ptxas keeps the pipelines' state lane by lane
      wait_values<0>();
      if (moved) state.rescale(factor);
      exponentiate();
    });
  }

  // ---- all row tiles

  __device__ __forceinline__ void store(const PendingTile& pending) {
    int early = 0;
    if constexpr (kLoadsEarly<C>)
      early = launch.v_early.of(launch.heads_per_kv_head.quotient(pending.head), pending.batch);
    store_rows<C, Element>(p, packing, state, pending, group, early);
  }
  // The last product of a row tile in a turn of its own, and the store.
  __device__ __forceinline__ void finish_alone(const PendingTile& pending) {
    turns.wait();
    start_values();
    turns.pass();
    wait_values<0>();
    store(pending);
  }
  // The same together with the first scores of the next row tile, whose turn this is.
  __device__ __forceinline__ void finish_joined(const PendingTile& pending) {
    start_values();
    start_first_scores();
    turns.pass();
    wait_values<1>();
    store(pending);
    wait_scores<0>();
  }

  // Not joined if the next row tile skips its first key tile: the pending product takes that turn instead. A turn is
  // also taken where there is no product, so that all warpgroups take as many.
  __device__ __forceinline__ void run() {
    if (C::kPingPong && group == L::kGroups - 1) turns.pass();  // the first warpgroup begins
    bool begun = false;  // the last row tile's last product is still to start
    bool idled = false;  // the last row tile had no rows for this warpgroup
    PendingTile pending;
    for (;;) {
      const bool more = !(C::kSchedule == Schedule::single && (begun || idled)) && next();
      const bool alone = begun && (!more || (Skipped::kIdles && skipped.count > 0));
      if (alone) {
        finish_alone(pending);
        begun = false;
      }
      if (!more) {
        if (idled) turns.wait(), turns.pass();
        return;
      }
      skipped.skip(turns, pipelines, alone);
      idled = Skipped::idle(row_tile, group);
      if (idled) {
        Skipped::skip_values(pipelines);
        pipelines.q.wait();
        pipelines.q.release();
        continue;
      }
      turns.wait();
      if (begun) {
        finish_joined(pending);
      } else {
        start_first_scores();
        turns.pass();
        wait_scores<0>();
      }
      visit_keys();
      pending = {row_tile.m0, row_tile.m1, row_tile.coord.head, row_tile.coord.batch};
      begun = true;
    }
  }
};

}  // namespace fagen


// ---- fagen/sm90/forward/producer.cuh ---------------------------------------------------------------------
// The producer warps: each walks over the tiles on its own, and loads q and keys, or values, or writes the key tiles'
// masks. One lane of it talks to the copy engine.



namespace fagen {

template <class C>
struct Producer {
  static constexpr int kLookAhead = 2;  // key tiles left to load when the next row tile is found

  const fagen_forward_params& p;
  const LaunchArgs& launch;
  Pipelines<C> pipelines;
  const Band band;
  TileScheduler<C> scheduler;

  // Load one tile of `kSlabs` slabs, `kRows` rows each, from some columns early, or this block's part of it to all
  // blocks that share it.
  template <int kSlabs, int kRows, bool kPacked = false, class Pipe>
  __device__ __forceinline__ void load(const CUtensorMap& map, Pipe& pipe, int row, int head, int batch,
                                       int early) const {
    if (threadIdx.x % 32 == 0) {
      pipe.acquire();
      if constexpr (kPacked)
        ptx::mbarrier_arrive_expect(pipe.full(), kSlabs * launch.tile_rows * kRowBytes);
      else
        pipe.expect_bytes();
      constexpr int kPart = kRows / Pipe::kBlocks;
      const int part = Pipe::kBlocks > 1 ? blockIdx.x % Pipe::kBlocks * kPart : 0;
      for (int slab = 0; slab < kSlabs; ++slab) {
        const uint32_t to = pipe.tile() + (slab * kRows + part) * 128;
        if constexpr (Pipe::kBlocks > 1)
          ptx::tma_load_to_all(to, &map, pipe.full(), slab * 64 - early, row + part, head, batch,
                               (1 << Pipe::kBlocks) - 1);
        else if constexpr (kPacked)
          ptx::tma_load_packed(to, &map, pipe.full(), slab * 64 - early, row, head, batch);
        else
          ptx::tma_load(to, &map, pipe.full(), slab * 64 - early, row, head, batch);
      }
    }
    pipe.advance();
  }
  static __device__ __forceinline__ int early(const EarlyColumns& columns, const RowTile<C>& row_tile) {
    return kLoadsEarly<C> ? columns.of(row_tile.kv_head, row_tile.coord.batch) : 0;
  }
  __device__ __forceinline__ void load_q(const RowTile<C>& row_tile) {
    const int row = HeadPacking<C>(launch).row(row_tile.m0);
    load<BlockLayout<C>::kSlabs, C::kTileM, C::kPackHeads>(launch.q, pipelines.q, row, row_tile.coord.head,
                                                           row_tile.coord.batch, early(launch.k_early, row_tile));
  }
  __device__ __forceinline__ void load_k(const RowTile<C>& row_tile, int key) {
    load<BlockLayout<C>::kSlabs, C::kTileN>(launch.k, pipelines.k, key, row_tile.kv_head, row_tile.coord.batch,
                                            early(launch.k_early, row_tile));
  }
  __device__ __forceinline__ void load_v(const RowTile<C>& row_tile, int key) {
    load<BlockLayout<C>::kSlabsV, C::kTileN>(launch.v, pipelines.v, key, row_tile.kv_head, row_tile.coord.batch,
                                             early(launch.v_early, row_tile));
  }

  // The next row tile that sees any key; its row_tile is -1 if there is none.
  __device__ __forceinline__ TileAssignment find(int next) {
    for (;;) {
      const int index = __shfl_sync(~0u, next, 0);
      if (index >= launch.tiles) return {{-1, 0, 0}, 0, {0, 0, 0, 0}};
      const TileAssignment found = assignment_at<C>(p, launch, index);
      if (RowTile<C>(p, launch, band, found).key_tiles() > 0) return found;
      next = next_index();
    }
  }

  __device__ __forceinline__ int next_index() {
    return scheduler.next(launch.tiles, launch.next_tile_counter, has_prologue<C>(launch));
  }

  // One warp takes row tiles, and loads their q and keys. It looks for the next row tile when few keys of the present
  // one are left to load: late, so that the block that is done first gets the next, and yet while the pipelines are
  // full. The first assignment is pushed after the first q and keys are on their way, since values would delay those.
  __device__ __forceinline__ void run_key_producer() {
    if (MaskOf<C>::kIntervals) ptx::wait_for_previous_kernel();
    TileAssignment assignment = find(cluster_index<C>());
    bool pushed = false;
    while (assignment.coord.row_tile >= 0) {
      const RowTile<C> row_tile(p, launch, band, assignment);
      auto walk = row_tile.walk();
      const auto load_next = [&] {
        walk.advance();
        load_k(row_tile, walk.key);
      };
      load_next();
      load_q(row_tile);
      if (!pushed) pipelines.assignments.push(assignment);
      pushed = true;
      int left = row_tile.key_tiles() - 1;
#pragma unroll 1
      for (bool found = false; left > 0 || !found;) {
        if (left > 0) load_next(), --left;
        if (!found && left <= kLookAhead) {
          assignment = find(next_index());
          pipelines.assignments.push(assignment);
          found = true;
        }
      }
    }
    if (!pushed) pipelines.assignments.push(assignment);
  }

  // The other producers pop the assignments, and walk over the same key tiles.
  template <class Visit>
  __device__ __forceinline__ void follow(Visit visit) {
    if (MaskOf<C>::kIntervals) ptx::wait_for_previous_kernel();
    for (;;) {
      const TileAssignment assignment = pipelines.assignments.pop();
      if (assignment.coord.row_tile < 0) return;
      const RowTile<C> row_tile(p, launch, band, assignment);
      auto walk = row_tile.walk();
#pragma unroll 1
      for (int left = row_tile.key_tiles(); left > 0; --left) {
        walk.advance();
        visit(row_tile, walk);
      }
    }
  }
  // One warp loads values, whose stages become free at other times than those of keys.
  __device__ __forceinline__ void run_value_producer() {
    follow([&](const RowTile<C>& row_tile, const auto& walk) { load_v(row_tile, walk.key); });
  }
  // With intervals one warp tells the consumers which keys a tile holds, and what is hidden of them.
  __device__ __forceinline__ void run_mask_producer() {
    if constexpr (MaskOf<C>::kIntervals)
      follow([&](const RowTile<C>& row_tile, const auto& walk) {
        const TileMaskWriter<C> mask(row_tile.intervals, row_tile.m0, row_tile.m1, walk.key, walk.bits.kind());
        pipelines.k.acquire();
        mask.store(pipelines.tile_mask());
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(pipelines.k.full());
        pipelines.k.advance();
      });
  }
};

}  // namespace fagen

namespace fagen {

template <class C, class Element>
__device__ __forceinline__ void run_block(const fagen_forward_params& p, const LaunchArgs& launch,
                                          unsigned char* shared) {
  using L = BlockLayout<C>;
  const uint32_t smem = (ptx::shared_address(shared) + kSmemAlignment - 1) & ~uint32_t(kSmemAlignment - 1);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&launch.q);
    ptx::prefetch_map(&launch.k);
    ptx::prefetch_map(&launch.v);
    Pipelines<C>(smem).init();
  }
  C::kCluster > 1 ? ptx::cluster_sync() : __syncthreads();
  ptx::start_next_kernel();
  if (!has_prologue<C>(launch)) ptx::wait_for_previous_kernel();
  if (group == L::kGroups) {
    ptx::fewer_registers<L::kProducerRegisters>();
    Producer<C> producer{p, launch, Pipelines<C>(smem), Band(p)};
    switch (__shfl_sync(~0u, threadIdx.x % 128 / 32, 0)) {
      case 0:
        producer.run_key_producer();
        break;
      case 1:
        producer.run_value_producer();
        break;
      case 2:
        producer.run_mask_producer();
        break;
      default:
        if (MaskOf<C>::kHasEnd) store_empty_rows<C, Element>(p, launch);
    }
  } else {
    ptx::more_registers<L::kConsumerRegisters>();
    Consumer<C, Element>(p, launch, smem, group).run();
  }
  if (C::kCluster > 1) ptx::cluster_sync();  // none ends while another fills its tiles or arrives at its barriers
}

}  // namespace fagen

// ---- fagen/sm90/forward/launch.cuh -----------------------------------------------------------------------
// The host's part of the forward kernel: workspace, tensor maps, grid.
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

// ---- fagen/host/tensor_map.cuh ---------------------------------------------------------------------------
// Tensor maps for the copy engine (TMA).
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

namespace fagen {

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

// A dimension of a tensor map: its size, the elements from one index to the next, and how many indices a box has.
struct Dimension {
  int size;
  int64_t stride;
  int box;
};

// The map of a tensor of rows of `columns` 16-bit elements, in boxes of 64 of them.
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

}  // namespace fagen


// ---- fagen/sm90/forward/prologue.cuh ---------------------------------------------------------------------
// The kernel before the forward one, where that needs anything: it sets a counter to zero, or plans the visits of
// intervals. The forward kernel starts beside it and waits for its end.


namespace fagen {

// One block's work, without intervals.
template <class C, class Element>
__device__ __forceinline__ void prologue(const fagen_forward_params& p, const LaunchArgs& launch) {
  ptx::wait_for_previous_kernel();
  ptx::start_next_kernel();
  if (p.seqlen_k == 0) return store_all_empty<Element>(p);
  if (threadIdx.x == 0) *launch.next_tile_counter = 0;
}

// A mask head is planned by a cluster of blocks, whose warps divide the key tiles among them, then the row tiles.
constexpr int kPlanners = 8, kPlannerThreads = 512;

// The extents of each key tile: one pass over the vectors, a warp a tile.
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

// Rank the row tiles by the key tiles that they visit, the most first, later rows first among equals. A warp finds the
// rank of a tile by counting those before it.
__device__ __forceinline__ void rank_by_visits(const RowTileVisits* visits, int* ranked, int row_tiles, int warp,
                                               int warps) {
  constexpr int kAtOnce = 8;  // loads of a lane
  const auto count = [&](int i) {
    if (i >= row_tiles) return -1;
    const int2 tiles = __ldcg(reinterpret_cast<const int2*>(&visits[i].partial));
    return tiles.x + tiles.y;
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
    if (threadIdx.x % 32 == 0) ranked[before] = mine;
  }
}

// Intervals: the extents of the key tiles, the visits of the row tiles, and the row tiles' ranks.
template <class C>
__device__ __forceinline__ void plan(const fagen_forward_params& p, const LaunchArgs& launch) {
  constexpr int kWarps = kPlannerThreads / 32;
  const int plane = blockIdx.x / kPlanners, warp = blockIdx.x % kPlanners * kWarps + threadIdx.x / 32;
  const auto intervals = intervals_of<C>(p, launch, plane / p.mask_heads, plane % p.mask_heads);

  ptx::wait_for_previous_kernel();
  ptx::start_next_kernel();
  if (C::kSchedule == Schedule::dynamic && blockIdx.x == 0 && threadIdx.x == 0) *launch.next_tile_counter = 0;
  find_key_extents(intervals, const_cast<Extent*>(intervals.extents), launch.key_tiles, warp, kPlanners * kWarps);
  ptx::cluster_sync();

  __shared__ RowTileBoundaries boundaries;
  boundaries.find(intervals, p.seqlen_q);
  for (int row_tile = warp; row_tile < launch.row_tiles; row_tile += kPlanners * kWarps) {
    const int2 rows = boundaries.rows<C::kTileM>(row_tile, launch.row_tiles, p.seqlen_q);
    const int index = plane * launch.row_tiles + row_tile;
    RowTileVisits visits = {0, 0, 0, 0};
    if (rows.x < rows.y)
      visits = plan_visits<C>(intervals, Band(p), rows.x, rows.y, launch.visit_bits + visit_bits_index(launch, index));
    if (threadIdx.x % 32 == 0) launch.visits[index] = visits;
  }
  if constexpr (kRanked<C>) {
    ptx::cluster_sync();
    const int first = plane * launch.row_tiles;
    rank_by_visits(launch.visits + first, launch.ranks + first, launch.row_tiles, warp, kPlanners * kWarps);
  }
}

}  // namespace fagen

namespace fagen {

// With heads packed, how many: of those that share keys, as many as divide them and fit in a tile, if tiles are no more
// than a sixteenth beyond the fewest. A tile has whole rows of q; see size_point.packed_heads in Python.
template <class C>
static int packed_heads(const fagen_forward_params& p) {
  if (!C::kPackHeads) return 1;
  const int group = p.heads / p.kv_heads;
  const auto tiles = [&](int packed) { return int64_t(ceil_div(p.seqlen_q, C::kTileM / packed)) * (group / packed); };
  int best = 1;
  int64_t fewest = tiles(1);
  for (int packed = 2; packed <= group && packed <= 64; ++packed) {
    if (group % packed) continue;
    const int64_t these = tiles(packed);
    if (these < fewest) fewest = these;
    if (16 * these <= 17 * fewest) best = packed;
  }
  return best;
}

// Row tiles of a head, or of heads that are packed; those of a cluster count as one. With intervals some may end early
// where a document does: there is room for some more of them.
template <class C>
static int count_row_tiles(const fagen_forward_params& p) {
  const int tiles = ceil_div(p.seqlen_q, C::kTileM / packed_heads<C>(p) * C::kCluster);
  return MaskOf<C>::kIntervals ? tiles + tiles / 8 + 1 : tiles;
}

// The workspace: a counter, and for intervals the arrays of LaunchArgs.
template <class C>
struct Workspace {
  static constexpr bool kCounter = C::kSchedule == Schedule::dynamic, kPlanned = MaskOf<C>::kIntervals;
  uint64_t extents, visits, visit_bits, ranks, end;  // where each begins

  explicit Workspace(const fagen_forward_params& p) {
    const auto next = [](uint64_t begin, uint64_t bytes) { return align_workspace(begin + bytes); };
    const auto key_tiles = [&](int keys) { return uint64_t(ceil_div(p.seqlen_k, keys)); };
    const uint64_t planes = kPlanned ? uint64_t(p.batch) * p.mask_heads : 0;
    const uint64_t row_tiles = planes * count_row_tiles<C>(p);
    extents = kCounter ? 256 : 0;
    visits = next(extents, planes * key_tiles(C::kTileN) * C::kIntervalColumns * sizeof(Extent));
    visit_bits = next(visits, row_tiles * sizeof(RowTileVisits));
    ranks = next(visit_bits, row_tiles * VisitBits::kKinds * key_tiles(32 * C::kTileN) * sizeof(VisitBits));
    end = next(ranks, row_tiles * sizeof(int));
  }
  void assign(char* workspace, LaunchArgs& launch) const {
    launch.next_tile_counter = reinterpret_cast<unsigned*>(workspace);
    launch.extents = reinterpret_cast<Extent*>(workspace + extents);
    launch.visits = reinterpret_cast<RowTileVisits*>(workspace + visits);
    launch.visit_bits = reinterpret_cast<VisitBits*>(workspace + visit_bits);
    launch.ranks = reinterpret_cast<int*>(workspace + ranks);
  }
};

// For keys or values whose rows all begin alike in sectors, by blocks that do not split keys: the kernel must have 8
// columns more than they.
static EarlyColumns early_columns(const fagen_tensor& t, int columns, int kernel_columns) {
  if (columns + 8 > kernel_columns || t.stride[1] % 16) return {};
  return {int(reinterpret_cast<uintptr_t>(t.data) / 2 & 8), int(t.stride[0] & 8), int(t.stride[2] & 8)};
}

// The maps of q, k and v.
template <class C>
static cudaError_t make_maps(const fagen_forward_params& p, CUtensorMapDataType type, LaunchArgs& launch) {
  const auto keys = [&](CUtensorMap* map, const fagen_tensor& t, int columns) {
    const Dimension rows = {p.seqlen_k, t.stride[1], C::kTileN / C::kCluster}, heads = {p.kv_heads, t.stride[2], 1};
    return make_map(map, type, t.data, columns, {rows, heads, {p.batch, t.stride[0], 1}});
  };
  if (const cudaError_t e = keys(&launch.k, p.k, p.head_dim)) return e;
  if (const cudaError_t e = keys(&launch.v, p.v, p.head_dim_v)) return e;
  const int packed = launch.packed.by;
  const Dimension rows = {p.seqlen_q, p.q.stride[1], C::kTileM / packed};
  const Dimension heads = {p.heads / packed, p.q.stride[2] * packed, 1}, batch = {p.batch, p.q.stride[0], 1};
  if constexpr (C::kPackHeads)
    return make_map(&launch.q, type, p.q.data, p.head_dim, {{packed, p.q.stride[2], packed}, rows, heads, batch});
  else
    return make_map(&launch.q, type, p.q.data, p.head_dim, {rows, heads, batch});
}

// Count the clusters that run at once, and give the kernel more shared memory than the default. Clusters of several
// blocks may be fewer than the SMs suggest, since the blocks of one lie close together.
template <class C, class Forward>
static cudaError_t count_resident(Forward forward, int index, int& resident) {
  using L = BlockLayout<C>;
  int sms;
  if (const cudaError_t e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index)) return e;
  if (const cudaError_t e = cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kSmemBytes))
    return e;
  resident = sms * C::kBlocksPerSm;
  if (C::kCluster > 1) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {C::kCluster, 1, 1};
    const cudaLaunchConfig_t config = {dim3(C::kCluster), dim3(L::kThreads), L::kSmemBytes, nullptr, &cluster, 1};
    if (const cudaError_t e = cudaOccupancyMaxActiveClusters(&resident, forward, &config)) return e;
    if (resident == 0) return cudaErrorInvalidConfiguration;
  }
  return cudaSuccess;
}

// The heads of a section (sectioned order): as many as their keys and values leave room for, whole groups of heads that
// share them, and such that the last section is not much smaller than the others, since it ends the kernel.
static int heads_of_section(int heads, int group, int64_t fit) {
  const int groups = heads / group;
  const int most = fit < 1 ? 1 : fit < groups ? int(fit) : groups;
  int best = most;
  for (int n = most; 2 * n >= most && n > 0; --n) {
    const auto missing = [&](int at_once) { return (at_once - groups % at_once) % at_once * best; };  // in the last one
    if (missing(n) < missing(best)) best = n;
  }
  return best * group;
}

using Kernel = void (*)(fagen_forward_params, LaunchArgs);

template <class C, class Element>
static int launch_forward(const fagen_forward_params& p, cudaStream_t stream, CUtensorMapDataType type, Kernel prologue,
                          Kernel plan, Kernel forward) {
  using L = BlockLayout<C>;
  int resident;
  const auto find = [&](int index, int& found) { return count_resident<C>(forward, index, found); };
  if (const cudaError_t e = once_per_device(&resident, find)) return e;
  LaunchArgs launch;
  if (p.batch == 0 || p.seqlen_q == 0) return cudaSuccess;
  if (p.seqlen_k == 0) return launch_kernel(prologue, resident, 256, 0, stream, p, launch);
  const int packed = packed_heads<C>(p);
  launch.packed = Divisor(packed), launch.tile_rows = C::kTileM / packed * packed;
  if (const cudaError_t e = make_maps<C>(p, type, launch)) return e;
  if (kLoadsEarly<C>) {
    launch.k_early = early_columns(p.k, p.head_dim, C::kHeadDim);
    launch.v_early = early_columns(p.v, p.head_dim_v, C::kHeadDimV);
  }
  const int heads = p.heads / packed * p.batch, planes = p.batch * p.mask_heads;
  launch.row_tiles = count_row_tiles<C>(p);
  launch.tiles = launch.row_tiles * heads;
  launch.key_tiles = ceil_div(p.seqlen_k, C::kTileN);
  const int64_t head_bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v) * sizeof(Element);
  const int group = p.heads / p.kv_heads / packed;
  const int heads_at_once = heads_of_section(heads, group, (int64_t(C::kSectionMb) << 20) / head_bytes);
  launch.order = TileOrder::of<C::kBlockOrder>(launch.row_tiles, p.heads / packed, p.batch, heads_at_once);
  launch.heads_per_kv_head = Divisor(group);

  using W = Workspace<C>;
  W(p).assign(static_cast<char*>(p.workspace), launch);
  if (W::kPlanned || (W::kCounter && launch.tiles > resident))
    if (const cudaError_t e =
            W::kPlanned ? launch_kernel<kPlanners>(plan, kPlanners * planes, kPlannerThreads, 0, stream, p, launch)
                        : launch_kernel(prologue, 1, 32, 0, stream, p, launch))
      return e;

  constexpr bool kSingle = C::kSchedule == Schedule::single;
  constexpr bool kEarly = W::kPlanned || !kSingle;  // many short blocks are not the faster for it
  const int clusters = kSingle || launch.tiles < resident ? launch.tiles : resident;
  return launch_kernel<C::kCluster, kEarly>(forward, clusters * C::kCluster, L::kThreads, L::kSmemBytes, stream, p,
                                            launch);
}

}  // namespace fagen

namespace fagen {

using Element = bfloat_t;
constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

__global__ void __launch_bounds__(BlockLayout<Config>::kThreads, Config::kBlocksPerSm)
forward_kernel(const __grid_constant__ fagen_forward_params p, const __grid_constant__ LaunchArgs launch) {
  extern __shared__ unsigned char shared[];
  run_block<Config, Element>(p, launch, shared);
}

__global__ void prologue_kernel(const __grid_constant__ fagen_forward_params p, const __grid_constant__ LaunchArgs launch) {
  prologue<Config, Element>(p, launch);
}

__global__ void plan_kernel(const __grid_constant__ fagen_forward_params p, const __grid_constant__ LaunchArgs launch) {
}

}  // namespace fagen

extern "C" uint64_t fagen_workspace_bytes(const fagen_forward_params* p) { return fagen::Workspace<fagen::Config>(*p).end; }

extern "C" const char* fagen_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

extern "C" int fagen_launch(const fagen_forward_params* p, void* stream) {
  return fagen::launch_forward<fagen::Config, fagen::Element>(*p, static_cast<cudaStream_t>(stream), fagen::kMapType,
                                                              fagen::prologue_kernel, fagen::plan_kernel,
                                                              fagen::forward_kernel);
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
