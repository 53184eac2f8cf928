"""PyTorch's own attention by kernels of ours: an implementation of flash attention for its registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

from fagen import api
from fagen.compat.flash_attn import window_bounds
from fagen.compat.varlen import packed_masks
from fagen.dispatch import attention as dispatch
from fagen.dispatch import resolve
from fagen.errors import MissingTool
from fagen.ops.attention import derivatives
from fagen.ops.attention.arguments import is_aligned
from fagen.ops.attention.call import AttentionCall

NAME = "fagen"
_OP = "_scaled_dot_product_flash_attention"
_GRADIENT = f"{_OP}_backward"
_PACKED, _PACKED_GRADIENT = "_flash_attention_forward", "_flash_attention_backward"
_MOST_ANSWERS = 4096  # sizes whose answer is kept

_Outputs = tuple[torch.Tensor, torch.Tensor, None, None, int, int, torch.Tensor, torch.Tensor, torch.Tensor]

_dispatch_key = "CUDA"
_answers: dict[tuple, bool] = {}
_answers_of: object = None  # the plans that they are of


def register_torch(*, activate: bool = True) -> None:
    """`torch.nn.functional.scaled_dot_product_attention` on CUDA by kernels of ours, where PyTorch takes its flash
    backend, and `torch.nn.attention.varlen.varlen_attn`, gradients too; that backend serves what they do not: dropout,
    paged caches.

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
    wrappers = {
        _OP: _kernel, _GRADIENT: _gradient, _PACKED: _packed_kernel, _PACKED_GRADIENT: _packed_gradient,
    }  # fmt: skip
    try:
        before = {op: torch.library.get_kernel(f"aten::{op}", _dispatch_key) for op in wrappers}
    except RuntimeError as error:
        what = f"this PyTorch has no flash attention for {_dispatch_key}"
        raise MissingTool(what, str(error).splitlines()[0], "install a build of torch for CUDA") from error
    library = Library("aten", "IMPL")
    for op, wrapper in wrappers.items():
        library.impl(op, wrapper(before[op].call_boxed), _dispatch_key, with_keyset=True)
    return _Handle(library)


Wrapped = Callable[..., Any]


def _arguments_of(op: str) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """Reads a call of an aten op: all of its arguments by the names that this version of PyTorch has for them. Those
    that are at their defaults need not have been handed over."""
    arguments = getattr(torch.ops.aten, op).default._schema.arguments
    names = [argument.name for argument in arguments]
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    return lambda given, named: {**defaults, **dict(zip(names, given, strict=False)), **named}


def _kernel(before: Callable[..., Any]) -> Wrapped:
    """Our kernel of the aten op, above the one that was there."""
    read = _arguments_of(_OP)

    def attend(keys: torch._C.DispatchKeySet, *given: Any, **named: Any) -> Any:
        a = read(given, named)
        tensors, how = (a["query"], a["key"], a["value"]), (a["is_causal"], a["scale"])
        trained, plain = derivatives.differentiated(*tensors), a["dropout_p"] == 0 and not a["return_debug_mask"]
        with torch.no_grad():  # what is saved for the gradient was saved above
            if plain and _serves(*tensors, *how, trained=trained):
                return _attend(*tensors, *how)
        return before(keys, *given, **named)

    return attend


def _gradient(before: Callable[..., Any]) -> Wrapped:
    """Our kernel of the op's backward. The output and the LSE that it reads are ours, or PyTorch's flash kernel's."""
    read = _arguments_of(_GRADIENT)

    def differentiate(keys: torch._C.DispatchKeySet, *given: Any, **named: Any) -> Any:
        a = read(given, named)
        tensors, causal, scale, lse = (a["query"], a["key"], a["value"]), a["is_causal"], a["scale"], a["logsumexp"]
        plain = a["dropout_p"] == 0 and lse.shape == tensors[0].shape[:3] and lse.dtype == torch.float32
        with torch.no_grad():
            ready = plain and api.ops_for_gradients()
            if ready and _serves(*tensors, causal, scale, gradients=True):
                window, repeated = (-1, 0 if causal else -1), derivatives.must_repeat(False)
                call = AttentionCall(*tensors, "bhsd", window, scale=scale, deterministic=repeated)
                return torch.ops.fagen.backward(*call.op_arguments(), a["out"], lse, a["grad_out"], None)
        return before(keys, *given, **named)

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
    """Whether a kernel of ours takes the call, or its gradients."""
    if not _sound(query, key, value, scale, 4) or (is_causal and query.shape[2] != key.shape[2]):
        return False  # causal: aligned bottom-right by some of its kernels and top-left by others

    def make_call(repeated: bool) -> AttentionCall:
        return AttentionCall.of(
            query, key, value, layout="bhsd", causal=is_causal, scale=scale, deterministic=repeated
        )  # fmt: skip

    return _answer(make_call, query, key, value, is_causal, trained=trained, gradients=gradients)


def _sound(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, dims: int) -> bool:
    """Whether shapes, strides and scale are of calls that we compute."""
    shape, tensors = query.shape, (query, key, value)
    if len(shape) != dims or 0 in shape or 0 in key.shape or value.shape != key.shape or key.shape[-1] != shape[-1]:
        return False
    return (scale is None or scale > 0) and all(t.stride(-1) == 1 and t.dtype == query.dtype for t in tensors)


def _answer(
    make_call: Callable[[bool], AttentionCall], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *of: Any,
    trained: bool, gradients: bool,
) -> bool:  # fmt: skip
    """Whether a kernel of ours takes the call, or its gradients, and is not known to be the slower one. Answers are
    kept by size and by what else makes calls different. The backward kernel of a call that is `trained` is compiled
    with its forward kernel."""
    global _answers_of
    tensors, epoch = (query, key, value), resolve.epoch()
    if _answers_of is not epoch or len(_answers) >= _MOST_ANSWERS:
        _answers.clear()
        _answers_of = epoch
    aligned = all(is_aligned(t) for t in tensors)
    repeated = (trained or gradients) and derivatives.must_repeat(False)
    wanted = trained, gradients, repeated
    known = (query.device, query.dtype, tuple(query.shape), tuple(key.shape), of, aligned, *wanted)
    answer = _answers.get(known)
    if answer is not None:
        return answer
    if _capturing(query.device):
        return False
    call = make_call(repeated)
    if trained:
        dispatch.answer_to_gradients(call)
    found = dispatch.answer_to_gradients(call) if gradients else dispatch.answer_to(call, ours=False)
    if found.known and resolve.epoch() is epoch:
        _answers[known] = found.kernel is not None
    return found.kernel is not None


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is: nothing may be compiled or loaded then, and PyTorch's kernel is there."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---- packed sequences ------------------------------------------------------------------------------------------------


_BOUNDS = ("window_size_left", "window_size_right")


def _packed_kernel(before: Callable[..., Any]) -> Wrapped:
    """Our kernel of the op below `varlen_attn`. Of what later versions know, `num_splits` alone does not matter."""
    read = _arguments_of(_PACKED)
    known = {
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask", "scale", *_BOUNDS, "num_splits",
    }  # fmt: skip

    def attend(keys: torch._C.DispatchKeySet, *given: Any, **named: Any) -> Any:
        a = read(given, named)
        plain = a["dropout_p"] == 0 and not a["return_debug_mask"]
        if plain and all(value is None for name, value in a.items() if name not in known):
            trained = derivatives.differentiated(a["query"], a["key"], a["value"])
            with torch.no_grad():
                packed = _Packed.of(a)
                if packed is not None and packed.serves(trained=trained):
                    return packed.attend()
        return before(keys, *given, **named)

    return attend


def _packed_gradient(before: Callable[..., Any]) -> Wrapped:
    read = _arguments_of(_PACKED_GRADIENT)

    def differentiate(keys: torch._C.DispatchKeySet, *given: Any, **named: Any) -> Any:
        a = read(given, named)
        query, lse = a["query"], a["logsumexp"]
        plain = a["dropout_p"] == 0 and lse.dtype == torch.float32 and query.dim() == 3
        if plain and lse.shape == query.shape[:2][::-1]:
            with torch.no_grad():
                packed = _Packed.of(a)
                if packed is not None and api.ops_for_gradients() and packed.serves(gradients=True):
                    return packed.differentiate(a["out"], lse, a["grad_out"])
        return before(keys, *given, **named)

    return differentiate


class _Packed:
    """A call of packed sequences, (total length, heads, head_dim); causal and window bottom-right in each."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        a = arguments
        self.tensors, self.lengths = (a["query"], a["key"], a["value"]), (a["cum_seq_q"], a["cum_seq_k"])
        self.causal, self.scale = a["is_causal"], a["scale"]
        left, right = (-1 if a.get(name) is None else a[name] for name in _BOUNDS)
        self.bounds = window_bounds((left, right))

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> _Packed | None:
        """None: the lengths of sequences are not among the arguments."""
        return None if arguments["cum_seq_q"] is None or arguments["cum_seq_k"] is None else cls(arguments)

    def serves(self, *, trained: bool = False, gradients: bool = False) -> bool:
        sound = _sound(*self.tensors, self.scale, 3) and self.lengths[0].shape == self.lengths[1].shape
        same = self.lengths[0] is self.lengths[1]
        how = self.causal, self.bounds, same
        return sound and _answer(self.call, *self.tensors, *how, trained=trained, gradients=gradients)

    def call(self, repeated: bool) -> AttentionCall:
        query, key, value = self.tensors
        keep_apart = packed_masks(query, key, *self.lengths, self.causal, self.bounds)
        return AttentionCall.of(
            query[None], key[None], value[None], **keep_apart, scale=self.scale, deterministic=repeated
        )  # fmt: skip

    def attend(self) -> tuple[torch.Tensor, ...]:
        """What the op returns: output, LSE (heads, total length), the state of random numbers, two that are unused."""
        query, key, value = self.tensors
        keep_apart = packed_masks(query, key, *self.lengths, self.causal, self.bounds)
        out = torch.empty_like(query)
        _, lse = api.attention(
            query[None], key[None], value[None], **keep_apart, scale=self.scale, return_lse=True, out=out[None]
        )  # fmt: skip
        state = torch.empty(2, dtype=torch.uint64, device=query.device)
        nothing = torch.empty((), dtype=torch.uint64, device=query.device)
        return out, lse[0], state, nothing, query.new_empty(0)

    def differentiate(self, out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor) -> list[torch.Tensor]:
        call = self.call(derivatives.must_repeat(False))
        found = torch.ops.fagen.backward(*call.op_arguments(), out[None], lse[None], grad_out[None], None)
        return [t[0] for t in found]
