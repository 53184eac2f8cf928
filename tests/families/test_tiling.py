"""The closed form by which defaults compare tilings, against a walk over the tiles; and what it says."""

from __future__ import annotations

import math
import random

import pytest

from fagen import families, target
from fagen.families import Reads, sm90_forward
from fagen.families.cost import walk
from fagen.ops.attention.problem import Problem
from fagen.ops.attention.tiling import ALONE, PACKED, UNPACKED, Cheaper, Short, Tiling

HOPPER = target.known("sm_90")


def problem(draw: random.Random, mask: str) -> Problem:
    rows, keys = (round(2 ** draw.uniform(6, 12)) for _ in range(2))
    fields = {
        "seqlen_q": rows,
        "seqlen_k": max(rows, keys),
        "batch": 4,
        "heads": 12,
        "kv_heads": draw.choice([2, 4, 12]),
    }
    if mask == "window":
        fields |= {"window_left": draw.choice([64, 400]), "window_right": draw.choice([0, 30])}
    return Problem(mask=mask, **fields)


@pytest.mark.parametrize("mask", ["none", "causal", "window"])
def test_the_mean_tile_of_rows_sees_what_a_walk_finds(mask: str) -> None:
    """A warpgroup's 64 rows where blocks see many keys, and the block's where a window leaves few."""
    draw, wrong = random.Random(mask), []
    for _ in range(200):
        p = problem(draw, mask)
        rows, keys = draw.choice([64, 128, 192]), draw.choice([64, 80, 128])
        most, mean = Tiling(rows, keys, UNPACKED, 1, 0)._visits(
            p, p.seqlen_q, rows, -(-p.seqlen_q // rows), rows if mask == "window" else 64, p.window_right
        )
        seen = walk(p, rows if mask == "window" else 64, keys)
        assert most >= seen.most - 1e-9
        wrong.append(abs(mean / (seen.visits / seen.row_tiles) - 1))
    assert sum(wrong) / len(wrong) < 0.02 and max(wrong) < 0.25


def test_cycles_grow_with_the_work_and_know_the_units() -> None:
    tiling = Tiling(128, 128, UNPACKED, 2000, 500)
    p = Problem(batch=1, heads=8, seqlen_q=1024, seqlen_k=1024)
    assert tiling.cycles(p, 132) == 8 * 2000 + 500  # all tiles at once
    assert tiling.cycles(p.replace(batch=3), 132) == 2 * tiling.cycles(p, 132)  # 192 tiles of rows: two waves
    assert tiling.cycles(p.replace(seqlen_k=2048), 132) == 16 * 2000 + 500
    causal = p.replace(mask="causal", batch=64, window_right=0)
    assert tiling.cycles(causal, 132) < 0.65 * tiling.cycles(p.replace(batch=64), 132)


def test_only_heads_that_share_keys_are_packed() -> None:
    shared, own = Problem(heads=32, kv_heads=8, seqlen_q=200), Problem(heads=32, kv_heads=32, seqlen_q=200)
    packed, alone = Tiling(128, 128, PACKED, 2000, 500), Tiling(128, 128, ALONE, 2000, 500)
    assert packed.cycles(own, 132) == alone.cycles(shared, 132) == math.inf
    assert packed.cycles(shared, 132) < Tiling(128, 128, UNPACKED, 2000, 500).cycles(shared.replace(batch=8), 132)
    assert Cheaper(packed, alone).holds(shared, HOPPER) and not Cheaper(packed, alone).holds(own, HOPPER)
    assert Short(packed, 10_000).holds(shared, HOPPER) and not Short(packed, 100).holds(shared, HOPPER)


@pytest.mark.parametrize(
    ("sizes", "packed"),
    [
        ({"head_dim": 72, "batch": 16, "heads": 14, "kv_heads": 2, "seqlen_q": 107, "seqlen_k": 421}, True),
        ({"head_dim": 136, "mask": "window", "window_left": 129, "window_right": 0, "batch": 32, "heads": 20,
          "kv_heads": 4, "seqlen_q": 73}, True),
        ({"head_dim": 64, "mask": "causal", "batch": 16, "heads": 32, "kv_heads": 8, "seqlen_q": 1024}, False),
        ({"head_dim": 256, "mask": "causal", "batch": 16, "heads": 8, "kv_heads": 4, "seqlen_q": 1024}, False),
    ],
)  # fmt: skip
def test_the_default_packs_where_an_h200_was_faster_with_it(sizes: dict, packed: bool) -> None:
    assert sm90_forward.FAMILY.default(Problem(**sizes), HOPPER)["pack_heads"] is packed


@pytest.mark.parametrize("mask", ["none", "causal", "window"])
def test_the_tests_of_a_default_fit_the_tables_word(mask: str) -> None:
    """A bit each, of all families that may serve."""
    for head_dim in range(8, 257, 8):
        problem = Problem(head_dim=head_dim, mask=mask, window_left=64 if mask == "window" else -1)
        reads = [family.default_reads for family in families.serving(problem, HOPPER)[0]]
        assert sum(len(each.tests(problem, HOPPER)) for each in reads if isinstance(each, Reads)) < 63
