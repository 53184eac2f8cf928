// A kernel for attention decode, made by fagen. It needs the CUDA toolkit and nothing else: no torch, no Python.
//
// problem:  decode/bf16/d128/none/page16, its config chosen for b16/h32-8/q1-k4096
// config:   tile_m=16 tile_n=128 warps=4 partition=keys stages=3 q_source=shared rescale=deferred split_keys=128 merged_by=cluster blocks_per_sm=1 (the family's default)
// made by:  fagen emit --target sm_90 --op decode --dtype bf16 --head-dim 128 --mask none --seqlen-q=1 --seqlen-k=4096 --batch 16 --heads 32 --kv-heads 8 --page 16 --family sm80_decode --config '{"blocks_per_sm": 1, "merged_by": "cluster", "partition": "keys", "q_source": "shared", "rescale": "deferred", "split_keys": 128, "stages": 3, "tile_m": 16, "tile_n": 128, "warps": 4}' --out DIR
// build:    nvcc -gencode=arch=compute_90,code=sm_90 -O3 -std=c++17 --use_fast_math -lineinfo -shared -Xcompiler -fPIC -o kernel.so kernel.cu
// call:     fagen_launch(), declared in kernel.h beside this file

// sm80_decode: attention decode for decode/bf16/d128/none/page16 on sm_90
//
// Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.
// Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.
//
// Config: tile_m=16 tile_n=128 warps=4 partition=keys stages=3 q_source=shared rescale=deferred split_keys=128 merged_by=cluster blocks_per_sm=1

namespace fagen {

enum class Mask { none, causal, window, intervals };
enum class Partition { keys, columns };
enum class QSource { registers, shared };
enum class Rescale { deferred, each };
enum class MergedBy { own_kernel, last_block, cluster };

struct Config {
  static constexpr int kHeadDim = 128;  // of q and k, padded
  static constexpr int kHeadDimV = 128;  // of v and o, padded
  static constexpr Mask kMask = Mask::none;  // which cells are visible
  static constexpr bool kSoftcap = false;  // s -> softcap * tanh(s / softcap)
  static constexpr bool kSinks = false;  // each head has a logit without a value
  static constexpr bool kAligned = true;  // rows are whole, aligned 16-byte pieces
  static constexpr bool kFp8Cache = false;  // k and v are e4m3, else of the dtype of q
  static constexpr int kPageSize = 16;  // rows of a page, 0: the cache is not paged
  static constexpr bool kSharedKv = false;  // v is the first columns of k
  static constexpr int kTileM = 16;  // rows of a block: query tokens x heads of a group
  static constexpr int kTileN = 128;  // keys that the warps of a block load at a time
  static constexpr int kWarps = 4;  // warps of a block
  static constexpr Partition kPartition = Partition::keys;  // what the warps of a block divide: keys, or columns of V
  static constexpr int kStages = 3;  // tiles of keys in shared memory
  static constexpr QSource kQSource = QSource::shared;  // where q waits for its products
  static constexpr Rescale kRescale = Rescale::deferred;  // when O follows a grown maximum
  static constexpr int kSplitKeys = 128;  // fewest keys of a split
  static constexpr MergedBy kMergedBy = MergedBy::cluster;  // who merges the splits of a sequence: a second kernel, the block that ends last, or, of up to 8, a cluster of their blocks (sm_90)
  static constexpr int kBlocksPerSm = 1;  // blocks the register budget is cut for
};

// Sizes that fagen derived from the config before compiling; the kernel asserts that it agrees.
struct Derived {
  static constexpr int threads = 128;
  static constexpr int smem_bytes = 200704;
  static constexpr int early = 1;
};

}  // namespace fagen

using namespace fagen;  // the kernel is this one file

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

// ---- fagen/sm80/decode/launch.cuh ------------------------------------------------------------------------
// A decode launch on the host: the kernels of a plan.
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

// ---- fagen/sm80/decode/finish.cuh ------------------------------------------------------------------------
// From the warps' sums to O and LSE: parts are merged by their references, within a block and between splits.
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


// ---- fagen/sm80/decode/block.cuh -------------------------------------------------------------------------
// A block's work on its split of the keys: q to shared memory, the ring of key tiles, scores and sums.
// ---- fagen/sm80/decode/cache.cuh -------------------------------------------------------------------------
// Keys and values from the cache to shared memory: a warp copies its own kWarpKeys keys of each tile.
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

// ---- fagen/sm80/decode/shape.cuh -------------------------------------------------------------------------
// The sizes of a decode block: a warp's share of a tile, shared memory.
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

// A config as the shared headers ask for it. A step of an fp8 product takes 32 columns.
template <class Base>
struct DecodeConfig : Base {
  static constexpr int kStep = Base::kFp8Cache ? 32 : 16;
  static constexpr int kHeadDim = (Base::kHeadDim + kStep - 1) / kStep * kStep;
  static constexpr int kHeadDimV = (Base::kHeadDimV + kStep - 1) / kStep * kStep;
  static constexpr int kIntervalColumns = 0;
  static constexpr bool kAlibi = false, kDropout = false;
  static constexpr bool kCompact = false;  // blocks of packed rows: of every tile that there may be
  static constexpr bool kMergesInCluster = Base::kMergedBy == MergedBy::cluster;
  static constexpr bool kMergesInLastBlock = Base::kMergedBy == MergedBy::last_block;
};

// The rows of a tile are query tokens x heads of a group. The warps split its keys: each has its own ring of stages,
// and O, maxima and sums of its own (keys); or they share one ring, each has all keys' weights and some columns of O
// (columns). In both a warp copies the same kWarpKeys keys of a tile and computes their scores.
template <class C>
struct DecodeShape {
  static constexpr bool kSplitColumns = C::kPartition == Partition::columns;
  static constexpr int kThreads = C::kWarps * 32;
  static constexpr int kSlabs = C::kTileM / 16;
  static constexpr int kWarpKeys = C::kTileN / C::kWarps;
  static constexpr int kWarpColumns = kSplitColumns ? C::kHeadDimV / C::kWarps : C::kHeadDimV;
  static constexpr int kItemBytes = C::kFp8Cache ? 1 : 2;  // of an element of the cache
  static_assert(C::kTileM % 16 == 0 && kWarpKeys % 16 == 0 && kWarpColumns % C::kStep == 0,
                "a warp's share is made of whole products");

  static constexpr int kRingRows = kSplitColumns ? C::kTileN : kWarpKeys;
  static constexpr int kRings = kSplitColumns ? 1 : C::kWarps;
  using TileQ = SmemTile<C::kTileM, C::kHeadDim, true>;
  using TileK = SmemTile<kRingRows, C::kHeadDim * kItemBytes / 2, true>;  // columns in units of 16 bits
  // v: the first columns of the tile of k, or a tile of its own
  using TileV = SmemTile<kRingRows, (C::kSharedKv ? C::kHeadDim : C::kHeadDimV) * kItemBytes / 2, true>;
  using TileP = SmemTile<C::kTileM, C::kTileN, true>;

  static constexpr int kValues = C::kSharedKv ? 0 : TileK::kBytes;  // of a stage
  static constexpr int kStageBytes = kValues + TileV::kBytes;
  static constexpr int kRingBytes = C::kStages * kStageBytes;
  static constexpr int kRingsBegin = TileQ::kBytes;
  static constexpr int kRingsEnd = kRingsBegin + kRings * kRingBytes;
  // columns: the weights of a tile, and each warp's row maxima
  static constexpr int kMaxima = kRingsEnd + (kSplitColumns ? TileP::kBytes : 0);
  static constexpr int kLoopBytes = kMaxima + (kSplitColumns ? C::kWarps * C::kTileM * 4 : 0);

  // After the loop, over all of it: parts of O in float32, then (warp, row): reference, sum. The part of the block
  // takes the place of the first.
  static constexpr int kParts = kSplitColumns ? 1 : C::kWarps;
  static constexpr int kPartPitch = C::kHeadDimV + 8;  // floats; rows fall into different banks
  static constexpr int kPartFloats = C::kTileM * kPartPitch;
  static constexpr int kStats = kParts * kPartFloats * 4;
  static constexpr int kOwnStats = kStats + C::kWarps * C::kTileM * 8;  // of the block's part, for its cluster
  static constexpr int kMergeBytes = kOwnStats + (C::kMergedBy == MergedBy::cluster ? C::kTileM * 8 : 0);
  static constexpr int kSmemBytes = kLoopBytes > kMergeBytes ? kLoopBytes : kMergeBytes;

  static_assert(kThreads == Derived::threads, "Python and CUDA disagree about the threads of a block");
  static_assert(kSmemBytes == Derived::smem_bytes, "Python and CUDA disagree about shared memory");
};

}  // namespace fagen

namespace fagen {

// The pages of the keys that a warp copies. Its lanes read the table for several tiles at once, one such read ahead, so
// that no copy waits for the table, and K and V share what was read.
template <class C>
struct PagesAhead {
  static constexpr int kKeys = DecodeShape<C>::kWarpKeys;
  static constexpr int kPageKeys = C::kPageSize < kKeys ? C::kPageSize : kKeys;  // keys of a tile that share an entry
  static constexpr int kEntries = kKeys / kPageKeys;  // of a tile
  static constexpr int kTiles = 32 / kEntries;  // of one read
  static_assert(kKeys % kPageKeys == 0 && kEntries <= 32 && 32 % kEntries == 0, "lanes hold the pages of whole tiles");

  const int32_t* table;
  unsigned last_page;  // of the cache: no entry leads out of it
  int first_key, begin, end;  // the warp's first key of the split; the keys that are there
  int held, ahead;  // this lane's entries

  __device__ __forceinline__ PagesAhead(const fagen_decode_params& p, const DecodeTile<C>& tile, int first_key)
      : table(static_cast<const int32_t*>(p.page_table.data) + tile.batch * p.page_table.stride[0]),
        last_page(p.pages - 1),
        first_key(first_key),
        begin(tile.begin),
        end(tile.end),
        held(0),
        ahead(read(0)) {}

  // This lane's entry from tile `tile` of the split on.
  __device__ __forceinline__ int read(int tile) const {
    const int lane = threadIdx.x % 32;
    const int key = first_key + (tile + lane / kEntries) * C::kTileN + lane % kEntries * kPageKeys;
    return key < end && key + kPageKeys > begin ? min(unsigned(table[unsigned(key) / C::kPageSize]), last_page) : 0;
  }
  // Call for every tile, in order, before its pages are asked for.
  __device__ __forceinline__ void move_to(int tile) {
    if (tile % kTiles == 0) {
      held = ahead;
      ahead = read(tile + kTiles);
    }
  }
  __device__ __forceinline__ int page_of(int tile, int row) const {
    return __shfl_sync(~0u, held, tile % kTiles * kEntries + row / kPageKeys);
  }
};

// Keys follow each other.
template <class C>
struct NoPages {
  __device__ __forceinline__ NoPages(const fagen_decode_params&, const DecodeTile<C>&, int) {}
  __device__ __forceinline__ void move_to(int) {}
  __device__ __forceinline__ int page_of(int, int) const { return 0; }
};
template <class C, bool kPaged = (C::kPageSize > 0)>
struct SelectPages {
  using Type = NoPages<C>;
};
template <class C>
struct SelectPages<C, true> {
  using Type = PagesAhead<C>;
};

// Up to 16 bytes of a row that may start anywhere, Unit by Unit.
template <class Unit>
__device__ __forceinline__ uint4 gather_bytes(const unsigned char* from, int bytes) {
  constexpr int kUnits = 16 / sizeof(Unit);
  union {
    Unit unit[kUnits];
    uint4 all;
  } piece;
  piece.all = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kUnits; ++i)
    if (i * int(sizeof(Unit)) < bytes) piece.unit[i] = reinterpret_cast<const Unit*>(from)[i];
  return piece.all;
}

// K or V of one kv head, and this lane's part of each copy: a column of 16-byte pieces, and every kRowsAtOnce-th row.
template <class C, class Tile>
struct CacheLane {
  static constexpr int kKeys = DecodeShape<C>::kWarpKeys;
  static constexpr int kItemBytes = DecodeShape<C>::kItemBytes;
  static constexpr int kColumns = Tile::kChunks < 32 ? Tile::kChunks : 32;  // of pieces that a warp copies at once
  static constexpr int kRowsAtOnce = kColumns > 16 ? 1 : kColumns > 8 ? 2 : kColumns > 4 ? 4 : kColumns > 2 ? 8 : 16;
  static constexpr int kPage = C::kPageSize > 0 ? C::kPageSize : 1 << 30;  // keys that follow each other in memory
  static_assert(kRowsAtOnce <= kPage || kPage == 1, "a lane's row of a page is the same in every copy");

  const unsigned char* base;
  int64_t page_stride, row_stride;
  int row_bytes, row, column;

  __device__ __forceinline__ CacheLane(const fagen_tensor& t, int64_t page, int kv_head, int head_dim)
      : page_stride(t.stride[0] * kItemBytes), row_stride(t.stride[1] * kItemBytes), row_bytes(head_dim * kItemBytes) {
    const int lane = threadIdx.x % 32;
    row = lane / kColumns, column = lane % kColumns;
    base = static_cast<const unsigned char*>(t.data) + page * page_stride + kv_head * t.stride[2] * kItemBytes +
           row % kPage * row_stride + column * 16;
  }

  // Start copying the keys from `key` on to rows `first_row` and on of a tile; those outside [begin, end) become 0.
  template <class Pages>
  __device__ __forceinline__ void copy(const Pages& pages, int tile, int key, int begin, int end, uint32_t to,
                                       int first_row) const {
    constexpr bool kOnePage = kPage >= kKeys;
    const unsigned char* first = base;
    if constexpr (kOnePage) {
      const int in_page = C::kPageSize > 0 ? unsigned(key) % kPage : key;
      first += pages.page_of(tile, 0) * page_stride + in_page * row_stride;
    }
    const bool mine = row < kRowsAtOnce;
    const uint32_t lane_offset = Tile::offset(first_row + (mine ? row : 0), column);
#pragma unroll
    for (int across = 0; across < Tile::kChunks; across += kColumns) {
      const int bytes = mine && across + column < Tile::kChunks ? row_bytes - (across + column) * 16 : 0;
      const int rows_end = bytes > 0 ? end - key - row : 0;
#pragma unroll
      for (int down = 0; down < kKeys; down += kRowsAtOnce) {
        const unsigned char* from = first + across * 16;
        if constexpr (kOnePage)
          from += down * row_stride;
        else  // all lanes take part
          from += pages.page_of(tile, down + row % kRowsAtOnce) * page_stride + down % kPage * row_stride;
        bool there = down < rows_end;
        if constexpr (MaskOf<C>::kHasBegin) there &= key + row + down >= begin;
        // rows that are kRowsAtOnce apart: the exchange of columns in a tile changes by a constant
        const uint32_t exchanged = Tile::offset(down, 0) - down * Tile::kPitch;
        const uint32_t at = to + (lane_offset ^ exchanged) + down * Tile::kPitch + across * 16;
        if (!mine || across + column >= Tile::kChunks) continue;
        if constexpr (C::kAligned)
          ptx::cp_async_16(at, from, there);
        else if constexpr (C::kFp8Cache)
          ptx::st_shared_16(at, gather_bytes<uint8_t>(from, there ? bytes : 0));
        else
          ptx::st_shared_16(at, gather_bytes<uint16_t>(from, there ? bytes : 0));
      }
    }
  }
};

template <class C>
struct CacheReader {
  using S = DecodeShape<C>;

  int first_key, begin, end;
  typename SelectPages<C>::Type pages;
  CacheLane<C, typename S::TileK> k;
  CacheLane<C, typename S::TileV> v;

  // `first_tile`: of the split. Keys outside [begin, end) are never read.
  __device__ __forceinline__ CacheReader(const fagen_decode_params& p, const DecodeTile<C>& tile, int first_tile,
                                         int warp)
      : first_key(first_tile * C::kTileN + warp * S::kWarpKeys),
        begin(tile.begin),
        end(tile.end),
        pages(p, tile, first_key),
        k(p.k, row_of(p, tile.batch), tile.kv_head, p.head_dim),
        v(p.v, row_of(p, tile.batch), tile.kv_head, p.head_dim_v) {}

  // A sequence's row of a cache without pages.
  static __device__ __forceinline__ int64_t row_of(const fagen_decode_params& p, int batch) {
    if (C::kPageSize > 0) return 0;
    return p.cache_batch_idx ? min(unsigned(p.cache_batch_idx[batch]), unsigned(p.pages - 1)) : batch;
  }

  // Start copying the warp's keys of tile `tile` of the split; they are rows `row` and on of the stage.
  __device__ __forceinline__ void copy(int tile, uint32_t stage, int row) {
    const int key = first_key + tile * C::kTileN;
    pages.move_to(tile);
    k.copy(pages, tile, key, begin, end, stage, row);
    if constexpr (!C::kSharedKv) v.copy(pages, tile, key, begin, end, stage + S::kValues, row);
  }
};

}  // namespace fagen

// ---- fagen/sm80/decode/products.cuh ----------------------------------------------------------------------
// A warp's scores and sums of a key tile: the products of 16-bit keys are the shared ones; those of fp8 keys expand
// their operands on the way from shared memory. Visible keys are a range for each row.
// ---- fagen/common/fp8.cuh --------------------------------------------------------------------------------
// Numbers of fp8 (e4m3) as 16-bit elements, four at a time. All but NaN are exact: NaN counts as 480.

namespace fagen {

// The two halves of a register times a power of two, given as the element's bits.
template <class Element>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t pair, uint32_t factor);

template <>
__device__ __forceinline__ uint32_t multiply_pair<bfloat_t>(uint32_t pair, uint32_t factor) {
  __nv_bfloat162 a, b;
  memcpy(&a, &pair, 4);
  memcpy(&b, &factor, 4);
  a = __hmul2(a, b);
  memcpy(&pair, &a, 4);
  return pair;
}

template <>
__device__ __forceinline__ uint32_t multiply_pair<half_t>(uint32_t pair, uint32_t factor) {
  __half2 a, b;
  memcpy(&a, &pair, 4);
  memcpy(&b, &factor, 4);
  a = __hmul2(a, b);
  memcpy(&pair, &a, 4);
  return pair;
}

// Place the 4 bits of exponent and 3 of mantissa in those of the element, whose exponent has another bias: that leaves
// a factor of a power of two, denormals included.
template <class Element>
struct Fp8Bits;
template <>
struct Fp8Bits<bfloat_t> {
  static constexpr int kShift = 4;
  static constexpr uint32_t kMagnitude = 0x07f007f0, kFactor = 0x7b807b80;  // 2^120
};
template <>
struct Fp8Bits<half_t> {
  static constexpr int kShift = 1;
  static constexpr uint32_t kMagnitude = 0x3f803f80, kFactor = 0x5c005c00;  // 2^8
};

// Bytes 0 and 2 of `four` as the halves of `even`, bytes 1 and 3 as those of `odd`.
template <class Element>
__device__ __forceinline__ void expand_e4m3(uint32_t four, uint32_t& even, uint32_t& odd) {
  using Bits = Fp8Bits<Element>;
  constexpr uint32_t kSigns = 0x80008000;
  even = ((four << 8) & kSigns) | ((four << (8 - Bits::kShift)) & Bits::kMagnitude);
  odd = (four & kSigns) | ((four >> Bits::kShift) & Bits::kMagnitude);
  even = multiply_pair<Element>(even, Bits::kFactor);
  odd = multiply_pair<Element>(odd, Bits::kFactor);
}

}  // namespace fagen



namespace fagen {

template <class C, class Element>
using DecodeWarpProducts = WarpProducts<C, Element, typename DecodeShape<C>::TileQ, typename DecodeShape<C>::TileK,
                                        typename DecodeShape<C>::TileV, DecodeShape<C>::kSlabs,
                                        DecodeShape<C>::kWarpKeys, DecodeShape<C>::kWarpColumns>;

template <class C, class Element>
struct DecodeProducts : DecodeWarpProducts<C, Element> {
  using S = DecodeShape<C>;
  using Base = DecodeWarpProducts<C, Element>;
  using Base::lane;
  using Base::o;
  using Base::softmax;
  using typename Base::Scores;
  using typename Base::Weights;
  using TileQ = typename S::TileQ;
  using TileK = typename S::TileK;
  using TileV = typename S::TileV;
  static constexpr int kRows = S::kSlabs * 2;

  ScoreMod<C> mod;
  int begin[kRows], end[kRows];  // keys that this thread's rows see

  __device__ __forceinline__ DecodeProducts(const fagen_forward_params& scores, const DecodeTile<C>& tile)
      : Base(scores, 0, 0), mod(scores, 0, 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int token = tile.token(tile.first_row + row_of(r));
      begin[r] = tile.begin_of(token), end[r] = tile.end_of(token);
    }
  }
  // Row r of this thread, in the tile.
  __device__ __forceinline__ int row_of(int r) const { return r / 2 * 16 + r % 2 * 8 + lane.row; }

  // S = Q K^T for the kWarpKeys keys from row `first_key` of the tile on.
  __device__ __forceinline__ void compute_scores(Scores& s_acc, uint32_t q_tile, uint32_t k_tile, int first_key) {
    if constexpr (!C::kFp8Cache) {
      Base::compute_scores(s_acc, q_tile, 0, k_tile, first_key, [](int) {});
    } else {
      const uint32_t q_lane = row_major_address<TileQ>(lane, q_tile, 0);
      const uint32_t k_lane = column_major_address<TileK>(lane, k_tile, first_key);
#pragma unroll
      for (auto& slab : s_acc) clear(slab);
#pragma unroll
      for (int d = 0; d < C::kHeadDim / 32; ++d) fp8_score_step(s_acc, q_lane, k_lane, d);
    }
  }

  // The 32 columns from 32 d on. In shared memory q has each 16 columns' even ones first, then the odd ones, as keys
  // have them when they are expanded.
  __device__ __forceinline__ void fp8_score_step(Scores& s_acc, uint32_t q_lane, uint32_t k_lane, int d) {
    uint32_t q_frag[2][S::kSlabs][4];
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s) {
        if constexpr (Base::kQInRegisters)
          for (int i = 0; i < 4; ++i) q_frag[step][s][i] = this->q_registers[s][2 * d + step][i];
        else
          ptx::ldmatrix_x4(q_frag[step][s], TileQ::step(q_lane, s * 16, 2 * d + step));
      }
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 16; ++n) {
      uint32_t k_frag[4];
      ptx::ldmatrix_x4(k_frag, TileK::step(k_lane, n * 16, d));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t even, odd;
        expand_e4m3<Element>(k_frag[i], even, odd);
#pragma unroll
        for (int s = 0; s < S::kSlabs; ++s)
          ptx::mma_m16n8k16<Element>(s_acc[s][2 * n + i / 2], q_frag[i % 2][s], even, odd);
      }
    }
  }

  // Softcap and, on tiles that not every row sees in full, the mask. `key`: the warp's first one.
  template <bool kMasked>
  __device__ __forceinline__ void modify_scores(Scores& s_acc, int key) const {
    if constexpr (kMasked || ScoreMod<C>::kActive) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) modify_row<kMasked>(s_acc, r, key);
    }
  }
  template <bool kMasked>
  __device__ __forceinline__ void modify_row(Scores& s_acc, int r, int key) const {
    const int from = begin[r] - key - lane.column, to = end[r] - key - lane.column;
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = s_acc[r / 2][n][r % 2 * 2 + e];
        if constexpr (ScoreMod<C>::kActive) score = mod(score, 0, 0);
        if constexpr (kMasked) {
          bool hidden = n * 8 + e >= to;
          if constexpr (MaskOf<C>::kHasBegin) hidden |= n * 8 + e < from;
          if (hidden) score = -INFINITY;
        }
      }
  }

  // The softmax and second product of the warp's own keys.
  __device__ __forceinline__ void add_values(Scores& s_acc, uint32_t v_tile) {
    this->update_max(s_acc);
    const uint32_t v_lane = row_major_address<TileV>(lane, v_tile, 0);
    Weights p_frag;
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 16; ++n) {
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) this->exponentiate(s_acc, p_frag, s, n, i);
      add_16_values(p_frag[n], v_lane + n * 16 * TileV::kPitch);
    }
  }

  // O += P V for 16 keys: `v_lane` is this lane's address of their first columns.
  __device__ __forceinline__ void add_16_values(const uint32_t (&p_frag)[S::kSlabs][4], uint32_t v_lane) {
    if constexpr (!C::kFp8Cache) {
      this->value_step(p_frag, v_lane);
    } else {
#pragma unroll
      for (int d = 0; d < S::kWarpColumns / 32; ++d) {
        uint32_t v_frag[4];
        ptx::ldmatrix_x4_trans(v_frag, TileV::step(v_lane, 0, d));
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // 16 columns: the even ones in one piece of O, the odd ones in the next
          uint32_t even[2], odd[2];  // of keys 0 to 7 and 8 to 15
#pragma unroll
          for (int i = 0; i < 2; ++i) expand_e4m3<Element>(v_frag[half * 2 + i], even[i], odd[i]);
#pragma unroll
          for (int s = 0; s < S::kSlabs; ++s) {
            ptx::mma_m16n8k16<Element>(o[s][4 * d + 2 * half], p_frag[s], even[0], even[1]);
            ptx::mma_m16n8k16<Element>(o[s][4 * d + 2 * half + 1], p_frag[s], odd[0], odd[1]);
          }
        }
      }
    }
  }

  // Store this thread's sums to a matrix of kPartPitch floats a row, of whose columns the warp has those from `column`.
  __device__ __forceinline__ void store_sums(float* part, int column) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float* row = part + row_of(r) * S::kPartPitch + column;
#pragma unroll
      for (int n = 0; n < S::kWarpColumns / 16; ++n) {
        const float* first = &o[r / 2][2 * n][r % 2 * 2];
        const float* second = &o[r / 2][2 * n + 1][r % 2 * 2];
        if constexpr (C::kFp8Cache) {
          *reinterpret_cast<float4*>(row + n * 16 + lane.column * 2) =
              make_float4(first[0], second[0], first[1], second[1]);
        } else {
          *reinterpret_cast<float2*>(row + n * 16 + lane.column) = make_float2(first[0], first[1]);
          *reinterpret_cast<float2*>(row + n * 16 + 8 + lane.column) = make_float2(second[0], second[1]);
        }
      }
    }
  }
};

}  // namespace fagen

namespace fagen {

// 16 neighbouring elements of a row of q; those past `count` are 0.
template <class C, class Element>
__device__ __forceinline__ void load_16_columns(uint4 (&halves)[2], const Element* from, int count) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (C::kAligned)
      halves[half] = count > half * 8 ? reinterpret_cast<const uint4*>(from)[half] : make_uint4(0, 0, 0, 0);
    else
      halves[half] = gather_chunk(from + half * 8, count - half * 8);
  }
}

// The even columns of 16, then the odd ones.
__device__ __forceinline__ void part_even_and_odd(uint4 (&halves)[2]) {
  const uint32_t pairs[8] = {halves[0].x, halves[0].y, halves[0].z, halves[0].w,
                             halves[1].x, halves[1].y, halves[1].z, halves[1].w};
  uint32_t even[4], odd[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    even[i] = (pairs[2 * i] & 0xffff) | (pairs[2 * i + 1] << 16);
    odd[i] = (pairs[2 * i] >> 16) | (pairs[2 * i + 1] & 0xffff0000);
  }
  halves[0] = make_uint4(even[0], even[1], even[2], even[3]);
  halves[1] = make_uint4(odd[0], odd[1], odd[2], odd[3]);
}

template <class C, class Element>
struct DecodeBlock {
  using S = DecodeShape<C>;
  using Products = DecodeProducts<C, Element>;
  using Scores = typename Products::Scores;

  const fagen_decode_params& p;
  const DecodeTile<C>& tile;
  const DecodeSplit<C>& split;
  unsigned char* shared;
  uint32_t smem;
  int warp;
  CacheReader<C> cache;

  __device__ __forceinline__ DecodeBlock(const fagen_decode_params& p, const DecodeTile<C>& tile,
                                         const DecodeSplit<C>& split, unsigned char* shared)
      : p(p),
        tile(tile),
        split(split),
        shared(shared),
        smem(ptx::shared_address(shared)),
        warp(__shfl_sync(~0u, threadIdx.x / 32, 0)),  // warp-uniform for the compiler as well
        cache(p, tile, split.first, warp) {}

  __device__ __forceinline__ uint32_t stage(int index) const {
    return smem + S::kRingsBegin + (S::kSplitColumns ? 0 : warp * S::kRingBytes) + index * S::kStageBytes;
  }
  __device__ __forceinline__ int tiles() const { return split.end - split.first; }
  // Start copying this warp's keys of a tile, if there is one; always a group of copies.
  __device__ __forceinline__ void copy(int index, int stage_index) {
    if (index < tiles()) cache.copy(index, stage(stage_index), S::kSplitColumns ? warp * S::kWarpKeys : 0);
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void load_q() const {
    constexpr int kPieces = C::kHeadDim / 16;
    const Element* q = static_cast<const Element*>(p.q.data) + (p.cu_seqlens_q ? 0 : tile.batch * p.q.stride[0]);
    for (int i = threadIdx.x; i < C::kTileM * kPieces; i += S::kThreads) {
      const int row = i / kPieces, column = i % kPieces * 16, packed = tile.first_row + row;
      uint4 halves[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
      if (packed < tile.rows() && column < p.head_dim) {
        const Element* from =
            q + (tile.first_q + packed / tile.group) * p.q.stride[1] + tile.head(packed) * p.q.stride[2] + column;
        load_16_columns<C>(halves, from, p.head_dim - column);
      }
      if constexpr (C::kFp8Cache) part_even_and_odd(halves);
      ptx::st_shared_16(smem + S::TileQ::offset(row, column / 8), halves[0]);
      ptx::st_shared_16(smem + S::TileQ::offset(row, column / 8 + 1), halves[1]);
    }
  }

  // The warp's first key of a tile.
  __device__ __forceinline__ int key_of(int index) const {
    return (split.first + index) * C::kTileN + warp * S::kWarpKeys;
  }
  // This warp's scores of a tile, masked where some row does not see all of its keys.
  __device__ __forceinline__ void compute_scores(Products& products, Scores& s_acc, int index, int stage_index) const {
    const int key = key_of(index);
    products.compute_scores(s_acc, smem, stage(stage_index), S::kSplitColumns ? warp * S::kWarpKeys : 0);
    if (key >= tile.full_begin && key + S::kWarpKeys <= tile.full_end)
      products.template modify_scores<false>(s_acc, key);
    else
      products.template modify_scores<true>(s_acc, key);
  }

  // Visit the split's tiles, each when it has landed; the copies of those that follow are under way. `sync` lets nobody
  // go on before the tile is there for all who read it, and all have read the one before.
  template <class Sync, class Visit>
  __device__ __forceinline__ void visit_tiles(Products& products, Sync sync, Visit visit) {
#pragma unroll
    for (int i = 0; i < C::kStages - 1; ++i) copy(i, i);
    load_q();
    __syncthreads();
    products.load_q_registers(smem, 0);
    int now = 0, next = C::kStages - 1;
    for (int i = 0; i < tiles(); ++i) {
      ptx::cp_async_wait<C::kStages - 2>();
      sync();
      copy(i + C::kStages - 1, next);
      visit(i, now);
      next = now;
      now = now == C::kStages - 1 ? 0 : now + 1;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // shared memory is free
  }
};

// Warps work alone, on keys of their own.
template <class C, class Element>
__device__ __forceinline__ void run_split_keys(DecodeBlock<C, Element>& block, DecodeProducts<C, Element>& products) {
  using S = DecodeShape<C>;
  block.visit_tiles(
      products, [] { __syncwarp(); },
      [&](int i, int stage) {
        const int key = block.key_of(i);
        if (key >= block.tile.end || key + S::kWarpKeys <= block.tile.begin) return;
        typename DecodeProducts<C, Element>::Scores s_acc;
        block.compute_scores(products, s_acc, i, stage);
        products.add_values(s_acc, block.stage(stage) + S::kValues);
      });
}

// Each warp computes the weights of its keys, and its columns of O from all warps' weights.
template <class C, class Element>
struct SharedWeights {
  using S = DecodeShape<C>;
  using Products = DecodeProducts<C, Element>;
  using TileP = typename S::TileP;
  static constexpr int kRows = Products::kRows;

  const DecodeBlock<C, Element>& block;
  uint32_t p_tile = block.smem + S::kRingsEnd;
  float* maxima = reinterpret_cast<float*>(block.shared + S::kMaxima);  // (warp, row)

  // All warps find the same maxima, so their references move together.
  __device__ __forceinline__ void update_max(Products& products, typename Products::Scores& s_acc) const {
    float row_max[kRows], factor[kRows];
    products.thread_maxima(s_acc, row_max);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row_max[r] = quad_max(row_max[r]);
      if (products.lane.id % 4 == 0) maxima[block.warp * C::kTileM + products.row_of(r)] = row_max[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int w = 0; w < C::kWarps; ++w) row_max[r] = fmaxf(row_max[r], maxima[w * C::kTileM + products.row_of(r)]);
    if (__any_sync(~0u, products.softmax.exceeds_slack(row_max))) {
      products.set_reference(s_acc, row_max, factor);
      products.rescale(factor);
    } else {
      products.softmax.refresh_offset();
    }
  }

  __device__ __forceinline__ void add_values(Products& products, typename Products::Scores& s_acc,
                                             uint32_t v_tile) const {
    using TileV = typename S::TileV;
    update_max(products, s_acc);
    typename Products::Weights own;
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 16; ++n)
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          products.exponentiate(s_acc, own, s, n, i);
          const int chunk = (block.warp * S::kWarpKeys + n * 16) / 8 + i / 2;
          ptx::st_shared_4(p_tile + TileP::offset(products.row_of(s * 2 + i % 2), chunk) + products.lane.column * 2,
                           own[n][s][i]);
        }
    __syncthreads();  // all weights are there
    const uint32_t p_lane = row_major_address<TileP>(products.lane, p_tile, 0);
    const uint32_t v_lane =
        TileV::step(row_major_address<TileV>(products.lane, v_tile, 0), 0, block.warp * (S::kWarpColumns / C::kStep));
#pragma unroll
    for (int n = 0; n < C::kTileN / 16; ++n) {
      uint32_t weights[S::kSlabs][4];
#pragma unroll
      for (int s = 0; s < S::kSlabs; ++s) ptx::ldmatrix_x4(weights[s], TileP::step(p_lane, s * 16, n));
      products.add_16_values(weights, v_lane + n * 16 * TileV::kPitch);
    }
  }
};

template <class C, class Element>
__device__ __forceinline__ void run_split_columns(DecodeBlock<C, Element>& block,
                                                  DecodeProducts<C, Element>& products) {
  using S = DecodeShape<C>;
  const SharedWeights<C, Element> weights{block};
  block.visit_tiles(
      products, [] { __syncthreads(); },
      [&](int i, int stage) {
        typename DecodeProducts<C, Element>::Scores s_acc;
        block.compute_scores(products, s_acc, i, stage);
        weights.add_values(products, s_acc, block.stage(stage) + S::kValues);
      });
}

}  // namespace fagen

// ---- fagen/sm80/decode/output.cuh ------------------------------------------------------------------------
// The end of a row tile: parts of its sums to O and LSE, and the merge of its splits.

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

namespace fagen {

// Merge a tile's splits where they are a cluster: each block has its part in its own shared memory, and merges some of
// the columns of all. Blocks without keys come along.
template <class C, class Element>
__device__ __forceinline__ void merge_cluster(const DecodeOutput<C, Element>& output, uint32_t shared, int split,
                                              const DecodeGrid& grid, int used) {
  using S = DecodeShape<C>;
  const DecodeTile<C>& tile = output.tile;
  ptx::cluster_sync();
  for_4_columns<C>(
      tile, S::kThreads,
      [&](int row, int column) {
        const auto stats = [&](int i) {  // two rows have 16 bytes
          const float4 both = ptx::ld_cluster_16(shared + S::kOwnStats + row / 2 * 16, i);
          return row % 2 ? make_float2(both.z, both.w) : make_float2(both.x, both.y);
        };
        const auto sums = [&](int i) { return ptx::ld_cluster_16(shared + (row * S::kPartPitch + column) * 4, i); };
        output.write(tile.first_row + row, column, merge_parts<false>(used, output.scale_log2, stats, sums));
      },
      split, grid.splits);
  ptx::cluster_sync();  // none ends while others read its shared memory
}

// Whether this block is the last of its tile's splits; then it sees what the others wrote.
__device__ __forceinline__ bool arrive_last(unsigned* arrived, int used) {
  __shared__ unsigned before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before = atomicAdd(arrived, 1u);
  __syncthreads();
  __threadfence();
  return before == unsigned(used - 1);
}

// The end of a block: merge its warps; then write the tile's rows, or leave them to whoever merges the splits.
template <class C, class Element>
__device__ __forceinline__ void finish_block(const DecodeBlock<C, Element>& block,
                                             const DecodeProducts<C, Element>& products,
                                             const DecodeOutput<C, Element>& output, const DecodeGrid& grid,
                                             int split) {
  using S = DecodeShape<C>;
  const DecodeTile<C>& tile = block.tile;
  float* parts = reinterpret_cast<float*>(block.shared);
  float2* stats = reinterpret_cast<float2*>(block.shared + S::kStats);
  products.store_sums(parts + (S::kSplitColumns ? 0 : block.warp * S::kPartFloats),
                      S::kSplitColumns ? block.warp * S::kWarpColumns : 0);
#pragma unroll
  for (int r = 0; r < DecodeProducts<C, Element>::kRows; ++r) {
    const float sum = quad_sum(products.softmax.sum[r]);
    if (products.lane.id % 4 == 0)
      stats[block.warp * C::kTileM + products.row_of(r)] = make_float2(products.softmax.reference[r], sum);
  }
  __syncthreads();
  const bool alone = block.split.used == 1;
  float2* own_stats = reinterpret_cast<float2*>(block.shared + S::kOwnStats);
  for_4_columns<C>(tile, S::kThreads, [&](int row, int column) {
    const RowSums sums = merge_parts<S::kSplitColumns>(
        C::kWarps, output.scale_log2, [&](int i) { return stats[i * C::kTileM + row]; },
        [&](int i) {
          return *reinterpret_cast<const float4*>(parts + i * S::kPartFloats + row * S::kPartPitch + column);
        });
    if (alone) {
      output.write(tile.first_row + row, column, sums);
      return;
    }
    if (C::kMergedBy == MergedBy::cluster && grid.clustered) {  // no other thread reads this place
      *reinterpret_cast<float4*>(parts + row * S::kPartPitch + column) = sums.o;
      if (column == 0) own_stats[row] = make_float2(sums.reference, sums.sum);
      return;
    }
    const int64_t at = part_row<C>(grid, tile.index, split, row);
    grid.sums[at * (C::kHeadDimV / 4) + column / 4] = sums.o;
    if (column == 0) grid.stats[at] = make_float2(sums.reference, sums.sum);
  });
  if constexpr (C::kMergedBy == MergedBy::cluster)
    if (!alone && grid.clustered)
      merge_cluster(output, ptx::shared_address(block.shared), split, grid, block.split.used);
  if constexpr (C::kMergedBy == MergedBy::last_block)
    if (!alone && arrive_last(grid.arrived + tile.index, block.split.used))
      merge_splits(output, grid, block.split.used, S::kThreads);
}

}  // namespace fagen

// ---- fagen/sm80/decode/plan.cuh --------------------------------------------------------------------------
// The host's choice of a decode launch: how many splits, and their workspace.


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

namespace fagen {

using DecodeKernel = void (*)(fagen_decode_params, DecodeGrid);

template <class C>
static cudaError_t launch_decode(const fagen_decode_params& p, int resident, cudaStream_t stream, DecodeKernel decode,
                                 DecodeKernel combine) {
  DecodePlan<C> plan(p, resident);
  const int64_t blocks = plan.tiles * plan.grid.splits;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  plan.assign(p.workspace);
  if (plan.arrived_bytes)
    if (const cudaError_t e = cudaMemsetAsync(plan.grid.arrived, 0, plan.arrived_bytes, stream)) return e;
  using S = DecodeShape<C>;
  if (plan.grid.clustered && plan.grid.splits > 1)  // the splits of a tile
    return launch_clusters(plan.grid.splits, false, decode, int(blocks), S::kThreads, S::kSmemBytes, stream, p,
                           plan.grid);
  decode<<<unsigned(blocks), S::kThreads, S::kSmemBytes, stream>>>(p, plan.grid);
  if (C::kMergedBy != MergedBy::last_block && plan.grid.splits > 1) {
    if constexpr (Derived::early)
      return launch_kernel(combine, int(plan.tiles), kCombineThreads, 0, stream, p, plan.grid);
    else
      combine<<<unsigned(plan.tiles), kCombineThreads, 0, stream>>>(p, plan.grid);
  }
  return cudaGetLastError();
}

}  // namespace fagen

namespace fagen {

using Element = bfloat_t;
using C = DecodeConfig<Config>;

__device__ __forceinline__ DecodeOutput<C, Element> output_of(const fagen_decode_params& p, const DecodeTile<C>& tile,
                                                              const HeadScale& scale) {
  return {p, tile, ScoreMod<C>::softmax_scale_log2(score_params(scale.score, p.softcap)), scale.value};
}

// From sm_90 on the second kernel may be on its way while the first runs, and waits for its end.
template <class C>
__device__ __forceinline__ void let_combine_start() {
  if constexpr (C::kMergedBy != MergedBy::last_block && Derived::early) ptx::start_next_kernel();
}
template <class C>
__device__ __forceinline__ void wait_for_splits() {
  if constexpr (Derived::early) ptx::wait_for_previous_kernel();
}

// One block takes one split of the keys of one row tile: row tiles of a kv head and kv heads of a sequence are
// neighbours, since they read the same or neighbouring memory; or the splits are, where they are a cluster.
__global__ void __launch_bounds__(DecodeShape<C>::kThreads, C::kBlocksPerSm)
decode_kernel(const __grid_constant__ fagen_decode_params p, const __grid_constant__ DecodeGrid grid) {
  extern __shared__ __align__(1024) unsigned char shared[];
  let_combine_start<C>();
  const int of_sequence = grid.row_tiles * p.kv_heads, all = blockIdx.x / of_sequence;
  const bool clustered = C::kMergedBy == MergedBy::cluster && grid.clustered;
  const int split_index = (clustered ? blockIdx.x : all) % grid.splits;
  const DecodeTile<C> tile(p, grid, clustered ? blockIdx.x / grid.splits
                                              : all / grid.splits * of_sequence + blockIdx.x % of_sequence);
  const DecodeSplit<C> split(tile, grid, split_index);
  if (tile.first_row >= tile.rows()) return;
  const HeadScale scale(p, tile.batch, tile.kv_head);
  if (split_index >= split.used) {
    if constexpr (C::kMergedBy == MergedBy::cluster)
      if (clustered && split.used > 1)
        merge_cluster(output_of(p, tile, scale), ptx::shared_address(shared), split_index, grid, split.used);
    return;
  }

  DecodeBlock<C, Element> block(p, tile, split, shared);
  DecodeProducts<C, Element> products(score_params(scale.score, p.softcap), tile);
  if constexpr (C::kPartition == Partition::columns)
    run_split_columns(block, products);
  else
    run_split_keys(block, products);
  finish_block(block, products, output_of(p, tile, scale), grid, split_index);
}

// Merge the splits of one row tile.
__global__ void __launch_bounds__(kCombineThreads)
combine_kernel(const __grid_constant__ fagen_decode_params p, const __grid_constant__ DecodeGrid grid) {
  wait_for_splits<C>();
  const DecodeTile<C> tile(p, grid, blockIdx.x);
  const DecodeSplit<C> split(tile, grid, 0);
  if (tile.first_row >= tile.rows() || split.used == 1) return;
  merge_splits(output_of(p, tile, HeadScale(p, tile.batch, tile.kv_head)), grid, split.used, kCombineThreads);
}

// ---- host ----------------------------------------------------------------------------------------------------------

// Blocks that run at once. Asks the device, and gives the kernel more shared memory than the default.
static cudaError_t prepare(int index, int& resident) {
  if (const cudaError_t e = cudaDeviceGetAttribute(&resident, cudaDevAttrMultiProcessorCount, index)) return e;
  resident *= C::kBlocksPerSm;
  constexpr int kBytes = DecodeShape<C>::kSmemBytes;
  return cudaFuncSetAttribute(decode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
}

}  // namespace fagen

extern "C" uint64_t fagen_workspace_bytes(const fagen_decode_params* p) {
  int resident;
  if (fagen::once_per_device(&resident, fagen::prepare)) return 0;
  return fagen::DecodePlan<fagen::C>(*p, resident).bytes();
}

extern "C" const char* fagen_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

extern "C" int fagen_launch(const fagen_decode_params* p, void* stream) {
  int resident;
  if (const cudaError_t e = fagen::once_per_device(&resident, fagen::prepare)) return e;
  return fagen::launch_decode<fagen::C>(*p, resident, static_cast<cudaStream_t>(stream), fagen::decode_kernel,
                                        fagen::combine_kernel);
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
