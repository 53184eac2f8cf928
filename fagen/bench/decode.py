"""Rows of the decode op, and who is timed on them: a step of a batch whose sequences have as many keys each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fagen.bench.ours import dispatched
from fagen.bench.peers import Cannot, Serve
from fagen.bench.rows import Inputs, Row
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.target import Target

if TYPE_CHECKING:
    import torch

# batch, keys; with 32 heads on 8 of keys, head_dim 128
_GPU = ((1, 1024), (1, 16384), (1, 131072), (16, 4096), (64, 1024), (64, 4096), (32, 16384))
_CPU = ((1, 4096), (4, 4096))


def suite(target: Target) -> list[Row]:
    """Contiguous, in pages, in fp8; a few query tokens; a single kv head."""
    shape: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128}
    sizes = _GPU if target.is_gpu else _CPU
    found = [_row("", batch, keys, **shape) for batch, keys in sizes]
    for page in (1, 16, 64):
        found += [_row(f" page{page}", batch, keys, page=page, **shape) for batch, keys in sizes[1:]]
    found += [_row(" fp8", batch, keys, kv_dtype="fp8_e4m3", **shape) for batch, keys in sizes[1:]]
    found += [_row(" q4", batch, keys, seqlen_q=4, mask="causal", **shape) for batch, keys in sizes[1:]]
    one = {**shape, "kv_heads": 1}
    return [*found, _row(" mqa", *sizes[-1], **one)]


def _row(kind: str, batch: int, keys: int, **fields: Any) -> Row:
    problem = DecodeProblem(batch=batch, seqlen_k=keys, **fields)
    series = f"decode{kind} b{batch} h{problem.heads}/{problem.kv_heads} d{problem.head_dim}"
    return Row(f"{series} k{keys}", problem, series)


def ours(row: Row, inputs: Inputs) -> Serve:
    from fagen.ops.attention import decode_reference

    return dispatched(inputs.call, lambda i: decode_reference.attend(i.call, i.call.q.dtype)[0])


def by_sdpa(row: Row, inputs: Inputs) -> Serve:
    """PyTorch's SDPA on the keys of a contiguous cache; it is told how many they are when it is prepared."""
    from fagen.ops.attention.decode_calls import torch_peer

    for_sets: dict[int, Any] = {}
    run, how = torch_peer(inputs.call)
    if run is None:
        raise Cannot(how)

    def serve(i: Inputs) -> torch.Tensor:
        if id(i) not in for_sets:
            for_sets[id(i)] = torch_peer(i.call)[0]
        made: torch.Tensor = for_sets[id(i)]()
        return made.transpose(1, 2)

    return serve
