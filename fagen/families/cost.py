"""What the cost models of the families share: which tiles the band visits, and how long the last blocks keep others
waiting. A cost model only has to order configs; it is asked for every legal one, so what can be is remembered."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fagen.problem import Problem


@dataclass(frozen=True)
class Walk:
    """Of one head: its tiles of rows, the tiles of keys they visit in all, the most that one does, the masked ones."""

    row_tiles: int
    visits: int
    most: int
    masked: int


@functools.lru_cache(maxsize=1024)
def walk(p: Problem, tile_m: int, tile_n: int) -> Walk:
    """Intervals count as their band alone."""
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
    return Walk(tiles, visits, most, masked)


def makespan(work: float, longest: float, pieces: int, units: int, tail: float) -> float:
    """Time until the last unit is done: the share of each, and of the longest piece what is left over at the end."""
    if pieces <= units:
        return longest
    even = work / pieces
    return max(-(-pieces // units) * even if longest <= 1.01 * even else 0.0, work / units + tail * longest)


def key_bytes(p: Problem) -> int:
    """Keys and values of all heads."""
    return p.batch * p.kv_heads * p.seqlen_k * (p.head_dim_padded + p.head_dim_v_padded) * p.itemsize
