"""Attention as it must come out, for the tuner and the tests alike.

An output is right when its pattern of non-finite values is the reference's, and when, in every block of rows of
every head, its largest error is at most twice that of PyTorch computing in the same dtype (or once PyTorch's largest
in that head), plus one rounding of the output's dtype at the block's largest magnitude. The reference runs in float32
(float64 for float32 inputs). Where the call allows TF32, PyTorch's float32 operands are rounded to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fagen.ops.attention.masks import dense
from fagen.ops.oracle import ROW_BLOCK, Verdict, compare

if TYPE_CHECKING:
    import torch

    from fagen.ops.attention.call import AttentionCall

    Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k and v in bhsd order

_BYTES_A_STEP = 512 << 20


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    q, k, v = tensors
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attend(
    call: AttentionCall,
    tensors: Tensors,
    seen: torch.Tensor | None,
    rows: slice = slice(None),
    *,
    operand: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention in the dtype of `tensors`, the call's q, k and v in bhsd order, for some rows; rows that see
    nothing give 0, and -inf or their sink.

    `seen` is the dense mask of those rows, `operand` rounds what is multiplied. Differentiable without it; this is also
    the fallback of last resort.
    """
    import torch

    q, k, v = tensors
    heads, kv_heads, group = q.shape[1], k.shape[1], q.shape[1] // k.shape[1]
    scale = call.scale if call.scale is not None else 1.0 / math.sqrt(q.shape[-1])
    sq, sk = q.shape[2], k.shape[2]
    q = q[:, :, rows]
    grouped = q.reshape(q.shape[0], kv_heads, group, q.shape[2], q.shape[3])
    scores = torch.matmul(operand(grouped * scale), operand(k)[:, :, None].transpose(-1, -2)).flatten(1, 2)
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.alibi_slopes is not None:
        row = torch.arange(sq, device=q.device)[rows, None] + (sk - sq)
        distance = (row - torch.arange(sk, device=q.device)[None]).abs()
        slopes = call.alibi_slopes.to(scores.dtype).reshape(-1, heads, 1, 1)
        scores = scores - slopes * distance.to(scores.dtype)
    if seen is not None:
        if seen.shape[1] not in (1, heads):
            seen = seen.repeat_interleave(heads // seen.shape[1], dim=1)
        scores = scores.masked_fill(~seen, -math.inf)
    if call.sinks is not None:  # one more key, which has no value
        column = call.sinks.to(scores.dtype).reshape(-1, 1, 1)
        scores = torch.cat([scores, column.expand(*scores.shape[:3], 1)], dim=-1)
    lse = torch.logsumexp(scores.float() if scores.dtype != torch.float64 else scores, dim=-1)
    # a row that sees nothing: exp(-inf - 0) = 0 everywhere, in the gradient as well
    top = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == -math.inf, 0, top))
    total = weights.sum(-1, keepdim=True)
    weights = (weights / torch.where(total == 0, 1, total))[..., :sk]
    if call.dropout:
        weights = weights * factors(call, rows, slice(None), weights.dtype)
    grouped = weights.reshape(q.shape[0], kv_heads, group, q.shape[2], sk)
    return torch.matmul(operand(grouped), operand(v)[:, :, None]).flatten(1, 2), lse


def rounded_to_tf32(t: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of 11 leading bits, as the tensor cores read float32."""
    import torch

    if t.dtype != torch.float32:
        return t
    bits = t.contiguous().view(torch.int32)
    return torch.where(torch.isfinite(t), ((bits + 0x1000) & ~0x1FFF).view(torch.float32), t)


def factors(call: AttentionCall, rows: slice, keys: slice, dtype: torch.dtype) -> torch.Tensor:
    """What dropout multiplies the weights of some rows and keys by."""
    from fagen.ops.attention import dropout

    assert call.rng is not None
    planes = call.first_plane, call.batch, call.heads
    some_rows, some_keys = range(call.seqlen_q)[rows], range(call.seqlen_k)[keys]
    return dropout.factors(call.dropout, call.rng, planes, some_rows, some_keys, dtype)


def _rounding_of_scores(
    call: AttentionCall, exact: tuple[torch.Tensor, ...], seen: torch.Tensor | None, rows: slice
) -> torch.Tensor:
    """How far operands rounded to TF32 move a row's scores. Of few keys PyTorch's own error may be nearly nothing."""
    import torch

    q, k = exact[0][:, :, rows], exact[1].repeat_interleave(call.heads // call.kv_heads, dim=1)
    scale = call.scale if call.scale is not None else 1.0 / math.sqrt(q.shape[-1])
    moved = 2.0**-11 * abs(scale) * (q**2 @ (k**2).transpose(-1, -2)).sqrt()
    if seen is not None:
        seen = seen.repeat_interleave(call.heads // seen.shape[1], dim=1) if seen.shape[1] > 1 else seen
        moved = moved.masked_fill(~seen, 0)
    return moved.amax(-1) if moved.shape[-1] else torch.zeros_like(moved[..., 0])


def visible(call: AttentionCall, rows: slice = slice(None)) -> torch.Tensor | None:
    """The dense mask of some rows; None: they see everything."""
    if call.window == (-1, -1) and call.intervals is None:
        return None
    return dense(
        call.seqlen_q, call.seqlen_k, window=call.window, intervals=call.intervals, kind=call.kind, rows=rows,
        device=call.q.device,
    )  # fmt: skip


def row_blocks(call: AttentionCall, only: Iterable[slice] | None = None) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Blocks of rows whose scores fit in memory, and what they see (None: everything)."""
    sq = call.seqlen_q
    a_row = call.batch * call.heads * call.seqlen_k * 8
    step = max(ROW_BLOCK, _BYTES_A_STEP // max(1, a_row) // ROW_BLOCK * ROW_BLOCK)
    for rows in only or (slice(start, min(start + step, sq)) for start in range(0, sq, step)):
        yield rows, visible(call, rows)


def part(
    call: AttentionCall, outputs: Mapping[str, torch.Tensor], b: int, heads: slice
) -> tuple[AttentionCall, dict[str, torch.Tensor]]:
    """The call of some heads of one batch, which share a kv head or all of theirs, and its outputs."""
    group, batch = call.heads // call.kv_heads, slice(b, b + 1)
    kv_heads = slice(heads.start // group, (heads.stop - 1) // group + 1)

    def cut(t: torch.Tensor, heads: slice) -> torch.Tensor:
        return t[batch, :, heads] if call.layout == "bshd" else t[batch, heads]

    intervals, slopes = call.intervals, call.alibi_slopes
    if intervals is not None:
        at = b % intervals.shape[0]
        intervals = intervals[at : at + 1, kv_heads if intervals.shape[1] > 1 else slice(None)]
    if slopes is not None:
        slopes = slopes[b % slopes.shape[0] if slopes.dim() == 2 else ..., heads]
    small = dataclasses.replace(
        call, q=cut(call.q, heads), k=cut(call.k, kv_heads), v=cut(call.v, kv_heads), intervals=intervals,
        alibi_slopes=slopes, out=None, sinks=None if call.sinks is None else call.sinks[heads],
        first_plane=call.first_plane + b * call.heads + heads.start,
    )  # fmt: skip
    return small, {name: t[batch, heads] if name == "lse" else cut(t, heads) for name, t in outputs.items()}


def check(call: AttentionCall, outputs: Mapping[str, torch.Tensor], rows: Iterable[slice] | None = None) -> Verdict:
    """Whether the outputs by name (`out`, and `lse` if it is there) are the call's, in all rows or in some.

    NaN never passes.
    """
    import torch

    out, lse = outputs["out"], outputs.get("lse")
    low = call.bhsd()
    single = call.q.dtype == torch.float32
    exact = cast(low, torch.float64 if single else torch.float32)
    # two float32 sums differ from each other as each does from the exact one
    factor = 4.0 if single and not call.tf32 else 2.0
    shape = call.output_types()["out"][0]
    if tuple(out.shape) != shape:
        return Verdict(False, math.inf, math.inf, f"shape {tuple(out.shape)}, not {shape}")
    if call.layout == "bshd":
        out = out.transpose(1, 2)
    worst, largest, where = 0.0, 0.0, ""
    with torch.no_grad():
        for block, seen in row_blocks(call, rows):
            ref, ref_lse = attend(call, exact, seen, block)
            if call.tf32:  # on any device, whatever PyTorch's switch says
                peer, peer_lse = attend(call, low, seen, block, operand=rounded_to_tf32)
                moved = _rounding_of_scores(call, exact, seen, block)
                peer_lse = ref_lse + torch.maximum((peer_lse - ref_lse).abs(), moved)
            else:
                peer, peer_lse = attend(call, low, seen, block)
            pairs = [("O", out[:, :, block], ref, peer, torch.finfo(out.dtype).eps / 2)]
            if lse is not None:
                pairs.append(("LSE", lse[:, :, block, None], ref_lse[..., None], peer_lse[..., None], 2e-5))
            for name, mine, want, theirs, rounding in pairs:
                verdict = compare(name, mine, want, theirs, rounding=rounding, factor=factor, start=block.start)
                if verdict.ratio > worst:
                    worst, where = verdict.ratio, verdict.message
                if name == "O":
                    largest = max(largest, verdict.error)
    return Verdict(worst <= 1.0, largest, worst, where)
