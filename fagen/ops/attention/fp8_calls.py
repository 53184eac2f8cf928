"""Calls of the fp8 forward op: made, launched and checked.

An output is compared with float32 attention on the numbers that q, k and v stand for. Its peer is PyTorch with what fp8
products cannot do without: weights rounded to e4m3, and scores off by what the tensor cores lose.

A score is d / 32 sums of 32 products and of what is there already. Each sum cuts its addends below 2^-13 of the largest
one. All of them together are no larger than sum |q k|, and on an H100 the LSE of a row was off by at most 2.3, 2.5 and
2.8 times 2^-13 of that at d = 128, 224 and 256: what is lost adds up. The peer loses 2 such units (SUM_ERROR), and the
oracle allows twice the peer's error. The LSE's peer loses the same of every key, which moves it most; that of O loses
it up and down in turn, which moves the weights most. With softcap they also lose what the GPU's tanh does, a relative
2^-11 at most: half of it, since the oracle doubles that too.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fagen.errors import InvalidArgument
from fagen.ops import abi
from fagen.ops.attention import forward_calls, fp8_quantize, params, reference, work
from fagen.ops.attention.arguments import is_aligned
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.fp8_call import OUT_DTYPES, Fp8Call
from fagen.ops.attention.fp8_problem import Fp8Problem
from fagen.ops.attention.inputs import SOFTCAP, documents
from fagen.ops.base import Calls
from fagen.ops.inputs import Inputs, guarded
from fagen.ops.oracle import Verdict, compare
from fagen.target import Target

if TYPE_CHECKING:
    Outputs = Mapping[str, torch.Tensor]

Params = abi.params("fagen/abi/forward_fp8.h")
WEIGHT_SCALE = 256.0  # of the largest weight of a row, in e4m3
SUM_ERROR = 2 * 2.0**-13  # of a score, relative to sum |q k|: see above
TANH_ERROR = 2.0**-12  # of a capped score, relative to itself


def make_params(call: Fp8Call, outputs: Outputs) -> ctypes.Structure:
    """The struct of the header; holds pointers, so the tensors must outlive it."""
    made: Any = Params()
    p = made.forward
    axes = (0, call.row_axis, call.head_axis)
    for name, t in (("q", call.q), ("k", call.k), ("o", outputs["out"])):
        params.point(getattr(p, name), t, *(t.stride(i) for i in axes))
    batch, head, block = call.v.stride()[:3]
    params.point(p.v, call.v, batch, block, head)
    for name in ("descale_q", "descale_k", "descale_v"):
        if (factors := getattr(call, name)) is not None:
            params.point(getattr(made, name), factors, *factors.stride())
    if (lse := outputs.get("lse")) is not None:
        p.lse = lse.data_ptr()
    params.point_intervals(p, call.intervals)
    p.batch, p.seqlen_q, p.heads = call.batch, call.seqlen_q, call.heads
    p.seqlen_k, p.kv_heads = call.seqlen_k, call.kv_heads
    p.head_dim, p.head_dim_v = call.q.shape[3], call.head_dim_v
    left, right = call.window  # a wider band shows no more, and its sum with a row would leave 32 bits
    p.window_left, p.window_right = min(left, p.seqlen_k), min(right, p.seqlen_q)
    p.scale = 1.0 / math.sqrt(call.q.shape[3]) if call.scale is None else call.scale
    p.softcap = call.softcap
    return made


def require(problem: Fp8Problem, call: Fp8Call, outputs: Outputs) -> None:
    """A kernel of the problem serves the call and can write the outputs."""
    if call.unreadable:
        raise InvalidArgument(call.unreadable)
    its = call.problem
    # a kernel for windows serves every band
    mask = "window" if problem.mask == "window" and not its.intervals else its.mask
    its = its.replace(mask=mask, window_left=call.window[0], window_right=call.window[1])
    if its.static_key != problem.static_key:
        raise InvalidArgument(f"the kernel is for {problem.static_key}", f"the call is {call.problem.static_key}")
    if not is_aligned(outputs["out"]):
        raise InvalidArgument("out is not aligned", "the kernel needs rows of whole 16-byte pieces")
    if "lse" in outputs and not outputs["lse"].is_contiguous():
        raise InvalidArgument("lse must be contiguous")


def make_inputs(
    problem: Fp8Problem, where: Target | torch.device | str, seed: int = 0, *, varied: bool = False
) -> Inputs:
    """Random normal q, k and v, quantised; `out` and `lse` full of NaN. `varied`: intervals of each kv head."""
    device = torch.device(("cuda" if where.is_gpu else "cpu") if isinstance(where, Target) else where)
    dtype = next(torch_dtype for torch_dtype, name in OUT_DTYPES.items() if name == problem.dtype)
    random, p = torch.Generator(device).manual_seed(seed), problem

    def tensor(length: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn((p.batch, length, heads, dim), generator=random, dtype=dtype, device=device)

    q = tensor(p.seqlen_q, p.heads, p.head_dim)
    k, v = (tensor(p.seqlen_k, p.kv_heads, dim) for dim in (p.head_dim, p.head_dim_v))
    made = fp8_quantize.by_torch(q, k, v, "bshd", False, p.scale_block)
    intervals = documents(p, seed, varied=varied).to(device) if p.intervals else None
    outputs = {
        "out": guarded((p.batch, p.seqlen_q, p.heads, p.head_dim_v), dtype, device),
        "lse": guarded((p.batch, p.heads, p.seqlen_q), torch.float32, device),
    }
    call = Fp8Call(
        *made, window=(p.window_left, p.window_right), softcap=SOFTCAP if p.softcap else 0.0, dtype=dtype,
        out=outputs["out"].shown, intervals=intervals, kind=p.intervals,
    )  # fmt: skip
    return Inputs.of(call, outputs)


def attend_in_fp8(
    call: AttentionCall, seen: torch.Tensor | None, rows: slice, *, weight_scale: float = WEIGHT_SCALE
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of some rows of a dequantised call in bhsd order, in float32, as fp8 products would have them."""
    q, k, v = call.bhsd()
    q = q[:, :, rows]
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scale = call.scale if call.scale is not None else 1.0 / math.sqrt(q.shape[-1])
    lost = SUM_ERROR * (q.abs() @ k.abs().mT)
    if seen is not None and seen.shape[1] > 1:
        seen = seen.repeat_interleave(q.shape[1] // seen.shape[1], dim=1)
    in_turn = 1 - 2 * (torch.arange(k.shape[2], device=k.device) % 2)

    def seen_scores(side: torch.Tensor | int) -> torch.Tensor:
        scores = (q @ k.mT + side * lost) * scale
        if call.softcap:
            scores = call.softcap * torch.tanh(scores / call.softcap) * (1 + side * TANH_ERROR)
        return scores if seen is None else scores.masked_fill(~seen, -math.inf)

    scores = seen_scores(in_turn)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == -math.inf, 0, top))
    total = weights.sum(-1, keepdim=True)
    rounded = (weights * weight_scale).to(torch.float8_e4m3fn).float() / weight_scale
    out = rounded @ v / torch.where(total == 0, 1, total)
    return out, torch.logsumexp(seen_scores(1), dim=-1)


def check(call: Fp8Call, outputs: Outputs, rows: Iterable[slice] | None = None) -> Verdict:
    """Whether the outputs by name are the call's, in all rows or in some. NaN never passes."""
    whole, out, lse = call.dequantized(), outputs["out"], outputs.get("lse")
    shape, dtype = call.output_types()["out"]
    if tuple(out.shape) != shape:
        return Verdict(False, math.inf, math.inf, f"shape {tuple(out.shape)}, not {shape}")
    out = out.transpose(1, 2) if call.layout == "bshd" else out
    worst, largest, where = 0.0, 0.0, ""
    with torch.no_grad():
        for block, seen in reference.row_blocks(whole, rows):
            want, want_lse = reference.attend(whole, whole.bhsd(), seen, block)
            peer, peer_lse = attend_in_fp8(whole, seen, block)
            pairs = [("O", out[:, :, block], want, peer.to(dtype).float(), torch.finfo(dtype).eps / 2)]
            if lse is not None:
                pairs.append(("LSE", lse[:, :, block, None], want_lse[..., None], peer_lse[..., None], 2e-5))
            for name, mine, exact, theirs, rounding in pairs:
                verdict = compare(name, mine, exact, theirs, rounding=rounding, start=block.start)
                if verdict.ratio > worst:
                    worst, where = verdict.ratio, verdict.message
                if name == "O":
                    largest = max(largest, verdict.error)
    return Verdict(worst <= 1.0, largest, worst, where)


def check_sample(call: Fp8Call, outputs: Outputs) -> Verdict:
    """Whether the first and the last rows are right."""
    last = max(0, call.seqlen_q - 64)
    return check(call, outputs, [slice(0, min(64, call.seqlen_q)), slice(last, call.seqlen_q)])


CALLS = Calls(
    variants=(("out", "lse"), ("out",)),
    params=make_params,
    require=require,
    inputs=lambda problem, device, seed, varied: make_inputs(problem, device, seed, varied=varied),
    check_problems=forward_calls.check_problems,
    check=lambda call, outputs: check(call, outputs),
    check_sample=check_sample,
    torch_peer=lambda call: (None, "PyTorch has no attention on fp8 numbers"),
    flops=work.flops,
)
