"""Decode for any CPU: OpenMP, vectors as wide as the machine's, accumulation in float32.

Columns of head_dim lie along the lanes of vectors, so that a row of the cache is read where it lies, in any page, and
converted once for a few rows of q. Rows of q that share a kv head are packed. Keys are split over pieces of work that
are about equally long, whatever the lengths of the sequences are.
"""

from __future__ import annotations

from fagen.families.base import Config, Constraint, Family, Knob
from fagen.families.cpu_forward import FLAGS
from fagen.families.reads import nothing
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.ops.attention.problem import Problem
from fagen.target import Target

KNOBS = (
    Knob("tile_n", "kTileN", (16, 32, 64, 128, 256), "keys of a tile"),
    Knob("tile_rows", "kTileRows", (8, 16, 32, 64), "rows of q, of all heads of a group, that share a tile of keys"),
    Knob("block_rows", "kBlockRows", (1, 2, 4), "rows of a register block"),
    Knob("packing", "kPacking", ("direct", "tile"), "k and v as float32 in scratch, once a tile"),
    Knob("prefetch", "kPrefetch", (False, True), "a tile's values are fetched while its scores are computed"),
    Knob("pieces", "kPieces", (16, 32, 64, 128), "pieces of work of a call, about; more than threads, to balance them"),
    Knob("least_keys", "kLeastKeys", (128, 256, 512, 1024), "keys of a split, at least"),
)
SCRATCH_BYTES = 1 << 20  # half of the smallest usual stack of a thread


def scratch_bytes(p: Problem | DecodeProblem, c: Config) -> int:
    """`Scratch` of the template: q, O, scores, packed keys and values, states, pointers."""
    dims, keys, rows = p.head_dim_padded + p.head_dim_v_padded, int(c.tile_n), int(c.tile_rows)
    size = 4 * (rows * (dims + keys) + keys * dims) + 8 * rows + 8 * 4 * keys
    return -(-size // 64) * 64


def _scratch_fits(p: DecodeProblem, t: Target, c: Config) -> str | None:
    need = scratch_bytes(p, c)
    return f"{need} > {SCRATCH_BYTES} bytes of scratch a thread" if need > SCRATCH_BYTES else None


def _direct_floats(p: DecodeProblem, t: Target, c: Config) -> str | None:
    if c.packing == "tile" and p.dtype == "fp32" and not p.kv_dtype:
        return "a cache of float32 needs no conversion"
    return None


def _whole_splits(p: DecodeProblem, t: Target, c: Config) -> str | None:
    if c.least_keys < c.tile_n:
        return f"splits of {c.least_keys} keys are less than a tile of {c.tile_n}"
    return None


def default(p: Problem | DecodeProblem, t: Target) -> Config:
    large = p.head_dim_padded + p.head_dim_v_padded > 512
    return FAMILY.config({
        "tile_n": 64, "tile_rows": 16 if large else 32, "block_rows": 2 if p.dtype == "fp32" else 4,
        "packing": "direct", "prefetch": True, "pieces": 32, "least_keys": 256,
    })  # fmt: skip


def _supports(p: DecodeProblem, t: Target) -> str | None:
    return f"needs a CPU, the target is {t.arch}" if t.is_gpu else None


FAMILY = Family(
    name="cpu_decode",
    template="cpu/decode.cpp.j2",
    op="decode",
    dtypes=("fp32", "bf16", "fp16"),
    knobs=KNOBS,
    constraints=(
        Constraint("direct_floats", _direct_floats, ("packing",)),
        Constraint("whole_splits", _whole_splits, ("least_keys", "tile_n")),
        Constraint("scratch_fits", _scratch_fits, ("tile_n", "tile_rows")),
    ),
    supports=_supports,
    derive=lambda p, t, c: {"scratch_bytes": scratch_bytes(p, c)},
    default=default,
    default_reads=nothing,
    flags=lambda t: FLAGS,
    resources=lambda p, t, c: (scratch_bytes(p, c),),
)
