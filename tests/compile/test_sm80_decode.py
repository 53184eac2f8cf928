"""sm80_decode through nvcc, no GPU needed: no spills in defaults, a legal default for what it serves, facts agree."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.families import sm80_decode
from fagen.ops.attention.decode import DecodeProblem
from tests.compile.conftest import Facts
from tests.support.thorough import sample

FAMILY = sm80_decode.FAMILY
PROBLEMS = {
    "d128-page16": DecodeProblem(head_dim=128, mask="causal", page=16),
    "d128-page1": DecodeProblem(head_dim=128, page=1),
    "d128-fp8": DecodeProblem(head_dim=128, page=64, kv_dtype="fp8_e4m3"),
    "d64-window-fp16": DecodeProblem(head_dim=64, dtype="fp16", mask="window", window_left=99, window_right=0, page=32),
    "d256-softcap": DecodeProblem(head_dim=256, mask="causal", softcap=True, page=128),
    "d192-128-sinks": DecodeProblem(head_dim=192, head_dim_v=128, mask="causal", sinks=True),
    "d256-fp8-fp16": DecodeProblem(head_dim=256, dtype="fp16", kv_dtype="fp8_e4m3", mask="window", page=256),
    "d128-32-rows": DecodeProblem(head_dim=128, mask="causal", page=16, seqlen_q=4, heads=8, kv_heads=1),
    "d128-64-rows": DecodeProblem(head_dim=128, mask="causal", page=16, seqlen_q=16, heads=8, kv_heads=1),
    "latent": DecodeProblem(
        head_dim=576, head_dim_v=512, shared_kv=True, mask="causal", page=64, heads=128, kv_heads=1
    ),
    "d96-unaligned": DecodeProblem(head_dim=96, aligned=False),
}
ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
SETS = [(arch, name) for i, arch in enumerate(ARCHS) for j, name in enumerate(PROBLEMS) if (i + j) % 4 == 0]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), sample(SETS, every=6))
def test_defaults_compile_without_spills(arch: str, name: str, device_facts: Facts) -> None:
    problem, where = PROBLEMS[name], target.known(arch)
    config = FAMILY.require(problem, where, FAMILY.default(problem, where))
    facts = device_facts(KernelSpec(FAMILY, problem, where, config), whole=(arch, name) == SETS[0])
    assert facts["spill_bytes"] == 0, (facts, config)
    assert 0 < facts["registers"] <= 255


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])  # by their shared memory
def test_every_problem_that_is_served_has_a_legal_default(arch: str) -> None:
    where, most = target.known(arch), 256
    for d, kv, page in itertools.product(range(16, most + 1, 16), ("", "fp8_e4m3"), (0, 1, 256)):
        for dv in {d, 16, 128}:
            for heads in (1, 20, 64):
                problem = DecodeProblem(head_dim=d, head_dim_v=dv, kv_dtype=kv, page=page, heads=heads, kv_heads=1)
                assert FAMILY.supports(problem, where) is None
                FAMILY.require(problem, where, FAMILY.default(problem, where))


def test_what_no_tile_fits_is_refused_with_a_reason() -> None:
    problem = DecodeProblem(head_dim=576, head_dim_v=512, page=64)
    reason = FAMILY.supports(problem, target.known("sm_86"))
    assert reason and "576/512" in reason


def test_disagreement_with_python_is_a_compile_error() -> None:
    problem, where = DecodeProblem(head_dim=64), target.known("sm_80")
    config = FAMILY.default(problem, where)
    job = make_job(KernelSpec(FAMILY, problem, where, config))
    wrong = job.source.replace(f"smem_bytes = {sm80_decode.smem_bytes(problem, config)}", "smem_bytes = 1024")
    assert wrong != job.source
    with pytest.raises(cache.BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))
