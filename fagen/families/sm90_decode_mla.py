"""Decode of latent attention (MLA) for Hopper: values are the first columns of keys, all heads share one cache.

Two warpgroups share 64 rows (query tokens x heads): each computes the scores of every other tile of 64 keys and owns
half of the columns of O. Key tiles come by the copy engine (TMA), once; products are wgmma's.
"""

from __future__ import annotations

from collections.abc import Sequence

from fagen.families import sm80_decode
from fagen.families.base import Config, Family, Knob
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v", "-lineinfo")
TILE, ROTARY, THREADS = 64, 64, 384  # rows of q and keys of a tile; columns of k that are no values
REGISTERS = 240  # of a consumer's thread
LATENT = (128, 256, 512)  # head_dim_v that there are kernels for

KNOBS = (
    Knob("rescale", "kRescale", ("deferred", "each"), "when O follows a grown maximum"),
    Knob("split_keys", "kSplitKeys", (128, 256, 512, 1024), "fewest keys of a split; a caller's own number goes first"),
)


def smem_bytes(p: DecodeProblem) -> int:
    """A tile of q, two of keys, one of weights, (warpgroup, row) references and sums, barriers of slabs and parts; room
    to align."""
    return 3 * TILE * p.head_dim * 2 + TILE * TILE * 2 + 4 * TILE * 4 + (2 * (p.head_dim // 64) + 4) * 8 + 1024


def _supports(p: DecodeProblem, t: Target) -> str | None:
    if not t.is_gpu or t.arch != "sm_90":
        return f"needs sm_90 (wgmma), the target is {t.arch}"
    if p.dtype not in ("fp16", "bf16") or p.kv_dtype:
        return f"serves fp16 and bf16 with a cache of the same, not {p.dtype} on {p.kv_dtype or p.dtype}"
    if not p.shared_kv or p.head_dim_v not in LATENT or p.head_dim != p.head_dim_v + ROTARY:
        have = f"{p.head_dim}/{p.head_dim_v}" + ("" if p.shared_kv else ", apart")
        return f"values must be the first {LATENT} columns of keys that have {ROTARY} more, not {have}"
    if p.mask == "window" or p.softcap:
        return "no window and no softcap"
    if p.page == 1:
        return "the copy engine takes pages from 16 rows on"
    return None if p.aligned else "the copy engine needs rows that start at multiples of 16 bytes"


def _split_keys(p: DecodeProblem, t: Target, c: Config, lengths: Sequence[int]) -> int:
    block = {"tile_m": TILE, "tile_n": TILE, "blocks_per_sm": 1, "split_keys": c.split_keys}
    return sm80_decode.split_keys(p, t, Config(block), lengths)


FAMILY = Family(
    name="sm90_decode_mla",
    template="sm90/decode_mla.cu.j2",
    op="decode",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=(),  # a config changes neither registers nor shared memory
    supports=_supports,
    derive=lambda p, t, c: {"threads": THREADS, "smem_bytes": smem_bytes(p), "registers": REGISTERS},
    default=lambda p, t: Config({"rescale": "deferred", "split_keys": 128}),
    flags=lambda t: ("-gencode=arch=compute_90a,code=sm_90a", *FLAGS),
    context=lambda p, c: {
        "wgmma_type": "bf16" if p.dtype == "bf16" else "f16",
        "shared_products": sorted({(TILE, False, False), (p.head_dim_v // 2, False, True)}),
        "register_products": [(p.head_dim_v // 2, True), (TILE, False)],
    },
    serves_calls=lambda p: p.head_dim_v == 512,
    split_keys=_split_keys,
)
