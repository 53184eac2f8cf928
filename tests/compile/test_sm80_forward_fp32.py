"""sm80_forward_fp32 through nvcc, no GPU needed: no spills in the defaults."""

from __future__ import annotations

import dataclasses

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.families import sm80_forward_fp32
from fagen.ops.attention.problem import Problem
from tests.support.thorough import sample

FAMILY = sm80_forward_fp32.FAMILY
_SIZES = (128, 64, 256, 32, 16, 96, 192, 48)
PROBLEMS = [Problem(dtype="fp32", head_dim=d, mask=("causal", "none")[i % 2]) for i, d in enumerate(_SIZES)]
PROBLEMS += [
    Problem(dtype="fp32", head_dim=256, mask="intervals", intervals="both4"),
    Problem(dtype="fp32", head_dim=40, aligned=False),
    Problem(dtype="fp32", head_dim=128, mask="window", softcap=True, alibi=True, dropout=True),
    Problem(dtype="fp32", head_dim=64, mask="causal", tf32=True),
    Problem(dtype="fp32", head_dim=192, head_dim_v=128, tf32=True),
]
SETS = [(("sm_90", "sm_80", "sm_86")[i % 3], problem) for i, problem in enumerate(PROBLEMS)]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "problem"), sample(SETS, every=13), ids=str)
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
    right = f"smem_bytes = {sm80_forward_fp32.smem_bytes(problem, config)}"
    wrong = job.source.replace(right, "smem_bytes = 1024")
    assert wrong != job.source
    with pytest.raises(cache.BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))
