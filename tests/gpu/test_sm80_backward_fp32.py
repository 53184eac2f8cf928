"""sm80_backward_fp32 on a GPU against autograd: every knob value, ragged sizes, all masks, head dims from 1 to 256."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fagen.ops.attention import gradients
from fagen.ops.attention.backward_call import BackwardCall
from tests.support.backward import launch, make_call
from tests.support.backward_gpu import OnGpu
from tests.support.cases import present
from tests.support.fp32_backward import DIM_CASES, FAMILY, FEATURE_CASES, HEAD_DIMS, SCHEME_CASES, SCHEMES, Case

HERE = OnGpu(FAMILY)
EDGES = ((1, 1), (1, 77), (64, 64), (63, 97), (129, 127), (129, 333), (333, 129))
_KINDS = ("lower1", "lower2", "both2", "both4")
ALL = [
    *SCHEME_CASES,
    *DIM_CASES,
    *FEATURE_CASES,
    *(Case("default", mask=mask, head_dim=d, sizes=EDGES) for d in (32, 64, 128, 256) for mask in ("causal", "none")),
    *(Case("default", mask="intervals", intervals=kind, head_dim=128, sizes=EDGES) for kind in _KINDS),
    *(Case("default", mask="window", window=(200, 50), head_dim=d, sizes=EDGES) for d in (64, 256)),
    *(Case("default", head_dim=d, dropout=0.3, softcap=5.0, alibi=True, dlse=True) for d in (48, 128)),
    *(Case("default", heads=h, kv_heads=hk, dlse=True) for h, hk in ((8, 8), (8, 1), (6, 3))),
]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    HERE.build(ALL)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_autograd(case: Case) -> None:
    if not HERE.legal(case):
        pytest.skip(f"not on {present().arch}")
    HERE.check(case)


def test_other_layout() -> None:
    HERE.check(Case("base", heads=4, kv_heads=2), layout="bhsd")


def test_rows_and_keys_that_see_nothing() -> None:
    HERE.check(Case("base", dlse=True, sizes=((300, 100), (300, 1), (1, 300))))


def _many_rows() -> tuple[BackwardCall, dict[str, torch.Tensor]]:
    """Long sums, of which all of dO has one sign."""
    case = Case("default", mask="none", head_dim=128, heads=1)
    call = make_call(case, 16384, 128, device="cuda")
    call = dataclasses.replace(call, dout=call.dout.abs())
    return call, launch(case, call, HERE.library(case), torch.cuda.current_stream().cuda_stream)


def test_many_rows_are_as_exact_as_in_float32() -> None:
    verdict = gradients.check(*_many_rows())
    assert verdict, verdict.message


def test_many_rows_are_as_exact_as_in_pytorchs_attention() -> None:
    call, outputs = _many_rows()
    theirs = [t.detach().contiguous().requires_grad_() for t in call.bhsd()]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(*theirs).backward(call.of_bhsd(call.dout))
    want = gradients.gradients(call, torch.float64)
    for (name, exact), t in zip(want.items(), theirs, strict=True):
        assert t.grad is not None
        ours, peer = ((found.double() - exact).abs().max() for found in (call.of_bhsd(outputs[name]), t.grad))
        assert ours <= 1.5 * peer, f"{name}: error {ours}, PyTorch's {peer}"


@pytest.mark.parametrize("name", ["base", "two_slabs", "one_stage"])
def test_the_same_bits_every_time(name: str) -> None:
    case = Case(name, deterministic=True, heads=4, kv_heads=2, head_dim=HEAD_DIMS.get(name, 64))
    call, stream = make_call(case, 400, 400, batch=2, device="cuda"), torch.cuda.current_stream().cuda_stream
    seen = [launch(case, call, HERE.library(case), stream) for _ in range(50)]
    assert all(torch.equal(t, seen[0][one]) for found in seen for one, t in found.items())
    verdict = gradients.check(call, seen[0])
    assert verdict, verdict.message


def test_every_scheme_is_run() -> None:
    assert {case.scheme for case in ALL} >= set(SCHEMES)
