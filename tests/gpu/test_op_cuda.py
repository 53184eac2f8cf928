"""fagen.attention on a GPU: the C++ road, graphs, torch.compile, opcheck, fallbacks, host time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fagen
from fagen import api
from fagen.ops.attention import masks, reference
from fagen.ops.attention.call import AttentionCall
from tests.support.calls import right


@pytest.fixture(scope="module", autouse=True)
def _by_the_ops() -> None:
    """Not through ctypes, as calls go until the ops are built."""
    assert api._ops_registered()


def _inputs(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, device="cuda", generator=g).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_right(layout: str, causal: bool, dtype: torch.dtype) -> None:
    q, k, v = _inputs(2, 300, 4, 64, dtype=dtype) if layout == "bshd" else _inputs(2, 4, 300, 64, dtype=dtype)
    out, lse = fagen.attention(q, k, v, layout=layout, causal=causal, return_lse=True)
    verdict = right((out, lse), q, k, v, layout=layout, causal=causal)
    assert verdict, verdict.message
    best = "sm90_forward" if torch.cuda.get_device_capability() == (9, 0) else "sm80_forward"
    assert best in str(fagen.explain(q, k, v, layout=layout, causal=causal))


def test_float32_follows_pytorchs_switch() -> None:
    """With it products are rounded, call by call; without it they are not."""
    q, k, v = _inputs(2, 300, 4, 64, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    errors = []
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            out, lse = fagen.attention(q, k, v, causal=True, return_lse=True)
            call = AttentionCall.of(q, k, v, causal=True, return_lse=True)
            assert call.tf32 is (precision == "high") and "sm80_forward_fp32" in str(
                fagen.explain(q, k, v, causal=True)
            )
            verdict = reference.check(call, {"out": out, "lse": lse})
            assert verdict, verdict.message
            errors.append(verdict.error)
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors[0] == errors[2] < 1e-5 < errors[1] < 1e-2


def test_strided_views_are_not_copied() -> None:
    qkv = torch.randn(2, 300, 3, 4, 64, device="cuda").bfloat16()
    q, k, v = qkv.unbind(2)
    out = fagen.attention(q, k, v)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    del out
    out = fagen.attention(q, k, v)
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * 2
    assert right(out, q, k, v)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_sdpa_keeps_the_querys_layout(order: tuple[int, ...]) -> None:
    sizes = (2, 4, 300)
    stored = torch.randn(*(sizes[i] for i in order), 64, device="cuda").bfloat16()
    q = stored.permute(*(order.index(i) for i in range(3)), 3)
    k, v, _ = _inputs(2, 4, 300, 64)
    out = fagen.sdpa(q, k, v)
    assert out.stride() == q.stride() and right(out, q, k, v, layout="bhsd")


def test_out_apart_from_its_inputs() -> None:
    q, k, v = _inputs(2, 300, 4, 64)
    out = torch.empty_like(q)
    version = out._version
    assert fagen.attention(q, k, v, out=out) is out and out._version > version
    assert right(out, q, k, v)
    for t in (q, k, v):
        with pytest.raises(ValueError, match="out shares memory"):
            fagen.attention(q, k, v, out=t)


def test_documents() -> None:
    q, k, v = _inputs(2, 500, 4, 64)
    ids = torch.repeat_interleave(torch.arange(5, device="cuda"), 100).expand(2, -1)
    intervals = masks.from_documents(ids)
    out = fagen.attention(q, k, v, causal=True, intervals=intervals)
    assert right(out, q, k, v, causal=True, intervals=intervals)


def test_cuda_graph() -> None:
    q, k, v = _inputs(2, 256, 4, 64)
    fagen.attention(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fagen.attention(q, k, v, causal=True)
    for t, new in zip((q, k, v), _inputs(2, 256, 4, 64, seed=1), strict=True):
        t.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert right(out, q, k, v, causal=True)


def test_dropout_obeys_the_generator_of_the_device_in_graphs_too() -> None:
    q, k, v = _inputs(2, 256, 4, 64)

    def attend() -> torch.Tensor:
        return fagen.attention(q, k, v, causal=True, dropout_p=0.25)

    torch.cuda.manual_seed(1)
    one, other = attend(), attend()
    torch.cuda.manual_seed(1)
    assert torch.equal(one, attend()) and not torch.equal(one, other)
    call = AttentionCall.of(q, k, v, causal=True, dropout_p=0.25)
    torch.cuda.manual_seed(1)
    call = call.with_rng()
    verdict = reference.check(call, {"out": one})
    assert verdict, verdict.message
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    torch.cuda.manual_seed(1)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)  # each replay drops others


def test_nothing_compiles_during_capture() -> None:
    q, k, v = _inputs(1, 64, 2, 48)
    with pytest.raises(Exception, match="fagen build"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fagen.attention(q, k, v, softcap=3.0)
    torch.cuda.synchronize()


def test_torch_compile_fullgraph() -> None:
    q, k, v = _inputs(2, 256, 4, 64)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fagen.attention(q * 2, k, v, causal=True) + 1

    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), layer(q, k, v))


def test_opcheck() -> None:
    q, k, v = _inputs(2, 100, 4, 64)
    fagen.attention(q, k, v)
    torch.library.opcheck(
        torch.ops.fagen.forward.default, (q, k, v, None, None, False, True, -1, 0, 0.0, None, False, 0.0, None),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_other_stream() -> None:
    q, k, v = _inputs(2, 2048, 8, 64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = fagen.attention(q, k, v)
    stream.synchronize()
    assert right(out, q, k, v)


def test_float32_falls_back() -> None:
    q, k, v = _inputs(1, 64, 2, 32, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert right(fagen.attention(q, k, v), q, k, v)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    q, k, v = _inputs(1, 100, 2, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = fagen.attention(q, k, v, causal=True, scale=scale)
    assert right(out, q, k, v, causal=True, scale=scale)


def _host_seconds(call: Callable[[], object], calls: int = 300) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = (time.perf_counter() - start) / calls
    torch.cuda.synchronize()
    return seconds


def test_host_time_is_at_most_half_of_sdpa() -> None:
    q, k, v = _inputs(1, 128, 4, 64)
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))
    ratios = []
    with torch.no_grad():
        calls: list[Callable[[], object]] = [
            lambda: fagen.attention(q, k, v, causal=True),
            lambda: F.scaled_dot_product_attention(qt, kt, vt, is_causal=True),
        ]
        for call in calls * 2:
            call()
        for _ in range(7):
            ours, theirs = (_host_seconds(call) for call in calls)
            ratios.append(ours / theirs)
    print(f"host time of a call: {ours * 1e6:.1f} us, SDPA {theirs * 1e6:.1f} us")
    assert sorted(ratios)[3] <= 0.5, ratios


def test_expanded_keys() -> None:
    q, k, v = _inputs(2, 200, 4, 64)
    k, v = (t[:, :, :1].expand(2, 200, 4, 64) for t in (k, v))
    out = fagen.attention(q, k, v, causal=True)
    assert right(out, q, k, v, causal=True)
