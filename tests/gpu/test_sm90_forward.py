"""sm90_forward on a Hopper GPU against the oracle: every knob value, ragged sizes, all masks, GQA, head dims."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import cases
from tests.gpu.cases import HOPPER, SCHEMES_90, Case, run
from tests.gpu.test_sm80_forward import EDGES

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU (sm_90)"
)

_TRIMMED = ("descending", "longest_first")  # orders that repeat another without a mask
SCHEME_CASES = [
    Case(name, mask=mask, sizes=EDGES)
    for name, scheme in SCHEMES_90.items()
    for mask in ("causal", "none")
    if mask == "causal" or scheme.block_order not in _TRIMMED
]
_WALKS = ("tma", "tma_one_group", "tma_three_groups", "tma_one_stage", "tma_serial")
WINDOW_CASES = [
    Case(name, mask="window", window=window, sizes=((300, 300), (300, 200), (100, 400)))
    for name in _WALKS
    for window in ((50, 20), (10, 0), (70, -1), (-1, 5), (0, 0))
]
INTERVAL_CASES = [
    Case(name, mask="intervals", intervals=kind, window=window, sizes=((300, 300), (300, 1500), (77, 40)))
    for name in _WALKS
    for kind, window in (("lower1", (-1, 0)), ("lower2", (-1, 0)), ("both2", (-1, -1)), ("both4", (100, 30)))
]
_DIMS = ((8, 0), (16, 0), (40, 0), (64, 128), (80, 0), (96, 0), (128, 0), (128, 64), (192, 128), (192, 0), (256, 0))
DIM_CASES = [
    Case("tma", mask=mask, dtype=dtype, head_dim=d, head_dim_v=dv, heads=4, kv_heads=hk, sizes=((150, 170), (64, 64)))
    for (d, dv), hk in zip(_DIMS, (1, 2, 4) * 4, strict=False)
    for mask, dtype in (("causal", "bf16"), ("none", "fp16"))
]
SCORE_CASES = [
    Case("tma", softcap=20.0, mask="none"),
    Case("tma", softcap=5.0, alibi=True),
    Case("tma_three_groups", alibi=True, mask="none"),
    Case("tma", mask="intervals", intervals="both4", softcap=10.0),
]
LARGE_CASES = [Case(name, magnitude=m) for name in ("tma", "tma_rescale_each", "tma_serial") for m in (8.0, 30.0)]
ALL = [*SCHEME_CASES, *WINDOW_CASES, *INTERVAL_CASES, *DIM_CASES, *SCORE_CASES, *LARGE_CASES]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    cases.build_all(ALL)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_the_oracle(case: Case) -> None:
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = run(case, rows, keys, seed=seed, layout="bhsd" if seed % 2 else "bshd")
        assert verdict, f"{rows}x{keys}: {verdict.message}"
    facts = cases.kernel_of(case).facts
    assert not facts.get("serialized"), "ptxas made the products wait for each other"


def test_every_value_of_every_knob_is_run() -> None:
    for knob in HOPPER.knobs:
        assert {scheme[knob.name] for scheme in SCHEMES_90.values()} == set(knob.choices), knob.name


@pytest.mark.parametrize("name", list(SCHEMES_90))
def test_twenty_runs_are_equal_and_near_the_other_family(name: str) -> None:
    g = torch.Generator("cuda").manual_seed(3)
    q, k, v = (torch.randn(2, 400, 4, 64, device="cuda", generator=g).bfloat16() for _ in range(3))
    results = []
    for scheme in [name] * 20 + ["base"]:
        out, lse = torch.full_like(q, torch.nan), torch.full((2, 4, 400), torch.nan, device="cuda")
        cases.kernel_of(Case(scheme)).launch(q, k, v, out, lse, layout="bshd")
        results.append((out, lse))
    (out, lse), (other, other_lse) = results[0], results.pop()
    assert all(torch.equal(out, o) and torch.equal(lse, e) for o, e in results)
    assert (out.float() - other.float()).abs().max() <= 2 * torch.finfo(out.dtype).eps * other.abs().max()
    assert (lse - other_lse).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["tma", "tma_one_group", "tma_serial"])
def test_rows_that_see_nothing(name: str) -> None:
    q = torch.randn(1, 300, 2, 64, device="cuda").bfloat16()
    k, v = (torch.randn(1, 100, 2, 64, device="cuda").bfloat16() for _ in range(2))
    out, lse = torch.full_like(q, torch.nan), torch.full((1, 2, 300), torch.nan, device="cuda")
    cases.kernel_of(Case(name)).launch(q, k, v, out, lse, layout="bshd")
    assert (out[:, :200] == 0).all() and (lse[:, :, :200] == -torch.inf).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[:, :, 200:]).all()
