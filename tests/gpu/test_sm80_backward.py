"""sm80_backward on a GPU against autograd: every knob value, ragged sizes, all masks, GQA, head dims, equal bits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fagen import target
from fagen.codegen.spec import KernelSpec
from fagen.ops.attention import gradients
from fagen.runtime import kernel
from fagen.runtime.kernel import Library
from tests.support.backward import FAMILY, SCHEMES, Case, launch, make_call, run
from tests.support.cases import build_specs, present

# below, at and above the edges of 16, 32, 64, 96 and 128; q longer than k, k longer than q, one row, one key
EDGES = ((1, 1), (1, 77), (15, 17), (64, 64), (63, 97), (129, 127), (257, 255), (129, 333), (333, 129))

_LEGAL = [name for name in SCHEMES if not FAMILY.rejects(Case(name).problem, target.known("sm_80"), SCHEMES[name])]
SCHEME_CASES = [
    Case(name, mask=mask, dtype=dtype, sizes=EDGES, heads=4, kv_heads=2)
    for name in _LEGAL
    for mask, dtype in (("causal", "bf16"), ("none", "fp16"))
    if mask == "causal" or SCHEMES[name].block_order == "ascending"
]
_WALKS = ("base", "held", "own_dq", "held_own_dq", "eight")
WINDOW_CASES = [
    Case(name, mask="window", window=window, sizes=((300, 300), (300, 200), (100, 400)))
    for name in _WALKS
    for window in ((50, 20), (10, 0), (70, -1), (-1, 5), (0, 0))
]
_INTERVALS = (
    ("lower1", (-1, 0)), ("lower1", (-1, -1)), ("lower2", (-1, 0)), ("both2", (-1, -1)), ("both4", (-1, -1)),
    ("both4", (100, 30)),
)  # fmt: skip
INTERVAL_CASES = [
    Case(name, mask="intervals", intervals=kind, window=window, heads=4, kv_heads=2,
         sizes=((300, 300), (1500, 300), (300, 1500), (77, 40)))
    for name in _WALKS
    for kind, window in _INTERVALS
]  # fmt: skip
GQA_CASES = [
    Case(name, heads=h, kv_heads=hk, mask=mask, sizes=((130, 190),))
    for name in ("base", "gqa_sums", "held_own_dq", "held_gqa_sums")
    for h, hk in ((8, 8), (8, 4), (8, 1), (6, 3))
    for mask in ("causal", "none")
    if mask == "causal" or SCHEMES[name].block_order == "ascending"
]
SCORE_CASES = [
    Case(name, softcap=softcap, alibi=alibi, mask=mask, dlse=dlse, sizes=((200, 200),))
    for name in ("base", "held", "own_dq")
    for softcap, alibi, mask, dlse in (
        (20.0, False, "none", False), (5.0, True, "causal", True), (0.0, True, "none", False),
        (0.0, False, "causal", True),
    )
]  # fmt: skip
DROPOUT_CASES = [
    Case(name, dropout=0.1, mask=mask, sizes=((200, 230), (70, 300)))
    for name in ("base", "held", "own_dq", "ninety_six", "gqa_sums")
    for mask in ("none", "causal")
]
UNALIGNED_CASES = [
    Case(name, aligned=False, head_dim=d, mask=mask, dtype=dtype, sizes=((150, 90), (33, 65)))
    for name in ("base", "held", "own_dq")
    for d, mask, dtype in ((50, "causal", "bf16"), (64, "none", "fp16"), (33, "none", "bf16"), (1, "causal", "bf16"))
]
LARGE_CASES = [Case(name, magnitude=m, sizes=((200, 200),)) for name in _WALKS for m in (8.0, 30.0)]
ALL = [
    *SCHEME_CASES, *WINDOW_CASES, *INTERVAL_CASES, *GQA_CASES, *SCORE_CASES, *DROPOUT_CASES,
    *UNALIGNED_CASES, *LARGE_CASES,
]  # fmt: skip

_DIMS = (
    (8, 0), (16, 0), (32, 0), (40, 0), (64, 128), (72, 0), (80, 0), (96, 0), (112, 0), (128, 0), (192, 128), (192, 0),
    (224, 0), (240, 0), (256, 0), (256, 64),
)  # fmt: skip
# of each problem its default: what people run
DEFAULT_CASES = [
    Case("base", head_dim=d, head_dim_v=dv, mask=mask, dtype=dtype, deterministic=deterministic, heads=4, kv_heads=2,
         window=(40, 10) if mask == "window" else (-1, -1), sizes=((150, 170), (400, 400)))
    for (d, dv), dtype, mask, deterministic in zip(
        _DIMS * 3,
        ("bf16", "fp16") * 24,
        ("causal", "none", "window") * 16,
        (False, False, True, True) * 12,
        strict=True,
    )
]  # fmt: skip


def _spec(case: Case, default: bool = False) -> KernelSpec:
    problem, where = case.problem, present()
    return KernelSpec(FAMILY, problem, where, FAMILY.default(problem, where) if default else case.config)


@functools.cache
def _library(case: Case, default: bool = False) -> Library:
    return kernel.get(_spec(case, default)).library


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    jobs = [*((case, False) for case in ALL), *((case, True) for case in DEFAULT_CASES)]
    build_specs(_spec(*job) for job in jobs)


def check(case: Case, default: bool = False, **options: Any) -> None:
    library, stream = _library(case, default), torch.cuda.current_stream().cuda_stream
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = run(case, rows, keys, library, stream, seed=seed, batch=2, device="cuda", **options)
        assert verdict, f"{rows}x{keys}: {verdict.message}"


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_autograd(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", DEFAULT_CASES, ids=str)
def test_defaults_against_autograd(case: Case) -> None:
    check(case, default=True)


@pytest.mark.parametrize("name", ["base", "held", "own_dq", "gqa_sums"])
def test_other_layout(name: str) -> None:
    check(Case(name, heads=4, kv_heads=2), layout="bhsd")


@pytest.mark.parametrize("name", ["base", "held", "own_dq", "held_own_dq", "gqa_sums"])
def test_rows_and_keys_that_see_nothing(name: str) -> None:
    check(Case(name, dlse=True, sizes=((300, 100), (300, 1), (1, 300))))


@pytest.mark.parametrize("name", ["own_dq", "held_own_dq", "eight_own_dq", "own_dq_longest_first"])
def test_a_thousand_runs_are_bitwise_equal(name: str) -> None:
    case = Case(name, deterministic=True, heads=4, kv_heads=2)
    call, stream = make_call(case, 400, 400, batch=2, device="cuda"), torch.cuda.current_stream().cuda_stream
    first: dict[str, torch.Tensor] = {}
    for _ in range(1000):
        found = launch(case, call, _library(case), stream)
        first = first or found
        assert all(torch.equal(t, first[one]) for one, t in found.items())
    verdict = gradients.check(call, first)
    assert verdict, verdict.message


def test_every_value_of_every_knob_is_run() -> None:
    for knob in FAMILY.knobs:
        assert {SCHEMES[name][knob.name] for name in _LEGAL} == set(knob.choices), knob.name
