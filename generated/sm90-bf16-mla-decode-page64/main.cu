// An example and a check of the kernel beside it: makes a random cache of keys, runs the kernel, compares rows of the
// result with a plain computation in double precision, and times it. Returns 0 when the kernel is right.
//
//   problem: decode/bf16/d576-512/none/page64/shared-kv/b64/h128-1/q1-k4096
//   build:   nvcc -gencode=arch=compute_90a,code=sm_90a -O3 -std=c++17 --use_fast_math -lineinfo -o example kernel.cu main.cu
//   run:     ./example
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "kernel.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// ---- the problem ----------------------------------------------------------------------------------------------------

constexpr int kBatch = 64, kHeads = 128, kKvHeads = 1;
constexpr int kRows = 1, kKeys = 4096;  // of a sequence; keys: at most
constexpr int kDim = 576, kDimV = 512;
constexpr int kLeft = -1, kRight = -1;  // the band; -1: unbounded
constexpr int kPage = 64;  // rows of a page; 0: the cache is not paged, and a page is a sequence's
constexpr float kSoftcap = 0.f;
constexpr bool kSinks = false;
constexpr bool kSharedKv = true;  // v is the first columns of k
constexpr double kUnit = 0.001953125;    // relative rounding error of bf16 (of the computation for fp32)

constexpr int kPageRows = kPage > 0 ? kPage : kKeys, kPagesEach = (kKeys + kPageRows - 1) / kPageRows;
constexpr int kPages = kBatch * kPagesEach;

// ---- numbers --------------------------------------------------------------------------------------------------------

using Element = uint16_t;  // the upper half of a float
static Element narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static double widen(Element x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static uint64_t random_state = 1;
static uint32_t random_bits() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(random_state >> 33);
}
static int random_below(int n) { return int(random_bits() % uint32_t(n)); }
static float random_normal() {  // near enough: four uniform numbers
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += float(random_bits()) * (1.f / 2147483648.f) - 0.5f;
  return sum * 1.7320508f;
}

// ---- memory and time ------------------------------------------------------------------------------------------------

static void must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  exit(4);
}
static void* allocate(size_t bytes) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, bytes ? bytes : 1), "cudaMalloc");
  must(cudaMemset(memory, 0xff, bytes), "cudaMemset");  // NaN: what the kernel leaves out shows
  return memory;
}
static void copy(void* to, const void* from, size_t bytes) {
  must(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
}
static void finish() { must(cudaDeviceSynchronize(), "the kernel"); }

template <class T>
static T* upload(const std::vector<T>& values) {
  T* memory = static_cast<T*>(allocate(values.size() * sizeof(T)));
  copy(memory, values.data(), values.size() * sizeof(T));
  return memory;
}

using Cached = Element;
static Cached random_cached() { return narrow(random_normal()); }
static double widen_cached(Cached x) { return widen(x); }

// ---- inputs ---------------------------------------------------------------------------------------------------------

struct Inputs {
  std::vector<Element> q;                // (batch, row, head, element)
  std::vector<Cached> k, v;              // (page, row of a page, kv head, element)
  std::vector<int32_t> pages, lengths;   // (batch, pages of a sequence); keys of each sequence
  std::vector<float> k_scale, v_scale;   // (batch, kv head), of a cache in fp8
  std::vector<float> sinks;              // of each head
};

// Where a key of a sequence lies: its row of the cache.
static size_t row_of_key(const Inputs& in, int b, int key) {
  return size_t(in.pages[size_t(b) * kPagesEach + key / kPageRows]) * kPageRows + key % kPageRows;
}

// NaN but for the keys of the sequences: a kernel that reads on shows.
static std::vector<Cached> random_cache(const Inputs& in, int dim) {
  std::vector<Cached> cache(size_t(kPages) * kPageRows * kKvHeads * dim);
  memset(static_cast<void*>(cache.data()), 0xff, cache.size() * sizeof(Cached));
  for (int b = 0; b < kBatch; ++b)
    for (int key = 0; key < in.lengths[b]; ++key) {
      Cached* row = &cache[row_of_key(in, b, key) * kKvHeads * dim];
      for (int i = 0; i < kKvHeads * dim; ++i) row[i] = random_cached();
    }
  return cache;
}

static Inputs random_inputs() {
  Inputs in;
  for (int b = 0; b < kBatch; ++b) in.lengths.push_back(b == 0 ? kKeys : random_below(kKeys + 1));
  for (int page = 0; page < kPages; ++page) in.pages.push_back(page);
  if (kPage > 0)  // in any order
    for (int page = kPages - 1; page > 0; --page) std::swap(in.pages[page], in.pages[random_below(page + 1)]);
  in.k = random_cache(in, kDim);
  if (!kSharedKv) in.v = random_cache(in, kDimV);
  for (size_t i = 0; i < size_t(kBatch) * kRows * kHeads * kDim; ++i) in.q.push_back(narrow(random_normal()));
  const auto random_scales = [] {
    std::vector<float> scales;
    for (int i = 0; i < kBatch * kKvHeads; ++i) scales.push_back(0.5f + float(random_below(1024)) / 1024);
    return scales;
  };
  if (sizeof(Cached) == 1) in.k_scale = random_scales(), in.v_scale = random_scales();
  for (int h = 0; kSinks && h < kHeads; ++h) in.sinks.push_back(random_normal());
  return in;
}

// Strides are free but for the elements of a row, which are contiguous. Lengths and pages are read by the kernel, so
// that a loop of decoding changes them there, and these params serve all its steps.
static fagen_decode_params make_params(const Inputs& in, Element* o, float* lse) {
  fagen_decode_params p = {};
  const auto tensor = [](void* data, int64_t rows, int64_t heads, int64_t dim) {
    return fagen_tensor{data, {rows * heads * dim, heads * dim, dim}};
  };
  p.q = tensor(upload(in.q), kRows, kHeads, kDim);
  p.k = tensor(upload(in.k), kPageRows, kKvHeads, kDim);
  p.v = kSharedKv ? p.k : tensor(upload(in.v), kPageRows, kKvHeads, kDimV);
  p.o = tensor(o, kRows, kHeads, kDimV);
  p.lse = lse;
  if (kPage > 0) p.page_table = fagen_tensor{upload(in.pages), {kPagesEach}};
  if (sizeof(Cached) == 1) {
    p.k_scale = fagen_tensor{upload(in.k_scale), {kKvHeads, 1}};
    p.v_scale = fagen_tensor{upload(in.v_scale), {kKvHeads, 1}};
  }
  p.seqlens_k = upload(in.lengths);
  if (kSinks) p.sinks = upload(in.sinks);
  p.batch = kBatch, p.heads = kHeads, p.kv_heads = kKvHeads, p.rows = kBatch * kRows;
  p.seqlen_q = kRows, p.seqlen_k = kKeys, p.pages = kPages, p.page_size = kPageRows;
  p.head_dim = kDim, p.head_dim_v = kDimV, p.window_left = kLeft, p.window_right = kRight;
  p.scale = 1.f / std::sqrt(float(kDim)), p.softcap = kSoftcap;
  if (const uint64_t bytes = fagen_workspace_bytes(&p)) p.workspace = allocate(bytes);
  return p;
}

// ---- the reference --------------------------------------------------------------------------------------------------

struct Errors {
  double o = 0, lse = 0, worst = 0;  // worst: the largest error over its bound
  void add(double mine, double want, double bound, double* largest) {
    const double error = mine == want ? 0 : std::fabs(mine - want);  // equal infinities differ by 0
    const double ratio = error <= bound ? error / bound : std::numeric_limits<double>::infinity();  // NaN too
    *largest = std::isnan(error) ? error : std::max(*largest, error);
    worst = std::max(worst, ratio);
  }
};

// One row, as the definition says: scores, softmax, weighted sum. The last row stands at the last key.
static void check_row(const Inputs& in, const Element* o, const float* lse, int b, int h, int row, Errors* errors) {
  const int kv_head = h / (kHeads / kKvHeads), keys = in.lengths[b], diagonal = row + keys - kRows;
  const int first = kLeft < 0 ? 0 : std::max(0, diagonal - kLeft);
  const int end = kRight < 0 ? keys : std::min(keys, diagonal + kRight + 1);
  const double infinity = std::numeric_limits<double>::infinity();
  const auto scale_of = [&](const std::vector<float>& scales) {
    return scales.empty() ? 1.0 : double(scales[size_t(b) * kKvHeads + kv_head]);
  };
  const double scale = scale_of(in.k_scale) / std::sqrt(double(kDim)), v_scale = scale_of(in.v_scale);
  const Element* q = &in.q[((size_t(b) * kRows + row) * kHeads + h) * kDim];
  std::vector<double> score(keys), sum(kDimV, 0.0), size(kDimV, 0.0);
  double top = kSinks ? in.sinks[h] : -infinity;
  for (int key = first; key < end; ++key) {
    const Cached* k = &in.k[(row_of_key(in, b, key) * kKvHeads + kv_head) * kDim];
    double s = 0;
    for (int i = 0; i < kDim; ++i) s += widen(q[i]) * widen_cached(k[i]);
    s *= scale;
    if (kSoftcap > 0) s = kSoftcap * std::tanh(s * (1 / (kSoftcap > 0 ? kSoftcap : 1)));
    score[key] = s, top = std::max(top, s);
  }
  double total = kSinks ? std::exp(in.sinks[h] - top) : 0;  // a sink takes weight and has no value
  const std::vector<Cached>& values = kSharedKv ? in.k : in.v;
  for (int key = first; key < end; ++key) {
    const double weight = std::exp(score[key] - top);
    const Cached* v = &values[(row_of_key(in, b, key) * kKvHeads + kv_head) * (kSharedKv ? kDim : kDimV)];
    total += weight;
    for (int i = 0; i < kDimV; ++i) {
      const double term = weight * v_scale * widen_cached(v[i]);
      sum[i] += term, size[i] += std::fabs(term);
    }
  }
  const double shrink = total > 0 ? 1 / total : 0, want_lse = total > 0 ? top + std::log(total) : -infinity;
  const Element* mine = &o[((size_t(b) * kRows + row) * kHeads + h) * kDimV];
  // weights and result are each rounded once; twice that is allowed
  for (int i = 0; i < kDimV; ++i) {
    errors->add(widen(mine[i]), sum[i] * shrink, 4 * kUnit * size[i] * shrink + 1e-6, &errors->o);
  }
  errors->add(lse[(size_t(b) * kHeads + h) * kRows + row], want_lse, total > 0 ? 1e-3 * (1 + std::fabs(want_lse)) : 0, &errors->lse);
}

// ---- the run --------------------------------------------------------------------------------------------------------

static void launch(const fagen_decode_params& p) {
  if (const int code = fagen_launch(&p, nullptr)) {
    fprintf(stderr, "fagen_launch: %s\n", fagen_error(code));
    exit(1);
  }
}

static double seconds_of_one(const fagen_decode_params& p) {
  double total = 0;
  int count = 0;
  for (int repeat = 1; total < 0.2; repeat *= 2) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repeat; ++i) launch(p);
    finish();
    total = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), count = repeat;
  }
  return total / count;
}

// Bytes of the keys and values that some row may see: a kernel has to read these, and little else.
static double bytes_read(const Inputs& in) {
  double keys = 0;
  for (int length : in.lengths) keys += kLeft < 0 ? length : std::min(length, kLeft + kRows);
  return keys * kKvHeads * (kDim + (kSharedKv ? 0 : kDimV)) * sizeof(Cached);
}

int main() {
  if (strcmp(fagen_params_layout(), FAGEN_PARAMS_LAYOUT) != 0) return fprintf(stderr, "kernel.h is of another kernel\n"), 1;
  const Inputs in = random_inputs();
  std::vector<Element> o(size_t(kBatch) * kRows * kHeads * kDimV);
  std::vector<float> lse(size_t(kBatch) * kHeads * kRows);
  Element* o_memory = static_cast<Element*>(allocate(o.size() * sizeof(Element)));
  float* lse_memory = static_cast<float*>(allocate(lse.size() * sizeof(float)));
  const fagen_decode_params p = make_params(in, o_memory, lse_memory);
  launch(p);
  finish();
  copy(o.data(), o_memory, o.size() * sizeof(Element));
  copy(lse.data(), lse_memory, lse.size() * sizeof(float));

  // all rows of a small problem; of a large one as many as a second or two allow, first and last ones among them
  const int64_t all = int64_t(kBatch) * kHeads * kRows, affordable = int64_t(1e9) / (int64_t(kKeys) * (kDim + kDimV)) + 2;
  const int64_t checked = std::min(all, affordable);
  Errors errors;
  for (int64_t i = 0; i < checked; ++i) {
    const int64_t at = checked == all ? i : i * (all - 1) / (checked - 1);
    check_row(in, o.data(), lse.data(), int(at / (int64_t(kHeads) * kRows)), int(at / kRows % kHeads), int(at % kRows), &errors);
  }
  const bool right = errors.worst <= 1;
  const double seconds = seconds_of_one(p);
  printf("decode/bf16/d576-512/none/page64/shared-kv/b64/h128-1/q1-k4096\n%s: largest error %.3g, of lse %.3g, %.2f of the bound; %lld of %lld rows checked\n",
         right ? "right" : "WRONG", errors.o, errors.lse, errors.worst, (long long)checked, (long long)all);
  printf("%.3f ms, %.1f GB/s of keys and values of sequences of up to %d keys\n", seconds * 1e3, bytes_read(in) / seconds / 1e9, kKeys);
  return right ? 0 : 1;
}
