// A kernel for attention backward, made by fagen. It needs the CUDA toolkit and nothing else: no torch, no Python.
//
// problem:  backward/bf16/d128/causal, its config chosen for b4/h16-16/q4096-k4096
// config:   tile_m=64 tile_n=128 warpgroups=2 operands=registers v_source=shared q_stages=2 dout_stages=2 ds_stages=2 dq_sink=bulk dq_rounding=own_kernel dv_start=after_store dq_owner=all row_order=ascending block_order=sectioned section_mb=32 seeds=none exp_on_fma=0 (the family's default)
// made by:  fagen emit --target sm_90 --op backward --dtype bf16 --head-dim 128 --mask causal --seqlen 4096 --batch 4 --heads 16 --kv-heads 16 --family sm90_backward --config '{"block_order": "sectioned", "dout_stages": 2, "dq_owner": "all", "dq_rounding": "own_kernel", "dq_sink": "bulk", "ds_stages": 2, "dv_start": "after_store", "exp_on_fma": 0, "operands": "registers", "q_stages": 2, "row_order": "ascending", "section_mb": 32, "seeds": "none", "tile_m": 64, "tile_n": 128, "v_source": "shared", "warpgroups": 2}' --out DIR
// build:    nvcc -gencode=arch=compute_90a,code=sm_90a -O3 -std=c++17 --use_fast_math -lineinfo -shared -Xcompiler -fPIC -o kernel.so kernel.cu
// call:     fagen_launch(), declared in kernel.h beside this file

// sm90_backward: attention backward for backward/bf16/d128/causal on sm_90
//
// Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.
// Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.
//
// Config: tile_m=64 tile_n=128 warpgroups=2 operands=registers v_source=shared q_stages=2 dout_stages=2 ds_stages=2 dq_sink=bulk dq_rounding=own_kernel dv_start=after_store dq_owner=all row_order=ascending block_order=sectioned section_mb=32 seeds=none exp_on_fma=0

namespace fagen {

enum class Mask { none, causal, window, intervals };
enum class Operands { registers, shared };
enum class VSource { shared, registers };
enum class DvStart { after_ds, before_ds, after_store };
enum class Seeds { none, delta };
enum class DqSink { bulk, red };
enum class DqRounding { last_block, own_kernel };
enum class DqOwner { all, first, loader };
enum class RowOrder { ascending, descending, shifted };
enum class BlockOrder { ascending, descending, longest_first, sectioned };

struct Config {
  static constexpr int kHeadDim = 128;  // of q and k, padded
  static constexpr int kHeadDimV = 128;  // of v and o, padded
  static constexpr Mask kMask = Mask::causal;  // which cells are visible
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
  static constexpr int kTileM = 64;  // rows of q that a block visits at a time
  static constexpr int kTileN = 128;  // keys of a block
  static constexpr int kWarpgroups = 2;  // warpgroups that compute
  static constexpr Operands kOperands = Operands::registers;  // P and dS are operands in registers or in shared memory
  static constexpr VSource kVSource = VSource::shared;  // where dP = dO V takes v from
  static constexpr int kQStages = 2;  // tiles of q in shared memory
  static constexpr int kDoutStages = 2;  // tiles of dO in shared memory
  static constexpr int kDsStages = 2;  // tiles of dS in shared memory
  static constexpr DvStart kDvStart = DvStart::after_store;  // dV is started when dS is formed, under that, or when dS is in shared memory
  static constexpr Seeds kSeeds = Seeds::none;  // accumulators of dP begin with zero, or with -delta
  static constexpr int kExpOnFma = 0;  // of 8 exponentials, those that the FMA pipe computes, by polynomials
  static constexpr DqSink kDqSink = DqSink::bulk;  // dQ is added up by the copy engine, or from registers
  static constexpr DqRounding kDqRounding = DqRounding::own_kernel;  // who rounds the sums of dQ: the block that adds the last part, or a kernel after all of them
  static constexpr DqOwner kDqOwner = DqOwner::all;  // who computes dQ: all warpgroups that compute, the first of them, or the one that loads tiles
  static constexpr RowOrder kRowOrder = RowOrder::ascending;  // order of a block's row tiles
  static constexpr BlockOrder kBlockOrder = BlockOrder::sectioned;  // order of key tiles and heads
  static constexpr int kSectionMb = 32;  // megabytes of q, dO and dQ that a section of heads may have
};

// Sizes that fagen derived from the config before compiling; the kernel asserts that it agrees.
struct Derived {
  static constexpr int threads = 384;
  static constexpr int smem_bytes = 198784;
  static constexpr int registers = 232;
};

}  // namespace fagen

using namespace fagen;  // the kernel is this one file

#include <cuda.h>
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
// An operand in shared memory lies by rows (16 elements of k in a row) or, transposed, by columns (16 rows of k).
template <int kColumns, bool kATransposed, bool kBTransposed>
__device__ __forceinline__ void wgmma(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b, bool more);
// a in registers (the accumulator's order).
template <int kColumns, bool kBTransposed>
__device__ __forceinline__ void wgmma(float (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool more);

template <>
__device__ __forceinline__ void wgmma<64, false, false>(float (&c)[8][4], uint64_t a, uint64_t b, bool more) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "l"(a), "l"(b), "r"(int(more)));
}

template <>
__device__ __forceinline__ void wgmma<64, false, true>(float (&c)[8][4], uint64_t a, uint64_t b, bool more) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 1;\n}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "l"(a), "l"(b), "r"(int(more)));
}

template <>
__device__ __forceinline__ void wgmma<128, true>(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool more) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(more)));
}

}  // namespace fagen::ptx
// ---- fagen/sm90/backward/kernel.cuh ----------------------------------------------------------------------
// The backward kernel for Hopper: a block has one tile of keys, and visits the row tiles that see them.
//
//   warpgroups 0 .. kGroups - 1   consumers: 64 keys each                                 consumer.cuh
//                               or, with shared operands, some columns of a head        shared_consumer.cuh
//   the last one, warp 0          loads k, and q with its LSE and delta                   producer.cuh
//                 warp 1          loads v and dO (with three consumers warp 0 loads       producer.cuh
//                                 these as well)
//                 its last warps  bulk sink: one a consumer, adds its dQ to memory        dq.cuh
//                                 deterministic: waits for its turn to do so, or for the consumer's
//                 or all of it    computes dQ                                             dq_loader.cuh
//
// A kernel before it computes delta; where no block rounds dQ, that one sets it to zero, and one after it rounds it:
// prologue.cuh, epilogue.cuh. The host's part: launch.cuh.
// ---- fagen/sm90/backward/consumer.cuh --------------------------------------------------------------------
// A consumer warpgroup: 64 keys against row tile after row tile. Scores are computed with keys down, so that P^T and
// dS^T are operands of dV += P^T dO and dK += dS^T Q where they are, in registers. Only dQ = dS K, which sums over the
// keys of all warpgroups, has its dS from shared memory.
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

// ---- fagen/sm90/backward/dq.cuh --------------------------------------------------------------------------
// dQ on its way from a consumer's registers into memory, where the blocks of all key tiles add theirs in float32: by
// shared memory and the copy engine (bulk), or straight from registers (red). Deterministic: in turns.

// ---- fagen/ptx/bulk.cuh ----------------------------------------------------------------------------------
// Copies of whole runs of bytes (sm_90): memory to shared memory, and from there into memory, copied or added.
#include <stdint.h>

namespace fagen::ptx {

// Copy `bytes` (a multiple of 16) to shared memory; `barrier` counts them.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Add float32 values of shared memory to those in memory, `bytes` of them (a multiple of 16).
__device__ __forceinline__ void bulk_add(float* to, uint32_t from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
// Copy them instead.
__device__ __forceinline__ void bulk_store(float* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until this thread's copies and sums have read shared memory; or until they are in memory.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace fagen::ptx

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

// ---- fagen/ptx/shared.cuh --------------------------------------------------------------------------------
// Pairs of values from shared memory, and tiles that are transposed on their way into it.
#include <stdint.h>

namespace fagen::ptx {

__device__ __forceinline__ float2 ld_shared_8(uint32_t from) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(from) : "memory");
  return pair;
}
__device__ __forceinline__ void st_shared_16(uint32_t to, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// Store a warp's two 8 x 8 tiles of 16 bits; lanes 0 to 15 name the rows.
__device__ __forceinline__ void stmatrix_x2(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// Store a warp's four 8 x 8 tiles of 16 bits, each transposed: a lane names where a column goes.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace fagen::ptx

// ---- fagen/ptx/turn.cuh ----------------------------------------------------------------------------------
// Counters in global memory by which blocks agree (sm_90): whose turn it is, who is the first and who the last.

namespace fagen::ptx {

// Wait until the counter is at `turn`; what was added before it got there is visible.
__device__ __forceinline__ void wait_for_turn(const unsigned* counter, unsigned turn) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen != turn);
}
// Whether this thread's block is the first to claim what the counter stands for; no block is twice.
__device__ __forceinline__ bool claim(unsigned* counter, unsigned claimed) {
  unsigned before;
  asm volatile("atom.relaxed.gpu.global.or.b32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(claimed) : "memory");
  return !(before & claimed);
}
// Whether the bit is set; what was done before it was is visible, to the copy engine as well.
__device__ __forceinline__ bool has_bit(const unsigned* counter, unsigned bit) {
  unsigned seen;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\nfence.proxy.async.global;" : "=r"(seen) : "l"(counter) : "memory");
  return seen & bit;
}
__device__ __forceinline__ void wait_for_bit(const unsigned* counter, unsigned bit) {
  while (!has_bit(counter, bit)) {}
}
// Count what this thread has added, and return the count before. What others had counted is visible.
__device__ __forceinline__ unsigned count(unsigned* counter, unsigned number) {
  unsigned before;
  asm volatile(
      "fence.proxy.async.global;\n"
      "atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;\n"
      "fence.proxy.async.global;"
      : "=r"(before)
      : "l"(counter), "r"(number)
      : "memory");
  return before;
}
// Pass the turn on, after all that this thread has added.
__device__ __forceinline__ void pass_turn(unsigned* counter) {
  asm volatile("fence.proxy.async.global;\nred.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

}  // namespace fagen::ptx


// ---- fagen/sm90/backward/rows.cuh ------------------------------------------------------------------------
// Fragments of float32 to rows of elements in memory.

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

// The factor of the sums of dQ and dK. With dropout it makes up for dropped weights, as delta does not.
template <class C>
__device__ __forceinline__ float gradient_scale(const fagen_backward_params& p) {
  return scale_up<C>(p, p.scale);
}

// The lanes of a quad hold two columns each of four pieces, a word a piece. Afterwards each has a piece's four words.
__device__ __forceinline__ uint4 transpose_quad(const uint32_t (&words)[4]) {
  const bool odd = threadIdx.x % 2, upper = threadIdx.x % 4 / 2;
  uint32_t halves[2][2];  // of piece odd, and of piece 2 + odd: this lane pair's words
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? words[h * 2] : words[h * 2 + 1], 1);
    halves[h][0] = odd ? other : words[h * 2], halves[h][1] = odd ? words[h * 2 + 1] : other;
  }
  uint32_t other[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) other[i] = __shfl_xor_sync(~0u, upper ? halves[0][i] : halves[1][i], 2);
  return upper ? make_uint4(other[0], other[1], halves[1][0], halves[1][1])
               : make_uint4(halves[0][0], halves[0][1], other[0], other[1]);
}

// A lane's values of two rows, 8 apart, as pieces of 8 columns hold them: `load(piece)` gives four. They are scaled,
// rounded and stored, so that a quad writes 64 whole bytes of a row at once. Rows from `rows` on and columns from
// `columns` on are not there.
template <class Element, int kUnroll, class Load>
__device__ __forceinline__ void store_rows(const fagen_tensor& to, int batch, int head, int row, int rows, int columns,
                                           int first_piece, int pieces, float scale, Load load) {
  const int mine = threadIdx.x % 4, column = (first_piece + mine) * 8;
  Element* out = static_cast<Element*>(to.data) + batch * to.stride[0] + head * to.stride[2] + column;
#pragma unroll kUnroll
  for (int n = 0; n < pieces; n += 4) {
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 c = n + i < pieces ? load(n + i) : make_float4(0.f, 0.f, 0.f, 0.f);
      words[0][i] = pack<Element>(c.x * scale, c.y * scale), words[1][i] = pack<Element>(c.z * scale, c.w * scale);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint4 piece = transpose_quad(words[r]);
      if (row + r * 8 < rows && n + mine < pieces && column + n * 8 < columns)
        *reinterpret_cast<uint4*>(out + (row + r * 8) * to.stride[1] + n * 8) = piece;
    }
  }
}

}  // namespace fagen

// ---- fagen/sm90/backward/walk.cuh ------------------------------------------------------------------------
// The key tile of a block, and the row tiles that it visits: those of all heads of q that share the keys.

// ---- fagen/mask/intervals.cuh ----------------------------------------------------------------------------
// FlashMask's column intervals: each key is hidden from up to two intervals of rows.
#include <limits.h>
#include <stdint.h>

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

// ---- fagen/sm90/backward/layout.cuh ----------------------------------------------------------------------
// A block of the backward kernel: its shared memory, threads and registers, and who of its warpgroups computes what.
// ---- fagen/sm90/pipeline.cuh -----------------------------------------------------------------------------
// Pipelines between the warps of a block: stages of shared memory that producers fill and consumers free.
// ---- fagen/mask/mask.cuh ---------------------------------------------------------------------------------
// A mask as a type: which elements of a row are visible, and the walk over the key tiles that a row tile sees.
//
//   BandMask       none, causal, window: one range of keys a row
//   IntervalMask   column intervals, within a band


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

constexpr int kGroupKeys = 64;      // a warpgroup's keys
constexpr int kPieceBytes = 2048;   // a piece of 8 columns of 64 rows of dQ, float32: 16 bytes a thread

template <class C>
constexpr bool kSharedOperands = C::kOperands == Operands::shared;
template <class C>
constexpr bool kSeedsDp = C::kSeeds == Seeds::delta;  // accumulators of dP begin with -delta

// The warpgroup that loads tiles computes dQ as well: consumers hand dS over to it.
template <class C>
constexpr bool kLoaderHasDq = C::kDqOwner == DqOwner::loader;

// Consumers add dQ to memory themselves, when a warp tells them that it is the block's turn.
template <class C>
constexpr bool kRedInTurns = C::kDeterministic && C::kDqSink == DqSink::red;

// How the consumers share the product dQ = dS K, in chunks one after another. A chunk is 64 rows of some slabs of
// columns: by rows where each consumer can have as many chunks as the others, else by slabs. With P and dS in shared
// memory there are 64 rows, and a chunk is one slab, since registers are few. The loader has fewer still: half a slab.
template <class C>
struct DqShare {
  static constexpr int kGroups = C::kWarpgroups;
  static constexpr int kOwners = C::kDqOwner == DqOwner::all ? kGroups : 1;
  static constexpr int kRowChunks = C::kTileM / 64, kAllSlabs = slabs(C::kHeadDim);
  static constexpr bool kByHalf = kLoaderHasDq<C>, kBySlab = kSharedOperands<C>;
  static constexpr bool kByRows = !kByHalf && !kBySlab && kRowChunks % kOwners == 0;
  static constexpr int kHalves = (C::kHeadDim + kSlabColumns / 2 - 1) / (kSlabColumns / 2);
  static constexpr int kOwnSlabs = (kAllSlabs + kOwners - 1) / kOwners;  // where the slabs are shared
  static constexpr int kChunks = kByHalf   ? kRowChunks * kHalves
                                 : kBySlab ? kOwnSlabs
                                 : kByRows ? kRowChunks / kOwners
                                           : kRowChunks;
  static constexpr int kColumns = kByHalf   ? kSlabColumns / 2
                                  : kBySlab ? kSlabColumns
                                  : kByRows ? C::kHeadDim
                                            : kOwnSlabs * kSlabColumns;
  static constexpr int kChunkPieces = C::kHeadDim / 8;  // of all columns
  static constexpr int kTileFloats = C::kTileM * C::kHeadDim;
  static constexpr int kStageBytes = C::kDqSink == DqSink::bulk ? kColumns / 8 * kPieceBytes : 0;
  static constexpr bool kWhole = kByRows || ((kByHalf || kBySlab) && C::kHeadDim % kColumns == 0);  // all are full
  // every group has all of its chunks: there is nothing to ask
  static constexpr bool kEach =
      kByHalf ||
      kOwners == kGroups && (kByRows || (kBySlab ? kAllSlabs % kOwners == 0 : (kOwners - 1) * kOwnSlabs < kAllSlabs));

  const int group;
  __device__ __forceinline__ int slab(int chunk) const {
    return kByHalf ? chunk % kHalves / 2 : kByRows ? 0 : group * kOwnSlabs + (kBySlab ? chunk : 0);
  }
  __device__ __forceinline__ int row_chunk(int chunk) const {
    return kByHalf ? chunk / kHalves : kBySlab ? 0 : kByRows ? group * kChunks + chunk : chunk;
  }
  __device__ __forceinline__ bool owns(int chunk = 0) const {
    return kEach || (group < kOwners && slab(chunk) < kAllSlabs);
  }
  // The chunk begins in the middle of its slab.
  __device__ __forceinline__ int half(int chunk) const { return kByHalf ? chunk % kHalves % 2 : 0; }
  // A chunk's columns in pieces of 8: the first one, and how many there are.
  __device__ __forceinline__ int first_piece(int chunk) const { return slab(chunk) * 8 + half(chunk) * 4; }
  __device__ __forceinline__ int pieces(int chunk) const {
    if constexpr (kWhole) return kColumns / 8;
    return min(kColumns / 8, kChunkPieces - first_piece(chunk));
  }
  // where a chunk begins in the float32 tile of dQ, which is in the order of fragments
  __device__ __forceinline__ int offset(int chunk) const {
    return (row_chunk(chunk) * kChunkPieces + first_piece(chunk)) * (kPieceBytes / 4);
  }
};

template <class C>
struct BackwardLayout {
  using Dq = DqShare<C>;
  static constexpr int kGroups = C::kWarpgroups;  // consumers
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kSlabs = slabs(C::kHeadDim), kSlabsV = slabs(C::kHeadDimV);
  static constexpr int kKBytes = C::kTileN * kRowBytes * kSlabs, kVBytes = C::kTileN * kRowBytes * kSlabsV;
  static constexpr int kQBytes = C::kTileM * kRowBytes * kSlabs, kDoutBytes = C::kTileM * kRowBytes * kSlabsV;
  // dS, and before it P if that goes by shared memory, in slabs of 64 keys
  static constexpr int kDsSlabBytes = C::kTileM * kRowBytes, kDsTileBytes = slabs(C::kTileN) * kDsSlabBytes;
  static constexpr int kDsBytes = kDsTileBytes * (kSharedOperands<C> ? 2 : 1);
  static constexpr int kStatBytes = C::kTileM * 4;  // the LSE, or delta, of a row tile
  static constexpr bool kIntervals = MaskOf<C>::kIntervals;
  static constexpr int kBoundBytes = kIntervals ? C::kTileN * 16 : 0, kExtentBytes = kIntervals ? 32 : 0;

  static constexpr bool kRoundsDq = C::kDqRounding == DqRounding::last_block;

  // Offsets: k, v, the stages of q, of dO and of dS, the owners' parts of dQ, the LSE and delta of each stage of q, the
  // bounds of the keys' intervals and their extents, barriers.
  static constexpr int kK = 0, kV = kK + kKBytes, kQ = kV + kVBytes, kDout = kQ + C::kQStages * kQBytes;
  static constexpr int kDs = kDout + C::kDoutStages * kDoutBytes, kDq = kDs + C::kDsStages * kDsBytes;
  static constexpr int kLse = kDq + Dq::kOwners * Dq::kStageBytes, kDelta = kLse + C::kQStages * kStatBytes;
  static constexpr int kBounds = kDelta + C::kQStages * kStatBytes, kExtents = kBounds + kBoundBytes;
  static constexpr int kBarriers = kExtents + kExtentBytes;
  static constexpr int kDqBarriers = 2 + C::kQStages + C::kDoutStages;  // behind those of k, v, q and dO
  static constexpr int kBarrierPairs = kDqBarriers + (kLoaderHasDq<C> ? C::kDsStages : kGroups * (kRoundsDq ? 2 : 1));
  static constexpr int kSmemBytes = kBarriers + kBarrierPairs * kBarrierBytes + kSmemAlignment;  // room to align

  // Registers of a thread: those that the block is compiled for, and how the roles divide them.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kGroups == 3                                        ? 32
                                            : kLoaderHasDq<C> || (kRoundsDq && C::kTileM == 64) ? 56
                                                                                                : 40;
  static constexpr int kConsumerShare = ((kGroups + 1) * kRegisters - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kConsumerShare > 240 ? 240 : kConsumerShare;

  static_assert(kSharedOperands<C> ? C::kTileM == 64 && C::kTileN % 16 == 0 && C::kTileN / 8 % kGroups == 0
                                   : C::kTileM % 64 == 0 && C::kTileN == kGroups * kGroupKeys,
                "a product is 64 rows or 64 keys");
  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

// Blocks that share the visits of a key tile add up dK and dV by units, in the place of the tiles. A unit is 32 columns
// of a warpgroup's keys, or with shared operands a slab of its columns of all keys.
template <class C>
struct SplitUnits {
  using L = BackwardLayout<C>;
  static constexpr int kPieces = kSharedOperands<C> ? C::kTileN / 8 : 4, kBytes = kPieces * kPieceBytes;
  static constexpr int of(int columns) {  // of a warpgroup
    return kSharedOperands<C> ? (slabs(columns) + L::kGroups - 1) / L::kGroups : (columns / 8 + 3) / 4;
  }
};
template <class C>
constexpr int kDkUnits = SplitUnits<C>::of(C::kHeadDim);
template <class C>
constexpr int kUnits = kDkUnits<C> + SplitUnits<C>::of(C::kHeadDimV);
// Blocks of a cluster: on every GPU as many as 8 are one.
template <class C>
constexpr int kMostSplits =
    BackwardLayout<C>::kGroups * kUnits<C> * SplitUnits<C>::kBytes <= BackwardLayout<C>::kDq ? 8 : 1;

// The barriers and tiles of a block, as one warp sees them. A row tile's q comes with its LSE and delta.
template <class C>
struct BackwardPipelines {
  using L = BackwardLayout<C>;
  Pipeline<1, L::kKBytes> k;
  Pipeline<1, L::kVBytes> v;
  Pipeline<C::kQStages, L::kQBytes> q;
  Pipeline<C::kDoutStages, L::kDoutBytes> dout;
  // of one owner: filled by its four warps, emptied by a warp that adds it to memory; or no tile, but turns, of which
  // that warp tells the four
  Pipeline<1, L::Dq::kStageBytes> dq;
  Pipeline<C::kDsStages, L::kDsBytes> handed_ds;  // to the loader, where that computes dQ
  uint32_t summed;  // the owner's barrier: the sum of all blocks is there, in the same place
  uint32_t smem;
  int ds_stage = 0;

  __device__ __forceinline__ BackwardPipelines(uint32_t smem, int owner)
      : k{smem + L::kK, barrier(smem, 0)},
        v{smem + L::kV, barrier(smem, 1)},
        q{smem + L::kQ, barrier(smem, 2)},
        dout{smem + L::kDout, barrier(smem, 2 + C::kQStages)},
        dq{smem + L::kDq + owner * L::Dq::kStageBytes, barrier(smem, L::kDqBarriers + owner)},
        handed_ds{smem + L::kDs, barrier(smem, L::kDqBarriers)},
        summed(barrier(smem, L::kDqBarriers + L::kGroups + owner)),
        smem(smem) {}
  static __device__ __forceinline__ uint32_t barrier(uint32_t smem, int index) {
    return smem + L::kBarriers + index * kBarrierBytes;
  }
  __device__ __forceinline__ uint32_t lse() const { return smem + L::kLse + q.stage * L::kStatBytes; }
  __device__ __forceinline__ uint32_t delta() const { return smem + L::kDelta + q.stage * L::kStatBytes; }
  __device__ __forceinline__ uint32_t ds() const { return smem + L::kDs + ds_stage * L::kDsBytes; }

  __device__ __forceinline__ void init() const {
    k.init(1), v.init(1);
    q.init(L::kGroups * 4);
    dout.init(L::kGroups * 4);
    if (kLoaderHasDq<C>) handed_ds.init(4, L::kGroups * 4);
    for (int owner = 0; owner < L::kGroups && !kLoaderHasDq<C>; ++owner) {
      const BackwardPipelines of_owner(smem, owner);
      kRedInTurns<C> ? of_owner.dq.init(4, 1) : of_owner.dq.init(1, 4);
      if (L::kRoundsDq) ptx::mbarrier_init(of_owner.summed, 1);
    }
    ptx::fence_mbarrier_init();
  }
};

}  // namespace fagen

namespace fagen {

// Computed once on the host for a launch.
struct BackwardLaunch {
  CUtensorMap q, k, v, dout;
  int row_tiles, key_tiles;  // per head
  bool one_key_tile;         // that all rows visit, or none at all: what its block has of dQ is no part of a sum
  TileOrder order;           // of key tiles
  Divisor splits;            // blocks that share the visits of a key tile: a cluster
  float* lse;                // (batch, heads, row_tiles * kTileM): base 2, +inf where a row sees nothing or is none
  float* delta;              // the same of the sums of dO O - dLSE, negated where dP begins with it
  float* dq;        // (batch, heads, row_tiles), tiles of float32 in the order of fragments
  unsigned* turns;  // (batch, heads, row_tiles, kGroups): how many blocks have added their part
  // Deterministic, with intervals: (batch, mask_heads, row_tiles, seen_words), a bit for each key tile that a row tile
  // sees. Only those have a turn.
  unsigned* seen;
  int seen_words;
};

// Whether turns are told by which key tiles a row tile sees: without intervals the band tells.
template <class C>
constexpr bool kTurnsBySeen = C::kDeterministic && MaskOf<C>::kIntervals;

// The sums of dQ of the `index`-th row tile of all heads.
template <class C>
__device__ __forceinline__ float* dq_sums(const BackwardLaunch& launch, int64_t index) {
  return launch.dq + index * DqShare<C>::kTileFloats;
}

// The band around the diagonal by columns: key n is seen by rows [n - last, n - first].
struct RowBand {
  int first, last, seqlen_q, seqlen_k;

  __host__ __device__ __forceinline__ explicit RowBand(const fagen_backward_params& p)
      : seqlen_q(p.seqlen_q), seqlen_k(p.seqlen_k) {
    const int shift = p.seqlen_k - p.seqlen_q;
    first = p.window_left < 0 ? -kFar : shift - p.window_left;
    last = p.window_right < 0 ? kFar : shift + p.window_right;
  }
  // the first row that sees key n, and one past the last; none sees a key that is not there
  __host__ __device__ __forceinline__ int begin(int n) const { return max(0, n - last); }
  __host__ __device__ __forceinline__ int end(int n) const {
    return n < seqlen_k ? max(0, min(seqlen_q, n - first + 1)) : 0;
  }
  // the key tiles that a row tile sees, first and last; the last is before the first where it sees none
  template <class C>
  __device__ __forceinline__ void key_tiles(int row_tile, int& first_tile, int& last_tile) const {
    const int m0 = row_tile * C::kTileM, m1 = min(m0 + C::kTileM, seqlen_q);
    const int first_key = max(0, m0 + first), last_key = min(seqlen_k - 1, m1 - 1 + last);
    first_tile = first_key / C::kTileN, last_tile = last_key < first_key ? first_tile - 1 : last_key / C::kTileN;
  }
};

// The least and the greatest bounds of the intervals of a tile's keys.
struct KeyBounds {
  Extent ls, le, us, ue;

  // Rows [m0, m1): no key is visible to them, or one of them may be hidden from some key.
  __device__ __forceinline__ bool hide(int m0, int m1) const {
    return (m0 >= ls.high && m1 <= le.low) || (m0 >= us.high && m1 <= ue.low);
  }
  __device__ __forceinline__ bool touch(int m0, int m1) const {
    return (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
  }
};

struct RowTileVisit {
  int head, tile;
  bool partial;  // something may be hidden
};

// The key tiles that a row tile sees, as bits.
template <class C>
__device__ __forceinline__ unsigned* seen_by(const fagen_backward_params& p, const BackwardLaunch& launch, int batch,
                                             int kv_head, int row_tile) {
  const int64_t plane = int64_t(batch) * p.mask_heads + (p.mask_heads == 1 ? 0 : kv_head);
  return launch.seen + (plane * launch.row_tiles + row_tile) * launch.seen_words;
}

template <class C>
struct KeyTile {
  static constexpr bool kIntervals = MaskOf<C>::kIntervals;
  static constexpr bool kLastFirst = C::kBlockOrder == BlockOrder::descending;

  int tile, kv_head, split, batch, n0;
  int begin, end;  // row tiles that see any of its keys, by the band
  int full_begin, full_end;  // rows that see all of them
  int splits;
  // Intervals. Where those of its keys' bounds are: read anew, since registers are few. Unless what they hide is the
  // first and the last rows alone, as with packed sequences: then the bounds above say it all.
  uint32_t extents;
  bool scattered = false;

  // Orders that put the longest first take the last index of a head first; of key tiles the first is the longest.
  // `index` counts the tiles of all heads in their order, those of splits side by side.
  __device__ __forceinline__ KeyTile(const BackwardLaunch& launch, const RowBand& band, uint32_t smem, uint32_t index) {
    const uint32_t place = launch.splits.quotient(index);
    const TileCoord coord = launch.order.tile_at<C::kBlockOrder>(place);
    constexpr bool kTurned = C::kBlockOrder == BlockOrder::longest_first || C::kBlockOrder == BlockOrder::sectioned;
    tile = kTurned ? launch.key_tiles - 1 - coord.row_tile : coord.row_tile;
    kv_head = coord.head, split = launch.splits.remainder(index, place), batch = coord.batch, n0 = tile * C::kTileN;
    const int last_key = min(n0 + C::kTileN, band.seqlen_k) - 1;
    const int first_row = band.begin(n0), end_row = band.end(last_key);
    begin = first_row / C::kTileM;
    end = first_row < end_row ? (end_row + C::kTileM - 1) / C::kTileM : begin;
    full_begin = band.begin(last_key);
    full_end = last_key == n0 + C::kTileN - 1 ? band.end(n0) : 0;
    splits = launch.splits.by;
    extents = smem + BackwardLayout<C>::kExtents;
    if constexpr (kIntervals) {
      const KeyBounds of = bounds();
      const bool lower = leaves(of.ls, of.le, band.seqlen_q), upper = leaves(of.us, of.ue, band.seqlen_q);
      scattered = !(lower && upper);
      end = max(begin, end);
    }
  }

  __device__ __forceinline__ KeyBounds bounds() const {
    const uint4 lower = ptx::ld_shared_16(extents), upper = ptx::ld_shared_16(extents + 16);
    return {{int(lower.x), int(lower.y)},
            {int(lower.z), int(lower.w)},
            {int(upper.x), int(upper.y)},
            {int(upper.z), int(upper.w)}};
  }
  // Rows are hidden from `from` to `to`, of each key: narrow the row tiles down to the rest if those are the last rows
  // or the first, and say whether they are.
  __device__ __forceinline__ bool leaves(const Extent& from, const Extent& to, int seqlen_q) {
    if (to.low >= seqlen_q) {
      end = min(end, (max(0, min(from.high, seqlen_q)) + C::kTileM - 1) / C::kTileM);
      full_end = min(full_end, from.low);
      return true;
    }
    if (from.high > 0) return false;
    begin = max(begin, to.low / C::kTileM);
    full_begin = max(full_begin, to.high);
    return true;
  }

  // Rows [m0, m1): no key is visible to them, or some may be hidden.
  __device__ __forceinline__ void classify(int m0, int m1, bool& hidden, bool& partial) const {
    hidden = false, partial = m0 < full_begin || m1 > full_end;
    if (kIntervals && scattered) {
      const KeyBounds of = bounds();
      hidden = of.hide(m0, m1);
      partial |= of.touch(m0, m1);
    }
  }

  // Call visit(RowTileVisit) for every row tile that sees any of the keys, head after head: this split's share of them.
  template <class Visit>
  __device__ __forceinline__ void walk(const fagen_backward_params& p, Visit visit) const {
    const int group = p.heads / p.kv_heads, tiles = end - begin, all = group * tiles;
    const int shift = C::kRowOrder == RowOrder::shifted && tiles > 0 ? tile % tiles : 0;
    int head = kv_head * group, i = 0, visits = all;
    if (splits > 1 && tiles > 0) {
      const int share = (all + splits - 1) / splits, from = split * share, before = from / tiles;  // heads
      head += before, i = from - before * tiles, visits = min(share, all - from);
    }
    const auto look_at = [&](int head, int i) {
      int t = C::kRowOrder == RowOrder::descending ? end - 1 - i : begin + i + shift;
      if (C::kRowOrder == RowOrder::shifted && t >= end) t -= tiles;
      const int m0 = t * C::kTileM, m1 = min(m0 + C::kTileM, p.seqlen_q);
      bool hidden, partial;
      classify(m0, m1, hidden, partial);
      if (!hidden) visit(RowTileVisit{head, t, partial});
    };
    // Consumers that have dQ in registers know much about a head; elsewhere one loop takes fewer registers than two.
    if constexpr (!kLoaderHasDq<C> && !kSharedOperands<C>) {
#pragma unroll 1
      for (; visits > 0; ++head, i = 0) {
        const int stop = min(tiles, i + visits);
        visits -= stop - i;
#pragma unroll 1
        for (; i < stop; ++i) look_at(head, i);
      }
    } else {
#pragma unroll 1
      for (; visits > 0; --visits) {
        look_at(head, i);
        if (++i == tiles) i = 0, ++head;
      }
    }
  }

  // How many key tiles visit a row tile, and how many of them before this one: blocks of lower index, in an order that
  // is fixed.
  struct Turn {
    int mine, count;
  };
  __device__ __forceinline__ Turn turn(const RowBand& band, int t) const {
    int first, last;
    band.key_tiles<C>(t, first, last);
    return {kLastFirst ? last - tile : tile - first, last - first + 1};
  }
  // The same by the key tiles that the row tile sees: a warp's work.
  __device__ __forceinline__ Turn turn(const fagen_backward_params& p, const BackwardLaunch& launch, int t) const {
    const unsigned* seen = seen_by<C>(p, launch, batch, kv_head, t);
    int mine = 0, count = 0;
    for (int word = threadIdx.x % 32; word < launch.seen_words; word += 32) {
      const int before = min(max(tile - word * 32, 0), 32);  // bits of tiles below this one
      const unsigned bits = seen[word], low = before == 32 ? bits : bits & ((1u << before) - 1);
      count += __popc(bits), mine += __popc(low);
    }
    mine = __reduce_add_sync(~0u, mine), count = __reduce_add_sync(~0u, count);
    return {kLastFirst ? count - 1 - mine : mine, count};
  }
};

// The bounds of a tile's keys, which `keep(n, bounds)` gets one by one: a warp's work.
template <class C, class Keep>
__device__ __forceinline__ KeyBounds find_bounds(const fagen_backward_params& p, int batch, int kv_head, int n0,
                                                 Keep keep) {
  Intervals<C> intervals;
  intervals.bounds = static_cast<const int32_t*>(p.intervals.data) + batch * p.intervals.stride[0] +
                     (p.mask_heads == 1 ? 0 : kv_head) * p.intervals.stride[1];
  intervals.stride = p.intervals.stride[2];
  intervals.last_key = p.seqlen_k - 1;
  int low[4], high[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) low[i] = INT_MAX, high[i] = INT_MIN;
  for (int n = threadIdx.x % 32; n < C::kTileN; n += 32) {
    const HiddenRows hidden = intervals.at(min(n0 + n, intervals.last_key));
    const int bounds[4] = {hidden.ls, hidden.le, hidden.us, hidden.ue};
    keep(n, bounds);
#pragma unroll
    for (int i = 0; i < 4; ++i) low[i] = min(low[i], bounds[i]), high[i] = max(high[i], bounds[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) low[i] = __reduce_min_sync(~0u, low[i]), high[i] = __reduce_max_sync(~0u, high[i]);
  return {{low[0], high[0]}, {low[1], high[1]}, {low[2], high[2]}, {low[3], high[3]}};
}

// Bring the bounds of a key tile's intervals to shared memory, and their extents: one warp's work.
template <class C>
__device__ __forceinline__ void load_intervals(const fagen_backward_params& p, const BackwardLaunch& launch,
                                               uint32_t smem, uint32_t index) {
  using L = BackwardLayout<C>;
  const TileCoord coord = launch.order.tile_at<C::kBlockOrder>(launch.splits.quotient(index));
  constexpr bool kTurned = C::kBlockOrder == BlockOrder::longest_first || C::kBlockOrder == BlockOrder::sectioned;
  const int n0 = (kTurned ? launch.key_tiles - 1 - coord.row_tile : coord.row_tile) * C::kTileN;
  const KeyBounds of = find_bounds<C>(p, coord.batch, coord.head, n0, [&](int n, const int (&bounds)[4]) {
    ptx::st_shared_16(smem + L::kBounds + n * 16, make_uint4(bounds[0], bounds[1], bounds[2], bounds[3]));
  });
  if (threadIdx.x % 32 == 0) {
    ptx::st_shared_16(smem + L::kExtents, make_uint4(of.ls.low, of.ls.high, of.le.low, of.le.high));
    ptx::st_shared_16(smem + L::kExtents + 16, make_uint4(of.us.low, of.us.high, of.ue.low, of.ue.high));
  }
}

// Tell which key tiles a row tile sees: a block's work. KeyTile::walk comes to the same answer.
template <class C>
__device__ __forceinline__ void find_seen(const fagen_backward_params& p, const BackwardLaunch& launch, int batch,
                                          int kv_head, int row_tile, int warps) {
  int first, last;
  RowBand(p).key_tiles<C>(row_tile, first, last);
  const int m0 = row_tile * C::kTileM, m1 = min(m0 + C::kTileM, p.seqlen_q);
  for (int word = threadIdx.x / 32; word < launch.seen_words; word += warps) {
    unsigned bits = 0;
    for (int tile = max(first, word * 32); tile <= min(last, word * 32 + 31); ++tile) {
      const KeyBounds of = find_bounds<C>(p, batch, kv_head, tile * C::kTileN, [](int, const int (&)[4]) {});
      if (!of.hide(m0, m1)) bits |= 1u << (tile - word * 32);
    }
    if (threadIdx.x % 32 == 0) seen_by<C>(p, launch, batch, kv_head, row_tile)[word] = bits;
  }
}

}  // namespace fagen

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

// Its index among those of all heads.
template <class C>
__device__ __forceinline__ int64_t row_tile_index(const fagen_backward_params& p, const BackwardLaunch& launch,
                                                  int batch, int head, int tile) {
  return (int64_t(batch) * p.heads + head) * launch.row_tiles + tile;
}

// Start a chunk of dQ = dS K, with both in shared memory.
template <class C>
__device__ __forceinline__ void start_dq(float (&dq)[DqShare<C>::kColumns / 8][4], const DqShare<C>& share, int chunk,
                                         uint32_t ds, uint32_t k) {
  const uint32_t columns = k + share.slab(chunk) * C::kTileN * kRowBytes + share.half(chunk) * kRowBytes / 2;
  const Operand a = Operand::of_rows(ds + share.row_chunk(chunk) * 64 * kRowBytes);
  const Operand b = Operand::of_columns(columns, C::kTileN * kRowBytes);
  pin(dq);
  ptx::wgmma_fence();
#pragma unroll
  for (int n = 0; n < C::kTileN / 16; ++n)
    ptx::wgmma<DqShare<C>::kColumns, false, true>(dq, a.at(n / 4 * BackwardLayout<C>::kDsSlabBytes + n % 4 * 32),
                                                  b.at(n * 2048), n > 0);
  ptx::wgmma_commit();
}

// A chunk of rows of dQ that no other block adds to, to memory as it is.
template <class C, class Element>
__device__ __forceinline__ void store_dq(const fagen_backward_params& p, const float (&dq)[DqShare<C>::kColumns / 8][4],
                                         const DqShare<C>& share, int chunk, int batch, const RowTileVisit& at) {
  constexpr int kPieces = DqShare<C>::kColumns / 8;
  unsigned thread = threadIdx.x;
  ptx::pin(thread);  // nothing of this is computed before the visits: registers are few
  const int m = at.tile * C::kTileM + share.row_chunk(chunk) * 64 + thread % 128 / 32 * 16 + thread % 32 / 4;
  store_rows<Element, (kPieces + 3) / 4>(p.dq, batch, at.head, m, p.seqlen_q, p.head_dim, share.first_piece(chunk),
                                         kPieces, gradient_scale<C>(p),
                                         [&](int n) { return make_float4(dq[n][0], dq[n][1], dq[n][2], dq[n][3]); });
}

// The consumer's side: one chunk of its part.
template <class C>
__device__ __forceinline__ void sink_dq(const float (&dq)[DqShare<C>::kColumns / 8][4], const DqShare<C>& share,
                                        int chunk, BackwardPipelines<C>& pipelines, float* tile) {
  const int pieces = share.pieces(chunk), thread = threadIdx.x % 128;
  if constexpr (C::kDqSink == DqSink::bulk) {
    pipelines.dq.acquire();
    const uint32_t to = pipelines.dq.tile() + thread * 16;
#pragma unroll
    for (int i = 0; i < DqShare<C>::kColumns / 8; ++i)
      ptx::st_shared_16(to + i * kPieceBytes, dq[i][0], dq[i][1], dq[i][2], dq[i][3]);
    ptx::fence_shared_writes();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(pipelines.dq.full());
    pipelines.dq.advance();
  } else {
    if (kRedInTurns<C> && chunk == 0) pipelines.dq.wait();
    float* to = tile + share.offset(chunk) + thread * 4;
#pragma unroll
    for (int i = 0; i < DqShare<C>::kColumns / 8; ++i)
      if (i < pieces) ptx::reduce_add_4(to + i * (kPieceBytes / 4), dq[i]);
    if (kRedInTurns<C> && (chunk + 1 == DqShare<C>::kChunks || !share.owns(chunk + 1))) {
      __syncwarp();
      pipelines.dq.release();
    }
  }
}

// The number of key tiles whose parts of a row tile come before this block's: a warp's work.
template <class C>
__device__ __forceinline__ int turn_of(const fagen_backward_params& p, const BackwardLaunch& launch,
                                       const KeyTile<C>& keys, const RowBand& band, const RowTileVisit& at) {
  if constexpr (kTurnsBySeen<C>)
    return keys.turn(p, launch, at.tile).mine;
  else
    return keys.turn(band, at.tile).mine;
}

// The other side of the red sink where the sums have an order: a warp tells those of an owner when the block's turn has
// come, and passes it on when they have added their part. It waits for the next turn while they compute.
template <class C>
struct DqTurns {
  const fagen_backward_params& p;
  const BackwardLaunch& launch;
  const KeyTile<C>& keys;
  const RowBand& band;
  const DqShare<C> share;
  BackwardPipelines<C> pipelines;
  unsigned* before = nullptr;  // the counter of the last row tile; its turn has not been passed on

  __device__ __forceinline__ static bool leads() { return threadIdx.x % 32 == 0; }
  __device__ __forceinline__ void pass() const {
    if (!leads() || before == nullptr) return;
    pipelines.dq.acquire();
    ptx::pass_turn(before);
  }
  __device__ __forceinline__ void run() {
    if (launch.one_key_tile) return;
    keys.walk(p, [&](const RowTileVisit& at) {
      const int mine = turn_of<C>(p, launch, keys, band, at);
      pass();
      const int64_t index = row_tile_index<C>(p, launch, keys.batch, at.head, at.tile);
      before = launch.turns + index * DqShare<C>::kGroups + share.group;
      if (leads()) {
        ptx::wait_for_turn(before, mine);
        ptx::mbarrier_arrive(pipelines.dq.full());
      }
      pipelines.dq.advance();
    });
    pass();
  }
};

// The other side of the bulk sink: a warp adds what an owner has stored, row tile after row tile. With
// dq_rounding=last_block the first block to add to a tile stores instead, so that nothing need be zero, and the last
// one rounds the sum. Counters in memory tell who that is. A block asks for them while its consumers compute, and
// rounds when the next part has left the stage in shared memory.
template <class C, class Element>
struct DqDrain {
  using L = BackwardLayout<C>;
  using Dq = DqShare<C>;
  static constexpr unsigned kStored = 1u << 31, kClaimed = 1u << 30;  // of a counter; below them lies the count

  const fagen_backward_params& p;
  const BackwardLaunch& launch;
  const KeyTile<C>& keys;
  const RowBand& band;
  const Dq share;
  BackwardPipelines<C> pipelines;
  int summed_phase = 0;
  RowTileVisit before = {0, -1, false};  // the last row tile added to; not yet counted
  bool stored = false;                   // `before` was stored

  __device__ __forceinline__ static bool leads() { return threadIdx.x % 32 == 0; }
  __device__ __forceinline__ int64_t index(const RowTileVisit& at) const {
    return row_tile_index<C>(p, launch, keys.batch, at.head, at.tile);
  }
  __device__ __forceinline__ float* tile(const RowTileVisit& at) const { return dq_sums<C>(launch, index(at)); }
  __device__ __forceinline__ unsigned* counter(const RowTileVisit& at) const {
    return launch.turns + index(at) * Dq::kGroups + share.group;
  }

  // Whether this block's part is the first; if not, the others' are there that it is added to.
  __device__ __forceinline__ bool begin(const RowTileVisit& at, bool seen) const {
    if constexpr (L::kRoundsDq) {
      if (seen) return false;
      if (ptx::claim(counter(at), kClaimed)) return true;
      ptx::wait_for_bit(counter(at), kStored);
    }
    return false;
  }
  // Count the part that was added before, and say whether it was the last.
  __device__ __forceinline__ bool count() {
    bool last = false;
    if (leads() && before.tile >= 0 && (L::kRoundsDq || C::kDeterministic)) {
      ptx::bulk_wait();
      if constexpr (L::kRoundsDq) {
        const bool first = stored && !C::kDeterministic;
        const unsigned others = ptx::count(counter(before), 1 + (first ? kStored : 0)) & (kClaimed - 1);
        last = int(others) == keys.turn(band, before.tile).count - 1;
      } else {
        ptx::pass_turn(counter(before));
      }
    }
    return L::kRoundsDq && __shfl_sync(~0u, last, 0);
  }

  __device__ __forceinline__ void add(const RowTileVisit& at) {
    const bool last = count();
    bool seen = false;
    if constexpr (C::kDeterministic) {  // the turn may have come before the part is there
      const int mine = turn_of<C>(p, launch, keys, band, at);
      if (leads()) ptx::wait_for_turn(counter(at), mine);
      stored = L::kRoundsDq && mine == 0;
    } else {
      seen = L::kRoundsDq && leads() && ptx::has_bit(counter(at), kStored);
    }
#pragma unroll 1
    for (int chunk = 0; chunk < Dq::kChunks && share.owns(chunk); ++chunk) {
      const bool more = chunk + 1 < Dq::kChunks && share.owns(chunk + 1);
      if (leads()) {
        pipelines.dq.wait();
        if (!C::kDeterministic && chunk == 0) stored = begin(at, seen);
        float* to = tile(at) + share.offset(chunk);
        const int bytes = share.pieces(chunk) * kPieceBytes;
        stored ? ptx::bulk_store(to, pipelines.dq.tile(), bytes) : ptx::bulk_add(to, pipelines.dq.tile(), bytes);
        ptx::bulk_commit();
        ptx::bulk_wait_read();
      }
      if (!more && last) round(before);
      if (leads()) ptx::mbarrier_arrive(pipelines.dq.empty());
      pipelines.dq.advance();
    }
    before = at;
  }

  // The sum of all blocks comes back to the stage, which is free.
  __device__ __forceinline__ void round(const RowTileVisit& at) {
#pragma unroll 1
    for (int chunk = 0; chunk < Dq::kChunks && share.owns(chunk); ++chunk) {
      const int bytes = share.pieces(chunk) * kPieceBytes, lane = threadIdx.x % 32;
      if (leads()) {
        ptx::mbarrier_arrive_expect(pipelines.summed, bytes);
        ptx::bulk_load(pipelines.dq.tile(), tile(at) + share.offset(chunk), bytes, pipelines.summed);
      }
      ptx::mbarrier_wait(pipelines.summed, summed_phase);
      summed_phase ^= 1;
#pragma unroll 1
      for (int warp = 0; warp < 4; ++warp) {
        const uint32_t from = pipelines.dq.tile() + (warp * 32 + lane) * 16;
        const int m = at.tile * C::kTileM + share.row_chunk(chunk) * 64 + warp * 16 + lane / 4;
        const auto load = [&](int piece) {
          const uint4 x = ptx::ld_shared_16(from + piece * kPieceBytes);
          return make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w));
        };
        store_rows<Element, 1>(p.dq, keys.batch, at.head, m, p.seqlen_q, p.head_dim, share.first_piece(chunk),
                               share.pieces(chunk), gradient_scale<C>(p), load);
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ void run() {
    if (launch.one_key_tile) return;
    keys.walk(p, [&](const RowTileVisit& at) { add(at); });
    if (count()) round(before);
    if (leads()) ptx::bulk_wait();
  }
};

}  // namespace fagen

// ---- fagen/sm90/backward/scores.cuh ----------------------------------------------------------------------
// From scores to P, and from dP to dS, on the accumulators of a tile: keys down, rows of q across.


// ---- fagen/common/exp2.cuh -------------------------------------------------------------------------------
// Powers of two on the FMA pipe, for where the special-function unit is what a warp waits for.

namespace fagen {

// 2^x for x <= 0, and 1 beyond; relative error 9e-5, less than half a rounding of fp16. Below -126 it is 0 or nearly.
// x = n + f: n goes into the exponent's bits, 2^f is a polynomial on [0, 1).
__device__ __forceinline__ float exp2_on_fma(float x) {
  constexpr float kLowest = 127.f, kShift = 12582912.f - kLowest;  // 1.5 * 2^23: its last bits count ones
  const float t = __saturatef(fmaf(x, 1.f / kLowest, 1.f));
  const float shifted = __fmaf_rd(t, kLowest, kShift);
  const float f = fmaf(t, kLowest, kShift - shifted);
  const float power = fmaf(fmaf(fmaf(0.07706716f, f, 0.22764487f), f, 0.69511681f), f, 1.f);
  return __int_as_float(__float_as_int(power) + (__float_as_int(shifted) << 23));
}

}  // namespace fagen




namespace fagen {

// A thread's place in an accumulator piece of 16 rows and 8 columns: it holds rows `row` and `row` + 8, columns
// `column` and `column` + 1.
struct Place {
  int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
};

// Exponents of P in base 2: a scaled score, changed by softcap and ALiBi, less the row's LSE.
template <class C>
struct ScoreChange {
  static constexpr float kLog2e = 1.4426950408889634f;
  float scale, cap_log2, slope_log2;
  int shift;
  Dropout dropout;

  __device__ __forceinline__ explicit ScoreChange(const fagen_backward_params& p)
      : scale(C::kSoftcap ? p.scale / p.softcap : p.scale * kLog2e),
        cap_log2(p.softcap * kLog2e),
        slope_log2(0.f),
        shift(p.seqlen_k - p.seqlen_q) {
    if constexpr (C::kDropout) dropout = make_uniform(Dropout::of(p, 0, 0));
  }
  __device__ __forceinline__ void set_head(const fagen_backward_params& p, int batch, int head) {
    if constexpr (C::kAlibi)
      slope_log2 = static_cast<const float*>(p.alibi_slopes.data)[batch * p.alibi_slopes.stride[0] + head] * kLog2e;
    if constexpr (C::kDropout) dropout.plane = batch * p.heads + head;
  }
  // The exponent, and under softcap the derivative of what softcap did.
  __device__ __forceinline__ float exponent(float score, float lse_log2, int distance, float& derivative) const {
    if constexpr (C::kSoftcap) {
      const float t = ptx::tanh_approx(score * scale);
      derivative = 1.f - t * t;
      score = t * cap_log2;
      if constexpr (C::kAlibi) score -= slope_log2 * fabsf(float(distance));
      return score - lse_log2;
    } else if constexpr (C::kAlibi) {
      return fmaf(score, scale, -slope_log2 * fabsf(float(distance))) - lse_log2;
    } else {
      return fmaf(score, scale, -lse_log2);
    }
  }
};

// Whether intervals can hide other rows than the first and the last of those that see a key.
template <class C>
constexpr bool kHidesWithin = MaskOf<C>::kIntervals && (C::kLTE >= 0 || C::kUTS >= 0);

// The rows of q that see a thread's two keys.
template <class C>
struct SeenRows {
  int begin[2], end[2];
  HiddenRows hidden[kHidesWithin<C> ? 2 : 1];

  __device__ __forceinline__ SeenRows(const RowBand& band, int key, uint32_t bounds) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      begin[r] = band.begin(key + r * 8), end[r] = band.end(key + r * 8);
      if constexpr (MaskOf<C>::kIntervals) {
        const uint4 x = ptx::ld_shared_16(bounds + r * 8 * 16);
        if constexpr (kHidesWithin<C>)
          hidden[r] = {int(x.x), int(x.y), int(x.z), int(x.w)};
        else
          begin[r] = max(begin[r], int(x.w)), end[r] = min(end[r], int(x.x));
      }
    }
  }
  __device__ __forceinline__ bool contains(int m, int r) const {
    bool seen = m >= begin[r] && m < end[r];
    if constexpr (kHidesWithin<C>) seen &= !hidden[r].contains(m);
    return seen;
  }
};

// The LSE, or delta, of a thread's rows. Loads from shared memory wait for the products that were started before them,
// so that the LSE comes before those where registers are left for it. Delta takes its place while dP is awaited.
template <class C, bool kSeeded = false>
struct RowStats {
  static constexpr bool kEarly = !kSeeded && C::kTileM == 64 && C::kWarpgroups < 3 && !kHidesWithin<C>;
  uint32_t from;
  float2 held[kEarly ? C::kTileM / 8 : 1];

  __device__ __forceinline__ explicit RowStats(uint32_t from) : from(from) {
#pragma unroll
    for (int j = 0; kEarly && j < C::kTileM / 8; ++j) held[j] = ptx::ld_shared_8(from + j * 32);
  }
  // of the rows that the thread has of a piece
  __device__ __forceinline__ float2 of(int piece) const {
    if (kSeeded) return float2();  // it is in the accumulators
    return kEarly ? held[kEarly ? piece : 0] : ptx::ld_shared_8(from + piece * 32);
  }
};

// Begin accumulators with a value a row.
template <int kPieces>
__device__ __forceinline__ void seed(float (&c)[kPieces][4], uint32_t from) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const float2 stat = ptx::ld_shared_8(from + j * 32);
    c[j][0] = c[j][2] = stat.x, c[j][1] = c[j][3] = stat.y;
  }
}

// 2^x for x <= 0, and 1 beyond: a weight is at most 1, however large scores round. The special-function unit takes 16
// cycles for a weight of each of two warps, which would wait for it alone: some weights are computed by the FMA pipe.
template <class C>
__device__ __forceinline__ float weight_of(float x, int piece) {
  const bool on_fma = piece * C::kExpOnFma % 8 < C::kExpOnFma;
  return on_fma ? exp2_on_fma(x) : ptx::ex2(fminf(x, 0.f));
}

// P in place of the scores. `key` is the thread's first key, `m` its first row of q. Under softcap `derivatives` keeps
// those of its scores.
template <class C, bool kMasked, int kPieces>
__device__ __forceinline__ void exponentiate(float (&s)[kPieces][4], float (&derivatives)[kPieces][4],
                                             const ScoreChange<C>& change, const RowBand& band, int key, int m,
                                             const RowStats<C>& lse, uint32_t bounds) {
  const SeenRows<C> rows(band, key, bounds);
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const float2 lse_log2 = lse.of(j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2, e = i % 2, row = m + j * 8 + e;
      const float x = change.exponent(s[j][i], e ? lse_log2.y : lse_log2.x, row + change.shift - (key + r * 8),
                                      derivatives[C::kSoftcap ? j : 0][i]);
      const float weight = weight_of<C>(x, j);
      s[j][i] = !kMasked || rows.contains(row, r) ? weight : 0.f;
    }
  }
}

// ---- dropout

// The numbers of a thread's weights of 16 lines, which are rows of q, or keys if kTransposed, and of `kPieces` pieces
// of 8 columns. They are drawn while S is computed, or with three warpgroups, which have no registers for that, when it
// has come. Nothing where no weights are dropped.
template <class C, bool kTransposed, int kPieces, bool kDropout = C::kDropout>
struct DrawnWeights {
  template <bool kEarly>
  __device__ __forceinline__ void draw(const Dropout& dropout, int row, int key) {}
  __device__ __forceinline__ uint32_t factors(const Dropout& dropout, int i, int n) const { return 0; }
};

template <class C, bool kTransposed, int kPieces>
struct DrawnWeights<C, kTransposed, kPieces, true> {
  static constexpr int kCallBlocks = kPieces % 4 == 0 ? 2 : 1, kCalls = kPieces / 2 / kCallBlocks;

  uint32_t words[kCalls][2][2];

  // The first row of q and the first key of the warp are given, both multiples of 16.
  template <bool kEarly>
  __device__ __forceinline__ void draw(const Dropout& dropout, int row, int key) {
    if constexpr (kEarly == (C::kWarpgroups < 3)) draw(dropout, row, key);
  }
  // Factors of two weights of line i of piece n.
  __device__ __forceinline__ uint32_t factors(const Dropout& dropout, int i, int n) const {
    const uint32_t (&block)[2] = words[n / 2 / kCallBlocks][n / 2 % kCallBlocks];
    return kept_factors(dropout, block[kTransposed ? n % 2 : i], kTransposed ? i : n % 2);
  }

 private:
  __device__ __forceinline__ void draw(const Dropout& dropout, int row, int key) {
    const Place place;
    const bool odd = place.row % 2;
    const uint32_t lines = place.row / 2, columns = place.column / 2 + (kCallBlocks == 2 && odd ? 4 : 0);
    const uint32_t rows = row / 4 + (kTransposed ? columns : lines), keys = key / 4 + (kTransposed ? lines : columns);
#pragma unroll
    for (int i = 0; i < kCalls; ++i) {
      const uint32_t next = i * kCallBlocks * 4;
      draw_blocks<kTransposed, kCallBlocks == 2>(dropout, dropout.of_row(rows + (kTransposed ? next : 0)),
                                                 dropout.of_key(keys + (kTransposed ? 0 : next)), odd, words[i]);
#pragma unroll
      for (int block = 0; block < kCallBlocks; ++block) ptx::pin(words[i][block][0]), ptx::pin(words[i][block][1]);
    }
  }
};

__device__ __forceinline__ float2 halves_of(uint32_t pair) {
  __half2 halves;
  memcpy(&halves, &pair, 4);
  return __half22float2(halves);
}

// dS of a weight and its dP, which may be less delta already. With dropout dS and delta are divided by what makes up
// for dropped weights: `gradient_scale` has it.
template <class C>
__device__ __forceinline__ float gradient_of_score(float weight, float dp, float delta, float factor) {
  if constexpr (C::kDropout) return weight * fmaf(dp, factor, -delta);
  return weight * (kSeedsDp<C> ? dp : dp - delta);
}

}  // namespace fagen

// ---- fagen/sm90/backward/split_sums.cuh ------------------------------------------------------------------
// dK and dV where the blocks of a cluster share the visits of a key tile: each puts its part into its own shared
// memory, where nothing else is any more, and adds up some units of all parts, in a fixed order.

// ---- fagen/ptx/cluster.cuh -------------------------------------------------------------------------------
// Shared memory of other blocks of a cluster (sm_90).
#include <stdint.h>

namespace fagen::ptx {

// Load 16 bytes from the same place in block `rank` of the cluster.
__device__ __forceinline__ float4 ld_cluster_16(uint32_t from, uint32_t rank) {
  float4 x;
  asm volatile(
      "{\n"
      ".reg .u32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n"
      "}"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(from), "r"(rank)
      : "memory");
  return x;
}

}  // namespace fagen::ptx




namespace fagen {

template <class C>
struct SplitSums {
  using L = BackwardLayout<C>;
  static constexpr int kReaders = (L::kGroups + kLoaderHasDq<C>)*128;  // threads that read tiles

  uint32_t smem;
  int split, splits;
  int group;

  // The producers' side: the whole cluster meets, twice.
  static __device__ __forceinline__ void attend() { ptx::cluster_sync(), ptx::cluster_sync(); }

  // Where this warpgroup's unit is, in every block.
  __device__ __forceinline__ uint32_t place(int unit) const {
    return smem + (group * kUnits<C> + unit) * SplitUnits<C>::kBytes;
  }
  __device__ __forceinline__ void put(int unit, int piece, const float (&c)[4]) const {
    ptx::st_shared_16(place(unit) + piece * kPieceBytes + threadIdx.x % 128 * 16, c[0], c[1], c[2], c[3]);
  }
  // When all have put theirs, call store(unit) for each of the warpgroup's units that this block adds up.
  template <class Store>
  __device__ __forceinline__ void finish(Store store) const {
    ptx::cluster_sync();
#pragma unroll 1
    for (int unit = (split + group * kUnits<C>) % splits; unit < kUnits<C>; unit += splits) store(unit);
    ptx::cluster_sync();  // none ends while others read its shared memory
  }
  // Begins with the block's own part, so that all do not read from one at the same time.
  __device__ __forceinline__ void sum(int unit, float (&c)[SplitUnits<C>::kPieces][4]) const {
#pragma unroll
    for (auto& piece : c) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
#pragma unroll 2
    for (int i = 0; i < splits; ++i) {
      const int part = split + i < splits ? split + i : split + i - splits;
#pragma unroll
      for (int n = 0; n < SplitUnits<C>::kPieces; ++n) {
        const float4 x = ptx::ld_cluster_16(place(unit) + n * kPieceBytes + threadIdx.x % 128 * 16, part);
        c[n][0] += x.x, c[n][1] += x.y, c[n][2] += x.z, c[n][3] += x.w;
      }
    }
  }
};

}  // namespace fagen


namespace fagen {

template <class C, class Element>
struct BackwardConsumer {
  using L = BackwardLayout<C>;
  using Dq = DqShare<C>;
  static constexpr int kPieces = C::kTileM / 8;  // 8 rows each
  static constexpr int kSteps = C::kTileM / 16;  // 16 rows each
  static constexpr int kBarrier = 1;
  using Scores = float[kPieces][4];
  using Fragments = uint32_t[kSteps][4];
  using DqPart = float[Dq::kColumns / 8][4];
  using Lse = RowStats<C>;
  using Delta = RowStats<C, kSeedsDp<C>>;
  using Drawn = DrawnWeights<C, true, kPieces>;

  const fagen_backward_params& p;
  const BackwardLaunch& launch;
  const KeyTile<C>& keys;
  const RowBand& band;
  const int group;
  const Dq share;
  BackwardPipelines<C> pipelines;
  ScoreChange<C> change;
  float dk[C::kHeadDim / 8][4], dv[C::kHeadDimV / 8][4];
  static constexpr bool kVInRegisters = C::kVSource == VSource::registers;
  uint32_t v[kVInRegisters ? C::kHeadDimV / 16 : 1][4];  // this group's keys as an operand

  __device__ __forceinline__ BackwardConsumer(const fagen_backward_params& p, const BackwardLaunch& launch,
                                              const KeyTile<C>& keys, const RowBand& band, uint32_t smem, int group)
      : p(p), launch(launch), keys(keys), band(band), group(group), share{group}, pipelines(smem, group), change(p) {}

  // ---- products: each starts, and is waited for later

  // The product of two operands whose rows are `kDepth` long, of this group's keys and a row tile; added to what the
  // accumulators hold if they are `kSeeded`.
  template <int kDepth, bool kSeeded>
  __device__ __forceinline__ void start_scores(Scores& c, uint32_t of_keys, uint32_t of_rows) const {
    const Operand a = Operand::of_rows(of_keys + group * kGroupKeys * kRowBytes), b = Operand::of_rows(of_rows);
    pin(c);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d) {
      const int within = d % 4 * 32;  // bytes into a slab's row
      ptx::wgmma<C::kTileM, false, false>(c, a.at(d / 4 * C::kTileN * kRowBytes + within),
                                          b.at(d / 4 * C::kTileM * kRowBytes + within), kSeeded || d > 0);
    }
    ptx::wgmma_commit();
  }
  // dP^T = V dO^T
  __device__ __forceinline__ void start_dp(Scores& dp) {
    if constexpr (kVInRegisters) {
      const Operand b = Operand::of_rows(pipelines.dout.tile());
      pin(dp), pin(v);
      ptx::wgmma_fence();
#pragma unroll
      for (int d = 0; d < C::kHeadDimV / 16; ++d)
        ptx::wgmma<C::kTileM, false>(dp, v[d], b.at(d / 4 * C::kTileM * kRowBytes + d % 4 * 32), kSeedsDp<C> || d > 0);
      ptx::wgmma_commit();
    } else {
      start_scores<C::kHeadDimV, kSeedsDp<C>>(dp, pipelines.v.tile(), pipelines.dout.tile());
    }
  }
  // A lane names a row of V and the swizzled place of its half of 16 columns.
  __device__ __forceinline__ void load_v() {
    const int lane = threadIdx.x % 32, row = group * kGroupKeys + threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t place = pipelines.v.tile() + row * kRowBytes + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
    for (int d = 0; d < C::kHeadDimV / 16; ++d)
      ptx::ldmatrix_x4(v[d], (place ^ d % 4 * 32) + d / 4 * C::kTileN * kRowBytes);
  }
  // dV += P^T dO, or dK += dS^T Q
  template <int kColumns>
  __device__ __forceinline__ void start_gradient(float (&c)[kColumns / 8][4], Fragments& a, uint32_t rows) {
    const Operand b = Operand::of_columns(rows, C::kTileM * kRowBytes);
    pin(c), pin(a);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < kSteps; ++n) ptx::wgmma<kColumns, true>(c, a[n], b.at(n * 2048), true);
    ptx::wgmma_commit();
  }

  // ---- between products

  template <bool kMasked>
  __device__ __forceinline__ void exponentiate(Scores& s, Scores& derivatives, const Lse& lse, const RowTileVisit& at) {
    const Place place;
    const int key = group * kGroupKeys + threadIdx.x / 32 % 4 * 16 + place.row;
    fagen::exponentiate<C, kMasked>(s, derivatives, change, band, keys.n0 + key, at.tile * C::kTileM + place.column,
                                    lse, pipelines.smem + L::kBounds + key * 16);
  }
  // dS in place of dP
  __device__ __forceinline__ void form_ds(const Scores& s, Scores& dp, const Scores& derivatives, const Delta& delta,
                                          const Drawn& drawn) const {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const uint32_t factors[2] = {drawn.factors(change.dropout, 0, j), drawn.factors(change.dropout, 1, j)};
      form_piece(s, dp, derivatives, delta, factors, j);
    }
  }
  // The same with P as it counts for dV, step by step: factors of dropped weights are made once, and are not held.
  __device__ __forceinline__ void form_both(Fragments& weights, const Scores& s, Scores& dp, const Scores& derivatives,
                                            const Delta& delta, const Drawn& drawn) const {
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      uint32_t factors[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) factors[i / 2][i % 2] = drawn.factors(change.dropout, i % 2, 2 * n + i / 2);
#pragma unroll
      for (int j = 0; j < 2; ++j) form_piece(s, dp, derivatives, delta, factors[j], 2 * n + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[n][i] = multiply_factors<Element>(pair_of(s, n, i), factors[i / 2][i % 2]);
    }
  }
  __device__ __forceinline__ void form_piece(const Scores& s, Scores& dp, const Scores& derivatives, const Delta& delta,
                                             const uint32_t (&factors)[2], int j) const {
    const float2 of_rows = delta.of(j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 halves = halves_of(factors[i / 2]);
      dp[j][i] = gradient_of_score<C>(s[j][i], dp[j][i], i % 2 ? of_rows.y : of_rows.x, i % 2 ? halves.y : halves.x);
      if constexpr (C::kSoftcap) dp[j][i] *= derivatives[j][i];
    }
  }
  static __device__ __forceinline__ uint32_t pair_of(const Scores& c, int n, int i) {
    const float* pair = &c[2 * n + i / 2][i % 2 * 2];
    return pack<Element>(pair[0], pair[1]);
  }
  static __device__ __forceinline__ void pack_operand(Fragments& operand, const Scores& c) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) operand[n][i] = pair_of(c, n, i);
  }
  // P as it counts for dV.
  __device__ __forceinline__ void pack_weights(Fragments& weights, const Scores& s, const Drawn& drawn) const {
    pack_operand(weights, s);
#pragma unroll
    for (int i = 0; C::kDropout && i < kSteps * 4; ++i) {
      uint32_t& pair = weights[i / 4][i % 4];
      pair = multiply_factors<Element>(pair, drawn.factors(change.dropout, i % 2, i / 4 * 2 + i % 4 / 2));
    }
  }
  // dS, rows of q down, this group's keys in a slab of their own. The others may read it after a fence and a barrier.
  __device__ __forceinline__ void store_ds(const Fragments& ds) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const uint32_t tile = kLoaderHasDq<C> ? pipelines.handed_ds.tile() : pipelines.ds();
    const uint32_t row = tile + group * L::kDsSlabBytes + (lane / 16 * 8 + lane % 8) * kRowBytes;
    const uint32_t place = row + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int n = 0; n < kSteps; ++n) ptx::stmatrix_x4_trans(place + n * 16 * kRowBytes, ds[n]);
  }

  // ---- a row tile

  // All of it lies in one branch, so that the exponentials mix with what follows them: alone they would wait for the
  // special-function unit.
  template <bool kMasked>
  __device__ __forceinline__ void visit(const RowTileVisit& at) {
    Scores s, dp, derivatives;  // of this visit alone, or their registers would be held between visits
    Fragments weights, ds;      // P^T and dS^T
    if (C::kAlibi || C::kDropout) change.set_head(p, keys.batch, at.head);
    pipelines.q.wait();
    const uint32_t of_lse = pipelines.lse() + Place().column * 4, of_delta = pipelines.delta() + Place().column * 4;
    const Lse lse(of_lse);
    if constexpr (kSeedsDp<C>) seed(dp, of_delta), pin(dp);
    start_scores<C::kHeadDim, false>(s, pipelines.k.tile(), pipelines.q.tile());
    pipelines.dout.wait();
    start_dp(dp);
    Drawn drawn;
    const int first_key = keys.n0 + group * kGroupKeys + threadIdx.x / 32 % 4 * 16;
    drawn.template draw<true>(change.dropout, at.tile * C::kTileM, first_key);
    ptx::wgmma_wait<1>();
    pin(s);
    exponentiate<kMasked>(s, derivatives, lse, at);
    drawn.template draw<false>(change.dropout, at.tile * C::kTileM, first_key);
    const Delta delta(of_delta);
    if constexpr (C::kDvStart == DvStart::before_ds) {
      pack_weights(weights, s, drawn);
      start_gradient<C::kHeadDimV>(dv, weights, pipelines.dout.tile());
    }
    ptx::wgmma_wait<(C::kDvStart == DvStart::before_ds ? 1 : 0)>();
    pin(dp);
    if constexpr (C::kDropout && C::kDvStart != DvStart::before_ds) {
      form_both(weights, s, dp, derivatives, delta, drawn);
    } else {
      form_ds(s, dp, derivatives, delta, drawn);
      if constexpr (C::kDvStart != DvStart::before_ds) pack_weights(weights, s, drawn);
    }
    pack_operand(ds, dp);
    if constexpr (C::kDvStart == DvStart::after_ds) start_gradient<C::kHeadDimV>(dv, weights, pipelines.dout.tile());
    wait_for_ds();
    store_ds(ds);
    if constexpr (C::kDvStart == DvStart::after_store) start_gradient<C::kHeadDimV>(dv, weights, pipelines.dout.tile());
    hand_ds_over();
    if (!kLoaderHasDq<C> && share.owns())
      finish_with_dq(ds, at);
    else
      finish(ds);
    pipelines.q.release();
    if (++pipelines.ds_stage == C::kDsStages) pipelines.ds_stage = 0;
  }

  // The place of this visit's dS is free: all have read the one before.
  __device__ __forceinline__ void wait_for_ds() const {
    if constexpr (kLoaderHasDq<C>)
      pipelines.handed_ds.acquire();
    else if constexpr (C::kDsStages == 1)
      ptx::barrier_sync(kBarrier + 1, L::kGroups * 128);
  }
  // dS may be read: by the loader, or by all consumers when all of them are here.
  __device__ __forceinline__ void hand_ds_over() {
    ptx::fence_shared_writes();
    if constexpr (kLoaderHasDq<C>) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(pipelines.handed_ds.full());
      pipelines.handed_ds.advance();
    } else {
      ptx::barrier_sync(kBarrier, L::kGroups * 128);
    }
  }

  __device__ __forceinline__ void sink(const DqPart& dq, int chunk, const RowTileVisit& at) {
    if (launch.one_key_tile)
      store_dq<C, Element>(p, dq, share, chunk, keys.batch, at);
    else
      sink_dq<C>(dq, share, chunk, pipelines,
                 dq_sums<C>(launch, row_tile_index<C>(p, launch, keys.batch, at.head, at.tile)));
  }
  // dV is under way, dS is there: dK, and dQ where this group has a part of it.
  __device__ __forceinline__ void finish(Fragments& ds) {
    start_gradient<C::kHeadDim>(dk, ds, pipelines.q.tile());
    ptx::wgmma_wait<1>();
    pin(dv);
    pipelines.dout.release();
    ptx::wgmma_wait<0>();
    pin(dk);
  }
  __device__ __forceinline__ void finish_with_dq(Fragments& ds, const RowTileVisit& at) {
    DqPart dq;
    start_dq<C>(dq, share, 0, pipelines.ds(), pipelines.k.tile());
    ptx::wgmma_wait<1>();
    pin(dv);
    pipelines.dout.release();
    start_gradient<C::kHeadDim>(dk, ds, pipelines.q.tile());
    ptx::wgmma_wait<1>();
    pin(dq);
    sink(dq, 0, at);
    ptx::wgmma_wait<0>();
    pin(dk);
#pragma unroll
    for (int chunk = 1; chunk < Dq::kChunks; ++chunk) {
      start_dq<C>(dq, share, chunk, pipelines.ds(), pipelines.k.tile());
      ptx::wgmma_wait<0>();
      pin(dq);
      sink(dq, chunk, at);
    }
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (auto& piece : dk) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
#pragma unroll
    for (auto& piece : dv) piece[0] = piece[1] = piece[2] = piece[3] = 0.f;
    pipelines.k.wait();
    pipelines.v.wait();
    if constexpr (kVInRegisters) load_v();
    keys.walk(p, [&](const RowTileVisit& at) {
      if (at.partial)
        visit<true>(at);
      else
        visit<false>(at);
    });
    const float dk_scale = gradient_scale<C>(p), dv_scale = scale_up_pairs<C, Element>(p, 1.f);
    if (kMostSplits<C> > 1 && keys.splits > 1) {
      const SplitSums<C> sums{pipelines.smem, keys.split, keys.splits, group};
      ptx::barrier_sync(kBarrier, SplitSums<C>::kReaders);  // no tile is read any more
      put<C::kHeadDim>(sums, 0, dk);
      put<C::kHeadDimV>(sums, kDkUnits<C>, dv);
      sums.finish([&](int unit) {
        float c[4][4];
        sums.sum(unit, c);
        if (unit < kDkUnits<C>)
          store<C::kHeadDim, 1>(p.dk, p.head_dim, dk_scale, unit * 4, 4, values_of(c));
        else
          store<C::kHeadDimV, 1>(p.dv, p.head_dim_v, dv_scale, (unit - kDkUnits<C>)*4, 4, values_of(c));
      });
    } else {
      store<C::kHeadDim, (C::kHeadDim + 31) / 32>(p.dk, p.head_dim, dk_scale, 0, C::kHeadDim / 8, values_of(dk));
      store<C::kHeadDimV, (C::kHeadDimV + 31) / 32>(p.dv, p.head_dim_v, dv_scale, 0, C::kHeadDimV / 8, values_of(dv));
    }
  }

  // Units of 4 pieces, the last one of fewer.
  template <int kColumns>
  __device__ __forceinline__ void put(const SplitSums<C>& sums, int first, const float (&c)[kColumns / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) sums.put(first + n / 4, n % 4, c[n]);
  }
  template <class Pieces>
  static __device__ __forceinline__ auto values_of(const Pieces& c) {
    return [&c](int n) { return make_float4(c[n][0], c[n][1], c[n][2], c[n][3]); };
  }
  // Store 64 keys of a gradient, `pieces` of 8 columns.
  template <int kColumns, int kUnroll, class Load>
  __device__ __forceinline__ void store(const fagen_tensor& to, int columns, float scale, int first_piece, int pieces,
                                        Load load) const {
    const int key = keys.n0 + group * kGroupKeys + threadIdx.x / 32 % 4 * 16 + Place().row;
    store_rows<Element, kUnroll>(to, keys.batch, keys.kv_head, key, p.seqlen_k, columns, first_piece,
                                 min(pieces, kColumns / 8 - first_piece), scale, load);
  }
};

}  // namespace fagen

// ---- fagen/sm90/backward/dq_loader.cuh -------------------------------------------------------------------
// The warpgroup that loads all tiles and computes dQ = dS K of what the consumers hand over (dq_owner=loader). They
// wait neither for each other nor for dQ, so that one forms P and dS while products of the other are computed.

// ---- fagen/sm90/backward/producer.cuh --------------------------------------------------------------------
// The producer warps: one loads k and q with its LSE and delta, one loads v and dO. One lane of each talks to the copy
// engine.




namespace fagen {

template <class C>
struct BackwardProducer {
  using L = BackwardLayout<C>;

  const fagen_backward_params& p;
  const BackwardLaunch& launch;
  const KeyTile<C>& keys;
  BackwardPipelines<C> pipelines;

  template <int kSlabs, int kRows>
  __device__ __forceinline__ void load(const CUtensorMap& map, uint32_t to, uint32_t barrier, int row, int head) const {
    for (int slab = 0; slab < kSlabs; ++slab)
      ptx::tma_load(to + slab * kRows * kRowBytes, &map, barrier, slab * kSlabColumns, row, head, keys.batch);
  }
  __device__ __forceinline__ void load_keys() const {
    ptx::mbarrier_arrive_expect(pipelines.k.full(), L::kKBytes);
    load<L::kSlabs, C::kTileN>(launch.k, pipelines.k.tile(), pipelines.k.full(), keys.n0, keys.kv_head);
  }
  __device__ __forceinline__ void load_values() const {
    ptx::mbarrier_arrive_expect(pipelines.v.full(), L::kVBytes);
    load<L::kSlabsV, C::kTileN>(launch.v, pipelines.v.tile(), pipelines.v.full(), keys.n0, keys.kv_head);
  }
  __device__ __forceinline__ void load_q(const RowTileVisit& at) {
    pipelines.q.acquire();
    ptx::mbarrier_arrive_expect(pipelines.q.full(), L::kQBytes + 2 * L::kStatBytes);
    load<L::kSlabs, C::kTileM>(launch.q, pipelines.q.tile(), pipelines.q.full(), at.tile * C::kTileM, at.head);
    const int64_t tile = row_tile_index<C>(p, launch, keys.batch, at.head, at.tile);
    ptx::bulk_load(pipelines.lse(), launch.lse + tile * C::kTileM, L::kStatBytes, pipelines.q.full());
    ptx::bulk_load(pipelines.delta(), launch.delta + tile * C::kTileM, L::kStatBytes, pipelines.q.full());
    pipelines.q.advance();
  }
  __device__ __forceinline__ void load_dout(const RowTileVisit& at) {
    pipelines.dout.acquire();
    ptx::mbarrier_arrive_expect(pipelines.dout.full(), L::kDoutBytes);
    load<L::kSlabsV, C::kTileM>(launch.dout, pipelines.dout.tile(), pipelines.dout.full(), at.tile * C::kTileM,
                                at.head);
    pipelines.dout.advance();
  }

  // Each is one lane's work.
  __device__ __forceinline__ void run_q() {
    load_keys();
    ptx::wait_for_previous_kernel();  // for the LSE and delta
    keys.walk(p, [&](const RowTileVisit& at) { load_q(at); });
  }
  __device__ __forceinline__ void run_dout() {
    load_values();
    keys.walk(p, [&](const RowTileVisit& at) { load_dout(at); });
  }
  __device__ __forceinline__ void run_both() {
    load_keys(), load_values();
    ptx::wait_for_previous_kernel();
    keys.walk(p, [&](const RowTileVisit& at) { load_q(at), load_dout(at); });
  }
};

}  // namespace fagen


namespace fagen {

template <class C, class Element>
struct DqLoader {
  using L = BackwardLayout<C>;
  using Dq = DqShare<C>;
  using DqPart = float[Dq::kColumns / 8][4];
  // visits that are loaded before the one whose dQ is next
  static constexpr int kAhead = (C::kQStages < C::kDoutStages ? C::kQStages : C::kDoutStages) - 1;

  BackwardProducer<C> producer;
  const int warp;
  const Dq share = {0};

  __device__ __forceinline__ void load(const RowTileVisit& at) {
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) producer.load_q(at);
      if (warp == 1) producer.load_dout(at);
    }
    __syncwarp();
  }
  // dQ of a visit, of the row tile with this index among those of all heads.
  __device__ __forceinline__ void add(int row_tile) {
    auto& pipelines = producer.pipelines;
    pipelines.handed_ds.wait();
#pragma unroll
    for (int chunk = 0; chunk < Dq::kChunks; ++chunk) {
      DqPart dq;
      start_dq<C>(dq, share, chunk, pipelines.handed_ds.tile(), pipelines.k.tile());
      ptx::wgmma_wait<0>();
      pin(dq);
      if (chunk == Dq::kChunks - 1) pipelines.handed_ds.release();
      sink_dq<C>(dq, share, chunk, pipelines, dq_sums<C>(producer.launch, row_tile));
    }
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) producer.load_keys();
      if (warp == 1) producer.load_values();
    }
    ptx::wait_for_previous_kernel();
    int visits = 0, row_tiles[kAhead];  // of those loaded, the oldest first
    const auto shift = [&](int row_tile) {
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i) row_tiles[i] = row_tiles[i + 1];
      row_tiles[kAhead - 1] = row_tile;
    };
    producer.keys.walk(producer.p, [&](const RowTileVisit& at) {
      load(at);
      if (visits == 0) producer.pipelines.k.wait();
      if (visits >= kAhead) add(row_tiles[0]);
      shift(row_tile_index<C>(producer.p, producer.launch, producer.keys.batch, at.head, at.tile));
      ++visits;
    });
#pragma unroll 1
    for (int i = kAhead; i > 0; --i) {
      if (i <= visits) add(row_tiles[0]);
      shift(0);
    }
    if (kMostSplits<C> > 1 && producer.keys.splits > 1) {
      ptx::barrier_sync(BackwardConsumer<C, Element>::kBarrier, SplitSums<C>::kReaders);
      SplitSums<C>::attend();
    }
  }
};

}  // namespace fagen


// ---- fagen/sm90/backward/shared_consumer.cuh -------------------------------------------------------------
// A consumer warpgroup of large head dims, where a thread cannot hold 64 keys of dK and dV. Of a row tile's scores it
// computes some keys' columns; P and dS go by shared memory, and of dK^T, dV^T and dQ each warpgroup has some of the
// columns of a head.





namespace fagen {

template <class C, class Element>
struct SharedConsumer {
  using L = BackwardLayout<C>;
  using Dq = DqShare<C>;
  static constexpr int kKeys = C::kTileN / L::kGroups, kPieces = kKeys / 8;  // of the scores of this group
  static constexpr int kDkChunks = (L::kSlabs + L::kGroups - 1) / L::kGroups;  // slabs of 64 columns of a head
  static constexpr int kDvChunks = (L::kSlabsV + L::kGroups - 1) / L::kGroups;
  static constexpr bool kDvFirst = C::kDvStart == DvStart::after_store;  // before all have stored dS
  static constexpr int kBarrier = 1;  // of all consumers; two more, and one for each group
  using Scores = float[kPieces][4];
  using DqPart = float[Dq::kColumns / 8][4];
  using Factors = uint32_t[kPieces][2];  // of pairs of weights, which dropout makes 0
  using Drawn = DrawnWeights<C, false, kPieces>;
  using Gradient = float[C::kTileN / 8][4];  // 64 columns of a head down, keys across

  const fagen_backward_params& p;
  const BackwardLaunch& launch;
  const KeyTile<C>& keys;
  const RowBand& band;
  const int group;
  const Dq share;
  BackwardPipelines<C> pipelines;
  ScoreChange<C> change;
  Gradient dk[kDkChunks], dv[kDvChunks];

  __device__ __forceinline__ SharedConsumer(const fagen_backward_params& p, const BackwardLaunch& launch,
                                            const KeyTile<C>& keys, const RowBand& band, uint32_t smem, int group)
      : p(p), launch(launch), keys(keys), band(band), group(group), share{group}, pipelines(smem, group), change(p) {}

  // A slab of this group's columns. Where the slabs do not go round the last one is computed twice, and stored once.
  template <int kSlabs>
  __device__ __forceinline__ int slab_of(int chunk) const {
    constexpr bool kEven = kSlabs % L::kGroups == 0;
    const int slab = chunk * L::kGroups + group;
    return kEven ? slab : min(slab, kSlabs - 1);
  }
  __device__ __forceinline__ uint32_t weights() const { return pipelines.ds(); }
  __device__ __forceinline__ uint32_t ds() const { return pipelines.ds() + L::kDsTileBytes; }

  // ---- products: each starts, and is waited for later

  template <int kDepth, bool kSeeded>
  __device__ __forceinline__ void start_scores(Scores& c, uint32_t of_rows, uint32_t of_keys) const {
    const Operand a = Operand::of_rows(of_rows), b = Operand::of_rows(of_keys + group * kKeys * kRowBytes);
    pin(c);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d) {
      const int within = d % 4 * 32;  // bytes into a slab's row
      ptx::wgmma<kKeys, false, false>(c, a.at(d / 4 * C::kTileM * kRowBytes + within),
                                      b.at(d / 4 * C::kTileN * kRowBytes + within), kSeeded || d > 0);
    }
    ptx::wgmma_commit();
  }
  // dV^T += dO^T P, or dK^T += Q^T dS: chunks from kFirst on, `kSome` of them
  template <int kSlabs, int kFirst, int kSome, int kChunks>
  __device__ __forceinline__ void start_gradient(Gradient (&c)[kChunks], uint32_t of_columns, uint32_t weights) const {
    const Operand b = Operand::of_columns(weights, L::kDsSlabBytes);
#pragma unroll
    for (int chunk = kFirst; chunk < kFirst + kSome; ++chunk) pin(c[chunk]);
    ptx::wgmma_fence();
#pragma unroll
    for (int chunk = kFirst; chunk < kFirst + kSome; ++chunk) {
      const Operand a = Operand::of_columns(of_columns + slab_of<kSlabs>(chunk) * C::kTileM * kRowBytes, 0);
#pragma unroll
      for (int n = 0; n < C::kTileM / 16; ++n)
        ptx::wgmma<C::kTileN, true, true>(c[chunk], a.at(n * 2048), b.at(n * 2048), true);
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void start_dv() {
    start_gradient<L::kSlabsV, 0, kDvChunks>(dv, pipelines.dout.tile(), weights());
  }
  template <int kFirst = 0, int kSome = kDkChunks>
  __device__ __forceinline__ void start_dk() {
    start_gradient<L::kSlabs, kFirst, kSome>(dk, pipelines.q.tile(), ds());
  }
  // dQ = dS K
  __device__ __forceinline__ void start_dq(DqPart& dq, int chunk) const {
    const Operand a = Operand::of_rows(ds());
    const Operand b = Operand::of_columns(pipelines.k.tile() + share.slab(chunk) * C::kTileN * kRowBytes, 0);
    pin(dq);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < C::kTileN / 16; ++n)
      ptx::wgmma<Dq::kColumns, false, true>(dq, a.at(n / 4 * L::kDsSlabBytes + n % 4 * 32), b.at(n * 2048), n > 0);
    ptx::wgmma_commit();
  }
  template <int kChunks>
  static __device__ __forceinline__ void pin_all(Gradient (&c)[kChunks]) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) pin(c[chunk]);
  }

  // ---- between products

  // The rows that a thread has, in the tile.
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 % 4 * 16 + Place().row; }

  // The LSE, or delta, of a thread's rows. Loads wait for the products that were started before them.
  static __device__ __forceinline__ void load_stats(float (&stats)[2], uint32_t from) {
#pragma unroll
    for (int r = 0; r < 2; ++r) stats[r] = __uint_as_float(ptx::ld_shared_4(from + (first_row() + r * 8) * 4));
  }

  // Begin accumulators with a value a row.
  static __device__ __forceinline__ void seed(Scores& c, const float (&stats)[2]) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) c[j][0] = c[j][1] = stats[0], c[j][2] = c[j][3] = stats[1];
  }

  // P in place of the scores.
  template <bool kMasked>
  __device__ __forceinline__ void exponentiate(Scores& s, Scores& derivatives, const RowTileVisit& at,
                                               const float (&lse_log2)[2]) {
    const int row0 = at.tile * C::kTileM + first_row(), key0 = keys.n0 + group * kKeys + Place().column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int m = row0 + r * 8;
      const int begin = max(0, m + band.first) - key0, end = min(band.seqlen_k, m + band.last + 1) - key0;
#pragma unroll
      for (int j = 0; j < kPieces; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[j][r * 2 + e];
          const int key = j * 8 + e;
          const float exponent = change.exponent(x, lse_log2[r], m + change.shift - (key0 + key),
                                                 derivatives[C::kSoftcap ? j : 0][r * 2 + e]);
          x = weight_of<C>(exponent, j);
          if (kMasked && (key < begin || key >= end)) x = 0.f;
        }
    }
    if constexpr (kMasked && MaskOf<C>::kIntervals) clear_hidden(s, row0);
  }
  __device__ __forceinline__ void clear_hidden(Scores& s, int row0) const {
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = group * kKeys + Place().column + j * 8 + e;
        const uint4 x = ptx::ld_shared_16(pipelines.smem + L::kBounds + key * 16);
        const HiddenRows hidden = {int(x.x), int(x.y), int(x.z), int(x.w)};
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (hidden.contains(row0 + r * 8)) s[j][r * 2 + e] = 0.f;
      }
  }
  __device__ __forceinline__ void form_ds(const Scores& s, Scores& dp, const Scores& derivatives,
                                          const float (&delta)[2], const Factors& factors) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = r * 2 + e;
          const float2 both = halves_of(factors[j][r]);
          dp[j][i] = gradient_of_score<C>(s[j][i], dp[j][i], delta[r], e ? both.y : both.x);
          if constexpr (C::kSoftcap) dp[j][i] *= derivatives[j][i];
        }
    }
  }
  // Rows of q down, this group's keys among those of all. kWeights: as they count for dV.
  template <bool kWeights>
  __device__ __forceinline__ void store(uint32_t tile, const Scores& c, const Factors& factors) const {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const auto place = [&](int piece) {
      return tile + piece / 8 * L::kDsSlabBytes + row * kRowBytes + ((piece % 8 ^ lane % 8) << 4);
    };
    const auto word = [&](int j, int r) {
      const uint32_t pair = pack<Element>(c[j][r * 2], c[j][r * 2 + 1]);
      if constexpr (C::kDropout && kWeights) return multiply_factors<Element>(pair, factors[j][r]);
      return pair;
    };
    const int first = group * kPieces;
#pragma unroll
    for (int j = 0; j + 1 < kPieces; j += 2)
      ptx::stmatrix_x4(place(first + j + lane / 16), {word(j, 0), word(j, 1), word(j + 1, 0), word(j + 1, 1)});
    if constexpr (kPieces % 2) ptx::stmatrix_x2(place(first + kPieces - 1), word(kPieces - 1, 0), word(kPieces - 1, 1));
  }

  // ---- a row tile

  // All of it lies in one branch, so that the exponentials mix with what follows them.
  template <bool kMasked>
  __device__ __forceinline__ void visit(const RowTileVisit& at) {
    Scores s, dp, derivatives;  // of this visit alone, or their registers would be held between visits
    if (C::kAlibi || C::kDropout) change.set_head(p, keys.batch, at.head);
    pipelines.q.wait();
    float lse[2], delta[2];
    load_stats(lse, pipelines.lse());
    load_stats(delta, pipelines.delta());
    if constexpr (kSeedsDp<C>) seed(dp, delta), pin(dp);
    start_scores<C::kHeadDim, false>(s, pipelines.q.tile(), pipelines.k.tile());
    pipelines.dout.wait();
    start_scores<C::kHeadDimV, kSeedsDp<C>>(dp, pipelines.dout.tile(), pipelines.v.tile());
    Drawn drawn;
    const int first_row = at.tile * C::kTileM + threadIdx.x / 32 % 4 * 16, first_key = keys.n0 + group * kKeys;
    drawn.template draw<true>(change.dropout, first_row, first_key);
    ptx::wgmma_wait<1>();
    pin(s);
    exponentiate<kMasked>(s, derivatives, at, lse);
    drawn.template draw<false>(change.dropout, first_row, first_key);
    Factors factors;
#pragma unroll
    for (int i = 0; i < kPieces * 2; ++i) factors[i / 2][i % 2] = drawn.factors(change.dropout, i % 2, i / 2);
    if constexpr (C::kDsStages == 1) ptx::barrier_sync(kBarrier + 1, L::kGroups * 128);  // all have read the last ones
    if constexpr (C::kDvStart != DvStart::after_ds) store<true>(weights(), s, factors);
    if constexpr (kDvFirst) meet();
    ptx::wgmma_wait<0>();
    pin(dp);
    form_ds(s, dp, derivatives, delta, factors);
    if constexpr (C::kDvStart == DvStart::after_ds) store<true>(weights(), s, factors);
    store<false>(ds(), dp, factors);
    if constexpr (kDvFirst) start_dv();
    meet();
    if constexpr (!Dq::kEach)
      finish_unevenly(at);
    else if constexpr (kDvFirst)
      finish_behind_dv(at);
    else
      finish(at);
    pipelines.q.release();
    if (++pipelines.ds_stage == C::kDsStages) pipelines.ds_stage = 0;
  }

  // All have stored what the others read.
  static __device__ __forceinline__ void meet() {
    ptx::fence_shared_writes();
    ptx::barrier_sync(kBarrier, L::kGroups * 128);
  }
  __device__ __forceinline__ void sink(const DqPart& dq, int chunk, const RowTileVisit& at) {
    sink_dq<C>(dq, share, chunk, pipelines,
               dq_sums<C>(launch, row_tile_index<C>(p, launch, keys.batch, at.head, at.tile)));
  }

  // P and dS are there: dQ, dV and dK. A chunk of dQ leaves while another product is under way.
  __device__ __forceinline__ void finish(const RowTileVisit& at) {
    DqPart dq;
    start_dq(dq, 0);
    start_dv();
    ptx::wgmma_wait<1>();
    pin(dq);
    sink(dq, 0, at);
    if constexpr (Dq::kChunks > 1) start_dq(dq, 1);
    start_dk();
    ptx::wgmma_wait<(Dq::kChunks > 1 ? 2 : 1)>();
    pin_all(dv);
    pipelines.dout.release();
    if constexpr (Dq::kChunks > 1) {
      ptx::wgmma_wait<1>();
      pin(dq);
      sink(dq, 1, at);
    }
    ptx::wgmma_wait<0>();
    pin_all(dk);
    finish_dq<2>(dq, at);
  }
  // The same, dV is under way.
  __device__ __forceinline__ void finish_behind_dv(const RowTileVisit& at) {
    constexpr int kBefore = Dq::kChunks > 1 ? kDkChunks / 2 : 0, kRest = kDkChunks - kBefore;
    DqPart dq;
    start_dq(dq, 0);
    if constexpr (Dq::kChunks == 1) start_dk();
    if constexpr (kBefore > 0) start_dk<0, kBefore>();
    ptx::wgmma_wait<(Dq::kChunks == 1 || kBefore > 0 ? 1 : 0)>();
    pin_all(dv);
    pipelines.dout.release();
    pin(dq);
    sink(dq, 0, at);
    if constexpr (Dq::kChunks > 1) {
      start_dq(dq, 1);
      start_dk<kBefore, kRest>();
      ptx::wgmma_wait<1>();
      pin(dq);
      sink(dq, 1, at);
    }
    ptx::wgmma_wait<0>();
    pin_all(dk);
    finish_dq<2>(dq, at);
  }
  // Not every group has all chunks of dQ.
  __device__ __forceinline__ void finish_unevenly(const RowTileVisit& at) {
    DqPart dq;
    if constexpr (!kDvFirst) start_dv();
    start_dk();
    ptx::wgmma_wait<1>();
    pin_all(dv);
    pipelines.dout.release();
    ptx::wgmma_wait<0>();
    pin_all(dk);
    finish_dq<0>(dq, at);
  }
  template <int kFirst>
  __device__ __forceinline__ void finish_dq(DqPart& dq, const RowTileVisit& at) {
#pragma unroll
    for (int chunk = kFirst; chunk < Dq::kChunks; ++chunk)
      if (share.owns(chunk)) {
        start_dq(dq, chunk);
        ptx::wgmma_wait<0>();
        pin(dq);
        sink(dq, chunk, at);
      }
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < kDkChunks * C::kTileN / 8 * 4; ++i)
      dk[i / (C::kTileN / 2)][i / 4 % (C::kTileN / 8)][i % 4] = 0.f;
#pragma unroll
    for (int i = 0; i < kDvChunks * C::kTileN / 8 * 4; ++i)
      dv[i / (C::kTileN / 2)][i / 4 % (C::kTileN / 8)][i % 4] = 0.f;
    pipelines.k.wait();
    pipelines.v.wait();
    keys.walk(p, [&](const RowTileVisit& at) {
      if (at.partial)
        visit<true>(at);
      else
        visit<false>(at);
    });
    const float dk_scale = gradient_scale<C>(p), dv_scale = scale_up_pairs<C, Element>(p, 1.f);
    if (kMostSplits<C> > 1 && keys.splits > 1) {
      const SplitSums<C> sums{pipelines.smem, keys.split, keys.splits, group};
      ptx::barrier_sync(kBarrier, SplitSums<C>::kReaders);  // no tile is read any more
      put(sums, 0, dk);
      put(sums, kDkChunks, dv);
      sums.finish([&](int unit) {
        const bool of_dk = unit < kDkChunks;
        const int slab = (of_dk ? unit : unit - kDkChunks) * L::kGroups + group;
        if (slab >= (of_dk ? L::kSlabs : L::kSlabsV)) return;
        Gradient c;
        sums.sum(unit, c);
        ptx::barrier_sync(kBarrier + 2 + group, 128);  // others have no use for this unit: its place is free
        if (of_dk)
          store_slab(p.dk, c, sums.place(unit), slab, p.head_dim, dk_scale);
        else
          store_slab(p.dv, c, sums.place(unit), slab, p.head_dim_v, dv_scale);
      });
    } else {
      ptx::barrier_sync(kBarrier, L::kGroups * 128);  // k and v have been read: their places are free
      store_gradient<L::kSlabs>(p.dk, dk, pipelines.k.tile(), p.head_dim, dk_scale);
      store_gradient<L::kSlabsV>(p.dv, dv, pipelines.v.tile(), p.head_dim_v, dv_scale);
    }
  }

  // A chunk is a unit.
  template <int kChunks>
  __device__ __forceinline__ void put(const SplitSums<C>& sums, int first, const Gradient (&c)[kChunks]) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
      for (int n = 0; n < C::kTileN / 8; ++n) sums.put(first + chunk, n, c[chunk][n]);
  }

  template <int kSlabs, int kChunks>
  __device__ __forceinline__ void store_gradient(const fagen_tensor& to, const Gradient (&c)[kChunks], uint32_t place,
                                                 int columns, float scale) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int slab = chunk * L::kGroups + group;
      if (slab < kSlabs) store_slab(to, c[chunk], place + slab * C::kTileN * kRowBytes, slab, columns, scale);
    }
  }
  // Transpose 64 columns into a place that is free, and store rows of 128 bytes.
  __device__ __forceinline__ void store_slab(const fagen_tensor& to, const Gradient& c, uint32_t place, int slab,
                                             int columns, float scale) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, thread = threadIdx.x % 128;
    const uint32_t into = place + (lane / 16 * 8 + lane % 8) * kRowBytes + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int n = 0; n < C::kTileN / 16; ++n) {
      const auto word = [&](int i) {
        const float* pair = &c[2 * n + i / 2][i % 2 * 2];
        return pack<Element>(pair[0] * scale, pair[1] * scale);
      };
      ptx::stmatrix_x4_trans(into + n * 16 * kRowBytes, {word(0), word(1), word(2), word(3)});
    }
    ptx::barrier_sync(kBarrier + 2 + group, 128);
    const int column = slab * kSlabColumns + thread % 8 * 8;
    Element* out = static_cast<Element*>(to.data) + keys.batch * to.stride[0] + keys.kv_head * to.stride[2] + column;
#pragma unroll 1
    for (int row = thread / 8; row < C::kTileN; row += 16)
      if (keys.n0 + row < p.seqlen_k && column < columns)
        *reinterpret_cast<uint4*>(out + (keys.n0 + row) * to.stride[1]) =
            ptx::ld_shared_16(place + row * kRowBytes + (thread % 8 ^ row % 8) * 16);
  }
};

}  // namespace fagen

namespace fagen {

template <class C, class Element, bool kShared = kSharedOperands<C>>
struct SelectedConsumer {
  using Type = BackwardConsumer<C, Element>;
};
template <class C, class Element>
struct SelectedConsumer<C, Element, true> {
  using Type = SharedConsumer<C, Element>;
};
template <class C, class Element>
using SelectConsumer = typename SelectedConsumer<C, Element>::Type;

template <class C, class Element>
__device__ __forceinline__ void run_backward_block(const fagen_backward_params& p, const BackwardLaunch& launch,
                                                   unsigned char* shared) {
  using L = BackwardLayout<C>;
  const uint32_t smem = (ptx::shared_address(shared) + kSmemAlignment - 1) & ~uint32_t(kSmemAlignment - 1);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well
  const int warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&launch.q);
    ptx::prefetch_map(&launch.k);
    ptx::prefetch_map(&launch.v);
    ptx::prefetch_map(&launch.dout);
    BackwardPipelines<C>(smem, 0).init();
  }
  ptx::start_next_kernel();
  // k, v and dO were there before the first kernel began: each warp waits for that one where it reads what it writes
  if (L::kIntervals && threadIdx.x < 32) load_intervals<C>(p, launch, smem, blockIdx.x);
  __syncthreads();
  const RowBand band(p);
  const KeyTile<C> keys(launch, band, smem, blockIdx.x);
  if (group == L::kGroups) {
    ptx::fewer_registers<L::kProducerRegisters>();
    BackwardProducer<C> producer{p, launch, keys, BackwardPipelines<C>(smem, 0)};
    if constexpr (kLoaderHasDq<C>) return DqLoader<C, Element>{producer, warp}.run();
    const int owner = warp - (4 - L::kGroups);
    const bool first_lane = threadIdx.x % 32 == 0;
    if (warp == 0) {
      if (first_lane) L::kGroups == 3 ? producer.run_both() : producer.run_q();
    } else if (L::kGroups < 3 && warp == 1) {
      if (first_lane) producer.run_dout();
    } else if ((C::kDqSink == DqSink::bulk || kRedInTurns<C>) && owner >= 0 && DqShare<C>{owner}.owns()) {
      ptx::wait_for_previous_kernel();
      const BackwardPipelines<C> of_owner(smem, owner);
      if constexpr (C::kDqSink == DqSink::bulk)
        DqDrain<C, Element>{p, launch, keys, band, {owner}, of_owner}.run();
      else if constexpr (kRedInTurns<C>)
        DqTurns<C>{p, launch, keys, band, {owner}, of_owner}.run();
    }
    if (kMostSplits<C> > 1 && keys.splits > 1) SplitSums<C>::attend();
  } else {
    ptx::more_registers<L::kConsumerRegisters>();
    ptx::wait_for_previous_kernel();
    SelectConsumer<C, Element>(p, launch, keys, band, smem, group).run();
  }
}

}  // namespace fagen

// ---- fagen/sm90/backward/launch.cuh ----------------------------------------------------------------------
// The host's part of the backward kernel: workspace, tensor maps, grids.
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

// ---- fagen/sm90/backward/epilogue.cuh --------------------------------------------------------------------
// Rounding: dQ when all keys have been to a row.

namespace fagen {

// dQ from float32 in the order of fragments to rows of elements, scaled: a chunk of 64 rows, the `index`-th of all
// heads. The work of a warpgroup.
template <class C, class Element>
__device__ __forceinline__ void round_rows(const fagen_backward_params& p, const BackwardLaunch& launch,
                                           int64_t index) {
  using Dq = DqShare<C>;
  const int chunks = launch.row_tiles * Dq::kRowChunks, chunk = index % chunks, plane = index / chunks;
  const int thread = threadIdx.x % 128, m = chunk * 64 + thread / 32 * 16 + thread % 32 / 4;
  const float* from =
      dq_sums<C>(launch, index / Dq::kRowChunks) + index % Dq::kRowChunks * (64 * C::kHeadDim) + thread * 4;
  const auto load = [&](int piece) {
    return __ldcg(reinterpret_cast<const float4*>(from + piece * (kPieceBytes / 4)));
  };
  store_rows<Element, (Dq::kChunkPieces + 3) / 4>(p.dq, plane / p.heads, plane % p.heads, m, p.seqlen_q, p.head_dim, 0,
                                                  Dq::kChunkPieces, gradient_scale<C>(p), load);
}
template <class C, class Element>
__device__ __forceinline__ void backward_epilogue(const fagen_backward_params& p, const BackwardLaunch& launch) {
  ptx::start_next_kernel();
  ptx::wait_for_previous_kernel();
  round_rows<C, Element>(p, launch, blockIdx.x);
}

// All gradients are zero: there are no rows or no keys. A grid's work, a warp a row.
template <class Element>
__device__ __forceinline__ void store_zero_gradients(const fagen_backward_params& p) {
  ptx::wait_for_previous_kernel();
  const auto clear = [&](const fagen_tensor& t, int64_t length, int64_t heads, int columns) {
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; i < p.batch * heads * length;
         i += gridDim.x * blockDim.x / 32) {
      Element* row = static_cast<Element*>(t.data) + i / length / heads * t.stride[0] + i % length * t.stride[1] +
                     i / length % heads * t.stride[2];
      for (int column = threadIdx.x % 32 * 8; column < columns; column += 256)
        *reinterpret_cast<uint4*>(row + column) = make_uint4(0, 0, 0, 0);
    }
  };
  if (p.seqlen_q > 0) clear(p.dq, p.seqlen_q, p.heads, p.head_dim);
  if (p.seqlen_k > 0)
    clear(p.dk, p.seqlen_k, p.kv_heads, p.head_dim), clear(p.dv, p.seqlen_k, p.kv_heads, p.head_dim_v);
}

}  // namespace fagen


// ---- fagen/sm90/backward/prologue.cuh --------------------------------------------------------------------
// Rows are prepared before keys come to them: delta = sum over d of dO O, less dLSE; the LSE in base 2; and the
// counters of dQ set to zero, or dQ itself.

namespace fagen {

constexpr int kPrologueThreads = 256;
constexpr int kRowLanes = 8;  // share a row

// The sum of products of two words, two elements each.
template <class Element>
__device__ __forceinline__ float multiply_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ float multiply_pairs<bfloat_t>(uint32_t a, uint32_t b) {
  return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
         __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
}
template <>
__device__ __forceinline__ float multiply_pairs<half_t>(uint32_t a, uint32_t b) {
  __half2 x, y;
  memcpy(&x, &a, 4), memcpy(&y, &b, 4);
  const float2 u = __half22float2(x), v = __half22float2(y);
  return u.x * v.x + u.y * v.y;
}

// The `index`-th row tile of all heads: a block's work.
template <class C, class Element>
__device__ __forceinline__ void prepare_rows(const fagen_backward_params& p, const BackwardLaunch& launch,
                                             int64_t index) {
  const int tile = index % launch.row_tiles, plane = index / launch.row_tiles;
  const int head = plane % p.heads, batch = plane / p.heads;
  constexpr int kThreads = kPrologueThreads;
  if (!BackwardLayout<C>::kRoundsDq && !launch.one_key_tile) {
    float4* zeroed = reinterpret_cast<float4*>(dq_sums<C>(launch, index));
    for (int i = threadIdx.x; i < DqShare<C>::kTileFloats / 4; i += kThreads)
      zeroed[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  } else {
    int first, last;  // a tile that no block has a part of is zero
    RowBand(p).key_tiles<C>(tile, first, last);
    if (last < first)
      for (int row = threadIdx.x / 32; row < C::kTileM && tile * C::kTileM + row < p.seqlen_q; row += kThreads / 32)
        for (int d = threadIdx.x % 32 * 8; d < p.head_dim; d += 256)
          *reinterpret_cast<uint4*>(static_cast<Element*>(p.dq.data) + batch * p.dq.stride[0] +
                                    (tile * C::kTileM + row) * p.dq.stride[1] + head * p.dq.stride[2] + d) =
              make_uint4(0, 0, 0, 0);
  }
  if ((C::kDeterministic || BackwardLayout<C>::kRoundsDq) && threadIdx.x < DqShare<C>::kGroups)
    launch.turns[index * DqShare<C>::kGroups + threadIdx.x] = 0;
  const int group = p.heads / p.kv_heads;
  if (kTurnsBySeen<C> && head % group == 0 && (p.mask_heads > 1 || head == 0))
    find_seen<C>(p, launch, batch, head / group, tile, kThreads / 32);
  const auto row_of = [&](const fagen_tensor& t, int m) {
    return static_cast<const Element*>(t.data) + batch * t.stride[0] + m * t.stride[1] + head * t.stride[2];
  };
#pragma unroll
  for (int row = threadIdx.x / kRowLanes; row < C::kTileM; row += kThreads / kRowLanes) {
    const int m = tile * C::kTileM + row;
    float sum = 0.f;
    if (m < p.seqlen_q) {
      const Element *out = row_of(p.o, m), *dout = row_of(p.dout, m);
      for (int d = threadIdx.x % kRowLanes * 8; d < p.head_dim_v; d += kRowLanes * 8) {
        const uint4 a = *reinterpret_cast<const uint4*>(out + d), b = *reinterpret_cast<const uint4*>(dout + d);
        sum += multiply_pairs<Element>(a.x, b.x) + multiply_pairs<Element>(a.y, b.y) +
               multiply_pairs<Element>(a.z, b.z) + multiply_pairs<Element>(a.w, b.w);
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < kRowLanes; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (threadIdx.x % kRowLanes == 0) {
      const int64_t stat = int64_t(plane) * p.seqlen_q + m, at = index * C::kTileM + row;
      const float lse = m < p.seqlen_q ? p.lse[stat] : -INFINITY;
      const float subtracted = lse == -INFINITY ? INFINITY : lse;  // such a row's P is 0
      launch.lse[at] = subtracted * ScoreChange<C>::kLog2e;
      const float delta = lse != -INFINITY ? sum - (p.dlse ? p.dlse[stat] : 0.f) : 0.f;
      const float stored = C::kDropout ? delta * (Dropout::kept_of(p.dropout) / 256.f) : delta;
      launch.delta[at] = kSeedsDp<C> ? -stored : stored;
    }
  }
}

template <class C, class Element>
__device__ __forceinline__ void backward_prologue(const fagen_backward_params& p, const BackwardLaunch& launch) {
  ptx::wait_for_previous_kernel();
  ptx::start_next_kernel();  // which may read at once what was there before this one: k, v, dO
  prepare_rows<C, Element>(p, launch, blockIdx.x);
}

}  // namespace fagen

// ---- fagen/sm90/backward/splits.cuh ----------------------------------------------------------------------
// How many blocks share the visits of a key tile, as the host chooses at a launch: they are a cluster.


namespace fagen {

// Bytes that blocks read of a row of q and dO, and add to of its dQ.
template <class C>
constexpr int kVisitedRowBytes = (C::kHeadDim + C::kHeadDimV) * 2 + C::kHeadDim * 4;

// Blocks that a GPU runs at once.
struct ResidentBlocks {
  int alone, in_clusters[4];  // of 1, 2, 4, 8; 0 where there can be none
};

// Blocks of a cluster lie close together, so that those at once may be fewer than the SMs.
template <class C, class Kernel>
static cudaError_t count_blocks(Kernel kernel, int device, ResidentBlocks& found) {
  using L = BackwardLayout<C>;
  if (const cudaError_t e = cudaDeviceGetAttribute(&found.alone, cudaDevAttrMultiProcessorCount, device)) return e;
  for (int i = 0; i < 4; ++i) {
    const int splits = 1 << i;
    int clusters = splits == 1 ? found.alone : 0;
    if (splits > 1 && splits <= kMostSplits<C>) {
      cudaLaunchAttribute cluster;
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {unsigned(splits), 1, 1};
      const cudaLaunchConfig_t config = {dim3(splits), dim3(L::kThreads), L::kSmemBytes, nullptr, &cluster, 1};
      if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) clusters = 0;
    }
    found.in_clusters[i] = clusters * splits;
  }
  return cudaSuccess;
}

// Row tiles of a head that a key tile sees by the band, on average and at most: of key tiles all along the sequence.
template <class C>
struct SeenRowTiles {
  double average = 0;
  int most = 0;

  explicit SeenRowTiles(const fagen_backward_params& p) {
    constexpr int kSamples = 64;
    const RowBand band(p);
    const int tiles = ceil_div(p.seqlen_k, C::kTileN), samples = tiles < kSamples ? tiles : kSamples;
    for (int i = 0; i < samples; ++i) {
      const int n0 = int(int64_t(tiles) * i / samples) * C::kTileN;
      const int last_key = n0 + C::kTileN < p.seqlen_k ? n0 + C::kTileN - 1 : p.seqlen_k - 1;
      const int begin = band.begin(n0), end = band.end(last_key);
      const int seen = begin < end ? ceil_div(end, C::kTileM) - begin / C::kTileM : 0;
      average += double(seen) / samples;
      if (seen > most) most = seen;
    }
  }
};

// Cycles that the kernel takes, roughly, with so many blocks to a key tile. The factors were fitted to an H200.
template <class C>
struct SplitCost {
  static constexpr double kVisit = 1.9 * C::kTileM * C::kTileN * (3 * C::kHeadDim + 2 * C::kHeadDimV) / 2048;
  static constexpr double kEnds = 6000 + 0.16 * C::kTileN * (C::kHeadDim + C::kHeadDimV);     // of a block
  static constexpr double kMeeting = 2500, kMoved = 0.12 * C::kTileN * (C::kHeadDim + C::kHeadDimV);  // of a cluster
  // Bytes that blocks may read and add to at a time: more than L2 has, since some are not needed yet or no longer.
  // Beyond that a visit is slower.
  static constexpr double kCachedBytes = 64 << 20, kSlower = 0.06;
  static constexpr int kRounds = 3;  // of equal blocks, beyond which they no longer end together

  const fagen_backward_params& p;
  const ResidentBlocks& gpu;
  const SeenRowTiles<C> seen;

  // Each block goes through its heads at a pace of its own, so that all heads of the kv heads at work count.
  double cached_bytes(int splits) const {
    const int64_t all = int64_t(p.kv_heads) * p.batch, key_tiles = ceil_div(p.seqlen_k, C::kTileN);
    const int64_t at_work = ceil_div<int64_t>(gpu.alone, key_tiles * splits);
    const int64_t rows = int64_t(seen.most) * C::kTileM < p.seqlen_q ? seen.most * C::kTileM : p.seqlen_q;
    return double(at_work < all ? at_work : all) * (p.heads / p.kv_heads) * rows * kVisitedRowBytes<C>;
  }
  double operator()(int splits, int resident) const {
    const int group = p.heads / p.kv_heads;
    const double over = cached_bytes(splits) / kCachedBytes - 1;
    const double visit = kVisit * (over > 0 ? 1 + kSlower * over : 1);
    const double ends = kEnds + (splits > 1 ? kMeeting + kMoved * (splits - 1) / splits : 0);
    const double longest = ceil_div(group * seen.most, splits) * visit + ends;
    const double average = group * seen.average / splits * visit + ends;
    const double rounds = double(ceil_div(p.seqlen_k, C::kTileN)) * p.kv_heads * p.batch * splits / resident;
    if (seen.most <= 1.1 * seen.average) return rounds < kRounds ? ceil(rounds) * longest : (rounds + 0.5) * average;
    const double total = rounds * average + 0.5 * longest;
    return total > longest ? total : longest;
  }
};

// The fewest blocks among those that are fastest, to within a hundredth.
template <class C>
static int choose_splits(const fagen_backward_params& p, const ResidentBlocks& gpu) {
  if (kMostSplits<C> == 1 || p.kv_heads == 0) return 1;
  const SplitCost<C> cost = {p, gpu, SeenRowTiles<C>(p)};
  int best = 1;
  double least = cost(1, gpu.in_clusters[0]);
  for (int i = 1; i < 4; ++i) {
    if (gpu.in_clusters[i] == 0) continue;
    const double here = cost(1 << i, gpu.in_clusters[i]);
    if (here < 0.99 * least) best = 1 << i, least = here;
  }
  return best;
}

}  // namespace fagen

namespace fagen {

// The heads of a section (sectioned order): as many as leave room for their rows of q, dO and dQ, in sections of about
// the same size, since a small last one would begin its longest blocks late. Blocks of the same kv head go through its
// query heads together, so that one of them counts; those that share visits are at several, at most at all of them.
template <class C>
static int heads_of_section(const fagen_backward_params& p, int splits) {
  const int64_t all = int64_t(p.kv_heads) * p.batch, group = p.heads / p.kv_heads;
  const int64_t at_once = (splits < group ? splits : group) * int64_t(p.seqlen_q) * kVisitedRowBytes<C>;
  const int64_t fit = (int64_t(C::kSectionMb) << 20) / at_once;
  const int64_t sections = ceil_div<int64_t>(all, fit < 1 ? 1 : fit);
  return int(ceil_div(all, sections));
}

// The workspace: dQ in float32, the LSE and delta of every row, turns, and by which key tiles these go.
template <class C>
struct BackwardWorkspace {
  uint64_t lse, delta, turns, seen, end;
  int seen_words;

  explicit BackwardWorkspace(const fagen_backward_params& p) {
    const uint64_t tiles = uint64_t(ceil_div(p.seqlen_q, C::kTileM)) * p.heads * p.batch;
    const auto next = [&](uint64_t begin, uint64_t bytes_a_tile) {
      return align_workspace(begin + tiles * bytes_a_tile);
    };
    lse = next(0, DqShare<C>::kTileFloats * sizeof(float));
    delta = next(lse, C::kTileM * sizeof(float));
    turns = next(delta, C::kTileM * sizeof(float));
    seen = next(turns, C::kDeterministic || BackwardLayout<C>::kRoundsDq ? DqShare<C>::kGroups * sizeof(unsigned) : 0);
    seen_words = kTurnsBySeen<C> ? ceil_div(ceil_div(p.seqlen_k, C::kTileN), 32) : 0;
    end = next(seen, seen_words * sizeof(unsigned));
  }
  void assign(char* workspace, BackwardLaunch& launch) const {
    launch.dq = reinterpret_cast<float*>(workspace);
    launch.lse = reinterpret_cast<float*>(workspace + lse);
    launch.delta = reinterpret_cast<float*>(workspace + delta);
    launch.turns = reinterpret_cast<unsigned*>(workspace + turns);
    launch.seen = reinterpret_cast<unsigned*>(workspace + seen), launch.seen_words = seen_words;
  }
};

template <class C>
static cudaError_t make_maps(const fagen_backward_params& p, CUtensorMapDataType type, BackwardLaunch& launch) {
  const auto map = [&](CUtensorMap* to, const fagen_tensor& t, int columns, int length, int box, int heads) {
    const Dimension rows = {length, t.stride[1], box};
    return make_map(to, type, t.data, columns, {rows, {heads, t.stride[2], 1}, {p.batch, t.stride[0], 1}});
  };
  if (const cudaError_t e = map(&launch.q, p.q, p.head_dim, p.seqlen_q, C::kTileM, p.heads)) return e;
  if (const cudaError_t e = map(&launch.dout, p.dout, p.head_dim_v, p.seqlen_q, C::kTileM, p.heads)) return e;
  if (const cudaError_t e = map(&launch.k, p.k, p.head_dim, p.seqlen_k, C::kTileN, p.kv_heads)) return e;
  return map(&launch.v, p.v, p.head_dim_v, p.seqlen_k, C::kTileN, p.kv_heads);
}

using BackwardKernel = void (*)(fagen_backward_params, BackwardLaunch);

struct BackwardKernels {
  BackwardKernel prologue, backward, epilogue, zero;
};

template <class C, class Element>
static int launch_backward(const fagen_backward_params& p, cudaStream_t stream, CUtensorMapDataType type,
                           const BackwardKernels& kernels) {
  using L = BackwardLayout<C>;
  ResidentBlocks gpu;
  const auto prepare = [&](int device, ResidentBlocks& found) {
    constexpr auto kSmem = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t e = cudaFuncSetAttribute(kernels.backward, kSmem, L::kSmemBytes)) return e;
    return count_blocks<C>(kernels.backward, device, found);
  };
  if (const cudaError_t e = once_per_device(&gpu, prepare)) return e;
  BackwardLaunch launch;
  if (p.batch == 0) return cudaSuccess;
  if (p.seqlen_q == 0 || p.seqlen_k == 0) return launch_kernel(kernels.zero, 128, 256, 0, stream, p, launch);
  if (const cudaError_t e = make_maps<C>(p, type, launch)) return e;
  launch.row_tiles = ceil_div(p.seqlen_q, C::kTileM), launch.key_tiles = ceil_div(p.seqlen_k, C::kTileN);
  launch.one_key_tile = launch.key_tiles == 1 && !L::kIntervals && !kSharedOperands<C> && !kLoaderHasDq<C>;
  const int splits = choose_splits<C>(p, gpu);
  launch.splits = Divisor(splits);
  launch.order = TileOrder::of<C::kBlockOrder>(launch.key_tiles, p.kv_heads, p.batch, heads_of_section<C>(p, splits));
  BackwardWorkspace<C>(p).assign(static_cast<char*>(p.workspace), launch);
  const int rows = launch.row_tiles * p.heads * p.batch, blocks = launch.key_tiles * p.kv_heads * p.batch * splits;
  if (const cudaError_t e = launch_kernel(kernels.prologue, rows, kPrologueThreads, 0, stream, p, launch)) return e;
  // the blocks that share the visits of a key tile are a cluster
  if (const cudaError_t e =
          launch_clusters(splits, true, kernels.backward, blocks, L::kThreads, L::kSmemBytes, stream, p, launch))
    return e;
  if (BackwardLayout<C>::kRoundsDq || launch.one_key_tile) return cudaSuccess;
  return launch_kernel(kernels.epilogue, rows * DqShare<C>::kRowChunks, 128, 0, stream, p, launch);
}

}  // namespace fagen

namespace fagen {

using Element = bfloat_t;
constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

__global__ void __launch_bounds__(kPrologueThreads)
prologue_kernel(const __grid_constant__ fagen_backward_params p, const __grid_constant__ BackwardLaunch launch) {
  backward_prologue<Config, Element>(p, launch);
}

__global__ void __launch_bounds__(BackwardLayout<Config>::kThreads, 1)
backward_kernel(const __grid_constant__ fagen_backward_params p, const __grid_constant__ BackwardLaunch launch) {
  extern __shared__ unsigned char shared[];
  run_backward_block<Config, Element>(p, launch, shared);
}

__global__ void __launch_bounds__(128)
epilogue_kernel(const __grid_constant__ fagen_backward_params p, const __grid_constant__ BackwardLaunch launch) {
  backward_epilogue<Config, Element>(p, launch);
}

__global__ void __launch_bounds__(256) zero_kernel(const __grid_constant__ fagen_backward_params p, const __grid_constant__ BackwardLaunch launch) {
  store_zero_gradients<Element>(p);
}

}  // namespace fagen

extern "C" uint64_t fagen_workspace_bytes(const fagen_backward_params* p) {
  return fagen::BackwardWorkspace<fagen::Config>(*p).end;
}

extern "C" const char* fagen_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

extern "C" int fagen_launch(const fagen_backward_params* p, void* stream) {
  const fagen::BackwardKernels kernels = {fagen::prologue_kernel, fagen::backward_kernel, fagen::epilogue_kernel,
                                          fagen::zero_kernel};
  return fagen::launch_backward<fagen::Config, fagen::Element>(*p, static_cast<cudaStream_t>(stream), fagen::kMapType,
                                                               kernels);
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
