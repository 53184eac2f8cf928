"""How long a config of sm90_backward takes, roughly: the order in which a search tries what it does not know."""

from __future__ import annotations

import math

from fagen.families.base import Config
from fagen.families.cost import makespan, walk
from fagen.families.sm90_backward_block import PIECE_BYTES, dq_owners, tile_bytes
from fagen.ops.attention.problem import Problem
from fagen.target import Target

LOADER_CYCLES = 900  # from a product of the loader to the next one, beside those of the consumers
DRAIN_CYCLES = 5000  # from a part of dQ that a drain warp adds to the next, where it rounds the sum as well
SUM_BYTES = 17.6  # float32 that an SM adds to memory a cycle, about 30 GB/s


def _visit_cycles(p: Problem, c: Config) -> float:
    """Cycles of an SM that a visit of a row tile takes: products, and what they move through shared memory."""
    d, dv, m, n, groups = p.head_dim_padded, p.head_dim_v_padded, int(c.tile_m), int(c.tile_n), int(c.warpgroups)
    products = 2 * m * n * (3 * d + 2 * dv) / 4096
    rows, keys = m * (d + dv) * 2, n * (d + dv) * 2
    if c.operands == "registers":  # each warpgroup reads all rows, twice
        moved = keys + 2 * groups * rows + m * n * 2 * (1 + dq_owners(c)) + n * d * 2
    else:  # scores: all rows and some keys; gradients: P and dS, and some columns of the rows
        moved = groups * rows + keys + rows + m * n * 4 * (1 + groups) + groups * m * n * 2 + n * d * 2
    moved -= n * dv * 2 if c.v_source == "registers" else 0
    moved += rows + (m * d * 8 if c.dq_sink == "bulk" else 0)
    softmax = 5 * m * n / 128 + m * n / 16
    busiest = max(products, moved / 128, m * d * 4 / SUM_BYTES)
    waiting = 500 * (c.q_stages == 1) + 200 * (c.dout_stages == 1) + 100 * (c.ds_stages == 1)
    exposed = (0.65 if groups > 1 else 0.9) - 0.1 * (c.dv_start == "before_ds")
    if c.dq_sink == "red" and c.operands == "registers" and c.dq_owner != "loader":
        waiting += m * d / 12  # all wait for each other a visit long, those that add dQ as well
    if c.dq_sink == "bulk" and c.operands == "shared":
        waiting += m * d / 40
    alone = p.seqlen_k <= n and c.operands == "registers"  # one key tile: its dQ is no part of a sum
    if c.dq_rounding == "last_block" and not alone:  # the drain warp waits for sums, counts and looks
        chunks = -(-d // (64 * dq_owners(c))) if c.operands == "shared" else 1
        busiest = max(busiest, DRAIN_CYCLES * chunks)
    if c.dq_owner == "loader":  # consumers come out of step; it takes dQ by 64 rows of 32 columns, one after another
        return max(busiest + softmax * 0.3 + 250 + waiting, LOADER_CYCLES * (m // 64) * -(-d // 32))
    return busiest + softmax * exposed + 250 + waiting + 200 * (c.dq_owner == "first")


def _helper_cycles(p: Problem, t: Target, c: Config) -> float:
    """Before and after the products of all blocks: rows are prepared, dQ is rounded."""
    d, dv, rows = p.head_dim_padded, p.head_dim_v_padded, p.batch * p.heads * p.seqlen_q
    prepared, rounded = rows * (4 * dv + 4 * d), rows * 6 * d
    memory = 11.6 * t.units  # bytes a cycle
    return 2000 + prepared / memory + (2000 + rounded / memory if c.dq_rounding == "own_kernel" else 0)


def splits(p: Problem, c: Config) -> tuple[int, ...]:
    """How many blocks may share a key tile's visits: all of dK and dV must find room where the tiles were."""
    n, groups = int(c.tile_n), int(c.warpgroups)

    def units(columns: int) -> int:
        return -(-columns // (64 * groups)) if c.operands == "shared" else -(-columns // 32)

    pieces = n // 8 if c.operands == "shared" else 4
    summed = groups * (units(p.head_dim_padded) + units(p.head_dim_v_padded)) * pieces * PIECE_BYTES
    return (1, 2, 4, 8) if summed <= tile_bytes(p, c) else (1,)


def cost(p: Problem, t: Target, c: Config) -> float:
    """Cycles, roughly: visits of row tiles, a block's beginning and end, the tail. Blocks share the visits of a key
    tile where that is faster; how many do is the launch's choice, by a model of its own (sm90/backward/splits.cuh)."""
    seen, group, n = walk(p, int(c.tile_m), int(c.tile_n)), p.heads // p.kv_heads, int(c.tile_n)
    key_tiles, columns = -(-p.seqlen_k // n), p.head_dim_padded + p.head_dim_v_padded
    pieces, visit = key_tiles * p.kv_heads * p.batch, _visit_cycles(p, c)
    uneven = seen.masked > 0 and p.mask != "none"
    tail = 0.36 if uneven and c.block_order in ("ascending", "descending") else 0.15
    work = seen.visits * p.heads * p.batch * visit
    least = math.inf
    for sharing in splits(p, c):
        boundary = 2500 + 4.0 * columns + (2500 + 0.12 * n * columns * (sharing - 1) / sharing if sharing > 1 else 0)
        longest = -(-min(seen.row_tiles, seen.visits) * group // sharing) * visit + boundary
        blocks = pieces * sharing
        least = min(least, makespan(work + blocks * boundary, longest, blocks, t.units, tail))
    return _helper_cycles(p, t, c) + least
