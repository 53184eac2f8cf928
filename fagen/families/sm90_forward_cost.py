"""How long a config of sm90_forward takes, roughly: the order in which a search tries what it does not know."""

from __future__ import annotations

import math

from fagen.families.base import Config
from fagen.families.cost import Walk, key_bytes, makespan, split_cycles, walk
from fagen.families.sm90_forward_block import OTHER_REGISTERS, consumer_registers, fragment_registers
from fagen.ops.attention.problem import Problem
from fagen.ops.attention.size_point import packed_heads
from fagen.target import Target


def visit_cycles(p: Problem, c: Config) -> float:
    """Cycles of an SM that a tile of keys takes of a block's rows, when nothing else limits it.

    A warpgroup's rows are 64. S reads q and k from shared memory at 128 bytes a cycle, so that few keys a tile cost
    more than their products. The faster of products and softmax hides under the slower one, the better the more
    warpgroups share the SM.
    """
    d, dv, n, blocks = p.head_dim_padded, p.head_dim_v_padded, int(c.tile_n), int(c.blocks_per_sm)
    groups = int(c.tile_m) // 64
    values = max(n * dv / 32, (64 + dv) * n / 64) + 0.6 * n if c.shared_weights else n * dv / 32
    products, softmax = max(n * d / 32, (64 + n) * d / 64) + values, 4.4 * n
    if groups * blocks == 1:
        exposed, overhead = 1.28 - 0.46 * c.overlap, 350
    else:
        exposed = (0.63 if groups * blocks == 2 else 0.29) - 0.11 * c.overlap - 0.06 * c.ping_pong
        overhead = 85
    visit = max(products, softmax) + exposed * min(products, softmax) + overhead
    visit += 0.54 * dv if c.rescale == "each" else 0  # nothing hides it: O += P V waits for it
    waiting = {1: 460 * (1.6 if c.cluster > 1 else 1.0), 2: 45}.get(int(c.stages), 0)  # for keys and values
    return groups * visit + waiting / blocks


def boundary_cycles(p: Problem, c: Config) -> float:
    """Cycles of an SM that a tile of rows takes beside its tiles of keys."""
    groups, joined = int(c.tile_m) // 64, c.schedule != "single"
    waits = (2900 - 2400 * joined - 300 * (c.q_stages - 1)) / (1 + 0.85 * (int(c.blocks_per_sm) - 1))
    return waits + 2.0 * p.head_dim_v_padded * groups


def _memory_cycles(p: Problem, t: Target, c: Config, seen: Walk, heads: int) -> float:
    """Cycles that memory takes: q, O, keys and values once, and again what of the latter L2 does not hold."""
    keys, kv_heads = key_bytes(p), p.batch * p.kv_heads
    if c.block_order == "longest_first":
        reread = keys
    elif c.block_order == "sectioned":
        reread = min(keys, int(c.section_mb) * 2**20)
    else:  # the heads that all blocks work on at one time
        at_once = math.ceil(t.units * int(c.blocks_per_sm) / max(1, seen.row_tiles) * kv_heads / heads)
        reread = min(keys, keys // kv_heads * at_once)
    columns = (p.head_dim_padded + p.head_dim_v_padded) * p.itemsize
    loads = heads * seen.visits * int(c.tile_n) * columns / int(c.cluster)
    missed = max(0.0, 1 - 0.9 * t.l2 / max(1, reread)) * max(0.0, loads - keys)
    rows = p.batch * p.heads * p.seqlen_q * columns
    return (rows + keys + missed) / (11 * t.units)


def cost(p: Problem, t: Target, c: Config) -> float:
    """Cycles, roughly: visits of tiles of keys, boundaries between tiles of rows, the tail, memory where it is slower.

    The constants are fitted to the eight spaces of GPUs in `benchmarks/spaces/`.
    """
    cluster = int(c.cluster)
    packed = packed_heads(p, int(c.tile_m)) if c.pack_heads else 1
    seen, heads = walk(p, int(c.tile_m) // packed, int(c.tile_n)), p.batch * p.heads // packed
    visit, boundary = visit_cycles(p, c), boundary_cycles(p, c)
    uneven = seen.most * seen.row_tiles > seen.visits
    tail = 0.15 if not uneven or c.block_order in ("longest_first", "sectioned") else 0.36
    teams, pieces = t.units // cluster, heads * -(-seen.row_tiles // cluster)
    work, longest = heads * (seen.visits * visit + seen.row_tiles * boundary), seen.most * visit + boundary
    total = makespan(work / cluster, longest, pieces, teams, tail)
    if c.splits == "keys" and pieces < t.units:
        total = min(total, split_cycles(p, int(c.tile_m), seen.most, visit, boundary, pieces, t.units))
    if c.schedule == "balanced" and uneven:  # some SMs are a little slower than others
        total *= 1.06
    total = (total**6 + _memory_cycles(p, t, c, seen, heads) ** 6) ** (1 / 6)  # nearly the larger of the two
    if c.schedule == "dynamic" and pieces > teams:  # a kernel of its own sets the counter to zero
        total += 6000
    spare = consumer_registers(c) - fragment_registers(p, c)
    return total * (1.5 if spare <= OTHER_REGISTERS else 1)  # such configs are legal, and nearly all of them spill
