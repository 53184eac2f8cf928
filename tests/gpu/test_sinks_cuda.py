"""Attention sinks on a GPU: one kernel beside attention's in each direction, with the results of PyTorch's calls."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import fagen
from fagen.runtime import sinks


def tensors(dtype: torch.dtype, dim: int, layout: str) -> list[torch.Tensor]:
    numbers = torch.Generator("cuda").manual_seed(dim)
    rows = (2, 300, 8, dim) if layout == "bshd" else (2, 8, 300, dim)
    keys = (2, 300, 2, dim) if layout == "bshd" else (2, 2, 300, dim)
    made = [torch.randn(s, generator=numbers, device="cuda", dtype=dtype) for s in (rows, keys, keys, (8,))]
    return [t.requires_grad_() for t in made]


def results(leaves: list[torch.Tensor], layout: str) -> list[torch.Tensor]:
    out, lse = fagen.attention(*leaves[:3], sinks=leaves[3], causal=True, layout=layout, return_lse=True)
    dout = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(out.dtype)
    return [out, lse, *torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_results_are_those_of_pytorchs_calls(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for dim, layout in itertools.product((64, 128, 256), ("bshd", "bhsd")):
        leaves = tensors(dtype, dim, layout)
        assert sinks._library(*(t.detach() for t in (leaves[0], torch.empty(1, device="cuda"), leaves[3]))) is not None
        got = results(leaves, layout)
        with monkeypatch.context() as patch:
            patch.setattr(sinks, "_library", lambda *some: None)
            want = results(leaves, layout)
        eps = torch.finfo(dtype).eps
        for mine, theirs in zip(got, want, strict=True):
            scale = float(theirs.float().abs().max())
            torch.testing.assert_close(mine.float(), theirs.float(), atol=2 * eps * scale, rtol=2 * eps)


def test_a_graph_holds_it() -> None:
    q, k, v, sink = (t.detach() for t in tensors(torch.bfloat16, 64, "bshd"))

    def attend() -> Any:
        return fagen.attention(q, k, v, sinks=sink, causal=True)

    first, graph = attend(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    graph.replay()
    assert torch.equal(out, first)
    sink.add_(1.0)
    graph.replay()
    assert torch.equal(out, attend()) and not torch.equal(out, first)
