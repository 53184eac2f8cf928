"""sm90_forward_large through nvcc, no GPU needed: no spills and no serialized products in the defaults."""

from __future__ import annotations

import dataclasses

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.families import sm90_forward_large
from fagen.ops.attention.problem import Problem
from tests.support.cases import SCHEMES_LARGE
from tests.support.thorough import sample

FAMILY = sm90_forward_large.FAMILY
HERE = target.known("sm_90")
PROBLEMS = [
    Problem(head_dim=512, mask="causal"),
    Problem(head_dim=640),
    Problem(head_dim=512, mask="intervals", intervals="both4"),
    Problem(head_dim=320, mask="causal", dtype="fp16"),
    Problem(head_dim=1024, mask="window", softcap=True),
    Problem(head_dim=320, mask="window", softcap=True),
    Problem(head_dim=512, head_dim_v=256, mask="causal"),
    Problem(head_dim=320, mask="intervals", intervals="both4"),
    Problem(head_dim=1024, mask="intervals", intervals="both4"),
    Problem(head_dim=576, head_dim_v=512, mask="causal"),
    Problem(head_dim=640, mask="intervals", intervals="both4"),
    Problem(head_dim=512, mask="causal", softcap=True, alibi=True),
    Problem(head_dim=640, mask="window", softcap=True, alibi=True),
    Problem(head_dim=384, dtype="fp16"),
    Problem(head_dim=768, mask="causal"),
    Problem(head_dim=1024),
    Problem(head_dim=64, head_dim_v=512, mask="causal"),
    Problem(head_dim=1024, head_dim_v=64),
    Problem(head_dim=512, seqlen_q=1, seqlen_k=4096),
]


@pytest.mark.slow
@pytest.mark.parametrize("problem", sample(PROBLEMS, every=9), ids=lambda problem: problem.static_key)
def test_defaults_compile_without_spills(problem: Problem) -> None:
    config = FAMILY.require(problem, HERE, FAMILY.default(problem, HERE))
    facts = cache.build(KernelSpec(FAMILY, problem, HERE, config)).facts
    assert facts["spill_bytes"] == 0, (facts, config)
    assert not facts.get("serialized"), (facts, config)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", sample(["large_pair", "large_192", "large_rows"], every=3))
def test_more_chunks_of_scores_in_flight_do_not_make_products_wait(scheme: str) -> None:
    """Of each scheme that has some: nvcc serializes all products where more of O's go on as well."""
    assert SCHEMES_LARGE[scheme].in_flight > 1
    problem = Problem(head_dim=320, mask="causal")
    config = FAMILY.require(problem, HERE, SCHEMES_LARGE[scheme])
    assert not cache.build(KernelSpec(FAMILY, problem, HERE, config)).facts.get("serialized"), config


def test_disagreement_with_python_is_a_compile_error() -> None:
    problem = PROBLEMS[0]
    config = FAMILY.default(problem, HERE)
    job = make_job(KernelSpec(FAMILY, problem, HERE, config))
    wrong = job.source.replace(f"smem_bytes = {sm90_forward_large.smem_bytes(problem, config)}", "smem_bytes = 1024")
    assert wrong != job.source
    with pytest.raises(cache.BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))
