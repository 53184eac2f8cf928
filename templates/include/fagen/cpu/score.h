// From q.k to the score: scale, softcap, bias, mask. A step that the config does not need costs nothing.
#pragma once
#include "fagen/cpu/mask.h"
#include "fagen/cpu/math.h"

namespace fagen {

// A weight is exp2(factor * score). Unless softcap or bias needs the true score, the score is the raw product.
template <class Config>
struct Scale {
  static constexpr bool kTrueScore = Config::kSoftcap || Config::kAlibi;

  float sign;    // the scale's, put on q so that a larger product always weighs more
  float inner;   // raw product to the argument of softcap, or to the true score
  float factor;  // score to the base-2 logarithm of its weight

  template <class Params>
  explicit Scale(const Params& p)
      : sign(kTrueScore ? 1 : int(p.scale > 0) - int(p.scale < 0)),
        inner(Config::kSoftcap ? p.scale / p.softcap : p.scale),
        factor(kTrueScore || p.scale == 0 ? kLog2E : fabsf(p.scale) * kLog2E) {}
};

// Finishes the scores of the vector of rows that starts at `row`, for one key.
template <class Config, bool kMasked>
struct Score {
  static constexpr bool kFinish = kMasked || Scale<Config>::kTrueScore;

  Band band;
  Intervals<Config> intervals;
  float inner, softcap, slope;
  int shift;  // key on row 0's diagonal

  FAGEN_INLINE vec operator()(vec x, ivec row, int key) const {
    if constexpr (Config::kSoftcap)
      x = softcap * tanh(x * inner);
    else if constexpr (Config::kAlibi)
      x *= inner;
    return biased(x, row, key);
  }

  // Bias and mask of a score that is scaled, and capped, already.
  FAGEN_INLINE vec biased(vec x, ivec row, int key) const {
    if constexpr (Config::kAlibi) {
      const ivec distance = row + (shift - key);
      x -= slope * __builtin_convertvector(distance < 0 ? -distance : distance, vec);
    }
    if constexpr (kMasked) {
      ivec sees = band.sees(row, key);
      if constexpr (Config::kIntervalColumns > 0) sees &= intervals.sees(row, key);
      x = sees ? x : broadcast(-INFINITY);
    }
    return x;
  }
};

}  // namespace fagen
