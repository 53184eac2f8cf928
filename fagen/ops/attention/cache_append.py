"""New rows of a call for the kernel that appends them: what it takes, and its params, but for addresses."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from fagen.ops import abi
from fagen.ops.attention.decode_call import DecodeCall, Tensors

Params = abi.params("fagen/abi/append.h")

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MOST_COLUMNS = 1024  # of a head


class NewTokens(NamedTuple):
    """The arguments that speak of new keys and of rotation; validated with the call that they belong to."""

    k: torch.Tensor
    v: torch.Tensor
    starts: torch.Tensor | None  # int32 (batch + 1), of packed rows
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    rotary_seqlens: torch.Tensor | None  # int32 (batch)
    interleaved: bool
    banded: bool  # the call is causal or has a window


def readable(call: DecodeCall, new: NewTokens) -> bool:
    """Whether the kernel can read and write the tensors as they are."""
    given = (new.k, new.v, call.k, call.v, call.q, new.cos, new.sin, call.k_scale, call.v_scale, call.page_table)
    if any(t is not None and t.shape[-1] > 1 and t.stride(-1) != 1 for t in given):
        return False
    if call.q.dtype not in _DTYPES or {new.k.dtype, new.v.dtype} != {call.q.dtype} or not call.batch:
        return False
    if call.k.dtype not in (call.q.dtype, torch.float8_e4m3fn) or max(call.k.shape[3], call.v.shape[3]) > _MOST_COLUMNS:
        return False
    if new.cos is None or new.sin is None:
        return True
    return new.cos.dtype == new.sin.dtype and new.cos.dtype in _DTYPES and bool(call.q.numel())


def sizes_agree(call: DecodeCall, new: NewTokens) -> bool:
    """Whether new rows pass the checks, where others did that differ from them in sizes alone."""
    k, v, starts, angles = new.k.shape, new.v.shape, new.starts, new.cos
    good = k[:-1] == v[:-1] and (k[0] == call.batch if starts is None else starts.shape[0] == call.batch + 1)
    if angles is not None and new.sin is not None:
        good = good and angles.shape == new.sin.shape and angles.shape[0] > 0
    return good and (new.rotary_seqlens is None or new.rotary_seqlens.shape[0] == call.batch)


def make_params(call: DecodeCall, new: NewTokens) -> ctypes.Structure:
    """Sizes and strides; `set_addresses` adds what differs between calls of the same shapes."""
    p: Any = Params()
    _stride(p.k_new, _row_strides(new.k, new.starts))
    _stride(p.v_new, _row_strides(new.v, new.starts))
    _stride(p.k, call.k.stride()[:3])
    _stride(p.v, call.v.stride()[:3])
    if call.page_table is not None:
        p.page_table.stride[0], p.table_pages = call.page_table.stride(0), call.page_table.shape[1]
    for field, t in ((p.k_scale, call.k_scale), (p.v_scale, call.v_scale)):
        _stride(field, () if t is None else t.stride())
    p.batch, p.heads, p.kv_heads = call.batch, call.heads, call.kv_heads
    p.head_dim, p.head_dim_v = call.k.shape[3], call.v.shape[3]
    p.rows, p.most_rows, p.most_keys = call.rows, call.seqlen_q, call.seqlen_k
    p.new_rows = new.k.shape[0] if new.starts is not None else new.k.shape[0] * new.k.shape[1]
    p.most_new = new.k.shape[1] if new.starts is None else 0
    p.pages, p.page_size = call.k.shape[:2]
    p.element, p.fp8_cache = _DTYPES[call.q.dtype], int(call.k.dtype != call.q.dtype)
    if new.cos is not None and new.sin is not None:
        _stride(p.q, _row_strides(call.q, call.cu_seqlens_q))
        _stride(p.q_turned, _row_strides(call.q.new_empty(call.q.shape), call.cu_seqlens_q))
        p.cos.stride[0], p.sin.stride[0] = new.cos.stride(0), new.sin.stride(0)
        p.positions, p.half, p.angle = *new.cos.shape, _DTYPES[new.cos.dtype]
        p.interleaved, p.banded = int(new.interleaved), int(new.banded)
    return p


def _row_strides(t: torch.Tensor, starts: torch.Tensor | None) -> tuple[int, ...]:
    return t.stride()[:3] if starts is None else (0, *t.stride()[:2])


def _stride(field: Any, strides: tuple[int, ...]) -> None:
    field.stride[: len(strides)] = strides


def set_addresses(
    p: Any, call: Tensors | DecodeCall, new: NewTokens, after: torch.Tensor, turned: torch.Tensor | None
) -> None:
    """`after` takes the lengths with the new rows, `turned` q where there is a rotary embedding."""
    p.k_new.data, p.v_new.data, p.k.data, p.v.data = (t.data_ptr() for t in (new.k, new.v, call.k, call.v))
    p.seqlens_k, p.seqlens_after = call.seqlens_k.data_ptr(), after.data_ptr()
    if call.page_table is not None:
        p.page_table.data = call.page_table.data_ptr()
    if call.cache_batch_idx is not None:
        p.cache_batch_idx = call.cache_batch_idx.data_ptr()
    if new.starts is not None:
        p.cu_seqlens_new = new.starts.data_ptr()
    if call.cu_seqlens_q is not None:
        p.cu_seqlens_q = call.cu_seqlens_q.data_ptr()
    if call.k_scale is not None:
        p.k_scale.data = call.k_scale.data_ptr()
    if call.v_scale is not None:
        p.v_scale.data = call.v_scale.data_ptr()
    if new.cos is not None and new.sin is not None and turned is not None:
        p.q.data, p.q_turned.data = call.q.data_ptr(), turned.data_ptr()
        p.cos.data, p.sin.data = new.cos.data_ptr(), new.sin.data_ptr()
        if new.rotary_seqlens is not None:
            p.rotary_seqlens = new.rotary_seqlens.data_ptr()
