"""Calls of the backward op on kernels of the emulator: the params, a launch, gradients that are right."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fagen.ops.attention import reference
from fagen.ops.attention.call import AttentionCall
from fagen.runtime.kernel import workspace_tensor

GRADIENTS = ("dq", "dk", "dv")


class Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3))


class Params(ctypes.Structure):
    """`fagen_backward_params` of `fagen/abi/backward.h`."""

    _fields_ = (
        *((name, Tensor) for name in "q k v o dout dq dk dv intervals alibi_slopes".split()),
        *((name, ctypes.c_void_p) for name in "lse dlse workspace".split()),
        *((name, ctypes.c_int32) for name in "batch heads kv_heads mask_heads seqlen_q seqlen_k".split()),
        *((name, ctypes.c_int32) for name in "head_dim head_dim_v window_left window_right".split()),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


def make_params(call: AttentionCall, tensors: dict[str, torch.Tensor | None]) -> Params:
    """`tensors`: o, dout, lse, dlse and the gradients, by name. They must outlive the params."""
    params = Params()
    for name, t in ({"q": call.q, "k": call.k, "v": call.v} | tensors).items():
        if name in ("lse", "dlse"):
            setattr(params, name, None if t is None else t.data_ptr())
        else:
            stride = t.stride()
            axes = (stride[0], stride[call.row_axis], stride[call.head_axis])
            setattr(params, name, Tensor(t.data_ptr(), (ctypes.c_int64 * 3)(*axes)))
    if call.intervals is not None:
        batch, head, key, _ = call.intervals.stride()
        axes = (batch if call.intervals.shape[0] > 1 else 0, head, key)
        params.intervals = Tensor(call.intervals.data_ptr(), (ctypes.c_int64 * 3)(*axes))
        params.mask_heads = call.intervals.shape[1]
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes
        by = slopes.stride(0) if slopes.dim() == 2 and slopes.shape[0] > 1 else 0
        params.alibi_slopes = Tensor(slopes.data_ptr(), (ctypes.c_int64 * 3)(by, 0, 0))
    params.batch, params.heads, params.kv_heads = call.batch, call.heads, call.kv_heads
    params.seqlen_q, params.seqlen_k = call.seqlen_q, call.seqlen_k
    params.head_dim, params.head_dim_v = call.q.shape[3], call.v.shape[3]
    left, right = call.window
    params.window_left, params.window_right = min(left, params.seqlen_k), min(right, params.seqlen_q)
    params.scale = 1.0 / math.sqrt(call.q.shape[3]) if call.scale is None else call.scale
    params.softcap = call.softcap
    return params


Tensors = dict[str, "torch.Tensor | None"]


def launch_emulated(library: Path, call: AttentionCall, tensors: Tensors, seed: int, units: int) -> None:
    """On an emulated GPU of so many SMs; `seed` decides what comes first wherever that is open."""
    ctypes.CDLL(str(library)).emulator_begin(ctypes.c_uint64(seed), ctypes.c_int(units))
    launch(library, call, tensors)


def launch(library: Path, call: AttentionCall, tensors: Tensors, stream: int | None = None) -> None:
    kernel, params = ctypes.CDLL(str(library)), make_params(call, tensors)
    assert kernel.fagen_params_size() == ctypes.sizeof(Params)
    kernel.fagen_workspace_bytes.restype, kernel.fagen_error.restype = ctypes.c_uint64, ctypes.c_char_p
    kernel.fagen_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    memory = torch.empty(0)
    if need := kernel.fagen_workspace_bytes(ctypes.byref(params)):
        memory, params.workspace = workspace_tensor(need, call.q.device)
        memory.fill_(0xA5)
    status = kernel.fagen_launch(ctypes.byref(params), stream)
    assert status == 0, kernel.fagen_error(status).decode()


def gradients(call: AttentionCall, dout: torch.Tensor, dlse: torch.Tensor | None, dtype: torch.dtype) -> tuple:
    """O, LSE and the gradients of q, k and v by PyTorch in a dtype, in bhsd order."""
    tensors = tuple(t.detach().to(dtype).requires_grad_() for t in call.bhsd())
    out, lse = reference.attend(call, tensors, reference.visible(call))
    of = [out] if dlse is None else [out, torch.where(torch.isfinite(lse), lse, 0)]
    by = [dout.to(dtype)] if dlse is None else [dout.to(dtype), dlse.to(lse.dtype)]
    return out.detach(), lse.detach(), torch.autograd.grad(of, tensors, by)


def check(
    call: AttentionCall,
    run: Callable[[Tensors], None],
    generator: torch.Generator,
    with_dlse: bool = False,
) -> dict[str, torch.Tensor]:
    """`run` fills the gradients; each is asserted to be within 3 x PyTorch's own error in the call's dtype."""
    like: dict[str, Any] = {"device": call.q.device, "generator": generator}
    shape = (call.batch, call.heads, call.seqlen_q)
    dout = torch.randn(*shape, call.v.shape[3], **like).to(call.q.dtype)
    dlse = torch.randn(shape, **like) if with_dlse else None
    out, lse, exact = gradients(call, dout, dlse, torch.float64)
    _, _, low = gradients(call, dout, dlse, call.q.dtype)

    def laid(t: torch.Tensor) -> torch.Tensor:  # from bhsd order to the call's
        return t.transpose(1, 2).contiguous() if call.layout == "bshd" else t.contiguous()

    given = {"q": call.q, "k": call.k, "v": call.v}
    filled = {name: torch.full_like(given[name[1:]], torch.nan) for name in GRADIENTS}
    run({"o": laid(out.to(dout.dtype)), "dout": laid(dout), "lse": lse.float().contiguous(), "dlse": dlse} | filled)
    for name, want, peer in zip(GRADIENTS, exact, low, strict=True):
        mine = filled[name].transpose(1, 2) if call.layout == "bshd" else filled[name]
        error, allowed = (mine.double() - want).abs(), (peer.double() - want).abs().max()
        bound = 3 * allowed + torch.finfo(mine.dtype).eps * want.abs().max() + 1e-6
        assert error.max() <= bound, f"{name}: error {error.max():.3g} > {bound:.3g} at {_worst(error)}"
        assert torch.isfinite(mine).all(), f"{name} is not finite"
    return filled


def _worst(error: torch.Tensor) -> list[int]:
    flat = error.nan_to_num(torch.inf).argmax()
    return [int(i) for i in torch.unravel_index(flat, error.shape)]
