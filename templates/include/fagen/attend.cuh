// One warp's part of attention: its rows of q against a tile of keys, and the sums that it carries along.
#pragma once
#include "fagen/element.cuh"
#include "fagen/mask.cuh"
#include "fagen/ptx/barrier.cuh"
#include "fagen/ptx/mma_sync.cuh"
#include "fagen/smem.cuh"
#include "fagen/softmax.cuh"

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
