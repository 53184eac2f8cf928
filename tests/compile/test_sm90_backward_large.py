"""sm90_backward_large through nvcc, no GPU needed: no spills and no serialized products in the defaults."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.errors import InvalidConfig
from fagen.families import Config, sm90_backward_large
from fagen.ops.attention.backward import BackwardProblem
from fagen.tuner.evaluate import SPILL_TOLERANCE
from tests.compile.conftest import Facts
from tests.gpu import test_sm90_backward_large as on_gpu
from tests.support.large_backward import BASE, FAMILY
from tests.support.thorough import sample

HERE = target.known("sm_90")
PROBLEMS = [
    BackwardProblem(head_dim=512, mask="causal"),
    BackwardProblem(head_dim=320),
    BackwardProblem(head_dim=384, mask="causal", dtype="fp16"),
    BackwardProblem(head_dim=576, head_dim_v=512, mask="causal"),
    BackwardProblem(head_dim=640, mask="window"),
    BackwardProblem(head_dim=768),
    BackwardProblem(head_dim=768, mask="causal", softcap=True, seqlen_q=4096),
    BackwardProblem(head_dim=896, mask="causal", seqlen_q=4096),
    BackwardProblem(head_dim=1024),
    BackwardProblem(head_dim=512, mask="intervals", intervals="both4"),
    BackwardProblem(head_dim=1024, mask="causal", seqlen_q=4096),
    BackwardProblem(head_dim=64, head_dim_v=512, mask="window"),
    BackwardProblem(head_dim=1024, head_dim_v=64, mask="intervals", intervals="both4", softcap=True),
    BackwardProblem(head_dim=320, mask="intervals", intervals="lower1", dtype="fp16"),
    BackwardProblem(head_dim=640, mask="causal", softcap=True, alibi=True),
    BackwardProblem(head_dim=1024, mask="window", softcap=True, alibi=True),
    BackwardProblem(head_dim=512, seqlen_q=1, seqlen_k=4096),
]


@pytest.mark.slow
@pytest.mark.parametrize("problem", sample(PROBLEMS, every=7), ids=lambda problem: problem.static_key)
def test_defaults_compile_without_spills(problem: BackwardProblem, device_facts: Facts) -> None:
    config = FAMILY.require(problem, HERE, FAMILY.default(problem, HERE))
    facts = device_facts(KernelSpec(FAMILY, problem, HERE, config), whole=problem == PROBLEMS[0])
    assert not facts.get("serialized"), (facts, config)
    assert all(of["spill_bytes"] == 0 for of in facts["functions"].values()), (facts, config)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", sample([768, 576, 1024], every=3))
def test_shared_cells_compile_without_spills(head_dim: int, device_facts: Facts) -> None:
    problem = BackwardProblem(head_dim=head_dim, mask="causal")
    config = next(c for c in FAMILY.first_configs(problem, HERE) if c.share_cells)
    facts = device_facts(KernelSpec(FAMILY, problem, HERE, config))
    assert not facts.get("serialized"), (facts, config)
    assert all(of["spill_bytes"] <= SPILL_TOLERANCE for of in facts["functions"].values()), (facts, config)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["smem_bytes", "dq_smem_bytes", "dv_smem_bytes", "threads", "registers"])
def test_disagreement_with_python_is_a_compile_error(what: str) -> None:
    problem = BackwardProblem(head_dim=264)
    config = FAMILY.default(problem, HERE)
    job, right = make_job(KernelSpec(FAMILY, problem, HERE, config)), FAMILY.derive(problem, HERE, config)[what]
    wrong = job.source.replace(f" {what} = {right}", f" {what} = {right + 8}")
    assert wrong != job.source
    with pytest.raises(cache.BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))


def test_every_legal_problem_has_a_legal_default() -> None:
    features: tuple[dict, ...] = (
        {}, {"mask": "causal", "deterministic": True, "seqlen_q": 1},
        {"mask": "intervals", "intervals": "both4", "softcap": True},
    )  # fmt: skip
    for d in (16, 64, 264, 320, 456, 512, 576, 648, 768, 896, 1024):
        for dv in {d, 8, 264, 512, 1024}:
            for more in features:
                problem = BackwardProblem(head_dim=d, head_dim_v=dv, **more)
                if problem.wider_than(256):
                    FAMILY.require(problem, HERE, FAMILY.default(problem, HERE))


@pytest.mark.parametrize("head_dim", range(648, 1025, 8))
def test_wide_defaults_share_cells(head_dim: int) -> None:
    """As the config does that an H100 found best at 768."""
    wanted = {"share_cells": True, "tile_other": 256, "resident": "none", "stages": 7, "chunks_under": 0}
    for mask, more in itertools.product(("none", "causal", "window", "intervals"), ({}, {"heads": 8, "kv_heads": 2})):
        kind = "both2" if mask == "intervals" else ""
        problem = BackwardProblem(
            head_dim=head_dim, mask=mask, intervals=kind, deterministic=bool(more), seqlen_q=4096, **more
        )
        config = FAMILY.require(problem, HERE, FAMILY.default(problem, HERE))
        assert config.share_cells and config.chunks_under == 0, config
        if head_dim <= 768 and not kind:
            assert wanted.items() <= dict(config).items(), config
    for alone in (BackwardProblem(head_dim=640, seqlen_q=4096), BackwardProblem(mask="causal", head_dim=head_dim)):
        assert not FAMILY.default(alone, HERE).share_cells


SHARED = {"share_cells": True, "tile_other": 128, "block_columns": 256, "resident": "scores"}
REJECTED = [
    ("chunks_whole", "5 slabs of 64 columns are no whole chunks of 2", {"head_dim": 320}, {"chunk_d": 128},
     {"chunk_d": 64}),
    ("ring_holds", "chunks_under=2 of 1 chunks of dP", {"head_dim": 512, "head_dim_v": 64}, {}, {"chunks_under": 1}),
    ("ring_holds", "3 stages are all held", {}, {"stages": 3}, {"chunks_under": 1}),
    ("products_overlap", "wait for each other", {}, {"in_flight": 3, "chunks_under": 1}, {"in_flight": 2}),
    ("columns_matter", "shares the columns as 512 does", {}, {"block_columns": 640}, {"block_columns": 512}),
    ("cells_shared", "two blocks share cells, not 1", {}, {**SHARED, "block_columns": 512}, {"share_cells": False}),
    ("cells_shared", "no chunks to share, cluster=2", {}, {**SHARED, "cluster": 2}, {"cluster": 1}),
    ("cells_shared", "half of 192 is no slab", {}, {**SHARED, "tile_other": 192}, {"tile_other": 128}),
    ("order_matters", "only repeats another", {}, {"block_order": "longest_first"}, {"block_order": "sectioned"}),
    ("smem_fits", "bytes of shared memory on sm_90", {}, {"stages": 12}, {"resident": "none"}),
    ("registers_fit", "registers a thread", {}, {"tile_other": 192, "resident": "none"}, {"tile_other": 128}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "says", "fields", "change", "mend"), REJECTED, ids=lambda value: str(value)[:30])
def test_a_constraint_says_no_with_its_numbers(name: str, says: str, fields: dict, change: dict, mend: dict) -> None:
    problem = BackwardProblem(**{"head_dim": 512, **fields})
    broken: Config = FAMILY.config({**BASE, **change})
    constraint = next(c for c in FAMILY.constraints if c.name == name)
    reason = constraint.check(problem, HERE, broken)
    assert reason is not None and says in reason
    with pytest.raises(InvalidConfig):
        FAMILY.require(problem, HERE, broken)
    assert constraint.check(problem, HERE, broken.replace(**mend)) is None


def test_every_constraint_is_among_them() -> None:
    assert {name for name, *_ in REJECTED} == {constraint.name for constraint in FAMILY.constraints}


@pytest.mark.parametrize(
    ("fields", "arch", "reason"),
    [
        ({}, "sm_80", "needs sm_90"),
        ({"dtype": "fp32"}, "sm_90", "not fp32"),
        ({"head_dim": 256}, "sm_90", "need no chunks"),
        ({"dropout": True}, "sm_90", "drops no weights"),
        ({"aligned": False}, "sm_90", "multiples of 16 bytes"),
    ],
)
def test_what_it_cannot_serve(fields: dict, arch: str, reason: str) -> None:
    problem = BackwardProblem(**{"head_dim": 512, **fields})
    assert reason in str(FAMILY.supports(problem, target.known(arch)))


def test_what_the_gpu_tests_run_is_legal() -> None:
    for case in on_gpu.ALL:
        FAMILY.require(case.problem, HERE, case.config)


def test_blocks_share_columns_that_one_cannot_hold() -> None:
    problem, config = BackwardProblem(head_dim=1024, head_dim_v=640), FAMILY.config({**BASE, "block_columns": 512})
    dq, dk, dv = sm90_backward_large.passes(problem)
    assert [sm90_backward_large.splits(of, config) for of in (dq, dk, dv)] == [2, 2, 2]
    assert [sm90_backward_large.group_columns(of, config) for of in (dq, dk, dv)] == [256, 256, 192]
