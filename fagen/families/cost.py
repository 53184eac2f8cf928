"""What the cost models of the families share: which tiles the band visits, and how long the last blocks keep others
waiting. A cost model only has to order configs; it is asked for every legal one, so what can be is remembered."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

from fagen.ops.attention.problem import Problem
from fagen.target import Target


@dataclass(frozen=True)
class Walk:
    """Of one head: its tiles of rows, the tiles of keys they visit in all, the most that one does, the masked ones."""

    row_tiles: int
    visits: int
    most: int
    masked: int


@functools.lru_cache(maxsize=1024)
def walk(p: Problem, tile_m: int, tile_n: int) -> Walk:
    """Intervals count as their band alone. The work is bounded, whatever the sizes: between two cuts, where a bound
    meets an end of the keys, the counts of tiles that lie a period apart differ by the same number."""
    tiles = -(-p.seqlen_q // tile_m)
    period = tile_n // math.gcd(tile_m, tile_n)  # after as many tiles of rows, begins lie alike in tiles of keys
    visits = most = masked = 0
    for begin, end in itertools.pairwise(_cuts(p, tile_m, tiles)):
        for index in range(begin, min(begin + period, end)):
            count = -(-(end - index) // period)
            here, whole = _tile(p, tile_m, tile_n, index)
            after = _tile(p, tile_m, tile_n, index + period) if count > 1 else (here, whole)
            step = after[0] - here
            seen = _sum(here, step, count)
            visits, most = visits + seen, max(most, here, here + (count - 1) * step)
            masked += seen - _sum(whole, after[1] - whole, count)
    return Walk(tiles, visits, most, masked)


def _tile(p: Problem, tile_m: int, tile_n: int, index: int) -> tuple[int, int]:
    """Tiles of keys that a tile of rows visits, and those of them that all its rows see in full (none if negative)."""
    shift = p.seqlen_k - p.seqlen_q
    begin = index * tile_m
    end = min(begin + tile_m, p.seqlen_q)
    first = max(0, begin + shift - p.window_left) if p.window_left >= 0 else 0
    last = min(p.seqlen_k, end + shift + p.window_right) if p.window_right >= 0 else p.seqlen_k
    if last <= first:
        return 0, 0
    whole_from = max(0, end - 1 + shift - p.window_left) if p.window_left >= 0 else 0
    whole_to = min(p.seqlen_k, begin + shift + p.window_right + 1) if p.window_right >= 0 else p.seqlen_k
    return -(-last // tile_n) - first // tile_n, whole_to // tile_n - -(-whole_from // tile_n)


def _cuts(p: Problem, tile_m: int, tiles: int) -> list[int]:
    """The tiles of rows from which another side of a min, max or comparison in `_tile` holds, and both ends."""
    shift = p.seqlen_k - p.seqlen_q
    rows = []
    if p.window_left >= 0:
        rows += [p.window_left - shift, p.window_left - shift - tile_m + 1]
    if p.window_right >= 0:
        rows += [p.seqlen_q - tile_m - p.window_right, p.seqlen_q - p.window_right - 1]
        rows += [1 - tile_m - shift - p.window_right]
    inside = (min(max(0, -(-row // tile_m)), tiles) for row in rows)
    return sorted({0, tiles - 1, tiles, *inside})


def _sum(first: int, step: int, count: int) -> int:
    """Of max(0, first + i * step) over 0 <= i < count."""
    if step < 0:
        first, step = first + (count - 1) * step, -step
    skipped = min(count, max(0, -(first // step))) if step else count * (first < 0)
    return (count - skipped) * (2 * first + (skipped + count - 1) * step) // 2


def vector_lanes(t: Target) -> int:
    """Numbers of float32 that a vector of a CPU holds."""
    return {"avx512": 16, "avx2": 8}.get(t.simd, 4)


def makespan(work: float, longest: float, pieces: int, units: int, tail: float) -> float:
    """Time until the last unit is done: the share of each, and of the longest piece what is left over at the end."""
    if pieces <= units:
        return longest
    even = work / pieces
    return max(-(-pieces // units) * even if longest <= 1.01 * even else 0.0, work / units + tail * longest)


def split_cycles(p: Problem, tile_m: int, tiles: int, visit: float, start: float, pieces: int, units: int) -> float:
    """Cycles where blocks share keys, of the best number of parts, as `choose_parts` of host/split_keys.cuh counts.

    `pieces` tiles of rows, fewer than units, see `tiles` tiles of keys each. A merge reads what the blocks store.
    """
    part, least = 4 * tile_m * p.head_dim_v_padded / 16, math.inf
    for blocks in range(1, 9):  # on a unit
        parts = min(blocks * units // pieces, tiles, 128)
        least = min(least, blocks * (-(-tiles // max(1, parts)) * visit + start + part) + 3000)
    return least


def key_bytes(p: Problem) -> int:
    """Keys and values of all heads."""
    return p.batch * p.kv_heads * p.seqlen_k * (p.head_dim_padded + p.head_dim_v_padded) * p.itemsize
