"""sm90_forward through nvcc, no GPU needed: few spills, no products in a row, registers as Python counts them."""

from __future__ import annotations

import dataclasses

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.errors import BuildError, InvalidConfig
from fagen.families import sm90_forward
from fagen.ops.attention.problem import Problem
from fagen.tuner.evaluate import SPILL_TOLERANCE
from tests.compile.conftest import Facts
from tests.support.thorough import sample

FAMILY, HOPPER = sm90_forward.FAMILY, target.known("sm_90")
BASE = FAMILY.config(
    {
        "tile_m": 128, "tile_n": 64, "stages": 2, "q_stages": 1, "overlap": True, "rescale": "deferred",
        "ping_pong": False, "blocks_per_sm": 1, "schedule": "balanced", "block_order": "ascending", "section_mb": 32,
        "cluster": 1, "shared_weights": False, "pack_heads": False,
    }
)  # fmt: skip
_MANY = {"batch": 8, "heads": 32}  # tiles of rows for every SM
_FEW = {"seqlen_q": 100, "seqlen_k": 4096}
PROBLEMS = [
    *(Problem(head_dim=d, mask=mask, **_MANY) for d in (64, 96, 128, 192, 256) for mask in ("none", "causal")),
    Problem(head_dim=192, head_dim_v=128, mask="causal", dtype="fp16", **_MANY),
    Problem(head_dim=64, mask="window", window_left=100, window_right=0, **_MANY),
    *(Problem(head_dim=d, mask="intervals", intervals="both4", **_MANY) for d in (64, 128, 192, 256)),
    Problem(head_dim=96, softcap=True, alibi=True, **_MANY),
    Problem(head_dim=256, mask="causal", **_FEW),
    Problem(head_dim=192, head_dim_v=128, alibi=True, **_FEW),
]


@pytest.mark.slow
@pytest.mark.parametrize("problem", sample(PROBLEMS, every=3), ids=lambda p: p.static_key.replace("/", "-"))
def test_defaults_compile_cleanly(problem: Problem, device_facts: Facts) -> None:
    spec = KernelSpec(FAMILY, problem, HOPPER, FAMILY.default(problem, HOPPER))
    facts = device_facts(spec, whole=problem == PROBLEMS[0])
    assert facts["spill_bytes"] == 0 and "serialized" not in facts, facts


@pytest.mark.parametrize(
    ("sizes", "default"),
    [  # what an H200 showed to be the best of the guesses, or near it
        ({"mask": "causal", "heads": 16, "seqlen_q": 512}, (64, "single", "longest_first")),
        ({"mask": "causal", "batch": 32, "heads": 12, "seqlen_q": 128}, (64, "balanced", "longest_first")),
        ({"mask": "causal", "batch": 8, "heads": 32, "seqlen_q": 2048}, (192, "dynamic", "sectioned")),
        ({"mask": "causal", "batch": 32, "heads": 32, "seqlen_q": 512}, (64, "dynamic", "sectioned")),
        ({"mask": "causal", "batch": 4, "heads": 32, "seqlen_q": 4096}, (192, "dynamic", "sectioned")),
        ({"batch": 32, "heads": 32, "seqlen_q": 512}, (192, "dynamic", "ascending")),
        ({"batch": 4, "heads": 32, "seqlen_q": 4096}, (192, "dynamic", "ascending")),
    ],
)
def test_the_default_knows_the_size(sizes: dict, default: tuple) -> None:
    config = FAMILY.default(Problem(head_dim=64, **sizes), HOPPER)
    assert (config.tile_m, config.schedule, config.block_order) == default


@pytest.mark.parametrize(
    ("sizes", "split"),
    [  # (tile_m, pack_heads); None: the keys of a tile of rows are not split
        ({"seqlen_q": 1113, "seqlen_k": 10017, "batch": 4, "mask": "causal"}, (128, False)),
        ({"seqlen_q": 16, "seqlen_k": 4096, "heads": 32, "kv_heads": 8}, (64, True)),
        ({"seqlen_q": 16, "seqlen_k": 4096, "heads": 32, "kv_heads": 8, "alibi": True}, (64, False)),
        ({"seqlen_q": 128, "seqlen_k": 511}, None),  # few keys
        ({"seqlen_q": 128, "seqlen_k": 8192, "mask": "window", "window_left": 200, "window_right": 0}, None),
        ({"seqlen_q": 4096}, (128, False)),
        ({"seqlen_q": 4096, "heads": 2}, None),  # 128 tiles of 64 rows
        ({"seqlen_q": 128, "seqlen_k": 8192, "mask": "intervals", "intervals": "lower1"}, None),
    ],
    ids=str,
)
def test_few_rows_share_many_keys(sizes: dict, split: tuple | None) -> None:
    problem = Problem(head_dim=128, **sizes)
    config = FAMILY.require(problem, HOPPER, FAMILY.default(problem, HOPPER))
    assert (config.splits == "keys") is (split is not None)
    assert split is None or (config.tile_m, config.pack_heads) == split
    other = problem.replace(seqlen_q=problem.seqlen_q + 1, seqlen_k=problem.seqlen_k + 1)
    if FAMILY.default_reads(problem, HOPPER) == FAMILY.default_reads(other, HOPPER):
        assert FAMILY.default(other, HOPPER) == config


def test_what_does_not_split_has_the_source_that_it_had() -> None:
    """So that no tuned record is stale for a knob that it never had."""
    source = KernelSpec(FAMILY, Problem(head_dim=64), HOPPER, BASE).source
    assert "Splits" not in source and "split_keys.cuh" not in source


def test_the_model_expects_a_gain_where_few_rows_have_many_keys() -> None:
    config = BASE.replace(schedule="single")
    for seqlen_q, gains in ((64, True), (128 * 132, False)):
        problem = Problem(head_dim=64, seqlen_q=seqlen_q, seqlen_k=8192)
        both = [FAMILY.cost(problem, HOPPER, config.replace(splits=by)) for by in ("none", "keys")]  # type: ignore[misc]
        assert (both[1] < both[0] / 4) is gains and (gains or both[1] == both[0])
    assert FAMILY.repeats(Problem(head_dim=64, heads=64, seqlen_q=8192), config.replace(splits="keys"))
    assert not FAMILY.repeats(Problem(head_dim=64, seqlen_q=64, seqlen_k=8192), config.replace(splits="keys"))


def test_long_rows_have_other_tiles_and_sections() -> None:
    def chosen(head_dim: int, length: int, name: str) -> object:
        problem = Problem(head_dim=head_dim, mask="causal", batch=4, heads=16, seqlen_q=length)
        return FAMILY.default(problem, HOPPER)[name]

    assert [chosen(96, length, "tile_m") for length in (1024, 2048)] == [128, 192]
    assert [chosen(128, length, "shared_weights") for length in (1024, 2048)] == [False, True]
    assert [chosen(256, length, "section_mb") for length in (1024, 8192)] == [32, 64]
    assert [chosen(128, length, "section_mb") for length in (1024, 8192)] == [32, 32]


def test_a_default_leaves_registers_to_what_takes_more() -> None:
    def tile(**features: object) -> tuple[object, ...]:
        config = FAMILY.default(Problem(head_dim=128, batch=4, heads=16, seqlen_q=8192, **features), HOPPER)
        return config.tile_m, config.tile_n, config.shared_weights

    three = (192, 128, True)
    assert tile(mask="causal", softcap=True) == tile(mask="intervals", intervals="both4") == three
    assert tile(mask="causal", alibi=True) == (128, 128, False)  # three warpgroups spill there
    full = FAMILY.default(Problem(head_dim=96, batch=4, heads=16, seqlen_q=8192), HOPPER)
    assert (full.tile_m, full.tile_n, full.shared_weights) == (192, 112, False)


def test_every_legal_problem_has_a_legal_default() -> None:
    for d in range(16, 257, 16):
        for dv in (d, 16, 128, 256):
            for mask in ("none", "causal"):
                problem = Problem(head_dim=d, head_dim_v=dv, mask=mask)
                FAMILY.require(problem, HOPPER, FAMILY.default(problem, HOPPER))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "changes"),
    sample(
        [
            (
                Problem(head_dim=128, mask="causal"),
                {"tile_n": 128, "schedule": "dynamic", "block_order": "sectioned", "ping_pong": True},
            ),
            (Problem(head_dim=128), {"tile_n": 176, "schedule": "single", "ping_pong": True}),
            (
                Problem(head_dim=64, mask="causal"),
                {"tile_n": 128, "q_stages": 2, "schedule": "dynamic", "block_order": "longest_first"},
            ),
            (Problem(head_dim=64, mask="causal"), {"tile_m": 64, "blocks_per_sm": 3, "block_order": "longest_first"}),
            (Problem(head_dim=64, mask="causal"), {"tile_m": 192, "tile_n": 96, "block_order": "sectioned"}),
            (Problem(head_dim=256), {"overlap": False, "schedule": "dynamic", "block_order": "sectioned"}),
            (Problem(head_dim=128), {"tile_n": 176, "ping_pong": True, "cluster": 2}),
            (Problem(head_dim=256), {"tile_n": 80, "ping_pong": True, "cluster": 2}),
            (
                Problem(head_dim=128, mask="causal"),
                {
                    "tile_n": 128,
                    "schedule": "dynamic",
                    "block_order": "sectioned",
                    "ping_pong": True,
                    "pack_heads": True,
                },
            ),
            (Problem(head_dim=128), {"tile_n": 176, "ping_pong": True, "cluster": 2, "pack_heads": True}),
            (Problem(head_dim=64), {"tile_m": 192, "tile_n": 160, "ping_pong": True, "shared_weights": True}),
            (
                Problem(head_dim=128, mask="causal"),
                {
                    "tile_m": 192,
                    "tile_n": 128,
                    "schedule": "dynamic",
                    "block_order": "sectioned",
                    "shared_weights": True,
                },
            ),
            (Problem(head_dim=256), {"tile_n": 96, "stages": 1, "ping_pong": True, "shared_weights": True}),
            (Problem(head_dim=128), {"tile_n": 128, "ping_pong": True, "schedule": "single", "splits": "keys"}),
            (
                Problem(head_dim=256, mask="causal", alibi=True),
                {"tile_m": 64, "schedule": "single", "splits": "keys"},
            ),
            (
                Problem(head_dim=64, mask="window"),
                {"tile_m": 192, "tile_n": 96, "schedule": "single", "splits": "keys", "pack_heads": True},
            ),
        ],
        every=6,
    ),
)
def test_other_knobs_compile_cleanly(problem: Problem, changes: dict[str, object], device_facts: Facts) -> None:
    config = FAMILY.require(problem, HOPPER, BASE.replace(**changes))  # type: ignore[arg-type]
    facts = device_facts(KernelSpec(FAMILY, problem, HOPPER, config))
    assert facts["spill_bytes"] <= SPILL_TOLERANCE and "serialized" not in facts, facts


# ---- registers ---------------------------------------------------------------------------------------------------

_CAUSAL, _INTERVALS = Problem(head_dim=16, mask="causal"), Problem(head_dim=16, mask="intervals", intervals="lower1")
# with more threads than these an SM has too few registers for a product
SHARES = [(_CAUSAL, m, blocks) for m in (64, 128, 192) for blocks in (1, 2, 3) if m * blocks < 384]
SHARES += [(_INTERVALS, 128, 1), (_INTERVALS, 192, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "tile_m", "blocks"), sample(SHARES, every=2))
def test_python_and_cuda_agree_about_registers(problem: Problem, tile_m: int, blocks: int, device_facts: Facts) -> None:
    """That it compiles says so. And what ptxas gives the block is enough for all roles, or they would wait for ever."""
    config = FAMILY.require(problem, HOPPER, BASE.replace(tile_m=tile_m, blocks_per_sm=blocks, tile_n=32))
    given = device_facts(KernelSpec(FAMILY, problem, HOPPER, config))["registers"]
    groups, consumer = tile_m // 64, FAMILY.derive(problem, HOPPER, config)["registers"]
    assert consumer % 8 == 0 and given <= consumer <= 240
    assert given * (groups + 1) - consumer * groups >= 32, "nothing is left for the producer's warpgroup"
    assert given * (groups + 1) * 128 * blocks <= 65536


@pytest.mark.slow
@pytest.mark.parametrize("what", ["registers", "smem_bytes", "threads"])
def test_disagreement_is_a_compile_error(what: str) -> None:
    job = make_job(KernelSpec(FAMILY, _CAUSAL, HOPPER, BASE))
    right = FAMILY.derive(_CAUSAL, HOPPER, BASE)[what]
    wrong = job.source.replace(f"{what} = {right}", f"{what} = {right + 8}")
    assert wrong != job.source
    with pytest.raises(BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))


# ---- constraints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "changes", "reason"),
    [
        (Problem(head_dim=256), {"tile_m": 192, "tile_n": 128}, "bytes of shared memory on sm_90"),
        (Problem(head_dim=128), {"tile_n": 96, "stages": 4, "q_stages": 2}, "bytes of shared memory on sm_90"),
        (Problem(head_dim=128), {"tile_m": 64, "tile_n": 96, "blocks_per_sm": 2}, "2 blocks x .* memory an SM"),
        (Problem(head_dim=128), {"tile_m": 192, "tile_n": 128, "stages": 1}, "registers a thread"),
        (Problem(head_dim=64), {"blocks_per_sm": 2}, "registers a thread"),
        (Problem(head_dim=64), {"tile_m": 192, "tile_n": 32, "stages": 1, "blocks_per_sm": 3}, "registers a thread"),
        (
            Problem(head_dim=128),
            {"tile_m": 64, "tile_n": 32, "stages": 1, "blocks_per_sm": 3},
            "a product takes 94 > 80",
        ),
        (
            Problem(head_dim=64),
            {"tile_m": 192, "tile_n": 32, "blocks_per_sm": 2, "stages": 1, "shared_weights": True},
            "64 <= 64",
        ),
        (Problem(head_dim=64), {"schedule": "single", "q_stages": 2}, "no second one to load"),
        (Problem(head_dim=64), {"tile_m": 64, "ping_pong": True}, "nobody to take turns with"),
        (Problem(head_dim=64), {"block_order": "descending"}, "only repeats another"),
        (Problem(head_dim=64, mask="causal"), {"cluster": 2}, "must see the same"),
        (Problem(head_dim=64), {"cluster": 2, "schedule": "dynamic"}, "must agree on what comes next"),
        (Problem(head_dim=64), {"cluster": 2, "tile_m": 64, "blocks_per_sm": 2}, "have an SM each"),
        (Problem(mask="intervals", intervals="both4"), {"pack_heads": True}, "may differ from row to row"),
        (Problem(alibi=True), {"pack_heads": True}, "may differ from row to row"),
        (Problem(head_dim=64), {"section_mb": 16}, "block_order=ascending has no sections"),
        (Problem(head_dim=64), {"splits": "keys"}, "take a single tile of rows, schedule=balanced"),
        (
            Problem(head_dim=64),
            {"splits": "keys", "schedule": "single", "cluster": 2},
            "cluster=2 has them load the same",
        ),
        (
            Problem(head_dim=64, mask="causal"),
            {"splits": "keys", "schedule": "single", "block_order": "descending"},
            "block_order=descending only repeats",
        ),
        (
            Problem(head_dim=64, mask="intervals", intervals="lower1"),
            {"splits": "keys", "schedule": "single"},
            "chosen by its intervals",
        ),
        (Problem(mask="causal"), {"block_order": "longest_first", "section_mb": 64}, "longest_first has no sections"),
    ],
)
def test_constraints_give_their_reason(problem: Problem, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidConfig, match=reason):
        FAMILY.require(problem, HOPPER, BASE.replace(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        *({"schedule": schedule} for schedule in ("single", "balanced", "dynamic")),
        {"schedule": "dynamic", "q_stages": 2},
        *({"tile_m": m, "ping_pong": True} for m in (128, 192)),
        *({"block_order": "sectioned", "section_mb": size} for size in (16, 32, 64)),
        {"tile_m": 64, "blocks_per_sm": 3},
        {"tile_n": 32, "blocks_per_sm": 2},
        {"schedule": "single", "splits": "keys", "pack_heads": True},
    ],
)
def test_what_constraints_leave(changes: dict[str, object]) -> None:
    FAMILY.require(Problem(head_dim=64, mask="causal"), HOPPER, BASE.replace(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("problem", "arch", "reason"),
    [
        (Problem(), "sm_80", "needs sm_90"),
        (Problem(dtype="fp32"), "sm_90", "not fp32"),
        (Problem(aligned=False), "sm_90", "multiples of 16 bytes"),
    ],
)
def test_what_it_cannot_serve(problem: Problem, arch: str, reason: str) -> None:
    assert reason in str(FAMILY.supports(problem, target.known(arch)))
