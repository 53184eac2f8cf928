"""The problem of the softmax op: both directions, the softmax and its logarithm, along rows or columns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fagen import schema
from fagen.errors import InvalidArgument

ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
DIRECTIONS = ("forward", "backward")
ALONG = ("row", "column")
_WORDS = {"op": ("softmax",), "direction": DIRECTIONS, "dtype": tuple(ITEM_BYTES), "along": ALONG}


@dataclass(frozen=True)
class SoftmaxProblem:
    """The softmax of each row, or of each column, of a batch of matrices.

    `dtype` is that of what is read, `out_dtype` that of what is written. They differ where a cast is part of the call:
    forward may widen 16 bits to float32, and backward then narrows the gradient.
    """

    op: str = "softmax"
    direction: str = "forward"
    dtype: str = "fp32"
    out_dtype: str = ""  # as dtype
    log: bool = False  # the logarithm of the softmax
    along: str = "row"  # what sums to 1
    batch: int = 1
    rows: int = 64
    columns: int = 1024

    def __post_init__(self) -> None:
        for name, choices in _WORDS.items():
            value = getattr(self, name)
            if type(value) is not str or value not in choices:
                raise InvalidArgument(f"{name} of a softmax: {schema.shown(value)} is none of {', '.join(choices)}")
        if type(self.log) is not bool:
            raise InvalidArgument(f"log of a softmax is true or false, not {schema.shown(self.log)}")
        for name in ("batch", "rows", "columns"):
            if wrong := schema.integer(getattr(self, name), 1):
                raise InvalidArgument(f"{name} of a softmax: {wrong}")
        if self.out_dtype == "":
            object.__setattr__(self, "out_dtype", self.dtype)
        wide, narrow = self.dtype, self.out_dtype
        if self.direction == "forward":
            wide, narrow = narrow, wide
        if type(self.out_dtype) is not str or (wide != narrow and (wide != "fp32" or narrow not in ITEM_BYTES)):
            pair = f"{self.dtype} to {schema.shown(self.out_dtype)}"
            raise InvalidArgument(f"a softmax {self.direction} from {pair} has no kernel", "forward widens to fp32")

    @property
    def length(self) -> int:
        """Elements that sum to 1."""
        return self.columns if self.along == "row" else self.rows

    @property
    def count(self) -> int:
        """Rows, or columns, that do."""
        return self.batch * (self.rows if self.along == "row" else self.columns)

    @property
    def static_key(self) -> str:
        cast = "" if self.out_dtype == self.dtype else f"-{self.out_dtype}"
        return f"softmax/{self.direction}/{self.dtype}{cast}/{self.along}{'/log' if self.log else ''}"

    @property
    def size_key(self) -> str:
        return f"b{self.batch}/r{self.rows}-c{self.columns}"

    @property
    def key(self) -> str:
        return f"{self.static_key}/{self.size_key}"

    def bytes(self) -> int:
        """Memory of a call's inputs and output."""
        read = ITEM_BYTES[self.dtype] * (2 if self.direction == "backward" else 1)
        return self.count * self.length * (read + ITEM_BYTES[self.out_dtype])

    def flops(self) -> float:
        """As many as the textbook counts: maximum, difference, exponential, sum, quotient; or the gradient's four."""
        return float(self.count * self.length * (5 if self.direction == "forward" else 4))

    def replace(self, **changes: Any) -> SoftmaxProblem:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Any) -> SoftmaxProblem:
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or not set(fields) <= set(names):
            raise InvalidArgument(f"a softmax problem has the fields {', '.join(names)}", schema.shown(fields))
        return cls(**fields)

    def __str__(self) -> str:
        return self.key
