"""sm90_decode through nvcc, no GPU needed: no spills in defaults, a legal default for what it serves, facts agree."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.families import sm90_decode
from fagen.ops.attention.decode import DecodeProblem
from tests.compile.conftest import Facts
from tests.support.thorough import sample

FAMILY, SM90 = sm90_decode.FAMILY, target.known("sm_90")
PROMPTS = DecodeProblem(head_dim=128, mask="causal", page=16, heads=32, kv_heads=8, seqlen_q=2048)
PROBLEMS = [
    PROMPTS,
    DecodeProblem(head_dim=256, page=64, heads=16, kv_heads=1),
    PROMPTS.replace(head_dim=256, head_dim_v=256, mask="window", window_left=99, window_right=0, page=0, softcap=True),
    PROMPTS.replace(head_dim=64, head_dim_v=64, dtype="fp16", page=256, sinks=True),
    PROMPTS.replace(head_dim=192, head_dim_v=128, seqlen_q=1),
    PROMPTS.replace(seqlen_q=1, page=32, softcap=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("problem", sample(PROBLEMS, every=6), ids=str)
def test_defaults_compile_without_spills(problem: DecodeProblem, device_facts: Facts) -> None:
    config = FAMILY.require(problem, SM90, FAMILY.default(problem, SM90))
    facts = device_facts(KernelSpec(FAMILY, problem, SM90, config), whole=problem is PROBLEMS[0])
    assert facts["spill_bytes"] == 0, (facts, config)


def test_every_problem_that_is_served_has_a_legal_default() -> None:
    for d, page, rows in itertools.product(range(16, 257, 16), (0, 16, 32, 64, 128, 256), (1, 300)):
        for dv in {d, 16, 128}:
            problem = DecodeProblem(head_dim=d, head_dim_v=dv, page=page, heads=4, kv_heads=1, seqlen_q=rows)
            assert FAMILY.supports(problem, SM90) is None
            config = FAMILY.require(problem, SM90, FAMILY.default(problem, SM90))
            assert not FAMILY.repeats(problem, config)
            assert config in [FAMILY.default(problem, SM90), *FAMILY.first_configs(problem, SM90)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shared_kv": True}, "twice"), ({"page": 1}, "pages from 16"), ({"kv_dtype": "fp8_e4m3"}, "fp8_e4m3"),
        ({"aligned": False}, "16 bytes"), ({"dtype": "fp32"}, "fp32"), ({"head_dim": 264}, "264"),
    ],
)  # fmt: skip
def test_what_it_cannot_serve_it_refuses_with_a_reason(changes: dict, why: str) -> None:
    reason = FAMILY.supports(PROMPTS.replace(**changes), SM90)
    assert reason and why in reason
    assert FAMILY.supports(PROMPTS, target.known("sm_80"))


@pytest.mark.parametrize(
    ("broken", "whole", "constraint"),
    [
        ({"tile_n": 96}, {"tile_n": 64}, "whole_boxes"),
        ({"tile_n": 128, "split_keys": 64}, {"tile_n": 64, "split_keys": 64}, "whole_tiles"),
        ({"tile_m": 64, "stages": 4}, {"tile_m": 64, "stages": 3}, "smem_fits"),
        (
            {"tile_m": 64, "tile_n": 64, "blocks_per_sm": 3},
            {"tile_m": 64, "tile_n": 64, "blocks_per_sm": 2},
            "smem_fits",
        ),
        ({"tile_n": 32, "blocks_per_sm": 2}, {"tile_n": 32}, "registers_fit"),
    ],
)
def test_constraints(broken: dict, whole: dict, constraint: str) -> None:
    problem = PROMPTS.replace(page=64)
    config = FAMILY.default(problem, SM90)
    assert (FAMILY.rejects(problem, SM90, config.replace(**broken)) or [""])[0] == constraint
    assert FAMILY.rejects(problem, SM90, config.replace(**whole)) is None


def test_disagreement_with_python_is_a_compile_error() -> None:
    problem = DecodeProblem(head_dim=64)
    config = FAMILY.default(problem, SM90)
    job = make_job(KernelSpec(FAMILY, problem, SM90, config))
    wrong = job.source.replace(f"smem_bytes = {sm90_decode.smem_bytes(problem, config)}", "smem_bytes = 1024")
    assert wrong != job.source
    with pytest.raises(cache.BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))
