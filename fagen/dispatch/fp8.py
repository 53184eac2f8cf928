"""From a call on fp8 numbers to its result: the kernel that dispatch chooses, else PyTorch on what they stand for."""

from __future__ import annotations

import dataclasses
import math

import torch

from fagen.dispatch import resolve
from fagen.notices import warn_fallback
from fagen.ops.attention import fallback
from fagen.ops.attention.call import EMPTY
from fagen.ops.attention.fp8_call import Fp8Call
from fagen.runtime.kernel import Kernel, selected


def attend(call: Fp8Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) of a valid call; the LSE where the call wants it."""
    kernel = kernel_of(call)
    if kernel is None:
        return by_torch(call)
    outputs = call.new_outputs()
    if call.out is not None:
        torch.autograd.graph.increment_version(call.out)
    kernel.launch(call, outputs)
    return outputs["out"], outputs.get("lse")


def kernel_of(call: Fp8Call) -> Kernel | None:
    """The kernel for a call, built and loaded; None where PyTorch computes, with a warning on a GPU."""
    if not call.q.is_cuda:  # where PyTorch is what serves
        return None
    reason, target = call.unreadable, call.target
    if reason or target is None:
        if reason != EMPTY:
            warn_fallback(reason or f"no kernels for device {call.q.device}")
        return None
    with selected(call.q):  # where a stale kernel is verified
        return resolve.kernel_for(call.problem, target, ours=True)


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
