"""simt_forward through nvcc, no GPU needed: no spills in the defaults of float32."""

from __future__ import annotations

import dataclasses

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.families import simt_forward
from fagen.ops.attention.problem import Problem
from tests.support.thorough import sample

FAMILY = simt_forward.FAMILY
_SIZES = (64, 128, 1024, 32, 256, 16, 512, 48, 96, 192, 768)
PROBLEMS = [Problem(dtype="fp32", head_dim=d, mask=("causal", "none")[i % 2]) for i, d in enumerate(_SIZES)]
PROBLEMS += [
    Problem(dtype="fp32", head_dim=64, mask="intervals", intervals="both4"),
    Problem(dtype="fp32", head_dim=40, aligned=False),
    Problem(dtype="fp32", head_dim=128, softcap=True, alibi=True),
    Problem(dtype="bf16", head_dim=512),
]
SETS = [(("sm_90", "sm_80", "sm_86")[i % 3], problem) for i, problem in enumerate(PROBLEMS)]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "problem"), sample(SETS, every=15), ids=str)
def test_defaults_compile_without_spills(arch: str, problem: Problem) -> None:
    where = target.known(arch)
    config = FAMILY.require(problem, where, FAMILY.default(problem, where))
    facts = cache.build(KernelSpec(FAMILY, problem, where, config)).facts
    assert facts["spill_bytes"] == 0, (facts, config)
    assert 0 < facts["registers"] <= 255


def test_disagreement_with_python_is_a_compile_error() -> None:
    problem, where = Problem(dtype="fp32", head_dim=64), target.known("sm_80")
    config = FAMILY.default(problem, where)
    job = make_job(KernelSpec(FAMILY, problem, where, config))
    wrong = job.source.replace(f"smem_bytes = {simt_forward.smem_bytes(problem, config)}", "smem_bytes = 1024")
    assert wrong != job.source
    with pytest.raises(cache.BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))
