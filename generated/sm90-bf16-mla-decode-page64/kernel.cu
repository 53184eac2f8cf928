// A kernel for attention decode, made by fagen. It needs the CUDA toolkit and nothing else: no torch, no Python.
//
// problem:  decode/bf16/d576-512/none/page64/shared-kv, its config chosen for b64/h128-1/q1-k4096
// config:   rescale=deferred split_keys=128 (the family's default)
// made by:  fagen emit --target sm_90 --op decode --dtype bf16 --head-dim 576-512 --mask none --seqlen-q=1 --seqlen-k=4096 --batch 64 --heads 128 --kv-heads 1 --page 64 --shared-kv --family sm90_decode_mla --config '{"rescale": "deferred", "split_keys": 128}' --out DIR
// build:    nvcc -gencode=arch=compute_90a,code=sm_90a -O3 -std=c++17 --use_fast_math -lineinfo -shared -Xcompiler -fPIC -o kernel.so kernel.cu
// call:     fagen_launch(), declared in kernel.h beside this file

// sm90_decode_mla: attention decode for decode/bf16/d576-512/none/page64/shared-kv on sm_90
//
// Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.
// Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.
//
// Config: rescale=deferred split_keys=128

namespace fagen {

enum class Mask { none, causal, window, intervals };
enum class Rescale { deferred, each };

struct Config {
  static constexpr int kHeadDim = 576;  // of q and k, padded
  static constexpr int kHeadDimV = 512;  // of v and o, padded
  static constexpr Mask kMask = Mask::none;  // which cells are visible
  static constexpr bool kSoftcap = false;  // s -> softcap * tanh(s / softcap)
  static constexpr bool kSinks = false;  // each head has a logit without a value
  static constexpr bool kAligned = true;  // rows are whole, aligned 16-byte pieces
  static constexpr bool kFp8Cache = false;  // k and v are e4m3, else of the dtype of q
  static constexpr int kPageSize = 64;  // rows of a page, 0: the cache is not paged
  static constexpr bool kSharedKv = true;  // v is the first columns of k
  static constexpr Rescale kRescale = Rescale::deferred;  // when O follows a grown maximum
  static constexpr int kSplitKeys = 128;  // fewest keys of a split
};

// Sizes that fagen derived from the config before compiling; the kernel asserts that it agrees.
struct Derived {
  static constexpr int threads = 384;
  static constexpr int smem_bytes = 231600;
  static constexpr int registers = 240;
};

}  // namespace fagen

using namespace fagen;  // the kernel is this one file

#include <cuda.h>
#include <cuda_runtime.h>

// ---- fagen/abi/decode.h ----------------------------------------------------------------------------------
// The arguments of a decode kernel: few query rows a sequence on a cache of keys. Plain C; no torch, no CUDA header.
// ---- fagen/abi/tensor.h ----------------------------------------------------------------------------------
// A tensor that a kernel reads or writes, as every op passes it. Plain C; no torch, no CUDA header.
#include <stdint.h>

typedef struct fagen_tensor {
  void* data;         // null if the call has none
  int64_t stride[3];  // in elements; the op says of which dimensions. The last dimension is contiguous.
} fagen_tensor;

// Row i of a sequence with n rows and m keys stands at key m - n + i. Lengths are read where the kernel runs; those on
// the host are upper bounds. What lies in the cache behind a sequence's keys, and entries of the page table behind its
// pages, may hold anything: NaN, and no page at all. With cu_seqlens_q the rows of all sequences lie one behind the
// other: q is (rows, heads, head_dim), its batch stride unused, o is like it, the LSE (heads, rows).
//
// The LSE of a row that sees nothing is its sink, or -inf. num_splits = -n: n keys a block, counted from key 0,
// whatever the sizes are, so that a sequence's result does not depend on the others.
typedef struct fagen_decode_params {
  fagen_tensor q;           // (batch, seqlen_q, heads, head_dim); strides: batch, row, head
  fagen_tensor k;           // cache (pages, page_size, kv_heads, head_dim); strides: page, row, head
  fagen_tensor v;           // cache (pages, page_size, kv_heads, head_dim_v)
  fagen_tensor o;           // like q, with head_dim_v; written
  fagen_tensor page_table;  // int32 (batch, pages of a sequence); stride: batch; null where the cache is not paged
  fagen_tensor k_scale;     // float (batch, kv_heads): multiplies an fp8 cache; strides: batch, kv head; null: 1
  fagen_tensor v_scale;
  const int32_t* seqlens_k;        // (batch): keys of each sequence
  const int32_t* cu_seqlens_q;     // (batch + 1): first row of each sequence; null: seqlen_q rows each
  const int32_t* cache_batch_idx;  // (batch): a sequence's page where the cache is not paged; null: its own index
  const float* sinks;              // (heads): a logit that takes weight and has no value; null: none
  float* lse;                      // (batch, heads, seqlen_q) contiguous, natural log; null if not wanted
  void* workspace;                 // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
  int32_t batch, heads, kv_heads;
  int32_t rows;                       // of q in all
  int32_t seqlen_q, seqlen_k;         // most rows and most keys of a sequence
  int32_t pages, page_size;           // of the cache; rows of a page
  int32_t head_dim, head_dim_v;       // as the caller has them; the kernel works on padded sizes
  int32_t window_left, window_right;  // the band around each sequence's bottom-right aligned diagonal; -1: unbounded
  int32_t num_splits;                 // blocks that share a sequence's keys; 0: chosen by the sizes here
  float scale;                        // multiplies q.k before the softmax
  float softcap;                      // s -> softcap * tanh(s / softcap); 0: off
} fagen_decode_params;

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
__device__ __forceinline__ void wgmma<256, false, true>(float (&c)[32][4], uint64_t a, uint64_t b, bool more) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, p, 1, 1, 0, 1;\n}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3]), "+f"(c[16][0]), "+f"(c[16][1]), "+f"(c[16][2]), "+f"(c[16][3]), "+f"(c[17][0]), "+f"(c[17][1]), "+f"(c[17][2]), "+f"(c[17][3]), "+f"(c[18][0]), "+f"(c[18][1]), "+f"(c[18][2]), "+f"(c[18][3]), "+f"(c[19][0]), "+f"(c[19][1]), "+f"(c[19][2]), "+f"(c[19][3]), "+f"(c[20][0]), "+f"(c[20][1]), "+f"(c[20][2]), "+f"(c[20][3]), "+f"(c[21][0]), "+f"(c[21][1]), "+f"(c[21][2]), "+f"(c[21][3]), "+f"(c[22][0]), "+f"(c[22][1]), "+f"(c[22][2]), "+f"(c[22][3]), "+f"(c[23][0]), "+f"(c[23][1]), "+f"(c[23][2]), "+f"(c[23][3]), "+f"(c[24][0]), "+f"(c[24][1]), "+f"(c[24][2]), "+f"(c[24][3]), "+f"(c[25][0]), "+f"(c[25][1]), "+f"(c[25][2]), "+f"(c[25][3]), "+f"(c[26][0]), "+f"(c[26][1]), "+f"(c[26][2]), "+f"(c[26][3]), "+f"(c[27][0]), "+f"(c[27][1]), "+f"(c[27][2]), "+f"(c[27][3]), "+f"(c[28][0]), "+f"(c[28][1]), "+f"(c[28][2]), "+f"(c[28][3]), "+f"(c[29][0]), "+f"(c[29][1]), "+f"(c[29][2]), "+f"(c[29][3]), "+f"(c[30][0]), "+f"(c[30][1]), "+f"(c[30][2]), "+f"(c[30][3]), "+f"(c[31][0]), "+f"(c[31][1]), "+f"(c[31][2]), "+f"(c[31][3])
      : "l"(a), "l"(b), "r"(int(more)));
}

template <>
__device__ __forceinline__ void wgmma<256, true>(float (&c)[32][4], const uint32_t (&a)[4], uint64_t b, bool more) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, {%128, %129, %130, %131}, %132, p, 1, 1, 1;\n}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3]), "+f"(c[16][0]), "+f"(c[16][1]), "+f"(c[16][2]), "+f"(c[16][3]), "+f"(c[17][0]), "+f"(c[17][1]), "+f"(c[17][2]), "+f"(c[17][3]), "+f"(c[18][0]), "+f"(c[18][1]), "+f"(c[18][2]), "+f"(c[18][3]), "+f"(c[19][0]), "+f"(c[19][1]), "+f"(c[19][2]), "+f"(c[19][3]), "+f"(c[20][0]), "+f"(c[20][1]), "+f"(c[20][2]), "+f"(c[20][3]), "+f"(c[21][0]), "+f"(c[21][1]), "+f"(c[21][2]), "+f"(c[21][3]), "+f"(c[22][0]), "+f"(c[22][1]), "+f"(c[22][2]), "+f"(c[22][3]), "+f"(c[23][0]), "+f"(c[23][1]), "+f"(c[23][2]), "+f"(c[23][3]), "+f"(c[24][0]), "+f"(c[24][1]), "+f"(c[24][2]), "+f"(c[24][3]), "+f"(c[25][0]), "+f"(c[25][1]), "+f"(c[25][2]), "+f"(c[25][3]), "+f"(c[26][0]), "+f"(c[26][1]), "+f"(c[26][2]), "+f"(c[26][3]), "+f"(c[27][0]), "+f"(c[27][1]), "+f"(c[27][2]), "+f"(c[27][3]), "+f"(c[28][0]), "+f"(c[28][1]), "+f"(c[28][2]), "+f"(c[28][3]), "+f"(c[29][0]), "+f"(c[29][1]), "+f"(c[29][2]), "+f"(c[29][3]), "+f"(c[30][0]), "+f"(c[30][1]), "+f"(c[30][2]), "+f"(c[30][3]), "+f"(c[31][0]), "+f"(c[31][1]), "+f"(c[31][2]), "+f"(c[31][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(more)));
}

template <>
__device__ __forceinline__ void wgmma<64, false>(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool more) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(more)));
}

}  // namespace fagen::ptx
// ---- fagen/sm90/mla/launch.cuh ---------------------------------------------------------------------------
// A launch of latent decode on the host: the tensor map of the cache, the plan of splits, both kernels.
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

// ---- fagen/sm80/decode/plan.cuh --------------------------------------------------------------------------
// The host's choice of a decode launch: how many splits, and their workspace.
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

// ---- fagen/sm80/decode/place.cuh -------------------------------------------------------------------------
// Where a block stands: its sequence, rows and keys. All lengths are read here, on the device.
#include <stdint.h>


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

namespace fagen {

// The params that the shared headers read.
__device__ __forceinline__ fagen_forward_params score_params(float scale, float softcap) {
  fagen_forward_params p = {};
  p.scale = fmaxf(scale, 1e-37f);  // by 0 a hidden score would be no number
  p.softcap = softcap;
  return p;
}

// Computed once on the host for a launch, from the largest lengths alone.
struct DecodeGrid {
  int row_tiles;    // of a kv head
  int splits;       // blocks that share a row tile's keys
  int split_tiles;  // key tiles of a split, counted from key 0; 0: even shares of what a sequence has,
  int least_tiles;  // but no fewer than this
  bool clustered;   // blocks are clusters of neighbours in the grid: of splits of a tile, or of tiles of a sequence
  unsigned* arrived;  // (tile): splits that are done
  float2* stats;      // (tile, split, row): reference, sum
  float4* sums;       // (tile, split, row, dv / 4): O, unnormalised
};

// A row tile of one kv head of one sequence. Rows are (token, head of the group), tokens first.
template <class C>
struct DecodeTile {
  int index;  // among all row tiles
  int batch, kv_head;
  int first_row;  // packed, of the tile
  int first_q;    // row of q with the sequence's first token; with cu_seqlens_q in all of q, else in the sequence
  int tokens, keys, group;
  int begin, end;            // keys that some row sees
  int full_begin, full_end;  // keys that every row sees
  int window_left, window_right;

  __device__ __forceinline__ DecodeTile(const fagen_decode_params& p, const DecodeGrid& grid, int index)
      : index(index), first_q(0), tokens(p.seqlen_q), group(p.heads / p.kv_heads) {
    first_row = index % grid.row_tiles * C::kTileM;
    kv_head = index / grid.row_tiles % p.kv_heads;
    batch = index / grid.row_tiles / p.kv_heads;
    // no length leads out of the cache, of q or of the workspace
    keys = min(max(p.seqlens_k[batch], 0), p.seqlen_k);
    if (p.cu_seqlens_q) {
      first_q = max(p.cu_seqlens_q[batch], 0);
      tokens = min(min(p.cu_seqlens_q[batch + 1], p.rows) - first_q, p.seqlen_q);
    }
    window_left = MaskOf<C>::kHasBegin ? p.window_left : -1;
    window_right = MaskOf<C>::kHasEnd ? p.window_right : -1;
    const int first = token(first_row), last = token(first_row + C::kTileM - 1);
    begin = begin_of(first), full_begin = begin_of(last);
    full_end = end_of(first), end = end_of(last);
    if (first_row >= rows()) end = begin;
  }

  __device__ __forceinline__ int rows() const { return tokens * group; }
  // Rows that fill up the last tile count as its last token.
  __device__ __forceinline__ int token(int row) const { return max(0, min(row / group, tokens - 1)); }
  __device__ __forceinline__ int head(int row) const { return kv_head * group + row % group; }
  __device__ __forceinline__ int begin_of(int token) const {
    return MaskOf<C>::kHasBegin && window_left >= 0 ? min(keys, max(0, keys - tokens + token - window_left)) : 0;
  }
  __device__ __forceinline__ int end_of(int token) const {
    if (!MaskOf<C>::kHasEnd || window_right < 0) return keys;
    return int(max(int64_t(0), min(int64_t(keys), int64_t(keys) - tokens + token + window_right + 1)));
  }
};

// The key tiles of one split, counted from the cache's first key.
template <class C>
struct DecodeSplit {
  int used;  // splits that have keys, at least 1: a sequence without any has one that writes zeros
  int first, end;

  __device__ __forceinline__ DecodeSplit(const DecodeTile<C>& tile, const DecodeGrid& grid, int split) {
    const int from = tile.begin / C::kTileN, to = max(from, (tile.end + C::kTileN - 1) / C::kTileN);
    int share = grid.split_tiles, origin = 0;
    if (share) {
      origin = from / share * share;
    } else {
      share = max((to - from + grid.splits - 1) / grid.splits, grid.least_tiles);
      origin = from;
    }
    used = max(1, (to - origin + share - 1) / share);
    first = min(to, max(from, origin + split * share));
    end = min(to, origin + (split + 1) * share);
  }
};

}  // namespace fagen

namespace fagen {

constexpr int kMostSplits = 256;
constexpr int kMostOfCluster = 8;  // blocks, on every GPU that has clusters
constexpr int kCombineThreads = 256;

// Key tiles that a row tile can see at most, by the largest lengths. A window may begin amid a tile.
template <class C>
static int most_key_tiles(const fagen_decode_params& p) {
  const int all = ceil_div(p.seqlen_k, C::kTileN);
  if (!MaskOf<C>::kHasBegin || p.window_left < 0) return all;
  const int right = p.window_right < p.seqlen_q ? p.window_right : p.seqlen_q;
  const int64_t seen = int64_t(p.window_left) + p.seqlen_q + (right > 0 ? right : 0);
  const int64_t tiles = ceil_div(seen, C::kTileN) + 1;
  return tiles < all ? int(tiles) : all;
}

// The kernel's own number of splits. Blocks run in waves; a block costs its keys, what starting it costs (about as much
// as kStart keys), and each further split what it adds to the merge. Lengths on the device have no part in this, so
// that a CUDA graph serves all of them.
template <class C>
static int choose_splits(int64_t row_tiles, int key_tiles, int resident) {
  constexpr int kStart = 128, kMerge = 128, kMergeInCluster = 32, kMergeOfSplit = 4;
  if (row_tiles > INT32_MAX / kMostSplits) return 1;  // below, divisions of 32 bits: this is asked at every launch
  const int most = ceil_div(key_tiles * C::kTileN, C::kSplitKeys);
  int best = 1;
  int64_t least = 0;
  for (int splits = 1; splits <= most && splits <= kMostSplits; ++splits) {
    const int64_t waves = ceil_div(int(row_tiles) * splits, resident);
    const int keys = ceil_div(key_tiles, splits) * C::kTileN;
    const bool clustered = C::kMergesInCluster && splits <= kMostOfCluster;
    const int merge = (clustered ? kMergeInCluster : kMerge) + splits * kMergeOfSplit;
    const int64_t cost = waves * (keys + kStart) + (splits > 1 ? merge : 0);
    if (splits == 1 || cost < least) best = splits, least = cost;
  }
  return best;
}

// Splits, and the parts of the workspace where there are several.
template <class C>
struct DecodePlan {
  DecodeGrid grid = {};
  int64_t tiles, rows;  // row tiles of the launch; rows of all parts
  uint64_t arrived_bytes = 0, stats_bytes = 0, sums_bytes = 0;

  DecodePlan(const fagen_decode_params& p, int resident) {
    grid.row_tiles = ceil_div(int64_t(p.seqlen_q) * (p.heads / p.kv_heads), C::kTileM);
    tiles = int64_t(grid.row_tiles) * p.kv_heads * p.batch;
    if (C::kCompact && p.cu_seqlens_q) {  // as many as rows need, and one a sequence that is not whole
      const int64_t most = (ceil_div(int64_t(p.rows) * (p.heads / p.kv_heads), C::kTileM) + p.batch) * p.kv_heads;
      tiles = most < tiles ? most : tiles;
    }
    const int key_tiles = most_key_tiles<C>(p);
    grid.least_tiles = 1;
    if (p.num_splits > 0) {
      const int most = key_tiles < kMostSplits ? key_tiles : kMostSplits;
      grid.splits = p.num_splits < most ? p.num_splits : most;
    } else if (p.num_splits < 0) {
      grid.split_tiles = ceil_div(-int64_t(p.num_splits), C::kTileN);
      grid.splits = ceil_div(key_tiles, grid.split_tiles) + MaskOf<C>::kHasBegin;
    } else {
      grid.splits = choose_splits<C>(tiles, key_tiles, resident);
      grid.least_tiles = ceil_div(C::kSplitKeys, C::kTileN);
    }
    grid.clustered = C::kMergesInCluster && grid.splits <= kMostOfCluster;
    if (grid.splits == 1 || grid.clustered) return;
    rows = tiles * grid.splits * C::kTileM;
    arrived_bytes = C::kMergesInLastBlock ? align_workspace(tiles * sizeof(unsigned)) : 0;
    stats_bytes = align_workspace(rows * sizeof(float2));
    sums_bytes = align_workspace(rows * C::kHeadDimV * sizeof(float));
  }
  uint64_t bytes() const { return arrived_bytes + stats_bytes + sums_bytes; }

  void assign(void* workspace) {
    char* at = static_cast<char*>(workspace);
    grid.arrived = reinterpret_cast<unsigned*>(at);
    grid.stats = reinterpret_cast<float2*>(at + arrived_bytes);
    grid.sums = reinterpret_cast<float4*>(at + arrived_bytes + stats_bytes);
  }
};

}  // namespace fagen

// ---- fagen/sm90/map_cache.cuh ----------------------------------------------------------------------------
// The tensor map of a cache, for the copy engine.

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

// ---- fagen/sm90/key_boxes.cuh ----------------------------------------------------------------------------
// The places of a block's keys in the cache, page by page, for the copy engine.

namespace fagen {

// The boxes of the keys of a split. A box of the copy engine is the keys of a tile that follow each other in the cache;
// lanes hold the pages of the next boxes, and read those behind them ahead.
template <class C>
struct KeyBoxes {
  static constexpr bool kPaged = C::kPageSize > 0;
  static constexpr int kKeys = kPaged && C::kPageSize < C::kTileN ? C::kPageSize : C::kTileN;  // of a box
  static constexpr int kOfTile = C::kTileN / kKeys;
  static constexpr int kTilesHeld = 32 / kOfTile;
  static_assert(C::kTileN % kKeys == 0 && 32 % kOfTile == 0, "a tile is whole boxes, lanes hold whole tiles");

  const fagen_decode_params& p;
  const DecodeTile<C>& tile;
  int first_tile;  // of the split
  int held = 0, ahead;

  __device__ __forceinline__ KeyBoxes(const fagen_decode_params& p, const DecodeTile<C>& tile, int first_tile)
      : p(p), tile(tile), first_tile(first_tile), ahead(read(0)) {}

  __device__ __forceinline__ int key(int index, int box) const {
    return (first_tile + index) * C::kTileN + box * kKeys;
  }
  // No entry, and no index, leads out of the cache.
  __device__ __forceinline__ int read(int index) const {
    const int lane = threadIdx.x % 32;
    if constexpr (kPaged) {
      const int32_t* table = static_cast<const int32_t*>(p.page_table.data) + tile.batch * p.page_table.stride[0];
      const int first = key(index + lane / kOfTile, lane % kOfTile);
      const bool seen = first < tile.end && first + kKeys > tile.begin;
      return seen ? min(unsigned(table[unsigned(first) / C::kPageSize]), unsigned(p.pages - 1)) : 0;
    } else {
      return p.cache_batch_idx ? min(unsigned(p.cache_batch_idx[tile.batch]), unsigned(p.pages - 1)) : tile.batch;
    }
  }
  // Call for every tile, in order, before its pages are asked for.
  __device__ __forceinline__ void move_to(int index) {
    if (index % kTilesHeld == 0) held = ahead, ahead = read(index + kTilesHeld);
  }
  __device__ __forceinline__ int page_of(int index, int box) const {
    return __shfl_sync(~0u, held, index % kTilesHeld * kOfTile + box);
  }
  __device__ __forceinline__ int row_of(int index, int box) const {
    return kPaged ? unsigned(key(index, box)) % (kPaged ? C::kPageSize : 1) : key(index, box);
  }
  // The boxes of a tile that have keys which some row sees. The others are not loaded.
  __device__ __forceinline__ int first(int index) const { return max(0, (tile.begin - key(index, 0)) / kKeys); }
  __device__ __forceinline__ int end(int index) const {
    return min(kOfTile, (tile.end - key(index, 0) + kKeys - 1) / kKeys);
  }
};

}  // namespace fagen

namespace fagen {

template <class C>
static cudaError_t map_cache(CUtensorMap* map, CUtensorMapDataType type, const fagen_decode_params& p,
                             const fagen_tensor& t, int columns) {
  const Dimension dimensions[3] = {
      {p.page_size, t.stride[1], KeyBoxes<C>::kKeys}, {p.kv_heads, t.stride[2], 1}, {p.pages, t.stride[0], 1}};
  return make_map(map, type, t.data, columns, dimensions);
}

}  // namespace fagen

// ---- fagen/sm90/mla/kernel.cuh ---------------------------------------------------------------------------
// Decode of latent attention on Hopper: a block takes one split of the keys of one row tile.
//
//   warpgroups 0, 1   consumers: the scores of every other key tile each, half of the columns of O each    consumer.cuh
//   warpgroup 2       one warp loads key tiles, once: their first columns are the values                   producer.cuh
//
// Two blocks that share a row tile's keys merge their parts as a cluster (cluster_merge.cuh), several by a second
// kernel. The host's part: launch.cuh.
// ---- fagen/sm90/mla/consumer.cuh -------------------------------------------------------------------------
// A consumer warpgroup of the two. Of each pair of key tiles it computes the scores and weights of its own, and adds
// both tiles' values to its half of the columns of O, those of tile 0 first. While one warpgroup is at its softmax the
// other's products go on, and tile 0 is free for the next pair while tile 1 is at work:
//
//   warpgroup 0   S0 = Q K0^T | softmax, store P0 | O_left += P0 V0 ...................... | O_left += P1 V1, next S0
//   warpgroup 1   .............. S1 = Q K1^T ..... | O_right += P0 V0 | softmax, store P1 | O_right += P1 V1
//
// Both refer their weights to the same maxima: those after tile 0 come with P0, those after tile 1 with P1.
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

// ---- fagen/sm90/decode/store.cuh -------------------------------------------------------------------------
// The end of a warpgroup's rows: O and LSE, or a split's part of them for the merge.




// ---- fagen/sm80/decode/output.cuh ------------------------------------------------------------------------
// The end of a row tile: parts of its sums to O and LSE, and the merge of its splits.
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

// ---- fagen/common/merge_parts.cuh ------------------------------------------------------------------------
// Rows whose keys were divided: parts of O, unnormalised, each with the reference and the sum of its softmax, merged.

namespace fagen {

// Four columns of a row of O, unnormalised, and the row's reference and sum.
struct RowSums {
  float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
  float reference, sum = 0.f;
};

// Merge parts of a row, always in the same order. `stats(i)` gives reference and sum of part i,
// `sums(i)` its columns; with `kOneSum` all parts have the same reference and their columns are in the first.
template <bool kOneSum, class Stats, class Sums>
__device__ __forceinline__ RowSums merge_parts(int count, float scale_log2, Stats stats, Sums sums) {
  RowSums row;
  row.reference = OnlineSoftmax<1, false>::kNoKeys;
#pragma unroll 8  // so many reads are under way at once
  for (int i = 0; i < count; ++i) row.reference = fmaxf(row.reference, stats(i).x);
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float2 part = stats(i);
    const float factor = ptx::ex2((part.x - row.reference) * scale_log2);
    row.sum += part.y * factor;
    if (kOneSum && i > 0) continue;
    const float4 x = sums(i);
    row.o.x += x.x * factor, row.o.y += x.y * factor, row.o.z += x.z * factor, row.o.w += x.w * factor;
  }
  return row;
}

}  // namespace fagen


namespace fagen {

// The constants of a kv head's scores.
struct HeadScale {
  float score, value;  // q k times `score` is a score; sums times `value` are in units of v

  __device__ __forceinline__ HeadScale(const fagen_decode_params& p, int batch, int kv_head) {
    score = p.scale * scale_at(p.k_scale, batch, kv_head);
    value = scale_at(p.v_scale, batch, kv_head);
  }
  static __device__ __forceinline__ float scale_at(const fagen_tensor& t, int batch, int kv_head) {
    if (!t.data) return 1.f;
    return static_cast<const float*>(t.data)[batch * t.stride[0] + kv_head * t.stride[1]];
  }
};

template <class C, class Element>
struct DecodeOutput {
  static constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.69314718056f;
  const fagen_decode_params& p;
  const DecodeTile<C>& tile;
  float scale_log2, value_scale;  // scores are times scale_log2 in the base-2 logarithm

  // A packed row: where it goes, and what its sums are multiplied by.
  struct Row {
    Element* to;
    float inverse;
  };
  // With `want_lse` its LSE is written, too.
  __device__ __forceinline__ Row finish_row(int packed, float reference, float sum, bool want_lse) const {
    const int token = tile.first_q + packed / tile.group, head = tile.head(packed);
    float top = reference * scale_log2, total = sum, factor = 1.f;
    if constexpr (C::kSinks) {
      const float sink = p.sinks[head] * kLog2e, higher = fmaxf(top, sink);
      factor = ptx::ex2(top - higher);
      total = total * factor + ptx::ex2(sink - higher);
      top = higher;
    }
    if (p.lse && want_lse) {
      const int64_t at =
          p.cu_seqlens_q ? int64_t(head) * p.rows + token : (int64_t(tile.batch) * p.heads + head) * p.seqlen_q + token;
      p.lse[at] = total == 0.f ? -INFINITY : top * kLn2 + logf(total);
    }
    const float inverse = total == 0.f ? 0.f : factor * value_scale / total;
    return {static_cast<Element*>(p.o.data) + (p.cu_seqlens_q ? 0 : tile.batch * p.o.stride[0]) +
                token * p.o.stride[1] + head * p.o.stride[2],
            inverse};
  }
  // Write columns `column` to `column` + 3.
  __device__ __forceinline__ void write_4(const Row& row, int column, const float4& o) const {
    Element* to = row.to + column;
    const uint2 pairs = make_uint2(pack<Element>(o.x * row.inverse, o.y * row.inverse),
                                   pack<Element>(o.z * row.inverse, o.w * row.inverse));
    if constexpr (C::kAligned) {
      if (column < p.head_dim_v) *reinterpret_cast<uint2*>(to) = pairs;
    } else {
      Element e[4];
      memcpy(e, &pairs, 8);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column + i < p.head_dim_v) to[i] = e[i];
    }
  }
  // Both, and with the first columns the row's LSE.
  __device__ __forceinline__ void write(int packed, int column, const RowSums& row) const {
    write_4(finish_row(packed, row.reference, row.sum, column == 0), column, row.o);
  }
};

// Call visit(row of the tile, column) for every 4 columns of the tile's rows, in turn by the threads of `blocks`
// blocks, of which this is number `rank`.
template <class C, class Visit>
__device__ __forceinline__ void for_4_columns(const DecodeTile<C>& tile, int threads, Visit visit, int rank = 0,
                                              int blocks = 1) {
  constexpr int kPieces = C::kHeadDimV / 4;
  const int rows = min(C::kTileM, tile.rows() - tile.first_row);
  for (int i = rank * threads + threadIdx.x; i < rows * kPieces; i += blocks * threads)
    visit(i / kPieces, i % kPieces * 4);
}

// Where a split's part of a tile lies.
template <class C>
__device__ __forceinline__ int64_t part_row(const DecodeGrid& grid, int tile, int split, int row) {
  return (int64_t(tile) * grid.splits + split) * C::kTileM + row;
}

// Merge a tile's splits; their parts may have been written by other blocks just now. `rank`, `blocks`: as above.
template <class C, class Element>
__device__ __forceinline__ void merge_splits(const DecodeOutput<C, Element>& output, const DecodeGrid& grid, int used,
                                             int threads, int rank = 0, int blocks = 1) {
  const DecodeTile<C>& tile = output.tile;
  for_4_columns<C>(
      tile, threads,
      [&](int row, int column) {
        const RowSums sums = merge_parts<false>(
            used, output.scale_log2, [&](int i) { return __ldcg(grid.stats + part_row<C>(grid, tile.index, i, row)); },
            [&](int i) {
              return __ldcg(grid.sums + part_row<C>(grid, tile.index, i, row) * (C::kHeadDimV / 4) + column / 4);
            });
        output.write(tile.first_row + row, column, sums);
      },
      rank, blocks);
}

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

// Copy the rows of q to shared memory, in slabs; rows and columns that are not there become 0. The work of kThreads
// threads, which meet at barrier `id`.
template <class C, class Element, int kThreads>
__device__ __forceinline__ void load_rows(const fagen_decode_params& p, const DecodeTile<C>& tile, uint32_t to,
                                          int id) {
  constexpr int kChunks = (C::kHeadDim + kSlabColumns - 1) / kSlabColumns * 8;  // 16 bytes each
  const Element* q = static_cast<const Element*>(p.q.data) + (p.cu_seqlens_q ? 0 : tile.batch * p.q.stride[0]);
  for (int row = threadIdx.x / 32; row < C::kTileM; row += kThreads / 32) {
    const int packed = tile.first_row + row;
    const bool there = packed < tile.rows();
    const Element* from =
        there ? q + (tile.first_q + packed / tile.group) * p.q.stride[1] + tile.head(packed) * p.q.stride[2] : q;
    for (int chunk = threadIdx.x % 32; chunk < kChunks; chunk += 32) {
      const bool valid = there && chunk * 8 < p.head_dim;
      ptx::cp_async_16(to + (chunk / 8 * C::kTileM + row) * kRowBytes + ((chunk % 8 ^ row % 8) << 4),
                       valid ? from + chunk * 8 : q, valid);
    }
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_shared_writes();
  ptx::barrier_sync(id, kThreads);
}

// Call visit(column, 4 sums) for this lane's columns of its row r, of pieces of 8 columns from `first` on. Lanes of a
// quad hold two columns each; neighbours swap so that each has four of one piece.
template <int kPieces, class Visit>
__device__ __forceinline__ void for_4_columns_of(const float (&o)[kPieces][4], int r, int first, Visit visit) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane % 2;
  first += odd * 8 + lane % 4 / 2 * 4;
#pragma unroll
  for (int n = 0; n < kPieces; n += 2) {
    const float2 low = make_float2(o[n][r * 2], o[n][r * 2 + 1]);
    const float2 high = make_float2(o[n + 1][r * 2], o[n + 1][r * 2 + 1]);
    const float x = __shfl_xor_sync(~0u, odd ? low.x : high.x, 1), y = __shfl_xor_sync(~0u, odd ? low.y : high.y, 1);
    visit(first + n * 8, odd ? make_float4(x, y, high.x, high.y) : make_float4(low.x, low.y, x, y));
  }
}

// Store row r of this thread, `row` of the tile, given the reference and the sum of all its weights. The columns of `o`
// are those from `first` on; `alone`: there is one split.
template <class C, class Element, int kPieces>
__device__ __forceinline__ void store_row(const DecodeOutput<C, Element>& output, const DecodeGrid& grid, int split,
                                          bool alone, const float (&o)[kPieces][4], int r, int row, int first,
                                          float reference, float sum) {
  const DecodeTile<C>& tile = output.tile;
  const bool there = tile.first_row + row < tile.rows(), leads = there && first == 0 && threadIdx.x % 4 == 0;
  if (alone) {
    const auto to = output.finish_row(there ? tile.first_row + row : 0, reference, sum, leads);
    for_4_columns_of(o, r, first, [&](int column, const float4& x) {
      if (there) output.write_4(to, column, x);
    });
  } else {
    const int64_t at = part_row<C>(grid, tile.index, split, row);
    float4* to = grid.sums + at * (C::kHeadDimV / 4);
    if (leads) grid.stats[at] = make_float2(reference, sum);
    for_4_columns_of(o, r, first, [&](int column, const float4& x) {
      if (there) to[column / 4] = x;
    });
  }
}

// ---- the merge of splits

// A thread of the merge reads so many parts at once: one after the other would be as many reads that wait.
constexpr int kPartsAtOnce = 4;

// Threads that share the splits of 4 columns, so that up to 32 are read at once.
__host__ __device__ __forceinline__ int merge_team(int splits) {
  return splits <= kPartsAtOnce ? 1 : splits <= 2 * kPartsAtOnce ? 2 : splits <= 4 * kPartsAtOnce ? 4 : 8;
}

// Blocks that merge a row tile's splits, 4 columns of a row a team. The fewest are the fastest: each begins with reads
// of lengths that it waits for.
template <class C>
__host__ __device__ __forceinline__ int merge_blocks(const fagen_decode_params& p, int splits) {
  const int64_t packed = int64_t(p.seqlen_q) * (p.heads / p.kv_heads);
  const int rows = packed < C::kTileM ? int(packed) : C::kTileM;
  return (rows * (C::kHeadDimV / 4) * merge_team(splits) + kCombineThreads - 1) / kCombineThreads;
}

// Block `rank` of them. Parts are added in an order that depends on how many there are, and on nothing else: where the
// launch has a larger team than so many ask for, the rest of it has none.
template <class C, class Element>
__device__ __forceinline__ void merge_share(const DecodeOutput<C, Element>& output, const DecodeGrid& grid, int used,
                                            int rank) {
  constexpr int kPieces = C::kHeadDimV / 4;
  constexpr float kNoKeys = OnlineSoftmax<1, false>::kNoKeys;
  const DecodeTile<C>& tile = output.tile;
  const int team = merge_team(grid.splits), at_work = merge_team(used), thread = rank * kCombineThreads + threadIdx.x;
  const int member = thread % team, piece = thread / team % kPieces, row = thread / team / kPieces;
  const bool there = row < C::kTileM && tile.first_row + row < tile.rows();
  const int64_t at = part_row<C>(grid, tile.index, 0, there ? row : 0);
  const float2* stats = grid.stats + at;
  const float4* sums = grid.sums + at * kPieces + piece;
  RowSums all;
  all.reference = kNoKeys;
  const auto refer_to = [&](float top) {
    const float factor = ptx::ex2((all.reference - top) * output.scale_log2);
    all.reference = top, all.sum *= factor;
    all.o.x *= factor, all.o.y *= factor, all.o.z *= factor, all.o.w *= factor;
  };
  for (int first = member < at_work ? member : used; first < used; first += kPartsAtOnce * at_work) {
    float2 part[kPartsAtOnce];
    float4 x[kPartsAtOnce];
    float top = all.reference;
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const int n = first + i * at_work;
      part[i] = n < used ? __ldcg(stats + n * C::kTileM) : make_float2(kNoKeys, 0.f);
      x[i] = n < used ? __ldcg(sums + int64_t(n) * C::kTileM * kPieces) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    for (const float2& its : part) top = fmaxf(top, its.x);
    refer_to(top);
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const float factor = ptx::ex2((part[i].x - top) * output.scale_log2);
      all.sum += part[i].y * factor;
      all.o.x += x[i].x * factor, all.o.y += x[i].y * factor, all.o.z += x[i].z * factor, all.o.w += x[i].w * factor;
    }
  }
  float top = all.reference;
  for (int step = 1; step < team; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  refer_to(top);
  for (int step = 1; step < team; step *= 2) {
    all.sum += __shfl_xor_sync(~0u, all.sum, step);
    all.o.x += __shfl_xor_sync(~0u, all.o.x, step), all.o.y += __shfl_xor_sync(~0u, all.o.y, step);
    all.o.z += __shfl_xor_sync(~0u, all.o.z, step), all.o.w += __shfl_xor_sync(~0u, all.o.w, step);
  }
  if (there && member == 0) output.write(tile.first_row + row, piece * 4, all);
}

}  // namespace fagen

// ---- fagen/sm90/mla/cluster_merge.cuh --------------------------------------------------------------------
// The merge of a row tile's two splits where their blocks are a cluster: block i ends with the columns of warpgroup i,
// to which it adds the other's part of these. No part goes through the workspace, and no kernel follows.
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

// ---- fagen/sm90/mla/layout.cuh ---------------------------------------------------------------------------
// Latent attention (MLA): a key is kHeadDimV latent columns, which are its value as well, and a slab of rotary ones. A
// block has 64 rows of q. Two warpgroups share them: each computes the scores of every other key tile, and owns half of
// the columns of O.



namespace fagen {

// A config as the decode headers ask for it.
template <class Base>
struct MlaConfig : Base {
  static constexpr int kTileM = kGroupRows, kTileN = 64, kBlocksPerSm = 1;
  static constexpr bool kCompact = false;  // blocks of packed rows: of every tile that there may be
  static constexpr bool kMergesInCluster = false, kMergesInLastBlock = false;
};

template <class C>
struct MlaLayout {
  static constexpr int kGroups = 2;  // consumer warpgroups
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kBuffers = 2;  // key tiles in shared memory: one of each warpgroup
  static constexpr int kHalf = C::kHeadDimV / 2;  // columns of O of a warpgroup
  static constexpr int kHalfSlabs = kHalf / kSlabColumns, kSlabs = 2 * kHalfSlabs + 1;  // the last one is rotary
  static constexpr int kRotary = kSlabs - 1;
  static constexpr int kSlabBytes = C::kTileN * kRowBytes, kTileBytes = kSlabs * kSlabBytes;  // of q and of keys alike
  static_assert(C::kTileM == C::kTileN && C::kHeadDim == kSlabs * kSlabColumns && kHalf % kSlabColumns == 0,
                "a key is two halves of whole slabs, and a slab of rotary columns");
  static_assert(C::kSharedKv && !C::kFp8Cache && C::kAligned,
                "values are columns of keys, which the copy engine takes");

  // Offsets: the tile of q, the key tiles, the weights of warpgroup 0, (warpgroup, row): reference, sum, the barriers
  // of the slabs of key tiles, of their parts. The weights of warpgroup 1 come where the rotary columns of q were,
  // which both keep in registers.
  static constexpr int kTiles = kTileBytes, kWeights = kTiles + kBuffers * kTileBytes;
  static constexpr int kReferences = kWeights + kSlabBytes;
  static constexpr int kSums = kReferences + kGroups * C::kTileM * 4, kFull = kSums + kGroups * C::kTileM * 4;
  static constexpr int kEmpty = kFull + kBuffers * kSlabs * 8, kEnd = kEmpty + kBuffers * kGroups * 8;
  static constexpr int kSmemBytes = kEnd + kSmemAlignment;  // room to align

  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // of 168 each

  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
  static_assert(kConsumerRegisters == Derived::registers, "Python and CUDA disagree about the registers of a thread");
};

// Whether the blocks of a tile's splits merge them among themselves. `alone`: one of them has all keys.
__device__ __forceinline__ bool merges_in_cluster(const DecodeGrid& grid, bool alone) {
  return grid.clustered && !alone;
}

// Named barriers; 0 is __syncthreads.
enum MlaBarrier {
  kRowsLoaded = 1,
  kFirstWeights,
  kSecondWeights,
  kRowsSummed,
  kOfGroup  // and the next one: each warpgroup's own
};

// A part of a key tile: the slabs that the same warpgroup is the last to read, and frees. Of tile i of a pair warpgroup
// i computes the scores, slab by slab as they come.
template <class C>
struct KeyPart {
  using L = MlaLayout<C>;
  uint32_t smem;
  int buffer, group;

  __device__ __forceinline__ uint32_t tile() const { return smem + L::kTiles + buffer * L::kTileBytes; }
  __device__ __forceinline__ uint32_t full(int slab) const { return smem + L::kFull + (buffer * L::kSlabs + slab) * 8; }
  __device__ __forceinline__ uint32_t empty() const { return smem + L::kEmpty + (buffer * L::kGroups + group) * 8; }
  // Free it: one arrival a warp.
  __device__ __forceinline__ void release() const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty());
  }
  __device__ __forceinline__ bool has_rotary() const { return buffer != group; }
  // Slab i of the part; of kHalfSlabs, and of the rotary one behind them if it has that.
  __device__ __forceinline__ int slab(int i) const {
    return i < L::kHalfSlabs ? group * L::kHalfSlabs + i : L::kRotary;
  }
  __device__ __forceinline__ int slabs() const { return L::kHalfSlabs + has_rotary(); }
};

}  // namespace fagen

namespace fagen {

template <class C, int kGroup>
struct ClusterMerge {
  using L = MlaLayout<C>;
  static constexpr int kPieces = L::kHalf / 8, kBatch = 8;  // of 8 columns: a warpgroup's, those read at once
  // Where q and keys were: (piece, thread) sums of the columns that the other block ends with; (row) reference, sum.
  static constexpr int kStats = kPieces * 128 * 16;
  static_assert(kPieces % kBatch == 0 && kStats + C::kTileM * 16 <= L::kWeights, "a part has the place of q and keys");

  const uint32_t smem;
  const int rank;    // of the block
  const int row[2];  // of the thread
  const float scale_log2;

  __device__ __forceinline__ uint32_t sums(int piece) const { return smem + (piece * 128 + threadIdx.x % 128) * 16; }
  __device__ __forceinline__ uint32_t stats(int r) const { return smem + kStats + row[r] * 16; }

  // Becomes the sums of both: true if this warpgroup's columns are the block's to write. `sum`: of a row's weights. All
  // threads of the block call it, when all have read q and keys.
  __device__ __forceinline__ bool run(float (&o)[kPieces][4], float (&reference)[2], float (&sum)[2]) const {
    const bool writes = rank == kGroup;
    if (!writes) {
#pragma unroll
      for (int n = 0; n < kPieces; ++n) store(sums(n), o[n][0], o[n][1], o[n][2], o[n][3]);
      if (threadIdx.x % 4 == 0)
        for (int r = 0; r < 2; ++r) store(stats(r), reference[r], sum[r], 0.f, 0.f);
    }
    ptx::cluster_sync();
    if (writes) add(o, reference, sum);
    ptx::cluster_sync();  // none ends while the other reads its shared memory
    return writes;
  }

 private:
  static __device__ __forceinline__ void store(uint32_t to, float x, float y, float z, float w) {
    ptx::st_shared_16(to, make_uint4(__float_as_uint(x), __float_as_uint(y), __float_as_uint(z), __float_as_uint(w)));
  }
  __device__ __forceinline__ void add(float (&o)[kPieces][4], float (&reference)[2], float (&sum)[2]) const {
    float own[2], its[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float4 other = ptx::ld_cluster_16(stats(r), 1 - kGroup);  // reference, sum
      const float top = fmaxf(reference[r], other.x);
      own[r] = ptx::ex2((reference[r] - top) * scale_log2), its[r] = ptx::ex2((other.x - top) * scale_log2);
      reference[r] = top, sum[r] = sum[r] * own[r] + other.y * its[r];
    }
#pragma unroll
    for (int first = 0; first < kPieces; first += kBatch) {
      __syncwarp();  // or all loads begin at once, and registers are short
      float4 part[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) part[n] = ptx::ld_cluster_16(sums(first + n), 1 - kGroup);
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        float (&to)[4] = o[first + n];
        to[0] = to[0] * own[0] + part[n].x * its[0], to[1] = to[1] * own[0] + part[n].y * its[0];
        to[2] = to[2] * own[1] + part[n].z * its[1], to[3] = to[3] * own[1] + part[n].w * its[1];
      }
    }
  }
};

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

template <class C, class Element, int kGroup>
struct MlaConsumer {
  using L = MlaLayout<C>;
  static constexpr int kOther = 1 - kGroup;
  static constexpr int kPieces = C::kTileN / 8, kSteps = C::kTileN / 16;

  const DecodeTile<C>& tile;
  const uint32_t smem;
  const Lane lane;
  const int warp_row = threadIdx.x / 32 % 4 * 16;  // the warp's first row
  OnlineSoftmax<2, C::kRescale == Rescale::deferred> softmax;
  float s_acc[kPieces][4];
  float o[L::kHalf / 8][4];
  uint32_t weights[kSteps][4], q_rotary[4][4];

  __device__ __forceinline__ MlaConsumer(const DecodeTile<C>& tile, float scale_log2, uint32_t smem)
      : tile(tile), smem(smem), softmax(scale_log2) {
    clear(o);
  }
  __device__ __forceinline__ int row_of(int r) const { return warp_row + r * 8 + lane.row; }

  // ---- products

  // Start a part of S = Q K^T of the own tile, slab by slab as they come, a group each: first that of the own columns,
  // which is the first to be free, then the other.
  template <bool kOwn>
  __device__ __forceinline__ void start_scores(int phase) {
    const uint32_t smem = __shfl_sync(~0u, this->smem, 0);  // or descriptors of all products are kept for the next pair
    const KeyPart<C> part{smem, kGroup, kOwn ? kGroup : kOther};
    pin(s_acc);
#pragma unroll
    for (int i = 0; i < L::kHalfSlabs + !kOwn; ++i) {
      const int slab = part.slab(i);
      if (slab == L::kRotary) pin(q_rotary);
      const Operand q = Operand::of_rows(smem + slab * L::kSlabBytes);
      const Operand k = Operand::of_rows(part.tile() + slab * L::kSlabBytes);
      ptx::mbarrier_wait(part.full(slab), phase);
      ptx::wgmma_fence();
#pragma unroll
      for (int d = 0; d < kSlabColumns / 16; ++d)
        if (slab == L::kRotary)
          ptx::wgmma<C::kTileN, false>(s_acc, q_rotary[d], k.at(d * 32), true);
        else
          ptx::wgmma<C::kTileN, false, false>(s_acc, q.at(d * 32), k.at(d * 32), !kOwn || i + d > 0);
      ptx::wgmma_commit();
    }
  }
  __device__ __forceinline__ void start_all_scores(int phase) { start_scores<true>(phase), start_scores<false>(phase); }
  template <int kPending>
  __device__ __forceinline__ void wait_scores() {
    ptx::wgmma_wait<kPending>();
    pin(s_acc);
  }
  __device__ __forceinline__ Operand values(const KeyPart<C>& part) const {
    return Operand::of_columns(part.tile() + part.slab(0) * L::kSlabBytes, L::kSlabBytes);
  }
  // Start O += P V of the own tile, P in registers; of the other warpgroup's tile, P in shared memory.
  __device__ __forceinline__ void start_own_values() {
    const Operand v = values({smem, kGroup, kGroup});
    pin(o);
    pin(weights);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < kSteps; ++n) ptx::wgmma<L::kHalf, true>(o, weights[n], v.at(n * 16 * kRowBytes), true);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void start_other_values() {
    const KeyPart<C> part{smem, kOther, kGroup};
    const Operand v = values(part), p = Operand::of_rows(weights_of(kOther));
    pin(o);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < kSteps; ++n) ptx::wgmma<L::kHalf, false, true>(o, p.at(n * 32), v.at(n * 16 * kRowBytes), true);
    ptx::wgmma_commit();
  }
  // The rotary columns of q, which lie in shared memory, in registers: products of them read half as much there.
  __device__ __forceinline__ void keep_rotary_q() {
    const int row = warp_row + lane.id % 16;
    const uint32_t from = smem + L::kRotary * L::kSlabBytes + row * kRowBytes + ((lane.id / 16 ^ lane.id % 8) << 4);
#pragma unroll
    for (int n = 0; n < 4; ++n) ptx::ldmatrix_x4(q_rotary[n], from ^ n * 32);
  }
  // Wait for the values of tile `buffer`, behind which kPending groups of products may be under way, and free the part
  // that they have read.
  template <int kPending = 0>
  __device__ __forceinline__ void wait_values(int buffer) {
    ptx::wgmma_wait<kPending>();
    pin(o);
    KeyPart<C>{smem, buffer, kGroup}.release();
  }

  // ---- softmax

  // Hide the keys from each row's end on. `key`: the first of the tile.
  __device__ __forceinline__ void hide(int key) {
    if (key + C::kTileN <= tile.full_end) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int to = tile.end_of(tile.token(tile.first_row + row_of(r))) - key - lane.column;
#pragma unroll
      for (int n = 0; n < kPieces; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (n * 8 + e >= to) s_acc[n][r * 2 + e] = -INFINITY;
    }
  }
  // Take the maxima of the own tile into the softmax: true if O must be multiplied by `factor`.
  __device__ __forceinline__ bool update_max(float (&factor)[2]) {
    float row_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max[r] = -INFINITY;
#pragma unroll
      for (const auto& piece : s_acc) row_max[r] = fmaxf(row_max[r], fmaxf(piece[r * 2], piece[r * 2 + 1]));
      factor[r] = 1.f;
    }
    const bool moved = __any_sync(~0u, softmax.exceeds_slack(row_max));
    if (moved) {
      for (float& x : row_max) x = quad_max(x);
      softmax.set_reference(row_max, factor);
    } else {
      softmax.refresh_offset();
    }
    return moved;
  }
  // Leave the references after the own tile to the other warpgroup.
  __device__ __forceinline__ void share_references() const {
    if (lane.id % 4 == 0)
#pragma unroll
      for (int r = 0; r < 2; ++r) ptx::st_shared_4(references(kGroup, r), __float_as_uint(softmax.reference[r]));
  }
  // Take those after the other one's tile: true if O must be multiplied by `factor`.
  __device__ __forceinline__ bool adopt_references(float (&factor)[2]) {
    float next[2];
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      next[r] = __uint_as_float(ptx::ld_shared_4(references(kOther, r)));
      moved |= next[r] != softmax.reference[r];
      factor[r] = 1.f;
    }
    if (!__any_sync(~0u, moved)) return false;
    softmax.set_reference(next, factor);
    return true;
  }
  __device__ __forceinline__ uint32_t references(int group, int r) const {
    return smem + L::kReferences + (group * C::kTileM + row_of(r)) * 4;
  }
  // S becomes the weights. References that are too large for the exponential's FMA are subtracted first.
  __device__ __forceinline__ void exponentiate() {
    if (__any_sync(~0u, softmax.offset_too_large())) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (auto& piece : s_acc) piece[r * 2] -= softmax.reference[r], piece[r * 2 + 1] -= softmax.reference[r];
        softmax.offset[r] = 0.f;
      }
    }
#pragma unroll
    for (auto& piece : s_acc)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        piece[i] = softmax.exponentiate(piece[i], i / 2);
        softmax.sum[i / 2] += piece[i];
      }
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &s_acc[2 * n + i / 2][i % 2 * 2];
        weights[n][i] = pack<Element>(pair[0], pair[1]);
      }
  }
  __device__ __forceinline__ uint32_t weights_of(int group) const {
    return smem + (group ? L::kRotary * L::kSlabBytes : L::kWeights);
  }
  __device__ __forceinline__ void store_weights() const {
    const int row = warp_row + lane.id % 16;
    const uint32_t to = weights_of(kGroup) + row * kRowBytes + ((lane.id / 16 ^ lane.id % 8) << 4);
#pragma unroll
    for (int n = 0; n < kSteps; ++n) ptx::stmatrix_x4(to ^ n * 32, weights[n]);
    ptx::fence_shared_writes();
  }
  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (auto& piece : o)
#pragma unroll
      for (int i = 0; i < 4; ++i) piece[i] *= factor[i / 2];
  }

  // Rows of the cache that nobody sees may hold anything, and 0 times that need not be 0: clear them in this
  // warpgroup's half of a tile. `key`: the first of the tile.
  __device__ __forceinline__ void clear_hidden_rows(int buffer, int key) const {
    const int first = tile.end - key;
    if (first >= C::kTileN) return;
    const KeyPart<C> part{smem, buffer, kGroup};
    for (int i = first * 8 + threadIdx.x % 128; i < C::kTileN * 8; i += 128)
#pragma unroll
      for (int slab = 0; slab < L::kHalfSlabs; ++slab)
        ptx::st_shared_16(part.tile() + part.slab(slab) * L::kSlabBytes + i * 16, make_uint4(0, 0, 0, 0));
    ptx::fence_shared_writes();
    ptx::barrier_sync(kOfGroup + kGroup, 128);
  }

  // ---- a pair of tiles, the last one perhaps without the second

  // Weights from the scores of the own tile: true if O must be multiplied by `factor`.
  __device__ __forceinline__ bool weigh(int key, float (&factor)[2]) {
    hide(key);
    const bool moved = update_max(factor);
    share_references();
    exponentiate();
    store_weights();
    return moved;
  }
  // Warpgroup 0, whose scores of the pair are there; with kMore those of the next one are there at the end.
  template <bool kPair, bool kMore>
  __device__ __forceinline__ void visit_first(int key, int phase) {
    float factor[2];
    const bool moved = weigh(key, factor);
    ptx::barrier_arrive(kFirstWeights, L::kGroups * 128);
    if (moved) rescale(factor);
    if constexpr (!kPair) clear_hidden_rows(0, key);
    start_own_values();
    wait_values(0);
    if constexpr (kPair) {
      ptx::barrier_sync(kSecondWeights, L::kGroups * 128);
      if (adopt_references(factor)) rescale(factor);
      clear_hidden_rows(1, key + C::kTileN);
      start_other_values();
      if constexpr (kMore) {  // the tensor cores go from one to the other
        start_scores<true>(phase ^ 1);
        wait_values<L::kHalfSlabs>(1);
        start_scores<false>(phase ^ 1);
        wait_scores<0>();
      } else {
        wait_values(1);
      }
    }
  }
  template <bool kPair>
  __device__ __forceinline__ void visit_second(int key, int phase) {
    float factor[2];
    if constexpr (kPair) start_all_scores(phase);
    ptx::barrier_sync(kFirstWeights, L::kGroups * 128);
    if (adopt_references(factor)) rescale(factor);
    if constexpr (!kPair) clear_hidden_rows(0, key);
    start_other_values();
    if constexpr (kPair) {
      wait_scores<1>();  // the values of tile 0 go on under the softmax of tile 1
      const bool moved = weigh(key + C::kTileN, factor);
      ptx::barrier_arrive(kSecondWeights, L::kGroups * 128);
      wait_values(0);
      if (moved) rescale(factor);
      clear_hidden_rows(1, key + C::kTileN);
      start_own_values();
    }
    wait_values(kPair);
  }

  __device__ __forceinline__ void visit_keys(const DecodeSplit<C>& split) {
    const auto key = [](int tile) { return tile * C::kTileN; };
    int phase = 0, i = split.first;
    if constexpr (kGroup == 0) {
      if (i >= split.end) return;
      start_all_scores(phase);
      wait_scores<0>();
#pragma unroll 1
      for (; i + 2 < split.end; i += 2, phase ^= 1) visit_first<true, true>(key(i), phase);
      i + 1 < split.end ? visit_first<true, false>(key(i), phase) : visit_first<false, false>(key(i), phase);
    } else {
#pragma unroll 1
      for (; i + 1 < split.end; i += 2, phase ^= 1) visit_second<true>(key(i), phase);
      if (i < split.end) visit_second<false>(key(i), phase);
    }
  }

  // ---- the end

  // Write the rows, or leave the split's part of them to the merge.
  __device__ __forceinline__ void finish(const DecodeOutput<C, Element>& output, const DecodeGrid& grid, int split,
                                         bool alone) {
    const uint32_t sums = smem + L::kSums;
    float sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = quad_sum(softmax.sum[r]);
      if (lane.id % 4 == 0) ptx::st_shared_4(sums + (kGroup * C::kTileM + row_of(r)) * 4, __float_as_uint(sum[r]));
    }
    ptx::barrier_sync(kRowsSummed, L::kGroups * 128);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = 0.f;
#pragma unroll
      for (int group = 0; group < L::kGroups; ++group)
        sum[r] += __uint_as_float(ptx::ld_shared_4(sums + (group * C::kTileM + row_of(r)) * 4));
    }
    if (merges_in_cluster(grid, alone)) {
      const ClusterMerge<C, kGroup> merge{smem, split, {row_of(0), row_of(1)}, output.scale_log2};
      if (!merge.run(o, softmax.reference, sum)) return;
      alone = true;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      store_row(output, grid, split, alone, o, r, row_of(r), kGroup * L::kHalf, softmax.reference[r], sum[r]);
  }
};

}  // namespace fagen

// ---- fagen/sm90/mla/producer.cuh -------------------------------------------------------------------------
// The producer warp: loads the parts of key tiles in the order in which they become free, page by page.

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

// ---- fagen/ptx/tma_hinted.cuh ----------------------------------------------------------------------------
// Copies of the copy engine with a word to L2 about what comes after.
#include <cuda.h>
#include <stdint.h>

namespace fagen::ptx {

// The policy by which L2 gives up a line first: it is loaded once.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// As tma_load.
__device__ __forceinline__ void tma_load_hinted(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column,
                                                int row, int head, int batch, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}

}  // namespace fagen::ptx



namespace fagen {

// Load a part of tile `index` of the split, once the last pair's is read. Row tiles of a sequence read the same keys at
// the same time, and nobody reads them again.
template <class C>
__device__ __forceinline__ void load_part(const KeyPart<C>& part, const CUtensorMap& map, const KeyBoxes<C>& boxes,
                                          int index) {
  using Boxes = KeyBoxes<C>;
  const int end = boxes.end(index);
  int pages[Boxes::kOfTile];
#pragma unroll
  for (int box = 0; box < Boxes::kOfTile; ++box) pages[box] = boxes.page_of(index, box);
  if (threadIdx.x % 32 > 0) return;
  const uint64_t once = ptx::evict_first();
  ptx::mbarrier_wait(part.empty(), index / 2 % 2 ^ 1);
  for (int i = 0; i < part.slabs(); ++i) {
    const int slab = part.slab(i);
    const uint32_t to = part.tile() + slab * MlaLayout<C>::kSlabBytes;
    ptx::mbarrier_arrive_expect(part.full(slab), end * Boxes::kKeys * kRowBytes);
#pragma unroll
    for (int box = 0; box < Boxes::kOfTile; ++box)
      if (box < end)
        ptx::tma_load_hinted(to + box * Boxes::kKeys * kRowBytes, &map, part.full(slab), slab * kSlabColumns,
                             boxes.row_of(index, box), boxes.tile.kv_head, pages[box], once);
  }
}

template <class C>
__device__ __forceinline__ void load_keys(const fagen_decode_params& p, const CUtensorMap& map,
                                          const DecodeTile<C>& tile, const DecodeSplit<C>& split, uint32_t smem) {
  KeyBoxes<C> boxes(p, tile, split.first);
  const int tiles = split.end - split.first;
#pragma unroll 1
  for (int index = 0; index < tiles; index += 2) {
    boxes.move_to(index);
    load_part<C>({smem, 0, 0}, map, boxes, index);
    load_part<C>({smem, 0, 1}, map, boxes, index);
    if (index + 1 == tiles) return;
    load_part<C>({smem, 1, 1}, map, boxes, index + 1);
    load_part<C>({smem, 1, 0}, map, boxes, index + 1);
  }
}

}  // namespace fagen

namespace fagen {

template <class C>
__device__ __forceinline__ void init_parts(uint32_t smem) {
  for (int part = 0; part < 4; ++part) {
    const KeyPart<C> its{smem, part / 2, part % 2};
    for (int i = 0; i < its.slabs(); ++i) ptx::mbarrier_init(its.full(its.slab(i)), 1);
    ptx::mbarrier_init(its.empty(), 4);  // warps of the warpgroup that reads it last
  }
  ptx::fence_mbarrier_init();
}

template <class C, class Element>
__device__ __forceinline__ DecodeOutput<C, Element> output_of(const fagen_decode_params& p, const DecodeTile<C>& tile) {
  const HeadScale scale(p, tile.batch, tile.kv_head);
  return {p, tile, fmaxf(scale.score, 1e-37f) * DecodeOutput<C, Element>::kLog2e, scale.value};
}

template <class C, class Element, int kGroup>
__device__ __forceinline__ void consume(const fagen_decode_params& p, const DecodeGrid& grid, const DecodeTile<C>& tile,
                                        const DecodeSplit<C>& split, int split_index, uint32_t smem) {
  const DecodeOutput<C, Element> output = output_of<C, Element>(p, tile);
  MlaConsumer<C, Element, kGroup> consumer(tile, output.scale_log2, smem);
  load_rows<C, Element, MlaLayout<C>::kGroups * 128>(p, tile, smem, kRowsLoaded);
  consumer.keep_rotary_q();
  consumer.visit_keys(split);
  consumer.finish(output, grid, split_index, split.used == 1);
}

template <class C, class Element>
__device__ __forceinline__ void run_block(const fagen_decode_params& p, const DecodeGrid& grid, const CUtensorMap& map,
                                          unsigned char* memory) {
  using L = MlaLayout<C>;
  const uint32_t smem = (ptx::shared_address(memory) + kSmemAlignment - 1) & ~uint32_t(kSmemAlignment - 1);
  ptx::start_next_kernel();
  if (threadIdx.x == 0) {  // before lengths are waited for
    ptx::prefetch_map(&map);
    init_parts<C>(smem);
  }
  // neighbours are row tiles of a sequence, since they read the same keys, or the splits of a cluster
  const int neighbours = grid.clustered ? 1 : grid.row_tiles * p.kv_heads;
  const int all = blockIdx.x / neighbours, split_index = all % grid.splits;
  const DecodeTile<C> tile(p, grid, all / grid.splits * neighbours + blockIdx.x % neighbours);
  const DecodeSplit<C> split(tile, grid, split_index);
  const bool merges = merges_in_cluster(grid, split.used == 1);  // then blocks without keys come along
  if (tile.first_row >= tile.rows() || (!merges && split_index >= split.used)) return;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well
  __syncthreads();
  if (group == L::kGroups) {
    ptx::fewer_registers<L::kProducerRegisters>();
    if (threadIdx.x / 32 % 4 == 0) load_keys(p, map, tile, split, smem);
    __syncwarp();
    if (merges) ptx::cluster_sync(), ptx::cluster_sync();  // as the consumers
  } else {
    ptx::more_registers<L::kConsumerRegisters>();
    if (group == 0)
      consume<C, Element, 0>(p, grid, tile, split, split_index, smem);
    else
      consume<C, Element, 1>(p, grid, tile, split, split_index, smem);
  }
}

// A share of the merge of a row tile's splits.
template <class C, class Element>
__device__ __forceinline__ void run_merge(const fagen_decode_params& p, const DecodeGrid& grid) {
  const DecodeTile<C> tile(p, grid, blockIdx.x / merge_blocks<C>(p, grid.splits));
  const DecodeSplit<C> split(tile, grid, 0);
  ptx::wait_for_previous_kernel();  // all do, or this kernel might end first; lengths were there before that one began
  if (tile.first_row >= tile.rows() || split.used == 1) return;
  merge_share(output_of<C, Element>(p, tile), grid, split.used, blockIdx.x % merge_blocks<C>(p, grid.splits));
}

}  // namespace fagen

namespace fagen {

using MlaKernel = void (*)(fagen_decode_params, DecodeGrid, CUtensorMap);
using MergeKernel = void (*)(fagen_decode_params, DecodeGrid);

// Two splits, if so many are the kernel's own choice, are a cluster, which needs no workspace.
template <class C>
struct LatentPlan : DecodePlan<C> {
  LatentPlan(const fagen_decode_params& p, int sms) : DecodePlan<C>(p, sms) {
    this->grid.clustered = p.num_splits == 0 && this->grid.splits == 2;
    if (this->grid.clustered) this->stats_bytes = this->sums_bytes = 0;
  }
};

template <class C>
static cudaError_t launch_latent(const fagen_decode_params& p, int sms, CUtensorMapDataType type, cudaStream_t stream,
                                 MlaKernel decode, MergeKernel merge) {
  using L = MlaLayout<C>;
  LatentPlan<C> plan(p, sms);
  const int64_t blocks = plan.tiles * plan.grid.splits;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || plan.tiles > INT32_MAX / merge_blocks<C>(p, plan.grid.splits))
    return cudaErrorInvalidConfiguration;
  plan.assign(p.workspace);
  CUtensorMap map;
  if (const cudaError_t e = map_cache<C>(&map, type, p, p.k, C::kHeadDim)) return e;
  const int cluster = plan.grid.clustered ? plan.grid.splits : 1;
  const cudaError_t e =
      launch_clusters(cluster, false, decode, int(blocks), L::kThreads, L::kSmemBytes, stream, p, plan.grid, map);
  if (e || plan.grid.splits == cluster) return e;
  return launch_kernel(merge, int(plan.tiles) * merge_blocks<C>(p, plan.grid.splits), kCombineThreads, 0, stream, p,
                       plan.grid);
}

}  // namespace fagen

namespace fagen {

using Element = bfloat_t;
using C = MlaConfig<Config>;
constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

__global__ void __launch_bounds__(MlaLayout<C>::kThreads, 1)
decode_kernel(const __grid_constant__ fagen_decode_params p, const __grid_constant__ DecodeGrid grid,
              const __grid_constant__ CUtensorMap keys) {
  extern __shared__ unsigned char shared[];
  run_block<C, Element>(p, grid, keys, shared);
}

__global__ void __launch_bounds__(kCombineThreads)
merge_kernel(const __grid_constant__ fagen_decode_params p, const __grid_constant__ DecodeGrid grid) {
  run_merge<C, Element>(p, grid);
}

// The SMs of the device. Asks it once, and gives the kernel more shared memory than the default.
static cudaError_t prepare(int index, int& sms) {
  if (const cudaError_t e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index)) return e;
  constexpr int kBytes = MlaLayout<C>::kSmemBytes;
  return cudaFuncSetAttribute(decode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
}

}  // namespace fagen

extern "C" uint64_t fagen_workspace_bytes(const fagen_decode_params* p) {
  int sms;
  if (fagen::once_per_device(&sms, fagen::prepare)) return 0;
  return fagen::LatentPlan<fagen::C>(*p, sms).bytes();
}

extern "C" const char* fagen_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

extern "C" int fagen_launch(const fagen_decode_params* p, void* stream) {
  int sms;
  if (const cudaError_t e = fagen::once_per_device(&sms, fagen::prepare)) return e;
  return fagen::launch_latent<fagen::C>(*p, sms, fagen::kMapType, static_cast<cudaStream_t>(stream),
                                        fagen::decode_kernel, fagen::merge_kernel);
}

// Name, offset and size of every field of the params, as this compiler laid them out.
#include <stddef.h>
#include <stdio.h>

extern "C" const char* fagen_params_layout(void) {
  static char text[1178];
  static const char* const told = [] {
    char* end = text;
#define FAGEN_FIELD(field) \
  end += snprintf(end, text + sizeof text - end, "%s %zu %zu; ", #field, offsetof(fagen_decode_params, field), \
                  sizeof(fagen_decode_params::field))
    FAGEN_FIELD(q.data); FAGEN_FIELD(q.stride); FAGEN_FIELD(k.data); FAGEN_FIELD(k.stride); FAGEN_FIELD(v.data);
    FAGEN_FIELD(v.stride); FAGEN_FIELD(o.data); FAGEN_FIELD(o.stride); FAGEN_FIELD(page_table.data);
    FAGEN_FIELD(page_table.stride); FAGEN_FIELD(k_scale.data); FAGEN_FIELD(k_scale.stride);
    FAGEN_FIELD(v_scale.data); FAGEN_FIELD(v_scale.stride); FAGEN_FIELD(seqlens_k); FAGEN_FIELD(cu_seqlens_q);
    FAGEN_FIELD(cache_batch_idx); FAGEN_FIELD(sinks); FAGEN_FIELD(lse); FAGEN_FIELD(workspace);
    FAGEN_FIELD(batch); FAGEN_FIELD(heads); FAGEN_FIELD(kv_heads); FAGEN_FIELD(rows); FAGEN_FIELD(seqlen_q);
    FAGEN_FIELD(seqlen_k); FAGEN_FIELD(pages); FAGEN_FIELD(page_size); FAGEN_FIELD(head_dim);
    FAGEN_FIELD(head_dim_v); FAGEN_FIELD(window_left); FAGEN_FIELD(window_right); FAGEN_FIELD(num_splits);
    FAGEN_FIELD(scale); FAGEN_FIELD(softcap);
#undef FAGEN_FIELD
    snprintf(end, text + sizeof text - end, "sizeof %zu", sizeof(fagen_decode_params));
    return text;
  }();
  return told;
}
