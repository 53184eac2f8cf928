"""One call of attention on fp8 numbers. `Fp8Call.of` validates it once; all else takes it as it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments, fp8_order, fp8_quantize
from fagen.ops.attention.arguments import LARGEST_SIZE, Window, is_aligned
from fagen.ops.attention.call import AXES, AttentionCall, checked_columns
from fagen.ops.attention.fp8_problem import Fp8Problem, check_block
from fagen.ops.attention.masks import interval_kind
from fagen.ops.attention.problem import INTERVAL_KINDS
from fagen.target import Target, target_of

E4M3 = torch.float8_e4m3fn
OUT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_MASKS = {(-1, -1): "none", (-1, 0): "causal"}  # of a window; another one is just that
_DESCALES = ("descale_q", "descale_k", "descale_v")
_TENSORS = ("q", "k", "v", *_DESCALES, "intervals")
_LONGEST = 1 << 29  # rows or keys: what a kernel takes for "without bound" lies there


@dataclass(frozen=True, eq=False)
class Fp8Call:
    """q and k as in AttentionCall, v in the kernels' order (fp8_order.py), all of e4m3."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor  # (batch, kv_heads, blocks of 32 keys, dv, 32)
    descale_q: torch.Tensor | None = None  # float32 (batch, kv_heads): multiplies q; None: 1
    descale_k: torch.Tensor | None = None
    descale_v: torch.Tensor | None = None
    block: int = 0  # rows of q, and of k, that share a scale, (batch, heads of the tensor, blocks); 0: see above
    layout: str = "bshd"
    window: tuple[int, int] = (-1, -1)  # -1: unbounded; causal is folded in
    softcap: float = 0.0
    scale: float | None = None
    want_lse: bool = False
    dtype: torch.dtype = torch.bfloat16  # of O
    out: torch.Tensor | None = None
    intervals: torch.Tensor | None = None
    kind: str = ""  # of the intervals: a key of INTERVAL_KINDS

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        descales: tuple[Any, Any, Any] = (None, None, None),
        block: int = 0,
        layout: str = "bshd",
        causal: bool = False,
        window: Window = (None, None),
        intervals: torch.Tensor | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
    ) -> Fp8Call:
        """Raise InvalidArgument for what is not attention on fp8 numbers. A v of rows is brought into order."""
        want_lse = arguments.flag("return_lse", return_lse)
        if layout not in tuple(AXES):
            raise InvalidArgument(f"layout {arguments.shown(layout)} is unknown", "known: bshd, bhsd")
        causal, bounds, softcap, scale = arguments.settings(causal, window, softcap, scale)
        block = arguments.integer("descale_block", block)
        for name, t in (("q", q), ("k", k), ("v", v)):
            _require_e4m3(name, t)
        if v.dim() == 4:
            _require_rows(v, k)
            v = fp8_order.order_values(v if layout == "bshd" else v.transpose(1, 2))
        dtype = torch.bfloat16 if out is None or not isinstance(out, torch.Tensor) else out.dtype
        call = cls(q, k, v, None, None, None, block, layout, bounds, softcap, scale, want_lse, dtype, out)
        call.check_tensors()
        of_q, of_k, of_v = (_descale(name, t, call) for name, t in zip(_DESCALES, descales, strict=True))
        kind = "" if intervals is None else interval_kind(checked_columns(intervals, q, k, layout), causal)
        return dataclasses.replace(
            call, descale_q=of_q, descale_k=of_k, descale_v=of_v, intervals=intervals, kind=kind
        )  # fmt: skip

    def check_tensors(self) -> None:
        """Raise InvalidArgument for tensors that contradict each other."""
        if self.layout not in tuple(AXES):
            raise InvalidArgument(f"layout {arguments.shown(self.layout)} is unknown", "known: bshd, bhsd")
        if self.dtype not in OUT_DTYPES:
            raise InvalidArgument("the output of fp8 attention is bfloat16 or float16", f"it would be {self.dtype}")
        for name in ("q", "k", "v"):
            _require_e4m3(name, getattr(self, name))
        for name, t in self.inputs().items():
            arguments.dense(name, t)
            if t.device != self.q.device:
                raise InvalidArgument(f"{name} is on {t.device}", f"q is on {self.q.device}")
        self._check_sizes()
        check_block("descale_block", self.block)
        for name in _DESCALES:
            t, shape = getattr(self, name), self.descale_shape(name)
            if t is not None and (tuple(t.shape) != shape or t.dtype != torch.float32):
                raise InvalidArgument(f"{name} must be float32 {shape}", f"it is {t.dtype} {tuple(t.shape)}")
        columns = 0 if self.intervals is None else checked_columns(self.intervals, self.q, self.k, self.layout)
        if columns != len(INTERVAL_KINDS.get(self.kind, ())):
            raise InvalidArgument(f"the intervals have {columns} columns", f"the call says they are {self.kind!r}")
        if self.out is not None:
            self._check_out(self.out)

    def _check_sizes(self) -> None:
        q, k, v = self.q, self.k, self.v
        have = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 5:
            raise InvalidArgument("q and k have 4 dimensions, v in the kernels' order has 5", have)
        if max(*q.shape, *k.shape, *v.shape) > LARGEST_SIZE:
            raise InvalidArgument(f"a size is beyond {LARGEST_SIZE}", have)
        if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or not q.shape[3] or not self.heads:
            raise InvalidArgument("k must have the batch and the head_dim of q", have)
        if not self.kv_heads or self.heads % self.kv_heads:
            raise InvalidArgument("Number of heads in key/value must divide number of heads in query", have)
        want = (self.batch, self.kv_heads, fp8_order.blocks(self.seqlen_k))
        if tuple(v.shape[:3]) != want or v.shape[4] != fp8_order.BLOCK_KEYS or v.shape[3] % 8 or not v.shape[3]:
            raise InvalidArgument(f"v must be {(*want, 'a multiple of 8', fp8_order.BLOCK_KEYS)}", have)

    def _check_out(self, out: torch.Tensor) -> None:
        arguments.dense("out", out)
        shape, dtype = self.output_types()["out"]
        if tuple(out.shape) != shape or out.dtype != dtype or out.device != self.q.device:
            have = f"it is {out.dtype} {tuple(out.shape)} on {out.device}"
            raise InvalidArgument(f"out must be {dtype} {shape} on {self.q.device}", have)

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

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[3]

    @property
    def causal_intervals(self) -> bool:
        """The flag that tells the two meanings of two columns of intervals apart."""
        return self.window[1] == 0 and self.kind != "both2"

    def descale_shape(self, name: str) -> tuple[int, ...]:
        sizes = self.batch, self.heads, self.kv_heads, self.seqlen_q, self.seqlen_k
        return fp8_quantize.descale_shapes(*sizes, self.block)[_DESCALES.index(name)]

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: t for name in _TENSORS if (t := getattr(self, name)) is not None}

    def output_types(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        lse = (self.batch, self.heads, self.seqlen_q)
        return {"out": ((*self.q.shape[:3], self.head_dim_v), self.dtype), "lse": (lse, torch.float32)}

    def new_outputs(self) -> dict[str, torch.Tensor]:
        """Room for the outputs that are wanted; `out` itself where the caller gave one."""
        types = self.output_types()
        names = [*([] if self.out is not None else ["out"]), *(["lse"] if self.want_lse else [])]
        made = {name: self.q.new_empty(types[name][0], dtype=types[name][1]) for name in names}
        return made if self.out is None else {"out": self.out, **made}

    def dequantized(self) -> AttentionCall:
        """The call of the float32 numbers that q, k and v stand for."""
        rows = fp8_order.rows_of_values(self.v, self.seqlen_k)
        v = rows if self.layout == "bshd" else rows.transpose(1, 2)
        q, k, v = (self._scaled(t, getattr(self, name)) for t, name in zip((self.q, self.k, v), _DESCALES, strict=True))
        return AttentionCall(
            q, k, v, self.layout, self.window, self.intervals, self.kind, softcap=self.softcap, scale=self.scale,
            want_lse=self.want_lse,
        )  # fmt: skip

    def _scaled(self, t: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        if factors is None:
            return t.float()
        if factors.dim() == 3:
            of_rows = factors.repeat_interleave(self.block, dim=2)[:, :, : t.shape[self.row_axis]]
        else:
            of_rows = factors.repeat_interleave(t.shape[self.head_axis] // self.kv_heads, dim=1)[:, :, None]
        return t.float() * (of_rows if self.layout == "bhsd" else of_rows.transpose(1, 2))[..., None]

    # ---- what can serve it ------------------------------------------------------------------------------------------

    @property
    def unreadable(self) -> str:
        """Why no family could take the tensors as they are; "" if one might."""
        if max(self.q.shape[3], self.head_dim_v) > Fp8Problem.most_head_dim:
            return f"head_dim {max(self.q.shape[3], self.head_dim_v)} is larger than {Fp8Problem.most_head_dim}"
        if max(*self.q.shape, *self.k.shape) > _LONGEST:
            return f"a size is larger than {_LONGEST}"
        if self.scale is not None and not self.scale >= arguments.LEAST_NUMBER:
            return f"scale={self.scale} is not positive"  # the kernels take the maximum before they scale
        if self.v.stride()[3:] != (fp8_order.BLOCK_KEYS, 1):
            return "the blocks of v are not contiguous"
        for name, t in (*self.inputs().items(), *([("out", self.out)] if self.out is not None else [])):
            if t.stride(-1) != 1 and t.shape[-1] > 1 and name not in _DESCALES:
                return f"the last dimension of {name} is not contiguous"
        return ""

    @property
    def target(self) -> Target | None:
        return target_of(self.q.device)

    @property
    def problem(self) -> Fp8Problem:
        """The problem that the call is, unless it is unreadable."""
        left, right = self.window
        aligned = is_aligned(self.q) and is_aligned(self.k) and is_aligned(self.v) and self.head_dim_v % 16 == 0
        return Fp8Problem(
            dtype=OUT_DTYPES[self.dtype],
            head_dim=self.q.shape[3],
            head_dim_v=self.head_dim_v,
            mask="intervals" if self.kind else _MASKS.get(self.window, "window"),
            intervals=self.kind,
            softcap=bool(self.softcap),
            scale_block=self.block,
            aligned=aligned and (self.out is None or is_aligned(self.out)),
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            window_left=left,
            window_right=right,
        )


def _require_e4m3(name: str, t: Any) -> None:
    arguments.dense(name, t)
    if t.dtype != E4M3:
        raise InvalidArgument(f"{name} must be float8_e4m3fn", f"it is {t.dtype}", "fagen.quantize_qkv makes it")


def _require_rows(v: torch.Tensor, k: torch.Tensor) -> None:
    if k.dim() != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] % 8 or not v.shape[3]:
        have = f"v {tuple(v.shape)}, k {tuple(k.shape)}"
        raise InvalidArgument("v must have the batch, rows and heads of k, and a multiple of 8 columns", have)


def _descale(name: str, value: Any, call: Fp8Call) -> torch.Tensor | None:
    """A number, a tensor of one, or float32 of the descale's shape."""
    if value is None:
        return None
    shape = call.descale_shape(name)
    if not isinstance(value, torch.Tensor):
        factor = arguments.number(name, value)
        if factor < arguments.LEAST_NUMBER:
            raise InvalidArgument(f"{name}={factor} must be positive")
        return torch.full(shape, factor, device=call.q.device)
    arguments.dense(name, value)
    if value.dtype != torch.float32 or (value.numel() != 1 and tuple(value.shape) != shape):
        have = f"it is {value.dtype} {tuple(value.shape)}"
        raise InvalidArgument(f"{name} must be a number or float32 {shape}", have)
    if value.device != call.q.device:
        raise InvalidArgument(f"{name} is on {value.device}", f"q is on {call.q.device}")
    return value.reshape(()).expand(shape) if value.numel() == 1 and tuple(value.shape) != shape else value
