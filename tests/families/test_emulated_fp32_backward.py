"""sm80_backward_fp32 on the CPU (tests/emulator), against autograd: right whatever comes first.

The emulator cuts the tensor cores' sums as the hardware does, so that the accuracy is that of a GPU as well. Registers
and time are left to tests/gpu.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch

from fagen import families
from fagen.families import sm80_backward_fp32, sm80_forward_fp32
from fagen.ops.attention import gradients
from fagen.ops.attention.backward import BackwardProblem
from fagen.ops.attention.params import BackwardParams
from fagen.ops.oracle import Verdict
from fagen.target import known
from tests.support import emulated
from tests.support.backward import launch, make_call, run
from tests.support.fp32_backward import DIM_CASES, FAMILY, FEATURE_CASES, SCHEME_CASES, SCHEMES, Case
from tests.support.thorough import sample

TARGET = known("sm_90")
SMALL = Case("small", head_dim=16, mask="causal", dlse=True)
ADDED = dataclasses.replace(SMALL, scheme="added_small")


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    """Each test compiles the kernel that it runs, unless some test has."""
    return cache_folder / "emulated"


@functools.cache
def _source(case: Case) -> str:
    return emulated.source(FAMILY, case.problem, TARGET, case.config)


def _library(folder: Path, text: str, seed: int = 0):
    library = emulated.build(text, folder, BackwardParams)
    library._library.emulator_begin(ctypes.c_uint64(seed), ctypes.c_int(3))
    return library


def check(case: Case, folder: Path, rows: int, keys: int, *, seed: int = 0, text: str = "", **more) -> Verdict:
    return run(case, rows, keys, _library(folder, text or _source(case), seed), seed=seed, **more)


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(SCHEME_CASES, every=3), ids=str)
def test_every_scheme(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = check(case, folder, rows, keys, seed=seed, layout=("bshd", "bhsd")[seed])
        assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("case", sample([*DIM_CASES, *FEATURE_CASES], every=7), ids=str)
def test_head_dims_and_features(case: Case, folder: Path) -> None:
    for rows, keys in case.sizes:
        verdict = check(case, folder, rows, keys)
        assert verdict, verdict.message


@pytest.mark.parametrize("case", [SMALL, ADDED], ids=str)
def test_rows_and_keys_that_see_nothing(case: Case, folder: Path) -> None:
    """Their gradients are 0, whatever that of their logsumexp is."""
    for rows, keys in ((70, 1), (1, 70), (100, 40)):
        verdict = check(case, folder, rows, keys)
        assert verdict, verdict.message
    hidden = dataclasses.replace(case, mask="intervals", intervals="lower1")
    verdict = check(hidden, folder, 40, 50, intervals=torch.zeros(1, 1, 50, 1, dtype=torch.int32))
    assert verdict, verdict.message


@pytest.mark.parametrize("case", [SMALL, ADDED], ids=str)
def test_sizes_at_the_edges_of_tiles(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(((1, 1), (16, 32), (32, 16), (33, 31), (31, 65), (15, 17))):
        verdict = check(case, folder, rows, keys, seed=seed, batch=2)
        assert verdict, f"{rows}x{keys}: {verdict.message}"


def test_long_sums_do_not_lean_towards_0(folder: Path) -> None:
    """The tensor cores cut each sum of products; with values of one sign that adds up."""
    case = dataclasses.replace(SMALL, mask="none", dlse=False, heads=1)
    call = make_call(case, 1000, 16)
    positive = dataclasses.replace(call, dout=call.dout.abs() + 1)
    assert _FRESH in _source(case) and _ADDED in _source(case)
    found = []
    for text in (_source(case), _source(case).replace(_FRESH, _KEPT).replace(_ADDED, _LOW)):
        outputs = launch(case, positive, _library(folder, text))
        found.append(gradients.check(positive, {"dv": outputs["dv"]}))
    fresh, kept = found
    assert fresh, fresh.message
    assert kept.error > 4 * fresh.error


@pytest.mark.parametrize("case", [SMALL, ADDED], ids=str)
def test_sums_over_many_rows_are_sums_of_shorter_ones(case: Case, folder: Path) -> None:
    """Each float32 addition rounds to the size that the sum has reached, here 4096 rows of one sign."""
    case = dataclasses.replace(case, mask="none", dlse=False, heads=1)
    call = make_call(case, 4096, 16)
    positive = dataclasses.replace(call, dout=call.dout.abs() + 1)
    want = gradients.gradients(positive, torch.float64)["dv"]
    assert _SHORT in _source(case)
    errors = []
    for text in (_source(case), _source(case).replace(_SHORT, "kRowsOfSum = 4096;")):
        dv = launch(case, positive, _library(folder, text))["dv"]
        errors.append(float((positive.of_bhsd(dv).double() - want).abs().max() / want.abs().max()))
    short, one = errors
    assert short < 4 * torch.finfo(torch.float32).eps < one


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        dataclasses.replace(ADDED, aligned=False, heads=4, kv_heads=2),
        Case("small", head_dim=40, mask="intervals", intervals="both4"),
    ],
    ids=str,
)
def test_what_memory_adds_up(case: Case, folder: Path) -> None:
    """Sums of two tiles each: of rows of several heads, of keys, of parts of tiles."""
    text = _source(case).replace(_SHORT, "kRowsOfSum = 32;")
    for seed, (rows, keys) in enumerate(((150, 70), (70, 150))):
        verdict = check(case, folder, rows, keys, seed=seed, text=text)
        assert verdict, verdict.message


def test_large_scores_by_the_lse_of_forward(folder: Path) -> None:
    """Its scores are the same sums, so that their errors cancel in the weights."""
    case = dataclasses.replace(SMALL, dlse=False)
    problem, forward = case.problem.forward, sm80_forward_fp32.FAMILY
    text = emulated.source(forward, problem, TARGET, forward.default(problem, TARGET))
    for seed, magnitude in enumerate((2.0, 4.0, 8.0)):
        call = make_call(dataclasses.replace(case, magnitude=magnitude), 60, 60, seed=seed)
        made = {"out": torch.full_like(call.o, torch.nan), "lse": torch.full_like(call.lse, torch.nan)}
        emulated.launch(emulated.build(text, folder), call.forward, made)
        call = dataclasses.replace(call, o=made["out"], lse=made["lse"])
        verdict = gradients.check(call, launch(case, call, _library(folder, _source(case))))
        assert verdict, verdict.message


_SHORT = "kRowsOfSum = 1024;"
# in place of sums that start from 0 for each tile, one sum from the first row to the last
_FRESH = "float high[kSlabs][4][4] = {}, low[kSlabs][4][4] = {};"
_KEPT = "float low[kSlabs][4][4] = {}; auto& high = reinterpret_cast<float(&)[kSlabs][4][4]>(sums[0][q * 4]);"
_ADDED = "sums[s][q * 4 + j][i] += high[s][j][i] + low[s][j][i];"
_LOW = "sums[s][q * 4 + j][i] += low[s][j][i];"


def test_a_kernel_serves_every_smaller_head_dim(folder: Path) -> None:
    """As emitted kernels are used; larger ones it refuses."""
    case = dataclasses.replace(SMALL, head_dim=48, head_dim_v=32, aligned=False)
    for d, dv in ((1, 1), (10, 32), (47, 5)):
        verdict = check(dataclasses.replace(case, head_dim=d, head_dim_v=dv), folder, 40, 70, text=_source(case))
        assert verdict, verdict.message
    with pytest.raises(AssertionError):
        check(dataclasses.replace(case, head_dim=49), folder, 40, 70, text=_source(case))


# each leaves out what orders reads and writes, what hides keys, or what the tensor cores leave out of an operand
_BREAKS = {
    "no wait": ("ptx::cp_async_wait<P::kStages - 2>();", ""),
    "no barrier": ("__syncthreads();\n      copy_next(stage", "copy_next(stage"),
    "no mask": ("hidden = offset < seen[i].begin;", ""),
    "no delta": ("gradient - row.delta", "gradient"),
    "no low part": ("ptx::mma_m16n8k8(sums, a.high, b.low);", ""),
}


_ADDED_BREAKS = {
    "no barrier for dQ": ("first);\n    __syncthreads();\n    const auto dq", "first);\n    const auto dq"),
    "no barrier of one stage": ("__syncthreads();\n      copy_next(0)", "copy_next(0)"),
    "no zeros": ("dq.row(row)[i] = 0.f", ""),
}


@pytest.mark.parametrize("name", [*_BREAKS, *_ADDED_BREAKS])
def test_what_is_left_out_is_found(name: str, folder: Path) -> None:
    case, (old, new) = (SMALL, _BREAKS[name]) if name in _BREAKS else (ADDED, _ADDED_BREAKS[name])
    text = _source(case)
    assert old in text
    found = []
    for seed in range(3):
        try:
            found.append(bool(check(case, folder, 40, 70, seed=seed, text=text.replace(old, new))))
        except AssertionError:
            found.append(False)
    assert not all(found)


def test_no_load_has_a_bank_conflict() -> None:
    """Eight lanes at a time read 16 bytes each; a row's length is a multiple of 128 bytes."""
    found = re.search(r"int turn\(int row\) { return ([^;]+); }", _source(SMALL))
    assert found
    turns = [eval(found[1].replace("/", "//"), {"row": row}) for row in range(8)]
    for first in range(0, 32, 8):
        lanes = range(first, first + 8)
        assert len({(lane % 4) ^ turns[lane // 4] for lane in lanes}) == 8  # of scores
        for i in range(2):
            assert len({(lane // 4) ^ turns[lane % 4 * 2 + i] for lane in lanes}) == 8  # of sums


def test_every_value_of_every_knob_is_run() -> None:
    for knob in FAMILY.knobs:
        assert {scheme[knob.name] for scheme in SCHEMES.values()} == set(knob.choices), knob.name
    for case in SCHEME_CASES:
        FAMILY.require(case.problem, TARGET, case.config)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120"])
def test_every_problem_has_a_default(arch: str) -> None:
    where = known(arch)
    for d in range(16, 257, 16):
        for dv in {16, d, 256}:
            for options in ({}, {"mask": "causal", "aligned": False}, {"dropout": True}, {"deterministic": True}):
                problem = BackwardProblem(dtype="fp32", head_dim=d, head_dim_v=dv, **options)
                FAMILY.require(problem, where, FAMILY.default(problem, where))


@pytest.mark.parametrize(
    ("name", "broken", "mended"),
    [
        ("even_share", {"tile_n": 32}, {"tile_n": 64}),
        ("even_share", {"dq_tile_m": 256}, {"dq_tile_m": 128}),
        ("pieces_exist", {"score_pieces": 4, "tile_m": 16}, {"score_pieces": 4, "tile_m": 32}),
        ("one_route", {"dq_route": "atomics"}, {"dq_route": "atomics", "dq_tile_n": 16}),
        ("smem_fits", {"blocks_per_sm": 3, "stages": 3}, {"blocks_per_sm": 2, "stages": 3}),
        ("registers_fit", {"tile_n": 128}, {"tile_n": 128, "key_passes": "two"}),
    ],
)
def test_each_constraint(name: str, broken: dict, mended: dict) -> None:
    problem, config = BackwardProblem(dtype="fp32", head_dim=64), SCHEMES["base"]
    told = FAMILY.rejects(problem, TARGET, config.replace(**broken))
    assert told and told[0] == name
    assert FAMILY.rejects(problem, TARGET, config.replace(**mended)) is None


def test_the_same_bits_need_a_pass_for_dq() -> None:
    problem = BackwardProblem(dtype="fp32", head_dim=64, deterministic=True)
    assert FAMILY.rejects(problem, TARGET, SCHEMES["base"]) is None
    told = FAMILY.rejects(problem, TARGET, SCHEMES["added"])
    assert told and told[0] == "one_route"


def test_it_serves_float32_up_to_256() -> None:
    assert FAMILY.supports(BackwardProblem(dtype="fp32", head_dim=256), TARGET) is None
    for problem in (BackwardProblem(dtype="bf16"), BackwardProblem(dtype="fp32", head_dim=257)):
        assert FAMILY.supports(problem, TARGET)
    of_dq = sm80_backward_fp32.smem_bytes(BackwardProblem(dtype="fp32", head_dim=48), SCHEMES["base"], "dq")
    assert of_dq == 4 * (64 + 2 * 32) * (64 + 64)


def test_calls_go_to_it_but_for_wider_heads() -> None:
    problem = BackwardProblem(dtype="fp32", head_dim=64)
    assert [family.name for family in families.serving(problem, TARGET)[0]] == [FAMILY.name]
    wide = BackwardProblem(dtype="fp32", head_dim=264)
    assert [family.name for family in families.serving(wide, TARGET)[0]] == ["simt_backward"]
