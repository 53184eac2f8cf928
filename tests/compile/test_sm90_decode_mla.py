"""sm90_decode_mla through nvcc, no GPU needed: no spills, a legal default for what it serves, facts agree."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.families import sm90_decode_mla
from fagen.ops.attention.decode import DecodeProblem
from tests.compile.conftest import Facts
from tests.support.thorough import sample

FAMILY, SM90 = sm90_decode_mla.FAMILY, target.known("sm_90")
LATENT = DecodeProblem(head_dim=576, head_dim_v=512, shared_kv=True, page=64, heads=128, kv_heads=1)
PROBLEMS = [
    LATENT.replace(mask="causal", seqlen_q=2),
    LATENT,
    LATENT.replace(page=0, dtype="fp16", heads=16),
    LATENT.replace(head_dim=320, head_dim_v=256, page=16, sinks=True),
    LATENT.replace(head_dim=192, head_dim_v=128, page=256),
]


@pytest.mark.slow
@pytest.mark.parametrize("problem", sample(PROBLEMS, every=5), ids=str)
def test_defaults_compile_without_spills(problem: DecodeProblem, device_facts: Facts) -> None:
    config = FAMILY.require(problem, SM90, FAMILY.default(problem, SM90))
    facts = device_facts(KernelSpec(FAMILY, problem, SM90, config))
    assert facts["spill_bytes"] == 0, (facts, config)
    assert facts["registers"] == 65536 // sm90_decode_mla.THREADS // 8 * 8


def test_every_problem_that_is_served_has_a_legal_default() -> None:
    for page, heads, rows, dtype in itertools.product(
        (0, 16, 32, 64, 128, 256), (1, 64, 128), (1, 3), ("bf16", "fp16")
    ):
        problem = LATENT.replace(page=page, heads=heads, seqlen_q=rows, dtype=dtype)
        assert FAMILY.supports(problem, SM90) is None
        FAMILY.require(problem, SM90, FAMILY.default(problem, SM90))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shared_kv": False}, "apart"), ({"head_dim": 512}, "first"), ({"head_dim_v": 64, "head_dim": 128}, "first"),
        ({"page": 1}, "pages from 16"), ({"mask": "window", "window_left": 9}, "window"),
        ({"softcap": True}, "softcap"),
        ({"kv_dtype": "fp8_e4m3"}, "fp8_e4m3"), ({"aligned": False}, "16 bytes"), ({"dtype": "fp32"}, "fp32"),
    ],
)  # fmt: skip
def test_what_it_cannot_serve_it_refuses_with_a_reason(changes: dict, why: str) -> None:
    reason = FAMILY.supports(LATENT.replace(**changes), SM90)
    assert reason and why in reason
    assert FAMILY.supports(LATENT, target.known("sm_80"))


def test_disagreement_with_python_is_a_compile_error() -> None:
    problem = LATENT.replace(head_dim=192, head_dim_v=128)
    job = make_job(KernelSpec(FAMILY, problem, SM90, FAMILY.default(problem, SM90)))
    wrong = job.source.replace(f"smem_bytes = {sm90_decode_mla.smem_bytes(problem)}", "smem_bytes = 1024")
    assert wrong != job.source
    with pytest.raises(cache.BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))
