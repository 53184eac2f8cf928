"""`fagen_backward_params`, the struct of a launch, filled for ctypes."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from fagen.ops.attention.backward_call import BackwardCall


class Tensor(ctypes.Structure):
    """`fagen_tensor` of `fagen/abi/tensor.h`."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3)]


class BackwardParams(ctypes.Structure):
    """`fagen_backward_params` of `fagen/abi/backward.h`."""

    _fields_ = [
        *((name, Tensor) for name in "q k v o dout dq dk dv intervals alibi_slopes".split()),
        *((name, ctypes.c_void_p) for name in "lse dlse workspace".split()),
        *(
            (name, ctypes.c_int32)
            for name in "batch heads kv_heads mask_heads seqlen_q seqlen_k head_dim head_dim_v "
            "window_left window_right".split()
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


def make_backward_params(call: BackwardCall, outputs: Mapping[str, torch.Tensor]) -> BackwardParams:
    """The struct; holds pointers, so the tensors must outlive it."""
    axes, params = (0, call.row_axis, call.head_axis), BackwardParams()
    of_rows = {"q": call.q, "k": call.k, "v": call.v, "o": call.o, "dout": call.dout, **outputs}
    for name, tensor in of_rows.items():
        _point(getattr(params, name), tensor, *(tensor.stride(i) for i in axes))
    params.lse, params.dlse = call.lse.data_ptr(), None if call.dlse is None else call.dlse.data_ptr()
    if (intervals := call.intervals) is not None:
        batch, head, key, _ = intervals.stride()
        _point(params.intervals, intervals, batch if intervals.shape[0] > 1 else 0, head, key)
        params.mask_heads = intervals.shape[1]
    if (slopes := call.alibi_slopes) is not None:
        _point(params.alibi_slopes, slopes, slopes.stride(0) if slopes.dim() == 2 and slopes.shape[0] > 1 else 0)
    params.batch, params.seqlen_q, params.heads = call.batch, call.seqlen_q, call.heads
    params.seqlen_k, params.kv_heads = call.seqlen_k, call.kv_heads
    params.head_dim, params.head_dim_v = call.q.shape[3], call.v.shape[3]
    # a wider band shows no more, and its sum with a row would leave 32 bits
    left, right = call.window
    params.window_left, params.window_right = min(left, params.seqlen_k), min(right, params.seqlen_q)
    params.scale = 1.0 / math.sqrt(call.q.shape[3]) if call.scale is None else call.scale
    params.softcap = call.softcap
    return params


def _point(field: Tensor, tensor: torch.Tensor, *strides: int) -> None:
    field.data = tensor.data_ptr()
    for i, stride in enumerate(strides):
        field.stride[i] = stride
