"""The variant that only `fagen study` builds compiles."""

from __future__ import annotations

import pytest

from fagen import build, target
from fagen.study import plan, spec

GPU = target.known("sm_90")


@pytest.mark.slow
def test_one_block_a_head_compiles():
    study = spec.load("fa1-fa2-fa3", gpu=True)
    (problem,) = spec.problems(study, {"head_dim": "64", "mask": "causal", "seqlen": "4k"})
    p = {p.step: p for p in plan.plan(study, problem, GPU)}["skip-tiles"]
    artifact = build.build(p.family, p.problem, GPU, p.configs[0])
    assert artifact.facts["spill_bytes"] == 0
