"""simt_backward through nvcc, no GPU needed: no spills in the defaults of float32."""

from __future__ import annotations

import pytest

from fagen import target
from fagen.build import cache
from fagen.codegen.spec import KernelSpec
from fagen.families import simt_backward
from fagen.ops.attention.backward import BackwardProblem
from tests.support.thorough import sample

FAMILY = simt_backward.FAMILY
_SIZES = (64, 128, 32, 256, 1024, 16, 512)
PROBLEMS = [BackwardProblem(dtype="fp32", head_dim=d, mask=("causal", "none")[i % 2]) for i, d in enumerate(_SIZES)]
PROBLEMS += [
    BackwardProblem(dtype="fp32", head_dim=64, mask="intervals", intervals="both4"),
    BackwardProblem(dtype="fp32", head_dim=40, aligned=False),
    BackwardProblem(dtype="bf16", head_dim=320),
]
SETS = [(("sm_90", "sm_80", "sm_86")[i % 3], problem) for i, problem in enumerate(PROBLEMS)]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "problem"), sample(SETS, every=10), ids=str)
def test_defaults_compile_without_spills(arch: str, problem: BackwardProblem) -> None:
    where = target.known(arch)
    config = FAMILY.require(problem, where, FAMILY.default(problem, where))
    facts = cache.build(KernelSpec(FAMILY, problem, where, config)).facts
    assert facts["spill_bytes"] == 0, (facts, config)
    assert 0 < facts["registers"] <= 255
