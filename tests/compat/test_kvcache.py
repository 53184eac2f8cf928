"""fagen.flash_attn_with_kvcache: the cache after a call, and attention to all of it, against loops in float64."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fagen
from fagen.compat import kvcache_known
from fagen.dispatch import resolve
from fagen.errors import FagenError, InvalidArgument, UnsupportedProblem
from fagen.notices import FallbackWarning
from fagen.ops.attention import decode_reference

D, HEADS, KV_HEADS = 16, 4, 2  # few static keys, so that few kernels are compiled
FP8 = torch.float8_e4m3fn


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, scale: float | None = None, sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One sequence: q (rows, heads, d), k and v (keys, kv_heads, d); the output and the LSE (heads, rows)."""
    q, k, v = (t.double() for t in (q, k, v))
    group, shift = q.shape[1] // k.shape[1], k.shape[0] - q.shape[0]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    at, key = torch.arange(q.shape[0])[:, None] + shift, torch.arange(k.shape[0])
    left, right = window[0], 0 if causal else window[1]
    hidden = (key > at + right if right >= 0 else key < 0) | (key < at - left if left >= 0 else key < 0)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:2], 1)], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -math.inf, 0, lse)[..., None]).exp()[..., : k.shape[0]]
    return torch.einsum("hnm,mhd->nhd", weights, v), lse


class Cache:
    """Sequences in a contiguous cache, in an order of their own, or in pages, and the same as lists of rows."""

    def __init__(self, lengths: list[int], page: int, *, room: int = 80, seed: int = 1) -> None:
        self.page, self.lengths, chance = page, lengths, random.Random(seed)
        batch, width = len(lengths), -(-room // page) if page else 1
        count, size = batch * width + 3, page or room
        self.k, self.v = (torch.full((count, size, KV_HEADS, D), math.nan) for _ in range(2))
        order = chance.sample(range(count), batch * width)
        self.places = [order[b * width : (b + 1) * width] for b in range(batch)]
        self.rows = [(randn(n, KV_HEADS, D, seed=b), randn(n, KV_HEADS, D, seed=b + 50)) for b, n in enumerate(lengths)]
        for b, (k, v) in enumerate(self.rows):
            for key in range(lengths[b]):
                at = self.place(b, key)
                self.k[at], self.v[at] = k[key], v[key]

    def place(self, b: int, key: int) -> tuple[int, int]:
        size = self.k.shape[1]
        return self.places[b][key // size], key % size

    def arguments(self) -> dict[str, Any]:
        named: dict[str, Any] = {"k_cache": self.k, "v_cache": self.v, "cache_seqlens": int32(*self.lengths)}
        if self.page:
            return named | {"page_table": torch.tensor(self.places, dtype=torch.int32)}
        return named | {"cache_batch_idx": int32(*(row for (row,) in self.places))}

    def append(self, b: int, k: torch.Tensor, v: torch.Tensor) -> None:
        old_k, old_v = self.rows[b]
        self.rows[b] = torch.cat([old_k, k]), torch.cat([old_v, v])

    def check(self) -> None:
        """The tensors hold the rows where they belong, and NaN elsewhere."""
        for cache, which in ((self.k, 0), (self.v, 1)):
            want = torch.full_like(cache, math.nan)
            for b, rows in enumerate(self.rows):
                for key, row in enumerate(rows[which]):
                    want[self.place(b, key)] = row
            assert torch.equal(cache.nan_to_num(99), want.nan_to_num(99))


def close(mine: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-6) -> None:
    mine = mine.double()
    assert mine.shape == want.shape
    assert torch.equal(torch.isinf(mine), torch.isinf(want))
    assert (mine - want).abs().nan_to_num(0).max() <= tolerance, (mine - want).abs().max()


LENGTHS = [0, 1, 15, 16, 33, 64]


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("new", [0, 1, 4])
def test_appends_and_attends(page: int, new: int) -> None:
    cache, rows = Cache(LENGTHS, page), max(1, new)
    q = randn(6, rows, HEADS, D)
    named = cache.arguments()
    if new:
        named |= {"k": randn(6, new, KV_HEADS, D, seed=3), "v": randn(6, new, KV_HEADS, D, seed=4)}
        for b in range(6):
            cache.append(b, named["k"][b], named["v"][b])
    out, lse = fagen.flash_attn_with_kvcache(q, **named, causal=True, return_softmax_lse=True)
    cache.check()
    for b, (k, v) in enumerate(cache.rows):
        want, want_lse = attended(q[b], k, v, causal=True)
        close(out[b], want)
        close(lse[b], want_lse)


@pytest.mark.parametrize("page", [0, 16])
def test_mixed_batches_of_packed_rows(page: int) -> None:
    """A prompt, single tokens, a sequence without rows; as many keys are new."""
    cache, counts = Cache(LENGTHS, page), [9, 1, 0, 3, 1, 5]
    starts = int32(*(sum(counts[:i]) for i in range(7)))
    total = sum(counts)
    q, k, v = randn(total, HEADS, D), randn(total, KV_HEADS, D, seed=3), randn(total, KV_HEADS, D, seed=4)
    for b in range(6):
        cache.append(b, k[starts[b] : starts[b + 1]], v[starts[b] : starts[b + 1]])
    out, lse = fagen.flash_attn_with_kvcache(
        q, **cache.arguments(), k=k, v=v, cu_seqlens_q=starts, cu_seqlens_k_new=starts, max_seqlen_q=9, causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    cache.check()
    for b, rows in enumerate(cache.rows):
        mine = slice(int(starts[b]), int(starts[b + 1]))
        want, want_lse = attended(q[mine], *rows, causal=True)
        close(out[mine], want) if counts[b] else None
        close(lse[:, mine], want_lse) if counts[b] else None
    same = fagen.flash_attn_with_kvcache(
        q, **{**cache.arguments(), "cache_seqlens": int32(*(len(k) for k, _ in cache.rows))}, cu_seqlens_q=starts,
        causal=True,
    )  # fmt: skip
    assert isinstance(same, torch.Tensor)
    close(same, out.double())  # without a bound of the rows


def test_the_other_settings() -> None:
    """All of them at once: a kernel of its own is compiled for each set."""
    cache, q, sinks = Cache(LENGTHS, 16), randn(6, 2, HEADS, D), randn(HEADS)
    theirs: dict[str, Any] = {"softcap": 5.0, "window_size": (20, 0), "softmax_scale": 0.7}
    how: dict[str, Any] = {"softcap": 5.0, "window": (20, 0), "scale": 0.7}
    out = fagen.flash_attn_with_kvcache(q, **cache.arguments(), **theirs, sinks=sinks)
    for b, rows in enumerate(cache.rows):
        close(out[b], attended(q[b], *rows, **how, sinks=sinks)[0])
    rounded = sinks.bfloat16()
    out = fagen.flash_attn_with_kvcache(q, **cache.arguments(), **theirs, learnable_sink=rounded)
    close(out[5], attended(q[5], *cache.rows[5], **how, sinks=rounded)[0])


def turned(x: torch.Tensor, position: int, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """By complex numbers: x (heads, d), the angles of all positions (positions, half of the columns turned)."""
    half = angles.shape[1]
    part, rest = x[:, : 2 * half].double(), x[:, 2 * half :].double()
    pairs = part.unflatten(1, (half, 2)) if interleaved else part.unflatten(1, (2, half)).transpose(1, 2)
    angle = torch.polar(torch.ones(half).double(), angles[position])
    made = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle)
    flat = made.flatten(1) if interleaved else made.transpose(1, 2).flatten(1)
    return torch.cat([flat, rest], 1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_rotary(interleaved: bool, causal: bool, own: bool) -> None:
    cache, angles = Cache([0, 7, 33], 16), torch.rand(90, 6, dtype=torch.float64) * 6
    q, k, v = randn(3, 2, HEADS, D), randn(3, 2, KV_HEADS, D, seed=3), randn(3, 2, KV_HEADS, D, seed=4)
    first = int32(5, 0, 40) if own else int32(0, 7, 33)
    out = fagen.flash_attn_with_kvcache(
        q, **cache.arguments(), k=k, v=v, rotary_cos=angles.cos().float(), rotary_sin=angles.sin().float(),
        rotary_interleaved=interleaved, causal=causal, rotary_seqlens=first if own else None,
    )  # fmt: skip
    for b in range(3):
        at = int(first[b])
        new = torch.stack([turned(k[b, i], at + i, angles, interleaved) for i in range(2)])
        mine = torch.stack([turned(q[b, i], at + (i if causal else 0), angles, interleaved) for i in range(2)])
        kept_k, kept_v = torch.cat([cache.rows[b][0], new]), torch.cat([cache.rows[b][1], v[b]])
        close(out[b], attended(mine, kept_k, kept_v, causal=causal)[0], 1e-5)
        for i in range(2):
            close(cache.k[cache.place(b, cache.lengths[b] + i)], new[i], 1e-6)


def test_an_fp8_cache_takes_rows_of_q() -> None:
    """They are divided by the scale, cut to what fp8 holds, and read back with the scale."""
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    kc, vc = (torch.zeros(2, 32, KV_HEADS, D).to(torch.float8_e4m3fn) for _ in range(2))
    k, v = randn(2, 3, KV_HEADS, D) * 3, randn(2, 3, KV_HEADS, D, seed=5)
    k[0, 0, 0, 0] = 1e6
    q = randn(2, 1, HEADS, D)
    out = fagen.flash_attn_with_kvcache(q, kc, vc, k, v, cache_seqlens=4, k_descale=scale, v_descale=scale, causal=True)
    held = (k / scale[:, None, :, None]).clamp(-448, 448).to(kc.dtype)
    assert torch.equal(kc[:, 4:7].view(torch.uint8), held.view(torch.uint8)) and not kc[:, 7:].float().any()
    for b in range(2):
        rows = [t[b, :7].float() * scale[b, :, None] for t in (kc, vc)]
        close(out[b], attended(q[b], *rows)[0])
    rounding = (held.float() * scale[:, None, :, None] - k).abs() / k.abs()
    assert rounding[:, 1:].max() < 2**-3  # 3 bits of mantissa, subnormals among them


@pytest.mark.parametrize("cached", ["fp32", "fp8"])
@pytest.mark.parametrize("packed", [False, True])
def test_fp8_queries_are_those_of_16_bits_times_their_scale(cached: str, packed: bool) -> None:
    q = randn(3, 2, HEADS, D, seed=1).to(FP8)
    k, v = randn(3, 40, KV_HEADS, D, seed=2), randn(3, 40, KV_HEADS, D, seed=3)
    named: dict[str, Any] = {"cache_seqlens": int32(40, 7, 23), "causal": True}
    if cached == "fp8":
        scales = torch.rand(2, 3, KV_HEADS, generator=torch.Generator().manual_seed(4)) + 0.5
        k, v, named = k.to(FP8), v.to(FP8), {**named, "k_descale": scales[0], "v_descale": scales[1]}
    descale = torch.tensor([[0.5, 3.0], [1.0, 0.25], [2.0, 1.5]])
    wide = q.float() * descale.repeat_interleave(HEADS // KV_HEADS, 1)[:, None, :, None]
    wide = wide.to(torch.bfloat16 if cached == "fp8" else torch.float32)
    if packed:
        q, wide = q.flatten(0, 1), wide.flatten(0, 1)
        named |= {"cu_seqlens_q": int32(0, 2, 4, 6), "max_seqlen_q": 2}
    want = fagen.flash_attn_with_kvcache(wide, k, v, **named)
    assert isinstance(want, torch.Tensor) and want.dtype == wide.dtype
    for _ in range(2):  # of a kind that is new, and that is known
        found = fagen.flash_attn_with_kvcache(q, k, v, q_descale=descale, **named)
        assert isinstance(found, torch.Tensor) and torch.equal(found, want)
    alone = fagen.flash_attn_with_kvcache(q, k, v, **named)
    ones = fagen.flash_attn_with_kvcache(q, k, v, q_descale=torch.ones(3, KV_HEADS), **named)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, ones) and not torch.equal(alone, want)


def test_lengths_may_be_one_number_or_none() -> None:
    cache, q = Cache([80, 80], 0), randn(2, 1, HEADS, D)
    named = cache.arguments()
    full = fagen.flash_attn_with_kvcache(q, **{**named, "cache_seqlens": None})
    assert torch.equal(full, fagen.flash_attn_with_kvcache(q, **{**named, "cache_seqlens": 80}))
    assert torch.equal(full, fagen.flash_attn_with_kvcache(q, **{**named, "cache_seqlens": torch.tensor([80, 80])}))
    paged = Cache([80, 80], 16).arguments()
    del paged["cache_seqlens"]
    table = paged.pop("page_table")
    close(fagen.flash_attn_with_kvcache(q, **paged, block_table=table), full.double())
    close(fagen.flash_attn_with_kvcache(q, **paged, page_table=table.long(), max_seqlen_k=80), full.double())


def test_indices_may_be_views() -> None:
    """Of every second element: kernels read them as they lie, so they are copied."""
    cache, q = Cache(LENGTHS, 0), randn(6, 1, HEADS, D)
    named = cache.arguments()
    want = fagen.flash_attn_with_kvcache(q, **named)
    for name in ("cache_seqlens", "cache_batch_idx"):
        spread = torch.stack([named[name], torch.full((6,), 77, dtype=torch.int32)], dim=1)[:, 0]
        assert not spread.is_contiguous()
        assert torch.equal(fagen.flash_attn_with_kvcache(q, **{**named, name: spread}), want)
    with pytest.raises(InvalidArgument, match="must be contiguous"):
        torch.ops.fagen.decode(q, cache.k, cache.v, spread, *[None] * 6, -1, -1, 0.0, None, 0, 0, 0)


def test_nothing_to_compute() -> None:
    kc = randn(2, 8, KV_HEADS, D)
    out = fagen.flash_attn_with_kvcache(randn(0, 1, HEADS, D), kc, kc, cache_seqlens=int32())
    assert out.shape == (0, 1, HEADS, D)
    for q, more in ((randn(2, 0, HEADS, D), {}), (randn(0, HEADS, D), {"cu_seqlens_q": int32(0, 0, 0)})):
        out, lse = fagen.flash_attn_with_kvcache(q, kc, kc.clone(), **more, return_softmax_lse=True)
        assert out.shape == q.shape and lse.numel() == 0


def test_many_splits_take_no_more_memory_than_keys() -> None:
    q, k, v = randn(1, 1, HEADS, D), randn(1, 80, KV_HEADS, D), randn(1, 80, KV_HEADS, D, seed=1)
    out = fagen.flash_attn_with_kvcache(q, k, v, num_splits=1 << 20)
    close(out[0], attended(q[0], k[0], v[0])[0])
    assert max(known.attend.workspace_bytes for known in kvcache_known._known.values()) < 1 << 20


def test_fake_tensors_pass() -> None:
    with FakeTensorMode():
        q, cache, new = torch.empty(2, 1, 4, 16), torch.empty(2, 32, 2, 16), torch.empty(2, 1, 2, 16)
        lengths = torch.empty(2, dtype=torch.int32)
        out = fagen.flash_attn_with_kvcache(q, cache, cache.clone(), new, new, cache_seqlens=lengths, causal=True)
    assert isinstance(out, torch.Tensor) and out.shape == q.shape


# ---- a kind of call that was seen before -----------------------------------------------------------------------------


def test_a_call_of_a_known_kind_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other lengths, contents and tensors of the same shapes: no problem is made, dispatch is not asked."""
    cache, q = Cache(LENGTHS, 16), randn(6, 1, HEADS, D)
    named = cache.arguments()
    fagen.flash_attn_with_kvcache(q, **named)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        patch.setattr(resolve, "answer", never)
        for lengths in ([1, 2, 3, 4, 5, 6], [80] * 6, [0] * 6):
            mine = {**named, "cache_seqlens": int32(*lengths), "page_table": named["page_table"].clone()}
            fagen.flash_attn_with_kvcache(q.clone(), **mine, max_seqlen_k=None)
    with monkeypatch.context() as patch:
        resolve.renew()
        patch.setattr(resolve, "answer", never)
        with pytest.raises(AssertionError, match="asked again"):
            fagen.flash_attn_with_kvcache(q, **named)
    assert isinstance(fagen.flash_attn_with_kvcache(q, **named), torch.Tensor)


def test_a_known_kind_does_not_hide_a_bad_tensor() -> None:
    cache, q = Cache(LENGTHS, 16), randn(6, 1, HEADS, D)
    named = cache.arguments()
    fagen.flash_attn_with_kvcache(q, **named)
    for change in (
        {"v_cache": cache.v.double()}, {"v_cache": cache.v[:, :8]}, {"k_descale": torch.ones(6, 2).double()},
        {"cache_seqlens": int32(1, 2)}, {"cache_seqlens": torch.ones(6)}, {"page_table": named["page_table"][:5]},
    ):  # fmt: skip
        with pytest.raises(FagenError):
            fagen.flash_attn_with_kvcache(q, **{**named, **change})


def test_pinned_numerics() -> None:
    """Bitwise the same alone, among others, and in a batch of packed rows, at lengths at which keys are split."""
    lengths = [3000, 2100, 40]
    k, v = randn(3, 3000, KV_HEADS, D), randn(3, 3000, KV_HEADS, D, seed=1)
    q = randn(3, 1, HEADS, D)
    pinned: dict[str, Any] = {"numerics": "pinned", "return_softmax_lse": True}
    out, lse = fagen.flash_attn_with_kvcache(q, k, v, cache_seqlens=int32(*lengths), **pinned)
    packed, packed_lse = fagen.flash_attn_with_kvcache(
        q[:, 0], k, v, cache_seqlens=int32(*lengths), cu_seqlens_q=int32(0, 1, 2, 3), max_seqlen_q=1, **pinned
    )
    for b, length in enumerate(lengths):
        alone, alone_lse = fagen.flash_attn_with_kvcache(
            q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], **pinned
        )
        assert torch.equal(alone[0], out[b]) and torch.equal(alone_lse[0], lse[b])
        assert torch.equal(alone[0, 0], packed[b]) and torch.equal(alone_lse[0, :, 0], packed_lse[:, b])
    free = fagen.flash_attn_with_kvcache(q, k, v, cache_seqlens=int32(*lengths))
    assert isinstance(free, torch.Tensor)
    close(free, out.double())


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_and_write_nothing() -> None:
    cache, q = Cache(LENGTHS, 16), randn(6, 1, HEADS, D)
    named, new = cache.arguments(), {"k": randn(6, 1, KV_HEADS, D), "v": randn(6, 1, KV_HEADS, D)}
    table = named["page_table"]

    def changed(t: torch.Tensor, at: tuple[int, ...], value: int) -> torch.Tensor:
        copy = t.clone()
        copy[at] = value
        return copy

    cos = torch.ones(40, 8)
    broken: list[tuple[dict[str, Any], str]] = [
        ({"qv": q}, "qv"), ({"cache_leftpad": int32(1)}, "cache_leftpad"), ({"attention_chunk": 4}, "attention_chunk"),
        ({"q_descale": torch.ones(6, 2)}, "goes with a float8_e4m3fn q"), ({"block_table": table}, "two names"),
        ({"q": q.to(FP8), "q_descale": torch.ones(6)}, "q_descale must be"),
        ({"q": q[:, 0].to(FP8), "q_descale": torch.ones(6, 2), "cu_seqlens_q": int32()}, "cu_seqlens_q is empty"),
        ({"q": q[:, :, :3].to(FP8), "q_descale": torch.ones(6, 2)}, "must divide"),
        ({"q": q.to(FP8), "q_descale": [1.0]}, "q_descale"), ({"q": q[0, 0].to(FP8)}, "2 dimensions"),
        ({"numerics": "fast"}, "numerics"), ({"numerics": "pinned", "num_splits": 3}, "num_splits"),
        ({**new, "num_splits": 1 << 30}, "num_splits"), ({"cache_seqlens": torch.tensor(3)}, "0 dimensions"),
        ({"page_table": table[0]}, "page_table has 1 dimensions"), ({"cu_seqlens_q": int32()}, "cu_seqlens_q is empty"),
        ({"num_splits": -4}, "num_splits=-4"), ({"page_table": table[:, :0]}, "no pages"),
        ({**new, "rotary_cos": cos, "rotary_sin": cos, "rotary_seqlens": torch.ones(6)}, "rotary_seqlens"),
        ({"softcap": -1.0}, "softcap"), ({"window_size": 3}, "window_size"), ({"num_splits": "a"}, "num_splits"),
        ({"cache_seqlens": 81}, "room for 80"), ({"cache_seqlens": -1}, "cache_seqlens=-1"),
        ({"cache_seqlens": torch.ones(6)}, "int32"), ({"page_table": table.float()}, "int32"),
        ({"page_table": table[:4]}, "page_table must be int32"), ({"max_seqlen_k": 81}, "room for 80"),
        ({"cache_batch_idx": int32(0, 1, 2, 3, 4, 5)}, "does not go with"), ({"q": q[0, 0]}, "2 dimensions"),
        ({"k_cache": [1]}, "must be a tensor"), ({"q": q.bfloat16()}, "dtype of q"),
        ({"sinks": torch.ones(3)}, "sinks"), ({"k_descale": torch.ones(2)}, "k_scale"),
        ({"k": new["k"]}, "given both"), ({"rotary_cos": cos, "rotary_sin": cos}, "given both"),
        ({**new, "k": new["k"][:, :, :1]}, "k must be"), ({**new, "v": new["v"].double()}, "v is torch.float64"),
        ({**new, "rotary_cos": cos}, "go together"), ({**new, "rotary_cos": cos, "rotary_sin": cos[:3]}, "rotary_sin"),
        ({**new, "rotary_cos": cos, "rotary_sin": cos}, "rotary positions"),
        ({**new, "cache_seqlens": int32(0, 1, 15, 16, 33, 80)}, "cache_seqlens holds 81"),
        ({**new, "cache_seqlens": int32(0, 1, 15, 16, 33, -2)}, "holds -2"),
        ({**new, "page_table": changed(table, (5, 4), -1)}, "page_table holds -1"),
        ({**new, "page_table": changed(table, (5, 0), 10**6)}, "page_table holds 1000000"),
        ({"page_table": changed(table, (5, 0), -1)}, "no page of the cache"),
        ({"cache_seqlens": int32(0, 1, 15, 16, 33, 81)}, "a length is"),
    ]  # fmt: skip
    for change, message in broken:
        with pytest.raises(FagenError) as raised:
            fagen.flash_attn_with_kvcache(**{"q": q, **named, **change})
        assert message in str(raised.value), (message, str(raised.value))
        assert len(str(raised.value).splitlines()) <= 3
    for starts, message in (((0, 2, 1, 1), "rise"), ((0, 1, 1, 2), "end at"), ((0, 1, 2), "batch + 1")):
        with pytest.raises(InvalidArgument) as raised:
            fagen.flash_attn_with_kvcache(
                q[:3], cache.k[:3], cache.v[:3], new["k"][:3, 0], new["v"][:3, 0], cache_seqlens=int32(1, 1, 1),
                cu_seqlens_k_new=int32(*starts),
            )  # fmt: skip
        assert message in str(raised.value)
    cache.check()
    with pytest.raises(UnsupportedProblem, match="no gradient"):
        fagen.flash_attn_with_kvcache(q.requires_grad_(), **named)
    with torch.no_grad():
        fagen.flash_attn_with_kvcache(q, **named)


def test_pytorch_serves_what_no_kernel_does() -> None:
    cache, q = Cache(LENGTHS, 16), randn(6, 2, HEADS, D)
    named = cache.arguments()
    wide = {**named, "k_cache": cache.k.double(), "v_cache": cache.v.double()}
    with pytest.warns(FallbackWarning, match="no kernels for torch.float64"):
        out = fagen.flash_attn_with_kvcache(q.double(), **wide, causal=True)
    for b, rows in enumerate(cache.rows):
        close(out[b], attended(q[b], *rows, causal=True)[0], 1e-12)
    wide["cache_seqlens"] = int32(0, 1, 2, 3, 4, 81)
    with pytest.raises(InvalidArgument, match="cache_seqlens holds 81"):
        fagen.flash_attn_with_kvcache(q.double(), **wide, causal=True)


# ---- torch.compile, tracers ------------------------------------------------------------------------------------------


def test_the_op_is_sound() -> None:
    q, k = randn(2, 1, HEADS, D), randn(2, 32, KV_HEADS, D)
    args = (q, k, k.clone(), int32(3, 32), *[None] * 6, -1, -1, 0.0, None, 0, 0, 0)
    torch.library.opcheck(torch.ops.fagen.decode.default, args)
    starts = (q[:, 0], k, k.clone(), int32(3, 32), None, int32(0, 1, 2), *[None] * 4, -1, -1, 0.0, None, 0, 1, 0)
    torch.library.opcheck(torch.ops.fagen.decode.default, starts)
    with pytest.raises(InvalidArgument, match="dtype of q"):
        torch.ops.fagen.decode(q.double(), *args[1:])
    with pytest.raises(InvalidArgument, match="num_splits"):
        torch.ops.fagen.decode(*args[:-3], 1 << 40, 0, 0)


@pytest.mark.slow
def test_torch_compile_sees_one_graph() -> None:
    cache = Cache(LENGTHS, 16)
    named = cache.arguments()
    q, k, v = randn(6, 1, HEADS, D), randn(6, 1, KV_HEADS, D, seed=3), randn(6, 1, KV_HEADS, D, seed=4)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        made = fagen.flash_attn_with_kvcache(
            q * 2, cache.k, cache.v, k, v, cache_seqlens=lengths, page_table=named["page_table"], causal=True
        )
        assert isinstance(made, torch.Tensor)
        return made + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(q, k, v, named["cache_seqlens"])
        for b in range(6):
            cache.append(b, k[b], v[b])
        cache.check()
        assert torch.equal(out, step(q, k, v, named["cache_seqlens"]))


# ---- merged states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 15, 40, 79, 80])
def test_states_of_parts_are_the_state_of_all(cut: int) -> None:
    k, v, q = randn(2, 80, KV_HEADS, D), randn(2, 80, KV_HEADS, D, seed=1), randn(2, 3, HEADS, D)
    whole = fagen.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    parts = [
        fagen.flash_attn_with_kvcache(q, k[:, a:], v[:, a:], cache_seqlens=n, return_softmax_lse=True)
        for a, n in ((0, cut), (min(cut, 79), 80 - cut))
    ]
    outs, lses = [out for out, _ in parts], [lse for _, lse in parts]
    for merged in (fagen.merge_states(outs, lses), fagen.merge_states(torch.stack(outs), torch.stack(lses))):
        for mine, want in zip(merged, whole, strict=True):
            close(mine, want.double())


def test_merged_states_of_nothing_and_of_packed_rows() -> None:
    out, lse = randn(5, HEADS, D), randn(HEADS, 5)
    nothing = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf)
    merged = fagen.merge_states([out, nothing[0]], [lse, nothing[1]])
    close(merged[0], out.double())
    close(merged[1], lse.double())
    empty, empty_lse = fagen.merge_states([nothing[0]] * 3, [nothing[1]] * 3)
    assert not empty.any() and bool((empty_lse == -math.inf).all())
    half = fagen.merge_states([out.bfloat16()] * 2, [lse] * 2)
    assert half[0].dtype == torch.bfloat16 and torch.equal(half[0], out.bfloat16())
    close(half[1], lse.double() + math.log(2))
    for outs, lses in (([], []), ([out], [lse, lse]), ([out], [lse.t()]), ([out, out[:4]], [lse, lse[:, :4]])):
        with pytest.raises(InvalidArgument):
            fagen.merge_states(outs, lses)


def test_the_reference_is_not_what_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above compare a kernel, not PyTorch with PyTorch."""
    q, k = randn(1, 1, HEADS, D), randn(1, 32, KV_HEADS, D)
    monkeypatch.delattr(decode_reference, "attend")
    fagen.flash_attn_with_kvcache(q, k, k.clone())
