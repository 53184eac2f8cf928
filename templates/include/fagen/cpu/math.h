// Vector functions that the softmax needs, to about one unit in the last place.
#pragma once
#include <float.h>
#include <math.h>

#include "fagen/cpu/simd.h"

namespace fagen {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Exp2Parts {
  vec power;   // 2^n, n the integer nearest to the exponent y
  vec excess;  // 2^(y - n) - 1
};

// For y = x * factor in [-127, 127]. The product is never rounded. 2^-127 comes out as 0.
FAGEN_INLINE Exp2Parts exp2_parts(vec x, float factor) {
  constexpr float kRound = 0x1.8p23f + 127;  // adding it leaves n + 127 in the low bits: the exponent of 2^n
  const vec shifted = x * factor + kRound;
  const vec f = x * factor - (shifted - kRound);
  // minimax fit of (2^f - 1) / f on [-0.5, 0.5]; relative error of 2^f 2.0e-9
  vec p = f * 0x1.41fbbcp-13f + 0x1.5f3e52p-10f;
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  return {(vec)((ivec)shifted << 23), p * f};
}

// 2^(factor * x), 0 where the exponent is below -127 (so for -inf); it must not be above 127. A NaN stays one.
struct ScaledExp2 {
  float factor, lowest;

  explicit ScaledExp2(float factor) : factor(factor), lowest(fmaxf(-127.0f / factor, -FLT_MAX)) {}

  FAGEN_INLINE vec operator()(vec x) const {
    const Exp2Parts e = exp2_parts(max(broadcast(lowest), x), factor);
    return e.power + e.power * e.excess;
  }
};

// (e^2x - 1) / (e^2x + 1), from e^2x - 1 so that nothing cancels near 0.
FAGEN_INLINE vec tanh(vec x) {
  const vec bounded = -max(broadcast(-20.0f), -max(broadcast(-20.0f), x));
  const Exp2Parts e = exp2_parts(bounded, 2 * kLog2E);
  const vec m = (e.power - 1.0f) + e.power * e.excess;
  return m / (m + 2.0f);
}

}  // namespace fagen
