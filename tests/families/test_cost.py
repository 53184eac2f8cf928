"""The cost models count the tiles that a band visits without visiting each of them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fagen.bench import suites
from fagen.families import cost, sm90_backward, sm90_backward_cost
from fagen.ops.attention.problem import Problem
from fagen.schema import MOST
from fagen.target import known

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


def test_gradients_cheapest_tiles_are_nearly_the_fastest():
    """Of the kernels that were timed at random sizes, by the default and the knobs that differ from it."""
    path = Path(__file__).parents[2] / "benchmarks" / "h200_backward_tiles.json"
    family, target, behind = sm90_backward.FAMILY, known("sm_90"), []
    rows = {f"backward {row.name}": row.problem for row in suites.suite("random", target, 1, "backward")}
    for name, times in json.loads(path.read_text())["rows"].items():
        problem = rows[name]
        default = dict(family.default(problem, target))

        def cycles(words: str, problem: Any = problem, default: dict[str, Any] = default) -> float:
            knobs = dict(word.split("=") for word in words.split())
            values = {knob: type(default[knob])(value) for knob, value in knobs.items()}
            return sm90_backward_cost.cost(problem, target, family.config({**default, **values}))

        behind.append(times[min(times, key=cycles)] / min(times.values()))
    assert len(behind) == 60 and statistics.geometric_mean(behind) < 1.04


def test_gradients_of_few_blocks_cost_what_they_take_shared(monkeypatch):
    row = next(r for r in suites.suite("peers", known("sm_90"), 1, "backward") if r.name.startswith("small-b1-s1k"))
    config = sm90_backward.FAMILY.default(row.problem, known("sm_90"))
    shared = sm90_backward_cost.cost(row.problem, known("sm_90"), config)
    monkeypatch.setattr(sm90_backward_cost, "splits", lambda p, c: (1,))
    assert shared < 0.75 * sm90_backward_cost.cost(row.problem, known("sm_90"), config)
