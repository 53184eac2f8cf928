"""Calls of flash_attn_with_kvcache whose kind or static facts came before: nobody is asked, and nothing bad gets by."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

import fagen
from fagen.compat import kvcache, kvcache_alike, kvcache_append, kvcache_known
from fagen.dispatch import decode, resolve
from fagen.errors import FagenError, InvalidArgument, UnsupportedProblem
from fagen.ops.attention import decode_inputs, decode_reference
from fagen.ops.attention.decode_call import DecodeCall
from fagen.ops.attention.decode_problem import DecodeProblem
from tests.support.append import integers

SMALL: dict[str, Any] = {"dtype": "fp32", "head_dim": 16, "heads": 4, "kv_heads": 2}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often dispatch was asked, and tensors were checked in full."""
    count = [0, 0]
    answer, check = resolve.answer, DecodeCall.check_tensors

    def counted(*words: Any, **named: Any) -> Any:
        count[0] += 1
        return answer(*words, **named)

    def checked(call: DecodeCall) -> None:
        count[1] += 1
        check(call)

    monkeypatch.setattr(resolve, "answer", counted)
    monkeypatch.setattr(DecodeCall, "check_tensors", checked)
    return count


def inputs(batch: int, keys: int, rows: int = 1, seed: int = 0, **more: Any) -> DecodeCall:
    mask = "causal" if rows > 1 else "none"
    problem = DecodeProblem(batch=batch, seqlen_k=keys, seqlen_q=rows, mask=mask, **{**SMALL, **more})
    call: DecodeCall = decode_inputs.make(problem, "cpu", seed, True).call
    return dataclasses.replace(call, num_splits=0)


def served(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """By the function that users call."""
    found = fagen.flash_attn_with_kvcache(
        call.q, call.k, call.v, cache_seqlens=call.seqlens_k, page_table=call.page_table, causal=call.window[1] == 0,
        cu_seqlens_q=call.cu_seqlens_q, max_seqlen_q=call.most_rows or None, cache_batch_idx=call.cache_batch_idx,
        k_descale=call.k_scale, v_descale=call.v_scale, max_seqlen_k=call.most_keys or None, return_softmax_lse=True,
    )  # fmt: skip
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("more", [{"page": 16}, {}], ids=str)
def test_a_new_size_asks_nobody(more: dict[str, Any], asked: list[int]) -> None:
    """Batches, lengths, pages, rows of packed prompts: all but the first call of each kind of tensors."""
    served(inputs(2, 40, **more)), served(inputs(3, 40, 5, **more))
    before = list(asked)
    for batch, keys, rows in ((1, 17, 1), (5, 300, 1), (2, 41, 1), (3, 40, 7), (5, 200, 2), (3, 41, 5)):
        if rows > 1 and batch % 2 == 0:
            continue
        call = inputs(batch, keys, rows, seed=batch + keys, **more)
        for _ in range(2):
            verdict = decode_reference.check(call, dict(zip(("out", "lse"), served(call), strict=True)))
            assert verdict, verdict.message
    assert asked == before


def test_dispatch_is_asked_again_when_it_may_choose_otherwise(asked: list[int]) -> None:
    call = inputs(2, 40, page=16)
    for _ in range(2):
        served(call)
    before = asked[0]
    resolve.renew()
    for _ in range(2):
        served(call)
    assert asked[0] == before + 1


def test_sizes_that_agree_pass_the_checks() -> None:
    """Whatever is changed of a valid call: what the quick look lets pass, the full one does, too."""
    draw, passed = random.Random(0), [0, 0]
    bases = [inputs(3, 40, 5, page=16, kv_dtype="fp8_e4m3"), inputs(4, 40), inputs(2, 33, page=16, sinks=True)]

    def apart(t: torch.Tensor, along: int) -> torch.Tensor:
        """Rows, or elements, of a larger tensor."""
        return torch.stack([t, t], along)[:, 0] if along == 1 else torch.stack([t, t], -1)[..., 0]

    strided = {
        name: apart(t, 1) for name, t in bases[0].inputs().items() if name in ("page_table", "k_scale", "v_scale")
    }
    bases.append(dataclasses.replace(bases[0], **strided))
    for _ in range(900):
        call = draw.choice(bases)
        changes: dict[str, Any] = {}
        for name, t in draw.sample(list(call.inputs().items()), draw.randint(0, 2)):
            axis = draw.randrange(t.dim())
            changes[name] = t.narrow(axis, 0, draw.choice([0, 1, t.shape[axis] - 1, t.shape[axis]]))
            if draw.random() < 0.3:
                changes[name] = apart(t, -1)
        for name, values in (("most_keys", (-1, 0, 40, 49, 1 << 20)), ("most_rows", (0, 1, 5, 1 << 40))):
            if draw.random() < 0.1:
                changes[name] = draw.choice(values)
        changed = dataclasses.replace(call, **changes)
        if changed.static_facts() != call.static_facts():
            continue
        try:
            changed.check_tensors()
            good = not changed.unreadable
        except FagenError:
            good = False
        assert changed.sizes_agree() is good, changes
        passed[good] += 1
    assert min(passed) > 50


def test_calls_of_one_kind_have_the_same_static_facts() -> None:
    """Tensors cut and spread in any way: where a kind is the same, so is all that the full checks look at."""
    draw, seen, met = random.Random(1), {}, 0
    bases = [inputs(3, 40, 5, page=16), inputs(4, 40), inputs(2, 33, page=16, sinks=True), inputs(1, 17)]
    bases += [inputs(2, 50, page=16, kv_dtype="fp8_e4m3"), inputs(2, 40, shared_kv=True)]
    for _ in range(1500):
        call = draw.choice(bases)
        changes: dict[str, Any] = {}
        for name, t in draw.sample(list(call.inputs().items()), draw.randint(0, 2)):
            axis, spread = draw.randrange(t.dim()), draw.random()
            size = draw.choice([t.shape[axis] - 1, t.shape[axis]])
            changes[name] = t.narrow(axis, t.shape[axis] - size, size)
            if spread < 0.2:
                changes[name] = torch.stack([t, t], -1)[..., 0]
            elif spread < 0.4:
                changes[name] = t[:1].expand(t.shape)
        c = dataclasses.replace(call, **changes)
        window, rows = draw.choice([(-1, -1), (9, 0)]), c.most_rows or None
        settings = kvcache_known.Settings(rows, c.most_keys or None, None, False, window, 0.0, True, 0, "tuned")
        a = kvcache_known.Arguments(
            c.q, c.k, c.v, None, None, None, None, c.seqlens_k, c.cache_batch_idx, c.page_table, c.cu_seqlens_q,
            None, None, c.k_scale, c.v_scale, c.sinks,
        )  # fmt: skip
        key = kvcache_known.key_of(a, settings)
        kind = None if key is None else kvcache_alike.kind_of(key)
        if kind is None:
            continue
        right = -1 if (c.most_rows or c.q.shape[1]) == 1 else window[1]
        facts = dataclasses.replace(c, window=(window[0], right)).static_facts()
        met += kind in seen
        assert seen.setdefault(kind, facts) == facts, changes
    assert met > 300 and len(seen) > 30


def test_a_new_size_of_a_known_kind_is_not_looked_at_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of the steps that depend on the static key alone: with an append, with rotary, and without."""

    def step(batch: int, room: int, more: dict[str, Any]) -> Any:
        cache, new = torch.zeros(batch, room, 2, 16), torch.ones(batch, 1, 2, 16)
        lengths = integers([3] * batch)
        rows = {"k": new, "v": new} if more is not plain else {}
        q = torch.ones(batch, 1, 4, 16)
        return fagen.flash_attn_with_kvcache(q, cache, cache.clone(), cache_seqlens=lengths, **rows, **more)

    plain: dict[str, Any] = {"softcap": 3.0}
    kinds = [plain, {}, {"rotary_cos": torch.ones(64, 8), "rotary_sin": torch.zeros(64, 8)}]
    want = [(step(2, 32, more), step(5, 47, more))[1] for more in kinds]
    kvcache_known._known.clear()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("looked at in full")

    for where, name in (
        (resolve, "answer"), (decode, "prepare"), (kvcache_append, "append_rows"), (kvcache, "_call"),
        (DecodeCall, "check_tensors"), (DecodeCall, "static_facts"), (DecodeCall, "check_arguments"),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, never)
    for more, expected in zip(kinds, want, strict=True):
        for batch, room in ((3, 32), (1, 64), (5, 47)):
            found = step(batch, room, more)
        assert torch.equal(found, expected)
    monkeypatch.setattr(resolve, "_epoch", object(), raising=True)
    with pytest.raises(AssertionError, match="looked at in full"):
        step(6, 32, plain)


def test_a_known_append_is_checked_before_it_writes() -> None:
    cache, new = torch.zeros(2, 32, 2, 16), torch.ones(2, 1, 2, 16)
    q, lengths = torch.zeros(2, 1, 4, 16), integers([3, 30])
    step: dict[str, Any] = {"q": q, "k_cache": cache, "v_cache": cache.clone(), "k": new, "v": new, "causal": True}
    angles = {"rotary_cos": torch.ones(32, 8), "rotary_sin": torch.zeros(32, 8)}
    for more in ({}, angles):
        for _ in range(2):
            fagen.flash_attn_with_kvcache(**step, **more, cache_seqlens=lengths)
        cache.zero_()
        for bad, says in (([3, 32], "cache_seqlens holds 33"), ([-1, 3], "cache_seqlens holds -1")):
            with pytest.raises(InvalidArgument, match=says):
                fagen.flash_attn_with_kvcache(**step, **more, cache_seqlens=integers(bad))
        assert not cache.any()
    for _ in range(2):
        fagen.flash_attn_with_kvcache(**step, **angles, cache_seqlens=lengths, rotary_seqlens=integers([0, 31]))
    with pytest.raises(InvalidArgument, match="rotary positions holds -3"):
        fagen.flash_attn_with_kvcache(**step, **angles, cache_seqlens=lengths, rotary_seqlens=integers([0, -3]))


def test_who_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that had to be converted, and calls that want a gradient, which a call like them without one does not."""
    monkeypatch.setattr(kvcache_known, "_known", {})
    q, cache = torch.zeros(1, 1, 4, 16), torch.zeros(1, 32, 2, 16)
    fagen.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=torch.tensor([5]))
    fagen.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=5)
    assert not kvcache_known._known
    fagen.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=integers([5]))
    assert len(kvcache_known._known) == 1
    with pytest.raises(UnsupportedProblem, match="no gradient"):
        fagen.flash_attn_with_kvcache(q.clone().requires_grad_(), cache, cache, cache_seqlens=integers([5]))
    with pytest.raises(UnsupportedProblem, match="softcap|attention_chunk"):
        fagen.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=integers([5]), attention_chunk=3)
    with pytest.raises(InvalidArgument, match="two names"):
        fagen.flash_attn_with_kvcache(
            q, cache[:, :16], cache[:, :16], page_table=integers([0])[None], block_table=integers([0])[None]
        )


def test_a_known_step_goes_straight_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, new = torch.zeros(2, 32, 2, 16), torch.ones(2, 1, 2, 16)
    step: dict[str, Any] = {
        "q": torch.zeros(2, 1, 4, 16),
        "k_cache": cache,
        "v_cache": cache.clone(),
        "k": new,
        "v": new,
    }
    want = fagen.flash_attn_with_kvcache(**step, cache_seqlens=integers([3, 30]))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("taken for a new one")

    monkeypatch.setattr(decode, "prepare", never)
    monkeypatch.setattr(kvcache_append, "append_rows", never)
    assert torch.equal(want, fagen.flash_attn_with_kvcache(**step, cache_seqlens=integers([3, 30])))
    with pytest.raises(AssertionError, match="taken for a new one"):
        fagen.flash_attn_with_kvcache(**step, cache_seqlens=integers([3, 30]), softcap=3.0)
