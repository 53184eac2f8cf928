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
# Architectures with kernels that pack heads: a record of heads that share no keys knows nothing of it.
PACKING = ("sm_90",)
TILE_ROWS, MOST_PACKED, IDLE_SHARE, SHARED_KEYS = 64, 64, 0.7, 768


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


def packed_heads(problem: Problem, tile: int) -> int:
    """How many heads a tile of so many rows packs: of those that share keys, as many as divide them and fit in it, if
    the tiles are no more than a sixteenth beyond the fewest. A tile has whole rows of q.

    `packed_heads` of csrc/table.h and of the kernels are the same in C++.
    """
    group = problem.heads // problem.kv_heads
    best, fewest = 1, packed_tiles(problem, tile, 1)
    for packed in range(2, min(group, MOST_PACKED) + 1):
        if group % packed == 0:
            tiles = packed_tiles(problem, tile, packed)
            fewest = min(fewest, tiles)
            best = packed if 16 * tiles <= 17 * fewest else best
    return best


def packed_tiles(problem: Problem, tile: int, packed: int) -> int:
    """Tiles of rows of the heads that share keys."""
    return -(-problem.seqlen_q // (tile // packed)) * (problem.heads // problem.kv_heads // packed)


def regime(problem: Problem, target: Target) -> int:
    """Few rows: 1; heads that share keys, where kernels may lay their rows in one tile: 2.

    `FewRows::regime` of csrc/table.h is the same in C++.
    """
    return has_few_rows(problem, target) + 2 * shares_keys(problem, target)


def shares_keys(problem: Problem, target: Target) -> bool:
    return packs(target) and problem.heads > problem.kv_heads


def packs(target: Target) -> bool:
    return target.arch in PACKING


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
    p = problem
    tiles = packed_tiles(p, TILE_ROWS, packed_heads(p, TILE_ROWS)) * p.kv_heads * p.batch
    keys = min(p.seqlen_k, p.window_left + p.seqlen_q) if p.window_left >= 0 else p.seqlen_k
    shared = tiles <= most_idle_tiles(target) and keys >= SHARED_KEYS
    return shared or rows_of_a_kv_head(p) <= most_rows(target)
