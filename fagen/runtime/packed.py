"""The kernel that makes the intervals of packed sequences: one launch where PyTorch has some twenty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fagen.runtime.helper import Helper
from fagen.runtime.kernel import Library, launch_on_stream
from fagen.target import target_of

if TYPE_CHECKING:
    import torch

HELPER = Helper(
    "packed_bounds",
    "fagen/abi/packed_bounds.h",
    "packed/bounds.cu.j2",
    None,
    "PyTorch makes bounds of packed sequences",
)
Params = HELPER.params


def library_for(of_q: torch.Tensor, of_k: torch.Tensor) -> Library | None:
    """The kernel for these sequences; None where PyTorch makes their intervals, for now or for good."""
    import torch

    alike = of_q.dtype == of_k.dtype and of_q.device == of_k.device and of_q.shape == of_k.shape
    known = of_q.is_cuda and of_q.dim() == 1 and of_q.dtype in (torch.int32, torch.int64)
    if not (alike and known and _readable(of_q) and _readable(of_k)):
        return None
    target = target_of(of_q.device)
    return HELPER.library(target, torch.cuda.is_current_stream_capturing()) if target is not None else None


def _readable(starts: torch.Tensor) -> bool:
    """An address may be taken: no tracer's tensor and no transform's."""
    import torch

    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return type(starts) is torch.Tensor and starts.is_contiguous() and not wrapped(starts)


def make_intervals(
    library: Library, of_q: torch.Tensor, of_k: torch.Tensor, rows: int, keys: int, columns: int,
    left: int | None, right: int | None,
) -> torch.Tensor | None:  # fmt: skip
    """Those of `masks.from_cu_seqlens`, or their first column alone; None if the kernel could not be launched."""
    import torch

    found = of_q.new_empty((1, 1, keys, columns), dtype=torch.int32)
    p: Any = Params()
    p.cu_seqlens_q, p.cu_seqlens_k, p.intervals = of_q.data_ptr(), of_k.data_ptr(), found.data_ptr()
    p.sequences, p.seqlen_q, p.seqlen_k, p.columns = of_q.shape[0] - 1, rows, keys, columns
    p.wide = int(of_q.dtype == torch.int64)
    p.left, p.right = (-1 if bound is None else min(bound, rows + keys) for bound in (left, right))
    return found if launch_on_stream(library, p, of_q) == 0 else None
