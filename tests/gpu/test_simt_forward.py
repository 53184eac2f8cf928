"""simt_forward on a GPU against the oracle: every knob value, ragged sizes, all masks, head dims from 1 to 1024."""

from __future__ import annotations

import pytest
import torch

from fagen.families import simt_forward
from tests.gpu.test_sm80_forward import EDGES
from tests.support import cases
from tests.support.cases import run
from tests.support.simt import BANDS, DIM_CASES, FEATURE_CASES, HEAD_DIMS, SCHEME_CASES, SCHEMES, Case

_INTERVALS = ("lower1", "lower2", "both2", "both4")
ALL = [
    *SCHEME_CASES,
    *DIM_CASES,
    *FEATURE_CASES,
    *(Case(name, mask="none", head_dim=HEAD_DIMS.get(name, 64)) for name in ("base", "many_lanes", "registers")),
    *(Case("default", mask=mask, window=BANDS[mask], head_dim=d) for d in (32, 256) for mask in ("causal", "window")),
    *(Case("default", mask="intervals", intervals=kind, head_dim=128) for kind in _INTERVALS),
    *(Case("default", head_dim=d, dtype=dtype) for d in (64, 320, 512, 1024) for dtype in ("bf16", "fp16")),
    *(Case("default", heads=h, kv_heads=hk) for h, hk in ((8, 8), (8, 1), (6, 3))),
    *(Case("default", magnitude=m) for m in (8.0, 30.0, 3e3, 133120.0)),
]  # fmt: skip


def _sizes(case: Case) -> tuple[tuple[int, int], ...]:
    return EDGES if case.head_dim <= 128 else EDGES[::3]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    cases.build_all(list(ALL))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_the_oracle(case: Case) -> None:
    where = cases.present()
    if reason := simt_forward.FAMILY.rejects(case.problem, where, case.config):
        pytest.skip(f"not on {where.arch}: {reason[1]}")
    for seed, (rows, keys) in enumerate(_sizes(case)):
        verdict = run(case, rows, keys, seed=seed, layout=("bshd", "bhsd")[seed % 2])
        assert verdict, f"{rows}x{keys}: {verdict.message}"


@pytest.mark.parametrize("name", ["base", "three_stages", "whole_tiles"])
def test_the_same_bits_every_time(name: str) -> None:
    g = torch.Generator("cuda").manual_seed(3)
    q, k, v = (torch.randn(2, 400, 4, 64, device="cuda", generator=g) for _ in range(3))
    case = Case(name, kv_heads=4)
    kernel, call = cases.kernel_of(case), case.call(q, k, v)
    seen = []
    for _ in range(20):
        out, lse = torch.full_like(q, torch.nan), torch.full((2, 4, 400), torch.nan, device="cuda")
        kernel.launch(call, {"out": out, "lse": lse})
        seen.append((out, lse))
    assert all(torch.equal(out, seen[0][0]) and torch.equal(lse, seen[0][1]) for out, lse in seen)


def test_long_sequences_are_addressed_in_64_bits() -> None:
    """A batch stride past 2^31 elements."""
    q = torch.empty(2, (1 << 31) + 64, device="cuda")[:, : 64 * 64].view(2, 64, 1, 64)
    q.normal_()
    case, out, lse = (
        Case("base", heads=1, kv_heads=1),
        torch.full_like(q, torch.nan),
        torch.zeros(2, 1, 64, device="cuda"),
    )
    cases.kernel_of(case).launch(case.call(q, q, q), {"out": out, "lse": lse})
    want = torch.nn.functional.scaled_dot_product_attention(*(q.double().transpose(1, 2),) * 3, is_causal=True)
    assert (out.transpose(1, 2) - want).abs().max() < 1e-5


def test_every_scheme_is_legal_somewhere() -> None:
    assert {case.scheme for case in ALL} >= set(SCHEMES)
