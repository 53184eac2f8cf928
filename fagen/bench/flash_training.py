"""Attention by the ops of FlashAttention 3 that autograd differentiates, as its own package has it in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fagen.bench import rows
from fagen.bench.flash_arguments import document_arguments, fill, of_schema, packed, require, settings
from fagen.bench.peers import Prepare, Serve
from fagen.bench.rows import Inputs, Row
from fagen.ops.attention.backward_call import GRADIENTS

if TYPE_CHECKING:
    import torch

_READ = ("q", "k", "v")


def through_ops(fwd: Any, bwd: Any) -> Prepare:
    """`fwd` gives the output and the LSE first; `bwd` fills the gradients that it is given."""

    def prepare(row: Row, inputs: Inputs) -> Serve:
        require(row)
        wanted = settings(row, -1) | document_arguments(row, inputs.call.q.device)
        forward = fill(of_schema(fwd._schema), wanted, _READ)
        same_bits = {"deterministic": rows.deterministic(row.problem)}
        backward = fill(of_schema(bwd._schema), wanted | same_bits, ("dout", *_READ, "out", "softmax_lse", *GRADIENTS))
        attention = _function(fwd, forward, bwd, backward)

        def serve(i: Inputs) -> torch.Tensor:
            given = packed(i) if row.documents else (i.call.q, i.call.k, i.call.v)
            return attention.apply(*given).view_as(i.outputs["out"])

        return serve

    return prepare


def _function(fwd: Any, forward: dict[str, Any], bwd: Any, backward: dict[str, Any]) -> Any:
    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out, lse, *_ = fwd(q=q, k=k, v=v, **forward)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q, k, v, out, lse = ctx.saved_tensors
            rooms = {name: torch.empty_like(t) for name, t in zip(GRADIENTS, (q, k, v), strict=True)}
            bwd(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, **rooms, **backward)
            return tuple(rooms.values())

    return Attention
