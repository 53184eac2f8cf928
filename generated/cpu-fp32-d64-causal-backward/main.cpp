// An example and a check of the kernel beside it: makes random inputs, runs the kernel, compares rows of the gradients
// with a plain computation in double precision, and times it. Returns 0 when the kernel is right.
//
//   problem: backward/fp32/d64/causal/b1/h8-8/q1024-k1024
//   build:   g++ -std=c++17 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fno-exceptions -o example kernel.cpp main.cpp
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

// ---- the problem ----------------------------------------------------------------------------------------------------

constexpr int kBatch = 1, kHeads = 8, kKvHeads = 8;
constexpr int kRows = 1024, kKeys = 1024;
constexpr int kDim = 64, kDimV = 64;
constexpr int kLeft = -1, kRight = 0;  // the band; -1: unbounded
constexpr int kColumns = 0;  // row bounds a key carries
constexpr int kLTS = -1, kLTE = -1, kUTS = -1, kUTE = -1;  // columns of theirs; -1: absent
constexpr float kSoftcap = 0.f;
constexpr bool kAlibi = false;
constexpr double kFlops = 2684354560.0;  // of the visible cells
constexpr double kUnit = 5e-06;    // relative rounding error of fp32 (of the computation for fp32)

// ---- numbers --------------------------------------------------------------------------------------------------------

using Element = float;
static Element narrow(float x) { return x; }
static double widen(Element x) { return x; }

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

static void* allocate(size_t bytes) {
  void* memory = aligned_alloc(256, (bytes / 256 + 1) * 256);
  memset(memory, 0xff, bytes);  // NaN: what the kernel leaves out shows
  return memory;
}
static void copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
static void finish() {}

template <class T>
static T* upload(const std::vector<T>& values) {
  T* memory = static_cast<T*>(allocate(values.size() * sizeof(T)));
  copy(memory, values.data(), values.size() * sizeof(T));
  return memory;
}

// ---- inputs ---------------------------------------------------------------------------------------------------------

struct Inputs {
  std::vector<Element> q, k, v;
  std::vector<int32_t> intervals;
  std::vector<float> slopes;
};

static std::vector<Element> random_tensor(size_t count) {
  std::vector<Element> values(count);
  for (Element& value : values) value = narrow(random_normal());
  return values;
}

// Documents of random lengths; where a key carries more bounds than they need, some rows become visible again.
static std::vector<int32_t> random_intervals() {
  std::vector<int32_t> bounds(size_t(kBatch) * kKvHeads * kKeys * kColumns);
  for (int part = 0; part < kBatch * kKvHeads && kColumns > 0; ++part) {
    int start = 0, end = 0;
    for (int key = 0; key < kKeys; ++key) {
      const int row = int(int64_t(key) * kRows / kKeys);
      if (row >= end) start = end, end = std::min(kRows, end + 1 + random_below(kRows / 2 + 1));
      int32_t* of_key = &bounds[(size_t(part) * kKeys + key) * kColumns];
      if (kLTS >= 0) of_key[kLTS] = end;
      if (kLTE >= 0) of_key[kLTE] = end + (kRows - end) * 3 / 4;
      if (kUTS >= 0) of_key[kUTS] = start / 4;
      if (kUTE >= 0) of_key[kUTE] = start;
    }
  }
  return bounds;
}

static Inputs random_inputs() {
  Inputs in;
  in.q = random_tensor(size_t(kBatch) * kRows * kHeads * kDim);
  in.k = random_tensor(size_t(kBatch) * kKeys * kKvHeads * kDim);
  in.v = random_tensor(size_t(kBatch) * kKeys * kKvHeads * kDimV);
  if (kColumns > 0) in.intervals = random_intervals();
  for (int h = 0; kAlibi && h < kHeads; ++h) in.slopes.push_back(std::exp2(-8.f * float(h + 1) / kHeads));
  return in;
}

// ---- the reference --------------------------------------------------------------------------------------------------

static bool visible(const Inputs& in, int b, int kv_head, int row, int key) {
  const int diagonal = row + kKeys - kRows;
  if (kLeft >= 0 && key < diagonal - kLeft) return false;
  if (kRight >= 0 && key > diagonal + kRight) return false;
  if (kColumns == 0) return true;
  const int32_t* of_key = &in.intervals[((size_t(b) * kKvHeads + kv_head) * kKeys + key) * kColumns];
  const bool below = row >= of_key[kLTS] && (kLTE < 0 || row < of_key[kLTE < 0 ? 0 : kLTE]);
  const bool above = kUTE >= 0 && row < of_key[kUTE < 0 ? 0 : kUTE] && (kUTS < 0 || row >= of_key[kUTS < 0 ? 0 : kUTS]);
  return !below && !above;
}

// The results of forward, and the gradient of its output.
struct Forward {
  std::vector<Element> o, dout;
  std::vector<float> lse;
};

static size_t row_of_q(int b, int row, int h) { return (size_t(b) * kRows + row) * kHeads + h; }
static size_t row_of_k(int b, int key, int kv_head) { return (size_t(b) * kKeys + key) * kKvHeads + kv_head; }

static double dot(const Element* a, const Element* b, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += widen(a[i]) * widen(b[i]);
  return sum;
}

// A cell of one head: its score, and by how much that changes with q.k; the weight of its value, 0 if it is dropped.
struct Cell {
  bool seen;
  double score, slope, kept;
};

static Cell cell(const Inputs& in, int b, int h, int row, int key) {
  const int kv_head = h / (kHeads / kKvHeads);
  if (!visible(in, b, kv_head, row, key)) return {};
  const double scale = 1 / std::sqrt(double(kDim));
  Cell c = {true, scale * dot(&in.q[row_of_q(b, row, h) * kDim], &in.k[row_of_k(b, key, kv_head) * kDim], kDim), scale, 1};
  if (kSoftcap > 0) {
    const double capped = std::tanh(c.score / (kSoftcap > 0 ? kSoftcap : 1));
    c.score = kSoftcap * capped, c.slope *= 1 - capped * capped;
  }
  if (kAlibi) c.score -= double(in.slopes[h]) * std::abs(row + kKeys - kRows - key);
  return c;
}

// Forward of one head, as the definition says.
static void run_forward(const Inputs& in, int b, int h, Forward* f) {
  const int kv_head = h / (kHeads / kKvHeads);
  std::vector<Cell> cells(kKeys);
  for (int row = 0; row < kRows; ++row) {
    double top = -std::numeric_limits<double>::infinity(), total = 0;
    for (int key = 0; key < kKeys; ++key) {
      cells[key] = cell(in, b, h, row, key);
      if (cells[key].seen) top = std::max(top, cells[key].score);
    }
    std::vector<double> sum(kDimV, 0.0);
    for (int key = 0; key < kKeys; ++key) {
      if (!cells[key].seen) continue;
      const double weight = std::exp(cells[key].score - top);
      const Element* v = &in.v[row_of_k(b, key, kv_head) * kDimV];
      total += weight;
      for (int i = 0; i < kDimV; ++i) sum[i] += weight * cells[key].kept * widen(v[i]);
    }
    for (int i = 0; i < kDimV; ++i) f->o[row_of_q(b, row, h) * kDimV + i] = narrow(float(total > 0 ? sum[i] / total : 0));
    f->lse[(size_t(b) * kHeads + h) * kRows + row] = float(total > 0 ? top + std::log(total) : top);
  }
}

// The weight of a cell and the gradient of its score; delta is of its row.
struct Gradient {
  double weight, score;
};
static Gradient gradient(const Inputs& in, const Forward& f, int b, int h, int row, int key, double delta) {
  const Cell c = cell(in, b, h, row, key);
  if (!c.seen) return {};
  const int kv_head = h / (kHeads / kKvHeads);
  const double weight = std::exp(c.score - f.lse[(size_t(b) * kHeads + h) * kRows + row]);
  const double dp = dot(&f.dout[row_of_q(b, row, h) * kDimV], &in.v[row_of_k(b, key, kv_head) * kDimV], kDimV);
  return {weight * c.kept, weight * (dp * c.kept - delta) * c.slope};
}
static double delta_of(const Forward& f, int b, int h, int row) {
  return dot(&f.dout[row_of_q(b, row, h) * kDimV], &f.o[row_of_q(b, row, h) * kDimV], kDimV);
}

// A row of a gradient: the sum of what the cells add, and its size, by which rounding is judged.
struct Row {
  std::vector<double> sum, size;
  explicit Row(int columns) : sum(columns, 0.0), size(columns, 0.0) {}
  void add(double factor, const Element* x) {
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += factor * widen(x[i]), size[i] += std::fabs(factor * widen(x[i]));
  }
};

struct Errors {
  double largest = 0, worst = 0;  // worst: the largest error over its bound
  void compare(const Element* mine, const Row& want) {
    for (size_t i = 0; i < want.sum.size(); ++i) {
      const double error = std::fabs(widen(mine[i]) - want.sum[i]), bound = 6 * kUnit * want.size[i] + 1e-5;
      largest = std::isnan(error) ? error : std::max(largest, error);
      worst = std::max(worst, error <= bound ? error / bound : std::numeric_limits<double>::infinity());  // NaN too
    }
  }
};

static void check_row(const Inputs& in, const Forward& f, const Element* dq, int b, int h, int row, Errors* errors) {
  const double delta = delta_of(f, b, h, row);
  Row want(kDim);
  for (int key = 0; key < kKeys; ++key)
    want.add(gradient(in, f, b, h, row, key, delta).score, &in.k[row_of_k(b, key, h / (kHeads / kKvHeads)) * kDim]);
  errors->compare(&dq[row_of_q(b, row, h) * kDim], want);
}

static void check_key(const Inputs& in, const Forward& f, const Element* dk, const Element* dv, int b, int kv_head, int key,
                      Errors* of_k, Errors* of_v) {
  Row want_k(kDim), want_v(kDimV);
  for (int h = kv_head * (kHeads / kKvHeads); h < (kv_head + 1) * (kHeads / kKvHeads); ++h)
    for (int row = 0; row < kRows; ++row) {
      const Gradient g = gradient(in, f, b, h, row, key, delta_of(f, b, h, row));
      want_k.add(g.score, &in.q[row_of_q(b, row, h) * kDim]);
      want_v.add(g.weight, &f.dout[row_of_q(b, row, h) * kDimV]);
    }
  of_k->compare(&dk[row_of_k(b, key, kv_head) * kDim], want_k);
  of_v->compare(&dv[row_of_k(b, key, kv_head) * kDimV], want_v);
}

// ---- the run --------------------------------------------------------------------------------------------------------

struct Outputs {
  std::vector<Element> dq, dk, dv;
  Element *dq_memory, *dk_memory, *dv_memory;
  static Element* like(std::vector<Element>& values, size_t count) {
    values.resize(count);
    return static_cast<Element*>(allocate(count * sizeof(Element)));
  }
  Outputs()
      : dq_memory(like(dq, size_t(kBatch) * kRows * kHeads * kDim)),
        dk_memory(like(dk, size_t(kBatch) * kKeys * kKvHeads * kDim)),
        dv_memory(like(dv, size_t(kBatch) * kKeys * kKvHeads * kDimV)) {}
  void fetch() {
    copy(dq.data(), dq_memory, dq.size() * sizeof(Element));
    copy(dk.data(), dk_memory, dk.size() * sizeof(Element));
    copy(dv.data(), dv_memory, dv.size() * sizeof(Element));
  }
};

// Contiguous (batch, row, head, element) tensors; any other strides with contiguous elements would do.
static fagen_backward_params make_params(const Inputs& in, const Forward& f, const Outputs& out) {
  fagen_backward_params p = {};
  const auto tensor = [](void* data, int64_t rows, int64_t heads, int64_t dim) {
    return fagen_tensor{data, {rows * heads * dim, heads * dim, dim}};
  };
  p.q = tensor(upload(in.q), kRows, kHeads, kDim), p.dq = tensor(out.dq_memory, kRows, kHeads, kDim);
  p.k = tensor(upload(in.k), kKeys, kKvHeads, kDim), p.dk = tensor(out.dk_memory, kKeys, kKvHeads, kDim);
  p.v = tensor(upload(in.v), kKeys, kKvHeads, kDimV), p.dv = tensor(out.dv_memory, kKeys, kKvHeads, kDimV);
  p.o = tensor(upload(f.o), kRows, kHeads, kDimV), p.dout = tensor(upload(f.dout), kRows, kHeads, kDimV);
  p.lse = upload(f.lse);
  p.batch = kBatch, p.heads = kHeads, p.kv_heads = kKvHeads, p.seqlen_q = kRows, p.seqlen_k = kKeys;
  p.head_dim = kDim, p.head_dim_v = kDimV, p.window_left = kLeft, p.window_right = kRight;
  p.scale = 1.f / std::sqrt(float(kDim)), p.softcap = kSoftcap;
  if (kColumns > 0) {
    p.intervals = tensor(upload(in.intervals), kKvHeads, kKeys, kColumns);  // its rows are the mask heads
    p.mask_heads = kKvHeads;
  }
  if (kAlibi) p.alibi_slopes.data = upload(in.slopes);  // one row for all batches: the stride stays 0
  if (const uint64_t bytes = fagen_workspace_bytes(&p)) p.workspace = allocate(bytes);
  return p;
}

static void launch(const fagen_backward_params& p) {
  if (const int code = fagen_launch(&p, nullptr)) {
    fprintf(stderr, "fagen_launch: %s\n", fagen_error(code));
    exit(1);
  }
}

static double seconds_of_one(const fagen_backward_params& p) {
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

int main() {
  if (strcmp(fagen_params_layout(), FAGEN_PARAMS_LAYOUT) != 0) return fprintf(stderr, "kernel.h is of another kernel\n"), 1;
  const Inputs in = random_inputs();
  Forward forward;
  forward.o = random_tensor(size_t(kBatch) * kRows * kHeads * kDimV), forward.dout = random_tensor(forward.o.size());
  forward.lse.assign(size_t(kBatch) * kHeads * kRows, 10.f);
  // forward of as many kv heads as some seconds allow, the last one among them; of the others O and LSE are made up
  const int planes = kBatch * kKvHeads, group = kHeads / kKvHeads;
  const double of_plane = double(group) * kRows * kKeys * (kDim + kDimV);
  const int checked = std::max(1, int(std::min(double(planes), 4e9 / of_plane)));
  const auto plane_of = [&](int i) { return planes - 1 - i; };
  for (int i = 0; i < checked; ++i)
    for (int h = 0; h < group; ++h)
      run_forward(in, plane_of(i) / kKvHeads, plane_of(i) % kKvHeads * group + h, &forward);

  Outputs out;
  const fagen_backward_params p = make_params(in, forward, out);
  launch(p);
  finish();
  out.fetch();
  // all rows and keys of a small problem; of a large one some, first and last ones among them
  const int rows = int(std::max(2.0, std::min(double(kRows), 1e9 / (double(checked) * group * kKeys * (kDim + kDimV)))));
  const int keys = int(std::max(2.0, std::min(double(kKeys), 1e9 / (double(checked) * group * kRows * (kDim + kDimV)))));
  const auto spread = [](int i, int count, int all) { return count < 2 || all < 2 ? 0 : int(int64_t(i) * (all - 1) / (count - 1)); };
  Errors of_q, of_k, of_v;
  for (int i = 0; i < checked; ++i) {
    const int b = plane_of(i) / kKvHeads, kv_head = plane_of(i) % kKvHeads;
    for (int h = kv_head * group; h < (kv_head + 1) * group; ++h)
      for (int r = 0; r < rows; ++r) check_row(in, forward, out.dq.data(), b, h, spread(r, rows, kRows), &of_q);
    for (int n = 0; n < keys; ++n)
      check_key(in, forward, out.dk.data(), out.dv.data(), b, kv_head, spread(n, keys, kKeys), &of_k, &of_v);
  }
  const double worst = std::max({of_q.worst, of_k.worst, of_v.worst});
  const bool right = worst <= 1;
  const double seconds = seconds_of_one(p);
  printf("backward/fp32/d64/causal/b1/h8-8/q1024-k1024\n%s: largest error of dq %.3g, dk %.3g, dv %.3g, %.2f of the bound; %d of %d kv heads, "
         "%d of %d rows and %d of %d keys of each checked\n",
         right ? "right" : "WRONG", of_q.largest, of_k.largest, of_v.largest, worst, checked, planes, rows, kRows, keys, kKeys);
  printf("%.3f ms", seconds * 1e3);
  if (kColumns == 0) printf(", %.1f GFLOP/s", kFlops / seconds / 1e9);  // intervals hide cells that kFlops counts
  printf("\n");
  return right ? 0 : 1;
}
