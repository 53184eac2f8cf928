"""`fagen_params`, the struct of a launch, filled for ctypes."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from fagen.ops.attention.call import AttentionCall

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


def make_params(call: AttentionCall, outputs: Mapping[str, torch.Tensor]) -> Params:
    """The struct; holds pointers, so the tensors must outlive it."""
    q, k, v, out, lse = call.q, call.k, call.v, outputs["out"], outputs.get("lse")
    axes = (0, call.row_axis, call.head_axis)
    params = Params(q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), o=out.data_ptr())
    for name, tensor in zip("qkvo", (q, k, v, out), strict=True):
        stride = tensor.stride()
        setattr(params, f"{name}_stride", _Strides(*(stride[i] for i in axes)))
    if lse is not None:
        params.lse = lse.data_ptr()
    if call.intervals is not None:
        params.intervals, params.mask_heads = call.intervals.data_ptr(), call.intervals.shape[1]
        batch, head, key, _ = call.intervals.stride()
        params.intervals_stride = _Strides(batch if call.intervals.shape[0] > 1 else 0, head, key)
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes
        params.alibi_slopes = slopes.data_ptr()
        params.alibi_stride = slopes.stride(0) if slopes.dim() == 2 and slopes.shape[0] > 1 else 0
    params.batch, params.seqlen_q, params.heads = call.batch, call.seqlen_q, call.heads
    params.seqlen_k, params.kv_heads = call.seqlen_k, call.kv_heads
    params.head_dim, params.head_dim_v = q.shape[3], v.shape[3]
    # a wider band shows no more, and its sum with a row would leave 32 bits
    left, right = call.window
    params.window_left, params.window_right = min(left, params.seqlen_k), min(right, params.seqlen_q)
    params.scale = 1.0 / math.sqrt(q.shape[3]) if call.scale is None else call.scale
    params.softcap = call.softcap
    return params
