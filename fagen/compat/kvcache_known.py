"""Calls of `flash_attn_with_kvcache` that came before: what was decided of them, so that the next like them only
launches.

A step of decoding is short, and what is asked of a call takes longer than it does. A call is known by its settings and
by shape, strides, dtype and device of its tensors; it is forgotten when dispatch may choose otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fagen import env
from fagen.compat import kvcache_append
from fagen.dispatch import decode, resolve
from fagen.ops.attention.arguments import ALIGNMENT, is_plain
from fagen.ops.attention.cache_append import NewTokens
from fagen.ops.attention.decode_call import DecodeCall, Tensors

Key = tuple[Any, ...]


class Arguments(NamedTuple):
    """The tensors of a call as they were given."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: Any
    v: Any
    cos: Any
    sin: Any
    lengths: Any
    index: Any
    table: Any
    starts: Any
    new_starts: Any
    rotary_seqlens: Any
    k_scale: Any
    v_scale: Any
    sinks: Any


class Settings(NamedTuple):
    """All else that changes what a call gives, as it was given."""

    most_rows: Any
    most_keys: Any
    scale: Any
    causal: Any
    window: Any
    softcap: Any
    interleaved: Any
    num_splits: Any
    numerics: Any


class _Known(NamedTuple):
    attend: decode.Prepared
    append: kvcache_append.Prepared | None
    banded: bool


_known: dict[Key, _Known] = {}


def key_of(a: Arguments, settings: Settings) -> Key | None:
    """All that follows from a call but its addresses; None where it is nothing to be remembered: somebody wants to see
    the ops, a gradient is wanted, its contents are to be checked, or it is no call of tensors at all."""
    if not is_plain(a.q):
        return None
    try:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in a):
            return None
        if a.q.is_cuda and env.flag("FAGEN_DEBUG"):
            return None
        hash(settings)  # a list of window bounds, say, has none
        q, k, v = a.q.data_ptr(), a.k_cache.data_ptr(), a.v_cache.data_ptr()
        shapes = [None if t is None else (type(t), t.dtype, t.device, t.shape, t.stride()) for t in a]
    except (AttributeError, RuntimeError, TypeError):  # the checks tell it in words
        return None
    return (*shapes, settings, (q | k | v) % ALIGNMENT, k == v)


def serve(key: Key, a: Arguments, settings: Settings, want_lse: bool) -> Any:
    """What the call gives, if one like it came before; None if not, or if its contents are to be told in words."""
    known = _known.get(key)
    if known is None or known.attend.epoch is not resolve.epoch():
        return None
    tensors = Tensors(
        a.q, a.k_cache, a.v_cache, a.lengths, a.table, a.starts, a.index, a.k_scale, a.v_scale, a.sinks
    )  # fmt: skip
    if known.append is not None:
        interleaved, banded = settings.interleaved, known.banded
        new = NewTokens(a.k, a.v, a.new_starts, a.cos, a.sin, a.rotary_seqlens, interleaved, banded)
        status, q, after = kvcache_append.launch(known.append, tensors, new)
        if status:
            return None
        tensors = tensors._replace(q=q, seqlens_k=after)
    out, lse = decode.launch(known.attend, tensors, want_lse)
    return out if lse is None else (out, lse)


def remember(
    key: Key, a: Arguments, call: DecodeCall, new: NewTokens | None, attend: decode.Prepared,
    append: kvcache_append.Prepared | None,
) -> bool:  # fmt: skip
    """A call that kernels served, if they took its tensors as they were given; whether they did."""
    as_given = (
        attend.kept and a.lengths is call.seqlens_k and a.table is call.page_table and a.starts is call.cu_seqlens_q
        and a.index is call.cache_batch_idx and a.sinks is call.sinks
        and (new is None or (a.new_starts is new.starts and a.rotary_seqlens is new.rotary_seqlens))
    )  # fmt: skip
    if as_given:
        keep(key, attend, append, banded=new is not None and new.banded)
    return as_given


def keep(key: Key, attend: decode.Prepared, append: kvcache_append.Prepared | None, *, banded: bool) -> None:
    decode.keep(_known, key, _Known(attend, append, banded))
