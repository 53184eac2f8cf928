"""fagen.flash_attn_with_kvcache on a GPU: beside the CPU's answers, in graphs, without a wait for the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import fagen
from fagen import families
from fagen.compat import kvcache_append
from fagen.errors import InvalidArgument
from fagen.ops.attention import cache_append
from fagen.ops.attention.cache_append import NewTokens
from fagen.runtime import append
from fagen.target import detect
from tests.support.append import drawn

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """By our kernel, whether calls are served by it yet or not."""
    monkeypatch.setattr(families, "serving", families.candidates)


HEADS, KV_HEADS, D, PAGE = 8, 2, 64, 16
LENGTHS = [0, 1, 15, 16, 200, 1000]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def on(device: str, named: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in named.items()}


def step(tokens: int, page: int) -> dict[str, Any]:
    """A step of six sequences, on the CPU."""
    width = 1100 // (page or 1100)
    shape = (6 * width, page, KV_HEADS, D) if page else (6, 1100, KV_HEADS, D)
    named: dict[str, Any] = {"k_cache": randn(*shape), "v_cache": randn(*shape, seed=1)}
    named |= {"cache_seqlens": int32(*LENGTHS), "q": randn(6, tokens, HEADS, D), "causal": True}
    named |= {"k": randn(6, tokens, KV_HEADS, D, seed=2), "v": randn(6, tokens, KV_HEADS, D, seed=3)}
    if page:
        named["page_table"] = (
            torch.randperm(6 * width, generator=torch.Generator().manual_seed(4)).reshape(6, width).int()
        )
    return named


@pytest.mark.parametrize("page", [0, PAGE])
@pytest.mark.parametrize("tokens", [1, 5])
def test_beside_the_cpu(page: int, tokens: int) -> None:
    here = step(tokens, page)
    there = on(DEVICE, here)
    out, lse = fagen.flash_attn_with_kvcache(**there, return_softmax_lse=True)
    want, want_lse = fagen.flash_attn_with_kvcache(**here, return_softmax_lse=True)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(there[name].cpu(), here[name])
    assert (out.cpu().float() - want.float()).abs().max() < 0.03
    assert (lse.cpu() - want_lse).abs().max() < 1e-3


def test_packed_rows_rotary_and_fp8_beside_the_cpu() -> None:
    counts = [40, 1, 0, 3, 1, 17]
    starts, total = int32(*(sum(counts[:i]) for i in range(7))), sum(counts)
    random = torch.Generator().manual_seed(1)
    angle = torch.rand(1100, D // 2, generator=random) * 6
    scale = torch.rand(6, KV_HEADS, generator=random) + 0.5
    here = step(1, PAGE) | {
        "q": randn(total, HEADS, D), "k": randn(total, KV_HEADS, D, seed=2), "v": randn(total, KV_HEADS, D, seed=3),
        "cu_seqlens_q": starts, "cu_seqlens_k_new": starts, "max_seqlen_q": 40, "rotary_cos": angle.cos(),
        "rotary_sin": angle.sin(), "k_descale": scale, "v_descale": scale.flip(0),
    }  # fmt: skip
    for name in ("k_cache", "v_cache"):
        here[name] = here[name].to(torch.float8_e4m3fn)
    there = on(DEVICE, here)
    out, want = fagen.flash_attn_with_kvcache(**there), fagen.flash_attn_with_kvcache(**here)
    assert isinstance(out, torch.Tensor) and isinstance(want, torch.Tensor)
    assert torch.equal(there["v_cache"].cpu().view(torch.uint8), here["v_cache"].view(torch.uint8))
    assert (out.cpu().float() - want.float()).abs().max() < 0.1  # turned keys may round to a neighbour


@pytest.mark.parametrize("page", [0, PAGE])
def test_a_graph_serves_a_growing_cache(page: int) -> None:
    """One capture, append and all; each replay with other lengths, rows of q and keys."""
    static, eager = on(DEVICE, step(1, page)), on(DEVICE, step(1, page))
    fagen.flash_attn_with_kvcache(**static)  # builds and loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fagen.flash_attn_with_kvcache(**static)
    for turn in range(20):
        for name in ("q", "k", "v"):
            value = randn(*static[name].shape, seed=100 + turn).to(DEVICE)
            static[name].copy_(value), eager[name].copy_(value)
        graph.replay()
        want = fagen.flash_attn_with_kvcache(**eager)
        assert torch.equal(out, want), turn
        for named in (static, eager):
            named["cache_seqlens"] += 1 if turn < 10 else 3
    assert torch.equal(static["k_cache"], eager["k_cache"])


def test_nothing_waits_for_the_device() -> None:
    named = on(DEVICE, step(2, PAGE))
    fagen.flash_attn_with_kvcache(**named)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fagen.flash_attn_with_kvcache(**named)
        fagen.flash_attn_with_kvcache(**{**named, "cache_seqlens": 7})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_debug_looks_at_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    named = on(DEVICE, step(1, PAGE))
    kept = named["k_cache"].clone()
    for change in (
        {"cache_seqlens": int32(0, 0, 0, 0, 0, 5000).to(DEVICE)}, {"page_table": named["page_table"] - 10**6},
        {"cache_seqlens": int32(0, 0, 0, 0, 0, -1).to(DEVICE)},
    ):  # fmt: skip
        monkeypatch.setenv("FAGEN_DEBUG", "1")
        with pytest.raises(InvalidArgument):
            fagen.flash_attn_with_kvcache(**{**named, **change})
        with pytest.raises(InvalidArgument):
            fagen.flash_attn_with_kvcache(**{**named, **change, "k": None, "v": None})
    assert torch.equal(named["k_cache"], kept)


def test_torch_compile_and_opcheck() -> None:
    named = on(DEVICE, step(1, PAGE))
    compiled = torch.compile(lambda **given: fagen.flash_attn_with_kvcache(**given) + 1, fullgraph=True)
    with torch.no_grad():
        mine = {**named, "k_cache": named["k_cache"].clone(), "v_cache": named["v_cache"].clone()}
        assert torch.equal(compiled(**mine), fagen.flash_attn_with_kvcache(**named) + 1)
    assert torch.equal(mine["k_cache"], named["k_cache"])
    args = (named["q"], named["k_cache"], named["v_cache"], named["cache_seqlens"], named["page_table"], *[None] * 5)
    torch.library.opcheck(torch.ops.fagen.decode.default, (*args, -1, -1, 0.0, None, 0, 0, 0))


def test_pinned_numerics() -> None:
    named = on(DEVICE, step(1, 0) | {"k": None, "v": None, "causal": False})
    named["cache_seqlens"] = int32(1100, 700, 513, 512, 1, 1099).to(DEVICE)
    together = fagen.flash_attn_with_kvcache(**named, numerics="pinned")
    for b in range(6):
        mine = {name: named[name][b : b + 1] for name in ("q", "k_cache", "v_cache", "cache_seqlens")}
        assert torch.equal(fagen.flash_attn_with_kvcache(**mine, numerics="pinned")[0], together[b]), b


def test_a_plan_and_one_graph_serve_other_lengths() -> None:
    here = step(1, PAGE)
    del here["k"], here["v"]
    problem = fagen.DecodeProblem(
        head_dim=D, heads=HEADS, kv_heads=KV_HEADS, batch=6, page=PAGE, seqlen_k=1088, mask="none"
    )
    there = on(DEVICE, here)
    plan = fagen.DecodePlan(problem, LENGTHS)
    assert plan.split_keys > 0
    plan.run(**there)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan.run(**there)
    assert isinstance(out, torch.Tensor)
    for lengths in (LENGTHS, [1000, 1, 1088, 0, 17, 500]):
        there["cache_seqlens"].copy_(int32(*lengths))
        graph.replay()
        want = fagen.flash_attn_with_kvcache(**{**here, "cache_seqlens": int32(*lengths)})
        assert isinstance(want, torch.Tensor)
        assert (out.cpu().float() - want.float()).abs().max() < 0.03


def test_the_kernel_appends_the_bits_of_pytorch() -> None:
    found = append.library(detect(), capturing=False)
    assert found is not None
    for seed in range(60):
        here, tokens = drawn(seed)
        call, theirs = (dataclasses.replace(here, **on(DEVICE, here.inputs())) for _ in range(2))
        new = NewTokens(**on(DEVICE, tokens._asdict()))
        assert cache_append.readable(call, new)
        kind = kvcache_append.Prepared(found, cache_append.make_params(call, new))
        status, q, after = kvcache_append.launch(kind, call, new)
        assert status == 0
        want = kvcache_append._by_torch(theirs, new)
        for a, b in ((call.k, theirs.k), (call.v, theirs.v), (q, want.q), (after, want.seqlens_k)):
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), seed
