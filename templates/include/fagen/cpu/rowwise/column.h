// The softmax along columns whose neighbours are other columns, and its gradient: kVectors vectors of columns side by
// side, every step vertical. Rows pass in chunks whose part of these columns stays in a core's cache.
#pragma once
#include <vector>

#include "fagen/abi/softmax.h"
#include "fagen/cpu/rowwise/vectors.h"

namespace fagen {

template <class Config, class In, class Out>
struct ForwardColumns {
  static constexpr int kVectors = Config::kUnroll;
  static constexpr bool kStored = Config::kScheme == Scheme::stored;

  const In* x;
  Out* out;
  int64_t x_stride, out_stride;

  ForwardColumns(const fagen_softmax_params& p, int64_t batch, int64_t column)
      : x(element_at<In>(p.x, batch, 0, column)),
        out(element_at<Out>(p.out, batch, 0, column)),
        x_stride(p.x.stride[1]),
        out_stride(p.out.stride[1]) {}

  struct Partial {
    vec max[kVectors], sum[kVectors];
  };

  static Partial none() {
    Partial empty = {};
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) empty.max[v] = broadcast(-INFINITY);
    return empty;
  }

  static Partial merge(const std::vector<Partial>& chunks) {
    if (chunks.size() == 1) return chunks[0];
    Partial all = none();
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      CompensatedSum sum;
      for (const Partial& chunk : chunks) all.max[v] = max(chunk.max[v], all.max[v]);
      for (const Partial& chunk : chunks) sum.add(chunk.sum[v] * exp_of(chunk.max[v] - reference_of(all.max[v])));
      all.sum[v] = sum.total;
    }
    return all;
  }

  template <int kUsed, class Lanes>
  FAGEN_INLINE void reduce_max(int64_t begin, int64_t end, Lanes lanes, Partial& p) const {
    for (int64_t row = begin; row < end; ++row)
#pragma GCC unroll 8
      for (int v = 0; v < kUsed; ++v) p.max[v] = max(load_lanes(x + row * x_stride + v * kLanes, lanes), p.max[v]);
  }

  template <int kUsed, class Lanes>
  FAGEN_INLINE void reduce_sum(int64_t begin, int64_t end, Lanes lanes, Partial& p) const {
    vec reference[kUsed];
#pragma GCC unroll 8
    for (int v = 0; v < kUsed; ++v) reference[v] = reference_of(p.max[v]);
    for (int64_t row = begin; row < end; ++row)
#pragma GCC unroll 8
      for (int v = 0; v < kUsed; ++v) {
        const vec weight = exp_of(load_lanes(x + row * x_stride + v * kLanes, lanes) - reference[v]);
        if constexpr (kStored) store_lanes(out + row * out_stride + v * kLanes, weight, lanes);
        p.sum[v] += weight;
      }
  }

  template <int kUsed, class Lanes>
  FAGEN_INLINE void reduce(int64_t begin, int64_t end, Lanes lanes, Partial& p) const {
    reduce_max<kUsed>(begin, end, lanes, p);
    reduce_sum<kUsed>(begin, end, lanes, p);
  }

  template <int kUsed, class Lanes>
  FAGEN_INLINE void write(int64_t begin, int64_t end, Lanes lanes, const Partial& chunk, const Partial& all) const {
    vec scale[kUsed];  // or the logarithm of the sum
#pragma GCC unroll 8
    for (int v = 0; v < kUsed; ++v) {
      scale[v] = Config::kLog ? log_of(all.sum[v]) : 1.f / all.sum[v];
      if constexpr (kStored) scale[v] *= exp_of(chunk.max[v] - all.max[v]);
    }
    for (int64_t row = begin; row < end; ++row)
#pragma GCC unroll 8
      for (int v = 0; v < kUsed; ++v) {
        Out* to = out + row * out_stride + v * kLanes;
        if constexpr (kStored) {
          store_lanes(to, load_lanes(to, lanes) * scale[v], lanes);
        } else {
          const vec less = load_lanes(x + row * x_stride + v * kLanes, lanes) - all.max[v];
          store_lanes(to, Config::kLog ? less - scale[v] : exp_of(less) * scale[v], lanes);
        }
      }
  }

 private:
  static vec log_of(vec x) {
    for (int i = 0; i < kLanes; ++i) x[i] = logf(x[i]);
    return x;
  }
};

template <class Config, class In, class Out>
struct BackwardColumns {
  static constexpr int kVectors = Config::kUnroll;

  const In *y, *dout;
  Out* out;
  int64_t y_stride, dout_stride, out_stride;

  BackwardColumns(const fagen_softmax_params& p, int64_t batch, int64_t column)
      : y(element_at<In>(p.x, batch, 0, column)),
        dout(element_at<In>(p.dout, batch, 0, column)),
        out(element_at<Out>(p.out, batch, 0, column)),
        y_stride(p.x.stride[1]),
        dout_stride(p.dout.stride[1]),
        out_stride(p.out.stride[1]) {}

  struct Partial {
    vec sum[kVectors];
  };

  static Partial none() { return {}; }
  static Partial merge(const std::vector<Partial>& chunks) {
    Partial all;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      CompensatedSum sum;
      for (const Partial& chunk : chunks) sum.add(chunk.sum[v]);
      all.sum[v] = sum.total;
    }
    return all;
  }

  template <int kUsed, class Lanes>
  FAGEN_INLINE void reduce(int64_t begin, int64_t end, Lanes lanes, Partial& p) const {
    for (int64_t row = begin; row < end; ++row)
#pragma GCC unroll 8
      for (int v = 0; v < kUsed; ++v) {
        const vec dy = load_lanes(dout + row * dout_stride + v * kLanes, lanes);
        p.sum[v] += Config::kLog ? dy : dy * load_lanes(y + row * y_stride + v * kLanes, lanes);
      }
  }

  template <int kUsed, class Lanes>
  FAGEN_INLINE void write(int64_t begin, int64_t end, Lanes lanes, const Partial&, const Partial& all) const {
    for (int64_t row = begin; row < end; ++row)
#pragma GCC unroll 8
      for (int v = 0; v < kUsed; ++v) {
        const vec dy = load_lanes(dout + row * dout_stride + v * kLanes, lanes);
        const vec made = load_lanes(y + row * y_stride + v * kLanes, lanes);
        const vec dx = Config::kLog ? dy - exp_of(made) * all.sum[v] : made * (dy - all.sum[v]);
        store_lanes(out + row * out_stride + v * kLanes, dx, lanes);
      }
  }
};

}  // namespace fagen
