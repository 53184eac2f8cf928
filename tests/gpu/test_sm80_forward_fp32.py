"""sm80_forward_fp32 on a GPU against the oracle: every knob value, ragged sizes, all masks, head dims from 1 to 256."""

from __future__ import annotations

import pytest
import torch

from fagen.families import sm80_forward_fp32
from tests.gpu.test_sm80_forward import EDGES
from tests.support import cases
from tests.support.cases import run
from tests.support.fp32 import BANDS, DIM_CASES, HEAD_DIMS, SCHEME_CASES, SCHEMES, Case

_INTERVALS = ("lower1", "lower2", "both2", "both4")
ALL = [
    *SCHEME_CASES,
    *DIM_CASES,
    *(Case(name, mask="none", head_dim=HEAD_DIMS.get(name, 64)) for name in SCHEMES if name != "single"),
    *(Case("default", mask=mask, window=BANDS[mask], head_dim=d) for d in (32, 128, 256) for mask in BANDS),
    *(Case("default", mask="intervals", intervals=kind, head_dim=128) for kind in _INTERVALS),
    *(Case("default", mask="causal", head_dim=d, tf32=True) for d in (32, 64, 128, 256)),
    *(Case("default", softcap=15.0, alibi=True, dropout=0.3, head_dim=d) for d in (48, 128)),
    *(Case("default", heads=h, kv_heads=hk) for h, hk in ((8, 8), (8, 1), (6, 3))),
    *(Case("default", magnitude=m) for m in (3.0, 8.0)),
]  # fmt: skip
ALL = [case for case in ALL if case.mask != "intervals" or case.intervals]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    cases.build_all(list(ALL))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_the_oracle(case: Case) -> None:
    where = cases.present()
    if reason := sm80_forward_fp32.FAMILY.rejects(case.problem, where, case.config):
        pytest.skip(f"not on {where.arch}: {reason[1]}")
    for seed, (rows, keys) in enumerate(EDGES if case.head_dim <= 128 else EDGES[::3]):
        verdict = run(case, rows, keys, seed=seed, layout=("bshd", "bhsd")[seed % 2])
        assert verdict, f"{rows}x{keys}: {verdict.message}"


def test_many_keys_are_as_exact_as_in_float32() -> None:
    """Long sums do not lean towards 0, also where all of v has one sign."""
    g = torch.Generator("cuda").manual_seed(5)
    q, k, v = (torch.randn(1, rows, 2, 128, device="cuda", generator=g) for rows in (128, 32768, 32768))
    case = Case("default", mask="none", head_dim=128, heads=2)
    call, out = case.call(q, k, v.abs()), torch.full_like(q, torch.nan)
    cases.kernel_of(case).launch(call, {"out": out, "lse": (lse := torch.zeros(1, 2, 128, device="cuda"))})
    verdict = cases.reference.check(call, {"out": out, "lse": lse})
    assert verdict, verdict.message


@pytest.mark.parametrize("name", ["base", "three_stages", "one_stage"])
def test_the_same_bits_every_time(name: str) -> None:
    g = torch.Generator("cuda").manual_seed(3)
    size = HEAD_DIMS.get(name, 64)
    q, k, v = (torch.randn(2, 400, 4, size, device="cuda", generator=g) for _ in range(3))
    case = Case(name, kv_heads=4, head_dim=size)
    kernel, call = cases.kernel_of(case), case.call(q, k, v)
    seen = []
    for _ in range(20):
        out, lse = torch.full_like(q, torch.nan), torch.full((2, 4, 400), torch.nan, device="cuda")
        kernel.launch(call, {"out": out, "lse": lse})
        seen.append((out, lse))
    assert all(torch.equal(out, seen[0][0]) and torch.equal(lse, seen[0][1]) for out, lse in seen)


def test_every_scheme_is_legal_somewhere() -> None:
    assert {case.scheme for case in ALL} >= set(SCHEMES)
