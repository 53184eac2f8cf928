"""The problem of the forward op on fp8 numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fagen.errors import InvalidArgument
from fagen.ops.attention.problem import Problem
from fagen.schema import shown

_ABSENT = ("intervals", "alibi", "dropout", "tf32")  # fields of a forward problem
DTYPES = ("bf16", "fp16")  # of O


@dataclass(frozen=True)
class Fp8Problem(Problem):
    """The fields of a forward problem without intervals, ALiBi, dropout and TF32. `dtype` is that of O."""

    most_head_dim: ClassVar[int] = 256

    op: str = "forward_fp8"

    def _check(self) -> None:
        super()._check()
        for name in _ABSENT:
            if getattr(self, name):
                raise InvalidArgument(f"forward_fp8 has no {name}", f"{name}={shown(getattr(self, name))}")
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype {shown(self.dtype)} of the output is not supported", f"known: {DTYPES}")

    def bytes(self) -> int:
        """Memory of a call's inputs and outputs: q, k and v of one byte, O, the LSE, the descales."""
        dims = self.head_dim + self.head_dim_v
        rows = self.batch * self.heads * self.seqlen_q * (self.head_dim + self.head_dim_v * self.itemsize + 4)
        return rows + self.batch * self.kv_heads * (self.seqlen_k * dims + 12)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in _ABSENT}
