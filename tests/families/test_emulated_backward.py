"""sm80_backward on the CPU (tests/emulator), against autograd: right in whatever order blocks and copies come.

Registers, rounding of the tensor cores and time are left to tests/gpu.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import pytest
import torch

from fagen.families import Config
from fagen.ops.attention import gradients, masks
from fagen.ops.attention.backward import BackwardProblem
from fagen.ops.attention.params import BackwardParams
from fagen.ops.oracle import Verdict
from fagen.runtime.kernel import Library
from fagen.target import known
from tests.support import backward, emulated
from tests.support.backward import FAMILY, SCHEMES, Case, launch, make_call, run
from tests.support.thorough import sample

SM80 = known("sm_80")
MASKS = ("none", "causal", "window", "intervals")
KINDS = ("lower1", "lower2", "both2", "both4")
SIZES = ((70, 190), (150, 70), (129, 129))


def _scheme(number: int, scheme: str) -> Case:
    """Masks, their kinds and dtypes turn from scheme to scheme, past those that a scheme cannot serve."""
    for turn in range(4):
        mask = MASKS[(number + turn) % 4]
        kind = KINDS[number // 4 % 4] if mask == "intervals" else ""
        window = (40, 20) if mask == "window" else (-1, -1)
        case = Case(scheme, mask=mask, intervals=kind, window=window, dtype=("bf16", "fp16")[number % 2], sizes=SIZES)
        if not FAMILY.rejects(case.problem, SM80, case.config):
            return case
    raise AssertionError(f"{scheme} serves no mask")


_WALKS = ("base", "held", "own_dq")  # the three ways that cells lie and keys or rows pass by
SCHEME_CASES = [_scheme(number, scheme) for number, scheme in enumerate(SCHEMES)]
WINDOW_CASES = [
    Case(name, mask="window", window=window, sizes=((100, 140), (140, 60)))
    for name, windows in zip(_WALKS, (((10, 0), (0, 0)), ((30, -1), (-1, 5)), ((0, 3), (50, 20))), strict=True)
    for window in windows
]
_KINDS = (("lower1", (-1, 0)), ("lower2", (-1, 0)), ("both2", (-1, -1)), ("both4", (60, 30)))
INTERVAL_CASES = [
    Case(name, mask="intervals", intervals=kind, window=window, sizes=((100, 230), (260, 90)), kv_heads=2, heads=4)
    for name in _WALKS
    for kind, window in _KINDS
]
_PADDED = (("smem_layout", "padded"),)
DIM_CASES = [
    Case(name, head_dim=d, head_dim_v=dv, mask=mask, dtype=dtype, sizes=((70, 100),), changes=changes)
    for name, d, dv, mask, dtype, changes in (
        ("base", 16, 0, "causal", "bf16", ()),
        ("base", 8, 0, "none", "fp16", ()),
        ("base", 40, 0, "causal", "bf16", _PADDED),
        ("base", 96, 0, "none", "fp16", _PADDED),
        ("base", 128, 64, "causal", "bf16", (("dout_stages", 1),)),
        ("base", 80, 112, "causal", "fp16", (*_PADDED, ("tile_n", 32))),
        ("small", 192, 128, "none", "bf16", _PADDED),
        ("small", 256, 0, "causal", "bf16", (("dout_stages", 1),)),
        ("held", 32, 0, "causal", "fp16", ()),
        ("held", 64, 16, "none", "bf16", ()),
        ("held", 48, 96, "causal", "bf16", _PADDED),
        ("held", 128, 0, "none", "bf16", (("q_stages", 1),)),
        ("own_dq", 64, 128, "none", "fp16", (("dq_tile_n", 16),)),
        ("own_dq", 112, 0, "causal", "bf16", _PADDED),
        ("small", 256, 0, "none", "bf16", (("dq_route", "own_kernel"), ("dq_row_warps", 1))),
        ("all_held", 80, 96, "causal", "bf16", (*_PADDED, ("q_stages", 1))),
        ("v_held", 16, 32, "none", "bf16", ()),
    )
]  # fmt: skip
GQA_CASES = [
    Case(name, heads=h, kv_heads=hk, mask=mask, sizes=((90, 130),))
    for name, mask in (("base", "causal"), ("gqa_sums", "none"), ("held_own_dq", "none"), ("held_gqa_sums", "causal"))
    for h, hk in ((2, 2), (6, 2), (3, 1))
]
SCORE_CASES = [
    Case("base", softcap=5.0),
    Case("held", softcap=2.0, mask="none", dtype="fp16"),
    Case("own_dq", softcap=5.0, alibi=True),
    Case("base", alibi=True, mask="none"),
    Case("held", alibi=True, heads=4, kv_heads=2),
    Case("own_dq", alibi=True, mask="window", window=(30, 30)),
    Case("held", mask="intervals", intervals="both4", softcap=10.0, alibi=True),
]
DLSE_CASES = [Case(name, dlse=True, softcap=softcap) for name in _WALKS for softcap in (0.0, 4.0)]
UNALIGNED_CASES = [
    Case("base", aligned=False, head_dim=50, sizes=((70, 50), (33, 65))),
    Case("held", aligned=False, head_dim=33, mask="none", dtype="fp16"),
    Case("own_dq", aligned=False, head_dim=1, head_dim_v=20),
]
LARGE_CASES = [Case(name, magnitude=magnitude) for name in _WALKS for magnitude in (8.0, 30.0)]
DETERMINISTIC = ("own_dq", "held_own_dq", "eight_own_dq", "own_dq_longest_first")
CASES = [
    *SCHEME_CASES, *WINDOW_CASES, *INTERVAL_CASES, *DIM_CASES, *GQA_CASES, *SCORE_CASES, *DLSE_CASES, *UNALIGNED_CASES,
    *LARGE_CASES,
]  # fmt: skip


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    """Each test compiles the kernel that it runs, unless some test has."""
    return cache_folder / "emulated"


@functools.cache
def _source(case: Case) -> str:
    return emulated.source(FAMILY, case.problem, SM80, case.config)


def _library(text: str, folder: Path, seed: int) -> Library:
    """On a GPU of a few SMs; `seed` decides what comes first wherever that is open."""
    library = emulated.build(text, folder, BackwardParams)
    library._library.emulator_begin(ctypes.c_uint64(seed), ctypes.c_int(2 + seed % 3))
    return library


def check(case: Case, folder: Path, rows: int, keys: int, *, seed: int = 0, text: str = "", **more) -> Verdict:
    return run(case, rows, keys, _library(text or _source(case), folder, seed), seed=seed, **more)


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(CASES, every=4), ids=str)
def test_right_whatever_comes_first(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = check(case, folder, rows, keys, seed=seed)
        assert verdict, f"{rows}x{keys}: {verdict.message}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "held", "own_dq", "gqa_sums"])
def test_two_batches_in_the_other_layout(name: str, folder: Path) -> None:
    verdict = check(Case(name, heads=4, kv_heads=2), folder, 75, 100, batch=2, layout="bhsd")
    assert verdict, verdict.message
    verdict = check(Case(name, heads=4, kv_heads=2), folder, 75, 100, batch=2)
    assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "held", "own_dq"])
def test_packed_documents(name: str, folder: Path) -> None:
    """Whole tiles are skipped, and a document ends amid a tile."""
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor((150, 17, 110, 60)))
    for causal in (True, False):
        bounds = masks.from_documents(ids[None], causal=causal).to(torch.int32)
        band = (-1, 0) if causal else (-1, -1)
        kind = "lower1" if causal else "both2"
        case = Case(name, mask="intervals", intervals=kind, window=band)
        verdict = check(case, folder, 337, 337, intervals=bounds)
        assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "held", "own_dq", "held_own_dq", "gqa_sums"])
def test_rows_and_keys_that_see_nothing(name: str, folder: Path) -> None:
    """Their gradients are 0, whatever that of their logsumexp is."""
    case = Case(name, dlse=True)
    for rows, keys in ((150, 1), (1, 150), (200, 40)):
        verdict = check(case, folder, rows, keys)
        assert verdict, verdict.message
    hidden = Case(name, mask="intervals", intervals="lower1", dlse=True)
    verdict = check(hidden, folder, 80, 90, intervals=torch.zeros(1, 1, 90, 1, dtype=torch.int32))
    assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "own_dq"])
def test_no_keys_at_all_and_no_rows(name: str, folder: Path) -> None:
    library = _library(_source(Case(name)), folder, 0)
    for rows, keys in ((70, 0), (0, 70)):
        found = launch(Case(name), make_call(Case(name), rows, keys), library)
        assert all((t == 0).all() for t in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_is_equal_in_every_bit(name: str, folder: Path) -> None:
    """Whatever comes first: each run has another order of blocks and copies, and another number of SMs."""
    mask = "none" if "longest" not in name else "causal"
    case = Case(name, mask=mask, deterministic=True, heads=4, kv_heads=2)
    call, first = make_call(case, 150, 130, seed=5), {}
    for seed in range(4):
        found = launch(case, call, _library(_source(case), folder, seed))
        first = first or found
        assert all(torch.equal(t, first[one]) for one, t in found.items())
    verdict = gradients.check(call, first)
    assert verdict, verdict.message


@pytest.mark.slow
def test_additions_one_by_one(folder: Path) -> None:
    """GPUs before sm_90 add single numbers, which lie in another order."""
    for name in ("base", "gqa_sums"):
        text = _source(Case(name))
        assert "kReduceWidth = 4" in text
        verdict = check(Case(name), folder, 90, 130, text=text.replace("kReduceWidth = 4", "kReduceWidth = 1"))
        assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (
            "base",
            "      ptx::cp_async_wait<0>();\n      __syncthreads();",
            "      __syncthreads();",
        ),  # tiles that are not there
        ("base", "      __syncthreads();  // the tile is there", "      // the tile is there"),  # or not of all threads
        ("one_stage", "if constexpr (kOneStage || (S::kTransposed && S::kAddsDq)) __syncthreads();", ""),
        ("held", "if constexpr (kOneStage || (S::kTransposed && S::kAddsDq)) __syncthreads();", ""),
        ("base", "    if constexpr (!S::kTransposed) __syncthreads();\n", ""),  # P and dS that are not there yet
    ],
)
def test_who_does_not_wait_is_wrong(name: str, old: str, new: str, folder: Path) -> None:
    case = Case(name, mask="none")
    text = _source(case)
    assert old in text
    text = text.replace(old, new)
    assert not all(check(case, folder, 130, 130, seed=seed, text=text) for seed in range(6))


# ---- the family ------------------------------------------------------------------------------------------------------


def test_every_value_of_every_knob_is_run() -> None:
    for knob in FAMILY.knobs:
        assert {scheme[knob.name] for scheme in SCHEMES.values()} == set(knob.choices), knob.name


def test_schemes_and_cases_are_legal() -> None:
    for case in CASES:
        FAMILY.require(case.problem, SM80, case.config)


def _scheme_with(name: str, **changes: object) -> Config:
    return backward.config(**{**SCHEMES[name], **changes})


@pytest.mark.parametrize(
    ("constraint", "wrong_config", "right_config", "changes"),
    [
        ("even_share", _scheme_with("base", row_warps=4), _scheme_with("base"), {}),
        ("even_share", _scheme_with("base", key_warps=8), _scheme_with("base", key_warps=4), {}),
        ("one_scheme", _scheme_with("held", key_warps=2), _scheme_with("held"), {}),
        ("one_scheme", _scheme_with("base", dq_tile_n=32), _scheme_with("base"), {}),
        ("one_scheme", _scheme_with("own_dq", warps=8, tile_m=64, tile_n=128), _scheme_with("own_dq"), {}),
        ("reproducible", _scheme_with("base"), _scheme_with("own_dq"), {"deterministic": True}),
        ("reproducible", _scheme_with("own_dq", gqa="atomics"), _scheme_with("own_dq"), {"deterministic": True}),
        ("order_matters", _scheme_with("longest_first"), _scheme_with("base"), {"mask": "none"}),
        ("parts_begin_well", _scheme_with("base"), _scheme_with("base", smem_layout="padded"), {"head_dim": 96}),
        ("smem_fits", _scheme_with("one_q_stage", blocks_per_sm=2), _scheme_with("one_q_stage"), {"head_dim": 160}),
        ("registers_fit", _scheme_with("all_held", tile_m=128), _scheme_with("all_held"), {"head_dim": 128}),
    ],
)  # fmt: skip
def test_a_constraint_rejects_one_config_and_accepts_its_neighbour(constraint, wrong_config, right_config, changes):
    problem = BackwardProblem(**{"head_dim": 64, "mask": "causal", **changes})
    broken = FAMILY.rejects(problem, SM80, wrong_config)
    assert broken and broken[0] == constraint, broken
    assert FAMILY.rejects(problem, SM80, right_config) is None


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_every_legal_problem_has_a_legal_default(arch: str) -> None:
    where = known(arch)
    for d in range(16, 257, 16):
        for dv in (d, 16, 128, 256):
            for mask in ("none", "causal"):
                for deterministic in (False, True):
                    problem = BackwardProblem(head_dim=d, head_dim_v=dv, mask=mask, deterministic=deterministic)
                    FAMILY.require(problem, where, FAMILY.default(problem, where))


def test_many_blocks_go_head_by_head() -> None:
    """A head's tiles side by side read the same rows; few blocks go by length, so that none is long at the end."""
    for mask, batch, order in (("causal", 16, "ascending"), ("causal", 1, "longest_first"), ("none", 1, "ascending")):
        problem = BackwardProblem(head_dim=256, mask=mask, batch=batch, heads=8, seqlen_q=1024)
        assert FAMILY.default(problem, known("sm_90")).block_order == order
        reads = FAMILY.default_reads(problem, known("sm_90"))
        assert reads == (() if mask == "none" else (batch == 1,))


def test_the_cost_model_prefers_what_computes_less() -> None:
    """dQ's own kernel computes S and dP twice; 16 rows at a time read the keys more often than 64."""
    assert FAMILY.cost is not None
    problem = BackwardProblem(head_dim=128, mask="causal", heads=16, batch=2, seqlen_q=4096)
    where = known("sm_90")
    default = FAMILY.default(problem, where)
    deterministic = FAMILY.default(problem.replace(deterministic=True), where)
    assert FAMILY.cost(problem, where, default) < FAMILY.cost(problem, where, deterministic)
    assert FAMILY.cost(problem, where, default) < FAMILY.cost(problem, where, default.replace(tile_m=16))
