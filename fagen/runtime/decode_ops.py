"""The op of decode, `fagen::decode`: a function of its arguments, for torch.compile. The cache stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fagen.ops.attention.decode_call import DecodeCall

_TENSORS = ("page_table", "cu_seqlens_q", "cache_batch_idx", "k_scale", "v_scale", "sinks")
_SCHEMA = (
    "decode(Tensor q, Tensor k, Tensor v, Tensor seqlens_k, "
    + ", ".join(f"Tensor? {name}" for name in _TENSORS)
    + ", int window_left, int window_right, float softcap, float? scale, int num_splits, int most_rows, "
    "int most_keys) -> (Tensor, Tensor)"
)
Attend = Callable[[DecodeCall], tuple[torch.Tensor, torch.Tensor | None]]

_attend: Attend  # `answer_with` sets it
_libraries: list[Any] = []  # torch unregisters what is collected


def answer_with(attend: Attend) -> None:
    """Hand over what computes a call: a kernel, or PyTorch."""
    global _attend
    _attend = attend


def attend(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by way of the op."""
    tensors = (getattr(call, name) for name in _TENSORS)
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.fagen.decode(
        call.q, call.k, call.v, call.seqlens_k, *tensors, *call.window, call.softcap, call.scale, call.num_splits,
        call.most_rows, call.most_keys,
    )  # fmt: skip
    return result


def _register() -> None:
    library = torch.library.Library("fagen", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("decode", _decode, "CompositeExplicitAutograd")
    torch.library.register_fake("fagen::decode", _fake, lib=library)
    _libraries.append(library)


def _call(args: tuple[Any, ...]) -> DecodeCall:
    tensors, (left, right), settings = args[:10], args[10:12], args[12:]
    fields = (*tensors, (left, right), *settings)
    return DecodeCall(*fields)


def _decode(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _attend(_call(args))  # which validates: anybody may call an op with anything
    assert lse is not None
    return out, lse


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    made = _call(args).new_outputs()
    return made["out"], made["lse"]


_register()  # at once: torch.compile may trace the first call
