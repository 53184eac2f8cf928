"""What Python knows of sm80_decode: configs that repeat others, the number of splits, what configs should cost."""

from __future__ import annotations

import pytest

from fagen.families import sm80_decode
from fagen.families.space import enumerate_space
from fagen.ops.attention.decode import DecodeProblem
from fagen.target import known

FAMILY, SM90 = sm80_decode.FAMILY, known("sm_90")
PROBLEM = DecodeProblem(head_dim=128, mask="causal", page=16, batch=32, heads=32, kv_heads=8, seqlen_k=4096)
DEFAULT = FAMILY.default(PROBLEM, SM90)


def cost(problem: DecodeProblem, **changes: object) -> float:
    config = FAMILY.config({**DEFAULT, **changes})  # type: ignore[dict-item]
    return sm80_decode.cost(problem, SM90, config)


@pytest.mark.parametrize(("rows", "tile"), [(1, 16), (4, 16), (5, 16), (8, 16), (9, 64), (100, 64)])
def test_the_defaults_tile_follows_the_rows_of_a_kv_head(rows: int, tile: int) -> None:
    problem = PROBLEM.replace(seqlen_q=rows)  # 4 heads share a kv head
    config = FAMILY.default(problem, SM90)
    assert config.tile_m == tile and not FAMILY.repeats(problem, config)


def test_larger_tiles_than_the_rows_need_are_not_searched() -> None:
    repeats = [c.tile_m for c in (DEFAULT.replace(tile_m=m) for m in (16, 32, 64)) if FAMILY.repeats(PROBLEM, c)]
    assert repeats == [32, 64]
    assert not FAMILY.repeats(PROBLEM.replace(seqlen_q=5), DEFAULT.replace(tile_m=32))


def test_few_sequences_are_split_and_many_are_not() -> None:
    splits = [sm80_decode.splits_of(PROBLEM.replace(batch=b), SM90, DEFAULT) for b in (1, 2, 4, 8, 16, 32)]
    assert splits == sorted(splits, reverse=True) and splits[0] >= 16 and splits[-1] == 1
    few_keys = PROBLEM.replace(batch=1, seqlen_k=1024)
    assert sm80_decode.splits_of(few_keys, SM90, DEFAULT) == 1024 // DEFAULT.split_keys
    assert sm80_decode.splits_of(few_keys, SM90, DEFAULT.replace(split_keys=1024)) == 1


def test_costs_order_what_is_known_to_differ() -> None:
    one, many = PROBLEM.replace(batch=1, seqlen_k=1024), PROBLEM
    assert cost(one) < cost(one, split_keys=1024)  # 8 blocks on 132 SMs
    assert cost(many) < cost(many, tile_n=16, warps=1, stages=2, blocks_per_sm=1)  # too little in flight
    assert cost(many) < cost(many, partition="columns")  # barriers for nothing
    rows = PROBLEM.replace(seqlen_q=8)  # 32 of a kv head
    assert cost(rows, tile_m=32, q_source="shared") < cost(rows, tile_m=16, q_source="shared")  # keys are read once
    fp8 = PROBLEM.replace(kv_dtype="fp8_e4m3")
    assert 1.2 < cost(many) / cost(fp8) < 2


def test_costs_are_of_the_size_of_what_memory_allows() -> None:
    legal = [c for c in enumerate_space(FAMILY, PROBLEM, SM90).legal if not FAMILY.repeats(PROBLEM, c)]
    costs = sorted(sm80_decode.cost(PROBLEM, SM90, c) for c in legal)
    least = PROBLEM.bytes() / (sm80_decode.SM_RATE * SM90.units)
    assert least < costs[0] < 1.3 * least and costs[-1] > 2 * costs[0]
    assert sm80_decode.cost(PROBLEM, SM90, DEFAULT) <= costs[len(costs) // 10]
