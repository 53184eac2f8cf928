"""The cost models count the tiles that a band visits without visiting each of them."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fagen.families import cost
from fagen.ops.attention.problem import Problem
from fagen.schema import MOST

TILES = (1, 16, 21, 32, 48, 64, 80, 128, 176, 256)


def counted(p: Problem, tile_m: int, tile_n: int) -> cost.Walk:
    """Tile by tile."""
    shift = p.seqlen_k - p.seqlen_q
    tiles = visits = most = masked = 0
    for begin in range(0, p.seqlen_q, tile_m):
        end = min(begin + tile_m, p.seqlen_q)
        first = max(0, begin + shift - p.window_left) if p.window_left >= 0 else 0
        last = min(p.seqlen_k, end + shift + p.window_right) if p.window_right >= 0 else p.seqlen_k
        tiles += 1
        if last <= first:
            continue
        here = -(-last // tile_n) - first // tile_n
        visits, most = visits + here, max(most, here)
        whole_from = max(0, end - 1 + shift - p.window_left) if p.window_left >= 0 else 0
        whole_to = min(p.seqlen_k, begin + shift + p.window_right + 1) if p.window_right >= 0 else p.seqlen_k
        masked += here - max(0, whole_to // tile_n - -(-whole_from // tile_n))
    return cost.Walk(tiles, visits, most, masked)


LENGTHS = st.one_of(st.integers(1, 300), st.integers(1, 20_000), st.sampled_from([64, 128, 512, 1024, 4096, 8192]))
BOUNDS = st.one_of(st.just(-1), st.integers(0, 300), st.integers(0, 25_000))


@settings(deadline=None, max_examples=400)
@given(LENGTHS, LENGTHS, BOUNDS, BOUNDS, st.sampled_from(TILES), st.sampled_from(TILES))
@example(4096, 4096, -1, 0, 128, 128)
@example(1, 20_000, 5, 5, 256, 1)
@example(20_000, 1, 0, 0, 1, 256)
def test_the_walk_is_that_of_every_tile(rows, keys, left, right, tile_m, tile_n):
    problem = Problem(mask="window", seqlen_q=rows, seqlen_k=keys, window_left=left, window_right=right)
    assert cost.walk(problem, tile_m, tile_n) == counted(problem, tile_m, tile_n)


@pytest.mark.parametrize("mask", ["none", "causal", "window"])
def test_its_work_does_not_grow_with_the_length(monkeypatch, mask):
    """At most two tiles for each of a period, between the cuts that a band has."""
    calls = []
    tile = cost._tile
    monkeypatch.setattr(cost, "_tile", lambda *args: calls.append(args) or tile(*args))
    window = {"window_left": 1 << 20, "window_right": 1 << 10} if mask == "window" else {}
    seen = cost.walk(Problem(mask=mask, seqlen_q=MOST, **window), 21, 256)
    assert seen.row_tiles == -(-MOST // 21) and len(calls) <= 2 * 256 * 7
    if mask == "none":
        assert seen.visits == seen.row_tiles * -(-MOST // 256) and seen.masked == seen.row_tiles  # the last is ragged
