"""The problem of the forward op on fp8 numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fagen.errors import InvalidArgument
from fagen.ops.attention.problem import INTERVAL_KINDS, Problem
from fagen.schema import shown

_ABSENT = ("alibi", "dropout", "tf32")  # fields of a forward problem
DTYPES = ("bf16", "fp16")  # of O
_MOST_ROWS = 1 << 20
BLOCK_STEP = 64  # of the rows that share a scale: whole key tiles of some config


@dataclass(frozen=True)
class Fp8Problem(Problem):
    """The fields of a forward problem without ALiBi, dropout and TF32, and the scales' blocks. `dtype` is that of O."""

    most_head_dim: ClassVar[int] = 256

    op: str = "forward_fp8"
    scale_block: int = 0  # rows of q, and of k, that share a scale; 0: those of a (batch, kv head)

    def _check(self) -> None:
        super()._check()
        for name in _ABSENT:
            if getattr(self, name):
                raise InvalidArgument(f"forward_fp8 has no {name}", f"{name}={shown(getattr(self, name))}")
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype {shown(self.dtype)} of the output is not supported", f"known: {DTYPES}")
        check_block("scale_block", self.scale_block)

    @property
    def static_key(self) -> str:
        """forward_fp8/bf16/d128/causal/softcap/scales128."""
        return super().static_key + (f"/scales{self.scale_block}" if self.scale_block else "")

    def bytes(self) -> int:
        """Memory of a call's inputs and outputs: q, k and v of one byte, O, the LSE, intervals, the descales."""
        dims = self.head_dim + self.head_dim_v
        rows = self.batch * self.heads * self.seqlen_q * (self.head_dim + self.head_dim_v * self.itemsize + 4)
        bounds = 4 * len(INTERVAL_KINDS.get(self.intervals, ()))
        return rows + self.batch * self.kv_heads * (self.seqlen_k * (dims + bounds) + 12) + self._block_bytes()

    def _block_bytes(self) -> int:
        """Of the scales that blocks have, beside those of kv heads."""
        if not self.scale_block:
            return 0
        blocks = (-(-rows // self.scale_block) for rows in (self.seqlen_q, self.seqlen_k))
        return 4 * self.batch * sum(n * heads for n, heads in zip(blocks, (self.heads, self.kv_heads), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Without blocks where there are none: so it was written before there were any."""
        left_out = _ABSENT if self.scale_block else (*_ABSENT, "scale_block")
        return {name: value for name, value in super().to_dict().items() if name not in left_out}


def check_block(name: str, rows: int) -> None:
    """Raise InvalidArgument for a number of rows that cannot share a scale."""
    if rows < 0 or rows % BLOCK_STEP or rows > _MOST_ROWS:
        raise InvalidArgument(
            f"{name}={shown(rows)} is not a multiple of {BLOCK_STEP}", f"at most {_MOST_ROWS}; 0: none"
        )
