"""sm90_backward_large on the CPU (tests/emulator): right gradients, whatever comes first."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from fagen.ops.attention.params import BackwardParams
from fagen.ops.oracle import Verdict
from fagen.target import known
from tests.support import backward, emulated
from tests.support.large_backward import FAMILY, SCHEMES, Case
from tests.support.thorough import sample


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    return cache_folder / "emulated"


@functools.cache
def _source(case: Case) -> str:
    config = FAMILY.require(case.problem, known("sm_90"), case.config)
    return emulated.source(FAMILY, case.problem, known("sm_90"), config)


def check(
    case: Case, folder: Path, rows: int, keys: int, *, seed: int = 0, chance: int = 0, text: str = "", **more: Any
) -> Verdict:
    library = emulated.build(text or _source(case), folder, BackwardParams)
    library._library.emulator_begin(ctypes.c_uint64(seed + chance), ctypes.c_int(3))
    return backward.run(case, rows, keys, library, seed=seed, **more)


CASES = [Case("base", head_dim=512, mask="none", sizes=((70, 150), (150, 70)))]


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(CASES, every=5), ids=str)
def test_right_whatever_comes_first(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = check(case, folder, rows, keys, seed=seed, layout=("bshd", "bhsd")[seed % 2])
        assert verdict, verdict.message
