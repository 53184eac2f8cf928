"""The kernel that applies attention sinks, and its gradients, over tests/emulator: what PyTorch's own calls give."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fagen
from fagen import api
from fagen.errors import LaunchError
from fagen.ops.attention import sinks as logits
from fagen.runtime import helper, sinks
from fagen.runtime.kernel import Library
from fagen.target import host, known
from tests.support import emulated
from tests.support.calls import example

SINKS = [0.3, 4.0, -40.0, math.inf, -math.inf, 1.0]


@pytest.fixture
def library(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    text = emulated.translated(sinks.HELPER.rendered(known("sm_80")), "bf16")
    found = emulated.build(text, cache_folder / "emulated", sinks.Params)
    launch = helper.launch_on_stream

    def begun(library: Library, *more: Any) -> int:
        found._library.emulator_begin(ctypes.c_uint64(0), ctypes.c_int(3))
        return launch(library, *more)

    monkeypatch.setattr(helper, "launch_on_stream", begun)
    monkeypatch.setattr(sinks, "_library", lambda *tensors: found)
    return found


def drawn(dtype: torch.dtype, dim: int, layout: str, *, apart: bool, of_sinks: torch.dtype) -> list[torch.Tensor]:
    """Output, LSE, sinks, and the gradients of the two; some rows see nothing."""
    numbers = torch.Generator().manual_seed(dim)
    shape = (2, 7, 6, dim) if layout == "bshd" else (2, 6, 7, dim)
    out, dout = (torch.randn(*shape[:3], dim + 8 * apart, generator=numbers).to(dtype)[..., :dim] for _ in range(2))
    lse, dlse = torch.randn(2, 6, 7, generator=numbers) * 3, torch.randn(2, 6, 7, generator=numbers)
    lse[:, :, 2] = -math.inf
    (out[:, 2] if layout == "bshd" else out[:, :, 2]).zero_()
    return [out, lse, torch.tensor(SINKS, dtype=of_sinks), dout, dlse]


CASES = [
    (torch.bfloat16, 64, "bshd", False, torch.bfloat16),
    (torch.bfloat16, 96, "bhsd", True, torch.float32),
    (torch.float16, 200, "bshd", True, torch.float16),
    (torch.float16, 15, "bhsd", False, torch.float32),
    (torch.float32, 40, "bshd", False, torch.float32),
    (torch.float32, 7, "bshd", True, torch.bfloat16),
]


@pytest.mark.parametrize(("dtype", "dim", "layout", "apart", "of_sinks"), CASES)
def test_values_and_gradients(
    library: Library, dtype: torch.dtype, dim: int, layout: str, apart: bool, of_sinks: torch.dtype
) -> None:
    out, lse, some, dout, dlse = drawn(dtype, dim, layout, apart=apart, of_sinks=of_sinks)
    eps = torch.finfo(dtype).eps
    leaves = [out.clone().requires_grad_(), lse.clone().requires_grad_(), some.clone().requires_grad_()]
    exact = [t.double().requires_grad_() for t in (out, lse, some)]
    want = logits.apply(exact[0], exact[1], exact[2], layout)
    got = sinks.apply(leaves[0], leaves[1], leaves[2], layout)
    for mine, theirs, tight in zip(got, want, (eps, 1e-6), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=tight, rtol=tight)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32

    found = torch.autograd.grad(got, leaves, [dout, dlse])
    finite = [0, 1, 2, 5]  # of a sink at infinity PyTorch's formulas give no number
    exact = [t.detach().requires_grad_() for t in exact]
    heads = exact[2][finite]
    some_heads = [t[:, :, finite] if layout == "bshd" else t[:, finite] for t in (exact[0], dout.double())]
    results = logits.apply(some_heads[0], exact[1][:, finite], heads, layout)
    gradients = torch.autograd.grad(results, exact, [some_heads[1], dlse.double()[:, finite]])
    close = torch.testing.assert_close
    seen = [t[:, :, finite] if layout == "bshd" else t[:, finite] for t in (found[0], gradients[0])]
    rows = [0, 1, 3, 4, 5, 6]  # a row that sees nothing has no gradient, whatever comes in
    of_rows = [t[:, rows] if layout == "bshd" else t[:, :, rows] for t in seen]
    close(of_rows[0].double(), of_rows[1], atol=eps, rtol=eps)
    close(found[1][:, finite].double(), gradients[1][:, finite], atol=1e-5, rtol=1e-5)
    close(found[2][finite].double(), gradients[2][finite], atol=1e-5, rtol=max(1e-4, torch.finfo(of_sinks).eps))
    assert found[2].dtype == of_sinks and all(t.isfinite().all() for t in found)
    assert found[0][0].count_nonzero() and found[2][4] == 0, "a sink at -inf is none"


def test_who_wants_no_gradient_gets_it_in_place(library: Library) -> None:
    out, lse, some, *_ = drawn(torch.float32, 16, "bshd", apart=False, of_sinks=torch.float32)
    want = logits.apply(out.clone(), lse.clone(), some, "bshd")
    version = out._version
    got = sinks.apply(out, lse, some, "bshd", in_place=True)
    assert got[0] is out and got[1] is lse and out._version > version
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("only", ["out", "lse"])
def test_one_gradient_is_enough(library: Library, only: str) -> None:
    out, lse, some, dout, dlse = drawn(torch.float32, 16, "bshd", apart=False, of_sinks=torch.float32)
    some[3:5] = 0.0
    lse[:, :, 2] = 1.0
    results = []
    for apply in (sinks.apply, logits.apply):
        leaves = [t.clone().requires_grad_() for t in (out, lse, some)]
        given, gradient = apply(*leaves, "bshd"), dout.expand_as(dout) if only == "out" else dlse
        results.append(torch.autograd.grad(given[only == "lse"], leaves, gradient, allow_unused=True))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, atol=1e-5, rtol=1e-5)


def test_attention_takes_it(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch forward and one backward beside those of attention, and the same gradients as by PyTorch's calls."""
    assert api._ops_registered()
    launches: list[bool] = []
    launch = sinks._launch
    monkeypatch.setattr(sinks, "_launch", lambda *given: (launches.append(len(given) > 7), launch(*given))[1])
    case, found = example(causal=True, sinks=torch.tensor([0.3, 4.0, -4.0, 2.0])), []
    for by_kernel in (True, False):
        leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v, case.options["sinks"])]
        if not by_kernel:
            monkeypatch.setattr(sinks, "_library", lambda *tensors: None)
        out, lse = fagen.attention(*leaves[:3], causal=True, sinks=leaves[3], return_lse=True)
        found.append(torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves))
    assert launches == [False, True]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_of_gradients_are_refused(library: Library) -> None:
    out, lse, some, *_ = drawn(torch.float32, 16, "bshd", apart=False, of_sinks=torch.float32)
    got, _ = sinks.apply(out.requires_grad_(), lse, some, "bshd")
    (once,) = torch.autograd.grad(got.square().sum(), out, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        once.sum().backward()


def test_who_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    out, lse, some, *_ = drawn(torch.float32, 16, "bshd", apart=False, of_sinks=torch.float32)
    assert sinks._library(out, lse, some) is None, "on a CPU"
    ours = sinks.HELPER
    assert ours.library(host(), capturing=False) is None and ours.libraries.pop(host().arch) is None
    old = dataclasses.replace(known("sm_80"), arch="sm_75")
    assert ours.library(old, capturing=False) is None and ours.libraries.pop("sm_75") is None


def test_a_launch_that_fails_is_told(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    out, lse, some, *_ = drawn(torch.float32, 16, "bshd", apart=False, of_sinks=torch.float32)
    monkeypatch.setattr(helper, "launch_on_stream", lambda *given: 1)
    with pytest.raises(LaunchError, match="attention sinks could not be applied"):
        sinks.apply(out, lse, some, "bshd")
