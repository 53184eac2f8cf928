"""sm80_forward_fp32 on the CPU (tests/emulator): right by the oracle, whatever comes first.

The emulator cuts the tensor cores' sums as the hardware does, so that the accuracy is that of a GPU as well. Registers
and time are left to tests/gpu.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from fagen.families import sm80_forward_fp32
from fagen.ops.attention import reference
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.problem import Problem
from fagen.target import known
from tests.support import emulated
from tests.support.cases import run
from tests.support.fp32 import DIM_CASES, FAMILY, SCHEME_CASES, SCHEMES, Case
from tests.support.thorough import sample

TARGET = known("sm_90")
SMALL = Case("three_blocks", head_dim=7, mask="causal", aligned=False)


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
    for seed, (rows, keys) in enumerate(((70, 130), (130, 40))):
        verdict = check(case, folder, rows, keys, seed=seed, layout=("bshd", "bhsd")[seed % 2])
        assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(DIM_CASES, every=8), ids=str)
def test_every_head_dim(case: Case, folder: Path) -> None:
    verdict = check(case, folder, 40, 70)
    assert verdict, verdict.message


def test_rows_that_see_no_keys_and_no_keys_at_all(folder: Path) -> None:
    for rows, keys in ((100, 1), (1, 100)):
        verdict = check(SMALL, folder, rows, keys)
        assert verdict, verdict.message
    q, k = torch.randn(1, 70, 4, 7), torch.empty(1, 0, 2, 7)
    out, lse = torch.full_like(q, torch.nan), torch.full((1, 4, 70), torch.nan)
    library = emulated.build(_source(SMALL), folder)
    emulated.launch(library, AttentionCall.of(q, k, k, causal=True), {"out": out, "lse": lse})
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_large_scores(folder: Path) -> None:
    """Up to where rows see one key alone: those are v but for its last bit, which PyTorch has as well."""
    for magnitude in (3.0, 8.0, 30.0):
        verdict = check(Case(**{**vars(SMALL), "magnitude": magnitude}), folder, 60, 60)
        assert verdict, verdict.message


def test_long_sums_do_not_lean_towards_0(folder: Path) -> None:
    """The tensor cores cut each sum of products; with values of one sign that adds up."""
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, rows, 1, 7, generator=g) for rows in (16, 1500, 1500))
    assert _FRESH in _source(SMALL)
    found = []
    for text in (_source(SMALL), _source(SMALL).replace(_FRESH, _KEPT)):
        call = dataclasses.replace(AttentionCall.of(q, k, v.abs() + 1, causal=True), scale=0.01)
        out, lse = torch.full_like(q, torch.nan), torch.full((1, 1, 16), torch.nan)
        emulated.launch(emulated.build(text, folder), call, {"out": out, "lse": lse})
        found.append(reference.check(call, {"out": out, "lse": lse}))
    fresh, kept = found
    assert fresh, fresh.message
    assert kept.error > 4 * fresh.error


# in place of sums that start from 0 for each tile, one sum from the first key to the last
_FRESH = "float high[kSlabs][kVector][4] = {}, low[kSlabs][kVector][4] = {};"
_KEPT = """float low[kSlabs][kVector][4] = {}, high[kSlabs][kVector][4];
      for (int s = 0; s < kSlabs; ++s)
        for (int j = 0; j < kVector; ++j)
          for (int i = 0; i < 4; ++i) {
            high[s][j][i] = o[s][q * kVector + j][i] * factor[2 * s + i / 2];
            o[s][q * kVector + j][i] = 0;
          }"""


def test_a_kernel_serves_every_smaller_head_dim(folder: Path) -> None:
    """As emitted kernels are used; larger ones it refuses."""
    launch = functools.partial(emulated.launch, emulated.build(_source(SMALL), folder))
    for d, dv in ((1, 1), (10, 16), (16, 5)):
        case = Case(**{**vars(SMALL), "head_dim": d, "head_dim_v": dv})
        verdict = run(case, 40, 70, batch=1, device="cpu", launch=launch)
        assert verdict, verdict.message
    with pytest.raises(AssertionError):
        run(Case(**{**vars(SMALL), "head_dim": 17}), 40, 70, batch=1, device="cpu", launch=launch)


# each leaves out what orders the reads and writes of shared memory, hides the keys past the last, or makes up for what
# the tensor cores leave out of an operand or a sum
_BREAKS = {
    "no wait": ("ptx::cp_async_wait<kPending>();", ""),
    "no barrier": ("cp_async_wait<kPending>();\n    __syncthreads();", "cp_async_wait<kPending>();"),
    "no mask": ("if (hidden) score = -INFINITY;", ""),
    "no low part": ("ptx::mma_m16n8k8(sums, a.high, b.low);", ""),
    "no exact sum of O": ("fmaf(sum, factor[2 * s + i / 2], high[s][j][i] + low[s][j][i])", "sum + high[s][j][i]"),
}  # fmt: skip


@pytest.mark.parametrize("name", _BREAKS)
def test_what_is_left_out_is_found(name: str, folder: Path) -> None:
    old, new = _BREAKS[name]
    text = _source(SMALL)
    assert old in text
    found = []
    for seed in range(3):
        try:
            found.append(bool(check(SMALL, folder, 70, 70, seed=seed, text=text.replace(old, new))))
        except AssertionError:
            found.append(False)
    assert not all(found)


def test_every_value_of_every_knob_is_run() -> None:
    for knob in FAMILY.knobs:
        assert {scheme[knob.name] for scheme in SCHEMES.values()} == set(knob.choices), knob.name
    assert {case.scheme for case in SCHEME_CASES} == set(SCHEMES)
    for case in SCHEME_CASES:
        FAMILY.require(case.problem, TARGET, case.config)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120"])
def test_every_problem_has_a_default(arch: str) -> None:
    where = known(arch)
    for d in range(16, 257, 16):
        for dv in {16, d, 256}:
            for options in ({}, {"mask": "causal", "aligned": False}, {"softcap": True, "dropout": True, "tf32": True}):
                problem = Problem(dtype="fp32", head_dim=d, head_dim_v=dv, **options)
                FAMILY.require(problem, where, FAMILY.default(problem, where))


@pytest.mark.parametrize(
    ("name", "broken", "mended"),
    [
        ("even_share", {"tile_m": 32}, {"tile_m": 64}),
        ("even_share", {"tile_m": 256}, {"tile_m": 128}),
        ("steps_exist", {"value_steps": 8}, {"value_steps": 8, "tile_n": 64}),
        ("tf32_allowed", {"products": "single"}, {}),
        ("order_matters", {"block_order": "descending"}, {"block_order": "sectioned"}),
        ("smem_fits", {"blocks_per_sm": 4, "tile_n": 64, "stages": 3}, {"blocks_per_sm": 1, "tile_n": 64, "stages": 3}),
        ("registers_fit", {"blocks_per_sm": 4}, {"blocks_per_sm": 3}),
    ],
)
def test_each_constraint(name: str, broken: dict, mended: dict) -> None:
    problem, config = Problem(dtype="fp32", head_dim=64), SCHEMES["base"]
    told = FAMILY.rejects(problem, TARGET, config.replace(**broken))
    assert told and told[0] == name
    assert FAMILY.rejects(problem, TARGET, config.replace(**mended)) is None


def test_it_serves_float32_up_to_256() -> None:
    assert FAMILY.supports(Problem(dtype="fp32", head_dim=256), TARGET) is None
    for problem in (Problem(dtype="bf16"), Problem(dtype="fp32", head_dim=257)):
        assert FAMILY.supports(problem, TARGET)
    assert sm80_forward_fp32.smem_bytes(Problem(dtype="fp32", head_dim=64), SCHEMES["three_blocks"]) == 4 * (
        64 * 64 + 2 * 32 * (64 + 68)
    )
