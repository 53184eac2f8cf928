"""simt_forward on the CPU (tests/emulator): right by the oracle, whatever comes first.

Registers and time are left to tests/gpu.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from fagen.families import simt_forward
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.problem import Problem
from fagen.target import known
from tests.support import emulated
from tests.support.cases import run
from tests.support.simt import DIM_CASES, FAMILY, FEATURE_CASES, SCHEME_CASES, SCHEMES, Case
from tests.support.thorough import sample

TARGET = known("sm_90")


@functools.cache
def _source(case: Case) -> str:
    return emulated.source(FAMILY, case.problem, TARGET, case.config)


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    """Each test compiles the kernel that it runs, unless some test has."""
    return cache_folder / "emulated"


def check(case: Case, folder: Path, rows: int, keys: int, *, seed: int = 0, text: str = "", **more):
    library = emulated.build(text or _source(case), folder)
    launch = functools.partial(emulated.launch, library, seed=seed)
    return run(case, rows, keys, seed=seed, batch=1, device="cpu", launch=launch, **more)


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(SCHEME_CASES, every=3), ids=str)
def test_every_scheme(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(((150, 150), (40, 300), (200, 70))):
        verdict = check(case, folder, rows, keys, seed=seed, layout=("bshd", "bhsd")[seed % 2])
        assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(DIM_CASES, every=4), ids=str)
def test_every_head_dim(case: Case, folder: Path) -> None:
    verdict = check(case, folder, 40, 70)
    assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("case", FEATURE_CASES, ids=str)
def test_scores_dropout_and_sixteen_bits(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(((90, 130), (130, 40))):
        verdict = check(case, folder, rows, keys, seed=seed)
        assert verdict, verdict.message


def test_rows_that_see_no_keys_and_no_keys_at_all(folder: Path) -> None:
    case = Case("default", head_dim=16, mask="causal", aligned=False)
    for rows, keys in ((100, 1), (1, 100)):
        verdict = check(case, folder, rows, keys)
        assert verdict, verdict.message
    q, k = torch.randn(1, 70, 4, 16), torch.empty(1, 0, 2, 16)
    out, lse = torch.full_like(q, torch.nan), torch.full((1, 4, 70), torch.nan)
    library = emulated.build(_source(case), folder)
    emulated.launch(library, AttentionCall.of(q, k, k, causal=True), {"out": out, "lse": lse})
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_scores_of_any_size(folder: Path) -> None:
    """References far from 0: one weight is 1, and no product rounds it away."""
    case = Case("default", head_dim=16, mask="causal", aligned=False)
    for magnitude in (30.0, 3e3):
        verdict = check(Case(**{**vars(case), "magnitude": magnitude}), folder, 60, 60)
        assert verdict, verdict.message


def test_a_kernel_serves_every_smaller_head_dim(folder: Path) -> None:
    """As emitted kernels are used; larger ones it refuses."""
    kernel = Case("small", mask="none", aligned=False)
    library = emulated.build(_source(kernel), folder)
    launch = functools.partial(emulated.launch, library)
    for d, dv in ((1, 1), (20, 64), (64, 5)):
        case = Case("small", mask="none", aligned=False, head_dim=d, head_dim_v=dv)
        verdict = run(case, 40, 70, batch=1, device="cpu", launch=launch)
        assert verdict, verdict.message
    with pytest.raises(AssertionError):
        run(Case("small", mask="none", aligned=False, head_dim=65), 40, 70, batch=1, device="cpu", launch=launch)


# each leaves out what orders the reads and writes of shared memory, or hides the keys past the last
_BREAKS = {
    "no wait": ("ptx::cp_async_wait<kStages - 2>();", ""),
    "no barrier": ("__syncthreads();\n    const float* chunk", "const float* chunk"),
    "no mask": ("if (hidden) scores[i][j] = -INFINITY;", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", _BREAKS)
def test_what_is_left_out_is_found(name: str, folder: Path) -> None:
    case, (old, new) = Case("small", mask="none"), _BREAKS[name]
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
def test_every_problem_has_a_default_that_shared_memory_does_not_limit(arch: str) -> None:
    where = known(arch)
    for dtype in ("fp32", "fp16"):
        for d in (16, 48, 64, 96, 128, 192, 256, 272, 512, 528, 1024):
            for dv in (16, d):
                for options in ({}, {"mask": "causal", "aligned": False}, {"softcap": True, "dropout": True}):
                    problem = Problem(dtype=dtype, head_dim=d, head_dim_v=dv, **options)
                    FAMILY.require(problem, where, FAMILY.default(problem, where))
    widest = Problem(dtype="fp32", head_dim=1024)
    assert simt_forward.smem_bytes(widest, FAMILY.default(widest, where)) < 64 << 10
