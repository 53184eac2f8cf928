"""Packed sequences on a GPU: their bounds by one kernel, alone and in a CUDA graph whose lengths change."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import fagen
from fagen.compat import varlen
from fagen.ops.attention import masks
from fagen.runtime import packed


def starts_of(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device="cuda", dtype=dtype)


def test_the_bounds_are_those_of_pytorch() -> None:
    for dtype, left, right in itertools.product((torch.int32, torch.int64), (None, 0, 100), (None, 0, 9)):
        of_q, of_k = starts_of([700, 0, 3, 1000], dtype), starts_of([650, 4, 0, 1049], dtype)
        library = packed.library_for(of_q, of_k)
        assert library is not None
        for columns in (1, 2):
            got = packed.make_intervals(library, of_q, of_k, 1710, 1711, columns, left, right)
            want = masks.from_cu_seqlens(of_q, of_k, 1710, 1711, left=left, right=right)[..., :columns]
            assert got is not None and torch.equal(got, want)


def test_the_bounds_take_one_launch() -> None:
    of_q, x = starts_of([40, 60]), torch.zeros(100, 2, 64, device="cuda", dtype=torch.bfloat16)
    varlen.packed_masks(x, x, of_q, of_q, True, (None, None))  # builds it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        varlen.packed_masks(x, x, of_q, of_q, True, (None, None))
        torch.cuda.synchronize()
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in names if "kernel" in name.lower()] == [n for n in names if "bounds_kernel" in n]


def test_a_graph_reads_the_lengths_anew() -> None:
    numbers = torch.Generator("cuda").manual_seed(2)
    q, k, v = (torch.randn(512, 4, 64, generator=numbers, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    cu, other = starts_of([100, 412]), starts_of([300, 212])

    def attend(starts: torch.Tensor) -> torch.Tensor:
        out = fagen.flash_attn_varlen_func(q, k, v, starts, starts, 512, 512, causal=True)
        assert isinstance(out, torch.Tensor)
        return out

    first, second = attend(cu), attend(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(cu)
    graph.replay()
    assert torch.equal(out, first)
    cu.copy_(other)
    graph.replay()
    assert torch.equal(out, second) and not torch.equal(first, second)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_many_sequences_are_what_each_is_alone(causal: bool, head_dim: int) -> None:
    """Forward and backward; sequences begin and end amid tiles, and most row tiles see none of a tile's keys."""
    draw = random.Random(head_dim)
    lengths = [draw.choice([0, 1, 37, 64, 100, 128, 129, 300]) for _ in range(64)]
    cu, total = starts_of(lengths), sum(lengths)
    numbers = torch.Generator("cuda").manual_seed(5)
    leaves = [
        torch.randn(total, heads, head_dim, generator=numbers, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (8, 2, 2)
    ]
    dout = torch.randn(total, 8, head_dim, generator=numbers, device="cuda", dtype=torch.bfloat16)
    runs = []
    for deterministic in (False, True, True):
        out = fagen.flash_attn_varlen_func(*leaves, cu, cu, 300, 300, causal=causal, deterministic=deterministic)
        assert isinstance(out, torch.Tensor)
        runs.append([out, *torch.autograd.grad(out, leaves, dout)])
    parts = [part for part in zip(*(t.split(lengths) for t in leaves), strict=True) if len(part[0])]
    alone = [fagen.attention(*(t[None] for t in part), causal=causal)[0] for part in parts]
    want = [torch.cat(alone), *torch.autograd.grad(torch.cat(alone), leaves, dout)]
    for run in runs:
        for mine, theirs in zip(run, want, strict=True):
            error, scale = (mine - theirs).float().abs().max(), theirs.float().abs().max()
            assert error <= 2e-2 * scale, (float(error), float(scale))
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))
