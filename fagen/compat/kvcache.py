"""FlashAttention's `flash_attn_with_kvcache`: decoding on a cache of keys and values, contiguous or paged."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fagen import env
from fagen.compat import kvcache_alike, kvcache_append, kvcache_fp8, kvcache_known
from fagen.compat.flash_attn import window_bounds
from fagen.dispatch import decode
from fagen.errors import InvalidArgument, UnsupportedProblem
from fagen.ops.attention import arguments, decode_checks
from fagen.ops.attention import sinks as sink_logits
from fagen.ops.attention.arguments import is_plain
from fagen.ops.attention.decode_call import DecodeCall
from fagen.runtime import decode_ops

_Tensor = torch.Tensor | None


class SplitKeys(NamedTuple):
    """In the place of `numerics`: keys of a split, as a plan chose them."""

    keys: int


def flash_attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: _Tensor = None, v: _Tensor = None,
    qv: _Tensor = None, rotary_cos: _Tensor = None, rotary_sin: _Tensor = None,
    cache_seqlens: int | torch.Tensor | None = None, cache_batch_idx: _Tensor = None, cache_leftpad: _Tensor = None,
    page_table: _Tensor = None, cu_seqlens_q: _Tensor = None, cu_seqlens_k_new: _Tensor = None,
    max_seqlen_q: int | None = None, rotary_seqlens: _Tensor = None, q_descale: _Tensor = None,
    k_descale: _Tensor = None, v_descale: _Tensor = None, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
    rotary_interleaved: bool = True, scheduler_metadata: Any = None, num_splits: int = 0,
    pack_gqa: bool | None = None, sm_margin: int = 0, return_softmax_lse: bool = False, *,
    block_table: _Tensor = None, sinks: _Tensor = None, learnable_sink: _Tensor = None,
    max_seqlen_k: int | None = None, numerics: str = "tuned",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Append k and v to the cache, then attend to all of it: out, or (out, softmax_lse).

    The arguments are FlashAttention 3's, in its order, and a few more; scheduler_metadata, pack_gqa and sm_margin are
    hints that change nothing. q is (batch, seqlen_q, heads, d), or (rows, heads, d) with cu_seqlens_q: sequences one
    behind the other, prompts among single tokens. Causal and window are aligned bottom-right.

    k_cache, v_cache  (batch, seqlen, kv_heads, d), or pages (pages, 1, 16, 32, 64, 128 or 256 rows, kv_heads, d); of
                      q's dtype or float8_e4m3fn
    k, v              new rows, (batch, new, kv_heads, d), or packed with cu_seqlens_k_new; written behind
                      cache_seqlens, in place. For an fp8 cache they may be of q's dtype
    rotary_cos, _sin  (positions, d / 2 or less): turn new keys at their positions, and q at those of its rows (all at
                      cache_seqlens without causal and window), or from rotary_seqlens on
    cache_seqlens     int32 (batch): keys in the cache before k is added, or one number for all; None: it is full
    cache_batch_idx   int32 (batch): which row of a contiguous cache is each sequence's
    page_table        int32 (batch, pages of a sequence); block_table is the same
    q_descale, k_, v_ float32 (batch, kv_heads): an fp8 q, an fp8 cache is multiplied by it. q is turned into the
                      cache's dtype, beside an fp8 cache into bfloat16, which out has then
    sinks             (heads): a logit that joins the sum and has no value; learnable_sink is the same
    max_seqlen_q, _k  bounds of the rows and keys of a sequence, for cu_seqlens_q and for a cache with much room
    num_splits        blocks that share a sequence's keys; 0: as many as suit
    numerics          "pinned": a sequence's bits do not depend on the others in the batch, nor on how many they are

    Lengths are read on the device; nothing waits for it. On a GPU, indices are checked with FAGEN_DEBUG=1 only.
    """
    if qv is not None or cache_leftpad is not None or attention_chunk:
        _refuse_unsupported(qv=qv, cache_leftpad=cache_leftpad, attention_chunk=attention_chunk)
    if q_descale is not None or getattr(q, "dtype", None) == kvcache_fp8.E4M3:
        q = kvcache_fp8.wide(q, q_descale, k_cache, arguments.int32("cu_seqlens_q", cu_seqlens_q))
    mine = kvcache_known.Arguments(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
        _one_of("page_table", page_table, "block_table", block_table), cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens,
        k_descale, v_descale, _one_of("sinks", sinks, "learnable_sink", learnable_sink),
    )  # fmt: skip
    settings = kvcache_known.Settings(
        max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap, rotary_interleaved, num_splits,
        numerics,
    )  # fmt: skip
    key, want_lse = kvcache_known.key_of(mine, settings), bool(return_softmax_lse)
    served = None
    if key is not None:
        served = kvcache_known.serve(key, mine, settings, want_lse)
        if served is None:
            served = kvcache_alike.serve(key, mine, settings, want_lse)
    return _serve_new(key, mine, settings, want_lse) if served is None else served


def _serve_new(
    key: kvcache_known.Key | None, a: kvcache_known.Arguments, settings: kvcache_known.Settings, want_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A call that is looked at in full, and remembered by its key where the next like it need not be."""
    call = given = _call(a, settings)
    if torch.is_grad_enabled() and _wants_gradient(a.q, a.k_cache, a.v_cache, a.k, a.v, call.sinks):
        raise UnsupportedProblem("flash_attn_with_kvcache has no gradient", "", "call it under torch.no_grad()")
    appended, new = None, None
    if a.k is not None or a.v is not None or a.cos is not None or a.sin is not None:
        banded = call.window != (-1, -1)  # of one row a sequence it does not matter
        new = kvcache_append.new_tokens(
            a.k, a.v, a.new_starts, a.cos, a.sin, a.rotary_seqlens, settings.interleaved, banded
        )
        call, appended = kvcache_append.append_rows(call, new)
    elif a.q.is_cuda and env.flag("FAGEN_DEBUG"):
        decode_checks.check_contents(call)
    if not is_plain(a.q):  # a tracer, mode or subclass wants to see an op
        out, lse = decode_ops.attend(call)
        return (out, lse) if want_lse else out
    prepared = decode.prepare(call)
    if prepared is None:
        out, lse = decode.by_torch(call)
        return (out, lse) if want_lse else out
    by_kernels = new is None or appended is not None
    if key is not None and by_kernels and kvcache_known.remember(key, a, given, new, prepared, appended):
        kvcache_alike.remember(key, given, new, prepared, appended)
    made, made_lse = decode.launch(prepared, call, want_lse)
    return made if made_lse is None else (made, made_lse)


def _call(a: kvcache_known.Arguments, given: kvcache_known.Settings) -> DecodeCall:
    settings = _settings_of(given.causal, given.window, given.softcap, given.scale)
    q, k = a.q, a.k_cache
    for name, t in (("q", q), ("k_cache", k), ("v_cache", a.v_cache)):
        if not isinstance(t, torch.Tensor) or t.dim() < 3:
            _refuse_tensor(name, t)
    table, index = arguments.int32("page_table", a.table, 2), arguments.int32("cache_batch_idx", a.index)
    starts = arguments.int32("cu_seqlens_q", a.starts)
    if starts is not None and not starts.shape[0]:
        raise InvalidArgument("cu_seqlens_q is empty", "", "it has one number more than there are sequences")
    batch = q.shape[0] if starts is None else starts.shape[0] - 1
    room = k.shape[1] * (1 if table is None else table.shape[-1])
    most_rows = 0 if starts is None else _most_rows(q, given.most_rows)
    left, right = settings.window
    if (most_rows or q.shape[1]) == 1:
        right = -1  # a single row sees nothing behind the last key: no bound is needed there, and one kernel less
    return DecodeCall(
        q, k, a.v_cache, _lengths(a.lengths, batch, room, q.device), table, starts, index, a.k_scale, a.v_scale,
        None if a.sinks is None else _checked_sinks(a.sinks, q), (left, right), settings.softcap, settings.scale,
        _splits(given.num_splits, given.numerics), most_rows,
        0 if given.most_keys is None else arguments.integer("max_seqlen_k", given.most_keys),
    )  # fmt: skip


# ---- arguments ------------------------------------------------------------------------------------------------------


def _refuse_unsupported(**given: Any) -> None:
    names = [name for name, value in given.items() if value is not None and not (type(value) is int and value == 0)]
    raise UnsupportedProblem(f"{', '.join(names)} of flash_attn_with_kvcache cannot be served", "", "leave it out")


_PLAIN = (float, type(None))


def _settings_of(causal: Any, window_size: Any, softcap: Any, scale: Any) -> arguments.Settings:
    plain = type(causal) is bool and type(window_size) is tuple and type(softcap) is float and type(scale) in _PLAIN
    keep = plain and not torch.compiler.is_compiling()
    return (_kept_settings if keep else _settings)(causal, window_size, softcap, scale)


def _settings(causal: Any, window_size: Any, softcap: Any, scale: Any) -> arguments.Settings:
    return arguments.settings(causal, window_bounds(window_size), softcap, scale)


_kept_settings = functools.lru_cache(maxsize=256)(_settings)  # a model has few


def _wants_gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> bool:
    return q.requires_grad or k.requires_grad or v.requires_grad or any(getattr(t, "requires_grad", 0) for t in others)


def _one_of(name: str, a: Any, other: str, b: Any) -> Any:
    if a is not None and b is not None:
        raise InvalidArgument(f"{name} and {other} are two names of one argument", "", "give one of them")
    return b if a is None else a


def _splits(num_splits: Any, numerics: Any) -> int:
    """As `DecodeCall` says it."""
    count = arguments.integer("num_splits", num_splits)
    if count < 0:
        raise InvalidArgument(f"num_splits={count} is negative", "", "0 leaves it to the kernel")
    if numerics == "tuned":
        return count
    if type(numerics) is SplitKeys:
        return -numerics.keys
    if numerics != "pinned":
        raise InvalidArgument(f"numerics={arguments.shown(numerics)} is unknown", "known: tuned, pinned")
    if count:
        raise InvalidArgument("num_splits does not go with pinned numerics", f"num_splits={count}")
    return -decode.PINNED_KEYS


def _refuse_tensor(name: str, t: Any) -> None:
    arguments.dense(name, t)
    raise InvalidArgument(f"{name} has {t.dim()} dimensions", f"its shape is {tuple(t.shape)}")


def _lengths(given: Any, batch: int, room: int, device: torch.device) -> torch.Tensor:
    if isinstance(given, torch.Tensor):
        found = arguments.int32("cache_seqlens", given)
        assert found is not None
        return found
    length = room if given is None else arguments.integer("cache_seqlens", given)
    if not 0 <= length <= room:
        raise InvalidArgument(f"cache_seqlens={length}", f"the cache has room for {room} a sequence")
    return torch.full((batch,), length, dtype=torch.int32, device=device)


def _most_rows(q: torch.Tensor, given: Any) -> int:
    return max(1, q.shape[0]) if given is None else arguments.integer("max_seqlen_q", given)


def _checked_sinks(sinks: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    sink_logits.check(sinks, q.shape[-2], q.device)
    return sinks.to(torch.float32).contiguous()
