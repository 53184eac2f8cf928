"""How many compilers run at a time, on machines of made-up cores and memory."""

from __future__ import annotations

import os

import pytest

from fagen.build import compilers


@pytest.mark.parametrize(
    ("cores", "free", "is_gpu", "measuring", "expected"),
    [
        (16, 1 << 40, True, False, 16),
        (16, 1 << 40, True, True, 14),
        (16, 1 << 40, False, True, 16),  # a CPU's kernels are not measured while others are compiled
        (4, 1 << 40, True, True, 4),
        (16, 5 << 30, True, False, 2),
        (16, 5 << 30, True, True, 2),
        (16, 5 << 30, False, False, 5),
        (16, 1, True, False, 1),
    ],
)
def test_their_number_is_bounded(
    cores: int, free: int, is_gpu: bool, measuring: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(compilers, "free_memory", lambda: free)
    assert compilers.compile_workers(is_gpu, measuring=measuring) == expected
