"""exp2_on_fma of common/exp2.cuh, compiled for the CPU with the emulator's intrinsics, beside the exact power."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fagen.build import toolchain

ROOT = Path(__file__).parents[2]
PROGRAM = """
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include "fagen/common/exp2.cuh"
int main() {
  double worst = 0;
  for (float x = -125.f; x <= 0.f; x += 0.00137f) {
    const double error = fabs(fagen::exp2_on_fma(x) / exp2(double(x)) - 1);
    worst = error > worst ? error : worst;
  }
  printf("%g %g %g %g %g", worst, fagen::exp2_on_fma(0.f), fagen::exp2_on_fma(1e30f), fagen::exp2_on_fma(-1e30f),
         fagen::exp2_on_fma(-INFINITY));
}
"""


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_within_half_a_rounding_of_fp16_and_bounded(tmp_path: Path) -> None:
    (tmp_path / "exp2.cpp").write_text(PROGRAM)
    program = tmp_path / "exp2"
    folders = (f"-I{ROOT / 'tests/emulator/cuda'}", f"-I{ROOT / 'tests/emulator'}", f"-I{ROOT / 'templates/include'}")
    words = [str(toolchain.cxx()), "-std=c++17", "-O1", "-w", *folders, str(tmp_path / "exp2.cpp"), "-o", str(program)]
    subprocess.run(words, check=True, timeout=120)
    said = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60).stdout
    worst, *bounds = map(float, said.split())
    assert 1e-5 < worst < 2.0**-12 and bounds[:2] == [1.0, 1.0]
    assert all(0 <= x < 2.0**-125 for x in bounds[2:])
