"""One call of the softmax op: tensors of any shape folded to (batch, rows, columns), validated once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fagen import schema
from fagen.errors import InvalidArgument
from fagen.ops.softmax.problem import SoftmaxProblem

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, eq=False)
class SoftmaxCall:
    """`x` is read; backward it is what forward made, and `dout` the gradient of that. Each is (batch, rows, columns),
    its columns contiguous."""

    x: torch.Tensor
    out_dtype: torch.dtype
    along: str = "row"
    log: bool = False
    dout: torch.Tensor | None = None

    @property
    def problem(self) -> SoftmaxProblem:
        direction = "forward" if self.dout is None else "backward"
        dtypes = DTYPES[self.x.dtype], DTYPES[self.out_dtype]
        return SoftmaxProblem("softmax", direction, *dtypes, self.log, self.along, *self.x.shape)

    @property
    def axis(self) -> int:
        """The dimension of the folded tensors along which the softmax runs."""
        return 2 if self.along == "row" else 1

    def check_tensors(self) -> None:
        for name, t in self.inputs().items():
            if t.dim() != 3 or t.dtype not in DTYPES or (t.shape[2] > 1 and t.stride(2) != 1):
                have = f"it is {t.dtype} {tuple(t.shape)}, strides {t.stride()}"
                raise InvalidArgument(f"{name} must be (batch, rows, columns), its columns contiguous", have)
            if (t.shape, t.dtype, t.device) != (self.x.shape, self.x.dtype, self.x.device):
                have = f"it is {t.dtype} {tuple(t.shape)} on {t.device}"
                raise InvalidArgument(f"{name} must be {self.x.dtype} {tuple(self.x.shape)} on {self.x.device}", have)
        if self.out_dtype not in DTYPES:
            raise InvalidArgument(f"no kernel writes {self.out_dtype}")
        _ = self.problem  # its sizes

    def inputs(self) -> dict[str, torch.Tensor]:
        return {"x": self.x} if self.dout is None else {"x": self.x, "dout": self.dout}

    def output_types(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"out": (tuple(self.x.shape), self.out_dtype)}


def fold(t: torch.Tensor, dim: int) -> tuple[torch.Tensor, str]:
    """A tensor as (batch, rows, columns) with contiguous columns, and along what its dimension `dim` lies there.

    A view where strides allow, else of a contiguous copy. All sizes are positive. Behind a last dimension that is
    reduced there are two levels of rows at most; before an inner one there is one level of batches.
    """
    if t.dim() == 0:
        t = t[None]
    before, length, behind = t.shape[:dim], t.shape[dim], t.shape[dim + 1 :]
    inner = behind.numel()
    if inner > 1:
        shape = (before.numel(), length, inner)
        seen = _viewed(t, shape)
        return (t.contiguous().view(shape) if seen is None else seen), "column"
    cut = next((i for i in range(len(before) + 1) if _viewed(t, _two_levels(before, i, length)) is not None), None)
    if cut is None:
        return t.contiguous().view(1, before.numel(), length), "row"
    return t.view(_two_levels(before, cut, length)), "row"


def _two_levels(before: torch.Size, cut: int, length: int) -> tuple[int, int, int]:
    return before[:cut].numel(), before[cut:].numel(), length


def _viewed(t: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor | None:
    """The view of that shape, if there is one whose columns are contiguous."""
    try:
        seen = t.view(shape)
    except RuntimeError:
        return None
    return seen if shape[2] == 1 or seen.stride(2) == 1 else None


def too_large(t: torch.Tensor) -> str:
    """Why no kernel's params can hold a folded tensor's sizes; empty if they can."""
    return next(filter(None, (schema.integer(size, 1) for size in t.shape)), "")
