"""From a call on fp8 numbers to its result: the kernel that dispatch chooses, else PyTorch on what they stand for."""

from __future__ import annotations

import dataclasses
import math

import torch

from fagen.dispatch import resolve
from fagen.notices import warn_fallback
from fagen.ops.attention import fallback, fp8_launch, fp8_quantize
from fagen.ops.attention.arguments import is_plain
from fagen.ops.attention.fp8_call import Fp8Call
from fagen.ops.attention.fp8_quantize import QuantizedQKV, Rotary
from fagen.runtime import helper
from fagen.runtime import quantize as quantize_kernel
from fagen.runtime.kernel import Kernel, selected
from fagen.target import target_of


def attend(call: Fp8Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) of a valid call; the LSE where the call wants it."""
    kernel = kernel_of(call)
    if kernel is None:
        return by_torch(call)
    outputs = call.new_outputs()
    if call.out is not None and not call.out.is_inference():
        torch.autograd.graph.increment_version(call.out)
    kernel.launch(call, outputs)
    return outputs["out"], outputs.get("lse")


def kernel_of(call: Fp8Call) -> Kernel | None:
    """The kernel for a call, built and loaded; None where PyTorch computes, with a warning on a GPU."""
    tensors = [*call.inputs().values(), *([] if call.out is None else [call.out])]
    if not call.q.is_cuda or not all(map(is_plain, tensors)):  # where PyTorch is what serves
        return None
    if 0 in call.q.shape or not call.seqlen_k:
        return None
    reason, target = call.unreadable, call.target
    if reason or target is None:
        warn_fallback(reason or f"no kernels for device {call.q.device}")
        return None
    with selected(call.q):  # where a stale kernel is verified
        return resolve.kernel_for(call.problem, target, ours=True)


def quantize(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, incoherent: bool, block: int, rotary: Rotary | None
) -> QuantizedQKV:
    """fp8 numbers of checked tensors: by kernels of our own where they can, else by PyTorch."""
    found = None
    tensors = [q, k, v, *([] if rotary is None else [rotary.cos, rotary.sin])]
    if q.is_cuda and all(map(is_plain, tensors)) and fp8_launch.serves(q, k, v, rotary):
        target = target_of(q.device)
        capturing = torch.cuda.is_current_stream_capturing()
        found = None if target is None else quantize_kernel.HELPER.library(target, capturing)
    if found is None:
        return fp8_quantize.by_torch(q, k, v, layout, incoherent, block, rotary)
    made, params, alive = fp8_launch.prepare(quantize_kernel.Params, q, k, v, layout, incoherent, block, rotary)
    helper.launch(found, params, alive[0], "fp8 numbers could not be made")
    return made


def by_torch(call: Fp8Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In float32, on the numbers that q, k and v stand for."""
    if 0 in call.q.shape or call.seqlen_k == 0:
        types = call.output_types()
        out = call.q.new_zeros(types["out"][0], dtype=call.dtype)
        lse = call.q.new_full(types["lse"][0], -math.inf, dtype=torch.float32) if call.want_lse else None
    else:
        out, found = fallback.attend(dataclasses.replace(call.dequantized(), want_lse=call.want_lse))
        out, lse = out.to(call.dtype), found if call.want_lse else None
    return (out if call.out is None else call.out.copy_(out)), lse
