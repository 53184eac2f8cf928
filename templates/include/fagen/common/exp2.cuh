// Powers of two on the FMA pipe, for where the special-function unit is what a warp waits for.
#pragma once

namespace fagen {

// 2^x for x <= 0, and 1 beyond; relative error 9e-5, less than half a rounding of fp16. Below -126 it is 0 or nearly.
// x = n + f: n goes into the exponent's bits, 2^f is a polynomial on [0, 1).
__device__ __forceinline__ float exp2_on_fma(float x) {
  constexpr float kLowest = 127.f, kShift = 12582912.f - kLowest;  // 1.5 * 2^23: its last bits count ones
  const float t = __saturatef(fmaf(x, 1.f / kLowest, 1.f));
  const float shifted = __fmaf_rd(t, kLowest, kShift);
  const float f = fmaf(t, kLowest, kShift - shifted);
  const float power = fmaf(fmaf(fmaf(0.07706716f, f, 0.22764487f), f, 0.69511681f), f, 1.f);
  return __int_as_float(__float_as_int(power) + (__float_as_int(shifted) << 23));
}

}  // namespace fagen
