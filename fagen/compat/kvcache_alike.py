"""Calls of `flash_attn_with_kvcache` of sizes that never came, of tensors whose kind did.

A server meets them all day: another batch, another number of pages. What follows from dtypes, strides and settings was
found out with the first call of the kind; of the others only sizes are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fagen.compat import kvcache_append, kvcache_known
from fagen.compat.kvcache_known import Arguments, Key, Settings
from fagen.dispatch import decode, resolve
from fagen.ops.attention import cache_append
from fagen.ops.attention.arguments import has_aligned_rows
from fagen.ops.attention.cache_append import NewTokens
from fagen.ops.attention.decode_call import DecodeCall
from fagen.runtime.kernel import Library

Kind = tuple[Any, ...]


class _Alike(NamedTuple):
    static: decode.StaticKind
    settings: tuple[tuple[int, int], float, float | None, int]  # window, softcap, scale, num_splits of its calls
    append: Library | None
    banded: bool


_alike: dict[Kind, _Alike] = {}
_COUNTS = (int, type(None))


def kind_of(key: Key) -> Kind | None:
    """A key without the sizes that may differ between calls, so that all that checks and a problem say besides is the
    same; None where that takes a closer look."""
    t: Any = Arguments._make(key[:16])  # what is known of each
    settings, offset, one_address = key[16:]
    if type(settings.most_rows) not in _COUNTS or type(settings.most_keys) not in _COUNTS:
        return None
    parts: list[Any] = []
    for x in t[:5]:  # q, the cache, new rows
        if x is None:
            parts.append(None)
            continue
        kind, dtype, device, shape, strides = x
        if len(shape) < 3:
            return None
        rows = has_aligned_rows(shape, strides, dtype.itemsize)
        parts.append((kind, dtype, device, len(shape), shape[-2], shape[-1], strides[-1], rows))
    for x in t[5:]:  # small ones, contiguous
        if x is None:
            parts.append(None)
            continue
        kind, dtype, device, shape, strides = x
        if not shape or strides != ((1,) if len(shape) == 1 else (shape[-1], 1)):
            return None
        parts.append((kind, dtype, device, len(shape)))
    width = None if t.cos is None else t.cos[3][-1]
    page = 0 if t.table is None else t.k_cache[3][1]
    shared = one_address and t.k_cache[4] == t.v_cache[4]
    single = _rows_of(t.q[3], settings, ragged=t.starts is not None) == 1
    return (*parts, width, page, shared, single, settings[2:], offset)


def _rows_of(shape: Sequence[int], settings: Settings, *, ragged: bool) -> int:
    """The most rows of a sequence."""
    if not ragged:
        return shape[1]
    return max(1, shape[0]) if settings.most_rows is None else settings.most_rows


def serve(key: Key, a: Arguments, settings: Settings, want_lse: bool) -> Any:
    """What the call gives, and the next like it by its key; None if no kind of its is known, or its sizes disagree."""
    kind = kind_of(key)
    found = None if kind is None else _alike.get(kind)
    if found is None:
        return None
    (left_right, softcap, scale, num_splits), ragged = found.settings, a.starts is not None

    def call_of(q: Any, lengths: Any) -> DecodeCall:
        return DecodeCall.of_fields(
            q=q, k=a.k_cache, v=a.v_cache, seqlens_k=lengths, page_table=a.table, cu_seqlens_q=a.starts,
            cache_batch_idx=a.index, k_scale=a.k_scale, v_scale=a.v_scale, sinks=a.sinks, window=left_right,
            softcap=softcap, scale=scale, num_splits=num_splits,
            most_rows=_rows_of(a.q.shape, settings, ragged=True) if ragged else 0, most_keys=settings.most_keys or 0,
        )  # fmt: skip

    call = call_of(a.q, a.lengths)
    answer = decode.find_alike(found.static, call)
    if answer is None or answer.kernel is None or not answer.known:
        return None
    appended = None
    if found.append is not None:
        new = NewTokens(a.k, a.v, a.new_starts, a.cos, a.sin, a.rotary_seqlens, settings.interleaved, found.banded)
        if not cache_append.sizes_agree(call, new):
            return None
        appended = kvcache_append.Prepared(found.append, cache_append.make_params(call, new))
        status, q, after = kvcache_append.launch(appended, call, new)
        if status:
            return None
        call = call_of(q, after)
    prepared = decode.prepared(answer, call, found.static, found.static.epoch)
    kvcache_known.keep(key, prepared, appended, banded=found.banded)
    out, lse = decode.launch(prepared, call, want_lse)
    return out if lse is None else (out, lse)


def remember(
    key: Key, call: DecodeCall, new: NewTokens | None, attend: decode.Prepared, append: kvcache_append.Prepared | None
) -> None:
    """The kind of a call whose tensors kernels took as they were given."""
    kind = kind_of(key)
    if kind is not None and attend.static is not None and attend.static.epoch is resolve.epoch():
        settings = call.window, call.softcap, call.scale, call.num_splits
        library = None if append is None else append.library
        decode.keep(_alike, kind, _Alike(attend.static, settings, library, new is not None and new.banded))
