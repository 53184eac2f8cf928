"""Which derivatives a call wants, and whether kernels of ours compute them."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from fagen.ops.attention.problem import MAX_HEAD_DIM, SIMT_SERVES, TORCH_DTYPES
from fagen.target import target_of

# Dtypes whose gradients the backward families compute, by device or by architecture where that has families of its own,
# and up to which head dim. Known without them, for a graph that is traced: there the kernel is chosen when the graph
# runs, which is too late for PyTorch's own attention to stand in it.
TRAINED: dict[str, dict[torch.dtype, int]] = {
    "cpu": dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 256),
    "cuda": dict.fromkeys((torch.bfloat16, torch.float16), 256)
    | dict.fromkeys((getattr(torch, TORCH_DTYPES[name]) for name in SIMT_SERVES), MAX_HEAD_DIM),
}
TRAINED["sm_90"] = TRAINED["cuda"] | dict.fromkeys((torch.bfloat16, torch.float16), MAX_HEAD_DIM)


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether a derivative is wanted, reverse or forward. For torch.func's own tensors the op answers that."""
    some = [t for t in tensors if isinstance(t, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in some):
        return True
    return has_tangent(*some)


def must_repeat(deterministic: bool) -> bool:
    """Whether gradients must be the same bits in every run, as the caller or all of PyTorch was told."""
    return deterministic or torch.are_deterministic_algorithms_enabled()


def has_tangent(*tensors: torch.Tensor | None) -> bool:
    """Whether forward mode put a tangent on one of them."""
    if not in_forward_mode():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    some = (t for t in tensors if isinstance(t, torch.Tensor))
    return any(not wrapped(t) and forward_ad.unpack_dual(t).tangent is not None for t in some)


def in_forward_mode() -> bool:
    """Whether dual numbers may be about: PyTorch's own attention kernels have no forward derivative."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _arch(device: torch.device) -> str:
    target = target_of(device)
    return "" if target is None else target.arch


# what torch.compiler.assume_constant_result sets: a tracer asks it, and does not look inside
vars(_arch)["_dynamo_marked_constant"] = True


def refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor | None) -> str:
    """Why PyTorch must compute the derivatives that are wanted; "" if none are, or if the ops may."""
    if not differentiated(q, k, v, slopes):
        return ""
    if has_tangent(q, k, v, slopes):
        return "forward-mode derivatives have no kernel"
    if slopes is not None and slopes.requires_grad:
        return "the gradient of ALiBi slopes has no kernel"
    if q.dtype not in TRAINED.get(q.device.type, ()):
        return f"no backward kernel takes {q.dtype} on device {q.device.type}"
    head_dim, most = max(q.shape[-1], v.shape[-1]), TRAINED[q.device.type][q.dtype]
    if head_dim > most:
        most = TRAINED.get(_arch(q.device), TRAINED[q.device.type])[q.dtype]
    if head_dim > most:
        return f"no backward kernel takes head_dim {head_dim} on device {q.device.type}: {most} at most"
    return ""
