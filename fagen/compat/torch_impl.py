"""PyTorch's own attention by kernels of ours: an implementation of flash attention for its registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

from fagen import api
from fagen.dispatch import attention as dispatch
from fagen.dispatch import resolve
from fagen.errors import MissingTool
from fagen.ops.attention import derivatives
from fagen.ops.attention.arguments import is_aligned
from fagen.ops.attention.call import AttentionCall

NAME = "fagen"
_OP = "_scaled_dot_product_flash_attention"
_GRADIENT = f"{_OP}_backward"
_MOST_ANSWERS = 4096  # sizes whose answer is kept

_Outputs = tuple[torch.Tensor, torch.Tensor, None, None, int, int, torch.Tensor, torch.Tensor, torch.Tensor]

_dispatch_key = "CUDA"
_answers: dict[tuple, bool] = {}
_answers_of: object = None  # the plans that they are of


def register_torch(*, activate: bool = True) -> None:
    """`torch.nn.functional.scaled_dot_product_attention` on CUDA by kernels of ours, where PyTorch takes its flash
    backend, gradients too; that backend serves what they do not: dropout, packed sequences.

    `torch.nn.attention.restore_flash_attention_impl()` undoes it. With activate=False it begins with
    `torch.nn.attention.activate_flash_attention_impl("fagen")`. PyTorch 2.11 or newer.
    """
    import torch.nn.attention as registry

    if not hasattr(registry, "register_flash_attention_impl"):
        raise MissingTool(
            f"torch {torch.__version__} takes no other flash attention", "", "install torch 2.11 or newer"
        )
    registry.register_flash_attention_impl(NAME, register_fn=_take_over)
    if activate:
        registry.activate_flash_attention_impl(NAME)


class _Handle:
    """Keeps our kernel registered; without it the one before is there again."""

    def __init__(self, library: Library) -> None:
        self._library: Library | None = library

    def remove(self) -> None:
        self._library = None


def _take_over() -> _Handle:
    try:
        forward, backward = (torch.library.get_kernel(f"aten::{op}", _dispatch_key) for op in (_OP, _GRADIENT))
    except RuntimeError as error:
        what = f"this PyTorch has no flash attention for {_dispatch_key}"
        raise MissingTool(what, str(error).splitlines()[0], "install a build of torch for CUDA") from error
    library = Library("aten", "IMPL")
    library.impl(_OP, _kernel(forward.call_boxed), _dispatch_key, with_keyset=True)
    library.impl(_GRADIENT, _gradient(backward.call_boxed), _dispatch_key, with_keyset=True)
    return _Handle(library)


def _kernel(before: Callable[..., Any]) -> Callable[..., Any]:
    """Our kernel of the aten op, above the one that was there."""

    def attend(
        keys: torch._C.DispatchKeySet,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        trained, plain = derivatives.differentiated(query, key, value), dropout_p == 0 and not return_debug_mask
        with torch.no_grad():  # what is saved for the gradient was saved above
            if plain and _serves(query, key, value, is_causal, scale, trained=trained):
                return _attend(query, key, value, is_causal, scale)
        return before(keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)

    return attend


def _gradient(before: Callable[..., Any]) -> Callable[..., Any]:
    """Our kernel of the op's backward. The output and the LSE that it reads are ours, or PyTorch's flash kernel's."""

    def differentiate(
        keys: torch._C.DispatchKeySet,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        cum_seq_q: torch.Tensor | None,
        cum_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        *random: torch.Tensor,
        scale: float | None = None,
    ) -> Any:
        plain = dropout_p == 0 and logsumexp.shape == query.shape[:3] and logsumexp.dtype == torch.float32
        with torch.no_grad():
            ready = plain and api.ops_for_gradients()
            if ready and _serves(query, key, value, is_causal, scale, gradients=True):
                window, repeated = (-1, 0 if is_causal else -1), derivatives.must_repeat(False)
                call = AttentionCall(query, key, value, "bhsd", window, scale=scale, deterministic=repeated)
                return torch.ops.fagen.backward(*call.op_arguments(), out, logsumexp, grad_out, None)
        tensors = (grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k)
        return before(keys, *tensors, max_q, max_k, dropout_p, is_causal, *random, scale=scale)

    return differentiate


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None
) -> _Outputs:
    """What the aten op returns. Its backward reads the output, the LSE (natural log, float32, (batch, heads, rows))
    and, where there was dropout, the state of the random numbers."""
    out = torch.empty_like(query)  # lies in memory as torch.compile was told
    _, lse = api.attention(
        query, key, value, layout="bhsd", causal=is_causal, scale=scale, return_lse=True, out=out
    )  # fmt: skip
    state = torch.empty(2, dtype=torch.uint64, device=query.device)
    nothing = torch.empty((), dtype=torch.uint64, device=query.device)
    return out, lse, None, None, query.shape[2], key.shape[2], state, nothing, query.new_empty(0)


def _serves(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None,
    *, trained: bool = False, gradients: bool = False,
) -> bool:  # fmt: skip
    """Whether a kernel of ours takes the call, or its gradients, and is not known to be the slower one. Answers are
    kept by size. The backward kernel of a call that is `trained` is compiled with its forward kernel."""
    global _answers_of
    tensors, shape = (query, key, value), query.shape
    if len(shape) != 4 or 0 in shape or 0 in key.shape or value.shape != key.shape or key.shape[3] != shape[3]:
        return False
    if is_causal and shape[2] != key.shape[2]:
        return False  # aligned bottom-right by some of its kernels and top-left by others
    if (scale is not None and not scale > 0) or any(t.stride(3) != 1 or t.dtype != query.dtype for t in tensors):
        return False
    epoch = resolve.epoch()
    if _answers_of is not epoch or len(_answers) >= _MOST_ANSWERS:
        _answers.clear()
        _answers_of = epoch
    aligned = all(is_aligned(t) for t in tensors)
    repeated = (trained or gradients) and derivatives.must_repeat(False)
    wanted = trained, gradients, repeated
    known = (query.device, query.dtype, tuple(shape), tuple(key.shape), is_causal, aligned, *wanted)
    answer = _answers.get(known)
    if answer is not None:
        return answer
    call = AttentionCall.of(
        query, key, value, layout="bhsd", causal=is_causal, scale=scale, deterministic=repeated
    )  # fmt: skip
    if _capturing(query.device):
        return False
    if trained:
        dispatch.answer_to_gradients(call)
    found = dispatch.answer_to_gradients(call) if gradients else dispatch.answer_to(call, ours=False)
    if found.known and resolve.epoch() is epoch:
        _answers[known] = found.kernel is not None
    return found.kernel is not None


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is: nothing may be compiled or loaded then, and PyTorch's kernel is there."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
