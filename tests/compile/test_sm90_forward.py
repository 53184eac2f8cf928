"""sm90_forward through nvcc, no GPU needed: defaults neither spill nor have their products serialized."""

from __future__ import annotations

import pytest

from fagen import build, target
from fagen.errors import InvalidConfig
from fagen.families import sm90_forward
from fagen.problem import Problem

FAMILY, HOPPER = sm90_forward.FAMILY, target.known("sm_90")
PROBLEMS = [
    *(Problem(head_dim=d, mask=mask) for d in (64, 96, 128, 192, 256) for mask in ("none", "causal")),
    Problem(head_dim=192, head_dim_v=128, mask="causal", dtype="fp16"),
    Problem(head_dim=64, mask="window", window_left=100, window_right=0),
    *(Problem(head_dim=d, mask="intervals", intervals="both4") for d in (64, 128, 192, 256)),
    Problem(head_dim=96, softcap=True, alibi=True),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.static_key.replace("/", "-"))
def test_defaults_compile_cleanly(problem: Problem) -> None:
    facts = build.build(FAMILY, problem, HOPPER, FAMILY.default(problem, HOPPER)).facts
    assert facts["spill_bytes"] == 0 and facts["stack"] == 0 and "serialized" not in facts, facts


def test_every_legal_problem_has_a_legal_default() -> None:
    for d in range(16, 257, 16):
        for dv in (d, 16, 128, 256):
            for mask in ("none", "causal"):
                problem = Problem(head_dim=d, head_dim_v=dv, mask=mask)
                FAMILY.require(problem, HOPPER, FAMILY.default(problem, HOPPER))


@pytest.mark.parametrize(
    ("problem", "changes", "reason"),
    [
        (Problem(head_dim=256), {"tile_m": 192, "tile_n": 128}, "bytes of shared memory"),
        (Problem(head_dim=128), {"tile_m": 192, "tile_n": 128, "stages": 1}, "registers a thread"),
        (Problem(head_dim=64), {"block_order": "descending"}, "only repeats another"),
    ],
)
def test_constraints_give_their_reason(problem: Problem, changes: dict[str, object], reason: str) -> None:
    config = FAMILY.default(problem, HOPPER).replace(**changes)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match=reason):
        FAMILY.require(problem, HOPPER, config)


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
