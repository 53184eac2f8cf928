"""Decode in plain torch: what must come out, and what computes where no kernel of ours does.

Nothing is read on the host, so that a CUDA graph holds it; indices are kept in range whatever the tensors hold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from random import Random

import torch

from fagen.ops.attention.decode_call import DecodeCall
from fagen.ops.oracle import Verdict, compare

_SAMPLED_HEADS = 4  # kv heads of sequences that are checked at a problem's own size


def attend(call: DecodeCall, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the LSE, computed in a dtype; rows that see nothing give 0, and -inf or their sink."""
    q, counts = _padded_rows(call)
    k, v = (_gathered(call, t, by, dtype) for t, by in ((call.k, call.k_scale), (call.v, call.v_scale)))
    batch, rows, heads, dim = q.shape
    group = heads // call.kv_heads
    grouped = q.to(dtype).reshape(batch, rows, call.kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    scale = 1.0 / math.sqrt(dim) if call.scale is None else call.scale
    scores = torch.matmul(grouped * scale, k.permute(0, 2, 3, 1)[:, :, None])  # (batch, kv head, of a group, row, key)
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~_visible(call, counts)[:, None, None], -math.inf)
    if call.sinks is not None:  # one more key, which has no value
        column = call.sinks.to(dtype).reshape(1, call.kv_heads, group, 1, 1)
        scores = torch.cat([scores, column.expand(*scores.shape[:-1], 1)], dim=-1)
    lse = torch.logsumexp(scores if dtype == torch.float64 else scores.float(), dim=-1)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == -math.inf, 0, top))
    total = weights.sum(-1, keepdim=True)
    weights = (weights / torch.where(total == 0, 1, total))[..., : k.shape[1]]
    out = torch.matmul(weights, v.permute(0, 2, 1, 3)[:, :, None])
    out, lse = out.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3)
    if call.cu_seqlens_q is not None:
        return _packed_rows(call, out), _packed_rows(call, lse).t()
    return out, lse.transpose(1, 2)


def _gathered(call: DecodeCall, t: torch.Tensor, by: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The keys or values of each sequence, (batch, most keys, kv_heads, dim), 0 behind its own."""
    size = t.shape[1]
    key = torch.arange(call.seqlen_k, device=t.device)
    if call.page_table is not None:
        pages = call.page_table[:, : -(-call.seqlen_k // size)].long().clamp(0, t.shape[0] - 1)
        found = t[pages].flatten(1, 2)[:, : call.seqlen_k]
    elif call.cache_batch_idx is not None:
        found = t[call.cache_batch_idx.long().clamp(0, t.shape[0] - 1)][:, : call.seqlen_k]
    else:
        found = t[: call.batch, : call.seqlen_k]
    found = found.to(dtype) if by is None else found.to(dtype) * by[:, None, :, None].to(dtype)
    return torch.where((key < call.seqlens_k[:, None])[..., None, None], found, torch.zeros_like(found[:1, :1]))


def _padded_rows(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """q as (batch, most rows, heads, dim), and how many of them each sequence has."""
    if call.cu_seqlens_q is None:
        return call.q, torch.full_like(call.seqlens_k, call.seqlen_q)
    starts = call.cu_seqlens_q[:-1]
    at = starts[:, None] + torch.arange(call.seqlen_q, device=call.q.device)
    return call.q[at.clamp(0, call.rows - 1)], call.cu_seqlens_q[1:] - starts


def _packed_rows(call: DecodeCall, t: torch.Tensor) -> torch.Tensor:
    """The other way: (rows, ...) of (batch, most rows, ...); 0 in rows that no sequence has."""
    assert call.cu_seqlens_q is not None
    ends = call.cu_seqlens_q[1:].contiguous()
    row = torch.arange(call.rows, device=t.device, dtype=ends.dtype)
    sequence = torch.bucketize(row, ends, right=True).clamp(max=call.batch - 1)
    found = t[sequence, (row - call.cu_seqlens_q[sequence]).clamp(0, call.seqlen_q - 1)]
    return torch.where((row < ends[-1]).reshape(-1, *[1] * (found.dim() - 1)), found, torch.zeros_like(found[:1]))


def _visible(call: DecodeCall, counts: torch.Tensor) -> torch.Tensor:
    """(batch, row, key), of the band around each sequence's diagonal."""
    device, (left, right) = call.q.device, call.window
    key = torch.arange(call.seqlen_k, device=device)
    at = (call.seqlens_k - counts)[:, None] + torch.arange(call.seqlen_q, device=device)
    seen = (key < call.seqlens_k[:, None])[:, None].expand(-1, call.seqlen_q, -1)
    if right >= 0:
        seen = seen & (key <= at[..., None] + right)
    if left >= 0:
        seen = seen & (key >= at[..., None] - left)
    return seen


# ---- is it right? ---------------------------------------------------------------------------------------------------


def check(call: DecodeCall, outputs: Mapping[str, torch.Tensor]) -> Verdict:
    """Whether the outputs that are there are the call's, by the rule of `reference.check`."""
    if not outputs["out"].numel():
        return Verdict(True, 0.0, 0.0)
    exact = torch.float64 if call.q.dtype == torch.float32 else torch.float32
    with torch.no_grad():
        (want, want_lse), (peer, peer_lse) = attend(call, exact), attend(call, call.q.dtype)

    def planes(t: torch.Tensor) -> torch.Tensor:
        """(batch, kv heads, rows of a group, columns): blocks of rows that share keys."""
        t = (t[None] if call.ragged else t).unflatten(2, (call.kv_heads, -1))
        return t.transpose(1, 2).flatten(2, 3)

    def columns(t: torch.Tensor) -> torch.Tensor:
        return planes((t.t() if call.ragged else t.transpose(1, 2))[..., None])

    out, lse = outputs["out"], outputs.get("lse")
    found = [compare("O", *map(planes, (out, want, peer)), rounding=torch.finfo(out.dtype).eps / 2)]
    if lse is not None:
        found.append(compare("LSE", *map(columns, (lse, want_lse, peer_lse)), rounding=2e-5))
    worst = max(found, key=lambda verdict: verdict.ratio)
    return Verdict(all(found), found[0].error, worst.ratio, worst.message)


def check_sample(call: DecodeCall, outputs: Mapping[str, torch.Tensor], seed: int = 0) -> Verdict:
    """Whether the outputs are right in a few kv heads of a few sequences, first and last among them."""
    random, planes = Random(seed), call.batch * call.kv_heads
    chosen = {0, planes - 1, *(random.randrange(planes) for _ in range(_SAMPLED_HEADS - 2))}
    worst = Verdict(True, 0.0, 0.0)
    for plane in sorted(chosen):
        b, head = divmod(plane, call.kv_heads)
        verdict = check(*part(call, outputs, b, head))
        if not verdict:
            message = f"sample of sequence {b} kv head {head}: {verdict.message}"
            return dataclasses.replace(verdict, message=message)
        worst = max(worst, verdict, key=lambda v: v.ratio)
    return worst


def part(
    call: DecodeCall, outputs: Mapping[str, torch.Tensor], b: int, kv_head: int
) -> tuple[DecodeCall, dict[str, torch.Tensor]]:
    """The call of one sequence and kv head, and its outputs."""
    group, one = call.heads // call.kv_heads, slice(b, b + 1)
    heads, mine = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
    starts = call.cu_seqlens_q
    rows = one if starts is None else slice(int(starts[b]), int(starts[b + 1]))

    def of_sequence(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t[one]

    own = torch.tensor([b], dtype=torch.int32, device=call.q.device)
    small = dataclasses.replace(
        call, q=call.q[rows][..., heads, :], k=call.k[:, :, mine], v=call.v[:, :, mine], seqlens_k=call.seqlens_k[one],
        page_table=of_sequence(call.page_table), cu_seqlens_q=None if starts is None else starts[b : b + 2] - starts[b],
        cache_batch_idx=None if call.page else own if call.cache_batch_idx is None else call.cache_batch_idx[one],
        k_scale=None if call.k_scale is None else call.k_scale[one, mine],
        v_scale=None if call.v_scale is None else call.v_scale[one, mine],
        sinks=None if call.sinks is None else call.sinks[heads],
    )  # fmt: skip
    found = {"out": outputs["out"][rows][..., heads, :]}
    if "lse" in outputs:
        found["lse"] = outputs["lse"][heads, rows] if call.ragged else outputs["lse"][one, heads]
    return small, found
