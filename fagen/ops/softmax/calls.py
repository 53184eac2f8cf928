"""Calls of the softmax op: made, launched and checked."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch

from fagen.errors import InvalidArgument
from fagen.ops import abi
from fagen.ops.base import Calls
from fagen.ops.inputs import Inputs, guarded
from fagen.ops.oracle import Verdict, compare
from fagen.ops.softmax.call import DTYPES, SoftmaxCall
from fagen.ops.softmax.problem import SoftmaxProblem
from fagen.target import Target

Outputs = Mapping[str, torch.Tensor]
Params: Any = abi.params("fagen/abi/softmax.h")

_TORCH = {name: dtype for dtype, name in DTYPES.items()}
_GRADIENT_FACTOR = 3.0  # of PyTorch's error
_EXPONENTIAL = 2.0**-21  # relative; ex2.approx in a weight and in the sum, of which PyTorch's expf is more exact
_SAMPLED, _SAMPLED_ELEMENTS = 64, 1 << 25  # rows or columns that are checked at a problem's own size
_SMALL_LENGTH, _SMALL_COUNT = 1 << 16, 64  # of the problem itself, made small


def params(call: SoftmaxCall, outputs: Outputs) -> ctypes.Structure:
    """The struct of the header; holds pointers, so the tensors must outlive it."""
    made = Params()
    for name, t in {**call.inputs(), "out": outputs["out"]}.items():
        field = getattr(made, name)
        field.data, field.stride[0], field.stride[1] = t.data_ptr(), t.stride(0), t.stride(1)
    made.batch, made.rows, made.columns = call.x.shape
    return made


def require(problem: SoftmaxProblem, call: SoftmaxCall, outputs: Outputs) -> None:
    if call.problem.static_key != problem.static_key:
        raise InvalidArgument(f"the kernel is for {problem.static_key}", f"the call is {call.problem.static_key}")


# ---- what is verified and timed -------------------------------------------------------------------------------------


def inputs(problem: SoftmaxProblem, device: Any, seed: int, varied: bool) -> Inputs:
    """Random numbers; `varied`: rows that lie apart and begin anywhere, of all magnitudes, a part of them -inf."""
    where = torch.device(("cuda" if device.is_gpu else "cpu") if isinstance(device, Target) else device)
    random, dtype = torch.Generator(where).manual_seed(seed), _TORCH[problem.dtype]
    pitch = problem.columns + 3 if varied else problem.columns
    held = problem.batch, problem.rows, pitch

    def spread(t: torch.Tensor) -> torch.Tensor:
        return torch.zeros(held, dtype=dtype, device=where)[..., : problem.columns].copy_(t)

    def draw() -> torch.Tensor:
        return torch.randn(held, generator=random, device=where)[..., : problem.columns]

    x = draw()
    if varied:
        other = 3 - _axis(problem)
        sizes = torch.tensor([0.1, 1.0, 10.0, 100.0], device=where)[torch.arange(x.shape[other], device=where) % 4]
        x = x * sizes.view(1, -1, 1).transpose(1, other)
        if problem.length > 1:
            masked = torch.rand(x.shape, generator=random, device=where) < 0.2
            masked.select(_axis(problem), 0).fill_(False)  # no row is -inf alone: it would be NaN
            x = x.masked_fill(masked, -math.inf)
    dout = None
    if problem.direction == "backward":  # what forward gives, with a gradient; -inf has none
        x = _forward(x.to(dtype), _axis(problem), problem.log, dtype)
        x, dout = x.clamp(min=-1e4) if problem.log else x, spread(draw())
    call = SoftmaxCall(spread(x), _TORCH[problem.out_dtype], problem.along, problem.log, dout)
    room = guarded((*held[:2], problem.columns), call.out_dtype, where, pitch=pitch)
    return Inputs.of(call, {"out": room})


def _axis(problem: SoftmaxProblem) -> int:
    return 2 if problem.along == "row" else 1


def check_problems(problem: SoftmaxProblem, target: Target) -> list[SoftmaxProblem]:
    """Lengths at and off the edges of vectors, warps, chunks and blocks; then the problem itself, made small."""
    sizes = [(1, 1, 1), (2, 3, 7), (1, 65, 130), (3, 5, 1000), (1, 9, 4097), (2, 1, 70001)]
    if problem.along == "column":
        sizes = [(batch, length, rows) for batch, rows, length in sizes]
    found = [problem.replace(batch=b, rows=r, columns=c) for b, r, c in sizes]
    most = {"row": (_SMALL_COUNT, _SMALL_LENGTH), "column": (_SMALL_LENGTH, _SMALL_COUNT)}[problem.along]
    batch, rows, columns = min(problem.batch, 4), min(problem.rows, most[0]), min(problem.columns, most[1])
    return [*found, problem.replace(batch=batch, rows=rows, columns=columns)]


# ---- what is right --------------------------------------------------------------------------------------------------


def _forward(x: torch.Tensor, axis: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    function = torch.log_softmax if log else torch.softmax
    return function(x, axis, dtype=dtype)


def by_torch(call: SoftmaxCall, dtype: torch.dtype | None = None) -> torch.Tensor:
    """PyTorch on the call: in its own dtypes, or in another from end to end."""
    if call.dout is None:
        return _forward(call.x, call.axis, call.log, dtype or call.out_dtype)
    y, dout = (call.x, call.dout) if dtype is None else (call.x.to(dtype), call.dout.to(dtype))
    ops = torch.ops.aten
    backward = ops._log_softmax_backward_data if call.log else ops._softmax_backward_data
    made: torch.Tensor = backward(dout, y, call.axis, y.dtype)
    return made.to(dtype or call.out_dtype)


def check(call: SoftmaxCall, outputs: Outputs) -> Verdict:
    """Against float64, block of 64 rows by block: an error of at most twice PyTorch's (3 times of a gradient), plus one
    rounding, or that of the hardware's exponential. Where numbers shrink with the length they are scaled by it, so that
    the oracle's small absolute term stays small beside them."""
    scale = 1.0 if call.log else float(call.x.shape[call.axis])
    with torch.no_grad():
        want = by_torch(call, torch.float64)
        peer = by_torch(call).to(torch.float64)
        if call.dout is not None:
            peer = want + torch.maximum((peer - want).abs(), _rounded_sum(call, call.dout))
        tensors = [t * scale for t in (outputs["out"].to(torch.float64), want, peer)]
        shown = [(t if call.along == "row" else t.transpose(1, 2))[None] for t in tensors]
    rounding = max(torch.finfo(call.out_dtype).eps / 2, _EXPONENTIAL)
    name, factor = ("out", 2.0) if call.dout is None else ("dx", _GRADIENT_FACTOR)
    found = compare(name, shown[0], shown[1], shown[2], rounding=rounding, factor=factor)
    return dataclasses.replace(found, error=found.error / scale)


def _rounded_sum(call: SoftmaxCall, dout: torch.Tensor) -> torch.Tensor:
    """How far one float32 rounding of the sum, and of the difference to it, moves a gradient; they nearly cancel."""
    y, dy = call.x.to(torch.float64), dout.to(torch.float64)
    y = y.exp() if call.log else y
    total = (dy if call.log else y * dy).sum(call.axis, keepdim=True).abs()
    return 2**-24 * (y * total + (dy.abs() if call.log else y * dy.abs()))


def check_sample(call: SoftmaxCall, outputs: Outputs) -> Verdict:
    """The same for some rows, or columns, the first and the last among them."""
    problem = call.problem
    most = max(2, min(_SAMPLED, _SAMPLED_ELEMENTS // problem.length))
    if problem.count <= most:
        return check(call, outputs)
    random = Random(0)
    chosen = {0, problem.count - 1, *(random.randrange(problem.count) for _ in range(most - 2))}
    part = SoftmaxCall(
        _picked(call.x, chosen, call.along), call.out_dtype, call.along, call.log,
        None if call.dout is None else _picked(call.dout, chosen, call.along),
    )  # fmt: skip
    return check(part, {"out": _picked(outputs["out"], chosen, call.along)})


def _picked(t: torch.Tensor, chosen: set[int], along: str) -> torch.Tensor:
    """Those rows, or columns, as one matrix."""
    each = t.shape[1] if along == "row" else t.shape[2]
    places = (divmod(i, each) for i in sorted(chosen))
    if along == "row":
        return torch.stack([t[b, i] for b, i in places])[None]
    return torch.stack([t[b, :, i] for b, i in places], -1)[None]


def torch_peer(call: SoftmaxCall) -> tuple[Callable[[], object] | None, str]:
    return lambda: by_torch(call), "torch.softmax" if call.dout is None else "its backward"


CALLS = Calls(
    variants=(("out",),),
    params=params,
    require=require,
    inputs=inputs,
    check_problems=check_problems,
    check=check,
    check_sample=check_sample,
    torch_peer=torch_peer,
)
