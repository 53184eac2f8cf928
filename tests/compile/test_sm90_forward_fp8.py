"""sm90_forward_fp8 through nvcc, no GPU needed: no spills, no products in a row, registers as Python counts them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fagen import families, target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.errors import BuildError, InvalidConfig
from fagen.ops.attention.fp8_problem import Fp8Problem
from fagen.runtime import quantize
from fagen.tuner.evaluate import SPILL_TOLERANCE
from tests.compile.conftest import Facts
from tests.support.fp8 import BASE, FAMILY, config
from tests.support.thorough import sample

HOPPER = target.known("sm_90")
_MANY = {"batch": 8, "heads": 32}  # tiles of rows for every SM
_LONG = {"seqlen_q": 1024, "seqlen_k": 65536}
PROBLEMS = [
    *(Fp8Problem(head_dim=d, mask=mask, **_MANY) for d in (128, 64, 256) for mask in ("none", "causal")),
    Fp8Problem(head_dim=192, head_dim_v=128, mask="causal", dtype="fp16", **_MANY),
    Fp8Problem(head_dim=192, **_MANY),
    Fp8Problem(head_dim=128, mask="window", softcap=True, **_MANY),
    Fp8Problem(head_dim=64, mask="causal", **_MANY, **_LONG),
    Fp8Problem(head_dim=128, mask="causal", **_MANY, **_LONG),
    Fp8Problem(head_dim=128, mask="causal", seqlen_q=100, seqlen_k=4096),
    *(Fp8Problem(head_dim=d, mask="intervals", intervals="both4", **_MANY) for d in (256, 64, 128, 224)),
    *(Fp8Problem(head_dim=d, mask="causal", scale_block=128, **_MANY) for d in (64, 128, 256)),
    Fp8Problem(head_dim=128, mask="intervals", intervals="lower2", softcap=True, scale_block=64, **_MANY, **_LONG),
    Fp8Problem(head_dim=192, head_dim_v=128, mask="intervals", intervals="both2", scale_block=192, **_MANY),
]


@pytest.mark.slow
@pytest.mark.parametrize("problem", sample(PROBLEMS, every=5), ids=lambda p: p.key.replace("/", "-"))
def test_defaults_compile_cleanly(problem: Fp8Problem, device_facts: Facts) -> None:
    spec = KernelSpec(FAMILY, problem, HOPPER, FAMILY.default(problem, HOPPER))
    facts = device_facts(spec, whole=problem == PROBLEMS[0])
    assert facts["spill_bytes"] == 0 and "serialized" not in facts, facts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "changes"),
    sample(
        [
            (128, {"tile_n": 128, "promote": 1}),
            (128, {"tile_n": 224, "ping_pong": True}),
            (64, {"tile_m": 192, "tile_n": 160, "ping_pong": True, "schedule": "dynamic"}),
            (64, {"tile_m": 192, "tile_n": 96, "promote": 2}),
            (256, {"tile_n": 96, "rescale": "each", "overlap": "maxima"}),
            (128, {"tile_m": 64, "tile_n": 96, "blocks_per_sm": 2, "schedule": "single"}),
        ],
        every=6,
    ),
)
def test_other_knobs_compile_cleanly(head_dim: int, changes: dict[str, Any], device_facts: Facts) -> None:
    problem = Fp8Problem(head_dim=head_dim, mask="causal", **_MANY)
    chosen = FAMILY.require(problem, HOPPER, config(**changes))
    facts = device_facts(KernelSpec(FAMILY, problem, HOPPER, chosen))
    assert facts["spill_bytes"] <= SPILL_TOLERANCE and "serialized" not in facts, facts


@pytest.mark.slow
@pytest.mark.parametrize("what", ["registers", "smem_bytes"])
def test_disagreement_is_a_compile_error(what: str) -> None:
    problem = Fp8Problem(head_dim=16)
    job = make_job(KernelSpec(FAMILY, problem, HOPPER, config()))
    right = FAMILY.derive(problem, HOPPER, config())[what]
    wrong = job.source.replace(f"{what} = {right}", f"{what} = {right + 8}")
    assert wrong != job.source
    with pytest.raises(BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))


def test_every_legal_problem_has_a_legal_default() -> None:
    sizes: tuple[dict[str, Any], ...] = ({}, _MANY, {**_MANY, **_LONG}, {"seqlen_q": 1, "seqlen_k": 100000})
    for d in range(16, 257, 16):
        for dv in (d, 16, 128, 256):
            for mask, block in (("none", 0), ("causal", 64), ("window", 448), ("intervals", 0), ("intervals", 64)):
                kind = "lower1" if mask == "intervals" else ""
                static = {"head_dim": d, "head_dim_v": dv, "mask": mask, "intervals": kind, "scale_block": block}
                for more in sizes:
                    problem = Fp8Problem(softcap=True, **static, **more)
                    assert FAMILY.supports(problem, HOPPER) is None
                    FAMILY.require(problem, HOPPER, FAMILY.default(problem, HOPPER))


def test_many_keys_are_promoted_by_default() -> None:
    """Beyond them sums of 14 bits would show; head dim 256 has no registers for it."""
    for d, keys, promote in ((64, 16384, 0), (64, 16385, 2), (128, 131072, 2), (256, 131072, 0)):
        assert FAMILY.default(Fp8Problem(head_dim=d, seqlen_k=keys, **_MANY), HOPPER).promote == promote


# What a search on an H100 measured, in microseconds: tile_m, tile_n, stages, q_stages, overlap, rescale, exp_on_fma.
# The last two of each are the best that a value of tile_n or of stages gave, whatever the other knobs were.
_MEASURED = {
    Fp8Problem(head_dim=128, mask="causal", batch=2, heads=16, seqlen_q=8192): (
        (607, 128, 192, 2, 1, "maxima", "each", 1),
        (614, 192, 96, 3, 1, "maxima", "each", 1),
        (692, 128, 128, 2, 1, "maxima", "each", 1),
        (1590, 128, 32, 2, 1, "maxima", "each", 1),
    ),
    Fp8Problem(head_dim=64, batch=4, heads=32, seqlen_q=4096): (
        (855, 192, 160, 4, 2, "nothing", "each", 0),
        (927, 192, 160, 1, 2, "maxima", "deferred", 0),
        (958, 192, 128, 2, 1, "maxima", "each", 0),
        (2100, 128, 32, 2, 1, "maxima", "each", 0),
    ),
    Fp8Problem(head_dim=256, batch=2, heads=8, seqlen_q=8192): (
        (833, 128, 128, 2, 2, "maxima", "each", 0),
        (865, 128, 128, 2, 1, "maxima", "deferred", 0),
        (1016, 128, 64, 2, 1, "maxima", "each", 0),
        (1840, 128, 128, 1, 1, "maxima", "each", 0),
    ),
}


@pytest.mark.parametrize("problem", list(_MEASURED), ids=lambda p: f"d{p.head_dim}")
def test_the_cost_model_orders_what_was_measured(problem: Fp8Problem) -> None:
    """The best one is the cheapest but for 3 %, and what was far behind is dear."""
    assert FAMILY.cost
    found = []
    for us, m, n, stages, q_stages, overlap, rescale, exp_on_fma in _MEASURED[problem]:
        chosen = config(
            tile_m=m, tile_n=n, stages=stages, q_stages=q_stages, overlap=overlap, rescale=rescale,
            exp_on_fma=exp_on_fma, schedule="dynamic", block_order="sectioned",
        )  # fmt: skip
        found.append((us, FAMILY.cost(problem, HOPPER, FAMILY.require(problem, HOPPER, chosen))))
    best = found[0][1]
    assert all(best <= 1.03 * cost for _, cost in found)
    assert all(cost > 1.3 * best for us, cost in found if us > 2 * found[0][0])


@pytest.mark.parametrize(
    ("head_dim", "changes", "reason"),
    [
        (256, {"tile_n": 160}, "about .* registers a thread"),
        (256, {"tile_n": 64, "promote": 1}, "about .* registers a thread"),
        (256, {"tile_m": 64, "tile_n": 160, "stages": 3}, "bytes of shared memory on sm_90"),
        (128, {"tile_m": 64, "tile_n": 160, "stages": 3, "blocks_per_sm": 2}, "2 blocks x .* an SM"),
        (128, {"tile_m": 64, "tile_n": 32, "stages": 1, "blocks_per_sm": 3, "promote": 1}, "registers a thread"),
        (128, {"tile_m": 64, "ping_pong": True}, "nobody to take turns with"),
        (64, {"schedule": "single", "q_stages": 2}, "no second one to load"),
        (64, {"promote": 1, "rescale": "each"}, "O is multiplied at each tile anyway"),
        (64, {"section_mb": 16}, "block_order=ascending has no sections"),
        (64, {"block_order": "descending"}, "only repeats another"),
        (64, {"tile_n": 96, "scale_block": 128}, "tile_n=96 does not divide blocks of 128 keys"),
    ],
)
def test_constraints_give_their_reason(head_dim: int, changes: dict[str, Any], reason: str) -> None:
    problem = Fp8Problem(head_dim=head_dim, scale_block=changes.get("scale_block", 0))
    knobs = {name: value for name, value in changes.items() if name != "scale_block"}
    with pytest.raises(InvalidConfig, match=reason):
        FAMILY.require(problem, HOPPER, config(**knobs))
    FAMILY.require(Fp8Problem(head_dim=64), HOPPER, config())


@pytest.mark.parametrize(
    ("problem", "arch", "reason"),
    [
        (Fp8Problem(), "sm_80", "needs sm_90"),
        (Fp8Problem(aligned=False), "sm_90", "multiples of 16 bytes"),
        (Fp8Problem(head_dim=40), "sm_90", "multiples of 16"),
    ],
)
def test_what_it_cannot_serve(problem: Fp8Problem, arch: str, reason: str) -> None:
    assert reason in str(FAMILY.supports(problem, target.known(arch)))
    assert not families.candidates(problem, target.known(arch))[0]


def test_no_knob_is_left_out_of_the_base() -> None:
    assert [*BASE] == [knob.name for knob in FAMILY.knobs]


@pytest.mark.slow
def test_the_kernels_that_make_the_numbers_compile() -> None:
    facts = cache.make(quantize.HELPER.job(HOPPER)).facts
    assert facts["spill_bytes"] == 0, facts
    assert all(quantize.HELPER.library(where, False) is None for where in (target.known("sm_80"), target.host()))
