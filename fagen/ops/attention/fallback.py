"""Attention by PyTorch itself, for what no kernel of ours serves: slower, and right, masks and gradients included."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from fagen import notices
from fagen.notices import FallbackWarning as FallbackWarning
from fagen.ops.attention import reference
from fagen.ops.attention.call import EMPTY, AttentionCall
from fagen.ops.attention.derivatives import in_forward_mode


def warn(reason: str) -> None:
    """Once a reason and process, and never for a call that computes nothing."""
    if reason != EMPTY:
        notices.warn_fallback(reason, stacklevel=5)


def attend(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in the caller's layout and dtype. The lse may be empty where the call does not want it.

    Dropout whose seed is not drawn yet is PyTorch's own where that serves.
    """
    q, k, v = call.bhsd()
    # PyTorch's own attention has no LSE and adds gradients up in any order; products of matrices do in one
    plain = not (call.want_lse or call.deterministic) and call.intervals is call.alibi_slopes is call.sinks is None
    plain = plain and call.rng is None
    device = q.device.type  # the result has the inputs' dtype, as a kernel's has, whatever autocast would make of it
    with torch.autocast(device, enabled=False) if device in ("cpu", "cuda") else nullcontext():
        if 0 in q.shape or (0 in k.shape and call.sinks is None):
            nothing = sum(t[..., :0].sum() for t in (q, k, v))  # of which the output is a function all the same
            out = q.new_zeros((*q.shape[:3], v.shape[3])) + nothing
            lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float32) + nothing
        elif plain and _sdpa_serves(call):
            out, lse = _by_sdpa(call), q.new_empty(0, dtype=torch.float32)
        else:
            out, lse = _by_blocks(call.with_rng() if call.dropout and call.rng is None else call)
    out = out.transpose(1, 2) if call.layout == "bshd" else out
    return out.contiguous(), lse


def gradients(call: AttentionCall, dout: torch.Tensor, dlse: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Of q, k and v; the output is computed again."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v)]
        out, lse = attend(dataclasses.replace(call, q=leaves[0], k=leaves[1], v=leaves[2], out=None))
        made, wanted = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
        return torch.autograd.grad(made, leaves, wanted)


def _sdpa_serves(call: AttentionCall) -> bool:
    if call.softcap or (call.scale is not None and not call.scale > 0):  # SDPA's own GPU kernels give NaN there
        return False
    square = call.window == (-1, 0) and call.seqlen_q == call.seqlen_k
    return (call.window == (-1, -1) or square) and not in_forward_mode()


def _by_sdpa(call: AttentionCall) -> torch.Tensor:
    shared = False
    if call.heads != call.kv_heads:  # of traced sizes the comparison is a symbol, which SDPA does not take
        shared = True
    return torch.nn.functional.scaled_dot_product_attention(
        *call.bhsd(), dropout_p=call.dropout, is_causal=call.window == (-1, 0), scale=call.scale, enable_gqa=shared
    )


def _by_blocks(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of rows, so that the scores of long sequences fit; halves are computed in float32."""
    dtype = call.q.dtype
    wide = reference.cast(call.bhsd(), torch.float32 if dtype.itemsize < 4 else dtype)
    outs, lses = [], []
    for rows, seen in reference.row_blocks(call):
        out, lse = reference.attend(call, wide, seen, rows)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2).to(dtype), torch.cat(lses, dim=2).float()


_NO_SDPA = "not possible with this mask"
_MASK_BYTES = 1 << 30  # the largest dense mask that PyTorch's SDPA is given


def torch_peer(call: AttentionCall) -> tuple[Callable[[], object] | None, str]:
    """What a call costs that PyTorch serves: SDPA, and a copy where its output does not lie in the caller's layout."""
    run, how = sdpa_call(call)
    if run is None or call.layout == "bhsd":
        return run, how
    return lambda: run().transpose(1, 2).contiguous(), how


def sdpa_call(call: AttentionCall) -> tuple[Callable[[], torch.Tensor] | None, str]:
    """PyTorch's SDPA on the same inputs and how it is asked; None and why, where it cannot do this."""
    p = call.problem
    if p.softcap or p.alibi:
        return None, _NO_SDPA
    arguments: dict[str, Any] = {"enable_gqa": p.heads != p.kv_heads, "dropout_p": call.dropout}
    how = "no mask"
    if p.mask == "causal" and p.seqlen_q == p.seqlen_k:
        arguments["is_causal"], how = True, "is_causal"
    elif p.mask != "none":
        planes = p.batch * p.heads if p.mask == "intervals" else 1
        if planes * p.seqlen_q * p.seqlen_k > _MASK_BYTES:
            return None, _NO_SDPA
        arguments["attn_mask"], how = reference.visible(call), "attn_mask"
    return functools.partial(torch.nn.functional.scaled_dot_product_attention, *call.bhsd(), **arguments), how
