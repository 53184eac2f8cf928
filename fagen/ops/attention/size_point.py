"""The features of a size point of attention, and how much each counts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fagen.ops.attention.problem import Problem

if TYPE_CHECKING:
    from fagen.target import Target

WEIGHTS = {"keys": 1.0, "waves": 1.0, "rows": 0.25}  # of the features of a size; see docs/database.md
MOST_WAVES, LEAST_WAVES = 4.0, 0.25  # beyond which their number no longer matters
WAVE_ROWS = 128  # of a block of rows, about
# Few rows. On a GPU: the smallest tiles, of so many rows of packed heads, are fewer than this share of its units, and
# there are keys enough to be shared between blocks. On a CPU: so many of all heads that share keys.
ROWS_OF_CPU = 32
TILE_ROWS, MOST_PACKED, IDLE_SHARE, SHARED_KEYS = 64, 64, 0.7, 512


def features(problem: Problem, units: int, most_waves: float = MOST_WAVES) -> dict[str, float]:
    """What of a size point decides which config wins, in doublings; WEIGHTS says how much each counts.

    `keys` that a row sees: the length of the inner loop, and how much of the keys and values a cache holds. `waves`:
    blocks of rows over the device's units; with few of them plain schedules and small tiles win, with many it no
    longer matters how many. `rows` of a sequence: how much of the work lies at the diagonal.

    `Features` of csrc/table.h is the same in C++, for calls of a new size.
    """
    p = problem
    left, right = (p.seqlen_k if bound < 0 else bound for bound in (p.window_left, p.window_right))
    keys = p.seqlen_k if p.mask == "causal" else min(p.seqlen_k, left + right + 1)
    waves = p.batch * p.heads * -(-p.seqlen_q // WAVE_ROWS) / max(1, units)
    return {
        "keys": math.log2(keys),
        "waves": math.log2(min(max(waves, LEAST_WAVES), most_waves)),
        "rows": math.log2(p.seqlen_q),
    }


def packed_heads(problem: Problem) -> int:
    """How many heads a tile of rows packs: of those that share keys, as many as it can hold evenly."""
    group = problem.heads // problem.kv_heads
    return min(group & -group, MOST_PACKED)


def rows_of_a_kv_head(problem: Problem) -> int:
    return problem.seqlen_q * (problem.heads // problem.kv_heads)


def most_rows(target: Target) -> int:
    """Of a kv head, that are few by themselves; -1 where it depends on the tiles."""
    return -1 if target.is_gpu else ROWS_OF_CPU


def most_idle_tiles(target: Target) -> int:
    """Of rows, that leave so many of the device's units idle that blocks should share their keys; -1 where none do."""
    return int(IDLE_SHARE * target.units) if target.is_gpu else -1


def has_few_rows(problem: Problem, target: Target) -> bool:
    """Whether kernels for few rows serve a size best, as by blocks that share keys; they are slow elsewhere, and the
    reverse.

    `has_few_rows` of csrc/table.h is the same in C++.
    """
    p, packed = problem, packed_heads(problem)
    tiles = -(-p.seqlen_q * packed // TILE_ROWS) * (p.heads // packed) * p.batch
    keys = min(p.seqlen_k, p.window_left + p.seqlen_q) if p.window_left >= 0 else p.seqlen_k
    shared = tiles <= most_idle_tiles(target) and keys >= SHARED_KEYS
    return shared or rows_of_a_kv_head(p) <= most_rows(target)
