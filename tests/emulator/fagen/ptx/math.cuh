#pragma once
#include <math.h>

namespace fagen::ptx {
inline float ex2(float x) { return exp2f(x); }
inline float tanh_approx(float x) { return tanhf(x); }
}  // namespace fagen::ptx
