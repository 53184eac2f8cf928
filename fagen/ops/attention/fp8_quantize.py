"""q, k and v as fp8 numbers (e4m3): outliers spread along d, a scale for each kv head, v in the kernels' order."""

from __future__ import annotations

import functools
import math
from random import Random
from typing import NamedTuple

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments, fp8_order
from fagen.ops.attention.call import AXES

LARGEST = 448.0  # of e4m3
_SEED = 20240711  # of the signs: the same for all calls, so that keys quantised once serve all later queries


class QuantizedQKV(NamedTuple):
    """What `fagen.attention` takes: attention(x.q, x.k, x.v, descale_q=x.descale_q, ...)."""

    q: torch.Tensor  # float8_e4m3fn, of the shape and layout of q
    k: torch.Tensor
    v: torch.Tensor  # float8_e4m3fn (batch, kv_heads, blocks of 32 keys, dv, 32): see fp8_order.py
    descale_q: torch.Tensor  # float32 (batch, kv_heads): multiplies q
    descale_k: torch.Tensor
    descale_v: torch.Tensor


def quantize_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: str = "bshd", incoherent: bool = True
) -> QuantizedQKV:
    """q, k and v as fp8 numbers and their scales, for `fagen.attention`.

    q is (batch, seqlen_q, heads, d), k (batch, seqlen_k, kv_heads, d), v (batch, seqlen_k, kv_heads, dv); with
    layout="bhsd" heads come before rows. dv is a multiple of 8. A scale for each (batch, kv head) brings its largest
    number to 448; the heads of q that share keys share one. `fagen.attention` then gives bfloat16, or the dtype of its
    `out`; it takes no column intervals, ALiBi, dropout and gradients with such tensors.

    incoherent    q and k are multiplied by the same orthonormal matrix along d, a random-sign Hadamard one. q k^T stays
                  what it is, and outliers are spread over all columns, so that they no longer decide the scale alone
    """
    incoherent = arguments.flag("incoherent", incoherent)
    _check(q, k, v, layout)
    kv_heads = k.shape[AXES[layout][1]]
    if incoherent:
        q, k = spread_outliers(q), spread_outliers(k)
    (q, of_q), (k, of_k), (v, of_v) = (_quantize(t, kv_heads, layout) for t in (q, k, v))
    rows = v if layout == "bshd" else v.transpose(1, 2)
    return QuantizedQKV(q, k, fp8_order.order_values(rows), of_q, of_k, of_v)


def spread_outliers(t: torch.Tensor) -> torch.Tensor:
    """t times random signs and a Hadamard matrix along the last dimension, in float32.

    The matrix is of as many columns as the largest power of two that divides them, once for each such part.
    """
    columns = t.shape[-1]
    part = columns & -columns
    parts = (t.float() * _signs(columns).to(t.device)).reshape(*t.shape[:-1], columns // part, part)
    return (parts @ _hadamard(part).to(t.device)).reshape(t.shape)


@functools.cache
def _signs(columns: int) -> torch.Tensor:
    random = Random(_SEED)
    return torch.tensor([random.choice((-1.0, 1.0)) for _ in range(columns)])


@functools.cache
def _hadamard(size: int) -> torch.Tensor:
    """Orthonormal; an entry's sign is the parity of the bits that its row and column share."""
    parity = [[(row & column).bit_count() % 2 for column in range(size)] for row in range(size)]
    return (1 - 2 * torch.tensor(parity, dtype=torch.float32)) / math.sqrt(size)


def _quantize(t: torch.Tensor, kv_heads: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers, and the scale of each (batch, kv head) that brings them back."""
    batch, head_axis = t.shape[0], AXES[layout][1]
    by_head = t.float().movedim(head_axis, 1)  # (batch, heads, rows, columns)
    grouped = by_head.reshape(batch, kv_heads, -1)
    largest = grouped.abs().amax(-1) if grouped.shape[-1] else grouped.new_zeros(batch, kv_heads)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0).clamp(min=arguments.LEAST_NUMBER)
    of_heads = scale.repeat_interleave(by_head.shape[1] // kv_heads, dim=1)[:, :, None, None]
    numbers = (by_head / of_heads).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return numbers.movedim(1, head_axis).contiguous(), scale


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    if layout not in AXES:
        raise InvalidArgument(f"layout {arguments.shown(layout)} is unknown", "known: bshd, bhsd")
    for name, t in (("q", q), ("k", k), ("v", v)):
        arguments.dense(name, t)
        if t.dim() != 4 or not t.dtype.is_floating_point or t.dtype.itemsize < 2:
            have = f"it is {t.dtype} of {t.dim()} dimensions"
            raise InvalidArgument(f"{name} must have 4 dimensions and a dtype of 16 bits or more", have)
        if t.device != q.device:
            raise InvalidArgument("q, k and v must be on the same device", f"q {q.device}, {name} {t.device}")
    head, have = AXES[layout][1], f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or v.shape[:3] != k.shape[:3]:
        raise InvalidArgument("k must have the batch and the head_dim of q, v the rows and heads of k", have)
    if 0 in (k.shape[head], q.shape[head], q.shape[3], v.shape[3]) or q.shape[head] % k.shape[head]:
        raise InvalidArgument("Number of heads in key/value must divide number of heads in query", have)
    if v.shape[3] % 8:
        raise InvalidArgument(f"v has {v.shape[3]} columns", "the kernels' order needs a multiple of 8")
