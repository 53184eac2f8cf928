"""The params of the kernels that make fp8 numbers, and what they write."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from fagen.ops.attention import fp8_order, fp8_quantize
from fagen.ops.attention.arguments import is_aligned
from fagen.ops.attention.call import AXES
from fagen.ops.attention.fp8_call import E4M3
from fagen.ops.attention.fp8_quantize import QuantizedQKV, Rotary
from fagen.ops.attention.params import point

_ELEMENTS = (torch.float32, torch.float16, torch.bfloat16)  # in the order of the header
_PIECE = 16  # columns that a lane holds
_LARGEST_DIM, _LARGEST_SIZE = 256, 1 << 29


@functools.lru_cache(maxsize=64)
def _signs_on(columns: int, device: torch.device) -> torch.Tensor:
    """On the device once: a launch that is captured in a graph may not copy them there."""
    return torch.tensor(fp8_quantize.signs(columns), device=device)


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None = None) -> bool:
    """Whether the kernels take the tensors, which `fp8_quantize` has checked."""
    same = q.dtype == k.dtype == v.dtype and q.dtype in _ELEMENTS
    dims = all(t.shape[3] % _PIECE == 0 and t.shape[3] <= _LARGEST_DIM for t in (k, v))
    sizes = all(0 < n <= _LARGEST_SIZE for t in (q, k) for n in t.shape)
    if rotary is not None and not rotary.interleaved and rotary.cos.shape[1] % _PIECE:
        return False
    return same and dims and sizes and all(t.stride(3) == 1 and is_aligned(t) for t in (q, k, v))


def prepare(
    kind: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, incoherent: bool, block: int,
    rotary: Rotary | None,
) -> tuple[QuantizedQKV, Any, tuple[torch.Tensor, ...]]:  # fmt: skip
    """What is written, the params of type `kind`, and tensors that must outlive the launch: q first."""
    row, head = AXES[layout]
    batch, heads, kv_heads = q.shape[0], q.shape[head], k.shape[head]
    seqlen_q, seqlen_k, columns = q.shape[row], k.shape[row], v.shape[3]
    q_fp8, k_fp8 = (torch.empty(t.shape, dtype=E4M3, device=q.device) for t in (q, k))
    ordered = (batch, kv_heads, fp8_order.blocks(seqlen_k), columns, fp8_order.BLOCK_KEYS)
    v_fp8 = torch.empty(ordered, dtype=E4M3, device=q.device)
    shapes = fp8_quantize.descale_shapes(batch, heads, kv_heads, seqlen_q, seqlen_k, block)
    scales = [math.prod(shape) for shape in shapes]
    largest = torch.zeros(sum(scales), dtype=torch.int32, device=q.device)
    descales = torch.empty(sum(scales), device=q.device)
    signs = _signs_on(q.shape[3], q.device) if incoherent else None
    p = kind()
    named = (("q", q), ("k", k), ("v", v), ("q_fp8", q_fp8), ("k_fp8", k_fp8))
    for name, t in named:
        point(getattr(p, name), t, t.stride(0), t.stride(row), t.stride(head))
    p.v_fp8, p.largest, p.descales = v_fp8.data_ptr(), largest.data_ptr(), descales.data_ptr()
    p.signs = None if signs is None else signs.data_ptr()
    p.batch, p.heads, p.kv_heads, p.seqlen_q, p.seqlen_k = batch, heads, kv_heads, seqlen_q, seqlen_k
    p.head_dim, p.head_dim_v, p.element, p.block = q.shape[3], columns, _ELEMENTS.index(q.dtype), block
    angles = () if rotary is None else tuple(t.float().contiguous() for t in (rotary.cos, rotary.sin))
    if rotary is not None:
        p.cos, p.sin = (t.data_ptr() for t in angles)
        p.half, p.interleaved = rotary.cos.shape[1], rotary.interleaved
    of_q, of_k, of_v = (t.view(shape) for t, shape in zip(descales.split(scales), shapes, strict=True))
    made = QuantizedQKV(q_fp8, k_fp8, v_fp8, of_q, of_k, of_v, block)
    return made, p, (q, k, v, largest, *angles, *([] if signs is None else [signs]))
