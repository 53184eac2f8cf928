"""The params of a launch, forward and backward, filled for ctypes."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

from fagen.ops import abi

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from fagen.ops.attention.backward_call import BackwardCall
    from fagen.ops.attention.call import AttentionCall

Params, BackwardParams = abi.params("fagen/abi/forward.h"), abi.params("fagen/abi/backward.h")


def make_params(call: AttentionCall, outputs: Mapping[str, torch.Tensor]) -> ctypes.Structure:
    """The struct of the header; holds pointers, so the tensors must outlive it."""
    params: Any = Params()
    _put_problem(params, call, {"q": call.q, "k": call.k, "v": call.v, "o": outputs["out"]})
    if (lse := outputs.get("lse")) is not None:
        params.lse = lse.data_ptr()
    return params


def make_backward_params(call: BackwardCall, outputs: Mapping[str, torch.Tensor]) -> ctypes.Structure:
    """The same for the gradients of a call."""
    params: Any = BackwardParams()
    _put_problem(params, call, {"q": call.q, "k": call.k, "v": call.v, "o": call.o, "dout": call.dout, **outputs})
    params.lse, params.dlse = call.lse.data_ptr(), None if call.dlse is None else call.dlse.data_ptr()
    return params


def _put_problem(params: Any, call: AttentionCall, of_rows: Mapping[str, torch.Tensor]) -> None:
    """What the structs of both ops have."""
    axes = (0, call.row_axis, call.head_axis)
    for name, tensor in of_rows.items():
        point(getattr(params, name), tensor, *(tensor.stride(i) for i in axes))
    point_intervals(params, call.intervals)
    if (slopes := call.alibi_slopes) is not None:
        point(params.alibi_slopes, slopes, slopes.stride(0) if slopes.dim() == 2 and slopes.shape[0] > 1 else 0)
    params.batch, params.seqlen_q, params.heads = call.batch, call.seqlen_q, call.heads
    params.seqlen_k, params.kv_heads = call.seqlen_k, call.kv_heads
    params.head_dim, params.head_dim_v = call.q.shape[3], call.v.shape[3]
    # a wider band shows no more, and its sum with a row would leave 32 bits
    left, right = call.window
    params.window_left, params.window_right = min(left, params.seqlen_k), min(right, params.seqlen_q)
    params.scale = 1.0 / math.sqrt(call.q.shape[3]) if call.scale is None else call.scale
    params.softcap = call.softcap
    if call.rng is not None:
        params.dropout, params.rng = call.dropout, call.rng.data_ptr()


def point_intervals(params: Any, intervals: torch.Tensor | None) -> None:
    if intervals is not None:
        batch, head, key, _ = intervals.stride()
        point(params.intervals, intervals, batch if intervals.shape[0] > 1 else 0, head, key)
        params.mask_heads = intervals.shape[1]


def point(field: Any, tensor: torch.Tensor, *strides: int) -> None:
    field.data = tensor.data_ptr()
    for i, stride in enumerate(strides):
        field.stride[i] = stride
