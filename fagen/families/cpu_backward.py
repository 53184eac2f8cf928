"""Backward for any CPU: OpenMP, vectors as wide as the machine's, accumulation in float32, the same bits each time.

Queries lie along the lanes of vectors for S, dP and dQ, the head dimension for dK and dV: each of the five products
reads one side element by element and broadcasts it, so that neither P nor dS is ever transposed. The work is cut into
parts by the sizes alone, and their sums are added in one order: no result depends on the threads.
"""

from __future__ import annotations

from fagen.families.base import Config, Constraint, Family, Knob
from fagen.families.cost import vector_lanes, walk
from fagen.families.cpu_forward import (
    FLAGS,
    LANES,
    SCRATCH_BYTES,
    VECTOR_REGISTERS,
    block_fits,
    direct_floats,
    whole_groups,
)
from fagen.families.reads import nothing
from fagen.ops.attention.problem import Problem
from fagen.target import Target

_PARTS = (1, 4, 16, 64, 256)
KNOBS = (
    Knob("tile_m", "kTileM", (32, 48, 64, 96, 128), "rows of q and dout of a tile"),
    Knob("tile_n", "kTileN", (32, 64, 128, 256), "keys of a tile"),
    Knob(
        "loop_order", "kLoopOrder", ("q_outer", "kv_outer"), "whose gradients are complete at once; the others are sums"
    ),
    Knob("parts", "kParts", _PARTS, "pieces of work at least; each sums gradients of its own"),
    Knob("schedule", "kSchedule", ("blocked", "dynamic"), "how threads share the parts"),
    Knob("block_rows", "kBlockRows", (4, 6, 8, 12), "rows of a register block"),
    Knob("block_vectors", "kBlockVectors", (2, 3, 4), "vectors of a register block"),
    Knob("packing", "kPacking", ("direct", "tile", "head"), "k and v as contiguous float32; once a visit, once a head"),
)


def _rows_bytes(p: Problem, c: Config) -> int:
    """q and dout of a tile of rows in both orders, LSE and delta: `RowTile` in backward/rows.h."""
    d, dv = p.head_dim_padded, p.head_dim_v_padded
    return 4 * ((d + dv) * (c.tile_m + LANES) + c.tile_m * (d + dv + 2 * LANES + 2))


def _scratch_bytes(p: Problem, c: Config) -> int:
    """`Scratch` in backward/layout.h: cells of a tile, packed keys and values, and what the outer loop holds."""
    d, dv = p.head_dim_padded, p.head_dim_v_padded
    width, of_keys, q_outer = c.tile_m + LANES, d + dv + 2 * LANES, c.loop_order == "q_outer"
    cells = 4 * 2 * c.tile_n * width
    packed = 4 * (c.tile_n if c.packing == "tile" else 1) * of_keys
    rows = _whole_lines(_rows_bytes(p, c)) if q_outer else 64
    dq = 4 * (d if q_outer else 1) * width
    sums = 4 * (1 if q_outer else c.tile_n) * of_keys
    return cells + packed + rows + dq + sums


def _whole_lines(size: int) -> int:
    return -(-size // 64) * 64


def _scratch_fits(p: Problem, t: Target, c: Config) -> str | None:
    need = _scratch_bytes(p, c)
    return f"{need} > {SCRATCH_BYTES} bytes of scratch a thread" if need > SCRATCH_BYTES else None


def _packed_once(p: Problem, t: Target, c: Config) -> str | None:
    if c.loop_order == "kv_outer" and c.packing == "head":
        return "kv_outer visits a tile of keys once a part, so packing=head only repeats tile"
    return None


def _supports(p: Problem, t: Target) -> str | None:
    if t.is_gpu:
        return f"needs a CPU, the target is {t.arch}"
    return p.wider_than(256)


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {"rows_bytes": _whole_lines(_rows_bytes(p, c)), "scratch_bytes": _scratch_bytes(p, c)}


def _make(p: Problem, t: Target, **changes: int | str) -> Config:
    """The default config with changes. Large tiles, as far as they fit; parts for every thread, and to even out."""
    vectors, dims = 4 if t.simd in VECTOR_REGISTERS else 2, p.head_dim_padded + p.head_dim_v_padded
    parts = next((n for n in _PARTS if n >= 2 * t.units), _PARTS[-1])
    values: dict[str, int | str] = {
        "tile_m": 128 if dims <= 256 else 64, "tile_n": 128 if dims <= 128 else 64, "loop_order": "q_outer",
        "parts": parts, "schedule": "dynamic", "block_rows": 6, "block_vectors": vectors,
        "packing": "direct" if p.dtype == "fp32" else "head",
    }  # fmt: skip
    return FAMILY.config(values | changes)


def _seeds(p: Problem, t: Target) -> list[Config]:
    default = _make(p, t)
    packed = "direct" if p.dtype == "fp32" else "tile"
    candidates = [
        _make(p, t, loop_order="kv_outer", packing=packed),
        _make(p, t, loop_order="kv_outer", packing=packed, tile_n=128, tile_m=64),
        _make(p, t, tile_n=64 if default.tile_n == 128 else 128),
        _make(p, t, packing="head"),
        _make(p, t, parts=default.parts * 4 if default.parts < _PARTS[-1] else 1),
    ]
    return [c for c in candidates if c != default and FAMILY.rejects(p, t, c) is None]


def cost(p: Problem, t: Target, c: Config) -> float:
    """Vector operations, roughly: the blocks' products with the loads and stores of their sums, P and dS, packing,
    the sums of the parts, threads that wait for the last one."""
    d, dv, m, n = p.head_dim_padded, p.head_dim_v_padded, int(c.tile_m), int(c.tile_n)
    rows, vectors = int(c.block_rows), int(c.block_vectors)
    lanes = vector_lanes(t)
    feed = 1 + 0.5 * (1 / rows + 1 / vectors) / 2 + max(0.0, 10 - rows * vectors) / 10
    seen = walk(p, m, n)
    last = p.seqlen_q / (seen.row_tiles * m)  # the last tile of rows may be less
    cells = (seen.visits - 0.4 * seen.masked) * m * n * last / lanes  # of a masked tile only what is seen
    of_dq, of_dk = d / n, (d + dv) / m  # a sum is loaded and stored once a tile
    work = cells * ((3 * d + 2 * dv) * feed + 4 * (of_dq + of_dk) + 40)
    heads, group, q_outer = p.batch * p.heads, p.heads // p.kv_heads, c.loop_order == "q_outer"
    tiles = group * seen.row_tiles if q_outer else -(-p.seqlen_k // n)
    parts = max(1, min(tiles, -(-int(c.parts) // (p.batch * p.kv_heads))))
    moved = (d + dv) * p.seqlen_k / lanes * 8
    if c.packing == "tile":
        work += moved * (seen.visits / max(1, -(-p.seqlen_k // n)) if q_outer else 1 / group)
    elif c.packing == "head":
        work += moved / group
    sums = (d + dv) * p.seqlen_k / group if q_outer else d * p.seqlen_q
    work += 40 * sums * parts / lanes + (0 if q_outer else 8 * (2 * d + dv) * p.seqlen_q / lanes)
    pieces = p.batch * p.kv_heads * parts
    rounds = -(-pieces // t.units)  # of pieces that are about equally long
    return heads * work / pieces * (rounds + (0.1 if c.schedule == "dynamic" else 0.2))


FAMILY = Family(
    name="cpu_backward",
    template="cpu/backward.cpp.j2",
    op="backward",
    dtypes=("fp32", "bf16", "fp16"),
    knobs=KNOBS,
    constraints=(
        Constraint("whole_groups", whole_groups),
        Constraint("block_fits", block_fits),
        Constraint("direct_floats", direct_floats),
        Constraint("packed_once", _packed_once),
        Constraint("scratch_fits", _scratch_fits),
    ),
    supports=_supports,
    derive=_derive,
    default=_make,
    default_reads=nothing,
    flags=lambda t: FLAGS,
    first_configs=_seeds,
    cost=cost,
    resources=lambda p, t, c: (_scratch_bytes(p, c),),
)
