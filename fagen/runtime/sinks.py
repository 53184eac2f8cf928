"""Attention sinks applied to a kernel's output by one kernel, forward and backward, where PyTorch has some seven and
twenty. A compiler fuses PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import increment_version

from fagen.ops.attention import derivatives
from fagen.ops.attention import sinks as logits
from fagen.ops.attention.arguments import is_plain
from fagen.runtime import helper
from fagen.runtime.kernel import Library
from fagen.target import target_of

HELPER = helper.Helper("sinks", "fagen/abi/sinks.h", "sinks/sinks.cu.j2", None, "PyTorch applies attention sinks")
Params = HELPER.params

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_Pair = tuple[torch.Tensor, torch.Tensor]


def apply(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, layout: str, *, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ops.attention.sinks.apply` does it."""
    library = _library(out, lse, sinks)
    if library is None:
        return logits.apply(out, lse, sinks, layout, in_place=in_place)
    if not derivatives.differentiated(out, lse, sinks):
        _launch(library, layout, out, lse, sinks, out, lse)
        if in_place and not out.is_inference():
            increment_version(out)  # whoever saved it for a gradient must learn that it has changed
        return out, lse
    if in_place:
        return logits.apply(out, lse, sinks, layout, in_place=True)
    found: _Pair = _Applied.apply(out, lse, sinks, layout, library)
    return found


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, layout: str, by: Library) -> _Pair:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, sinks)
        ctx.layout, ctx.library = layout, by
        to = torch.empty_like(out), torch.empty_like(lse)
        _launch(by, layout, out, lse, sinks, *to)
        return to

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        out, lse, sinks = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        to, shares = (torch.empty_like(out), torch.empty_like(lse)), torch.empty_like(lse)
        _launch(ctx.library, ctx.layout, out, lse, sinks, *to, dout, dlse, shares)
        wanted = ctx.needs_input_grad[2]
        return *to, shares.sum((0, 2)).to(sinks.dtype) if wanted else None, None, None


def _library(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> Library | None:
    """The kernel; None where PyTorch applies the sinks, for now or for good."""
    if not (out.is_cuda and is_plain(out) and is_plain(sinks)) or derivatives.in_forward_mode():
        return None
    known = out.dtype in _DTYPES and sinks.dtype in _DTYPES and lse.dtype == torch.float32
    readable = out.stride(-1) == 1 and lse.is_contiguous() and sinks.is_contiguous()
    target = target_of(out.device)
    if not (known and readable and out.numel()) or target is None:
        return None
    return HELPER.library(target, torch.cuda.is_current_stream_capturing())


def _launch(
    library: Library, layout: str, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, to: torch.Tensor,
    lse_to: torch.Tensor, dout: torch.Tensor | None = None, dlse: torch.Tensor | None = None,
    shares: torch.Tensor | None = None,
) -> None:  # fmt: skip
    row, head = (1, 2) if layout == "bshd" else (2, 1)
    p: Any = Params()
    for field, t in ((p.out, out), (p.to, to), (p.dout, dout)):
        if t is not None:
            field.data, field.stride[:] = t.data_ptr(), (t.stride(0), t.stride(row), t.stride(head))
    for name, t in (("lse", lse), ("lse_to", lse_to), ("dlse", dlse), ("shares", shares), ("sinks", sinks)):
        setattr(p, name, None if t is None else t.data_ptr())
    p.batch, p.rows, p.heads, p.head_dim = out.shape[0], out.shape[row], out.shape[head], out.shape[3]
    p.element, p.sink_element = _DTYPES[out.dtype], _DTYPES[sinks.dtype]
    helper.launch(library, p, out, "attention sinks could not be applied")
