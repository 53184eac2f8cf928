"""The inputs of attention that are timed and verified: random tensors, packed documents, guards around the outputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fagen.ops.attention import masks
from fagen.ops.attention.problem import INTERVAL_KINDS, TORCH_DTYPES, Problem
from fagen.ops.inputs import Inputs, guarded
from fagen.target import Target

if TYPE_CHECKING:
    import torch

SOFTCAP = 30.0
DROPOUT = 0.1
DOCUMENTS = 4  # a sequence, in the inputs of the intervals mask


def make_inputs(problem: Problem, where: Target | torch.device | str, seed: int = 0, *, varied: bool = False) -> Inputs:
    """Random normal q, k, v in bshd, `out` and `lse` full of NaN, and what the mask and features need.

    `varied` gives each kv head its own intervals, with holes where the kind can have them; for verification.
    """
    import torch

    from fagen.ops.attention.call import AttentionCall

    device = torch.device(("cuda" if where.is_gpu else "cpu") if isinstance(where, Target) else where)
    dtype = getattr(torch, TORCH_DTYPES[problem.dtype])
    random = torch.Generator(device).manual_seed(seed)
    p = problem

    def held(dim: int) -> int:
        return dim if p.aligned else dim + 1  # a row of one element more than it shows starts anywhere

    def tensor(length: int, heads: int, dim: int) -> torch.Tensor:
        shape = p.batch, length, heads, held(dim)
        return torch.randn(shape, generator=random, dtype=dtype, device=device)[..., :dim]

    q = tensor(p.seqlen_q, p.heads, p.head_dim)
    k, v = (tensor(p.seqlen_k, p.kv_heads, dim) for dim in (p.head_dim, p.head_dim_v))
    shape = p.batch, p.seqlen_q, p.heads, p.head_dim_v
    outputs = {
        "out": guarded(shape, dtype, device, pitch=held(p.head_dim_v)),
        "lse": guarded((p.batch, p.heads, p.seqlen_q), torch.float32, device),
    }
    intervals = documents(p, seed, varied=varied).to(device) if p.intervals else None
    slopes = None
    if p.alibi:
        of_heads = [2.0 ** (-8.0 * (head + 1) / p.heads) for head in range(p.heads)]
        slopes = torch.tensor(of_heads, dtype=torch.float32, device=device).expand(p.batch, -1).contiguous()
    call = AttentionCall(
        q, k, v, window=(p.window_left, p.window_right), intervals=intervals, kind=p.intervals,
        softcap=SOFTCAP if p.softcap else 0.0, alibi_slopes=slopes, out=outputs["out"].shown, tf32=p.tf32,
    )  # fmt: skip
    if p.dropout:
        rng = torch.randint(0, 2**63 - 1, (2,), generator=random, dtype=torch.int64, device=device)
        call = dataclasses.replace(call, dropout=DROPOUT, rng=rng)
    return Inputs.of(call, outputs)


def documents(problem: Problem, seed: int, *, varied: bool) -> torch.Tensor:
    """Intervals of packed documents of random lengths, in the problem's kind: int32 (batch, 1 or kv_heads, Sk, n)."""
    import torch

    p, random = problem, torch.Generator().manual_seed(seed)
    planes = p.batch * (p.kv_heads if varied else 1)
    cuts = torch.randint(1, max(2, p.seqlen_k), (planes, min(DOCUMENTS, p.seqlen_k) - 1), generator=random)
    ids = (torch.arange(p.seqlen_k)[None, :, None] >= cuts[:, None, :]).sum(-1)
    bounds = masks.from_documents(ids, causal=False)[:, 0] - (p.seqlen_k - p.seqlen_q)
    end, start = bounds.clamp(0, p.seqlen_q).unbind(-1)
    bottom = torch.full_like(end, p.seqlen_q)
    columns = {"LTS": end, "LTE": (end + bottom + 1) // 2 if varied else bottom}
    columns |= {"UTS": start // 2 if varied else torch.zeros_like(start), "UTE": start}
    chosen = torch.stack([columns[name] for name in INTERVAL_KINDS[p.intervals]], dim=-1).to(torch.int32)
    return chosen.reshape(p.batch, -1, *chosen.shape[1:]).contiguous()


def input_bytes(problem: Problem) -> int:
    p = problem
    of_q = p.batch * p.heads * p.seqlen_q * (p.head_dim + p.head_dim_v)
    return p.itemsize * (of_q + p.batch * p.kv_heads * p.seqlen_k * (p.head_dim + p.head_dim_v))
