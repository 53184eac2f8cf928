"""PyTorch's switch for TF32: whether products of float32 numbers on a GPU may be rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def allowed(t: torch.Tensor) -> bool:
    """For a call with this tensor, at this moment; `tf32_allowed` of csrc/table.h asks the same.

    A graph of torch.compile holds ops, which ask when they run: while it is traced nobody needs to know.
    """
    import torch

    if t.dtype != torch.float32 or t.device.type != "cuda":
        return False
    if torch.compiler.is_compiling():
        return False
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # the successor of allow_tf32, which then may not be read
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"
