"""Calls of the forward op: made, launched and checked."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING

from fagen.errors import InvalidArgument
from fagen.ops.attention import fallback, reference, work
from fagen.ops.attention.arguments import is_aligned
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.inputs import make_inputs
from fagen.ops.attention.params import make_params
from fagen.ops.attention.problem import Problem
from fagen.ops.base import Calls
from fagen.ops.oracle import ROW_BLOCK, Verdict
from fagen.target import Target

if TYPE_CHECKING:
    import torch

    Outputs = Mapping[str, torch.Tensor]

_VERIFY_SEQLEN = {"cpu": 512, "gpu": 2048}  # the largest of the problem itself, made small
_VERIFY_HEADS = 4
_SAMPLED_HEADS, _SAMPLED_BLOCKS = 4, 4  # that are checked at a problem's own size


def require(problem: Problem, call: AttentionCall, outputs: Outputs) -> None:
    """A kernel of the problem serves the call and can write the outputs."""
    require_problem(problem, call)
    rows = "the kernel needs rows of whole 16-byte pieces"
    _want(not problem.aligned or is_aligned(outputs["out"]), "out is not aligned", rows)
    _want("lse" not in outputs or outputs["lse"].is_contiguous(), "lse must be contiguous")


def require_problem(problem: Problem, call: AttentionCall) -> None:
    """A kernel of the problem serves the call, forward or backward."""
    _want(not call.unreadable, call.unreadable)
    its = call.problem
    if its.static_key != problem.static_key:  # some kernels serve more than their own
        mask = "window" if problem.mask == "window" and not its.intervals else its.mask
        its = its.replace(mask=mask, aligned=its.aligned and problem.aligned, tf32=its.tf32 and problem.tf32)
        have = f"the call is {call.problem.static_key}"
        _want(its.static_key == problem.static_key, f"the kernel is for {problem.static_key}", have)


def _want(good: bool, what: str, numbers: str = "") -> None:
    if not good:
        raise InvalidArgument(what, numbers)


def check_problems(problem: Problem, target: Target) -> list[Problem]:
    """Sizes of the problem's static key at and off the edges of tiles, single rows, all rows hidden; then itself."""
    shapes = [(1, 1), (1, 129), (65, 63), (130, 257), (256, 256), (200, 77)]
    heads = [(4, 2), (2, 2), (3, 1)]
    bands = [(problem.window_left, problem.window_right), (17, 0), (40, 9), (-1, 5), (0, 0), (33, -1)]
    found = []
    for index, (seqlen_q, seqlen_k) in enumerate(shapes):
        q_heads, kv_heads = heads[index % len(heads)]
        left, right = bands[index] if problem.mask == "window" else bands[0]
        sizes = {"batch": 2, "heads": q_heads, "kv_heads": kv_heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        found.append(problem.replace(**sizes, window_left=left, window_right=right))
    most = _VERIFY_SEQLEN["gpu" if target.is_gpu else "cpu"]
    group = min(problem.heads // problem.kv_heads, _VERIFY_HEADS)
    lengths = {"seqlen_q": min(problem.seqlen_q, most), "seqlen_k": min(problem.seqlen_k, most)}
    return [*found, problem.replace(batch=1, heads=group, kv_heads=1, **lengths)]


def check_sample(call: AttentionCall, outputs: Outputs, seed: int = 0) -> Verdict:
    """Whether the outputs are right in a few heads and blocks of rows, first and last among them."""
    random = Random(seed)
    planes = call.batch * call.heads
    chosen = {0, planes - 1, *(random.randrange(planes) for _ in range(_SAMPLED_HEADS - 2))}
    last = (call.seqlen_q - 1) // ROW_BLOCK
    blocks = {0, last, *(random.randint(0, last) for _ in range(_SAMPLED_BLOCKS - 2))}
    rows = [slice(i * ROW_BLOCK, min(call.seqlen_q, (i + 1) * ROW_BLOCK)) for i in sorted(blocks)]
    worst = Verdict(True, 0.0, 0.0)
    for plane in sorted(chosen):
        b, h = divmod(plane, call.heads)
        verdict = reference.check(*reference.part(call, outputs, b, slice(h, h + 1)), rows)
        if not verdict:
            where = f"sample of batch {b} head {h}"
            return Verdict(False, verdict.error, verdict.ratio, f"{where}: {verdict.message}")
        worst = max(worst, verdict, key=lambda v: v.ratio)
    return worst


CALLS = Calls(
    variants=(("out", "lse"), ("out",)),
    params=make_params,
    require=require,
    inputs=lambda problem, device, seed, varied: make_inputs(problem, device, seed, varied=varied),
    check_problems=check_problems,
    check=lambda call, outputs: reference.check(call, outputs),
    check_sample=check_sample,
    torch_peer=lambda call: fallback.torch_peer(call),
    flops=work.flops,
)
