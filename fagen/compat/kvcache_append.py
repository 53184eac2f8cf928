"""New keys and values of `flash_attn_with_kvcache`: checked, turned and written to the cache.

One kernel does it, which reads lengths on the device. Where it cannot (a tracer looks on, it is not built yet, a dtype
that it does not have), PyTorch's own calls do, with the same bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import increment_version

from fagen import env
from fagen.errors import InvalidArgument, LaunchError
from fagen.ops.attention import arguments, cache_append, cache_update, decode_checks
from fagen.ops.attention.arguments import is_plain
from fagen.ops.attention.cache_append import NewTokens
from fagen.ops.attention.cache_update import NewRows
from fagen.ops.attention.decode_call import DecodeCall, Tensors
from fagen.runtime import append
from fagen.runtime.kernel import Library, launch_on_stream
from fagen.target import target_of


class Prepared(NamedTuple):
    """What all calls of a kind share: a library, and its params without addresses."""

    library: Library
    params: Any


def new_tokens(
    k: Any, v: Any, starts: Any, cos: Any, sin: Any, rotary_seqlens: Any, interleaved: Any, banded: bool
) -> NewTokens:
    """Of arguments as they were given. `banded`: causal or with a window."""
    if k is None or v is None:
        have = ", ".join(name for name, t in (("k", k), ("v", v)) if t is not None) or "neither"
        raise InvalidArgument("k and v are given both, and rotary_cos and rotary_sin with them", f"given: {have}")
    starts = arguments.int32("cu_seqlens_k_new", starts)
    lengths = arguments.int32("rotary_seqlens", rotary_seqlens)
    return NewTokens(k, v, starts, cos, sin, lengths, bool(interleaved), banded)


def append_rows(call: DecodeCall, new: NewTokens) -> tuple[DecodeCall, Prepared | None]:
    """The call after the new rows are written; q is turned. Nothing is written before all is checked.

    Beside it what does the same for calls of the same kind; None where PyTorch appended.
    """
    call.check_arguments()
    call.check_tensors()
    _check(call, new)
    plain = is_plain(call.q) and is_plain(new.k) and is_plain(call.k)
    prepared = _prepare(call, new) if plain else None
    if plain and ((prepared is None and not call.q.is_cuda) or (call.q.is_cuda and env.flag("FAGEN_DEBUG"))):
        _check_contents(call, new)
    if prepared is None:
        return _by_torch(call, new), None
    status, q, after = launch(prepared, call, new)
    if status:
        if not q.is_cuda:
            _check_contents(call, new)  # in words
        text = (prepared.library.error(status) or b"unknown").decode(errors="replace")
        raise LaunchError(f"new rows could not be appended: {text}", f"k {tuple(new.k.shape)}")
    return dataclasses.replace(call, q=q, seqlens_k=after), prepared


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check(call: DecodeCall, new: NewTokens) -> None:
    starts = new.starts
    for name, t, cache in (("k", new.k, call.k), ("v", new.v, call.v)):
        arguments.dense(name, t)
        leading = (t.shape[0],) if starts is not None else (call.batch, t.shape[1] if t.dim() > 1 else 0)
        if tuple(t.shape) != (*leading, *cache.shape[2:]) or t.device != cache.device:
            layout = "(rows, kv_heads, d)" if starts is not None else "(batch, new, kv_heads, d)"
            have = f"it is {tuple(t.shape)} on {t.device}, the cache {tuple(cache.shape)}"
            raise InvalidArgument(f"{name} must be {layout} on {cache.device}", have)
        if t.dtype not in (cache.dtype, call.q.dtype):
            raise InvalidArgument(f"{name} is {t.dtype}", f"the cache is {cache.dtype}, q {call.q.dtype}")
    if new.k.shape[:-1] != new.v.shape[:-1]:
        have = f"{tuple(new.k.shape)}, {tuple(new.v.shape)}"
        raise InvalidArgument("k and v must have the same rows and heads", have)
    if starts is not None and (tuple(starts.shape) != (call.batch + 1,) or starts.device != call.q.device):
        have = f"it is {tuple(starts.shape)} on {starts.device}"
        raise InvalidArgument("cu_seqlens_k_new must be int32 (batch + 1) where q is", have)
    if (new.cos is None) != (new.sin is None):
        raise InvalidArgument("rotary_cos and rotary_sin go together")
    if new.cos is not None and new.sin is not None:
        _check_rotary(call, new, new.cos, new.sin)


def _check_rotary(call: DecodeCall, new: NewTokens, cos: torch.Tensor, sin: torch.Tensor) -> None:
    k, lengths = new.k, new.rotary_seqlens
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        arguments.dense(name, t)
        if t.dim() != 2 or t.shape != cos.shape or not 0 < t.shape[1] <= k.shape[-1] // 2 or t.device != k.device:
            have = f"it is {tuple(t.shape)} on {t.device}"
            raise InvalidArgument(f"{name} must be (positions, {k.shape[-1] // 2} or less) on {k.device}", have)
    if not cos.shape[0]:
        raise InvalidArgument("rotary_cos has no positions")
    if k.dtype.itemsize < 2:
        raise InvalidArgument("a key in fp8 cannot be turned", f"k is {k.dtype}", "pass k in the dtype of q")
    if lengths is not None and (tuple(lengths.shape) != (call.batch,) or lengths.device != k.device):
        raise InvalidArgument("rotary_seqlens must be int32 (batch)", f"it is {tuple(lengths.shape)}")


def _check_contents(call: DecodeCall, new: NewTokens) -> None:
    before, starts, rows = call.seqlens_k, new.starts, new.k.shape[0]
    decode_checks.check_range("cache_seqlens", before, 0, call.room, "keys of a sequence before the new ones")
    if starts is not None:
        decode_checks.check_starts("cu_seqlens_k_new", starts, rows, rows)
        if int(starts[-1]) != rows:
            raise InvalidArgument("cu_seqlens_k_new must end at the rows of k", f"{int(starts[-1])}, {rows}")
    later = _lengthened(call, new)
    decode_checks.check_contents(later)
    if new.cos is not None:
        first = before if new.rotary_seqlens is None else new.rotary_seqlens
        last = first + (later.seqlens_k - before)
        decode_checks.check_range("rotary positions", first, 0, new.cos.shape[0], "rows of rotary_cos")
        decode_checks.check_range("rotary positions", last, 0, new.cos.shape[0], "rows of rotary_cos")


# ---- by our kernel --------------------------------------------------------------------------------------------------


def _prepare(call: DecodeCall, new: NewTokens) -> Prepared | None:
    """None where PyTorch appends, for now or for good."""
    target = target_of(call.q.device)
    if target is None or not cache_append.readable(call, new):
        return None
    found = append.library(target, call.q.is_cuda and torch.cuda.is_current_stream_capturing())
    return None if found is None else Prepared(found, cache_append.make_params(call, new))


def launch(prepared: Prepared, call: Tensors | DecodeCall, new: NewTokens) -> tuple[int, torch.Tensor, torch.Tensor]:
    """A call of the kind, by its own tensors: the status, q turned, and the lengths with the new rows."""
    after = torch.empty_like(call.seqlens_k)
    q = call.q if new.cos is None else call.q.new_empty(call.q.shape)
    params: Any = append.Params.from_buffer_copy(prepared.params)  # other threads have their own
    cache_append.set_addresses(params, call, new, after, None if new.cos is None else q)
    status = launch_on_stream(prepared.library, params, call.q)
    for cache in (call.k, call.v):
        if not cache.is_inference():
            increment_version(cache)  # whoever saved it for a gradient must learn that it has changed
    return status, q, after


# ---- by PyTorch -----------------------------------------------------------------------------------------------------


def _by_torch(call: DecodeCall, new: NewTokens) -> DecodeCall:
    k, later = new.k, _lengthened(call, new)
    rows = NewRows.padded(k.shape[1], k.device) if new.starts is None else NewRows.packed(new.starts, k.shape[0])
    positions = rows.behind(call.seqlens_k)
    if new.cos is not None:
        first = call.seqlens_k if new.rotary_seqlens is None else new.rotary_seqlens
        k = _turned(k, rows.behind(first), new)
        later = dataclasses.replace(later, q=_turned(call.q, _positions_of_q(call, new), new))
    places = rows.places(positions, call.k, call.page_table, call.cache_batch_idx)
    for cache, fresh, scale in ((call.k, k, call.k_scale), (call.v, new.v, call.v_scale)):
        places.write(cache, cache_update.quantized(fresh, scale, rows, cache.dtype))
    return later


def _lengthened(call: DecodeCall, new: NewTokens) -> DecodeCall:
    counts: torch.Tensor | int = new.k.shape[1] if new.starts is None else new.starts[1:] - new.starts[:-1]
    return dataclasses.replace(call, seqlens_k=(call.seqlens_k + counts).to(torch.int32))


def _positions_of_q(call: DecodeCall, new: NewTokens) -> torch.Tensor:
    """Rows of q stand behind the keys that were there; without causal and window all at the first place."""
    first = call.seqlens_k if new.rotary_seqlens is None else new.rotary_seqlens
    if call.cu_seqlens_q is None:
        rows = NewRows.padded(call.seqlen_q, call.q.device)
    else:
        rows = NewRows.packed(call.cu_seqlens_q, call.rows)
    if not new.banded:
        return rows.of(first).expand(call.q.shape[:-2])
    return rows.behind(first)


def _turned(x: torch.Tensor, positions: torch.Tensor, new: NewTokens) -> torch.Tensor:
    assert new.cos is not None and new.sin is not None
    last = new.cos.shape[0] - 1  # of a row without a place any will do; those with one are within
    positions = positions.clamp(0, last)
    return cache_update.rotate(x, positions, new.cos, new.sin, interleaved=new.interleaved)
