"""Decode for every NVIDIA GPU from sm_80 up: a few query rows a sequence on a cache of keys, paged or not.

Flash-Decoding by mma.sync and cp.async: the query heads of a group and the query tokens are the rows of one tile, and
blocks share the keys of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob, Value
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v", "-lineinfo")

# The shape of a block comes first, so that a share that does not divide is dropped before the rest is varied.
KNOBS = (
    Knob("tile_m", "kTileM", (16, 32, 64), "rows of a block: query tokens x heads of a group"),
    Knob("tile_n", "kTileN", (16, 32, 64, 128, 256), "keys that the warps of a block load at a time"),
    Knob("warps", "kWarps", (1, 2, 4, 8), "warps of a block"),
    Knob("partition", "kPartition", ("keys", "columns"), "what the warps of a block divide: keys, or columns of V"),
    Knob("stages", "kStages", (2, 3, 4, 6, 8), "tiles of keys in shared memory"),
    Knob("q_source", "kQSource", ("registers", "shared"), "where q waits for its products"),
    Knob("rescale", "kRescale", ("deferred", "each"), "when O follows a grown maximum"),
    Knob("split_keys", "kSplitKeys", (128, 256, 512, 1024), "fewest keys of a split; a caller's own number goes first"),
    Knob(
        "merged_by",
        "kMergedBy",
        ("own_kernel", "last_block", "cluster"),
        "who merges the splits of a sequence: a second kernel, the block that ends last, or, of up to 8, a cluster of "
        "their blocks (sm_90)",
    ),
    Knob("blocks_per_sm", "kBlocksPerSm", (1, 2, 3, 4), "blocks the register budget is cut for"),
)

REGISTERS_PER_SM = 65536
OTHER_REGISTERS = 56  # addresses, pages, maxima and sums, loop state: what a thread needs beside its fragments
LANES, CLUSTER = 32, 8
MOST_SPLITS, START_KEYS = 256, 128  # of a sequence; keys that starting a block costs as much as
SM_RATE, MEMORY_LATENCY = 15, 700  # bytes a cycle that memory has for an SM; cycles until the first of them come


def _dims(p: DecodeProblem) -> tuple[int, int]:
    """Columns of K and V in a kernel: a step of an fp8 product takes 32."""
    unit = 32 if p.kv_dtype else 16
    return -(-p.head_dim // unit) * unit, -(-p.head_dim_v // unit) * unit


def _key_bytes(p: DecodeProblem) -> int:
    """What a key and its value take of a stage."""
    d, dv = _dims(p)
    return (d if p.shared_kv else d + dv) * p.kv_itemsize


def smem_bytes(p: DecodeProblem, c: Config) -> int:
    d, dv = _dims(p)
    loop = c.tile_m * d * 2 + c.stages * c.tile_n * _key_bytes(p)
    if c.partition == "columns":
        loop += c.tile_m * c.tile_n * 2 + c.warps * c.tile_m * 4
    parts = 1 if c.partition == "columns" else c.warps
    stats = int(c.warps) + (c.merged_by == "cluster")
    return max(loop, parts * c.tile_m * (dv + 8) * 4 + stats * c.tile_m * 8)


def fragment_registers(p: DecodeProblem, c: Config) -> int:
    """Registers of a thread that hold pieces of S, P, O and perhaps Q."""
    d, dv = _dims(p)
    slabs, keys = c.tile_m // 16, c.tile_n // c.warps
    columns = dv // c.warps if c.partition == "columns" else dv
    return slabs * (keys // 2 + keys // 4 + columns // 2 + (d // 4 if c.q_source == "registers" else 0))


def register_limit(c: Config) -> int:
    return min(255, REGISTERS_PER_SM // (32 * int(c.warps) * int(c.blocks_per_sm)))


def _even_share(p: DecodeProblem, t: Target, c: Config) -> str | None:
    if c.tile_n % (16 * c.warps):
        return f"tile_n {c.tile_n} is no multiple of 16 keys x {c.warps} warps"
    if c.partition == "columns":
        dv, step = _dims(p)[1], 32 if p.kv_dtype else 16
        if c.warps == 1:
            return "one warp has nobody to divide the columns with"
        if dv % (step * c.warps):
            return f"head_dim_v {dv} is no multiple of {step} columns x {c.warps} warps"
    return None


def _pages_of_a_warp(p: DecodeProblem, t: Target, c: Config) -> str | None:
    keys = c.tile_n // c.warps
    if p.page and keys > LANES * p.page:
        return f"{keys} keys of a warp lie in {keys // p.page} pages of {p.page}, its lanes hold {LANES}"
    return None


def _smem_fits(p: DecodeProblem, t: Target, c: Config) -> str | None:
    return device_limits.smem_fits(smem_bytes(p, c), t, c)


def _registers_fit(p: DecodeProblem, t: Target, c: Config) -> str | None:
    return device_limits.registers_fit(fragment_registers(p, c) + OTHER_REGISTERS, register_limit(c), c)


def _has_clusters(p: DecodeProblem, t: Target, c: Config) -> str | None:
    if c.merged_by == "cluster" and t.capability < 90:
        return f"clusters need sm_90, the target is {t.arch}"
    return None


def _whole_tiles(p: DecodeProblem, t: Target, c: Config) -> str | None:
    if c.split_keys < c.tile_n:
        return f"a split of {c.split_keys} keys is no whole tile of {c.tile_n}"
    return None


def _supports(p: DecodeProblem, t: Target) -> str | None:
    if lacking := device_limits.needs_sm80(t):
        return lacking
    if p.dtype not in ("fp16", "bf16"):
        return f"serves fp16 and bf16, not {p.dtype}"
    if not _guesses(p, t):
        return f"head dims {p.head_dim}/{p.head_dim_v}: no tile fits the registers and shared memory of {t.arch}"
    return None


def _derive(p: DecodeProblem, t: Target, c: Config) -> dict[str, int]:
    early = t.capability >= 90  # the second kernel may be launched before the first ends
    return {"threads": 32 * int(c.warps), "smem_bytes": smem_bytes(p, c), "early": int(early)}


def _make(**values: Value) -> Config:
    base: dict[str, Value] = {
        "tile_m": 16, "tile_n": 64, "warps": 4, "partition": "keys", "stages": 3, "q_source": "registers",
        "rescale": "deferred", "split_keys": 128, "merged_by": "own_kernel", "blocks_per_sm": 2,
    }  # fmt: skip
    return Config({**base, **values})


# Guesses, the best first; the first legal one of the rows' tile is the default. An H100 showed the second table within
# 4 % of each other where many sequences keep memory busy; where few do, large tiles, the first table, were 10 % ahead.
_OF_HOPPER = (
    _make(tile_n=256, warps=8, stages=3, split_keys=256, blocks_per_sm=1),  # of head dims up to 64
    _make(tile_n=128, stages=3, blocks_per_sm=1, q_source="shared"),
    _make(stages=3, blocks_per_sm=1, q_source="shared"),
)
_GUESSES = (
    _make(blocks_per_sm=3, stages=2),
    _make(stages=3),
    _make(stages=4, blocks_per_sm=1),
    _make(stages=2),
    _make(tile_n=128, stages=2),
    _make(tile_n=128, stages=3),
    _make(tile_n=32, warps=2, stages=4, blocks_per_sm=4),
    _make(partition="columns", stages=3),
    _make(stages=2, blocks_per_sm=1),
    _make(stages=2, blocks_per_sm=1, q_source="shared"),
    _make(partition="columns", stages=2, blocks_per_sm=1, q_source="shared"),
    _make(tile_n=32, warps=2, stages=2, blocks_per_sm=1, q_source="shared"),
    _make(tile_n=32, warps=2, partition="columns", stages=2, blocks_per_sm=1, q_source="shared"),
    _make(tile_n=16, warps=1, stages=2, blocks_per_sm=1),
    _make(tile_m=32, q_source="shared"),
    _make(tile_m=32, partition="columns", q_source="shared"),
    _make(tile_m=32, partition="columns", stages=2, q_source="shared", blocks_per_sm=1),
    _make(tile_m=64, tile_n=128, warps=8, partition="columns", stages=2, q_source="shared", blocks_per_sm=1),
    _make(tile_m=64, partition="columns", q_source="shared"),
    _make(tile_m=64, partition="columns", stages=2, q_source="shared", blocks_per_sm=1),
)


def _wanted_tile(p: DecodeProblem, t: Target) -> int:
    """Of few rows two tiles, whose blocks read the same keys at the same time, are faster than one of as many rows."""
    return 16 if p.seqlen_q * (p.heads // p.kv_heads) <= 32 else 64


def _guesses(p: DecodeProblem, t: Target) -> list[Config]:
    """The legal ones of the table: first those with registers to spare, of them those of the rows' tile, and of an fp8
    cache, whose keys have half the bytes, those with twice as many keys on their way."""
    merged_by = "cluster" if t.capability >= 90 and max(_dims(p)) <= 128 else "own_kernel"
    table = (*_OF_HOPPER, *_GUESSES) if t.capability >= 90 else _GUESSES
    guesses = [c.replace(merged_by=merged_by) for c in table]
    legal = [c for c in guesses if not any(k.check(p, t, c) for k in CONSTRAINTS)]
    wanted = _wanted_tile(p, t)
    few_bytes = bool(p.kv_dtype)

    def rank(c: Config) -> tuple[bool, int, bool]:
        crowded = fragment_registers(p, c) + 90 > register_limit(c)
        return crowded, abs(int(c.tile_m) - wanted), few_bytes and (c.tile_n, c.stages, c.blocks_per_sm) != (128, 3, 2)

    return sorted(legal, key=rank)


def _repeats(p: DecodeProblem, c: Config) -> bool:
    """A larger tile holds the rows of a smaller one and nothing besides."""
    rows = p.seqlen_q * (p.heads // p.kv_heads)
    return bool(c.tile_m > 16 and rows <= c.tile_m // 2)


def _resources(p: DecodeProblem, t: Target, c: Config) -> tuple:
    return (smem_bytes(p, c), c.warps, fragment_registers(p, c))


def splits_of(p: DecodeProblem, t: Target, c: Config) -> int:
    """The kernel's own number of splits: choose_splits in sm80/decode/launch.cuh."""
    key_tiles = -(-_keys(p) // int(c.tile_n))
    row_tiles = -(-p.seqlen_q * (p.heads // p.kv_heads) // int(c.tile_m)) * p.kv_heads * p.batch
    resident, most = t.units * int(c.blocks_per_sm), -(-key_tiles * int(c.tile_n) // int(c.split_keys))

    def cost(splits: int) -> int:
        keys = -(-key_tiles // splits) * int(c.tile_n)
        merge = 32 if c.merged_by == "cluster" and splits <= CLUSTER else 128
        merging = merge + 4 * splits if splits > 1 else 0
        return -(-row_tiles * splits // resident) * (keys + START_KEYS) + merging

    return min(range(1, min(most, MOST_SPLITS) + 1), key=cost)


def split_keys(p: DecodeProblem, t: Target, c: Config, lengths: Sequence[int]) -> int:
    """Keys of a split, for a batch whose lengths are known, so that all blocks cost about the same.

    The device deals blocks to SMs as these become free, so that it ends a block after the mean at most, and with whole
    waves where all are alike. Smaller splits shorten that and cost more starts and more to merge.
    """
    tile, resident = int(c.tile_n), t.units * int(c.blocks_per_sm)
    planes = -(-p.seqlen_q * (p.heads // p.kv_heads) // int(c.tile_m)) * p.kv_heads
    seen = [min(n, _keys(p)) for n in lengths]
    longest = max(seen, default=0)
    sizes, keys = [], max(int(c.split_keys), -(-p.seqlen_k // MOST_SPLITS))
    while keys < longest:
        sizes.append(-(-keys // tile) * tile)
        keys += max(tile, keys // 4)
    sizes.append(-(-max(longest, p.seqlen_k) // tile) * tile)  # none is split

    def cost(size: int) -> float:
        blocks = planes * sum(-(-n // size) for n in seen)
        mean, block = (planes * sum(seen) + blocks * START_KEYS) / resident, min(size, longest) + START_KEYS
        end = max(block, min(mean + block, -(-blocks // resident) * block))
        return end + (128 + 4 * -(-longest // size) if size < longest else 0)

    return min(sizes, key=cost)


def _keys(p: DecodeProblem) -> int:
    return p.seqlen_k if p.window_left < 0 else min(p.seqlen_k, p.window_left + p.seqlen_q)


def cost(p: DecodeProblem, t: Target, c: Config) -> float:
    """Cycles, roughly: a block reads its keys at its share of an SM's part of memory, of which it uses more the more
    bytes are in flight; products, softmax and barriers are partly hidden behind that.
    """
    d, dv = _dims(p)
    key_bytes, blocks = _key_bytes(p), int(c.blocks_per_sm)
    splits, slabs, per_warp = splits_of(p, t, c), int(c.tile_m) / 16, int(c.tile_n) // int(c.warps)
    tasks = -(-p.seqlen_q * (p.heads // p.kv_heads) // int(c.tile_m)) * p.kv_heads * p.batch * splits
    beside = max(1.0, min(blocks, tasks / t.units))  # blocks that share an SM
    rate = SM_RATE * min(4.0, max(1.0, t.units / tasks))  # few blocks share all of memory
    in_flight = beside * (int(c.stages) - 1) * int(c.tile_n) * key_bytes / (rate * MEMORY_LATENCY)
    read = key_bytes * beside / (rate * in_flight / (1 + in_flight))
    products = (
        slabs * (d + dv) / 64 + (d if p.shared_kv else d + dv) / 64
    )  # of tensor cores, and reads of their operands
    issued = (products + key_bytes / 64 + 60 / per_warp + (key_bytes / 12 if p.kv_dtype else 0)) / 4 * beside
    waits = (500 + 12 * per_warp + (600 if c.partition == "columns" else 0)) / int(c.tile_n)  # a tile's own latency
    computed = issued + waits
    key = max(read, computed) + 0.3 * min(read, computed)
    start = 2500 + slabs * dv * (4 if c.partition == "keys" else 2)
    merges = {"own_kernel": 2500, "last_block": 3500, "cluster": 800 if splits <= CLUSTER else 2500}
    merge = 0.0 if splits == 1 else merges[str(c.merged_by)] + 12 * splits
    return -(-tasks // (t.units * blocks)) * (start + _keys(p) / splits * key) + merge


_SHAPE = ("tile_m", "tile_n", "warps", "partition")
CONSTRAINTS = (
    Constraint("even_share", _even_share, ("tile_n", "warps", "partition")),
    Constraint("pages_of_a_warp", _pages_of_a_warp, ("tile_n", "warps")),
    Constraint("whole_tiles", _whole_tiles, ("tile_n", "split_keys")),
    Constraint("has_clusters", _has_clusters, ("merged_by",)),
    Constraint("smem_fits", _smem_fits, (*_SHAPE, "stages", "blocks_per_sm", "merged_by")),
    Constraint("registers_fit", _registers_fit, (*_SHAPE, "q_source", "blocks_per_sm")),
)

FAMILY = Family(
    name="sm80_decode",
    template="sm80/decode.cu.j2",
    op="decode",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=_derive,
    default=lambda p, t: _guesses(p, t)[0],
    default_reads=_wanted_tile,
    flags=lambda t: (device_limits.gencode(t), *FLAGS),
    first_configs=lambda p, t: _guesses(p, t)[1:],
    repeats=_repeats,
    cost=cost,
    split_keys=split_keys,
    resources=_resources,
)
