"""From a call of decode to its result: the kernel that dispatch chooses, launched through ctypes, else PyTorch.

A decode step is short, so what Python does counts. All that follows from shapes, strides and settings is kept by them:
a call of a kind seen before fills in addresses and launches.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fagen.dispatch import resolve
from fagen.notices import warn_fallback
from fagen.ops.attention import decode_checks, decode_reference
from fagen.ops.attention.arguments import ALIGNMENT
from fagen.ops.attention.decode_call import EMPTY, DecodeCall
from fagen.ops.attention.decode_calls import make_params
from fagen.runtime import decode_ops
from fagen.runtime.kernel import WORKSPACE_ALIGNMENT

if TYPE_CHECKING:
    from fagen.dispatch.plan import Answer
    from fagen.runtime.kernel import Kernel

PINNED_KEYS = 512  # of a split, with pinned numerics
_MOST_KINDS = 4096  # of calls that are kept


@dataclass(frozen=True)
class _Prepared:
    """What all calls of a kind share. It holds until dispatch's answers change."""

    kernel: Kernel
    params: ctypes.Structure  # no address in it is used
    workspace_bytes: int
    out: tuple[int, ...]  # shapes of the outputs
    lse: tuple[int, ...]
    epoch: object


_kinds: dict[tuple[Any, ...], _Prepared] = {}


def attend(call: DecodeCall, want_lse: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse), or (out, None). A call of a new kind is validated, but for the contents of its tensors."""
    try:
        key = kind(call)
    except (AttributeError, RuntimeError):  # no tensor, or not of strides: to be told in words
        call.check_tensors()
        raise
    prepared = _kinds.get(key)
    if prepared is None or prepared.epoch is not resolve.epoch():
        call.check_arguments()
        call.check_tensors()
        prepared = _prepare(call, key)
    return _by_torch(call) if prepared is None else _launch(prepared, call, want_lse)


def kind(call: DecodeCall) -> tuple[Any, ...]:
    """All that the checks of tensors look at, and that the kernel and its params, but for addresses, follow from."""
    q, k, v = call.q, call.k, call.v
    tensors = (
        q, k, v, call.seqlens_k, call.page_table, call.cu_seqlens_q, call.cache_batch_idx, call.k_scale, call.v_scale,
        call.sinks,
    )  # fmt: skip
    return (
        *[None if t is None else (t.dtype, t.device, t.shape, t.stride()) for t in tensors],
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT, k.data_ptr() == v.data_ptr(), call.window,
        call.softcap, call.scale, call.num_splits, call.most_rows, call.most_keys,
    )  # fmt: skip


def _prepare(call: DecodeCall, key: tuple[Any, ...]) -> _Prepared | None:
    """Ask dispatch. None where PyTorch computes, for now or for good."""
    epoch = resolve.epoch()
    found = _answer(call)
    if found is None or found.kernel is None:
        return None
    kernel, outputs = found.kernel, call.new_outputs()
    params = make_params(call, outputs)
    with torch.cuda.device(call.q.device) if call.q.is_cuda else nullcontext():  # a kernel may ask it for its SMs
        need = kernel.library.workspace_bytes(ctypes.byref(params))
    prepared = _Prepared(kernel, params, need, tuple(outputs["out"].shape), tuple(outputs["lse"].shape), epoch)
    if found.known:
        if len(_kinds) >= _MOST_KINDS:
            _kinds.clear()
        _kinds[key] = prepared
    return prepared


def _answer(call: DecodeCall) -> Answer | None:
    reason = call.unreadable
    target = None if reason else call.target
    if target is None:
        if reason != EMPTY:
            warn_fallback(reason or f"no kernels for device {call.q.device}")
        return None
    problem = call.problem
    if call.num_splits < 0:  # the choice of a kernel may not depend on the other sequences either
        problem = problem.replace(batch=1, seqlen_q=1, seqlen_k=8 * PINNED_KEYS)
    with torch.cuda.device(call.q.device) if call.q.is_cuda else nullcontext():  # where a stale kernel is verified
        return resolve.answer(problem, target, ours=True)


def _launch(prepared: _Prepared, call: DecodeCall, want_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    q = call.q
    out = q.new_empty(prepared.out)
    lse = q.new_empty(prepared.lse, dtype=torch.float32) if want_lse else None
    params: Any = type(prepared.params).from_buffer_copy(prepared.params)  # other threads have their own
    params.q.data, params.k.data, params.v.data = q.data_ptr(), call.k.data_ptr(), call.v.data_ptr()
    params.o.data, params.lse = out.data_ptr(), None if lse is None else lse.data_ptr()
    params.seqlens_k = call.seqlens_k.data_ptr()
    if call.page_table is not None:
        params.page_table.data = call.page_table.data_ptr()
    if call.cu_seqlens_q is not None:
        params.cu_seqlens_q = call.cu_seqlens_q.data_ptr()
    if call.cache_batch_idx is not None:
        params.cache_batch_idx = call.cache_batch_idx.data_ptr()
    if call.sinks is not None:
        params.sinks = call.sinks.data_ptr()
    if call.k_scale is not None:
        params.k_scale.data = call.k_scale.data_ptr()
    if call.v_scale is not None:
        params.v_scale.data = call.v_scale.data_ptr()
    size = prepared.workspace_bytes
    if size:
        workspace = q.new_empty(size + WORKSPACE_ALIGNMENT, dtype=torch.uint8)
        params.workspace = -(-workspace.data_ptr() // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
    if q.is_cuda:
        with torch.cuda.device(q.device):
            stream = torch.cuda.current_stream(q.device).cuda_stream
            status = prepared.kernel.library.launch(params, stream)
    else:
        status = prepared.kernel.library.launch(params, None)
    if status:
        prepared.kernel.fail(status, call)
    return out, lse


def _by_torch(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """In float32, as kernels compute."""
    if not call.q.is_cuda:
        decode_checks.check_contents(call)
    if not call.q.numel():
        made = call.new_outputs()
        return made["out"], made["lse"]
    dtype = call.q.dtype
    out, lse = decode_reference.attend(call, torch.float32 if dtype.itemsize < 4 else dtype)
    return out.to(dtype).contiguous(), lse.float().contiguous()


decode_ops.answer_with(attend)
