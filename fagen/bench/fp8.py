"""Rows of forward on fp8 numbers: ours, ours in 16 bits beside it, and FlashAttention 3's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.bench import ours as kernels
from fagen.bench.flash_arguments import fill, of_schema, settings
from fagen.bench.peers import Cannot, Loaded, Prepare, Serve
from fagen.bench.rows import Inputs, Row
from fagen.ops.attention.fp8_problem import Fp8Problem

if TYPE_CHECKING:
    import torch

_TOKENS, _COLUMNS = 16384, 2048
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
CUDNN = "PyTorch hands cuDNN no attention on fp8 numbers"


def suite() -> list[Row]:
    found = []
    for head_dim in (64, 128, 256):
        for seen, mask in (("full", "none"), ("causal", "causal")):
            for length in _LENGTHS:
                problem = Fp8Problem(
                    head_dim=head_dim, mask=mask, batch=_TOKENS // length, heads=_COLUMNS // head_dim, seqlen_q=length
                )
                series = f"fp8 d{head_dim} {seen}"
                found.append(Row(f"{series} s{length} b{problem.batch} h{problem.heads}", problem, series))
    return found


def ours(row: Row, inputs: Inputs) -> Serve:
    """The kernel that dispatch picks, on numbers that are quantised already."""
    from fagen.dispatch import fp8

    return kernels.dispatched(inputs.call, lambda i: fp8.by_torch(i.call)[0])


# ---- peers ----------------------------------------------------------------------------------------------------------


def load_16_bits(paths: Mapping[str, Path]) -> Loaded:
    """`fagen.attention` on the same numbers in the output's dtype: what fp8 is worth."""
    return Loaded({"forward_fp8": _in_16_bits})


def load_quantizing(paths: Mapping[str, Path]) -> Loaded:
    """Ours with `fagen.quantize_qkv` before it, from 16 bits: what a layer pays that keeps no fp8.

    Not incoherent, so that what comes out can be verified: the numbers are those that ours is given, but for roundings.
    """
    return Loaded({"forward_fp8": _quantizing})


def _in_16_bits(row: Row, inputs: Inputs) -> Serve:
    from fagen import api

    held = _Kept(lambda i: _tensors_of_16_bits(i.call))
    call = inputs.call
    left, right = call.window
    given: dict[str, Any] = {
        "window": (None if left < 0 else left, None if right < 0 else right), "softcap": call.softcap,
        "causal": call.causal_intervals,
    }  # fmt: skip
    return lambda i: api.attention(*held.of(i), out=i.outputs["out"], intervals=i.call.intervals, **given)


def _quantizing(row: Row, inputs: Inputs) -> Serve:
    from fagen.dispatch import fp8
    from fagen.fp8_api import quantize_qkv
    from fagen.ops.attention.fp8_call import Fp8Call

    held = _Kept(lambda i: _tensors_of_16_bits(i.call))

    def serve(i: Inputs) -> torch.Tensor:
        call, made = i.call, quantize_qkv(*held.of(i), incoherent=False, block=i.call.block)
        return fp8.attend(
            Fp8Call(
                *made, window=call.window, softcap=call.softcap, scale=call.scale, dtype=call.dtype,
                out=i.outputs["out"], intervals=call.intervals, kind=call.kind,
            )
        )[0]  # fmt: skip

    return serve


def through_fa3(op: Any) -> Prepare:
    """Its op takes v as rows, and the same descales."""

    def prepare(row: Row, inputs: Inputs) -> Serve:
        if row.problem.dtype != "bf16":
            raise Cannot("of fp8 numbers it gives bf16")
        if row.problem.mask == "intervals" or row.problem.scale_block:
            raise Cannot("it has no intervals, and no scales of blocks")
        held = _Kept(lambda i: _rows(i.call))
        having = {argument.name for argument in of_schema(op._schema)}
        descales = [f"descale_{name}" if f"descale_{name}" in having else f"{name}_descale" for name in "qkv"]
        fixed = fill(of_schema(op._schema), settings(row, -1), ("q", "k", "v", *descales))

        def serve(i: Inputs) -> torch.Tensor:
            c = i.call
            given = dict(zip(descales, (c.descale_q, c.descale_k, c.descale_v), strict=True))
            result = op(q=c.q, k=c.k, v=held.of(i), **given, **fixed)
            out: torch.Tensor = result[0] if isinstance(result, tuple | list) else result
            return out

        return serve

    return prepare


def fa3() -> Prepare | str:
    """By the op that is registered."""
    import torch

    if not hasattr(torch.ops.flash_attn_3, "fwd"):
        return "it registers no op flash_attn_3::fwd"
    return through_fa3(torch.ops.flash_attn_3.fwd.default)


class _Kept:
    """What is made of each set of inputs once, before the clock runs."""

    def __init__(self, make: Any) -> None:
        self._make, self._made = make, dict[int, Any]()

    def of(self, i: Inputs) -> Any:
        if id(i) not in self._made:
            self._made[id(i)] = self._make(i)
        return self._made[id(i)]


def _tensors_of_16_bits(call: Any) -> tuple[torch.Tensor, ...]:
    whole = call.dequantized()
    return tuple(t.to(call.dtype) for t in (whole.q, whole.k, whole.v))


def _rows(call: Any) -> torch.Tensor:
    from fagen.ops.attention import fp8_order

    return fp8_order.rows_of_values(call.v, call.seqlen_k)
