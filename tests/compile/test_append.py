"""The kernel that appends to a cache through nvcc, no GPU needed."""

from __future__ import annotations

import pytest

from fagen import target
from fagen.build import cache
from fagen.runtime import append
from fagen.runtime.kernel import Library

_DIVISION_BYTES = 8  # kept around the slow path of a division, by which an fp8 cache is scaled


@pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_120"))]
)
def test_it_compiles_without_spills(arch: str) -> None:
    made = cache.make(append.job(target.known(arch)))
    assert made.facts["spill_bytes"] <= 2 * _DIVISION_BYTES and 0 < made.facts["registers"] <= 64, made.facts
    assert made.arch == arch
    Library(made.path, append.Params)  # the compiler laid out the params as Python does
