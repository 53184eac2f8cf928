"""Forward for Hopper on fp8 numbers: sm90_forward's walk, with products of e4m3 and v in an order of its own."""

from __future__ import annotations

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob
from fagen.families.cost import makespan, walk
from fagen.families.sm90_forward_block import (
    BARRIER_BYTES,
    FEWEST_REGISTERS,
    OTHER_REGISTERS,
    QUEUE_BYTES,
    ROW_BYTES,
    SMEM_ALIGNMENT,
    TILE_MASK_BYTES,
    registers_each,
)
from fagen.ops.attention.fp8_problem import Fp8Problem
from fagen.ops.attention.problem import Problem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v", "-lineinfo")

KNOBS = (
    Knob("tile_m", "kTileM", (64, 128, 192), "rows of q a block works on, 64 a warpgroup"),
    Knob("tile_n", "kTileN", tuple(range(32, 257, 32)), "keys of a tile"),
    Knob("stages", "kStages", (1, 2, 3, 4), "tiles of keys, and of values, in shared memory"),
    Knob("q_stages", "kQStages", (1, 2), "tiles of q in shared memory"),
    Knob(
        "overlap",
        "kOverlap",
        ("nothing", "maxima", "softmax"),
        "what of a tile runs under O += P V of the one before",
    ),
    Knob("rescale", "kRescale", ("each", "deferred"), "O follows the maximum at each tile, or where it has grown"),
    Knob("promote", "kPromote", (0, 1, 2, 4), "tiles whose sums leave the tensor cores for float32 at once; 0: all"),
    Knob("exp_on_fma", "kExpOnFma", (0, 1, 2), "of 8 exponentials, those that the FMA pipe computes, by polynomials"),
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
)


def smem_bytes(p: Problem, c: Config) -> int:
    """As sm90/forward_fp8/layout.cuh has it: q and k in slabs of 128 columns, v as it is."""
    slabs = -(-p.head_dim_padded // ROW_BYTES)
    tiles = (c.q_stages * c.tile_m + c.stages * c.tile_n) * slabs * ROW_BYTES
    tiles += c.stages * c.tile_n * p.head_dim_v_padded
    tiles += c.stages * TILE_MASK_BYTES if p.intervals else 0
    return int(tiles + BARRIER_BYTES * (c.q_stages + 2 * c.stages) + QUEUE_BYTES + SMEM_ALIGNMENT)


def consumer_registers(p: Problem, c: Config) -> int:
    """Of a thread that computes: what the producing warpgroup leaves of the block's part of the SM."""
    groups, each = int(c.tile_m) // 64, registers_each(c)
    producer = {1: 40, 2: 40 if p.intervals else 24, 3: 32}[groups]
    return min(240, ((groups + 1) * each - producer) // groups // 8 * 8)


def fragment_registers(p: Problem, c: Config) -> int:
    """S, the weights as fp8, O, the sums of a few tiles beside it, and what intervals hide of a tile."""
    sums = p.head_dim_v_padded // 2 * (2 if c.promote else 1)
    return int(c.tile_n) // 2 + int(c.tile_n) // 8 + sums + (8 if p.intervals else 0)


def _scale_block(p: Problem) -> int:
    return p.scale_block if isinstance(p, Fp8Problem) else 0


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    need, blocks = smem_bytes(p, c), c.blocks_per_sm
    if need > t.smem_per_block:
        return f"{need} > {t.smem_per_block} bytes of shared memory on {t.arch}"
    if blocks * (need + 1024) > t.smem_per_unit:
        return f"{blocks} blocks x {need + 1024} > {t.smem_per_unit} bytes of shared memory an SM"
    return None


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    need, limit = fragment_registers(p, c) + OTHER_REGISTERS, consumer_registers(p, c)
    return f"about {need} > {limit} registers a thread" if need > limit else None


def _product_fits(p: Problem, t: Target, c: Config) -> str | None:
    need, each = max(int(c.tile_n), p.head_dim_v_padded) // 2 + 30, registers_each(c)
    if each <= FEWEST_REGISTERS:
        return f"compiled for {each} <= {FEWEST_REGISTERS} registers a thread, ptxas makes products wait for each other"
    return f"a product takes {need} > {each} registers that the block is compiled for" if need > each else None


def _block_is_tiles(p: Problem, t: Target, c: Config) -> str | None:
    block = _scale_block(p)
    return f"tile_n={c.tile_n} does not divide blocks of {block} keys" if block % int(c.tile_n) else None


def _single_has_one(p: Problem, t: Target, c: Config) -> str | None:
    if c.schedule == "single" and c.q_stages > 1:
        return "a block that takes a single tile of rows has no second one to load"
    return None


def _turns_need_others(p: Problem, t: Target, c: Config) -> str | None:
    if c.ping_pong and c.tile_m == 64:
        return "a lone warpgroup (tile_m=64) has nobody to take turns with"
    return None


def _section_matters(p: Problem, t: Target, c: Config) -> str | None:
    if c.block_order != "sectioned" and c.section_mb != 32:
        return f"block_order={c.block_order} has no sections, section_mb={c.section_mb} only repeats another"
    return None


def _rescaling_differs(p: Problem, t: Target, c: Config) -> str | None:
    if c.promote == 1 and c.rescale == "each":
        return "with promote=1 O is multiplied at each tile anyway, rescale=each only finds the same factors later"
    return None


def _supports(p: Problem, t: Target) -> str | None:
    if not t.is_gpu or t.arch != "sm_90":
        return f"needs sm_90 (wgmma), the target is {t.arch}"
    if not p.aligned:
        return "the copy engine needs rows that start at multiples of 16 bytes"
    if p.head_dim % 16 or p.head_dim_v % 16:
        return f"head dims {p.head_dim} and {p.head_dim_v} must be multiples of 16"
    return p.wider_than(256)


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {"threads": 2 * int(c.tile_m) + 128, "smem_bytes": smem_bytes(p, c), "registers": consumer_registers(p, c)}


CONSTRAINTS = (
    Constraint("smem_fits", _smem_fits, ("tile_m", "tile_n", "stages", "q_stages", "blocks_per_sm")),
    Constraint("registers_fit", _registers_fit, ("tile_m", "tile_n", "blocks_per_sm", "promote")),
    Constraint("product_fits", _product_fits, ("tile_m", "tile_n", "blocks_per_sm")),
    Constraint("block_is_tiles", _block_is_tiles, ("tile_n",)),
    Constraint("single_has_one", _single_has_one, ("q_stages", "schedule")),
    Constraint("turns_need_others", _turns_need_others, ("tile_m", "ping_pong")),
    Constraint("rescaling_differs", _rescaling_differs, ("promote", "rescale")),
    Constraint("order_matters", device_limits.order_matters, ("block_order",)),
    Constraint("section_matters", _section_matters, ("block_order", "section_mb")),
)

# (tile_m, tile_n, stages, q_stages) by the larger head dim: the best that a search on an H100 found first.
_TILES = (
    (64, ((192, 160, 4, 2), (192, 160, 2, 2), (192, 128, 2, 2), (128, 160, 2, 2))),
    (128, ((128, 192, 2, 1), (192, 96, 3, 1), (128, 160, 2, 2), (128, 128, 2, 2), (128, 224, 2, 1))),
    (192, ((128, 160, 2, 1), (128, 128, 2, 1), (128, 96, 2, 1))),
    (256, ((128, 128, 2, 2), (128, 128, 2, 1), (128, 96, 2, 1), (128, 64, 2, 1))),
)
# The first tile where there are few keys, of which others would have more beyond the end.
_SHORT = {64: (192, 128, 2, 2), 128: (128, 128, 2, 2)}
_FEW_KEYS = 1024
_TURNS_END = 2048  # beyond it, causal and up to head dim 64, warpgroups that take turns are 3 to 5 % slower
_FEW_ROWS = (((64, 128, 2, 1), 2), ((128, 128, 2, 1), 1))  # and blocks an SM; not enough to go round: a tile a block
_SMALLEST = ((64, 64, 1, 1), (64, 32, 1, 1))  # they fit every problem
# (overlap, exp_on_fma, ping_pong) by the larger head dim, found with the tiles
_SOFTMAX = ((64, ("nothing", 0, True)), (128, ("maxima", 1, False)), (256, ("maxima", 0, True)))
# From here on it shows what the tensor cores lose of O with every tile: benchmarks/fp8_accuracy.py.
_MANY_KEYS = 16384


def _few(p: Problem, t: Target) -> bool:
    """Whether a block for each large tile of rows leaves SMs idle."""
    return -(-p.seqlen_q // 128) * p.heads * p.batch <= t.units


def _tiles(p: Problem) -> list[tuple[int, int, int, int]]:
    """(tile_m, tile_n, stages, q_stages), the best guess first."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    limit, tiles = next((limit, tiles) for limit, tiles in _TILES if size <= limit)
    first = _SHORT.get(limit) if p.seqlen_k <= _FEW_KEYS else None
    return list(dict.fromkeys(_of_whole_blocks(p, tile) for tile in ([first] if first else []) + list(tiles)))


def _of_whole_blocks(p: Problem, tile: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The tile with as many keys as divide the blocks that have scales of their own."""
    m, most, stages, q_stages = tile
    block = _scale_block(p)
    return m, max(n for n in range(32, most + 1, 32) if block % n == 0), stages, q_stages


def _plan(p: Problem) -> tuple[str, str, int]:
    """(schedule, block_order, section_mb)."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    if size <= 64:
        return "dynamic", "sectioned", 16
    return "dynamic", "ascending" if p.mask == "none" else "longest_first" if size <= 128 else "sectioned", 32


def _guesses(p: Problem, t: Target) -> list[Config]:
    """O follows the maximum at each tile: a branch around that costs more than it saves."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    overlap, exp_on_fma, turns = next(found for limit, found in _SOFTMAX if size <= limit)
    alone = ("single", "ascending" if p.mask == "none" else "longest_first", 32)
    promote = 2 if p.seqlen_k > _MANY_KEYS else 0

    def config(tile: tuple[int, int, int, int], plan: tuple[str, str, int], blocks: int = 1, by: int = 0) -> Config:
        m, n, stages, q_stages = tile
        schedule, order, section = plan
        return Config(
            {
                "tile_m": m, "tile_n": n, "stages": stages, "q_stages": q_stages, "overlap": overlap,
                "rescale": "deferred" if by == 1 else "each", "promote": by, "exp_on_fma": exp_on_fma,
                "ping_pong": m > 64 and turns, "blocks_per_sm": blocks, "schedule": schedule, "block_order": order,
                "section_mb": section,
            }
        )  # fmt: skip

    found = [config(tile, alone, blocks, promote) for tile, blocks in _FEW_ROWS] if _few(p, t) else []
    if size <= 64 and p.mask == "causal" and p.seqlen_k > _TURNS_END:
        without = config(_of_whole_blocks(p, (192, 160, 2, 2)), ("dynamic", "sectioned", 64), by=promote)
        found.append(without.replace(ping_pong=False))
    found += [config(tile, _plan(p), by=by) for by in dict.fromkeys((promote, 0, 1, 2)) for tile in _tiles(p)]
    found += [config(tile, _plan(p)) for tile in _SMALLEST]
    legal = (c for c in found if not any(constraint.check(p, t, c) for constraint in CONSTRAINTS))
    return list(dict.fromkeys(legal))


def _default_reads(p: Problem, t: Target) -> tuple:
    """What `_guesses` asks of the sizes: few rows; many keys, or few; more than take turns."""
    return _few(p, t), p.seqlen_k > _MANY_KEYS, p.seqlen_k <= _FEW_KEYS, p.seqlen_k > _TURNS_END


_EXPOSED = {1: 1.1, 2: 0.85, 3: 0.7}  # of the faster of products and softmax, by an SM's warpgroups; of more: 0.6


def _visit_cycles(p: Problem, c: Config) -> float:
    """Cycles that a block takes for a tile of keys, its part of the SM counted."""
    n, groups, blocks = int(c.tile_n), int(c.tile_m) // 64, int(c.blocks_per_sm)
    products = n * (p.head_dim_padded + p.head_dim_v_padded) / 64
    exponentials = n * 4 * (1 - c.exp_on_fma / 8)
    issue = (2.6 + 0.45 * c.exp_on_fma) * n + 200  # a warp's instructions, and one a number that is promoted
    issue += p.head_dim_v_padded / 2 / c.promote if c.promote else 0
    softmax = max(exponentials, issue)
    visit = groups * (max(products, softmax) + _EXPOSED.get(groups * blocks, 0.6) * min(products, softmax))
    visit *= {"softmax": 1.04, "maxima": 1.0, "nothing": 1.02 if p.head_dim_v_padded > 64 else 1.0}[str(c.overlap)]
    visit *= 1.03 if c.rescale == "deferred" and c.promote != 1 else 1
    return visit + (n * (p.head_dim_padded + p.head_dim_v_padded) / 40 if c.stages == 1 else 0)  # the load, unhidden


def cost(p: Problem, t: Target, c: Config) -> float:
    """Cycles, roughly: visits of tiles of keys, boundaries between tiles of rows, the tail.

    The constants are fitted to what searches on an H100 found best of each value of a knob, for d64, d128 and d256.
    """
    seen, heads, blocks = walk(p, int(c.tile_m), int(c.tile_n)), p.batch * p.heads, int(c.blocks_per_sm)
    visit = _visit_cycles(p, c)
    boundary = (2900 - 2400 * (c.schedule != "single") - 300 * (c.q_stages - 1)) / (1 + 0.85 * (blocks - 1))
    uneven = seen.most * seen.row_tiles > seen.visits
    tail = 0.15 if not uneven or c.block_order in ("longest_first", "sectioned") else 0.36
    work, longest = heads * (seen.visits * visit + seen.row_tiles * boundary), seen.most * visit + boundary
    total = makespan(work, longest, heads * seen.row_tiles, t.units, tail)
    if c.schedule == "balanced" and uneven:  # some SMs are a little slower than others
        total *= 1.03
    spare = consumer_registers(p, c) - fragment_registers(p, c)
    return total * (1.5 if spare < OTHER_REGISTERS else 1)


FAMILY = Family(
    name="sm90_forward_fp8",
    template="sm90/forward_fp8.cu.j2",
    op="forward_fp8",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=_derive,
    default=lambda p, t: _guesses(p, t)[0],
    default_reads=_default_reads,
    flags=lambda t: ("-gencode=arch=compute_90a,code=sm_90a", *FLAGS),
    context=lambda p, c: {"shared_widths": [c.tile_n], "register_widths": [p.head_dim_v_padded]},
    first_configs=_guesses,
    cost=cost,
    resources=lambda p, t, c: (smem_bytes(p, c), int(c.tile_m), fragment_registers(p, c)),
)
