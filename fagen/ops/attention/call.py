"""One call of attention with all its arguments. `AttentionCall.of` validates it once; all else takes it as it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments, derivatives, tf32
from fagen.ops.attention import dropout as dropped
from fagen.ops.attention import sinks as sink_logits
from fagen.ops.attention.arguments import ALIGNMENT, LARGEST_SIZE, Window, is_aligned
from fagen.ops.attention.masks import interval_kind
from fagen.ops.attention.problem import INTERVAL_KINDS, MAX_HEAD_DIM, TORCH_DTYPES, Problem
from fagen.target import Target, target_of

EMPTY = "there is nothing to compute"
NO_SINKS = "no kernel takes sinks"

_DTYPES = {getattr(torch, theirs): ours for ours, theirs in TORCH_DTYPES.items()}
_TENSORS = ("q", "k", "v", "out", "intervals", "alibi_slopes", "sinks", "rng")
AXES = {"bshd": (1, 2), "bhsd": (2, 1)}  # of rows and heads
_MASKS = {(-1, -1): "none", (-1, 0): "causal"}  # of a window; another one is just that
_LONGEST = 1 << 29  # rows or keys: what a kernel takes for "without bound" lies there


class OpArguments(NamedTuple):
    """The arguments that every op of runtime/csrc begins with, in the order of its schema."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    intervals: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    bhsd: bool
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    scale: float | None
    deterministic: bool
    dropout: float
    rng: torch.Tensor | None

    @property
    def layout(self) -> str:
        return "bhsd" if self.bhsd else "bshd"

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments in the form that all else takes: made by `of` from a caller's, directly from what is known."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: str = "bshd"
    window: tuple[int, int] = (-1, -1)  # -1: unbounded; causal is folded in
    intervals: torch.Tensor | None = None
    kind: str = ""  # of the intervals: a key of INTERVAL_KINDS
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    scale: float | None = None
    want_lse: bool = False
    out: torch.Tensor | None = None  # where the result goes, if the caller said so
    deterministic: bool = False  # the same bits in every run, of gradients too
    sinks: torch.Tensor | None = None  # no kernel takes them: see sinks.py
    dropout: float = 0.0  # the probability that a weight is dropped
    rng: torch.Tensor | None = None  # seed and offset: which weights are. None until they are drawn
    tf32: bool = False  # products of float32 numbers may be rounded to TF32
    first_plane: int = 0  # of a part of a call: the number of its first head among all heads of all batches

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        layout: str = "bshd",
        causal: bool = False,
        window: Window = (None, None),
        intervals: torch.Tensor | None = None,
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        scale: float | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        deterministic: bool = False,
        sinks: torch.Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> AttentionCall:
        """Raise InvalidArgument for what is not attention. Whether `out` overlaps an input is for `refuse_overlap`."""
        want_lse = arguments.flag("return_lse", return_lse)
        deterministic = arguments.flag("deterministic", deterministic)
        dropout_p = arguments.probability("dropout_p", dropout_p)
        if layout not in ("bshd", "bhsd"):
            raise InvalidArgument(f"layout {arguments.shown(layout)} is unknown", "known: bshd, bhsd")
        causal, bounds, softcap, scale = arguments.settings(causal, window, softcap, scale)
        _check_qkv(q, k, v, layout)
        kind = "" if intervals is None else interval_kind(checked_columns(intervals, q, k, layout), causal)
        call = cls(
            q, k, v, layout, bounds, intervals, kind, softcap, alibi_slopes, scale, want_lse, out, deterministic, sinks,
            dropout_p, tf32=tf32.allowed(q),
        )  # fmt: skip
        call._check_others()
        return call

    def check_tensors(self) -> None:
        """As `of` has done, for a kernel that is handed a call which may have been put together without it."""
        if self.layout not in AXES:
            raise InvalidArgument(f"layout {arguments.shown(self.layout)} is unknown", "known: bshd, bhsd")
        _check_qkv(self.q, self.k, self.v, self.layout)
        columns = 0 if self.intervals is None else checked_columns(self.intervals, self.q, self.k, self.layout)
        if columns != len(INTERVAL_KINDS.get(self.kind, ())):
            raise InvalidArgument(f"the intervals have {columns} columns", f"the call says they are {self.kind!r}")
        if self.sinks is not None:  # it would leave them out
            raise InvalidArgument(NO_SINKS, "", "launch the call without_sinks(), and apply them to its outputs")
        self.check_dropout()
        self._check_others()

    def check_dropout(self) -> None:
        """A kernel, and PyTorch in its place, reads seed and offset."""
        if self.dropout or self.rng is not None:
            dropped.check(self.rng, self.q.device)

    def _check_others(self) -> None:
        if self.alibi_slopes is not None:
            _check_alibi(self.alibi_slopes, self)
        if self.out is not None:
            _check_out(self.out, self)
        if self.sinks is not None:
            sink_logits.check(self.sinks, self.heads, self.q.device)

    def without_sinks(self) -> AttentionCall:
        """The call whose result the sinks are applied to."""
        return self if self.sinks is None else dataclasses.replace(self, sinks=None, want_lse=True)

    def with_rng(self, rng: torch.Tensor | None = None) -> AttentionCall:
        """The call with its seed and offset, drawn now if none are given."""
        return dataclasses.replace(self, rng=dropped.draw(self.q.device) if rng is None else rng)

    @classmethod
    def of_op(cls, a: OpArguments, *, want_lse: bool, out: torch.Tensor | None = None) -> AttentionCall:
        """A call that the C++ ops were given, validated."""
        call = cls.of(
            a.q, a.k, a.v, layout=a.layout, causal=a.causal, window=(a.window_left, a.window_right),
            intervals=a.intervals, softcap=a.softcap, alibi_slopes=a.alibi_slopes, scale=a.scale, return_lse=want_lse,
            out=out, deterministic=a.deterministic, dropout_p=a.dropout,
        )  # fmt: skip
        call = call if a.rng is None else call.with_rng(a.rng)
        call.check_dropout()
        return call

    @classmethod
    def trusting(cls, a: OpArguments, *, want_lse: bool) -> AttentionCall:
        """The same, of an op that validated it; its sizes may be symbols, which must not get a bound from here."""
        window = (a.window_left, 0 if a.causal else a.window_right)
        kind = "" if a.intervals is None else interval_kind(int(a.intervals.shape[3]), a.causal)
        return cls(
            a.q, a.k, a.v, a.layout, window, a.intervals, kind, a.softcap, a.alibi_slopes, a.scale, want_lse, None,
            a.deterministic, dropout=a.dropout, rng=a.rng,
        )  # fmt: skip

    def op_arguments(self) -> OpArguments:
        return OpArguments(
            self.q, self.k, self.v, self.intervals, self.alibi_slopes, self.layout == "bhsd", self._causal,
            *self.window, self.softcap, self.scale, self.deterministic, self.dropout, self.rng,
        )  # fmt: skip

    @property
    def _causal(self) -> bool:
        """The flag that tells the two meanings of two columns of intervals apart."""
        return self.window[1] == 0 and self.kind != "both2"

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @property
    def row_axis(self) -> int:
        return AXES[self.layout][0]

    @property
    def head_axis(self) -> int:
        return AXES[self.layout][1]

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[self.head_axis]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[self.head_axis]

    @property
    def seqlen_q(self) -> int:
        return self.q.shape[self.row_axis]

    @property
    def seqlen_k(self) -> int:
        return self.k.shape[self.row_axis]

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, torch.Tensor]:
        """All tensors that are read, by name."""
        return {name: t for name in _TENSORS if name != "out" and (t := getattr(self, name)) is not None}

    def bhsd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as (batch, heads, rows, head_dim)."""
        if self.layout == "bhsd":
            return self.q, self.k, self.v
        return self.q.transpose(1, 2), self.k.transpose(1, 2), self.v.transpose(1, 2)

    def output_types(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each output that a kernel can fill, by name."""
        lse = (self.batch, self.heads, self.seqlen_q)
        return {"out": ((*self.q.shape[:3], self.v.shape[3]), self.q.dtype), "lse": (lse, torch.float32)}

    def new_outputs(self) -> dict[str, torch.Tensor]:
        """Room for the outputs that are wanted; `out` itself where the caller gave one."""
        types = self.output_types()
        made = {name: self.q.new_empty(shape, dtype=dtype) for name, (shape, dtype) in types.items() if self._new(name)}
        return made if self.out is None else {"out": self.out, **made}

    def _new(self, name: str) -> bool:
        return self.out is None if name == "out" else self.want_lse

    def refuse_overlap(self) -> None:
        """A kernel reads its inputs, q as well, after it has begun to write: `out` must lie apart from all of them."""
        if self.out is not None:
            arguments.refuse_overlap(self.out, self.inputs())

    # ---- what can serve it ------------------------------------------------------------------------------------------

    @property
    def op_refusal(self) -> str:
        """Why the ops cannot be asked at all; "" if they can."""
        underivable = derivatives.refusal(self.q, self.k, self.v, self.alibi_slopes)
        if underivable:
            return underivable
        if self.sinks is not None:
            return NO_SINKS
        if self.scale is not None and not self.scale >= arguments.LEAST_NUMBER:
            return f"scale={self.scale} is not positive"  # the kernels take the maximum before they scale
        if self.q.device.type not in ("cpu", "cuda"):
            return f"no kernels for device {self.q.device.type}"
        return ""

    @property
    def refusal(self) -> str:
        """Why no kernel of ours can serve the call; "" if one might, for the problem that it then is."""
        empty = EMPTY if 0 in self.q.shape or 0 in self.k.shape else ""
        found = self.op_refusal or empty or self.unreadable
        return found or ("" if self.target else f"no kernels for device {self.q.device}")

    @property
    def unreadable(self) -> str:
        """Why no family could take the tensors as they are; "" if one might."""
        q, v = self.q, self.v
        if q.dtype not in _DTYPES:
            return f"no kernels for {q.dtype}"
        if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
            return f"head_dim {max(q.shape[3], v.shape[3])} is larger than {MAX_HEAD_DIM}"
        if max(*q.shape, *self.k.shape) > _LONGEST:
            return f"a size is larger than {_LONGEST}"
        for name in _TENSORS:
            t = getattr(self, name)
            if t is not None and t.stride(-1) != 1 and t.shape[-1] > 1:
                return f"the last dimension of {name} is not contiguous"
        return ""

    @property
    def target(self) -> Target | None:
        return target_of(self.q.device)

    @property
    def problem(self) -> Problem:
        """The problem that the call is, unless it is refused."""
        q, k, v, out, (left, right) = self.q, self.k, self.v, self.out, self.window
        aligned = is_aligned(q) and is_aligned(k) and is_aligned(v)
        # a fresh output starts at an aligned address
        aligned = aligned and (v.shape[3] * v.element_size() % ALIGNMENT == 0 if out is None else is_aligned(out))
        return Problem(
            dtype=_DTYPES[q.dtype],
            head_dim=q.shape[3],
            head_dim_v=v.shape[3],
            mask="intervals" if self.kind else _MASKS.get(self.window, "window"),
            intervals=self.kind,
            softcap=bool(self.softcap),
            alibi=self.alibi_slopes is not None,
            dropout=self.dropout > 0,
            tf32=self.tf32,
            aligned=aligned,
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            window_left=left,
            window_right=right,
        )


# ---- checks of the tensors ------------------------------------------------------------------------------------------


def _check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    named = (("q", q), ("k", k), ("v", v))
    for name, t in named:
        arguments.dense(name, t)
    dtype, device = q.dtype, q.device
    usable = dtype.is_floating_point and dtype.itemsize >= 2
    # a traced size is a symbol, which must not get a bound from here: the op looks at it when it runs
    traced = torch.compiler.is_compiling()
    for name, t in named:
        if t.dim() != 4:
            raise InvalidArgument(f"{name} has {t.dim()} dimensions", f"layout {layout} has 4: {tuple(t.shape)}")
        if t.dtype != dtype or not usable:
            have = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
            raise InvalidArgument("q, k and v must have the same floating-point dtype", have, "cast them: x.to(...)")
        if t.device != device:
            raise InvalidArgument("q, k and v must be on the same device", f"q {q.device}, k {k.device}, v {v.device}")
        if not traced and max(t.shape) > LARGEST_SIZE:
            raise InvalidArgument(f"{name} has a size beyond {LARGEST_SIZE}", f"{name} {tuple(t.shape)}")
    _check_sizes(q, k, v, layout)


def _check_sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    row, head = AXES[layout]
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    heads, kv_heads = of_q[head], of_k[head]
    good_k = of_k[0] == of_q[0] and of_k[3] == of_q[3]
    good_v = of_v[0] == of_q[0] and of_v[row] == of_k[row] and of_v[head] == kv_heads
    if not (good_k and good_v):
        name, shape = ("v", of_v) if good_k else ("k", of_k)
        have = f"{name} {tuple(shape)}, q {tuple(of_q)}, k {tuple(of_k)} in layout {layout}"
        raise InvalidArgument(f"{name} must have shape (batch_size, seqlen_k, num_heads_k, head_size)", have)
    if of_q[3] == 0 or of_v[3] == 0 or heads == 0 or kv_heads == 0:
        raise InvalidArgument("heads and head_dim must be at least 1", f"q {tuple(q.shape)}, v {tuple(v.shape)}")
    if heads % kv_heads:
        raise InvalidArgument(
            "Number of heads in key/value must divide number of heads in query", f"heads={heads} kv_heads={kv_heads}"
        )


def checked_columns(intervals: torch.Tensor, q: torch.Tensor, k: torch.Tensor, layout: str) -> int:
    """How many bounds the intervals have for each key."""
    arguments.dense("intervals", intervals)
    if intervals.dtype != torch.int32:
        raise InvalidArgument(f"intervals must be int32, not {intervals.dtype}", "", "cast them: x.to(torch.int32)")
    if intervals.device != q.device:
        raise InvalidArgument(f"intervals are on {intervals.device}", f"q is on {q.device}")
    row, head = AXES[layout]
    shape, batch, seqlen_k, kv_heads = tuple(intervals.shape), k.shape[0], k.shape[row], k.shape[head]
    # `in` would not do: torch.compile's sizes are symbols
    good = len(shape) == 4 and (shape[0] == 1 or shape[0] == batch) and (shape[1] == 1 or shape[1] == kv_heads)
    if not good or shape[2] != seqlen_k:
        wants = f"(1 or {batch}, 1 or {kv_heads}, {seqlen_k}, 1, 2 or 4)"
        raise InvalidArgument(f"intervals must have shape {wants}", f"they have {shape}")
    return shape[3]


def _check_alibi(slopes: torch.Tensor, call: AttentionCall) -> None:
    heads = call.heads
    arguments.dense("alibi_slopes", slopes)
    if slopes.dtype != torch.float32:
        raise InvalidArgument("ALiBi slopes must have dtype fp32", f"they have {slopes.dtype}")
    if slopes.device != call.q.device:
        raise InvalidArgument(f"alibi_slopes are on {slopes.device}", f"q is on {call.q.device}")
    shape = tuple(slopes.shape)
    if shape != (heads,) and shape != (1, heads) and shape != (call.batch, heads):
        raise InvalidArgument(
            "alibi_slopes must have shape (heads) or (batch, heads)", f"they have {shape}, heads={heads}"
        )


def _check_out(out: torch.Tensor, call: AttentionCall) -> None:
    arguments.dense("out", out)
    device, (shape, dtype) = call.q.device, call.output_types()["out"]
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device:
        have = f"it is {out.dtype} {tuple(out.shape)} on {out.device}"
        raise InvalidArgument(f"out must be {dtype} {shape} on {device}", have)
    if not torch.compiler.is_compiling() and out.is_inference() and not torch.is_inference_mode_enabled():
        raise InvalidArgument("out is an inference tensor, and this is not inference mode", "", "pass out.clone()")
    if out.requires_grad and torch.is_grad_enabled():
        raise InvalidArgument("out requires a gradient", "", "pass out.detach(), or no out")
