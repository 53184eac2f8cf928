"""Backward for Hopper with head dims above 256, up to 1024: a pass each for dQ, dK and dV.

A block owns 64 rows of its gradient, and the other side passes by in chunks. S and dP are computed anew in each pass:
eight products where five would do. But blocks add nothing to what others compute, so that the bits are the same each
time; and neither registers nor shared memory have to hold a tile's dK beside its dV.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from fagen.families.base import Config, Constraint, Family, Knob, Value
from fagen.families.cost import makespan, walk
from fagen.families.reads import Reads
from fagen.families.sm90_forward_large import unsupported
from fagen.ops.attention.measures import AtMost
from fagen.ops.attention.problem import Problem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v", "-lineinfo")

BLOCK_COLUMNS = (256, 384, 512, 640)
STAGES = (2, 3, 4, 5, 6, 7, 8, 10, 12)
KNOBS = (
    Knob("tile_other", "kTileOther", (64, 96, 128, 192, 256), "rows or keys that a block visits at a time"),
    Knob("chunk_d", "kChunkD", (64, 128), "columns of both sides that a stage holds"),
    Knob("stages", "kStages", STAGES, "chunks in shared memory"),
    Knob("in_flight", "kInFlight", (1, 2, 3), "chunks whose products go on while the next one is waited for"),
    Knob("chunks_under", "kChunksUnder", (0, 1, 2, 4), "chunks of dP that are multiplied while P is formed"),
    Knob(
        "resident",
        "kResident",
        ("both", "scores", "none"),
        "what stays in shared memory of a block's own rows: all, what S is made of, or nothing",
    ),
    Knob("block_columns", "kBlockColumns", BLOCK_COLUMNS, "most columns of its gradient that a block adds up"),
    Knob("share_cells", "kShareCells", (False, True), "two blocks that share columns have half of the cells each"),
    Knob("cluster", "kCluster", (1, 2, 4), "blocks of neighbouring rows that share each chunk of the other side"),
    Knob(
        "block_order",
        "kBlockOrder",
        ("ascending", "descending", "longest_first", "sectioned"),
        "order of a block's own tiles and of heads",
    ),
)

OWN_ROWS = 64  # of a block
THREADS = 384  # two warpgroups that compute, one that loads
CONSUMER_REGISTERS = 232
OTHER_REGISTERS = 36  # addresses, the walk, stats: what a thread needs beside its fragments
_SLAB, _ROW_BYTES = 64, 128  # columns of a slab, bytes of its row
_BARRIER_BYTES, _ALIGNMENT = 16, 1024


def _slabs(columns: int) -> int:
    return -(-columns // _SLAB)


class Pass(NamedTuple):
    """What a pass multiplies: columns of q and k, of dO and v (none for dV, whose cells are P), of its gradient."""

    scores: int
    weights: int
    gradient: int
    owns_keys: bool


def passes(p: Problem) -> tuple[Pass, Pass, Pass]:
    """For dQ, dK and dV."""
    d, dv = _SLAB * _slabs(p.head_dim_padded), _SLAB * _slabs(p.head_dim_v_padded)
    return Pass(d, dv, d, False), Pass(d, dv, d, True), Pass(d, 0, dv, True)


def splits(of: Pass, c: Config) -> int:
    """Blocks that share the columns of a gradient; each computes all cells."""
    return -(-_slabs(of.gradient) // (int(c.block_columns) // _SLAB))


def group_columns(of: Pass, c: Config) -> int:
    """Columns that a warpgroup adds up, whole slabs."""
    of_block = -(-_slabs(of.gradient) // splits(of, c))
    return _SLAB * -(-of_block // 2)


def is_shared(of: Pass, c: Config) -> bool:
    """Whether two blocks exchange cells."""
    return bool(c.share_cells) and splits(of, c) == 2


def block_other(of: Pass, c: Config) -> int:
    """Rows of the other side whose cells a block computes."""
    return int(c.tile_other) // (2 if is_shared(of, c) else 1)


def _pair_bytes(of: Pass, c: Config) -> int:
    """A chunk of columns of both sides, or of the other side alone where what is owned stays."""
    streamed = c.resident == "none" or (c.resident == "scores" and of.weights > 0)
    return (block_other(of, c) + (OWN_ROWS if streamed else 0)) * int(c.chunk_d) * 2


def sum_rows(of: Pass, c: Config) -> int:
    """Rows of a chunk that cells are multiplied with: as many as a pair's leaves room for, at least one product's."""
    n, row = int(c.tile_other), 4 * group_columns(of, c)
    most = max(_pair_bytes(of, c), 16 * row)
    return max(rows for rows in range(16, n + 1, 16) if n % rows == 0 and rows * row <= most)


def _stage_bytes(of: Pass, c: Config) -> int:
    return max(_pair_bytes(of, c), sum_rows(of, c) * 4 * group_columns(of, c))


def pass_smem_bytes(of: Pass, c: Config) -> int:
    kept = 0 if c.resident == "none" else of.scores + (of.weights if c.resident == "both" else 0)
    cells = OWN_ROWS * _ROW_BYTES * _slabs(int(c.tile_other))
    stats, barriers = (
        8 * (int(c.tile_other) if of.owns_keys else OWN_ROWS),
        _BARRIER_BYTES * (2 + c.stages + is_shared(of, c)),
    )
    return OWN_ROWS * kept * 2 + c.stages * _stage_bytes(of, c) + cells + stats + barriers + _ALIGNMENT


def smem_bytes(p: Problem, c: Config) -> int:
    return max(pass_smem_bytes(of, c) for of in passes(p))


def fragment_registers(p: Problem, c: Config) -> int:
    """The gradient, S and dP, and under softcap what it did to S."""

    def of_pass(of: Pass) -> int:
        return group_columns(of, c) // 2 + block_other(of, c) // 4 * (1 if not of.weights else 3 if p.softcap else 2)

    return max(of_pass(of) for of in passes(p))


def _chunks_whole(p: Problem, t: Target, c: Config) -> str | None:
    chunk = int(c.chunk_d) // _SLAB
    for slabs in (_slabs(p.head_dim_padded), _slabs(p.head_dim_v_padded)):
        if slabs % chunk:
            return f"{slabs} slabs of 64 columns are no whole chunks of {chunk}"
    return None


def _ring_holds(p: Problem, t: Target, c: Config) -> str | None:
    chunks = passes(p)[0].weights // int(c.chunk_d)
    if c.chunks_under > chunks:
        return f"chunks_under={c.chunks_under} of {chunks} chunks of dP"
    if c.stages <= c.chunks_under + c.in_flight:
        return f"{c.stages} stages are all held: chunks_under={c.chunks_under} in_flight={c.in_flight}"
    return None


def _products_overlap(p: Problem, t: Target, c: Config) -> str | None:
    if c.in_flight == 3 and c.chunks_under == 1:
        return "in_flight=3 behind chunks_under=1: ptxas makes the products wait for each other"
    return None


def _columns_matter(p: Problem, t: Target, c: Config) -> str | None:
    """Fewer blocks' columns that are shared alike only repeat the smaller value."""
    smaller = [n for n in BLOCK_COLUMNS if n < int(c.block_columns)]
    here = [(splits(of, c), group_columns(of, c)) for of in passes(p)]
    for n in smaller:
        other = c.replace(block_columns=n)
        if here == [(splits(of, other), group_columns(of, other)) for of in passes(p)]:
            return f"block_columns={c.block_columns} shares the columns as {n} does"
    return None


def _cells_shared(p: Problem, t: Target, c: Config) -> str | None:
    if not c.share_cells:
        return None
    blocks = {splits(of, c) for of in passes(p)}
    if 2 not in blocks or max(blocks) > 2:
        return f"two blocks share cells, not {' or '.join(map(str, sorted(blocks)))}: block_columns={c.block_columns}"
    if c.cluster > 1:
        return f"blocks that share cells have no chunks to share, cluster={c.cluster}"
    half = int(c.tile_other) // 2
    return f"half of {c.tile_other} is no slab of 64 cells, which is copied as it lies" if half % _SLAB else None


def _order_matters(p: Problem, t: Target, c: Config) -> str | None:
    if p.mask == "none" and c.block_order in ("descending", "longest_first"):
        return f"without a mask all tiles are equally long, block_order={c.block_order} only repeats another"
    return None


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    need = smem_bytes(p, c)
    return f"{need} > {t.smem_per_block} bytes of shared memory on {t.arch}" if need > t.smem_per_block else None


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    need = fragment_registers(p, c) + OTHER_REGISTERS
    return f"about {need} > {CONSUMER_REGISTERS} registers a thread" if need > CONSUMER_REGISTERS else None


_SMEM_READS = ("tile_other", "chunk_d", "stages", "resident", "block_columns", "share_cells")
CONSTRAINTS = (
    Constraint("chunks_whole", _chunks_whole, ("chunk_d",)),
    Constraint("ring_holds", _ring_holds, ("chunk_d", "stages", "in_flight", "chunks_under")),
    Constraint("products_overlap", _products_overlap, ("in_flight", "chunks_under")),
    Constraint("columns_matter", _columns_matter, ("block_columns",)),
    Constraint("cells_shared", _cells_shared, ("tile_other", "block_columns", "share_cells", "cluster")),
    Constraint("order_matters", _order_matters, ("block_order",)),
    Constraint("smem_fits", _smem_fits, _SMEM_READS),
    Constraint("registers_fit", _registers_fit, ("tile_other", "block_columns", "share_cells")),
)


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    dq, dk, dv = passes(p)
    return {
        "threads": THREADS,
        "registers": CONSUMER_REGISTERS,
        "dq_smem_bytes": pass_smem_bytes(dq, c),
        "smem_bytes": pass_smem_bytes(dk, c),
        "dv_smem_bytes": pass_smem_bytes(dv, c),
        "sum_rows": sum_rows(dk, c),
        "dv_sum_rows": sum_rows(dv, c),
    }


def visit_cycles(of: Pass, c: Config) -> float:
    """Cycles, roughly, that a visit takes of a block: counted and fitted as those of sm90_forward_large, whose chunks
    are the same; and ten a row for the cells, of which dP hides four."""
    n, columns, cluster, depth = int(c.tile_other), group_columns(of, c), int(c.cluster), of.scores + of.weights
    cells = block_other(of, c)
    chunks = depth // int(c.chunk_d) + n // sum_rows(of, c)
    products = cells * depth / 32 + n * columns / 16
    read = depth / 8 * (16 + cells / 8) + n / 8 * (16 * -(-columns // 256) + columns / 4)
    shared = (cells * depth + n * 2 * columns) * 2
    kept = {"none": 0, "scores": of.scores, "both": depth}[str(c.resident)]
    alone = OWN_ROWS * (depth - kept) * 2
    free = (c.stages - 1 - c.chunks_under / 2) * _stage_bytes(of, c) / 1024
    visit = max(products, read + (shared + alone) / 128) + 220 * chunks
    visit *= 1 + 0.003 * max(0.0, 96 - free)
    visit += cells * (6 if of.weights and c.chunks_under else 10)
    visit, l2 = visit * (1.1 if cluster == 4 else 1), (shared / cluster + alone) / 24
    return max(visit, l2) + 0.2 * min(visit, l2)


def _block_columns(p: Problem, t: Target) -> list[int]:
    return [n for n in BLOCK_COLUMNS if not _columns_matter(p, t, Config({"block_columns": n}))]


_FEWEST_STAGES, _STAGES_UNDER = 4, 5  # of guesses; from how many on some may be held while P is formed
_MOST_ALONE = 640  # columns up to which defaults share no cells: one block can hold them
_FEW_SEEN = 2048  # rows or keys up to which a mask leaves too little of the long tiles of those that do


def _deepest(p: Problem, t: Target, **values: Value) -> list[Config]:
    """That shape with as many stages as fit, chunks of dP under P if they are many; none if it is not legal."""
    shape: dict[str, Value] = {
        "tile_other": 64, "chunk_d": 64, "stages": 2, "in_flight": 1, "chunks_under": 0, "resident": "none",
        "block_columns": 256, "share_cells": False, "cluster": 1,
        "block_order": "ascending" if p.mask == "none" else "longest_first",
    }  # fmt: skip

    def legal(config: Config) -> bool:
        return not any(constraint.check(p, t, config) for constraint in CONSTRAINTS)

    for stages in reversed(STAGES):
        plain = Config({**shape, **values, "stages": stages})
        if legal(plain):
            under = plain.replace(chunks_under=2)
            found = under if stages >= _STAGES_UNDER and legal(under) else plain
            neighbours = min(p.seqlen_q, p.seqlen_k) > OWN_ROWS and not found.share_cells
            return [found.replace(cluster=2 if neighbours else 1)]
    return []


def _guesses(p: Problem, t: Target, *, share_cells: bool = False) -> list[Config]:
    """The best first, by the cycles of a row and key."""
    tiles = (128, 256) if share_cells else (64, 96, 128, 192)
    shapes = itertools.product(tiles, (64, 128), ("both", "scores", "none"), _block_columns(p, t))
    found = [
        config
        for n, chunk, resident, columns in shapes
        for config in _deepest(
            p, t, tile_other=n, chunk_d=chunk, resident=resident, block_columns=columns, share_cells=share_cells
        )
    ]

    def cycles(c: Config) -> tuple[bool, float]:
        alike = c if share_cells else c.replace(cluster=2)
        of_passes = sum(visit_cycles(of, alike) * splits(of, c) for of in passes(p))
        return c.stages < _FEWEST_STAGES, of_passes / int(c.tile_other)

    return sorted(found, key=cycles)


def _first_configs(p: Problem, t: Target) -> list[Config]:
    """Shared cells as well, where the default does not have them."""
    return [*_guesses(p, t, share_cells=True)[:2], *_guesses(p, t)[:4]]


def _default(p: Problem, t: Target) -> Config:
    """The first guess with registers to spare: nobody has looked at its spills for this very problem. Above 640 columns
    of those that share cells, with a deep ring and no dP under P, unless a mask leaves few cells."""

    def spare(c: Config) -> int:
        return (int(c.tile_other) - 64) // 8 + (20 if p.mask == "intervals" else 0)

    guesses = _guesses(p, t)
    many = p.mask == "none" or min(p.seqlen_q, p.seqlen_k) > _FEW_SEEN
    if max(p.head_dim_padded, p.head_dim_v_padded) > _MOST_ALONE and many:
        shared = (c.replace(chunks_under=0) for c in _guesses(p, t, share_cells=True) if c.stages >= _STAGES_UNDER)
        guesses = [*shared, *guesses]
    roomy = (c for c in guesses if fragment_registers(p, c) + OTHER_REGISTERS + spare(c) <= CONSUMER_REGISTERS)
    return next(roomy, guesses[-1])


def cost(p: Problem, t: Target, c: Config) -> float:
    """Cycles, roughly: of each pass its visits, the boundaries between tiles, the tail."""
    cluster, n = int(c.cluster), int(c.tile_other)
    own, total = OWN_ROWS * cluster, 0.0
    for of in passes(p):
        seen = walk(p, n, own) if of.owns_keys else walk(p, own, n)
        heads = p.batch * (p.kv_heads if of.owns_keys else p.heads) * splits(of, c)
        group = p.heads // p.kv_heads if of.owns_keys else 1
        tiles = -(-(p.seqlen_k if of.owns_keys else p.seqlen_q) // own)
        others = -(-(p.seqlen_q if of.owns_keys else p.seqlen_k) // n)
        visit = visit_cycles(of, c)
        boundary = 4000 + 8.0 * group_columns(of, c) + OWN_ROWS * (of.scores + of.weights) * 2 / 24
        uneven = others * tiles > seen.visits
        tail = 0.15 if not uneven or c.block_order in ("longest_first", "sectioned") else 0.5
        longest = min(others, seen.visits) * group * visit + boundary
        work = heads * (seen.visits * group * visit + tiles * boundary)
        total += makespan(work, longest, heads * tiles, t.units // cluster, tail)
    return total


def _widths(p: Problem, c: Config) -> list[int]:
    """Of the products that a warpgroup adds to its gradients."""
    found = set()
    for of in passes(p):
        slabs = group_columns(of, c) // _SLAB
        first = -(-slabs // -(-slabs // 4))
        found |= {_SLAB * first, _SLAB * (slabs - first)}
    return sorted(found - {0})


FAMILY = Family(
    name="sm90_backward_large",
    template="sm90/backward_large.cu.j2",
    op="backward",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=lambda p, t: unsupported(p, t, "sm90_backward"),
    derive=_derive,
    default=_default,
    default_reads=Reads(lambda p, t: (AtMost("shorter", OWN_ROWS), AtMost("shorter", _FEW_SEEN))),
    flags=lambda t: ("-gencode=arch=compute_90a,code=sm_90a", *FLAGS),
    context=lambda p, c: {
        "wgmma_type": "bf16" if p.dtype == "bf16" else "f16",
        "shared_widths": sorted({block_other(of, c) // 2 for of in passes(p)}),
        "column_widths": _widths(p, c),
        "register_widths": [],
    },
    first_configs=_first_configs,
    repeats=lambda p, c: c.cluster > 1 and min(p.seqlen_q, p.seqlen_k) <= OWN_ROWS * (int(c.cluster) // 2),
    cost=cost,
    resources=lambda p, t, c: (smem_bytes(p, c), c.cluster, fragment_registers(p, c)),
)
