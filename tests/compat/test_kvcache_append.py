"""New rows of flash_attn_with_kvcache: the kernel writes what PyTorch's calls write, bit by bit, on the CPU and, over
tests/emulator, on a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fagen
from fagen.build import cache as builds
from fagen.cli import main
from fagen.compat import kvcache_alike, kvcache_append, kvcache_known
from fagen.compat.kvcache_append import Prepared
from fagen.errors import BuildError, InvalidArgument, LaunchError
from fagen.ops.attention import cache_append
from fagen.ops.attention.cache_append import NewTokens
from fagen.ops.attention.decode_call import DecodeCall
from fagen.runtime import append, background
from fagen.runtime.kernel import Library
from fagen.target import host, known
from tests.support import emulated
from tests.support.append import FP8, bits, clone_with_memory, drawn, integers

Launch = Callable[[DecodeCall, NewTokens], DecodeCall]


def prepared(library: Library, call: DecodeCall, new: NewTokens) -> Prepared:
    kvcache_append._check(call, new)
    assert cache_append.readable(call, new)
    return Prepared(library, cache_append.make_params(call, new))


@pytest.fixture(params=["cpu", "emulated"])
def launch(request: pytest.FixtureRequest, cache_folder: Path) -> Launch:
    if request.param == "cpu":
        found = append.library(host(), capturing=False)
        assert found is not None
    else:
        text = emulated.translated(append.rendered(known("sm_80")), "bf16")
        found = emulated.build(text, cache_folder / "emulated", append.Params)

    def launch(call: DecodeCall, new: NewTokens) -> DecodeCall:
        if request.param == "emulated":
            found._library.emulator_begin(ctypes.c_uint64(0), ctypes.c_int(3))
        status, q, after = kvcache_append.launch(prepared(found, call, new), call, new)
        assert status == 0
        return dataclasses.replace(call, q=q, seqlens_k=after)

    return launch


def test_the_bits_are_those_of_pytorch(launch: Launch) -> None:
    kinds = set()
    for seed in range(60):
        call, new = drawn(seed)
        kvcache_append._check_contents(call, new)
        k, v = (clone_with_memory(t) for t in (call.k, call.v))
        mine = launch(call, new)
        theirs = kvcache_append._by_torch(dataclasses.replace(call, k=k, v=v), new)
        assert torch.equal(bits(call.k), bits(k)) and torch.equal(bits(call.v), bits(v)), seed
        assert torch.equal(mine.seqlens_k, theirs.seqlens_k) and mine.seqlens_k.dtype == torch.int32
        assert torch.equal(mine.q.contiguous().view(torch.uint8), theirs.q.contiguous().view(torch.uint8)), seed
        kinds.add((call.q.dtype, call.k.dtype == FP8, new.cos is not None))
    assert len(kinds) == 12, "each dtype, fp8 or not, turned or not"


def test_fp8_of_all_numbers_and_not_a_number(launch: Launch) -> None:
    """All bfloat16 numbers; PyTorch's conversion rounds them."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, 64, 1, 1024)
    k = torch.zeros(1, 64, 1, 1024).to(FP8)
    call = DecodeCall(
        torch.zeros(1, 1, 1, 1024).bfloat16(), k, k.clone(), integers([0]), k_scale=torch.full((1, 1), 0.75)
    )
    launch(call, NewTokens(x, x, None, None, None, None, True, True))
    for cache, scale in ((call.k, 0.75), (call.v, 1.0)):
        want = (x.float() / scale).clamp(-448, 448).to(FP8).float()
        assert torch.equal(cache.float().nan_to_num(1e9), want.nan_to_num(1e9))


def test_lengths_and_indices_astray_write_nothing_astray(cache_folder: Path) -> None:
    """On a GPU nobody looks at them first."""
    text = emulated.translated(append.rendered(known("sm_80")), "bf16")
    library = emulated.build(text, cache_folder / "emulated", append.Params)
    k = torch.full((6, 16, 1, 8), 7.0)
    table = integers([0, 1, 1 << 30, 3, -1, 4, 5, 5, 5]).view(3, 3)
    for lengths in ([-5, 33, -(1 << 31)], [48, 1 << 30, (1 << 31) - 1], [32, 16, 47]):  # of the last a row has a place
        call = DecodeCall(torch.zeros(3, 1, 1, 8), k.clone(), k.clone(), integers(lengths), page_table=table)
        new = NewTokens(torch.ones(3, 1, 1, 8), torch.ones(3, 1, 1, 8), None, torch.ones(4, 4), torch.ones(4, 4), None,
                        True, True)  # fmt: skip
        library._library.emulator_begin(ctypes.c_uint64(0), ctypes.c_int(3))
        status, q, _ = kvcache_append.launch(prepared(library, call, new), call, new)
        changed = {tuple(at[:2]) for at in (call.v != 7).nonzero().tolist()}
        assert changed == ({(4, 1)} if lengths[1] == 33 else {(5, 15)} if lengths[2] == 47 else set()), (
            lengths,
            changed,
        )
        assert status == 0 and q.shape == call.q.shape


def cached() -> dict[str, Any]:
    return {
        "q": torch.zeros(2, 1, 2, 16), "k_cache": torch.zeros(2, 32, 2, 16), "v_cache": torch.zeros(2, 32, 2, 16),
        "k": torch.ones(2, 1, 2, 16), "v": torch.ones(2, 1, 2, 16), "cache_seqlens": integers([3, 31]),
    }  # fmt: skip


def test_calls_are_served_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it serves is never left to PyTorch; float64 and keys in fp8 are."""
    served: list[bool] = []
    by_torch = kvcache_append._by_torch
    monkeypatch.setattr(kvcache_append, "_by_torch", lambda *words: served.append(True) or by_torch(*words))
    named = cached()
    angles = {"rotary_cos": torch.ones(40, 8), "rotary_sin": torch.zeros(40, 8)}
    for more in ({}, angles, {**angles, "rotary_seqlens": torch.tensor([0, 1])}, {"causal": True}):
        before = named["k_cache"]._version, named["v_cache"]._version
        for _ in range(2):
            fagen.flash_attn_with_kvcache(**named, **more)
        assert named["k_cache"]._version == before[0] + 2 and named["v_cache"]._version == before[1] + 2
    with torch.inference_mode():
        mine = {**named, "k_cache": named["k_cache"].clone(), "v_cache": named["v_cache"].clone()}
        fagen.flash_attn_with_kvcache(**mine)
    assert torch.equal(mine["k_cache"], named["k_cache"])
    assert not served and float(named["k_cache"][1, 31].min()) == 1.0 and not named["k_cache"][:, 4:31].any()
    whole = named | {name: t.double() for name, t in named.items() if name != "cache_seqlens"}
    with pytest.warns(UserWarning, match="float64"):
        fagen.flash_attn_with_kvcache(**whole)
    fagen.flash_attn_with_kvcache(**{**named, **{n: t.to(FP8) for n, t in named.items() if n[0] in "kv"}})
    assert len(served) == 2
    with pytest.raises(InvalidArgument, match="no positions"):
        fagen.flash_attn_with_kvcache(**named, rotary_cos=torch.ones(0, 8), rotary_sin=torch.ones(0, 8))


def test_without_a_kernel_pytorch_appends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not built and may not be; it cannot be built, which is said once; it is built meanwhile."""
    monkeypatch.setattr(append.HELPER, "libraries", {})
    monkeypatch.setattr(kvcache_known, "_known", {})
    named = cached()
    fagen.flash_attn_with_kvcache(**named)  # builds what attends
    want = named["k_cache"].clone()

    def again() -> None:
        append.HELPER.libraries.clear()
        kvcache_known._known.clear(), kvcache_alike._alike.clear()
        named["k_cache"].zero_()
        fagen.flash_attn_with_kvcache(**named)
        assert torch.equal(named["k_cache"], want)

    with monkeypatch.context() as patch:
        patch.setattr(builds, "find", lambda job: None)
        patch.setenv("FAGEN_BUILD", "never")
        again()
        assert append.HELPER.libraries == {host().arch: None}
        patch.setenv("FAGEN_BUILD", "background")
        begun: list[Any] = []
        patch.setattr(background, "submit", lambda key, work: begun.append(work))
        again()
        assert len(begun) == 1 and not append.HELPER.libraries
        begun[0]()
        assert append.HELPER.libraries[host().arch] is not None
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> Any:
            raise BuildError("no compiler", "none", "get one")

        patch.setattr(builds, "make", fail)
        again()
        with pytest.warns(UserWarning, match="PyTorch appends to caches: no compiler"):
            background.warn_told()
    assert append.library(dataclasses.replace(known("sm_80"), arch="sm_75"), capturing=False) is None
    assert append.library(known("sm_80"), capturing=True) is None and "sm_80" not in append.HELPER.libraries


def test_what_the_kernel_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    make = cache_append.make_params

    def broken(call: DecodeCall, new: NewTokens) -> Any:
        made: Any = make(call, new)
        made.element = 9
        return made

    monkeypatch.setattr(cache_append, "make_params", broken)
    call, new = drawn(0)
    with pytest.raises(LaunchError, match="could not be appended: sizes or pointers"):
        kvcache_append.append_rows(call, new)
    assert math.isclose(float(call.k.float().max()), 7.0), "nothing is written"


def test_it_is_built_ahead(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By `fagen.warmup` and `fagen build`, where something decodes."""
    monkeypatch.setattr(append.HELPER, "libraries", {})
    small: dict[str, Any] = {"dtype": "fp32", "head_dim": 16, "heads": 2}
    fagen.warmup([fagen.DecodeProblem(**small)], host())
    assert append.HELPER.libraries[host().arch] is not None
    made: list[str] = []
    make = builds.make
    monkeypatch.setattr(builds, "make", lambda job, **more: made.append(job.name) or make(job, **more))
    words = "build --dtype fp32 --head-dim 16 --heads 2 --seqlen 64 --target cpu --op"
    for op in ("forward", "decode"):
        made.clear()
        assert main.main([*words.split(), op]) == 0
        assert ("append-cpu" in made) is (op == "decode")

    def fail(job: Any, **more: Any) -> Any:
        if job.name == "append-cpu":
            raise BuildError("no compiler", "none", "get one")
        return make(job, **more)

    monkeypatch.setattr(builds, "make", fail)
    assert main.main([*words.split(), "decode"]) == 1
    said = capsys.readouterr().err
    assert "append: no compiler" in said and "1 kernels ready, 1 failed" in said
