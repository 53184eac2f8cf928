"""simt_backward on the CPU (tests/emulator), against autograd: right whatever comes first.

Registers and time are left to tests/gpu.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import pytest
import torch

from fagen.ops.attention.backward import BackwardProblem
from fagen.ops.attention.params import BackwardParams
from fagen.ops.oracle import Verdict
from fagen.target import known
from tests.support import emulated
from tests.support.backward import run
from tests.support.simt_backward import DIM_CASES, FAMILY, FEATURE_CASES, SCHEME_CASES, SCHEMES, Case
from tests.support.thorough import sample

TARGET = known("sm_90")


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    """Each test compiles the kernel that it runs, unless some test has."""
    return cache_folder / "emulated"


@functools.cache
def _source(case: Case) -> str:
    return emulated.source(FAMILY, case.problem, TARGET, case.config)


def check(case: Case, folder: Path, rows: int, keys: int, *, seed: int = 0, text: str = "", **more) -> Verdict:
    library = emulated.build(text or _source(case), folder, BackwardParams)
    library._library.emulator_begin(ctypes.c_uint64(seed), ctypes.c_int(3))
    return run(case, rows, keys, library, seed=seed, **more)


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(SCHEME_CASES, every=3), ids=str)
def test_every_scheme(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = check(case, folder, rows, keys, seed=seed, layout=("bshd", "bhsd")[seed])
        assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("case", sample([*DIM_CASES, *FEATURE_CASES], every=5), ids=str)
def test_head_dims_and_features(case: Case, folder: Path) -> None:
    for rows, keys in case.sizes:
        verdict = check(case, folder, rows, keys)
        assert verdict, verdict.message


def test_rows_and_keys_that_see_nothing(folder: Path) -> None:
    """Their gradients are 0, whatever that of their logsumexp is."""
    case = Case("small", mask="causal", dlse=True)
    for rows, keys in ((70, 1), (1, 70), (100, 40)):
        verdict = check(case, folder, rows, keys)
        assert verdict, verdict.message
    hidden = Case("small", mask="intervals", intervals="lower1", dlse=True)
    verdict = check(hidden, folder, 40, 50, intervals=torch.zeros(1, 1, 50, 1, dtype=torch.int32))
    assert verdict, verdict.message


# each leaves out what orders reads and writes, or what hides keys
_BREAKS = {
    "no wait": ("ptx::cp_async_wait<kStages - 2>();", ""),
    "no barrier": ("__syncthreads();\n    const float* chunk", "const float* chunk"),
    "no mask": ("partial && hidden(row, key) ? 0.f : cell", "cell"),
    "no delta": ("of_weight * up - stats.delta", "of_weight * up"),
}


@pytest.mark.parametrize("name", _BREAKS)
def test_what_is_left_out_is_found(name: str, folder: Path) -> None:
    case, (old, new) = Case("small", mask="causal", dlse=True), _BREAKS[name]
    text = _source(case)
    assert old in text
    found = []
    for seed in range(3):
        try:
            found.append(bool(check(case, folder, 40, 70, seed=seed, text=text.replace(old, new))))
        except AssertionError:
            found.append(False)
    assert not all(found)


def test_every_value_of_every_knob_is_run() -> None:
    for knob in FAMILY.knobs:
        assert {scheme[knob.name] for scheme in SCHEMES.values()} == set(knob.choices), knob.name


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_every_problem_has_a_default(arch: str) -> None:
    where = known(arch)
    for dtype in ("fp32", "fp16"):
        for d in (16, 48, 64, 96, 128, 192, 256, 272, 512, 528, 1024):
            for dv in (16, d):
                for options in ({}, {"mask": "causal", "aligned": False}, {"softcap": True, "dropout": True}):
                    problem = BackwardProblem(dtype=dtype, head_dim=d, head_dim_v=dv, **options)
                    FAMILY.require(problem, where, FAMILY.default(problem, where))
