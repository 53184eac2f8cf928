"""The kernel that applies attention sinks through nvcc, no GPU needed."""

from __future__ import annotations

import pytest

from fagen import target
from fagen.build import cache
from fagen.runtime import sinks
from fagen.runtime.kernel import Library


@pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_120"))]
)
def test_it_compiles_without_spills(arch: str) -> None:
    made = cache.make(sinks.HELPER.job(target.known(arch)))
    assert made.facts["spill_bytes"] == 0 and 0 < made.facts["registers"] <= 64, made.facts
    Library(made.path, sinks.Params)  # the compiler laid out the params as Python does
