"""The backward of FlashAttention 3 and 4, launched without autograd, from the O and the LSE that ours is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fagen.bench import rows
from fagen.bench.flash_arguments import Argument, document_arguments, fill, of_function, of_schema, require, settings
from fagen.bench.peers import Prepare, Serve
from fagen.bench.rows import Inputs, Row
from fagen.ops.attention.backward_call import GRADIENTS

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


def through_op(op: Any) -> Prepare:
    """FlashAttention 3's op. It fills gradients that it is given: what it returns differs between versions."""
    arguments = of_schema(op._schema)

    def prepare(row: Row, inputs: Inputs) -> Serve:
        fixed = _fixed(row, inputs, arguments, -1, ("dout", "q", "k", "v", "out", "softmax_lse", *GRADIENTS))
        given: dict[int, Tensors] = {}

        def serve(i: Inputs) -> tuple[torch.Tensor, ...]:
            if id(i) not in given:
                read = _tensors(row, i, "softmax_lse")
                rooms = {name: read[like].new_full(read[like].shape, math.nan) for name, like in GRADIENTS.items()}
                given[id(i)] = read | rooms
            op(**given[id(i)], **fixed)
            return _shaped(i, [given[id(i)][name] for name in GRADIENTS])

        return serve

    return prepare


def through_function(function: Callable[..., Any]) -> Prepare:
    """FlashAttention 4's function, which returns the gradients."""
    arguments = of_function(function)

    def prepare(row: Row, inputs: Inputs) -> Serve:
        fixed = _fixed(row, inputs, arguments, None, ("q", "k", "v", "out", "dout", "lse"))
        given: dict[int, Tensors] = {}

        def serve(i: Inputs) -> tuple[torch.Tensor, ...]:
            if id(i) not in given:
                given[id(i)] = _tensors(row, i, "lse")
            return _shaped(i, function(**given[id(i)], **fixed)[:3])

        return serve

    return prepare


def _fixed(
    row: Row, inputs: Inputs, arguments: Iterable[Argument], unbounded: int | None, tensors: Iterable[str]
) -> dict[str, Any]:
    """The arguments that are the same for all inputs of the row."""
    require(row)
    wanted = settings(row, unbounded) | document_arguments(row, inputs.call.q.device)
    return fill(arguments, wanted | {"deterministic": rows.deterministic(row.problem)}, tensors)


def _tensors(row: Row, i: Inputs, lse: str) -> Tensors:
    """What is read, by name; packed documents lie one behind the other, their LSE as (heads, tokens)."""
    call = i.call
    found = {"dout": call.dout, "q": call.q, "k": call.k, "v": call.v, "out": call.o}
    if not row.documents:
        return found | {lse: call.lse}
    return {name: t.flatten(0, 1) for name, t in found.items()} | {lse: call.lse.transpose(0, 1).flatten(1)}


def _shaped(i: Inputs, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Packed gradients as (batch, seqlen, heads, dim) again."""
    return tuple(t.view_as(i.outputs[name]) for t, name in zip(gradients, GRADIENTS, strict=True))
