"""sm90_backward through nvcc, no GPU needed: no spills, no products in a row, registers as Python counts them."""

from __future__ import annotations

import dataclasses

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.errors import BuildError, InvalidConfig
from fagen.families import Config, sm90_backward
from fagen.ops.attention.backward import BackwardProblem
from fagen.tuner.evaluate import SPILL_TOLERANCE
from tests.compile.conftest import Facts
from tests.support.thorough import sample

FAMILY, HOPPER = sm90_backward.FAMILY, target.known("sm_90")
BASE = FAMILY.config(
    {
        "tile_m": 64, "tile_n": 128, "warpgroups": 2, "operands": "registers", "v_source": "shared",
        "q_stages": 2, "dout_stages": 2, "ds_stages": 1, "dv_start": "after_ds", "dq_sink": "bulk",
        "dq_rounding": "own_kernel", "dq_owner": "all",
    "row_order": "ascending", "block_order": "ascending", "section_mb": 32, "seeds": "none", "exp_on_fma": 0,
    }
)  # fmt: skip
LOADER = {"dq_owner": "loader", "dq_sink": "red", "dv_start": "after_store", "ds_stages": 2}
PROBLEMS = [
    *(BackwardProblem(head_dim=d, mask="causal") for d in (64, 96, 128, 192, 256)),
    *(BackwardProblem(head_dim=d) for d in (64, 128, 256)),
    BackwardProblem(head_dim=192, head_dim_v=128, mask="causal", dtype="fp16"),
    BackwardProblem(head_dim=128, mask="causal", deterministic=True),
    BackwardProblem(head_dim=64, mask="window", window_left=100, window_right=0),
    *(BackwardProblem(head_dim=d, mask="intervals", intervals="both4") for d in (64, 128, 192, 256)),
    *(BackwardProblem(head_dim=d, mask="causal", softcap=True, alibi=True) for d in (64, 128, 256)),
]


@pytest.mark.slow
@pytest.mark.parametrize("problem", sample(PROBLEMS, every=3), ids=lambda p: p.static_key.replace("/", "-"))
def test_defaults_compile_cleanly(problem: BackwardProblem, device_facts: Facts) -> None:
    spec = KernelSpec(FAMILY, problem, HOPPER, FAMILY.default(problem, HOPPER))
    facts = device_facts(spec, whole=problem == PROBLEMS[0])
    assert facts["spill_bytes"] == 0 and "serialized" not in facts, facts


def test_defaults_that_read_the_size_and_the_mask() -> None:
    def default(**fields: object) -> Config:
        return FAMILY.default(BackwardProblem(**fields), HOPPER)

    for d in (64, 96):  # one tile of keys stores dQ from registers, which the loader cannot
        assert [default(head_dim=d, seqlen_k=n).dq_owner for n in (128, 129)] == ["all", "loader"]
        assert FAMILY.default_reads(BackwardProblem(head_dim=d, seqlen_k=128), HOPPER) == (True,)
    assert default(head_dim=128).dq_owner == default(head_dim=64, deterministic=True).dq_owner == "all"
    packed = {"mask": "intervals", "intervals": "lower1"}
    assert default(head_dim=128, **packed).block_order == "longest_first"
    same_bits = default(head_dim=128, **packed, deterministic=True)
    assert (same_bits.block_order, same_bits.row_order, same_bits.dq_sink) == ("longest_first", "descending", "bulk")
    large = default(head_dim=256, mask="causal", deterministic=True)  # no room for a stage of dQ beside two of q
    assert (large.block_order, large.row_order, large.dq_sink, large.q_stages) == ("descending", "ascending", "red", 2)


def test_every_legal_problem_has_a_legal_default() -> None:
    features: tuple[dict, ...] = (
        {}, {"mask": "causal", "deterministic": True}, {"mask": "intervals", "intervals": "both4", "softcap": True},
    )  # fmt: skip
    for d in range(16, 257, 16):
        for dv in (d, 16, 128, 256):
            for more in features:
                problem = BackwardProblem(head_dim=d, head_dim_v=dv, **more)
                FAMILY.require(problem, HOPPER, FAMILY.default(problem, HOPPER))


SHARED = {"operands": "shared", "tile_n": 64, "dout_stages": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "changes"),
    sample(
        [
            (128, {"dq_sink": "red", "dv_start": "after_store", "ds_stages": 2, "block_order": "sectioned"}),
            (64, {"dq_sink": "red", "dv_start": "before_ds", "ds_stages": 2, "block_order": "sectioned"}),
            (64, {"tile_n": 64, "warpgroups": 1, "tile_m": 128, "q_stages": 1, "dv_start": "after_store"}),
            (64, {"tile_m": 128, "dq_sink": "red", "row_order": "shifted", "dv_start": "after_store"}),
            (64, {**LOADER, "tile_m": 128, "q_stages": 3, "dout_stages": 3}),
            (96, {**LOADER, "v_source": "registers", "ds_stages": 1}),
            (128, LOADER),
            (64, {"tile_n": 192, "warpgroups": 3, "row_order": "descending", "dv_start": "after_store"}),
            (96, {"v_source": "registers", "dv_start": "after_store", "seeds": "delta"}),
            (96, {"dq_owner": "first", "ds_stages": 2}),
            (128, {"seeds": "delta", "dv_start": "after_store", "dout_stages": 1, "ds_stages": 2}),
            (64, {"seeds": "delta", "dv_start": "after_store", "tile_m": 128, "exp_on_fma": 1}),
            (256, {**SHARED, "q_stages": 1}),
            (256, {**SHARED, "tile_n": 80, "dv_start": "after_store", "dq_sink": "red", "ds_stages": 1}),
            (192, {**SHARED, "warpgroups": 2, "dq_owner": "first", "q_stages": 1}),
        ],
        every=4,
    ),
)
def test_other_knobs_compile_cleanly(head_dim: int, changes: dict, device_facts: Facts) -> None:
    problem = BackwardProblem(head_dim=head_dim, mask="causal")
    config = FAMILY.require(problem, HOPPER, BASE.replace(**changes))
    facts = device_facts(KernelSpec(FAMILY, problem, HOPPER, config))
    assert facts["spill_bytes"] <= SPILL_TOLERANCE and "serialized" not in facts, facts


@pytest.mark.slow
@pytest.mark.parametrize("what", ["registers", "smem_bytes", "threads"])
def test_disagreement_is_a_compile_error(what: str) -> None:
    problem = BackwardProblem(head_dim=16)
    job = make_job(KernelSpec(FAMILY, problem, HOPPER, BASE))
    right = FAMILY.derive(problem, HOPPER, BASE)[what]
    wrong = job.source.replace(f"{what} = {right}", f"{what} = {right + 8}")
    assert wrong != job.source
    with pytest.raises(BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))


REJECTED = [
    ("shape_fits", "64 keys of its own with operands=registers, not 96 / 2", {}, {"tile_n": 96}, {"tile_n": 128}),
    ("shape_fits", "64 rows at a time, not 128", {}, {**SHARED, "tile_m": 128}, {"tile_m": 64}),
    ("shape_fits", "whole 8 keys, not 80 / 3", {}, {**SHARED, "tile_n": 80, "warpgroups": 3}, {"warpgroups": 2}),
    ("shape_fits", "no registers for v", {}, {**SHARED, "v_source": "registers"}, {"v_source": "shared"}),
    ("smem_fits", "bytes of shared memory on sm_90", {"head_dim": 128}, {"tile_m": 128, "dv_start": "after_store"},
     {"tile_m": 64}),
    ("registers_fit", "registers a thread", {"head_dim": 128},
     {"tile_m": 128, "dout_stages": 1, "q_stages": 1, "dq_sink": "red", "dv_start": "after_store"}, {"tile_m": 64}),
    ("registers_fit", "registers a thread", {"head_dim": 128}, {"dv_start": "before_ds"}, {"dv_start": "after_store"}),
    ("seeds_fit", "dropout scales dP", {"dropout": True}, {"seeds": "delta"}, {"seeds": "none"}),
    ("owner_matters", "a lone warpgroup", {}, {"tile_n": 64, "warpgroups": 1, "dq_owner": "first"},
     {"dq_owner": "all"}),
    ("loader_can", "two warpgroups", {}, {**LOADER, "tile_n": 64, "warpgroups": 1}, {"warpgroups": 2, "tile_n": 128}),
    ("loader_can", "with shared", {}, {**LOADER, **SHARED},
     {"operands": "registers", "tile_n": 128, "dout_stages": 2}),
    ("loader_can", "from registers", {}, {**LOADER, "dq_sink": "bulk"}, {"dq_sink": "red"}),
    ("loader_can", "two stages", {}, {**LOADER, "dout_stages": 1}, {"dout_stages": 2}),
    ("sum_is_ordered", "added up in turns", {"deterministic": True}, LOADER, {"dq_owner": "all"}),
    ("last_is_known", "from registers", {}, {"dq_rounding": "last_block", "dq_sink": "red"}, {"dq_sink": "bulk"}),
    ("last_is_known", "intervals leave", {"mask": "intervals", "intervals": "lower1"}, {"dq_rounding": "last_block"},
     {"dq_rounding": "own_kernel"}),
    ("order_matters", "only repeats another", {}, {"block_order": "descending"}, {"block_order": "sectioned"}),
    ("section_matters", "has no sections", {}, {"section_mb": 16}, {"section_mb": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "says", "fields", "change", "mend"), REJECTED, ids=lambda value: str(value)[:30])
def test_a_constraint_says_no_with_its_numbers(name: str, says: str, fields: dict, change: dict, mend: dict) -> None:
    problem = BackwardProblem(**{"head_dim": 64, **fields})
    broken: Config = FAMILY.config({**BASE, **change})
    constraint = next(c for c in FAMILY.constraints if c.name == name)
    reason = constraint.check(problem, HOPPER, broken)
    assert reason is not None and says in reason
    with pytest.raises(InvalidConfig):
        FAMILY.require(problem, HOPPER, broken)
    assert FAMILY.rejects(problem, HOPPER, broken.replace(**mend)) is None


def test_every_constraint_is_among_them() -> None:
    assert {name for name, *_ in REJECTED} == {constraint.name for constraint in FAMILY.constraints}


@pytest.mark.parametrize(
    ("problem", "arch", "reason"),
    [
        (BackwardProblem(), "sm_80", "needs sm_90"),
        (BackwardProblem(dtype="fp32"), "sm_90", "not fp32"),
        (BackwardProblem(aligned=False), "sm_90", "multiples of 16 bytes"),
    ],
)
def test_what_it_cannot_serve(problem: BackwardProblem, arch: str, reason: str) -> None:
    assert reason in str(FAMILY.supports(problem, target.known(arch)))
