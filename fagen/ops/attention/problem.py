"""What a caller asks for. The static key decides the source; the size point only decides what to tune for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from fagen import schema
from fagen.errors import InvalidArgument
from fagen.schema import shown

DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
TORCH_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # what torch calls them
MASKS = ("none", "causal", "window", "intervals")
# Which of FlashMask's row bounds a key column carries, in the order they are stored:
#   LTS/LTE: the lower interval of masked rows [LTS, LTE); UTS/UTE: the upper one [UTS, UTE).
INTERVAL_KINDS = {
    "lower1": ("LTS",),
    "lower2": ("LTS", "LTE"),
    "both2": ("LTS", "UTE"),
    "both4": ("LTS", "LTE", "UTS", "UTE"),
}
MAX_HEAD_DIM = 1024
# The dtypes of the calls on a GPU that the families of plain float32 (simt_*) serve. They can take fp16 and bf16 too,
# but PyTorch's tensor cores are faster where no other family takes the head dim: there simt_* are for tune and emit.
SIMT_SERVES: tuple[str, ...] = ("fp32",)
_SIZES = ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k")
_NEWER = ("dropout", "tf32")  # fields that older records lack
_BOUNDS = ("window_left", "window_right")


def padded(head_dim: int) -> int:
    """The size a kernel is specialised on: the next multiple of 16."""
    return -(-head_dim // 16) * 16


@dataclass(frozen=True)
class Problem:
    """One attention problem: the fields above `batch` are static, the rest is the size point.

    `window_left` and `window_right` are run-time bounds of the band around the bottom-right aligned diagonal,
    -1 for unbounded. `mask="causal"` is the band (-1, 0) known at compile time; "intervals" obeys the band as well.
    """

    most_head_dim: ClassVar[int] = MAX_HEAD_DIM

    op: str = "forward"
    dtype: str = "bf16"
    head_dim: int = 128
    head_dim_v: int = 0  # 0: the same as head_dim
    mask: str = "none"
    intervals: str = ""  # a key of INTERVAL_KINDS when mask == "intervals"
    softcap: bool = False
    alibi: bool = False
    aligned: bool = True  # every row of q, k, v and o starts at a multiple of 16 bytes and is whole 16-byte pieces
    dropout: bool = False  # weights are dropped; the rate is an argument of the launch
    tf32: bool = False  # products of float32 numbers may be rounded to TF32, as PyTorch's own switch allows
    batch: int = 1
    heads: int = 1
    kv_heads: int = 0  # 0: the same as heads
    seqlen_q: int = 1024
    seqlen_k: int = 0  # 0: the same as seqlen_q
    window_left: int = -1
    window_right: int = -1

    def __post_init__(self) -> None:
        """The door for problems from anywhere: what stands behind it may be rendered, multiplied and filed."""
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), type(field.default)
            if type(value) is not wanted:  # a bool is no int here, nor the other way round
                raise InvalidArgument(f"{field.name}={shown(value)} must be of type {wanted.__name__}")
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("head_dim_v", self.head_dim_v or self.head_dim)
        put("kv_heads", self.kv_heads or self.heads)
        put("seqlen_k", self.seqlen_k or self.seqlen_q)
        if self.mask == "causal":
            put("window_left", -1)
            put("window_right", 0)
        self._check()

    def _check(self) -> None:
        if self.op != type(self).op:
            raise InvalidArgument(f"op {shown(self.op)} is unknown", f"known: {type(self).op}")
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype {shown(self.dtype)} is not supported", f"supported: {', '.join(DTYPES)}")
        if self.tf32 and self.dtype != "fp32":
            raise InvalidArgument(f"tf32 does not go with dtype={self.dtype}", "TF32 rounds float32 numbers")
        if self.mask not in MASKS:
            raise InvalidArgument(f"mask {shown(self.mask)} is unknown", f"known: {', '.join(MASKS)}")
        if self.intervals not in (INTERVAL_KINDS if self.mask == "intervals" else ("",)):
            raise InvalidArgument(
                f"intervals={shown(self.intervals)} does not go with mask={self.mask!r}",
                f"kinds: {', '.join(INTERVAL_KINDS)}",
            )
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            if not 1 <= value <= self.most_head_dim:
                raise InvalidArgument(f"{name}={shown(value)} is out of range", f"1 <= {name} <= {self.most_head_dim}")
        for name in _SIZES:
            value = getattr(self, name)
            if not 1 <= value <= schema.MOST:
                what = "must be at least 1" if value < 1 else "is too large"
                raise InvalidArgument(f"{name}={shown(value)} {what}", f"1 <= {name} <= {schema.MOST}")
        if self.heads % self.kv_heads:
            raise InvalidArgument(
                "Number of heads in key/value must divide number of heads in query",
                f"heads={self.heads} kv_heads={self.kv_heads}",
            )
        for name in _BOUNDS:
            value = getattr(self, name)
            if not -1 <= value <= schema.MOST:
                what = "window bounds are -1 (unbounded) or at least 0" if value < -1 else "a window is too wide"
                raise InvalidArgument(what, f"{name}={shown(value)}, at most {schema.MOST}")

    # ---- the two keys -------------------------------------------------------------------------------------------

    @property
    def static_key(self) -> str:
        """All that changes the source, readable: forward/bf16/d192-128/causal."""
        d, dv = padded(self.head_dim), padded(self.head_dim_v)
        parts = [self.op, self.dtype, f"d{d}" if d == dv else f"d{d}-{dv}"]
        parts.append(f"{self.mask}-{self.intervals}" if self.intervals else self.mask)
        parts += [name for name in ("softcap", "alibi", "dropout", "tf32") if getattr(self, name)]
        return "/".join(parts + ([] if self.aligned else ["unaligned"]))

    @property
    def size_key(self) -> str:
        """What is tuned for and never compiled in: b4/h32-8/q4096-k4096 (and a window's width)."""
        key = f"b{self.batch}/h{self.heads}-{self.kv_heads}/q{self.seqlen_q}-k{self.seqlen_k}"
        if self.mask in ("window", "intervals") and (self.window_left, self.window_right) != (-1, -1):
            key += f"/w{self.window_left},{self.window_right}"
        return key

    @property
    def key(self) -> str:
        return f"{self.static_key}/{self.size_key}"

    # ---- derived facts -------------------------------------------------------------------------------------------

    @property
    def head_dim_padded(self) -> int:
        return padded(self.head_dim)

    @property
    def head_dim_v_padded(self) -> int:
        return padded(self.head_dim_v)

    def wider_than(self, most: int) -> str | None:
        """The reason of a family whose head dims go up to `most`."""
        size = max(self.head_dim, self.head_dim_v)
        return f"head_dim {size} is larger than {most}" if size > most else None

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype]

    def visible(self) -> float:
        """Cells (row, column) a head computes, the mask counted; intervals count as their band alone."""
        rows, cols, shift = self.seqlen_q, self.seqlen_k, self.seqlen_k - self.seqlen_q

        def before(first: int) -> int:
            """Cells left of a diagonal that starts at column `first` in row 0, inside the matrix."""
            return _clamped_sum(first + rows, cols) - _clamped_sum(first, cols)

        end = before(shift + self.window_right + 1) if self.window_right >= 0 else rows * cols
        return float(end - (before(shift - self.window_left) if self.window_left >= 0 else 0))

    def bytes(self) -> int:
        """Memory of a call's inputs and outputs: q, k, v, O, the LSE, intervals of each head, slopes."""
        dims = self.head_dim + self.head_dim_v
        of_rows = self.batch * self.heads * self.seqlen_q * (dims * self.itemsize + 4)
        bounds = 4 * len(INTERVAL_KINDS.get(self.intervals, ()))
        of_keys = self.batch * self.kv_heads * self.seqlen_k * (dims * self.itemsize + bounds)
        return of_rows + of_keys + 4 * self.batch * self.heads * self.alibi

    def flops(self) -> float:
        """2 products of 2 FLOP a cell. Causal counts half of a square, as the field does."""
        cells = self.visible()
        if self.mask == "causal" and self.seqlen_q == self.seqlen_k:
            cells = self.seqlen_q * self.seqlen_k / 2
        return 2.0 * cells * (self.head_dim + self.head_dim_v) * self.batch * self.heads

    def to_dict(self) -> dict[str, Any]:
        """Without `dropout` and `tf32` where there is none: so it was written before there was any."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _NEWER or value}

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        if not isinstance(fields, dict):
            raise InvalidArgument(f"a problem is an object of named fields, not {shown(fields)}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise InvalidArgument(f"unknown problem field {shown(unknown[0])}")
        return cls(**fields)

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    def resized(self, batch: int, seqlen_q: int, seqlen_k: int) -> Self:
        """The same with other sizes, which the caller has checked: it costs little."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        return made

    def __str__(self) -> str:
        return self.key

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)


def _clamped_sum(end: int, most: int) -> int:
    """Sum of min(x, most) over 0 <= x < end."""
    rising = max(0, min(end, most))
    return rising * (rising - 1) // 2 + most * max(0, end - most)
