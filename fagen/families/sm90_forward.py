"""Forward for Hopper: copies by the copy engine (TMA), products by warpgroups (wgmma), warps that only feed them."""

from __future__ import annotations

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob
from fagen.families.reads import Reads
from fagen.families.sm90_forward_block import (
    FEWEST_REGISTERS,
    OTHER_REGISTERS,
    consumer_registers,
    fragment_registers,
    registers_each,
    smem_bytes,
)
from fagen.families.sm90_forward_cost import cost
from fagen.families.sm90_forward_default import default, default_reads, guesses
from fagen.ops.attention.problem import Problem
from fagen.ops.attention.size_point import packed_heads, packed_tiles
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v", "-lineinfo")

KNOBS = (
    Knob("tile_m", "kTileM", (64, 128, 192), "rows of q a block works on, 64 a warpgroup"),
    Knob("tile_n", "kTileN", tuple(range(32, 209, 16)), "keys of a tile"),
    Knob("stages", "kStages", (1, 2, 3, 4), "tiles of keys, and of values, in shared memory"),
    Knob("q_stages", "kQStages", (1, 2), "tiles of q in shared memory"),
    Knob("overlap", "kOverlap", (False, True), "add up O under the softmax of the next tile"),
    Knob("rescale", "kRescale", ("each", "deferred"), "when O follows a grown maximum"),
    Knob("ping_pong", "kPingPong", (False, True), "warpgroups take turns at starting products"),
    Knob("blocks_per_sm", "kBlocksPerSm", (1, 2, 3), "blocks that share an SM"),
    Knob(
        "schedule",
        "kSchedule",
        ("single", "balanced", "dynamic"),
        "a block takes a tile of rows, a share, or what is next",
    ),
    Knob(
        "block_order",
        "kBlockOrder",
        ("ascending", "descending", "longest_first", "sectioned"),
        "order of row tiles and heads",
    ),
    Knob("section_mb", "kSectionMb", (16, 32, 64), "megabytes of keys and values that a section of heads may have"),
    Knob("cluster", "kCluster", (1, 2), "blocks that share each tile of keys and values", implied_by_old_records=1),
    Knob(
        "shared_weights",
        "kSharedWeights",
        (False, True),
        "P goes by shared memory, not registers",
        implied_by_old_records=False,
    ),
    Knob(
        "pack_heads",
        "kPackHeads",
        (False, True),
        "rows of heads that share keys go into one tile",
        implied_by_old_records=False,
    ),
    Knob(
        "splits",
        "",
        ("none", "keys"),
        "whether blocks share the keys of a tile of rows where few tiles leave SMs idle; the launch decides how many",
        implied_by_old_records="none",
    ),
)


def _section_matters(p: Problem, t: Target, c: Config) -> str | None:
    if c.block_order != "sectioned" and c.section_mb != 32:
        return f"block_order={c.block_order} has no sections, section_mb={c.section_mb} only repeats another"
    return None


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    need, blocks = smem_bytes(p, c), c.blocks_per_sm
    if need > t.smem_per_block:
        return f"{need} > {t.smem_per_block} bytes of shared memory on {t.arch}"
    if blocks * (need + 1024) > t.smem_per_unit:
        return f"{blocks} blocks x {need + 1024} > {t.smem_per_unit} bytes of shared memory an SM"
    return None


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    need, limit = fragment_registers(p, c) + OTHER_REGISTERS, consumer_registers(c)
    return f"about {need} > {limit} registers a thread" if need > limit else None


def _product_fits(p: Problem, t: Target, c: Config) -> str | None:
    need, each = max(int(c.tile_n), p.head_dim_v_padded) // 2 + 30, registers_each(c)
    if each <= FEWEST_REGISTERS:
        return f"compiled for {each} <= {FEWEST_REGISTERS} registers a thread, ptxas makes products wait for each other"
    return f"a product takes {need} > {each} registers that the block is compiled for" if need > each else None


def _single_has_one(p: Problem, t: Target, c: Config) -> str | None:
    if c.schedule == "single" and c.q_stages > 1:
        return "a block that takes a single tile of rows has no second one to load"
    return None


def _turns_need_others(p: Problem, t: Target, c: Config) -> str | None:
    if c.ping_pong and c.tile_m == 64:
        return "a lone warpgroup (tile_m=64) has nobody to take turns with"
    return None


def _sharing_fits(p: Problem, t: Target, c: Config) -> str | None:
    if c.cluster == 1:
        return None
    if p.mask != "none":
        return f"blocks that share keys (cluster={c.cluster}) must see the same, mask={p.mask} lets each see others"
    if c.schedule == "dynamic":
        return f"blocks that share keys (cluster={c.cluster}) must agree on what comes next, schedule=dynamic"
    if c.blocks_per_sm > 1:
        return f"blocks that share keys (cluster={c.cluster}) have an SM each, blocks_per_sm={c.blocks_per_sm}"
    return None


def _packing_fits(p: Problem, t: Target, c: Config) -> str | None:
    if c.pack_heads and (p.alibi or p.dropout or p.mask == "intervals"):
        what = "alibi" if p.alibi else "dropout" if p.dropout else "mask=intervals"
        return f"{what} may differ from row to row of a tile with pack_heads"
    return None


def _splitting_fits(p: Problem, t: Target, c: Config) -> str | None:
    if c.splits == "none":
        return None
    if p.mask == "intervals":
        return "the keys of a tile of rows are chosen by its intervals, and are not split"
    if c.schedule != "single":
        return f"blocks that share keys take a single tile of rows, schedule={c.schedule}"
    if c.cluster > 1:
        return f"blocks that share rows (splits=keys) see other keys, cluster={c.cluster} has them load the same"
    if c.block_order != "ascending":
        return f"blocks that share keys all run at once, block_order={c.block_order} only repeats another"
    return None


_MOST_UNITS = 512  # blocks that any GPU runs at once, about


def _repeats(p: Problem, c: Config) -> bool:
    packed = packed_heads(p, int(c.tile_m))
    if c.pack_heads and packed == 1:
        return True
    tiles = packed_tiles(p, int(c.tile_m), packed) * p.kv_heads * p.batch  # as few as they may be
    return c.splits == "keys" and (tiles > _MOST_UNITS or p.seqlen_k <= int(c.tile_n))


def _supports(p: Problem, t: Target) -> str | None:
    if not t.is_gpu or t.arch != "sm_90":
        return f"needs sm_90 (wgmma), the target is {t.arch}"
    if p.dtype not in ("fp16", "bf16"):
        return f"serves fp16 and bf16, not {p.dtype}"
    if not p.aligned:
        return "the copy engine needs rows that start at multiples of 16 bytes"
    return p.wider_than(256)


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {"threads": 2 * int(c.tile_m) + 128, "smem_bytes": smem_bytes(p, c), "registers": consumer_registers(c)}


CONSTRAINTS = (
    Constraint("smem_fits", _smem_fits, ("tile_m", "tile_n", "stages", "q_stages", "blocks_per_sm", "shared_weights")),
    Constraint("registers_fit", _registers_fit, ("tile_m", "tile_n", "blocks_per_sm", "shared_weights")),
    Constraint("product_fits", _product_fits, ("tile_m", "tile_n", "blocks_per_sm")),
    Constraint("single_has_one", _single_has_one, ("q_stages", "schedule")),
    Constraint("turns_need_others", _turns_need_others, ("tile_m", "ping_pong")),
    Constraint("order_matters", device_limits.order_matters, ("block_order",)),
    Constraint("section_matters", _section_matters, ("block_order", "section_mb")),
    Constraint("sharing_fits", _sharing_fits, ("blocks_per_sm", "schedule", "cluster")),
    Constraint("packing_fits", _packing_fits, ("pack_heads",)),
    Constraint("splitting_fits", _splitting_fits, ("schedule", "block_order", "cluster", "splits")),
)


def _legal(p: Problem, t: Target, c: Config) -> bool:
    return not any(constraint.check(p, t, c) for constraint in CONSTRAINTS)


FAMILY = Family(
    name="sm90_forward",
    template="sm90/forward.cu.j2",
    op="forward",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=_derive,
    default=lambda p, t: default(p, t, _legal),
    default_reads=Reads(lambda p, t: default_reads(p, t, _legal)),
    flags=lambda t: ("-gencode=arch=compute_90a,code=sm_90a", *FLAGS),
    context=lambda p, c: {
        "wgmma_type": "bf16" if p.dtype == "bf16" else "f16",
        "shared_widths": [c.tile_n],
        "column_widths": [p.head_dim_v_padded] if c.shared_weights else [],
        "register_widths": [] if c.shared_weights else [p.head_dim_v_padded],
    },
    first_configs=lambda p, t: guesses(p, t, _legal),
    repeats=_repeats,
    cost=cost,
    resources=lambda p, t, c: (smem_bytes(p, c), int(c.tile_m), fragment_registers(p, c)),
)
