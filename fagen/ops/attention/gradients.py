"""The gradients that a backward kernel must give, and whether it did.

Exact ones come from PyTorch's autograd through plain attention in float32 (float64 for float32 inputs), a block of rows
at a time. A gradient is right where its error is at most three times that of PyTorch in the same dtype, in every block
of rows of every head, plus one rounding of the dtype at the block's largest magnitude. PyTorch then computes from O and
the LSE, as a kernel has to: what their rounding costs is no fault of the kernel's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING

import torch

from fagen.ops.attention import reference
from fagen.ops.attention.backward_call import GRADIENTS, BackwardCall
from fagen.ops.attention.masks import dense
from fagen.ops.oracle import ROW_BLOCK, Verdict, compare

if TYPE_CHECKING:
    from collections.abc import Iterator

    Outputs = Mapping[str, torch.Tensor]

FACTOR = 3.0  # times PyTorch's error
_SAMPLED_HEADS, _SAMPLED_BLOCKS = 3, 4  # of each batch's kv heads; of their rows, and of their keys


def exact_dtype(call: BackwardCall) -> torch.dtype:
    return torch.float64 if call.q.dtype == torch.float32 else torch.float32


def gradients(call: BackwardCall, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """dq, dk and dv as (batch, heads, rows, head_dim), computed in a dtype; rows that see nothing have no part."""
    tensors = tuple(t.detach().to(dtype).requires_grad_() for t in call.bhsd())
    dout = call.of_bhsd(call.dout).to(dtype)
    found = [torch.zeros_like(t) for t in tensors]
    for rows, seen in reference.row_blocks(call):
        with torch.enable_grad():
            out, lse = reference.attend(call, (tensors[0], tensors[1], tensors[2]), seen, rows)
            dead = (lse == -math.inf)[..., None]
            total = (out * dout[:, :, rows].masked_fill(dead, 0)).sum()
            if call.dlse is not None:
                total = total + (lse.masked_fill(dead[..., 0], 0) * call.dlse[:, :, rows].to(lse.dtype)).sum()
        for sum_, part in zip(found, torch.autograd.grad(total, tensors), strict=True):
            sum_ += part
    return dict(zip(GRADIENTS, found, strict=True))


def check(call: BackwardCall, outputs: Outputs) -> Verdict:
    """Whether the gradients by name are the call's, all of them. NaN never passes."""
    want = gradients(call, exact_dtype(call))
    peer = _with_rounding(call, want, from_lse(call, call.q.dtype))
    verdicts = []
    for name, t in outputs.items():
        shape, _ = call.output_types()[name]
        if tuple(t.shape) != shape:
            return Verdict(False, math.inf, math.inf, f"{name}: shape {tuple(t.shape)}, not {shape}")
        verdicts.append(_compare(name, call.of_bhsd(t), want[name], peer[name], 0))
    return _worst(verdicts)


def check_sample(call: BackwardCall, outputs: Outputs, seed: int = 0) -> Verdict:
    """The same in a few heads, blocks of rows and blocks of keys, first and last among them.

    The weights are those of the call's own LSE, so that a block of keys needs no row as a whole.
    """
    random, group = Random(seed), call.heads // call.kv_heads
    planes = call.batch * call.kv_heads
    verdicts = []
    for plane in sorted({0, planes - 1, *(random.randrange(planes) for _ in range(_SAMPLED_HEADS - 2))}):
        b, kv_head = divmod(plane, call.kv_heads)
        head = kv_head * group + random.randrange(group)
        small, of_rows = _part(call, outputs, b, slice(head, head + 1))
        for rows in _blocks(call.seqlen_q, random):
            want, peer = _pair(small, rows=rows)
            verdicts.append(_compare("dq", of_rows["dq"][:, :, rows], want["dq"], peer["dq"], rows.start))
        small, of_keys = _part(call, outputs, b, slice(kv_head * group, (kv_head + 1) * group))
        for keys in _blocks(call.seqlen_k, random):
            want, peer = _pair(small, keys=keys)
            for name in ("dk", "dv"):
                verdicts.append(_compare(name, of_keys[name][:, :, keys], want[name], peer[name], keys.start))
    return _worst(verdicts)


def from_lse(
    call: BackwardCall, dtype: torch.dtype, *, rows: slice = slice(None), keys: slice = slice(None)
) -> dict[str, torch.Tensor]:
    """What some rows and some keys give each other, by the formula; products of matrices in a dtype."""
    group, wide = call.heads // call.kv_heads, torch.promote_types(dtype, torch.float32)
    q, k, v = (t.to(dtype) for t in call.bhsd())
    k, v = (t[:, :, keys].repeat_interleave(group, dim=1) for t in (k, v))
    o, dout = (call.of_bhsd(t).to(dtype)[:, :, rows] for t in (call.o, call.dout))
    q, lse = q[:, :, rows], call.lse[:, :, rows, None].to(wide)
    scale = call.scale if call.scale is not None else 1.0 / math.sqrt(q.shape[-1])
    scores, slope = ((q * scale) @ k.transpose(-1, -2)).to(wide), None
    if call.softcap:
        capped = torch.tanh(scores / call.softcap)
        scores, slope = call.softcap * capped, 1 - capped**2
    if call.alibi_slopes is not None:
        row = torch.arange(call.seqlen_q, device=q.device)[rows, None] + (call.seqlen_k - call.seqlen_q)
        distance = (row - torch.arange(call.seqlen_k, device=q.device)[None, keys]).abs().to(wide)
        scores = scores - call.alibi_slopes.to(wide).reshape(-1, call.heads, 1, 1) * distance
    seen = dense(
        call.seqlen_q, call.seqlen_k, window=call.window, intervals=call.intervals, kind=call.kind, rows=rows,
        keys=keys, device=q.device,
    )  # fmt: skip
    hidden = (lse == -math.inf) | ~seen.repeat_interleave(call.heads // seen.shape[1], dim=1)
    weights = torch.exp(scores - lse).masked_fill(hidden, 0)
    delta = (dout.to(wide) * o.to(wide)).sum(-1, keepdim=True)
    if call.dlse is not None:
        delta = delta - call.dlse[:, :, rows, None].to(wide)
    of_weights = (dout @ v.transpose(-1, -2)).to(wide)
    kept = weights
    if call.dropout:
        factors = reference.factors(call, rows, keys, wide)
        of_weights, kept = of_weights * factors, weights * factors
    inner = (weights * (of_weights - delta)).masked_fill(hidden, 0)
    inner = (inner if slope is None else inner * slope).to(dtype)
    dk, dv = (inner.transpose(-1, -2) @ q) * scale, kept.to(dtype).transpose(-1, -2) @ dout
    of_heads = (t.unflatten(1, (call.kv_heads, group)).sum(2) for t in (dk, dv))
    return dict(zip(GRADIENTS, ((inner @ k) * scale, *of_heads), strict=True))


def _pair(call: BackwardCall, **part: slice) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    want, peer = (from_lse(call, dtype, **part) for dtype in (exact_dtype(call), call.q.dtype))
    return want, _with_rounding(call, want, peer, **part)


def _with_rounding(
    call: BackwardCall, want: dict[str, torch.Tensor], peer: dict[str, torch.Tensor], **part: slice
) -> dict[str, torch.Tensor]:
    """PyTorch's float32 gradients no nearer to the exact ones than a rounding of scores, dP and delta lets anyone be.

    They may cancel: of a single key, dS is 0, and what comes out is rounding alone. Halves round far more elsewhere.
    """
    if call.q.dtype != torch.float32:
        return peer
    return {
        name: want[name] + torch.maximum((peer[name] - want[name]).abs(), moved)
        for name, moved in _rounding(call, **part).items()
    }


def _rounding(call: BackwardCall, *, rows: slice = slice(None), keys: slice = slice(None)) -> dict[str, torch.Tensor]:
    """How far one float32 rounding of S and LSE, of dP and delta moves each gradient; masks, which only lessen it, left
    out."""
    group = call.heads // call.kv_heads
    q, k, v = (t.double() for t in call.bhsd())
    k, v = (t[:, :, keys].repeat_interleave(group, dim=1) for t in (k, v))
    o, dout = (call.of_bhsd(t).double()[:, :, rows] for t in (call.o, call.dout))
    q, lse = q[:, :, rows], call.lse[:, :, rows, None].double()
    scale = call.scale if call.scale is not None else 1.0 / math.sqrt(q.shape[-1])
    scores, lse = (q * scale) @ k.transpose(-1, -2), lse.masked_fill(lse == -math.inf, math.inf)
    weights = torch.exp(scores - lse).clamp(0, 1)
    unit = 2.0**-24 / max(1 - call.dropout, 2.0**-24)
    of_weights = unit * weights * (scores.abs() + lse.nan_to_num(posinf=0.0).abs())
    of_dp = (dout**2 @ (v**2).transpose(-1, -2)).sqrt() + ((dout * o) ** 2).sum(-1, keepdim=True).sqrt()
    of_scores = abs(scale) * unit * weights * of_dp

    def of_keys(moved: torch.Tensor, of_rows: torch.Tensor) -> torch.Tensor:
        return (moved.transpose(-1, -2) @ of_rows.abs()).unflatten(1, (call.kv_heads, group)).sum(2)

    return {"dq": of_scores @ k.abs(), "dk": of_keys(of_scores, q), "dv": of_keys(of_weights, dout)}


def by_rows(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv like their inputs, where no kernel serves: by the formula, a block of rows at a time, so that they
    can be had below autograd; halves are computed in float32. A float64 call has its LSE made anew: it is float32."""
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    wide = reference.cast(call.bhsd(), dtype)
    found = [torch.zeros_like(t) for t in wide]
    for rows, seen in reference.row_blocks(call):
        if dtype == torch.float64:
            _, lse = reference.attend(call, wide, seen, rows)
            call = dataclasses.replace(
                call, lse=torch.cat([call.lse[:, :, : rows.start], lse, call.lse[:, :, rows.stop :]], 2)
            )
        dq, dk, dv = from_lse(call, dtype, rows=rows).values()
        found[0][:, :, rows] = dq
        found[1] += dk
        found[2] += dv
    return tuple(call.of_bhsd(t).to(call.q.dtype).contiguous() for t in found)


def _part(call: BackwardCall, outputs: Outputs, b: int, heads: slice) -> tuple[BackwardCall, dict[str, torch.Tensor]]:
    """The call of some heads of one batch, which share a kv head, and its gradients as (batch, heads, rows, ...)."""
    forward, cut = reference.part(call.forward, {"o": call.o, "dout": call.dout, "lse": call.lse}, b, heads)
    dlse = None if call.dlse is None else call.dlse[b : b + 1, heads]
    small = BackwardCall.after(forward, cut["o"], cut["lse"], cut["dout"], dlse)
    group = call.heads // call.kv_heads
    of_keys = slice(heads.start // group, heads.start // group + 1)
    slices = {"dq": heads, "dk": of_keys, "dv": of_keys}
    found = {name: call.of_bhsd(t)[b : b + 1, slices[name]] for name, t in outputs.items()}
    return small, found


def _blocks(length: int, random: Random) -> Iterator[slice]:
    last = (length - 1) // ROW_BLOCK
    for i in sorted({0, last, *(random.randint(0, last) for _ in range(_SAMPLED_BLOCKS - 2))}):
        yield slice(i * ROW_BLOCK, min(length, (i + 1) * ROW_BLOCK))


def _compare(name: str, mine: torch.Tensor, want: torch.Tensor, peer: torch.Tensor, start: int) -> Verdict:
    return compare(name, mine, want, peer, rounding=torch.finfo(mine.dtype).eps / 2, factor=FACTOR, start=start)


def _worst(verdicts: list[Verdict]) -> Verdict:
    worst = max(verdicts, key=lambda v: v.ratio)
    return Verdict(worst.ratio <= 1.0, max(v.error for v in verdicts), worst.ratio, worst.message)
