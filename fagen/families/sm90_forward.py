"""Forward for Hopper: copies by the copy engine (TMA), products by warpgroups (wgmma), warps that only feed them."""

from __future__ import annotations

import math

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob
from fagen.families.cost import Walk, key_bytes, makespan, split_cycles, walk
from fagen.families.reads import Reads
from fagen.families.sm90_forward_block import (
    FEWEST_REGISTERS,
    OTHER_REGISTERS,
    consumer_registers,
    fragment_registers,
    registers_each,
    smem_bytes,
)
from fagen.ops.attention.measures import AtMost
from fagen.ops.attention.problem import Problem
from fagen.ops.attention.size_point import has_few_rows, packed_heads
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
    packed = packed_heads(p)
    if c.pack_heads and packed == 1:
        return True
    tiles = -(-p.seqlen_q // int(c.tile_m)) * p.heads * p.batch // packed  # as few as they may be
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

# (tile_m, tile_n, q_stages, blocks_per_sm) by the larger head dim, the best first.
_TILES = (
    (64, ((192, 128, 2, 1), (64, 64, 1, 3), (128, 128, 2, 1), (192, 96, 2, 1), (192, 112, 1, 1))),
    (96, ((128, 128, 2, 1), (192, 80, 1, 1), (192, 80, 2, 1), (128, 112, 2, 1))),
    (128, ((128, 128, 2, 1), (128, 160, 2, 1), (128, 176, 1, 1), (128, 112, 2, 1))),
    (192, ((128, 128, 1, 1), (128, 112, 1, 1), (128, 96, 2, 1), (128, 80, 1, 1))),
    (256, ((128, 64, 1, 1), (128, 80, 1, 1), (128, 48, 1, 1), (128, 32, 1, 1))),
)
_SHORT = {64: (64, 64, 1, 3)}  # the best tile of a head dim where rows see few keys, of which each sees another number
# Three warpgroups, the best where there are many keys, and by far for head dims that are multiples of 8 alone, which
# share kernels with the next multiple of 16: tile, stages, whether P goes by shared memory, where registers have no
# room for it.
_THREE = {
    80: (((192, 96, 1, 1), 3, False),),
    96: (((192, 128, 1, 1), 2, True),),
    112: (((192, 96, 1, 1), 3, False), ((192, 80, 1, 1), 3, False)),
    128: (((192, 128, 1, 1), 2, True), ((192, 96, 1, 1), 2, True)),
    144: (((192, 64, 1, 1), 3, False),),
    160: (((192, 64, 1, 1), 3, False), ((192, 64, 1, 1), 2, False)),
}
_THREE_FULL = _THREE | {96: (((192, 112, 2, 1), 2, False),), 144: (((192, 80, 1, 1), 2, False),)}
_FEW_ROWS = ((64, 128, 1, 2), (64, 64, 1, 3), (128, 128, 1, 1))  # not enough to go round: a tile a block
_FEW_KEYS = 2048
# (tile_n) by the larger head dim, where blocks share keys: one tile of rows, and two stages of keys
_SPLIT_TILE_N = ((128, 128), (192, 96), (256, 80))
_SMALLEST = ((128, 64, 1, 1), (64, 32, 1, 1))  # with a single stage of k and v they fit every problem


def _guesses(p: Problem, t: Target) -> list[Config]:
    def config(tile: tuple[int, int, int, int], stages: int, schedule: str, order: str, section: int) -> Config:
        m, n, q_stages, blocks = tile
        return Config(
            {
                "tile_m": m, "tile_n": n, "stages": stages, "q_stages": q_stages, "overlap": True,
                "rescale": "deferred", "ping_pong": m > 64, "blocks_per_sm": blocks, "schedule": schedule,
                "block_order": order, "section_mb": section, "cluster": 1, "shared_weights": False,
                "pack_heads": False, "splits": "none",
            }
        )  # fmt: skip

    def legal(config: Config) -> bool:
        return not any(constraint.check(p, t, config) for constraint in CONSTRAINTS)

    tiles, plans = _tiles(p), _plans(p)
    alone = ("single", "ascending" if p.mask == "none" else "longest_first", 32)
    dealt = [config(tile, 2, *plan) for plan in plans for tile in tiles]
    three = (_THREE_FULL if p.mask == "none" else _THREE).get(p.head_dim_padded, ())
    third = next(
        filter(legal, (config(tile, stages, *plans[0]).replace(shared_weights=by) for tile, stages, by in three)), None
    )
    if third:
        dealt.insert(0 if p.seqlen_k >= _FEW_KEYS else 1, third)
    if packed_heads(p) > 1:
        packed = [c.replace(pack_heads=True) for c in dealt[:2]]
        first = _packs_tighter(p) or (p.mask == "causal" and p.seqlen_k >= _FEW_KEYS)
        dealt = packed + dealt if first else dealt + packed
    single = [config(tile, 2, *alone) for tile in _FEW_ROWS]
    shared = [config(tile, 2, "single", "ascending", 32).replace(splits="keys") for tile in _split_tiles(p)]
    if packed_heads(p) > 1:
        shared = [c.replace(pack_heads=True) for c in shared] + shared
    shaped = [c for c in single if _few(p, t, c)] + dealt + single
    shaped = shared + shaped if has_few_rows(p, t) else shaped
    shaped += [config(tile, 1, *plans[0]) for tile in _SMALLEST]
    return [c for c in dict.fromkeys(shaped) if legal(c)]


def _tiles(p: Problem) -> list[tuple[int, int, int, int]]:
    """(tile_m, tile_n, q_stages, blocks_per_sm), the best first."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    limit, tiles = next((limit, tiles) for limit, tiles in _TILES if size <= limit)
    first = _SHORT.get(limit) if p.mask != "none" and p.seqlen_k < _FEW_KEYS else None
    return list(dict.fromkeys([first, *tiles] if first else tiles))


def _plans(p: Problem) -> list[tuple[str, str, int]]:
    """(schedule, block_order, section_mb), the best first."""
    if p.mask == "none":
        return [("dynamic", "ascending", 32), ("dynamic", "sectioned", 32), ("balanced", "ascending", 32)]
    small, large = ((32, 64, 16), (64, 32, 16)) if p.head_dim_padded > 128 else ((16, 32, 64), (32, 64, 16))
    sections = small if p.seqlen_k < _FEW_KEYS else large
    return [("dynamic", "sectioned", megabytes) for megabytes in sections]


def _split_tiles(p: Problem) -> list[tuple[int, int, int, int]]:
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    n = next(n for limit, n in _SPLIT_TILE_N if size <= limit)
    return [(m, n, 1, 1) for m in ((64, 128) if _one_warpgroup(p) else (128, 64))]


def _packs_tighter(p: Problem) -> bool:
    """Whether tiles of 128 rows are a quarter fewer where heads share them: 5, not 8, of 4 heads of 135 rows."""
    packed = packed_heads(p)
    return -(-p.seqlen_q // 128) * packed >= 1.25 * -(-p.seqlen_q * packed // 128)


def _one_warpgroup(p: Problem) -> bool:
    """Whether it can hold all rows of the heads that are packed."""
    return p.seqlen_q * packed_heads(p) <= 64


def _few(p: Problem, t: Target, c: Config) -> bool:
    """Whether there is a block for each tile of rows."""
    return -(-p.seqlen_q // int(c.tile_m)) * p.heads * p.batch <= t.units * int(c.blocks_per_sm)


def _default_reads(p: Problem, t: Target) -> tuple[AtMost, ...]:
    """What `_guesses` asks of the sizes: few keys, whether heads pack, how many rows, which plain tiles go round."""
    few = (AtMost("row_blocks", t.units * by, tile=m) for m, _, _, by in _FEW_ROWS)
    packs = AtMost("packed_heads", 1), AtMost("tightness", -1, tile=128)
    return AtMost("keys", _FEW_KEYS - 1), *packs, AtMost("few_rows"), AtMost("packed_rows", 64), *few


def _default(p: Problem, t: Target) -> Config:
    """The first guess with registers to spare where slopes or random numbers take more than usual."""
    guesses = _guesses(p, t)

    def spare(c: Config) -> int:
        plain = p.mask in ("none", "causal") and not p.softcap and not c.shared_weights
        of_dropout = (8 if plain and p.head_dim_padded in (64, 96, 128) else 16) if p.dropout else 0
        return OTHER_REGISTERS + (16 if p.alibi else 0) + of_dropout

    roomy = (c for c in guesses if fragment_registers(p, c) + spare(c) <= consumer_registers(c))
    return next(roomy, guesses[-1])


def _visit_cycles(p: Problem, c: Config) -> float:
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
    groups, blocks, cluster = int(c.tile_m) // 64, int(c.blocks_per_sm), int(c.cluster)
    packed = packed_heads(p) if c.pack_heads else 1
    seen, heads = walk(p, max(1, int(c.tile_m) // packed), int(c.tile_n)), p.batch * p.heads // packed
    visit, joined = _visit_cycles(p, c), c.schedule != "single"
    boundary = (2900 - 2400 * joined - 300 * (c.q_stages - 1)) / (1 + 0.85 * (blocks - 1))
    boundary += 2.0 * p.head_dim_v_padded * groups
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


FAMILY = Family(
    name="sm90_forward",
    template="sm90/forward.cu.j2",
    op="forward",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=_derive,
    default=_default,
    default_reads=Reads(_default_reads),
    flags=lambda t: ("-gencode=arch=compute_90a,code=sm_90a", *FLAGS),
    context=lambda p, c: {
        "wgmma_type": "bf16" if p.dtype == "bf16" else "f16",
        "shared_widths": [c.tile_n],
        "column_widths": [p.head_dim_v_padded] if c.shared_weights else [],
        "register_widths": [] if c.shared_weights else [p.head_dim_v_padded],
    },
    first_configs=_guesses,
    repeats=_repeats,
    cost=cost,
    resources=lambda p, t, c: (smem_bytes(p, c), int(c.tile_m), fragment_registers(p, c)),
)
