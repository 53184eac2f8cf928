"""What families of CUDA kernels ask alike, of a GPU and of the order of blocks, each with the reason it gives."""

from __future__ import annotations

from typing import Any

from fagen.families.base import Config
from fagen.target import Target

RESERVED = 1024  # bytes of shared memory that a resident block takes beside its own


def needs_sm80(t: Target) -> str | None:
    if not t.is_gpu:
        return "needs a GPU"
    return f"needs sm_80 or newer, the target is {t.arch}" if t.capability < 80 else None


def smem_fits(need: int, t: Target, c: Config) -> str | None:
    """`need` bytes of a block, and `blocks_per_sm` of them on an SM."""
    if need > t.smem_per_block:
        return f"{need} > {t.smem_per_block} bytes of shared memory on {t.arch}"
    if c.blocks_per_sm * (need + RESERVED) > t.smem_per_unit:
        return f"{c.blocks_per_sm} blocks x {need + RESERVED} > {t.smem_per_unit} bytes of shared memory an SM"
    return None


def registers_fit(need: int, limit: int, c: Config) -> str | None:
    """Of a thread, where so many warps and blocks share an SM's."""
    fits = need <= limit
    return None if fits else f"about {need} > {limit} registers a thread ({c.warps} warps x {c.blocks_per_sm} blocks)"


def order_matters(p: Any, t: Target, c: Config) -> str | None:
    """Of forward kernels, whose blocks have tiles of rows."""
    if p.mask == "none" and c.block_order in ("descending", "longest_first"):
        return f"without a mask all rows are equally long, block_order={c.block_order} only repeats another"
    return None


def gencode(t: Target) -> str:
    """The flag that has nvcc compile for the target alone."""
    return f"-gencode=arch=compute_{t.capability},code=sm_{t.capability}"
