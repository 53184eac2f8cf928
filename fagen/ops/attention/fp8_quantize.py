"""q, k and v as fp8 numbers (e4m3): outliers spread along d, scales of heads or blocks, v in the kernels' order."""

from __future__ import annotations

import functools
import math
from random import Random
from typing import NamedTuple

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments, fp8_order
from fagen.ops.attention.cache_update import rotate
from fagen.ops.attention.call import AXES

LARGEST = 448.0  # of e4m3
_SEED = 20240711  # of the signs: the same for all calls, so that keys quantised once serve all later queries


class QuantizedQKV(NamedTuple):
    """What `fagen.attention` takes: attention(x.q, x.k, x.v, descale_q=x.descale_q, ...)."""

    q: torch.Tensor  # float8_e4m3fn, of the shape and layout of q
    k: torch.Tensor
    v: torch.Tensor  # float8_e4m3fn (batch, kv_heads, blocks of 32 keys, dv, 32): see fp8_order.py
    descale_q: torch.Tensor  # float32: multiplies q; (batch, kv_heads), of blocks (batch, heads, blocks)
    descale_k: torch.Tensor  # the same of k: (batch, kv_heads) or (batch, kv_heads, blocks)
    descale_v: torch.Tensor  # (batch, kv_heads)
    block: int = 0  # rows of q, and of k, that share a scale; 0: all of a (batch, kv head)


class Rotary(NamedTuple):
    """Angles by which q and k are turned first. Row j of k has position j, row i of q i + seqlen_k - seqlen_q."""

    cos: torch.Tensor  # (positions, half of the columns that are turned)
    sin: torch.Tensor
    interleaved: bool  # pairs of neighbours, else of the two halves


def by_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, incoherent: bool, block: int = 0,
    rotary: Rotary | None = None,
) -> QuantizedQKV:  # fmt: skip
    """What `fagen.quantize_qkv` says, of tensors that `check` has seen."""
    kv_heads = k.shape[AXES[layout][1]]
    if rotary is not None:
        row = AXES[layout][0]
        q, k = (_turned(t, k.shape[row], layout, rotary) for t in (q, k))
    if incoherent:
        q, k = spread_outliers(q), spread_outliers(k)
    (q, of_q), (k, of_k) = (_quantize(t, kv_heads, layout, block) for t in (q, k))
    v, of_v = _quantize(v, kv_heads, layout, 0)
    rows = v if layout == "bshd" else v.transpose(1, 2)
    return QuantizedQKV(q, k, fp8_order.order_values(rows), of_q, of_k, of_v, block)


def _turned(t: torch.Tensor, seqlen_k: int, layout: str, rotary: Rotary) -> torch.Tensor:
    """In float32."""
    by_row = t.float() if layout == "bshd" else t.float().transpose(1, 2)
    positions = torch.arange(seqlen_k - by_row.shape[1], seqlen_k, device=t.device)
    made = rotate(by_row, positions, rotary.cos, rotary.sin, interleaved=rotary.interleaved)
    return made if layout == "bshd" else made.transpose(1, 2)


def spread_outliers(t: torch.Tensor) -> torch.Tensor:
    """t times random signs and a Hadamard matrix along the last dimension, in float32.

    The matrix is of as many columns as the largest power of two that divides them, once for each such part.
    """
    columns = t.shape[-1]
    part = columns & -columns
    parts = (t.float() * torch.tensor(signs(columns), device=t.device)).reshape(*t.shape[:-1], columns // part, part)
    return (parts @ _hadamard(part, t.device)).reshape(t.shape)


@functools.lru_cache(maxsize=64)
def signs(columns: int) -> list[float]:
    """1 and -1 at random, the same on every machine."""
    random = Random(_SEED)
    return [1.0 - 2 * random.getrandbits(1) for _ in range(columns)]


def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """Orthonormal; an entry's sign is the parity of the bits that its row and column share."""
    made = torch.ones(1, 1, device=device)
    while made.shape[0] < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made / math.sqrt(size)


def _quantize(t: torch.Tensor, kv_heads: int, layout: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers, and the scales that bring them back: of each (batch, kv head), or of each block of rows."""
    batch, head_axis = t.shape[0], AXES[layout][1]
    by_head = t.float().movedim(head_axis, 1)  # (batch, heads, rows, columns)
    heads, rows = by_head.shape[1:3]
    if block:
        padded = torch.nn.functional.pad(by_head, (0, 0, 0, -rows % block))
        grouped = padded.unflatten(2, (-1, block)).flatten(3)
    else:
        grouped = by_head.reshape(batch, kv_heads, -1)
    largest = grouped.abs().amax(-1) if grouped.shape[-1] else grouped.new_zeros(batch, kv_heads)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0).clamp(min=arguments.LEAST_NUMBER)
    if block:
        of_rows = scale.repeat_interleave(block, dim=2)[:, :, :rows, None]
    else:
        of_rows = scale.repeat_interleave(heads // kv_heads, dim=1)[:, :, None, None]
    numbers = (by_head / of_rows).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return numbers.movedim(1, head_axis).contiguous(), scale


def descale_shapes(
    batch: int, heads: int, kv_heads: int, seqlen_q: int, seqlen_k: int, block: int
) -> tuple[tuple[int, ...], ...]:
    """Of q's, k's and v's."""
    of_head = batch, kv_heads
    if not block:
        return of_head, of_head, of_head
    return (batch, heads, -(-seqlen_q // block)), (batch, kv_heads, -(-seqlen_k // block)), of_head


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    if layout not in tuple(AXES):
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


def rotary_of(
    q: torch.Tensor, k: torch.Tensor, layout: str, cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool
) -> Rotary | None:
    """The embedding that arguments name, of q and k that `check` has seen; None if there is none."""
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        raise InvalidArgument("rotary_cos and rotary_sin go together")
    row, columns = AXES[layout][0], q.shape[3]
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        arguments.dense(name, t)
        good = t.dim() == 2 and t.shape == cos.shape and 0 < t.shape[1] <= columns // 2
        if not good or t.device != q.device or not t.dtype.is_floating_point:
            have = f"it is {t.dtype} {tuple(t.shape)} on {t.device}"
            raise InvalidArgument(f"{name} must be (positions, {columns // 2} or less) on {q.device}", have)
    if cos.shape[0] < k.shape[row]:
        raise InvalidArgument(f"rotary_cos has {cos.shape[0]} positions", f"there are {k.shape[row]} keys")
    if q.shape[row] > k.shape[row]:
        have = f"{q.shape[row]} rows, {k.shape[row]} keys"
        raise InvalidArgument("with a rotary embedding the rows of q are the last positions of k", have)
    return Rotary(cos, sin, interleaved)
