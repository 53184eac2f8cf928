"""Decode for Hopper by the copy engine (TMA) and warpgroups (wgmma): prompts among single tokens, wide heads.

A block has 64 rows a warpgroup, query tokens x heads of a group, against one split of a sequence's keys; one warp loads
tiles of keys and values page by page. Packed rows have as many blocks as they need.
"""

from __future__ import annotations

from fagen.families import device_limits, sm80_decode
from fagen.families.base import Config, Constraint, Family, Knob, Value
from fagen.families.sm90_forward_block import consumer_registers
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v", "-lineinfo")
ROWS = 64  # of a warpgroup
OTHER_REGISTERS = 60  # addresses, pipeline, maxima and sums: what a thread needs beside its fragments

KNOBS = (
    Knob("tile_m", "kTileM", (64, 128), "rows of a block, 64 a warpgroup: query tokens x heads of a group"),
    Knob("tile_n", "kTileN", (32, 64, 96, 128), "keys of a tile"),
    Knob("stages", "kStages", (2, 3, 4, 6), "tiles of keys, and of values, in shared memory"),
    Knob("rescale", "kRescale", ("deferred", "each"), "when O follows a grown maximum"),
    Knob("split_keys", "kSplitKeys", (128, 256, 512, 1024), "fewest keys of a split; a caller's own number goes first"),
    Knob("blocks_per_sm", "kBlocksPerSm", (1, 2, 3), "blocks that share an SM"),
)


def _threads(c: Config) -> int:
    return int(c.tile_m) * 2 + 128


def smem_bytes(p: DecodeProblem, c: Config) -> int:
    """A tile of q, rings of keys and of values, their barriers; room to align."""
    slab, slabs_v = 64, -(-p.head_dim_v_padded // 64)
    slabs = -(-p.head_dim_padded // slab)
    tiles = c.tile_m * slabs + c.stages * c.tile_n * (slabs + slabs_v)
    return int(tiles * slab * 2 + 2 * c.stages * 16 + 1024)


def fragment_registers(p: DecodeProblem, c: Config) -> int:
    """Registers of a thread that hold pieces of S, P and O."""
    return int(c.tile_n) // 2 + int(c.tile_n) // 4 + p.head_dim_v_padded // 2


def _smem_fits(p: DecodeProblem, t: Target, c: Config) -> str | None:
    return device_limits.smem_fits(smem_bytes(p, c), t, c)


def _registers_fit(p: DecodeProblem, t: Target, c: Config) -> str | None:
    need, limit = fragment_registers(p, c) + OTHER_REGISTERS, consumer_registers(c)
    if need <= limit:
        return None
    return f"about {need} > {limit} registers a thread ({_threads(c)} threads x {c.blocks_per_sm} blocks)"


def _whole_tiles(p: DecodeProblem, t: Target, c: Config) -> str | None:
    if c.split_keys < c.tile_n:
        return f"a split of {c.split_keys} keys is no whole tile of {c.tile_n}"
    return None


def _whole_boxes(p: DecodeProblem, t: Target, c: Config) -> str | None:
    box = min(p.page or c.tile_n, c.tile_n)
    if c.tile_n % box or (p.page and p.page % box):
        return f"pages of {p.page} keys and tiles of {c.tile_n} are not whole parts of each other"
    boxes = c.tile_n // box
    return None if 32 % boxes == 0 else f"{boxes} pages of a tile do not divide the lanes of a warp"


def _supports(p: DecodeProblem, t: Target) -> str | None:
    if not t.is_gpu or t.arch != "sm_90":
        return f"needs sm_90 (wgmma), the target is {t.arch}"
    if p.dtype not in ("fp16", "bf16") or p.kv_dtype:
        return f"serves fp16 and bf16 with a cache of the same, not {p.dtype} on {p.kv_dtype or p.dtype}"
    if p.shared_kv:
        return "values that are columns of the keys would be read twice"
    if p.page == 1:
        return "the copy engine takes pages from 16 rows on"
    if not p.aligned:
        return "the copy engine needs rows that start at multiples of 16 bytes"
    return p.wider_than(256)


def rows(p: DecodeProblem) -> int:
    """Of a kv head of the sequence that has most."""
    return p.seqlen_q * (p.heads // p.kv_heads)


def _suits(p: DecodeProblem) -> bool:
    """Where some sequence fills a warpgroup's rows, so that products count and not memory alone; and for wide heads,
    whose tiles leave `sm80_decode` few bytes on their way."""
    return rows(p) >= ROWS or max(p.head_dim, p.head_dim_v) > 128


def _make(**values: Value) -> Config:
    base: dict[str, Value] = {
        "tile_m": 64, "tile_n": 64, "stages": 2, "rescale": "deferred", "split_keys": 128, "blocks_per_sm": 1,
    }  # fmt: skip
    return Config({**base, **values})


# Guesses, the best first; the first legal one of the rows' tile is the default.
_GUESSES = (
    _make(tile_m=128, tile_n=128),
    _make(tile_m=128),
    _make(blocks_per_sm=2),
    _make(blocks_per_sm=2, stages=3),
    _make(stages=3),
    _make(),
    _make(tile_n=32, stages=4),
)


def _guesses(p: DecodeProblem, t: Target) -> list[Config]:
    """Pages of 16 and 32 are many small copies, which two blocks an SM hide better: on an H100 a mixed batch on pages
    of 16 took 1.77 ms so, and 3.4 by tiles of 128 x 128."""
    legal = [c for c in _GUESSES if not any(k.check(p, t, c) for k in CONSTRAINTS)]
    wanted = 128 if rows(p) > ROWS and p.page not in (16, 32) else 64
    return sorted(legal, key=lambda c: (abs(int(c.tile_m) - wanted), wanted == 64 and c.blocks_per_sm == 1))


def _repeats(p: DecodeProblem, c: Config) -> bool:
    """A larger tile holds the rows of a smaller one and nothing besides."""
    return bool(c.tile_m > ROWS and rows(p) <= ROWS)


def cost(p: DecodeProblem, t: Target, c: Config) -> float:
    """Cycles, roughly: a block reads its keys at its share of an SM's part of memory, or of L2 where row tiles share
    them, of which it uses more the more bytes are on their way; products and softmax are partly hidden behind that.
    """
    key_bytes, blocks = (p.head_dim_padded + p.head_dim_v_padded) * 2, int(c.blocks_per_sm)
    tiles = -(-rows(p) // int(c.tile_m)) * p.kv_heads * p.batch
    splits = sm80_decode.splits_of(p, t, c.replace(merged_by="own_kernel"))
    beside = max(1.0, min(blocks, tiles * splits / t.units))
    rate = sm80_decode.SM_RATE * (2 if rows(p) > c.tile_m else min(4.0, max(1.0, t.units / (tiles * splits))))
    in_flight = beside * (int(c.stages) - 0.5) * int(c.tile_n) * key_bytes / (rate * sm80_decode.MEMORY_LATENCY)
    read = key_bytes * beside / (rate * in_flight / (1 + in_flight))
    groups = int(c.tile_m) // ROWS
    computed = (groups * key_bytes / 64 + 8 * groups + 300 / int(c.tile_n)) * beside
    key = max(read, computed) + 0.3 * min(read, computed)
    merge = 0 if splits == 1 else 3000 + 12 * splits
    return -(-tiles * splits // (t.units * blocks)) * (5000 + p.seqlen_k / splits * key) + merge


CONSTRAINTS = (
    Constraint("whole_boxes", _whole_boxes, ("tile_n",)),
    Constraint("whole_tiles", _whole_tiles, ("tile_n", "split_keys")),
    Constraint("smem_fits", _smem_fits, ("tile_m", "tile_n", "stages", "blocks_per_sm")),
    Constraint("registers_fit", _registers_fit, ("tile_m", "tile_n", "blocks_per_sm")),
)

FAMILY = Family(
    name="sm90_decode",
    template="sm90/decode.cu.j2",
    op="decode",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=lambda p, t, c: {
        "threads": _threads(c), "smem_bytes": smem_bytes(p, c), "registers": consumer_registers(c)
    },
    default=lambda p, t: _guesses(p, t)[0],
    default_reads=lambda p, t: (rows(p) > ROWS, _suits(p)),
    flags=lambda t: ("-gencode=arch=compute_90a,code=sm_90a", *FLAGS),
    context=lambda p, c: {
        "wgmma_type": "bf16" if p.dtype == "bf16" else "f16",
        "shared_products": [(c.tile_n, False, False)],
        "register_products": [(p.head_dim_v_padded, True)],
    },
    first_configs=lambda p, t: _guesses(p, t)[1:],
    repeats=_repeats,
    suits=_suits,
    cost=cost,
    split_keys=sm80_decode.split_keys,
    resources=lambda p, t, c: (smem_bytes(p, c), int(c.tile_m), fragment_registers(p, c)),
)  # fmt: skip
