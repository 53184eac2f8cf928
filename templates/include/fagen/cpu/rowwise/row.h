// The softmax along a row whose elements are neighbours, and its gradient. A row is cut into chunks by its length
// alone; what is reduced chunk by chunk is merged in their order, so that no result depends on the threads.
#pragma once
#include <vector>

#include "fagen/abi/softmax.h"
#include "fagen/cpu/rowwise/vectors.h"

namespace fagen {

// Forward of one row.
template <class Config, class In, class Out>
struct ForwardRow {
  static constexpr int kSlots = Config::kUnroll;
  static constexpr bool kStored = Config::kScheme == Scheme::stored;
  static constexpr bool kInScratch = kStored && sizeof(Out) < sizeof(float);

  const In* x;
  Out* out;
  float* weights;  // exp(x - maximum of its chunk), where they are stored: in the output, or in a row of scratch

  using Partial = RowStats;

  ForwardRow(const fagen_softmax_params& p, int64_t batch, int64_t row, float* scratch)
      : x(element_at<In>(p.x, batch, row)), out(element_at<Out>(p.out, batch, row)), weights(scratch) {
    if constexpr (kStored && !kInScratch) weights = out;
  }

  float max_of_chunk(int64_t begin, int64_t count) const {
    vec top[kSlots];
#pragma GCC unroll 8
    for (int i = 0; i < kSlots; ++i) top[i] = broadcast(-INFINITY);
    for_vectors<kSlots>(count, [&](int64_t at, auto lanes, int slot) __attribute__((always_inline)) {
      top[slot] = max(load_lanes(x + begin + at, lanes), top[slot]);
    });
    return max_of(top);
  }

  float sum_of_chunk(int64_t begin, int64_t count, float max) const {
    const float reference = reference_of(max);
    vec sum[kSlots] = {};
    for_vectors<kSlots>(count, [&](int64_t at, auto lanes, int slot) __attribute__((always_inline)) {
      const vec weight = exp_of(load_lanes(x + begin + at, lanes) - reference);
      if constexpr (kStored) store_lanes(weights + begin + at, weight, lanes);
      sum[slot] += weight;
    });
    return sum_of(sum);
  }

  RowStats reduce(int64_t begin, int64_t count) const {
    const float max = max_of_chunk(begin, count);
    return {max, sum_of_chunk(begin, count, max)};
  }

  // In double: a long row has many chunks, and their sums may round it no worse than their elements did.
  static RowStats merge(const std::vector<RowStats>& chunks) {
    if (chunks.size() == 1) return chunks[0];
    float max = -INFINITY;
    for (const RowStats& chunk : chunks) max = chunk.max > max ? chunk.max : max;
    double sum = 0;
    for (const RowStats& chunk : chunks) sum += double(chunk.sum) * exp_of(broadcast(chunk.max - reference_of(max)))[0];
    return {max, float(sum)};
  }

  // `chunk` is what `reduce` made of these elements, `row` that of the whole row.
  void write(int64_t begin, int64_t count, RowStats chunk, RowStats row) const {
    const float log_sum = Config::kLog ? logf(row.sum) : 0.f, inverse = 1.f / row.sum;
    const float scale = kStored ? exp_of(broadcast(chunk.max) - row.max)[0] * inverse : inverse;
    for_vectors<kSlots>(count, [&](int64_t at, auto lanes, int) __attribute__((always_inline)) {
      if constexpr (kStored) {
        store_lanes(out + begin + at, load_lanes(weights + begin + at, lanes) * scale, lanes);
      } else {
        const vec x_less_max = load_lanes(x + begin + at, lanes) - row.max;
        store_lanes(out + begin + at, Config::kLog ? x_less_max - log_sum : exp_of(x_less_max) * scale, lanes);
      }
    });
  }
};

// The gradient of one row's input.
template <class Config, class In, class Out>
struct BackwardRow {
  static constexpr int kSlots = Config::kUnroll;
  static constexpr bool kInScratch = false;

  const In *y, *dout;
  Out* out;

  BackwardRow(const fagen_softmax_params& p, int64_t batch, int64_t row, float*)
      : y(element_at<In>(p.x, batch, row)),
        dout(element_at<In>(p.dout, batch, row)),
        out(element_at<Out>(p.out, batch, row)) {}

  struct Partial {
    float sum;  // of y * dout, or of dout for the logarithm
  };

  static Partial merge(const std::vector<Partial>& chunks) {
    double sum = 0;
    for (const Partial& chunk : chunks) sum += chunk.sum;
    return {float(sum)};
  }

  Partial reduce(int64_t begin, int64_t count) const {
    vec sum[kSlots] = {};
    for_vectors<kSlots>(count, [&](int64_t at, auto lanes, int slot) __attribute__((always_inline)) {
      const vec dy = load_zeros(dout + begin + at, lanes);
      sum[slot] += Config::kLog ? dy : dy * load_zeros(y + begin + at, lanes);
    });
    return {sum_of(sum)};
  }

  void write(int64_t begin, int64_t count, Partial, Partial row) const {
    for_vectors<kSlots>(count, [&](int64_t at, auto lanes, int) __attribute__((always_inline)) {
      const vec dy = load_lanes(dout + begin + at, lanes), made = load_lanes(y + begin + at, lanes);
      store_lanes(out + begin + at, Config::kLog ? dy - exp_of(made) * row.sum : made * (dy - row.sum), lanes);
    });
  }
};

}  // namespace fagen
