"""`fagen_params`, the struct of a launch, filled for ctypes."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

from fagen.errors import InvalidArgument

if TYPE_CHECKING:
    import torch


ALIGNMENT = 16  # bytes, of every row of an `aligned` problem

_Strides = ctypes.c_int64 * 3


class Params(ctypes.Structure):
    """`fagen_params` of `fagen/abi/forward.h`; its size is compared with the kernel's when one is loaded."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "q k v o lse intervals alibi_slopes workspace".split()),
        *((f"{name}_stride", _Strides) for name in "q k v o intervals".split()),
        ("alibi_stride", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in "batch heads kv_heads mask_heads seqlen_q seqlen_k head_dim head_dim_v "
            "window_left window_right".split()
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


def _order(layout: str) -> tuple[int, int, int]:
    """Where batch, row and head are."""
    if layout not in ("bshd", "bhsd"):
        raise InvalidArgument(f"layout {layout!r} is unknown", "known: bshd, bhsd")
    return (0, 1, 2) if layout == "bshd" else (0, 2, 1)


def make_params(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    intervals: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    layout: str = "bhsd",
) -> Params:
    """The struct; holds pointers, so the tensors must outlive it."""
    order = _order(layout)
    largest = max(*q.shape, *k.shape, *v.shape)
    _want(largest < 2**31, "a size is beyond 2^31 - 1", str(largest))  # ctypes would cut it
    params = Params(q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), o=out.data_ptr())
    for name, tensor in zip("qkvo", (q, k, v, out), strict=True):
        stride = tensor.stride()
        setattr(params, f"{name}_stride", _Strides(*(stride[i] for i in order)))
    if lse is not None:
        params.lse = lse.data_ptr()
    if intervals is not None:
        params.intervals, params.mask_heads = intervals.data_ptr(), intervals.shape[1]
        batch, head, key, _ = intervals.stride()
        params.intervals_stride = _Strides(batch if intervals.shape[0] > 1 else 0, head, key)
    if alibi_slopes is not None:
        params.alibi_slopes = alibi_slopes.data_ptr()
        several = alibi_slopes.dim() == 2 and alibi_slopes.shape[0] > 1
        params.alibi_stride = alibi_slopes.stride(0) if several else 0
    _, row, head = order
    params.batch, params.seqlen_q, params.heads = q.shape[0], q.shape[row], q.shape[head]
    params.seqlen_k, params.kv_heads = k.shape[row], k.shape[head]
    params.head_dim, params.head_dim_v = q.shape[3], v.shape[3]
    # a wider band shows no more, and its sum with a row would leave 32 bits
    params.window_left, params.window_right = min(window[0], params.seqlen_k), min(window[1], params.seqlen_q)
    params.scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    params.softcap = softcap
    return params


def _want(good: bool, what: str, numbers: str = "") -> None:
    if not good:
        raise InvalidArgument(what, numbers)


def is_aligned(t: torch.Tensor) -> bool:
    """Every row starts at a multiple of 16 bytes, is whole 16-byte pieces, and lies apart from the others.

    An expanded dimension (stride 0) counts as not aligned: a tensor map is not known to take it.
    """
    item = t.element_size()
    if t.data_ptr() % ALIGNMENT or t.shape[-1] * item % ALIGNMENT:
        return False
    strides = (t.stride(i) for i in range(t.dim() - 1) if t.shape[i] > 1)  # others are never used
    return all(stride != 0 and stride * item % ALIGNMENT == 0 for stride in strides)
