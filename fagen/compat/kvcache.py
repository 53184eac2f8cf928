"""FlashAttention's `flash_attn_with_kvcache`: decoding on a cache of keys and values, contiguous or paged."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch

from fagen import env
from fagen.compat.flash_attn import window_bounds
from fagen.dispatch import decode
from fagen.errors import InvalidArgument, UnsupportedProblem
from fagen.ops.attention import arguments, cache_update, decode_checks
from fagen.ops.attention import sinks as sink_logits
from fagen.ops.attention.cache_update import NewRows
from fagen.ops.attention.decode_call import DecodeCall
from fagen.runtime import decode_ops

_Tensor = torch.Tensor | None


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
    k_descale, v_     float32 (batch, kv_heads): an fp8 cache is multiplied by it
    sinks             (heads): a logit that joins the sum and has no value; learnable_sink is the same
    max_seqlen_q, _k  bounds of the rows and keys of a sequence, for cu_seqlens_q and for a cache with much room
    num_splits        blocks that share a sequence's keys; 0: as many as suit
    numerics          "pinned": a sequence's bits do not depend on the others in the batch, nor on how many they are

    Lengths are read on the device; nothing waits for it. On a GPU, indices are checked with FAGEN_DEBUG=1 only.
    """
    if qv is not None or cache_leftpad is not None or attention_chunk or q_descale is not None:
        _refuse_unsupported(qv=qv, cache_leftpad=cache_leftpad, attention_chunk=attention_chunk, q_descale=q_descale)
    settings = _settings_of(causal, window_size, softcap, softmax_scale)
    call = _call(
        q, k_cache, v_cache, cache_seqlens, _one_of("page_table", page_table, "block_table", block_table), cu_seqlens_q,
        cache_batch_idx, k_descale, v_descale, _one_of("sinks", sinks, "learnable_sink", learnable_sink), settings,
        _splits(num_splits, numerics), max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    if torch.is_grad_enabled() and _wants_gradient(q, k_cache, v_cache, k, v, call.sinks):
        raise UnsupportedProblem("flash_attn_with_kvcache has no gradient", "", "call it under torch.no_grad()")
    if k is not None or v is not None or rotary_cos is not None or rotary_sin is not None:
        banded = settings.window != (-1, -1)
        new = _New(k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved, banded)
        call = new.appended(call)
    elif q.is_cuda and env.flag("FAGEN_DEBUG"):
        decode_checks.check_contents(call)
    out, lse = _attend(call, bool(return_softmax_lse))
    return out if lse is None or not return_softmax_lse else (out, lse)


def _call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Any, table: _Tensor, starts: _Tensor, index: _Tensor,
    k_scale: _Tensor, v_scale: _Tensor, sinks: _Tensor, settings: arguments.Settings, num_splits: int, most_rows: Any,
    most_keys: Any,
) -> DecodeCall:  # fmt: skip
    for name, t in (("q", q), ("k_cache", k), ("v_cache", v)):
        if not isinstance(t, torch.Tensor) or t.dim() < 3:
            _refuse_tensor(name, t)
    table, index = _int32("page_table", table, 2), _int32("cache_batch_idx", index)
    starts = _int32("cu_seqlens_q", starts)
    if starts is not None and not starts.shape[0]:
        raise InvalidArgument("cu_seqlens_q is empty", "", "it has one number more than there are sequences")
    batch = q.shape[0] if starts is None else starts.shape[0] - 1
    room = k.shape[1] * (1 if table is None else table.shape[-1])
    most_rows = 0 if starts is None else _most_rows(q, most_rows)
    left, right = settings.window
    if (most_rows or q.shape[1]) == 1:
        right = -1  # a single row sees nothing behind the last key: no bound is needed there, and one kernel less
    return DecodeCall(
        q, k, v, _lengths(lengths, batch, room, q.device), table, starts, index, k_scale, v_scale,
        None if sinks is None else _checked_sinks(sinks, q), (left, right), settings.softcap, settings.scale,
        num_splits, most_rows,
        0 if most_keys is None else arguments.integer("max_seqlen_k", most_keys),
    )  # fmt: skip


def _attend(call: DecodeCall, want_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Straight to the kernel, unless a tracer, mode or subclass wants to see an op."""
    return decode.attend(call, want_lse) if _is_plain(call.q) else decode_ops.attend(call)


def _is_plain(t: torch.Tensor) -> bool:
    """A tensor with memory that may be looked at, and nobody who wants to see ops."""
    if torch.compiler.is_compiling() or type(t) not in (torch.Tensor, torch.nn.Parameter):
        return False
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return not modes and torch._C._functorch.peek_interpreter_stack() is None


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
    if numerics != "pinned":
        raise InvalidArgument(f"numerics={arguments.shown(numerics)} is unknown", "known: tuned, pinned")
    if count:
        raise InvalidArgument("num_splits does not go with pinned numerics", f"num_splits={count}")
    return -decode.PINNED_KEYS


def _refuse_tensor(name: str, t: Any) -> None:
    arguments.dense(name, t)
    raise InvalidArgument(f"{name} has {t.dim()} dimensions", f"its shape is {tuple(t.shape)}")


def _int32(name: str, t: torch.Tensor | None, dimensions: int = 1) -> torch.Tensor | None:
    """Indices as kernels read them."""
    if t is None:
        return None
    arguments.dense(name, t)
    if t.dim() != dimensions:
        raise InvalidArgument(f"{name} has {t.dim()} dimensions, not {dimensions}", f"its shape is {tuple(t.shape)}")
    if t.dtype != torch.int32:
        if t.dtype != torch.int64:
            raise InvalidArgument(f"{name} must be int32", f"it is {t.dtype}")
        t = t.to(torch.int32)
    return t if t.is_contiguous() else t.contiguous()


def _lengths(given: Any, batch: int, room: int, device: torch.device) -> torch.Tensor:
    if isinstance(given, torch.Tensor):
        found = _int32("cache_seqlens", given)
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


# ---- new rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _New:
    """The arguments that speak of new keys and of rotation."""

    k: torch.Tensor | None
    v: torch.Tensor | None
    starts: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    rotary_seqlens: torch.Tensor | None
    interleaved: bool
    banded: bool  # causal or with a window

    def appended(self, call: DecodeCall) -> DecodeCall:
        """The call after the new rows are written; q is turned. Nothing is written before all is checked."""
        k, v = self.k, self.v
        if k is None or v is None:
            have = ", ".join(n for n in ("k", "v") if getattr(self, n) is not None) or "neither"
            raise InvalidArgument("k and v are given both, and rotary_cos and rotary_sin with them", f"given: {have}")
        call.check_arguments()
        call.check_tensors()
        starts = _int32("cu_seqlens_k_new", self.starts)
        self._check(k, v, call, starts)
        counts: torch.Tensor | int = k.shape[1]
        if starts is None:
            rows = NewRows.padded(k.shape[1], k.device)
        else:
            rows, counts = NewRows.packed(starts, k.shape[0]), starts[1:] - starts[:-1]
        before, positions = call.seqlens_k, rows.behind(call.seqlens_k)
        later = dataclasses.replace(call, seqlens_k=(before + counts).to(torch.int32))
        if _is_plain(k) and (not k.is_cuda or env.flag("FAGEN_DEBUG")):
            self._check_contents(later, before, starts, k)
        if self.cos is not None:
            first = before if self.rotary_seqlens is None else self.rotary_seqlens
            k = self._turned(k, rows.behind(first))
            later = dataclasses.replace(later, q=self._turned(call.q, self._positions_of_q(call)))
        places = rows.places(positions, call.k, call.page_table, call.cache_batch_idx)
        for cache, new, scale in ((call.k, k, call.k_scale), (call.v, v, call.v_scale)):
            places.write(cache, cache_update.quantized(new, scale, rows, cache.dtype))
        return later

    def _check(self, k: torch.Tensor, v: torch.Tensor, call: DecodeCall, starts: torch.Tensor | None) -> None:
        for name, t, cache in (("k", k, call.k), ("v", v, call.v)):
            arguments.dense(name, t)
            leading = (t.shape[0],) if starts is not None else (call.batch, t.shape[1] if t.dim() > 1 else 0)
            if tuple(t.shape) != (*leading, *cache.shape[2:]) or t.device != cache.device:
                layout = "(rows, kv_heads, d)" if starts is not None else "(batch, new, kv_heads, d)"
                have = f"it is {tuple(t.shape)} on {t.device}, the cache {tuple(cache.shape)}"
                raise InvalidArgument(f"{name} must be {layout} on {cache.device}", have)
            if t.dtype not in (cache.dtype, call.q.dtype):
                raise InvalidArgument(f"{name} is {t.dtype}", f"the cache is {cache.dtype}, q {call.q.dtype}")
        if k.shape[:-1] != v.shape[:-1]:
            raise InvalidArgument("k and v must have the same rows and heads", f"{tuple(k.shape)}, {tuple(v.shape)}")
        if starts is not None and tuple(starts.shape) != (call.batch + 1,):
            raise InvalidArgument("cu_seqlens_k_new must be int32 (batch + 1)", f"it is {tuple(starts.shape)}")
        if (self.cos is None) != (self.sin is None):
            raise InvalidArgument("rotary_cos and rotary_sin go together")
        if self.cos is not None and self.sin is not None:
            self._check_rotary(self.cos, self.sin, call, k)

    def _check_rotary(self, cos: torch.Tensor, sin: torch.Tensor, call: DecodeCall, k: torch.Tensor) -> None:
        for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
            arguments.dense(name, t)
            if t.dim() != 2 or t.shape != cos.shape or not 0 < t.shape[1] <= k.shape[-1] // 2 or t.device != k.device:
                have = f"it is {tuple(t.shape)} on {t.device}"
                raise InvalidArgument(f"{name} must be (positions, {k.shape[-1] // 2} or less) on {k.device}", have)
        if k.dtype.itemsize < 2:
            raise InvalidArgument("a key in fp8 cannot be turned", f"k is {k.dtype}", "pass k in the dtype of q")
        lengths = _int32("rotary_seqlens", self.rotary_seqlens)
        if lengths is not None and (tuple(lengths.shape) != (call.batch,) or lengths.device != k.device):
            raise InvalidArgument("rotary_seqlens must be int32 (batch)", f"it is {tuple(lengths.shape)}")

    def _check_contents(
        self, later: DecodeCall, before: torch.Tensor, starts: torch.Tensor | None, k: torch.Tensor
    ) -> None:
        decode_checks.check_range("cache_seqlens", before, 0, later.room, "keys of a sequence before the new ones")
        if starts is not None:
            decode_checks.check_starts("cu_seqlens_k_new", starts, k.shape[0], k.shape[0])
            if int(starts[-1]) != k.shape[0]:
                raise InvalidArgument("cu_seqlens_k_new must end at the rows of k", f"{int(starts[-1])}, {k.shape[0]}")
        decode_checks.check_contents(later)
        if self.cos is not None:
            first = before if self.rotary_seqlens is None else self.rotary_seqlens
            last = first + (later.seqlens_k - before)
            decode_checks.check_range("rotary positions", last, 0, self.cos.shape[0], "rows of rotary_cos")

    def _positions_of_q(self, call: DecodeCall) -> torch.Tensor:
        """Rows of q stand behind the keys that were there; without causal and window all at the first place."""
        first = call.seqlens_k if self.rotary_seqlens is None else self.rotary_seqlens
        if call.cu_seqlens_q is None:
            rows = NewRows.padded(call.seqlen_q, call.q.device)
        else:
            rows = NewRows.packed(call.cu_seqlens_q, call.rows)
        if not self.banded:
            return rows.of(first).expand(call.q.shape[:-2])
        return rows.behind(first)

    def _turned(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert self.cos is not None and self.sin is not None
        last = self.cos.shape[0] - 1  # of a row without a place any will do; those with one are within
        positions = positions.clamp(0, last)
        return cache_update.rotate(x, positions, self.cos, self.sin, interleaved=self.interleaved)
