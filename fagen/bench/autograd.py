"""Gradients by autograd: of a forward that is done once and whose graph is kept, or of whole steps, forward and all."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fagen.bench import rows
from fagen.bench.peers import Held, Prepare, Serve
from fagen.bench.rows import Inputs, Row

if TYPE_CHECKING:
    import torch

    Gradients = tuple[torch.Tensor, ...]
    Backward = Callable[[], Gradients]


def through_autograd(forward: Prepare) -> Prepare:
    """The gradients of what a peer's forward gives."""

    def prepare(row: Row, inputs: Inputs) -> Serve:
        attend, kept = forward(row, inputs), dict[int, "Backward"]()

        def serve(i: Inputs) -> Gradients:
            with _same_bits(rows.deterministic(row.problem)):
                if id(i) not in kept:
                    kept[id(i)] = _backward(attend, i)
                return kept[id(i)]()

        return serve

    return prepare


def steps(forward: Prepare) -> Prepare:
    """Forward and backward, both at every call, as training runs them: the host's part counts."""
    import torch

    def prepare(row: Row, inputs: Inputs) -> Serve:
        attend, kept = forward(row, inputs), dict[int, "tuple[list[torch.Tensor], Inputs]"]()
        holds: list[Any] = [lambda: _same_bits(True)] if rows.deterministic(row.problem) else []
        if isinstance(attend, Held):
            holds, attend = [*attend.holds, *holds], attend.serve

        def step(i: Inputs) -> Gradients:
            if id(i) not in kept:
                kept[id(i)] = _differentiable(i)
            leaves, given = kept[id(i)]
            with torch.enable_grad():
                return torch.autograd.grad(attend(given), leaves, i.call.dout)

        return Held(step, tuple(holds)) if holds else step

    return prepare


def _differentiable(i: Inputs) -> tuple[list[torch.Tensor], Inputs]:
    """q, k and v as leaves of a graph, and the forward call of these."""
    leaves = [t.detach().requires_grad_() for t in (i.call.q, i.call.k, i.call.v)]
    call = dataclasses.replace(i.call.forward, **dict(zip("qkv", leaves, strict=True)))
    return leaves, Inputs(call, {"out": i.call.o})


def _backward(attend: Serve, i: Inputs) -> Backward:
    import torch

    leaves, given = _differentiable(i)
    with torch.enable_grad():
        out = attend(given)
    if node := _sdpa_node(out, leaves):
        return lambda: _launch(node, i.call.dout)

    def engine() -> Gradients:
        if _is_captured(i.call.q):
            raise RuntimeError("autograd runs on the stream of the forward, outside of a capture")
        return torch.autograd.grad(out, leaves, i.call.dout, retain_graph=True)

    return engine


def _is_captured(t: torch.Tensor) -> bool:
    import torch

    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _sdpa_node(out: torch.Tensor, leaves: list[torch.Tensor]) -> Any:
    """The node of PyTorch's fused backward where nothing but transposes is between it, the output and the leaves."""
    node = _before_transpose(out.grad_fn)
    if node is None or not node.name().startswith("ScaledDotProduct"):
        return None
    sources = [_before_transpose(source) for source, _ in node.next_functions[:3]]
    found = [getattr(source, "variable", None) for source in sources]
    return node if all(a is b for a, b in zip(found, leaves, strict=True)) else None


def _before_transpose(node: Any) -> Any:
    return node.next_functions[0][0] if node is not None and node.name().startswith("Transpose") else node


def _launch(node: Any, dout: torch.Tensor) -> Gradients:
    """The fused backward alone, on the current stream: no engine, so that a graph captures it."""
    import torch

    with torch.no_grad():
        found = node(dout.transpose(1, 2), *[None] * (len(node._input_metadata) - 1))
    return tuple(t.transpose(1, 2) for t in found[:3])


@contextlib.contextmanager
def _same_bits(wanted: bool) -> Iterator[None]:
    """PyTorch held to deterministic kernels; it does not fill the memory of outputs, which would be timed."""
    import torch

    if not wanted:
        yield
        return
    was_on, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warns)
        memory.fill_uninitialized_memory = filled
