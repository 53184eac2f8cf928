"""Head dims that are multiples of 8 and not of 16, on the CPU (tests/emulator).

A kernel is compiled for the next multiple of 16: what lies beside a row must not leak in, nor be written.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fagen.ops.attention import gradients, reference
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.params import BackwardParams, make_backward_params
from fagen.target import known
from tests.families import test_emulated_sm90_backward as backward
from tests.support import emulated
from tests.support.cases import DTYPES, Case

_BESIDE, _MARK = 8, 77.0  # columns beside a row, and what stands there


def _beside(tensor: torch.Tensor, mark: float) -> torch.Tensor:
    """The tensor as the first columns of a wider one."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + _BESIDE), mark, dtype=tensor.dtype)
    wide[..., :-_BESIDE] = tensor
    return wide[..., :-_BESIDE]


def _untouched(tensor: torch.Tensor) -> bool:
    base = tensor._base
    assert base is not None
    return bool((base[..., -_BESIDE:] == _MARK).all())


@pytest.mark.parametrize(
    "case",
    [
        Case("tma", head_dim=72, head_dim_v=40, heads=2, kv_heads=1),
        Case("base", head_dim=72, head_dim_v=40, heads=2, kv_heads=1),
        Case("large", head_dim=264, head_dim_v=328, heads=2, kv_heads=1),
    ],
    ids=str,
)
def test_forward(case: Case, cache_folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 100, 2, case.head_dim), (1, 130, 1, case.head_dim), (1, 130, 1, case.head_dim_v))
    q, k, v = (_beside(torch.randn(s, generator=g).to(DTYPES[case.dtype]), torch.nan) for s in shapes)
    call = AttentionCall.of(q, k, v, causal=True)
    assert call.problem.aligned
    out = _beside(torch.full((1, 100, 2, case.head_dim_v), torch.nan, dtype=q.dtype), _MARK)
    outputs = {"out": out, "lse": torch.full((1, 2, 100), torch.nan)}
    text = emulated.source(case.family, case.problem, known("sm_90"), case.config)
    emulated.launch(emulated.build(text, cache_folder / "emulated"), call, outputs)
    verdict = reference.check(call, outputs)
    assert verdict, verdict.message
    assert _untouched(out)


@pytest.mark.parametrize("scheme", ["base", "shared_red"])
def test_gradients(scheme: str, cache_folder: Path) -> None:
    case = backward.Case(scheme, head_dim=72, head_dim_v=40, heads=2)
    made = backward.make_call(case, 100, 130, torch.Generator().manual_seed(0))
    call = dataclasses.replace(made, **{n: _beside(getattr(made, n), torch.nan) for n in ("q", "k", "v", "o", "dout")})
    outputs = {n: _beside(t.fill_(torch.nan), _MARK) for n, t in call.new_outputs().items()}
    text = emulated.source(backward.FAMILY, case.problem, known("sm_90"), case.config)
    library = emulated.build(text, cache_folder / "emulated", BackwardParams)
    emulated.launch(library, call, outputs, fill=make_backward_params)
    verdict = gradients.check(call, outputs)
    assert verdict, verdict.message
    assert all(_untouched(t) for t in outputs.values())
