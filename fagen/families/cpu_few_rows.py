"""Few rows on many keys for any CPU: a step of decoding by `fagen.attention`.

`cpu_forward` has rows of q along the lanes of vectors, which a few rows leave empty. This is `cpu_decode` on a plain
tensor: columns lie along the lanes, rows of the heads that share keys are packed, and keys are split over the threads.
"""

from __future__ import annotations

from fagen.families import cpu_decode
from fagen.families.base import Config, Constraint, Family
from fagen.families.cost import makespan, vector_lanes
from fagen.families.cpu_forward import FLAGS
from fagen.families.reads import Reads
from fagen.ops.attention.measures import AtMost
from fagen.ops.attention.problem import Problem
from fagen.ops.attention.size_point import ROWS_OF_CPU, rows_of_a_kv_head
from fagen.target import Target

CONVERSION = {"fp32": 1, "bf16": 2, "fp16": 6}  # instructions to read a vector of k or v as float32


def _supports(p: Problem, t: Target) -> str | None:
    if t.is_gpu:
        return f"needs a CPU, the target is {t.arch}"
    for wanted, name in ((p.mask == "intervals", "column intervals"), (p.alibi, "ALiBi"), (p.dropout, "dropout")):
        if wanted:
            return f"has no {name}"
    return None


def _direct_floats(p: Problem, t: Target, c: Config) -> str | None:
    return "k and v of float32 need no conversion" if c.packing == "tile" and p.dtype == "fp32" else None


def _suits(p: Problem) -> bool:
    return rows_of_a_kv_head(p) <= ROWS_OF_CPU


def _default(p: Problem, t: Target) -> Config:
    config = cpu_decode.default(p, t)
    return config.replace(packing="tile") if p.dtype == "fp16" else config  # whose conversion is many instructions


def cost(p: Problem, t: Target, c: Config) -> float:
    """Vector operations, roughly: rows of k and v read, converted and multiplied, the softmax, rescaling O once a tile,
    merging what splits leave, threads that wait for the last one."""
    columns, rows = p.head_dim_padded + p.head_dim_v_padded, rows_of_a_kv_head(p)
    lanes, keys = vector_lanes(t), p.seqlen_k
    tile_rows, tiles = min(rows, int(c.tile_rows)), -(-rows // int(c.tile_rows))
    blocks = -(-tile_rows // int(c.block_rows))
    reads = CONVERSION[p.dtype] * blocks if c.packing == "direct" else CONVERSION[p.dtype] + 1 + blocks
    rescaled = -(-keys // int(c.tile_n)) * tile_rows * p.head_dim_v_padded / lanes
    unit = keys * columns / lanes * (reads + tile_rows) + tile_rows * keys / lanes * 14 + 2 * rescaled
    unit *= 1 if c.prefetch else 1.02
    units = p.batch * p.kv_heads * tiles
    split_keys = max(-(-keys * units // int(c.pieces)), int(c.least_keys))
    splits = -(-keys // split_keys)
    merge = 4 * splits * tile_rows * p.head_dim_v_padded / lanes if splits > 1 else 0.0
    return makespan(units * (unit + merge), (unit + merge) / splits, units * splits, t.units, 0.5)


FAMILY = Family(
    name="cpu_few_rows",
    template="cpu/few_rows.cpp.j2",
    op="forward",
    dtypes=cpu_decode.FAMILY.dtypes,
    knobs=cpu_decode.KNOBS,
    constraints=(
        Constraint("direct_floats", _direct_floats, ("packing",)),
        *(c for c in cpu_decode.FAMILY.constraints if c.name != "direct_floats"),
    ),
    supports=_supports,
    derive=lambda p, t, c: {"scratch_bytes": cpu_decode.scratch_bytes(p, c)},
    default=_default,
    default_reads=Reads(lambda p, t: (AtMost("few_rows"),)),
    flags=lambda t: FLAGS,
    cost=cost,
    resources=lambda p, t, c: (cpu_decode.scratch_bytes(p, c),),
    suits=_suits,
)
