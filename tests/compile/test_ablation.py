"""The variant that only `fagen ablation` builds compiles."""

from __future__ import annotations

import pytest

from fagen import target
from fagen.ablation import plan, spec
from tests.compile.conftest import Facts

GPU = target.known("sm_90")


@pytest.mark.slow
def test_one_block_a_head_compiles(device_facts: Facts) -> None:
    ablation = spec.load("fa1-fa2-fa3", gpu=True)
    (problem,) = spec.problems(ablation, {"head_dim": "64", "mask": "causal", "seqlen": "4k"})
    p = {p.step: p for p in plan.plan(ablation, problem, GPU)}["skip-tiles"]
    assert device_facts(p.specs[0])["spill_bytes"] == 0
