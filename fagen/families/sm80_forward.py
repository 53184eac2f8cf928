"""Forward for every NVIDIA GPU from sm_80 up: ldmatrix, mma.sync, cp.async. Holds FlashAttention 1's scheme and 2's."""

from __future__ import annotations

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob, Value
from fagen.families.cost import key_bytes, makespan, split_cycles, walk
from fagen.families.reads import Reads
from fagen.ops.attention.measures import AtMost
from fagen.ops.attention.problem import Problem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v", "-lineinfo")

# What shapes a block comes first, so that a share that does not divide is dropped before the rest is varied.
KNOBS = (
    Knob("tile_m", "kTileM", (16, 32, 64, 128, 192, 256), "rows of q a block works on"),
    Knob("tile_n", "kTileN", (16, 32, 48, 64, 80, 96, 128), "keys a block loads at a time"),
    Knob("warps", "kWarps", (1, 2, 4, 8), "warps of a block"),
    Knob("partition", "kPartition", ("split_q", "split_k", "pairs"), "what the warps of a block divide"),
    Knob("loop_order", "kLoopOrder", ("q_outer", "kv_outer"), "what stays while the other passes by"),
    Knob("stages", "kStages", (1, 2, 3), "tiles of keys in shared memory; 1: K and V take turns"),
    Knob("overlap", "kOverlap", (False, True), "compute the next tile's scores under this one's softmax"),
    Knob("q_source", "kQSource", ("shared", "registers"), "where q waits for its products"),
    Knob("smem_layout", "kSmemLayout", ("swizzled", "padded"), "how shared memory avoids bank conflicts"),
    Knob("blocks_per_sm", "kBlocksPerSm", (1, 2, 3, 4), "blocks the register budget is cut for"),
    Knob("rescale", "kRescale", ("each", "deferred"), "when O follows a grown maximum"),
    Knob(
        "block_order",
        "kBlockOrder",
        ("ascending", "descending", "longest_first", "sectioned"),
        "order of row tiles and heads",
    ),
    Knob(
        "splits",
        "",
        ("none", "keys"),
        "whether blocks share the keys of a tile of rows where few tiles leave SMs idle; the launch decides how many",
        implied_by_old_records="none",
    ),
)

REGISTERS_PER_SM = 65536
OTHER_REGISTERS = 32  # addresses, maxima and sums, loop state: what a thread needs beside its fragments


def _shares(c: Config) -> tuple[int, int, int]:
    """What one warp works on: rows of q, keys of a tile, and the parts that the columns of O are cut into."""
    if c.partition == "split_k":
        return c.tile_m, c.tile_n // c.warps, 1
    if c.partition == "pairs":
        return c.tile_m // c.warps * 2, c.tile_n // 2, 2
    return c.tile_m // c.warps, c.tile_n, 1


def _tile_bytes(rows: int, cols: int, c: Config) -> int:
    return rows * (cols * 2 + (0 if c.smem_layout == "swizzled" else 16))


def smem_bytes(p: Problem, c: Config) -> int:
    d, dv = p.head_dim_padded, p.head_dim_v_padded
    q, o = _tile_bytes(c.tile_m, d, c), _tile_bytes(c.tile_m, dv, c)
    stage = _tile_bytes(c.tile_n, d, c) + _tile_bytes(c.tile_n, dv, c)
    aliased = c.loop_order == "q_outer" and c.q_source == "registers"
    merge = c.tile_m * dv * 4 + c.warps * c.tile_m * 8 if c.partition == "split_k" else 0
    paired = _tile_bytes(c.tile_m, c.tile_n, c) + 8 * c.tile_m if c.partition == "pairs" else 0
    return max((0 if aliased else q) + c.stages * stage + paired, q, o, merge)


def fragment_registers(p: Problem, c: Config) -> int:
    """Registers of a thread that hold pieces of S, O and perhaps Q."""
    rows, keys, parts = _shares(c)
    slabs = rows // 16
    held = slabs * p.head_dim_padded // 4 if c.q_source == "registers" else 0
    scores = keys + keys // 2 + keys // 4 if c.overlap else keys
    return slabs * (scores + p.head_dim_v_padded // parts) // 2 + held


def register_limit(c: Config) -> int:
    return min(255, REGISTERS_PER_SM // (32 * int(c.warps) * int(c.blocks_per_sm)))


def _even_share(p: Problem, t: Target, c: Config) -> str | None:
    if c.partition == "split_q" and c.tile_m % (16 * c.warps):
        return f"tile_m {c.tile_m} is no multiple of 16 rows x {c.warps} warps"
    if c.partition == "split_k" and c.tile_n % (16 * c.warps):
        return f"tile_n {c.tile_n} is no multiple of 16 keys x {c.warps} warps"
    if c.partition == "pairs":
        if c.warps % 2 or c.tile_m % (8 * c.warps) or c.tile_n % 32:
            shares = f"tile_m {c.tile_m} by 16 rows and tile_n {c.tile_n} by 32 keys"
            return f"{c.warps} warps are not pairs that share {shares}"
        # swizzled, a half must begin where the exchange of pieces starts anew
        unit = 128 if c.smem_layout == "swizzled" else 32
        if p.head_dim_v_padded % unit:
            return f"half of head_dim_v {p.head_dim_v_padded} is no multiple of {unit // 2} ({c.smem_layout})"
    return None


def _one_scheme(p: Problem, t: Target, c: Config) -> str | None:
    if c.loop_order == "kv_outer" and c.stages > 1:
        return f"kv_outer holds one tile of keys at a time, stages={c.stages}"
    if c.overlap and (c.loop_order == "kv_outer" or c.stages == 1):
        return f"overlap needs q_outer and a stage for the next keys, {c.loop_order} stages={c.stages}"
    if c.partition == "pairs" and (c.loop_order == "kv_outer" or c.overlap):
        return f"pairs work in q_outer without overlap, {c.loop_order} overlap={c.overlap}"
    if c.partition == "split_k" and c.warps == 1:
        return "one warp has nobody to split the keys with"
    return None


def _splitting_fits(p: Problem, t: Target, c: Config) -> str | None:
    if c.splits == "keys" and (c.partition != "split_q" or c.loop_order != "q_outer"):
        return f"blocks share the keys of warps with rows of their own, partition={c.partition} {c.loop_order}"
    return None


def _repeats(p: Problem, c: Config) -> bool:
    """No GPU has so many SMs that it splits the keys of so many tiles, and one tile of keys is not split."""
    tiles = -(-p.seqlen_q // int(c.tile_m)) * p.heads * p.batch
    return c.splits == "keys" and (tiles > 512 or p.seqlen_k <= int(c.tile_n))


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    return device_limits.smem_fits(smem_bytes(p, c), t, c)


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    return device_limits.registers_fit(fragment_registers(p, c) + OTHER_REGISTERS, register_limit(c), c)


def _supports(p: Problem, t: Target) -> str | None:
    if lacking := device_limits.needs_sm80(t):
        return lacking
    if p.dtype not in ("fp16", "bf16"):
        return f"serves fp16 and bf16, not {p.dtype}"
    return p.wider_than(256)


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {"threads": 32 * int(c.warps), "smem_bytes": smem_bytes(p, c)}


def _make(**values: Value) -> Config:
    base: dict[str, Value] = {
        "tile_m": 64, "tile_n": 64, "warps": 4, "partition": "split_q", "loop_order": "q_outer", "stages": 1,
        "overlap": False, "q_source": "shared", "smem_layout": "swizzled", "blocks_per_sm": 1, "rescale": "deferred",
        "block_order": "ascending", "splits": "none",
    }  # fmt: skip
    return Config({**base, **values})


# Good guesses by head dim, the best first; the first legal one is the default. The smallest fit everywhere.
_GUESSES = (
    (
        64,
        [
            _make(tile_m=128, tile_n=64, q_source="registers", blocks_per_sm=2),
            _make(tile_m=128, tile_n=96, stages=3, blocks_per_sm=2),
            _make(tile_m=128, tile_n=48, stages=3, smem_layout="padded", blocks_per_sm=3),
            _make(tile_m=128, tile_n=64, stages=2, blocks_per_sm=2),
            _make(tile_m=128, tile_n=48, stages=3, overlap=True, smem_layout="padded", blocks_per_sm=2),
        ],
    ),
    (
        128,
        [
            _make(tile_m=128, tile_n=32, stages=2, blocks_per_sm=2),
            _make(tile_m=128, tile_n=64, smem_layout="padded", blocks_per_sm=2),
            _make(tile_m=128, tile_n=48, stages=2, smem_layout="padded", blocks_per_sm=2),
            _make(tile_m=256, tile_n=64, warps=8, smem_layout="padded"),
            _make(tile_m=64, tile_n=64, stages=2, q_source="registers", blocks_per_sm=2),
        ],
    ),
    (
        192,
        [
            _make(tile_m=128, tile_n=128, warps=8, partition="pairs", smem_layout="padded"),
            _make(tile_m=128, tile_n=96, warps=8, partition="pairs", smem_layout="padded"),
            _make(tile_m=128, tile_n=64, warps=8, stages=2),
            _make(tile_m=64, tile_n=64, partition="pairs", smem_layout="padded", blocks_per_sm=2),
            _make(tile_m=64, tile_n=48, blocks_per_sm=2),
        ],
    ),
    (
        256,
        [
            _make(tile_m=128, tile_n=64, warps=8, stages=2, partition="pairs"),
            _make(tile_m=128, tile_n=64, warps=8, partition="pairs"),
            _make(tile_m=64, tile_n=64, partition="pairs", smem_layout="padded", blocks_per_sm=2),
            _make(tile_m=128, tile_n=64, warps=8, stages=2),
            _make(tile_m=128, tile_n=80, warps=8),
            _make(tile_m=64, tile_n=32, stages=3, q_source="registers", blocks_per_sm=2),
            _make(tile_m=128, tile_n=32, warps=8, stages=3, q_source="registers"),
            _make(tile_m=64, tile_n=48, blocks_per_sm=2),
        ],
    ),
)
# where blocks share keys; few rows fill no larger tile
_SPLIT = [
    _make(tile_m=64, tile_n=64, stages=2, blocks_per_sm=2, splits="keys"),
    _make(tile_m=64, tile_n=64, stages=2, splits="keys"),
    _make(tile_m=64, tile_n=32, stages=2, splits="keys"),
]
_SMALLEST = [_make(tile_m=64, tile_n=32), _make(tile_m=64, tile_n=16), _make(tile_m=16, tile_n=16, warps=1)]


def _guesses(p: Problem, t: Target) -> list[Config]:
    """The legal ones of the table."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    order = "ascending" if p.mask == "none" else "longest_first"
    table = next(guesses for limit, guesses in _GUESSES if size <= limit)
    split = _SPLIT if _leaves_units_idle(p, t) else []
    shaped = [c.replace(block_order=order) for c in [*split, *table, *_SMALLEST]]
    return [c for c in shaped if not any(k.check(p, t, c) for k in CONSTRAINTS)]


def _leaves_units_idle(p: Problem, t: Target) -> bool:
    """Whether tiles of 64 rows are fewer than SMs, and their keys enough to be shared."""
    blocks = -(-p.seqlen_q // 64) * p.heads * p.batch
    keys = min(p.seqlen_k, p.window_left + p.seqlen_q) if p.window_left >= 0 else p.seqlen_k
    return blocks <= 0.7 * t.units and keys >= 512


def _default_reads(p: Problem, t: Target) -> tuple[AtMost, ...]:
    """What `_leaves_units_idle` asks."""
    return AtMost("row_blocks", int(0.7 * t.units), tile=64), AtMost("seen_keys", 511)


def _default(p: Problem, t: Target) -> Config:
    """The first guess with registers to spare: nobody has looked at its spills for this very problem and GPU."""
    spare = 90 + (10 if t.capability >= 100 else 0) + (30 if p.mask == "intervals" or p.softcap or p.alibi else 0)
    guesses = _guesses(p, t)
    roomy = (c for c in guesses if fragment_registers(p, c) + spare <= register_limit(c))
    return next(roomy, guesses[-1])


def _resources(p: Problem, t: Target, c: Config) -> tuple:
    return (smem_bytes(p, c), c.warps, fragment_registers(p, c))


def cost(p: Problem, t: Target, c: Config) -> float:
    """Cycles, roughly: products against what they read of shared memory, softmax beside them, latency that few warps
    cannot hide, the tail. Each warp reads its keys for its own rows: 16 rows a warp read twice as much as 32.
    """
    d, dv, m, n = p.head_dim_padded, p.head_dim_v_padded, int(c.tile_m), int(c.tile_n)
    warps, blocks = int(c.warps), int(c.blocks_per_sm)
    rows, keys, parts = _shares(c)
    products = m * n * (d + dv) / 1100
    read = warps * (keys * d + (n * dv // parts if c.partition == "pairs" else keys * dv))
    read += warps * rows * d if c.q_source == "shared" else 0
    read += 3 * m * n if c.partition == "pairs" else 0  # the halves' weights are exchanged
    shared = read * 2 / 128
    softmax = m * n * (0.1 if c.rescale == "deferred" else 0.1 + 0.008 * dv / n)
    hidden = min(1.0, warps * blocks / 16 + (0.15 if c.overlap else 0))
    busy = max(products, shared) + (1 - 0.5 * hidden) * (min(products, shared) + softmax)
    latency = {1: 900, 2: 420, 3: 320}[int(c.stages)] + (300 if c.partition == "pairs" else 0)
    visit = busy + latency / blocks * (1 if warps >= 4 else 1.3)
    if c.loop_order == "kv_outer":
        visit += m * dv * 8 / 16  # O comes and goes through memory
    if fragment_registers(p, c) + 60 > register_limit(c):
        visit *= 1.12
    seen, heads = walk(p, m, n), p.batch * p.heads
    boundary = 2500 / blocks + m * (d + dv) * 2 / 24
    work = heads * (seen.visits * visit + seen.masked * m * n * 0.03 + seen.row_tiles * boundary)
    longest = seen.most * visit + boundary
    uneven = seen.most * seen.row_tiles > seen.visits
    tail = 0.15 if not uneven or c.block_order in ("longest_first", "sectioned") else 0.7
    pieces = heads * seen.row_tiles
    total = makespan(work, longest, pieces, t.units, tail)
    if c.splits == "keys" and pieces < t.units:
        total = min(total, split_cycles(p, m, seen.most, visit, boundary, pieces, t.units))
    return total * (1.04 if c.block_order == "longest_first" and key_bytes(p) > t.l2 else 1)


_SHAPE = ("tile_m", "tile_n", "warps", "partition")
_MEMORY = (*_SHAPE, "loop_order", "stages", "q_source", "smem_layout", "blocks_per_sm")
CONSTRAINTS = (
    Constraint("even_share", _even_share, (*_SHAPE, "smem_layout")),
    Constraint("one_scheme", _one_scheme, ("warps", "partition", "loop_order", "stages", "overlap")),
    Constraint("splitting_fits", _splitting_fits, ("partition", "loop_order", "splits")),
    Constraint("order_matters", device_limits.order_matters, ("block_order",)),
    Constraint("smem_fits", _smem_fits, _MEMORY),
    Constraint("registers_fit", _registers_fit, (*_SHAPE, "overlap", "q_source", "blocks_per_sm")),
)

FAMILY = Family(
    name="sm80_forward",
    template="sm80/forward.cu.j2",
    op="forward",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=_derive,
    default=_default,
    default_reads=Reads(_default_reads),
    repeats=_repeats,
    flags=lambda t: (device_limits.gencode(t), *FLAGS),
    first_configs=lambda p, t: _guesses(p, t)[1:],
    cost=cost,
    resources=_resources,
)
