"""Whether a call must be differentiated, which no kernel of ours can be."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether a derivative is wanted, reverse or forward. For torch.func's own tensors the op answers that."""
    some = [t for t in tensors if isinstance(t, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in some):
        return True
    if not in_forward_mode():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(not wrapped(t) and forward_ad.unpack_dual(t).tangent is not None for t in some)


def in_forward_mode() -> bool:
    """Whether dual numbers may be about: PyTorch's own attention kernels have no forward derivative."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0
