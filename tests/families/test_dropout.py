"""Kernels with dropout against the oracle, which drops by the definition: the same weights whatever the config."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from fagen.families import all_families
from fagen.ops.attention import reference
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.params import BackwardParams, make_params
from fagen.runtime.kernel import Kernel
from fagen.target import known
from tests.families import test_cpu_backward as cpu_backward
from tests.families import test_cpu_forward as cpu_forward
from tests.families import test_emulated_sm90_backward as sm90_backward
from tests.support import backward, emulated
from tests.support.backward import Case as BackwardCase
from tests.support.cases import HOPPER, Case, rng_of, run
from tests.support.thorough import sample

SIZES = [(1, 1), (33, 70), (130, 257), (200, 47)]
MASKS = ("causal", "window", "intervals")


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    return cache_folder / "emulated"


# ---- the CPU ---------------------------------------------------------------------------------------------------------


def _cpu_call(k: Kernel, rows: int, keys: int, rate: float, layout: str = "bhsd") -> AttentionCall:
    p = k.spec.problem
    q, key, v = cpu_forward.inputs(k, rows, keys, batch=2, heads=4, kv_heads=2)
    window = {"causal": (-1, 0), "window": (40, 9)}.get(p.mask, (-1, -1))
    bounds = cpu_forward.random_intervals(p.intervals, 2, 2, rows, keys) if p.intervals else None
    return AttentionCall(
        q, key, v, layout, window, bounds, p.intervals, want_lse=True, dropout=rate, rng=rng_of("cpu", rows)
    )  # fmt: skip


def _static(number: int) -> dict[str, Any]:
    mask = MASKS[number % 3]
    return {"mask": mask, "intervals": "both2" if mask == "intervals" else "", "head_dim": 16, "dropout": True}


@pytest.mark.slow
@pytest.mark.parametrize("number", sample(range(len(cpu_forward.CONFIGS)), every=6))
def test_cpu_forward(number: int) -> None:
    k = cpu_forward.build(changes=tuple(cpu_forward.CONFIGS[number].items()), **_static(number))
    for rows, keys in SIZES:
        call = _cpu_call(k, rows, keys, (0.1, 0.5)[number % 2])
        outputs = {name: t.fill_(torch.nan) for name, t in call.new_outputs().items()}
        k.launch(call, outputs)
        verdict = reference.check(call, outputs)
        assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("number", sample(range(len(cpu_backward.CONFIGS)), every=6))
def test_cpu_backward(number: int) -> None:
    k = cpu_backward.build(changes=tuple(cpu_backward.CONFIGS[number].items()), **_static(number + 1))
    for rows, keys in SIZES:
        forward = _cpu_call(k, rows, keys, (0.1, 0.5)[number % 2])
        random = torch.Generator().manual_seed(rows)
        dout, dlse = torch.randn(forward.q.shape, generator=random), torch.randn(2, 4, rows, generator=random)
        cpu_backward.verify(k, cpu_backward.after(forward, dout, dlse))


def test_cpu_kernels_check_seed_and_rate() -> None:
    k = cpu_forward.build(**_static(0))
    call = _cpu_call(k, 20, 20, 0.3)
    outputs = call.new_outputs()
    params = make_params(call, outputs)
    assert k.library.launch(ctypes.byref(params), None) == 0
    params.rng = None
    assert b"null" in k.library.error(k.library.launch(ctypes.byref(params), None))
    for rate, kept in ((0.0, True), (1.0, False)):  # all weights, or none
        call = _cpu_call(k, 20, 20, rate)
        params = make_params(call, outputs)
        assert k.library.launch(ctypes.byref(params), None) == 0
        assert ((outputs["out"] != 0) == kept).all()


# ---- GPUs, on the emulator -------------------------------------------------------------------------------------------

FORWARD = [
    Case("base", dropout=0.1, mask="none"),
    Case("tma_one_group", dropout=0.5),  # tiles of 80 keys: half a call of Philox is left over
    Case("tma_three_groups", mask="intervals", intervals="both2", dropout=0.1),  # row and key tiles begin anywhere
    Case("overlap", dropout=0.1),
    Case("two_warps", dropout=0.1, mask="window", window=(50, 20)),  # tiles of 48 keys
    Case("split_k", dropout=0.5),
    Case("pairs", dropout=0.1, dtype="fp16"),
    Case("kv_outer", dropout=0.1, alibi=True),
    Case("tma_shared_weights", dropout=0.1),
    Case("tma_turns", dropout=0.1, softcap=10.0, dtype="fp16"),
    Case("tma", mask="intervals", intervals="lower1", dropout=0.5, window=(-1, 0)),
]
BACKWARD = [
    BackwardCase("base", dropout=0.1, mask="none"),
    BackwardCase("held", dropout=0.5),
    BackwardCase("held_own_dq", dropout=0.1, mask="window", window=(40, 20), softcap=4.0),
    BackwardCase("ninety_six", dropout=0.1, dtype="fp16"),
    BackwardCase("gqa_sums", dropout=0.1, heads=4, kv_heads=2, mask="intervals", intervals="both2", dlse=True),
    BackwardCase("eight_held", dropout=0.1, alibi=True),
    BackwardCase("small", dropout=0.1, head_dim=80, changes=(("smem_layout", "padded"),)),
]

_Sm90Case = sm90_backward.Case
SM90_BACKWARD = [
    _Sm90Case("base", dropout=0.1, mask="none"),
    _Sm90Case("shared", dropout=0.5),  # rows down, not keys
    _Sm90Case("long_tiles", dropout=0.1, mask="intervals", intervals="both2"),
    _Sm90Case("held_v", dropout=0.1, softcap=2.0, dtype="fp16"),
    _Sm90Case("shared_first_owner", dropout=0.1, mask="window", window=(40, 9)),  # 48 keys a warpgroup
    _Sm90Case("three_groups", dropout=0.5),  # numbers are drawn late
    _Sm90Case("one_group", dropout=0.1, alibi=True),
    _Sm90Case("red", dropout=0.1, mask="causal"),  # dV begins before dS
    _Sm90Case("stored_first_shared_one_owner", dropout=0.1, dtype="fp16"),
    _Sm90Case("last_block_long_tiles", dropout=0.1, dtype="fp16"),
]


@functools.cache
def _source(case: Case | BackwardCase) -> str:
    family = case.family if isinstance(case, Case) else backward.FAMILY
    target = known("sm_90" if family is HOPPER else "sm_80")
    family.require(case.problem, target, case.config)
    return emulated.source(family, case.problem, target, case.config)


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(FORWARD, every=4), ids=str)
def test_forward_whatever_comes_first(case: Case, folder: Path) -> None:
    launch = functools.partial(emulated.launch, emulated.build(_source(case), folder))
    for seed, (rows, keys) in enumerate(((130, 190), (70, 300))):
        verdict = run(case, rows, keys, seed=seed, batch=2, device="cpu", launch=functools.partial(launch, seed=seed))
        assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(BACKWARD, every=3), ids=str)
def test_backward_whatever_comes_first(case: BackwardCase, folder: Path) -> None:
    library = emulated.build(_source(case), folder, BackwardParams)
    for seed, (rows, keys) in enumerate(((70, 190), (150, 70))):
        library._library.emulator_begin(ctypes.c_uint64(seed), ctypes.c_int(3))
        verdict = backward.run(case, rows, keys, library, seed=seed, batch=2)
        assert verdict, f"{rows}x{keys}: {verdict.message}"


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(SM90_BACKWARD, every=3), ids=str)
def test_sm90_backward_whatever_comes_first(case: sm90_backward.Case, folder: Path) -> None:
    sm90_backward.FAMILY.require(case.problem, sm90_backward.TARGET, case.config)
    for seed, (rows, keys) in enumerate(((70, 210), (150, 70))):
        sm90_backward.check(case, folder, rows, keys, seed=seed, units=(2, 40)[seed], batch=2, dlse=True)


def test_sm90_backward_takes_keys_by_16() -> None:
    case = _Sm90Case("shared_red", dropout=0.1)  # 40 keys a warpgroup
    found = sm90_backward.FAMILY.rejects(case.problem, sm90_backward.TARGET, case.config)
    assert found and "keys by 16" in found[1]
    assert not sm90_backward.FAMILY.rejects(case.problem.replace(dropout=False), sm90_backward.TARGET, case.config)


# ---- what is wrong is found ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("batch * p.heads + head", "head"),  # batches would share a mask
        ("uint32_t(line) % 8 / 2", "uint32_t(line) % 4 / 2"),  # and rows
        ("kept ? gradient * dropout.scale : 0.f", "gradient"),  # dP as if nothing were dropped
        ("score = kept ? score : 0.f", "score = score"),  # dV of all weights
    ],
)
def test_another_mask_is_wrong(old: str, new: str, folder: Path) -> None:
    case = BACKWARD[0]
    text = _source(case)
    assert old in text
    library = emulated.build(text.replace(old, new), folder, BackwardParams)
    library._library.emulator_begin(ctypes.c_uint64(0), ctypes.c_int(3))
    assert not backward.run(case, 70, 100, library, batch=2)


def test_every_family_serves_dropout() -> None:
    told = {}
    for family in (family for family in all_families() if family.op in ("forward", "backward")):
        problem = backward.BackwardProblem if family.op == "backward" else Case("base").problem.__class__
        dtype = "fp32" if family.name.startswith("cpu") or "bf16" not in family.dtypes else "bf16"
        target = known("cpu" if family.name.startswith("cpu") else "sm_90")
        told[family.name] = family.supports(problem(dtype=dtype, dropout=True), target)
    refusing = {name for name, reason in told.items() if reason}
    assert refusing == {
        "cpu_few_rows",
        "sm90_forward_large",
        "sm90_backward_large",
    }  # cpu_forward and PyTorch do it there
