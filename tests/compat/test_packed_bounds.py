"""The kernel that makes the bounds of packed sequences gives what PyTorch's calls give, over tests/emulator."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fagen
from fagen.cli import main
from fagen.compat import varlen
from fagen.dispatch import warmup
from fagen.ops.attention import masks
from fagen.ops.attention.problem import Problem
from fagen.runtime import packed
from fagen.runtime.kernel import Library
from fagen.target import host, known
from tests.support import emulated


@pytest.fixture
def library(cache_folder: Path) -> Library:
    text = emulated.translated(packed.HELPER.rendered(known("sm_80")), "bf16")
    return emulated.build(text, cache_folder / "emulated", packed.Params)


def made(library: Library, *given: Any) -> torch.Tensor:
    library._library.emulator_begin(ctypes.c_uint64(0), ctypes.c_int(3))
    found = packed.make_intervals(library, *given)
    assert found is not None
    return found


def starts_of(lengths: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def test_the_bounds_are_those_of_pytorch(library: Library) -> None:
    """Sequences of any lengths, none among them, tokens behind the last, numbers of both widths, every band."""
    draw = random.Random(3)
    bands = list(itertools.product((None, 0, 7, 1 << 40), (None, 0, 3)))
    for turn in range(48):
        count, dtype = draw.choice([1, 2, 5, 33]), (torch.int32, torch.int64)[turn % 2]
        lengths = [[draw.choice([0, 1, 2, 17, 64, 100]) for _ in range(count)] for _ in range(2)]
        of_q, of_k = (starts_of(some, dtype) for some in lengths)
        rows, keys = (sum(some) + draw.choice([0, 0, 9]) for some in lengths)
        left, right = bands[turn % len(bands)]
        if not keys:
            continue
        want = masks.from_cu_seqlens(of_q, of_k, rows, keys, left=left, right=right)
        got = made(library, of_q, of_k, rows, keys, 2, left, right)
        assert torch.equal(got, want) and got.is_contiguous(), (turn, lengths, left, right)
        assert torch.equal(made(library, of_q, of_k, rows, keys, 1, left, right), want[..., :1]), turn


def test_no_starts_lead_out_of_the_rows(library: Library) -> None:
    """Whatever the numbers are: the kernel must read and write nothing but its own."""
    draw = random.Random(5)
    for _ in range(40):
        starts = [torch.tensor([draw.randrange(-(2**31), 2**31) for _ in range(6)], dtype=torch.int32) for _ in "qk"]
        got = made(library, *starts, 50, 70, 2, draw.choice([None, 5]), draw.choice([None, 0]))
        assert got.min() >= 0 and got.max() <= 50 and (got[..., 1] <= got[..., 0]).all()


def test_bad_sizes_are_refused(library: Library) -> None:
    starts = starts_of([4], torch.int32)
    assert packed.make_intervals(library, starts[:1], starts[:1], 4, 4, 1, None, None) is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_packed_calls_take_the_kernel(
    library: Library, monkeypatch: pytest.MonkeyPatch, causal: bool, same: bool
) -> None:
    launches: list[Any] = []
    make = packed.make_intervals

    def counted(*given: Any) -> torch.Tensor | None:
        launches.append(given)
        library._library.emulator_begin(ctypes.c_uint64(0), ctypes.c_int(3))
        return make(*given)

    of_q = starts_of([3, 0, 20], torch.int32)
    q, of_k = torch.zeros(23, 2, 16), of_q if same else of_q.clone()
    how = causal, (5, None)
    want = varlen.packed_masks(q, q, of_q, of_k, *how)
    monkeypatch.setattr(packed, "library_for", lambda of_q, of_k: library)
    monkeypatch.setattr(packed, "make_intervals", counted)
    got = varlen.packed_masks(q, q, of_q, of_k, *how)
    assert len(launches) == 1, "one launch, and nothing else"
    assert got.keys() == want.keys() and torch.equal(got["intervals"], want["intervals"])
    assert got["intervals"].shape[-1] == (1 if same and causal else 2)
    monkeypatch.setattr(packed, "make_intervals", lambda *given: None)
    again = varlen.packed_masks(q, q, of_q, of_k, *how)
    assert torch.equal(again["intervals"], want["intervals"]), "PyTorch where it cannot be launched"


def test_a_tracer_sees_pytorch(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """No address of a tensor without memory is taken."""
    monkeypatch.setattr(packed, "library_for", lambda *starts: pytest.fail("asked for a kernel"))
    of_q = starts_of([3, 5], torch.int32)
    make = lambda starts: varlen._intervals(starts, starts, 8, 8, 2)  # noqa: E731
    want = masks.from_cu_seqlens(of_q, of_q, 8, 8)
    assert torch.equal(torch.compile(make, backend="eager", fullgraph=True)(of_q), want)
    assert torch.equal(torch.func.vmap(make)(of_q[None])[0], want)
    with FakeTensorMode() as mode:
        assert make(mode.from_tensor(of_q)).shape == want.shape


def test_who_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = starts_of([3], torch.int32)
    assert packed.library_for(starts, starts) is None, "on a CPU"
    cuda = FakeTensorMode()
    with cuda:  # the address of none of these may be taken, and the kernel reads no other numbers
        of = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device="cuda")  # noqa: E731
        pairs = [(of(3), of(4)), (of(3), of(3, dtype=torch.int64)), (of(3, dtype=torch.int16),) * 2, (of(3, 1),) * 2]
        with monkeypatch.context() as patch:
            patch.setattr(packed, "_readable", lambda starts: True)
            patch.setattr(packed, "target_of", lambda device: pytest.fail("took them for readable"))
            assert all(packed.library_for(*pair) is None for pair in pairs)
        assert not packed._readable(of(3))
    helper = packed.HELPER
    assert helper.library(host(), capturing=False) is None and helper.libraries.pop(host().arch) is None
    old = dataclasses.replace(known("sm_80"), arch="sm_75")
    assert helper.library(old, capturing=False) is None and helper.libraries.pop("sm_75") is None
    assert helper.library(known("sm_80"), capturing=True) is None and "sm_80" not in helper.libraries


def test_it_is_built_ahead_where_masks_are_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    intervals = Problem(mask="intervals", intervals="lower1", dtype="fp32", head_dim=16, heads=2)
    assert warmup.helpers_of([Problem()]) == []
    assert warmup.helpers_of([Problem(), intervals]) == [packed.HELPER]
    assert [h.name for h in warmup.helpers_of([intervals, fagen.DecodeProblem()])] == ["append", "packed_bounds"]
    seen: list[Any] = []
    monkeypatch.setattr(packed.HELPER, "library", lambda target, capturing: seen.append(target))
    fagen.warmup([intervals], host())
    assert seen == [host()]
    monkeypatch.setattr(packed.HELPER, "build", seen.append)
    words = "--target cpu --dtype fp32 --head-dim 16 --heads 2 --seqlen 32 --mask intervals".split()
    assert main.main(["build", *words]) == 0
    assert seen == [host(), host()]
