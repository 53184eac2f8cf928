"""Backward for Hopper: a block a tile of keys, copies by the copy engine (TMA), products by warpgroups (wgmma)."""

from __future__ import annotations

import itertools
from typing import Any

from fagen.families.base import Config, Constraint, Family, Knob
from fagen.families.reads import Reads
from fagen.families.sm90_backward_block import (
    OTHER_REGISTERS,
    consumer_registers,
    dq_columns,
    fragment_registers,
    smem_bytes,
)
from fagen.families.sm90_backward_cost import cost
from fagen.ops.attention.measures import AtMost
from fagen.ops.attention.problem import Problem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v", "-lineinfo")

KNOBS = (
    Knob("tile_m", "kTileM", (64, 128), "rows of q that a block visits at a time"),
    Knob("tile_n", "kTileN", (64, 80, 96, 128, 192), "keys of a block"),
    Knob("warpgroups", "kWarpgroups", (1, 2, 3), "warpgroups that compute"),
    Knob("operands", "kOperands", ("registers", "shared"), "P and dS are operands in registers or in shared memory"),
    Knob("v_source", "kVSource", ("shared", "registers"), "where dP = dO V takes v from"),
    Knob("q_stages", "kQStages", (1, 2, 3), "tiles of q in shared memory"),
    Knob("dout_stages", "kDoutStages", (1, 2, 3), "tiles of dO in shared memory"),
    Knob("ds_stages", "kDsStages", (1, 2), "tiles of dS in shared memory"),
    Knob(
        "dv_start",
        "kDvStart",
        ("after_ds", "before_ds", "after_store"),
        "dV is started when dS is formed, under that, or when dS is in shared memory; with operands=shared P is stored "
        "with dS, under that, or before others store dS",
    ),
    Knob("seeds", "kSeeds", ("none", "delta"), "accumulators of dP begin with zero, or with -delta"),
    Knob("exp_on_fma", "kExpOnFma", (0, 1, 2), "of 8 exponentials, those that the FMA pipe computes, by polynomials"),
    Knob("dq_sink", "kDqSink", ("bulk", "red"), "dQ is added up by the copy engine, or from registers"),
    Knob(
        "dq_rounding",
        "kDqRounding",
        ("last_block", "own_kernel"),
        "who rounds the sums of dQ: the block that adds the last part, or a kernel after all of them",
    ),
    Knob(
        "dq_owner",
        "kDqOwner",
        ("all", "first", "loader"),
        "who computes dQ: all warpgroups that compute, the first of them, or the one that loads tiles",
    ),
    Knob("row_order", "kRowOrder", ("ascending", "descending", "shifted"), "order of a block's row tiles"),
    Knob(
        "block_order",
        "kBlockOrder",
        ("ascending", "descending", "longest_first", "sectioned"),
        "order of key tiles and heads",
    ),
    Knob("section_mb", "kSectionMb", (16, 32, 64), "megabytes of q, dO and dQ that a section of heads may have"),
)


def _shape_fits(p: Problem, t: Target, c: Config) -> str | None:
    m, n, groups = int(c.tile_m), int(c.tile_n), int(c.warpgroups)
    if c.operands == "registers" and n != 64 * groups:
        return f"a warpgroup has 64 keys of its own with operands=registers, not {n} / {groups}"
    if c.operands == "shared" and m != 64:
        return f"operands=shared takes 64 rows at a time, not {m}"
    if c.operands == "shared" and n % (8 * groups):
        return f"a warpgroup takes whole 8 keys, not {n} / {groups}"
    if c.operands == "shared" and p.dropout and n % (16 * groups):
        return f"dropout takes keys by 16, not {n} / {groups}"
    if c.operands == "shared" and c.v_source != "shared":
        return f"operands=shared leaves no registers for v, v_source={c.v_source}"
    return None


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    need = smem_bytes(p, c)
    return f"{need} > {t.smem_per_block} bytes of shared memory on {t.arch}" if need > t.smem_per_block else None


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    need, limit = fragment_registers(p, c) + OTHER_REGISTERS, consumer_registers(c)
    return f"about {need} > {limit} registers a thread" if need > limit else None


def _seeds_fit(p: Problem, t: Target, c: Config) -> str | None:
    if p.dropout and c.seeds != "none":
        return f"dropout scales dP before delta is subtracted, seeds={c.seeds}"
    return None


def _owner_matters(p: Problem, t: Target, c: Config) -> str | None:
    if c.dq_owner == "first" and c.warpgroups == 1:
        return "a lone warpgroup owns dQ anyway"
    return None


def _loader_can(p: Problem, t: Target, c: Config) -> str | None:
    """It has registers for half a slab of dQ and nothing else, and loads a visit before it computes the one before."""
    if c.dq_owner != "loader":
        return None
    if c.operands != "registers" or c.warpgroups != 2:
        return f"the loader serves two warpgroups with operands=registers, not {c.warpgroups} with {c.operands}"
    if c.dq_sink != "red" or c.dq_rounding != "own_kernel":
        return "the loader adds dQ from registers, and leaves rounding to a kernel of its own"
    if c.q_stages == 1 or c.dout_stages == 1:
        return "the loader loads ahead, which takes two stages of q and of dO"
    return None


def _sum_is_ordered(p: Problem, t: Target, c: Config) -> str | None:
    if getattr(p, "deterministic", False) and c.dq_owner == "loader":
        return "a deterministic dQ is added up in turns, which the loader does not wait for"
    return None


def _last_is_known(p: Problem, t: Target, c: Config) -> str | None:
    if c.dq_rounding != "last_block":
        return None
    if c.dq_sink != "bulk":
        return f"when sums from registers have arrived is not known, dq_sink={c.dq_sink}"
    if p.mask == "intervals":
        return "how many blocks intervals leave to add to a row tile is not known"
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
    Constraint("shape_fits", _shape_fits, ("tile_m", "tile_n", "warpgroups", "operands", "v_source", "dv_start")),
    Constraint(
        "smem_fits",
        _smem_fits,
        (
            "tile_m",
            "tile_n",
            "warpgroups",
            "operands",
            "q_stages",
            "dout_stages",
            "ds_stages",
            "dq_sink",
            "dq_rounding",
            "dq_owner",
        ),
    ),
    Constraint(
        "registers_fit",
        _registers_fit,
        ("tile_m", "tile_n", "warpgroups", "operands", "v_source", "dv_start", "dq_rounding", "dq_owner"),
    ),
    Constraint("seeds_fit", _seeds_fit, ("seeds",)),
    Constraint("owner_matters", _owner_matters, ("warpgroups", "dq_owner")),
    Constraint(
        "loader_can",
        _loader_can,
        ("warpgroups", "operands", "q_stages", "dout_stages", "dq_sink", "dq_rounding", "dq_owner"),
    ),
    Constraint("sum_is_ordered", _sum_is_ordered, ("dq_owner",)),
    Constraint("last_is_known", _last_is_known, ("dq_rounding", "dq_sink")),
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
    return p.wider_than(256)


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {
        "threads": 128 * (int(c.warpgroups) + 1),
        "smem_bytes": smem_bytes(p, c),
        "registers": consumer_registers(c),
    }


def _context(p: Problem, c: Config) -> dict[str, Any]:
    """The products that the kernel needs: (columns, whether a and b are transposed), and those with a in registers."""
    gradients: list[tuple[int, bool]] = []
    products = {(dq_columns(p, c), False, True)}  # dQ = dS K
    if c.operands == "shared":
        products |= {(int(c.tile_n) // int(c.warpgroups), False, False), (int(c.tile_n), True, True)}
    else:
        products.add((int(c.tile_m), False, False))
        gradients = [(d, True) for d in sorted({p.head_dim_padded, p.head_dim_v_padded})]
        gradients += [(int(c.tile_m), False)] if c.v_source == "registers" else []
    return {
        "wgmma_type": "bf16" if p.dtype == "bf16" else "f16",
        "shared_products": sorted(products),
        "register_products": gradients,
    }


# (operands, tile_m, tile_n, warpgroups, q_stages, dout_stages, ds_stages, dq_owner) by the larger head dim, best first.
_Tile = tuple[str, int, int, int, int, int, int, str]
_TILES: tuple[tuple[int, tuple[_Tile, ...]], ...] = (
    (
        64,
        (
            ("registers", 128, 128, 2, 3, 3, 2, "loader"), ("registers", 128, 128, 2, 2, 2, 2, "all"),
            ("registers", 64, 192, 3, 2, 2, 2, "all"), ("registers", 64, 128, 2, 2, 2, 2, "all"),
        ),
    ),
    (
        96,
        (
            ("registers", 64, 128, 2, 3, 3, 1, "loader"), ("registers", 64, 128, 2, 2, 2, 2, "all"),
            ("registers", 64, 128, 2, 2, 1, 1, "all"), ("shared", 64, 128, 2, 2, 1, 1, "all"),
        ),
    ),
    (
        128,
        (
            ("registers", 64, 128, 2, 2, 2, 2, "all"), ("registers", 64, 128, 2, 2, 1, 2, "all"),
            ("registers", 64, 128, 2, 2, 1, 1, "all"), ("shared", 64, 128, 2, 2, 1, 1, "all"),
        ),
    ),
    (
        192,
        (
            ("shared", 64, 96, 3, 2, 2, 2, "all"), ("shared", 64, 96, 3, 2, 1, 2, "all"),
            ("shared", 64, 96, 3, 2, 1, 1, "all"), ("shared", 64, 96, 3, 1, 1, 1, "all"),
            ("shared", 64, 96, 2, 2, 1, 1, "all"),
        ),
    ),
    (
        256,
        (
            ("shared", 64, 80, 2, 2, 1, 1, "all"), ("shared", 64, 80, 2, 1, 1, 1, "all"),
            ("shared", 64, 64, 2, 2, 1, 1, "all"),
        ),
    ),
)  # fmt: skip
_SMALLEST: tuple[_Tile, ...] = (("shared", 64, 64, 2, 1, 1, 1, "all"),)  # fits every problem


def _order_of_visit(p: Problem, operands: str, tile_m: int, dq_owner: str) -> tuple[str, str, int]:
    """dv_start, seeds and exp_on_fma: the fastest of each head dim on an H200."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    if operands == "shared":
        seeds = "none" if p.dropout else "delta"
        return ("before_ds", seeds, 0) if size <= 192 else ("after_ds", seeds, 1)
    if dq_owner == "loader" or size > 64:
        return "after_store", "none", 0
    if p.mask == "intervals" and tile_m > 64:  # their bounds and 128 rows leave no registers for more
        return "after_store", "none", 0
    return "after_store", "none" if p.dropout else "delta", 1


_ONE_KEY_TILE = AtMost("keys", 128)


def _default_reads(p: Problem, t: Target) -> tuple[AtMost, ...]:
    """A block that has all keys stores dQ from registers, which the loader cannot."""
    has_loader = max(p.head_dim_padded, p.head_dim_v_padded) <= 96 and not getattr(p, "deterministic", False)
    return (_ONE_KEY_TILE,) if has_loader and p.mask != "intervals" else ()


def _guesses(p: Problem, t: Target) -> list[Config]:
    """Legal ones, the best first: the tiles with each sink of dQ, in two orders of blocks."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    tiles = next(tiles for limit, tiles in _TILES if size <= limit)
    if any(test.holds(p, t) for test in _default_reads(p, t)):
        tiles = tuple(sorted(tiles, key=lambda tile: tile[-1] == "loader"))
    orders: tuple[str, ...] = ("ascending", "sectioned") if p.mask == "none" else ("sectioned", "longest_first")
    rows, same_bits = "ascending", getattr(p, "deterministic", False)
    if p.mask == "intervals":  # packed sequences: the rows that all heads are at are few, and fit L2
        orders = orders[::-1]
    if same_bits and p.mask == "intervals":
        rows = "descending"
    elif same_bits and p.mask != "none":  # key tiles must come to a row tile in the order of their turns
        orders = ("descending", *orders)
    sinks = ("red", "bulk") if size > 128 else ("bulk", "red")  # a large head leaves no room for a stage of dQ
    held = 64 < size <= 96  # there V fits in registers
    found = []
    roundings = ("own_kernel", "last_block")
    for order, sink, tile, rounding in itertools.product(orders, sinks, (*tiles, *_SMALLEST), roundings):
        operands, m, n, warpgroups, q_stages, dout_stages, ds_stages, dq_owner = tile
        dv_start, seeds, exp_on_fma = _order_of_visit(p, operands, m, dq_owner)
        config = Config(
            {
                "tile_m": m, "tile_n": n, "warpgroups": warpgroups, "operands": operands,
                "v_source": "registers" if held and operands == "registers" else "shared",
                "q_stages": q_stages, "dout_stages": dout_stages, "ds_stages": ds_stages,
                "dq_sink": "red" if dq_owner == "loader" else sink, "dq_rounding": rounding,
                "dv_start": dv_start, "dq_owner": dq_owner, "row_order": rows,
                "block_order": order, "section_mb": 32, "seeds": seeds, "exp_on_fma": exp_on_fma,
            }
        )  # fmt: skip
        if not any(constraint.check(p, t, config) for constraint in CONSTRAINTS):
            found.append(config)
    return list(dict.fromkeys(found))


def _default(p: Problem, t: Target) -> Config:
    """The first guess with registers to spare: intervals take some beside a large head, and those that may hide other
    rows than the first and the last beside many rows, as dropout does."""
    guesses = _guesses(p, t)

    def spare(c: Config) -> int:
        hides_within = p.intervals in ("lower2", "both4") and c.tile_m == 128
        of_mask = 16 if p.mask == "intervals" and (p.head_dim_padded > 192 or hides_within) else 0
        return OTHER_REGISTERS + of_mask + (24 if p.dropout and c.tile_m == 128 else 0)

    roomy = (c for c in guesses if fragment_registers(p, c) + spare(c) <= consumer_registers(c))
    return next(roomy, guesses[-1])


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
    default_reads=Reads(_default_reads),
    flags=lambda t: ("-gencode=arch=compute_90a,code=sm_90a", *FLAGS),
    context=_context,
    first_configs=_guesses,
    cost=cost,
    resources=lambda p, t, c: (smem_bytes(p, c), int(c.tile_n), fragment_registers(p, c)),
)
