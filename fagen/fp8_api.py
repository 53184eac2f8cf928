"""`fagen.attention` of fp8 numbers: the way of such a call to a kernel or to PyTorch, and its op of torch."""

from __future__ import annotations

from typing import Any

import torch

from fagen.dispatch import fp8
from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments, fp8_order, fp8_quantize
from fagen.ops.attention import sinks as sink_logits
from fagen.ops.attention.arguments import Window
from fagen.ops.attention.call import AXES
from fagen.ops.attention.fp8_call import E4M3, Fp8Call
from fagen.ops.attention.fp8_problem import check_block
from fagen.ops.attention.fp8_quantize import QuantizedQKV
from fagen.ops.attention.masks import interval_kind

_SCHEMA = (
    "forward_fp8(Tensor q, Tensor k, Tensor v, Tensor? descale_q, Tensor? descale_k, Tensor? descale_v, int block, "
    "bool bhsd, int window_left, int window_right, float softcap, float? scale, Tensor? intervals, bool causal) "
    "-> (Tensor, Tensor)"
)
_QUANTIZE_SCHEMA = (
    "quantize_qkv(Tensor q, Tensor k, Tensor v, bool bhsd, bool incoherent, int block, Tensor? rotary_cos, "
    "Tensor? rotary_sin, bool rotary_interleaved) -> Tensor[]"
)
_libraries: list[Any] = []  # torch unregisters what is collected


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    descales: tuple[Any, Any, Any],
    block: int,
    *,
    layout: str,
    causal: bool,
    window: Window,
    intervals: torch.Tensor | None,
    softcap: float,
    sinks: torch.Tensor | None,
    scale: float | None,
    return_lse: bool,
    out: torch.Tensor | None,
    **others: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The call of `fagen.attention` where q is of fp8; `others` are arguments that only calls of 16 bits or more have.

    v is of rows as ever, or in the kernels' order; the result is bfloat16, or of `out`.
    """
    if getattr(q, "dtype", None) is not E4M3:
        raise InvalidArgument("descales are of fp8 numbers", f"q is {getattr(q, 'dtype', type(q).__name__)}")
    for name, value in others.items():
        if value is not None and (isinstance(value, torch.Tensor) or value):
            raise InvalidArgument(f"attention on fp8 numbers has no {name}", "", "give q, k and v in 16 bits")
    want_lse = arguments.flag("return_lse", return_lse)
    call = Fp8Call.of(
        q, k, v, descales=descales, block=block, layout=layout, causal=causal, window=window, intervals=intervals,
        softcap=softcap, scale=scale, return_lse=want_lse or sinks is not None, out=out,
    )  # fmt: skip
    if sinks is not None:
        sink_logits.check(sinks, call.heads, q.device)
    if torch.is_grad_enabled() and any(t.requires_grad for t in call.inputs().values()):
        raise InvalidArgument("attention on fp8 numbers has no gradients", "", "detach its inputs")
    if torch.compiler.is_compiling():
        value, lse = _by_op(call)
    else:
        if out is not None:
            arguments.refuse_overlap(out, call.inputs())
        value, lse = fp8.attend(call)
    if sinks is not None:
        assert lse is not None
        value, lse = sink_logits.apply(value, lse, sinks, layout, in_place=out is not None)
    return (value, lse) if want_lse and lse is not None else value


def quantize_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: str = "bshd", incoherent: bool = True, block: int = 0,
    rotary_cos: torch.Tensor | None = None, rotary_sin: torch.Tensor | None = None, rotary_interleaved: bool = True,
) -> QuantizedQKV:  # fmt: skip
    """q, k and v as fp8 numbers and their scales, for `fagen.attention`.

    q is (batch, seqlen_q, heads, d), k (batch, seqlen_k, kv_heads, d), v (batch, seqlen_k, kv_heads, dv); with
    layout="bhsd" heads come before rows. dv is a multiple of 8. A scale for each (batch, kv head) brings its largest
    number to 448; the heads of q that share keys share one. `fagen.attention` then gives bfloat16, or the dtype of its
    `out`; it takes no ALiBi, dropout and gradients with such tensors.

    incoherent    q and k are multiplied by the same orthonormal matrix along d, a random-sign Hadamard one. q k^T stays
                  what it is, and outliers are spread over all columns, so that they no longer decide the scale alone
    block         rows of q, and of k, that have a scale of their own instead, a multiple of 64: descales are (batch,
                  heads of the tensor, blocks), for `fagen.attention` with `descale_block`. For numbers that grow or
                  shrink along the sequence. v keeps one for each (batch, kv head)
    rotary_cos,   (positions, d / 2 or less): turn row j of k by the angles of position j, and the rows of q, which are
    _sin          no more, by those of the last ones; pairs of neighbours, or of halves without `rotary_interleaved`.
                  For sequences that are packed, or begin elsewhere, pass the angles of each row: cos[positions]
    """
    incoherent, block = arguments.flag("incoherent", incoherent), arguments.integer("block", block)
    check_block("block", block)
    fp8_quantize.check(q, k, v, layout)
    turned = arguments.flag("rotary_interleaved", rotary_interleaved)
    rotary = fp8_quantize.rotary_of(q, k, layout, rotary_cos, rotary_sin, turned)
    q, k, v = q.detach(), k.detach(), v.detach()
    if torch.compiler.is_compiling():
        made = torch.ops.fagen.quantize_qkv(
            q, k, v, layout == "bhsd", incoherent, block, rotary_cos, rotary_sin, turned
        )  # fmt: skip
        return QuantizedQKV._make([*made, block])
    return fp8.quantize(q, k, v, layout, incoherent, block, rotary)


def _by_op(call: Fp8Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where a compiler traces. Its O is of bfloat16, which an `out` of float16 rounds further."""
    value, lse = torch.ops.fagen.forward_fp8(
        call.q, call.k, call.v, call.descale_q, call.descale_k, call.descale_v, call.block, call.layout == "bhsd",
        *call.window, call.softcap, call.scale, call.intervals, call.causal_intervals,
    )  # fmt: skip
    return (value if call.out is None else call.out.copy_(value)), lse


def _call(args: tuple[Any, ...]) -> Fp8Call:
    bhsd, left, right, softcap, scale, intervals, causal = args[7:]
    kind = "" if intervals is None else interval_kind(int(intervals.shape[3]), causal)
    layout, others = "bhsd" if bhsd else "bshd", (torch.bfloat16, None, intervals, kind)
    fields: tuple[Any, ...] = (*args[:7], layout, (left, right), softcap, scale, True, *others)
    return Fp8Call(*fields)


def _forward_fp8(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _call(args)
    call.check_tensors()  # anybody may call an op with anything
    arguments.settings(False, call.window, call.softcap, call.scale)
    out, lse = fp8.attend(call)
    assert lse is not None
    return out, lse


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    made = _call(args).new_outputs()
    return made["out"], made["lse"]


def _quantize(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bhsd: bool, *how: Any) -> list[torch.Tensor]:
    incoherent, block, cos, sin, interleaved = how
    made = quantize_qkv(
        q, k, v, layout="bhsd" if bhsd else "bshd", incoherent=incoherent, block=block, rotary_cos=cos, rotary_sin=sin,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    return [*made[:6]]


def _fake_quantized(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bhsd: bool, incoherent: bool, block: int, *rotary: Any
) -> list[torch.Tensor]:
    row, head = AXES["bhsd" if bhsd else "bshd"]
    ordered = (k.shape[0], k.shape[head], fp8_order.blocks(k.shape[row]), v.shape[3], fp8_order.BLOCK_KEYS)
    numbers = [q.new_empty(shape, dtype=E4M3) for shape in (q.shape, k.shape, ordered)]
    sizes = q.shape[0], q.shape[head], k.shape[head], q.shape[row], k.shape[row]
    return numbers + [q.new_empty(s, dtype=torch.float32) for s in fp8_quantize.descale_shapes(*sizes, block)]


def _register() -> None:
    library = torch.library.Library("fagen", "FRAGMENT")
    library.define(_SCHEMA)
    library.define(_QUANTIZE_SCHEMA)
    library.impl("quantize_qkv", _quantize, "CompositeExplicitAutograd")
    torch.library.register_fake("fagen::quantize_qkv", _fake_quantized, lib=library)
    library.impl("forward_fp8", _forward_fp8, "CompositeExplicitAutograd")
    torch.library.register_fake("fagen::forward_fp8", _fake, lib=library)
    _libraries.append(library)


_register()  # at once: torch.compile may trace the first call
