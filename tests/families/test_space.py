"""The search space is exactly the legal configs, and each constraint of the GPU family says no with its numbers."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from fagen import families, ops, target
from fagen.errors import InvalidConfig
from fagen.families import (
    Config,
    Constraint,
    Family,
    sm80_forward,
    sm90_backward_large,
    sm90_decode_mla,
    sm90_forward,
    sm90_forward_large,
)
from fagen.families.space import enumerate_space
from fagen.ops.attention import size_point
from fagen.ops.attention.problem import Problem

OF_ATTENTION = [family for family in families.all_families() if family.op != "softmax"]
PROBLEMS = {
    "plain": {"head_dim": 64},
    "causal": {"head_dim": 128, "mask": "causal"},
    "wide": {"head_dim": 192, "head_dim_v": 128, "mask": "window", "window_left": 64},
}
LARGE = {
    "large": {"head_dim": 512},
    "large_causal": {"head_dim": 320, "mask": "causal"},
    "largest": {"head_dim": 1024, "mask": "window", "window_left": 64},
}
LATENT = {"head_dim": 576, "head_dim_v": 512, "mask": "causal", "shared_kv": True}  # the one kind that a family serves


def place(family: Family, fields: dict) -> tuple[Problem, target.Target]:
    """A problem of the family's own dtype, and a target that it supports."""
    fields = LATENT if family is sm90_decode_mla.FAMILY else fields
    problem = ops.get(family.op).problem(dtype=family.dtypes[0], **fields)
    targets = [target.Target("cpu", "any", 8, simd="avx512"), target.known("sm_80"), target.known("sm_90")]
    return problem, next(where for where in targets if family.supports(problem, where) is None)


def _problems(family: Family) -> dict[str, dict]:
    return LARGE if family in (sm90_forward_large.FAMILY, sm90_backward_large.FAMILY) else PROBLEMS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(f, name, id=f"{f.name}-{name}") for f in OF_ATTENTION for name in _problems(f)],
)
def test_every_config_is_legal_or_removed_by_a_constraint(family: Family, name: str) -> None:
    """A constraint is asked as soon as the knobs that it says it reads are known: they must be all it looks at."""
    problem, where = place(family, _problems(family)[name])
    space = enumerate_space(family, problem, where)
    assert len(space.legal) + sum(space.removed.values()) == space.total == family.size()
    legal, chance = set(space.legal), random.Random(0)
    assert len(legal) == len(space.legal)
    assert family.default(problem, where) in legal
    assert set(family.first_configs(problem, where)) <= legal
    for _ in range(2000):
        config = Config({knob.name: chance.choice(knob.choices) for knob in family.knobs})
        assert (config in legal) == (family.rejects(problem, where, config) is None), config
    for config in chance.sample(space.legal, min(200, len(space.legal))):
        assert family.rejects(problem, where, config) is None, config


def test_a_constraint_is_asked_once_for_each_combination_of_what_it_reads() -> None:
    problem, where = place(sm80_forward.FAMILY, PROBLEMS["plain"])
    asked: list[tuple] = []

    def check(problem: Problem, where: target.Target, config: Config) -> str | None:
        asked.append((config.stages, config.warps))
        return "too much" if config.stages * config.warps > 8 else None

    family = dataclasses.replace(sm80_forward.FAMILY, constraints=(Constraint("one", check, ("stages", "warps")),))
    space = enumerate_space(family, problem, where)
    stages, warps = (family.knob(name).choices for name in ("stages", "warps"))
    assert sorted(asked) == sorted(itertools.product(stages, warps))
    assert {(c.stages, c.warps) for c in space.legal} == {(s, w) for s, w in set(asked) if s * w <= 8}
    lies = dataclasses.replace(family, constraints=(Constraint("one", check, ("stages",)),))
    with pytest.raises(AttributeError, match="warps"):
        enumerate_space(lies, problem, where)


# ---- sm80_forward: a config that each reason rejects, and the change that mends it ---------------------------------

FAMILY = sm80_forward.FAMILY
WHERE = target.known("sm_80")
BASE = Config({
    "tile_m": 64, "tile_n": 64, "warps": 4, "partition": "split_q", "loop_order": "q_outer", "stages": 2,
    "overlap": False, "q_source": "shared", "smem_layout": "swizzled", "blocks_per_sm": 1, "rescale": "deferred",
    "block_order": "ascending",
})  # fmt: skip

REJECTED = [
    ("even_share", "tile_m 64 is no multiple of 16 rows x 8 warps", {"warps": 8}, {"tile_m": 128}),
    ("even_share", "tile_n 32 is no multiple of 16 keys x 4 warps",
     {"partition": "split_k", "tile_m": 16, "tile_n": 32}, {"tile_n": 64}),
    ("even_share", "4 warps are not pairs", {"partition": "pairs", "tile_n": 48}, {"tile_n": 64}),
    ("one_scheme", "stages=2", {"loop_order": "kv_outer"}, {"stages": 1}),
    ("one_scheme", "overlap needs q_outer", {"overlap": True, "stages": 1}, {"stages": 2}),
    ("one_scheme", "pairs work in q_outer", {"partition": "pairs", "overlap": True}, {"overlap": False}),
    ("one_scheme", "one warp", {"partition": "split_k", "tile_m": 16, "warps": 1}, {"warps": 4}),
    ("splitting_fits", "partition=split_k", {"splits": "keys", "partition": "split_k", "tile_m": 16},
     {"splits": "none"}),
    ("splitting_fits", "kv_outer", {"splits": "keys", "loop_order": "kv_outer", "stages": 1},
     {"loop_order": "q_outer"}),
    ("order_matters", "block_order=longest_first", {"block_order": "longest_first"}, {"block_order": "sectioned"}),
    ("smem_fits", "bytes of shared memory on sm_80", {"tile_m": 256, "tile_n": 128, "warps": 8, "stages": 3},
     {"tile_m": 128, "tile_n": 64, "stages": 1}),
    ("smem_fits", "bytes of shared memory an SM", {"blocks_per_sm": 4}, {"blocks_per_sm": 1}),
    ("registers_fit", "registers a thread", {"tile_m": 256}, {"tile_m": 64}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "says", "change", "mend"), REJECTED, ids=lambda value: str(value)[:30])
def test_a_constraint_of_sm80_says_no_with_its_numbers(name: str, says: str, change: dict, mend: dict) -> None:
    problem = Problem(head_dim=128)
    broken = FAMILY.config({**BASE, **change})
    constraint = next(c for c in FAMILY.constraints if c.name == name)
    reason = constraint.check(problem, WHERE, broken)
    assert reason is not None and says in reason
    assert FAMILY.rejects(problem, WHERE, broken) is not None
    assert FAMILY.rejects(problem, WHERE, broken.replace(**mend)) is None


def test_every_constraint_of_sm80_is_among_them() -> None:
    assert {name for name, *_ in REJECTED} == {constraint.name for constraint in FAMILY.constraints}


def test_a_config_older_than_a_knob_is_read_as_what_it_did() -> None:
    family = sm90_forward.FAMILY
    now = family.default(Problem(head_dim=128, heads=64), target.known("sm_90"))
    newer = {"cluster": 1, "shared_weights": False, "pack_heads": False, "splits": "none"}
    older = {name: value for name, value in now.items() if name not in newer}
    assert family.config(older) == now.replace(**newer)
    older.pop("tile_m")
    with pytest.raises(InvalidConfig, match="lacks knob 'tile_m'"):
        family.config(older)


def test_what_only_repeats_at_its_sizes_is_not_searched() -> None:
    family, where = sm90_forward.FAMILY, target.known("sm_90")
    grouped = Problem(head_dim=128, mask="causal", heads=32, kv_heads=8, seqlen_q=1024)
    alone = Problem(head_dim=128, mask="causal", heads=32, seqlen_q=1024)
    every = enumerate_space(family, grouped, where)
    assert every.of(grouped).legal == every.legal
    fewer = every.of(alone)
    assert {config.pack_heads for config in fewer.legal} == {False}
    assert len(fewer.legal) + sum(fewer.removed.values()) == fewer.total
    assert fewer.removed["repeats"] == len(every.legal) - len(fewer.legal) > 0
    assert set(family.first_configs(grouped, where)) - set(family.first_configs(alone, where)), (
        "only grouped heads are packed"
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "tile", "packed"),
    [
        (8, 8, 4096, 128, 1), (32, 8, 4096, 128, 4), (128, 1, 4096, 128, 64), (24, 8, 4096, 128, 3),
        (12, 2, 4096, 128, 6), (28, 4, 151, 128, 7), (28, 4, 151, 192, 7),
        (12, 1, 4096, 128, 6),  # twelve leave 8 of 128 rows over, six only two
        (48, 1, 4096, 128, 16), (48, 1, 1, 64, 48), (48, 1, 4096, 192, 48),
        (11, 1, 4096, 64, 1), (11, 1, 4096, 128, 11), (11, 1, 64, 64, 1), (11, 1, 5, 64, 11), (71, 1, 1, 64, 1),
    ],
)  # fmt: skip
def test_heads_are_packed_as_a_tile_holds_them(heads: int, kv_heads: int, rows: int, tile: int, packed: int) -> None:
    problem = Problem(heads=heads, kv_heads=kv_heads, seqlen_q=rows)
    assert size_point.packed_heads(problem, tile) == packed
    fewest = min(size_point.packed_tiles(problem, tile, n) for n in range(1, 65) if heads // kv_heads % n == 0)
    assert 16 * size_point.packed_tiles(problem, tile, packed) <= 17 * fewest


def test_heads_are_packed_where_tiles_of_one_head_are_half_empty() -> None:
    """Of 135 rows a head, four heads fill 5 tiles of 128 rows, and 8 where each has its own."""
    where = target.known("sm_90")
    many = Problem(mask="causal", batch=64, heads=32, kv_heads=8, seqlen_q=135, seqlen_k=607)
    assert sm90_forward.FAMILY.default(many, where)["pack_heads"]
    assert not sm90_forward.FAMILY.default(many.replace(kv_heads=32), where)["pack_heads"]
