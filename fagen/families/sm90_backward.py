"""Backward for Hopper: a block a tile of keys, copies by the copy engine (TMA), products by warpgroups (wgmma)."""

from __future__ import annotations

import itertools
import math

from fagen.families.base import Config, Constraint, Family, Knob
from fagen.families.cost import Walk, makespan, walk
from fagen.ops.attention.problem import INTERVAL_KINDS, Problem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v", "-lineinfo")

KNOBS = (
    Knob("tile_m", "kTileM", (64, 128), "rows of q that a block visits at a time"),
    Knob("tile_n", "kTileN", (64, 128, 192), "keys of a block, 64 a warpgroup"),
    Knob("q_stages", "kQStages", (1, 2, 3), "tiles of q in shared memory"),
    Knob("dout_stages", "kDoutStages", (1, 2, 3), "tiles of dO in shared memory"),
    Knob("ds_stages", "kDsStages", (1, 2), "tiles of dS in shared memory"),
    Knob("dq_sink", "kDqSink", ("bulk", "red"), "dQ is added up by the copy engine, or from registers"),
    Knob("dq_owner", "kDqOwner", ("all", "first"), "warpgroups that compute dQ"),
    Knob("row_order", "kRowOrder", ("ascending", "descending", "shifted"), "order of a block's row tiles"),
    Knob(
        "block_order",
        "kBlockOrder",
        ("ascending", "descending", "longest_first", "sectioned"),
        "order of key tiles and heads",
    ),
    Knob("section_mb", "kSectionMb", (16, 32, 64), "megabytes of q, dO and dQ that a section of heads may have"),
)

ROW_BYTES = 128  # of a slab of 64 columns
BARRIER_BYTES = 16  # a full and an empty barrier
SMEM_ALIGNMENT = 1024
PIECE_BYTES = 2048  # 8 columns of 64 rows of dQ in float32
OTHER_REGISTERS = 24  # addresses, bounds, loop state


def _slabs(columns: int) -> int:
    return -(-columns // (ROW_BYTES // 2))


def groups(c: Config) -> int:
    """Warpgroups that compute."""
    return int(c.tile_n) // 64


def _owners(c: Config) -> int:
    return groups(c) if c.dq_owner == "all" else 1


def dq_columns(p: Problem, c: Config) -> int:
    """Columns of dQ that a warpgroup has at a time, as DqShare in sm90/backward/layout.cuh shares them."""
    if int(c.tile_m) // 64 % _owners(c) == 0:
        return p.head_dim_padded
    return -(-_slabs(p.head_dim_padded) // _owners(c)) * 64


def consumer_registers(c: Config) -> int:
    """Of a thread that computes: what the producing warpgroup leaves of the SM's registers."""
    each = 65536 // (128 * (groups(c) + 1)) // 8 * 8
    producer = 32 if groups(c) == 3 else 40
    return min(240, ((groups(c) + 1) * each - producer) // groups(c) // 8 * 8)


def smem_bytes(p: Problem, c: Config) -> int:
    m, n = int(c.tile_m), int(c.tile_n)
    slabs, slabs_v = _slabs(p.head_dim_padded), _slabs(p.head_dim_v_padded)
    tiles = n * (slabs + slabs_v) + c.q_stages * m * slabs + c.dout_stages * m * slabs_v + c.ds_stages * m * groups(c)
    dq = _owners(c) * dq_columns(p, c) // 8 * PIECE_BYTES if c.dq_sink == "bulk" else 0
    stats = 4 * m * (c.q_stages + c.dout_stages)
    bounds = 16 * n + 32 if p.mask == "intervals" else 0
    barriers = BARRIER_BYTES * (2 + c.q_stages + c.dout_stages + groups(c))
    return tiles * ROW_BYTES + dq + stats + bounds + barriers + SMEM_ALIGNMENT


def fragment_registers(p: Problem, c: Config) -> int:
    """dK and dV, and beside them S and dP, or these as operands and dQ."""
    m = int(c.tile_m)
    scores = m + (m // 2 if p.softcap else 0)
    return (p.head_dim_padded + p.head_dim_v_padded) // 2 + max(scores, m // 2 + dq_columns(p, c) // 2)


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    need = smem_bytes(p, c)
    return f"{need} > {t.smem_per_block} bytes of shared memory on {t.arch}" if need > t.smem_per_block else None


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    need, limit = fragment_registers(p, c) + OTHER_REGISTERS, consumer_registers(c)
    return f"about {need} > {limit} registers a thread" if need > limit else None


def _owner_matters(p: Problem, t: Target, c: Config) -> str | None:
    if c.dq_owner == "first" and groups(c) == 1:
        return f"a lone warpgroup (tile_n={c.tile_n}) owns dQ anyway"
    return None


def _sum_is_ordered(p: Problem, t: Target, c: Config) -> str | None:
    if getattr(p, "deterministic", False) and c.dq_sink != "bulk":
        return f"a deterministic dQ is added up in turns, which dq_sink={c.dq_sink} does not take"
    return None


def _order_matters(p: Problem, t: Target, c: Config) -> str | None:
    if p.mask == "none" and c.block_order in ("descending", "longest_first"):
        return f"without a mask all key tiles are equally long, block_order={c.block_order} only repeats another"
    return None


def _section_matters(p: Problem, t: Target, c: Config) -> str | None:
    if c.block_order != "sectioned" and c.section_mb != 32:
        return f"block_order={c.block_order} has no sections, section_mb={c.section_mb} only repeats another"
    return None


CONSTRAINTS = (
    Constraint(
        "smem_fits",
        _smem_fits,
        ("tile_m", "tile_n", "q_stages", "dout_stages", "ds_stages", "dq_sink", "dq_owner"),
    ),
    Constraint("registers_fit", _registers_fit, ("tile_m", "tile_n", "dq_owner")),
    Constraint("owner_matters", _owner_matters, ("tile_n", "dq_owner")),
    Constraint("sum_is_ordered", _sum_is_ordered, ("dq_sink",)),
    Constraint("order_matters", _order_matters, ("block_order",)),
    Constraint("section_matters", _section_matters, ("block_order", "section_mb")),
)


def _supports(p: Problem, t: Target) -> str | None:
    if not t.is_gpu or t.arch != "sm_90":
        return f"needs sm_90 (wgmma), the target is {t.arch}"
    if p.dtype not in ("fp16", "bf16"):
        return f"serves fp16 and bf16, not {p.dtype}"
    if not p.aligned:
        return "the copy engine needs rows that start at multiples of 16 bytes"
    return None


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {"threads": 128 * (groups(c) + 1), "smem_bytes": smem_bytes(p, c), "registers": consumer_registers(c)}


def _context(p: Problem, c: Config) -> dict[str, object]:
    columns = {dq_columns(p, c)}
    gradients = {p.head_dim_padded, p.head_dim_v_padded}
    return {
        "wgmma_type": "bf16" if p.dtype == "bf16" else "f16",
        "shared_products": [(c.tile_m, False, False), *((n, False, True) for n in sorted(columns))],
        "register_products": [(n, True) for n in sorted(gradients)],
    }


def _guesses(p: Problem, t: Target) -> list[Config]:
    return []


def _default(p: Problem, t: Target) -> Config:
    return Config(
        {
            "tile_m": 64, "tile_n": 128, "q_stages": 2, "dout_stages": 2, "ds_stages": 1, "dq_sink": "bulk",
            "dq_owner": "all", "row_order": "ascending", "block_order": "ascending", "section_mb": 32,
        }
    )  # fmt: skip


FAMILY = Family(
    name="sm90_backward",
    template="sm90/backward.cu.j2",
    op="backward",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=_derive,
    default=_default,
    flags=lambda t: ("-gencode=arch=compute_90a,code=sm_90a", *FLAGS),
    context=_context,
    first_configs=_guesses,
    resources=lambda p, t, c: (smem_bytes(p, c), int(c.tile_n), fragment_registers(p, c)),
)
