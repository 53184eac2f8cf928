"""Calls of the backward op: made, launched and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import fallback, forward_calls, gradients, work
from fagen.ops.attention.arguments import is_aligned
from fagen.ops.attention.backward_call import GRADIENTS, BackwardCall
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.inputs import make_inputs
from fagen.ops.attention.params import make_backward_params
from fagen.ops.base import Calls
from fagen.ops.inputs import Inputs, guarded

if TYPE_CHECKING:
    Outputs = Mapping[str, torch.Tensor]


def require(problem: BackwardProblem, call: BackwardCall, outputs: Outputs) -> None:
    """A kernel of the problem serves the call and can write the outputs."""
    forward_calls.require_problem(problem, call)
    if problem.aligned and not all(is_aligned(t) for t in outputs.values()):
        raise InvalidArgument("a gradient is not aligned", "the kernel needs rows of whole 16-byte pieces")


def inputs(problem: BackwardProblem, device: Any, seed: int, varied: bool) -> Inputs:
    """A forward call of random tensors, what it gives, and random gradients of that; `varied`: of the LSE as well."""
    made = make_inputs(problem, device, seed, varied=varied).call
    forward = dataclasses.replace(made, out=None, want_lse=True, deterministic=problem.deterministic)
    o, lse = fallback.attend(forward)
    random = torch.Generator(o.device).manual_seed(seed + 1)

    def held(dim: int) -> int:
        return dim if problem.aligned else dim + 1  # a row of one element more than it shows starts anywhere

    def spread(t: torch.Tensor) -> torch.Tensor:
        room = t.new_empty((*t.shape[:-1], held(t.shape[-1])))[..., : t.shape[-1]]
        return room.copy_(t)

    dout = spread(torch.randn(o.shape, generator=random, dtype=o.dtype, device=o.device))
    dlse = torch.randn(lse.shape, generator=random, device=lse.device) if varied else None
    call = BackwardCall.after(forward, spread(o), lse, dout, dlse)
    rooms = {
        name: guarded(shape, dtype, o.device, pitch=held(shape[-1]))
        for name, (shape, dtype) in call.output_types().items()
    }
    return Inputs.of(call, rooms)


def torch_peer(call: BackwardCall) -> tuple[Callable[[], object] | None, str]:
    """The backward of PyTorch's SDPA alone: the graph of its forward is kept."""
    named = {name: getattr(call, name).detach().requires_grad_() for name in GRADIENTS.values()}
    run, how = fallback.sdpa_call(dataclasses.replace(call.forward, **named))
    if run is None:
        return None, how
    if call.dlse is not None:
        return None, "not possible with a gradient of the LSE"
    with torch.enable_grad():
        out: Any = run()
    dout, tensors = call.of_bhsd(call.dout), tuple(named.values())
    return lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True), how


CALLS = Calls(
    variants=(tuple(GRADIENTS),),
    params=make_backward_params,
    require=require,
    inputs=inputs,
    check_problems=lambda problem, target: forward_calls.check_problems(problem, target),
    check=lambda call, outputs: gradients.check(call, outputs),
    check_sample=lambda call, outputs: gradients.check_sample(call, outputs),
    torch_peer=torch_peer,
    flops=work.flops,
)
