"""cpu_few_rows against the oracle: masks, dtypes, packed heads, shared keys; and that calls of few rows are its."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fagen
from fagen import api, families, target
from fagen.codegen.spec import KernelSpec
from fagen.db import store
from fagen.dispatch import choose, resolve
from fagen.families import cpu_few_rows
from fagen.ops.attention import reference, size_point
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.problem import Problem
from fagen.runtime import kernel
from tests.support.calls import right

FAMILY = cpu_few_rows.FAMILY
HERE = target.host()
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def drawn(dtype: torch.dtype, sq: int, sk: int, heads: int, kv_heads: int, d: int, dv: int) -> list[torch.Tensor]:
    numbers = torch.Generator().manual_seed(sq * 1009 + sk)
    shapes = ((2, sq, heads, d), (2, sk, kv_heads, d), (2, sk, kv_heads, dv))
    return [torch.randn(shape, generator=numbers).to(dtype) for shape in shapes]


def verified(*tensors: torch.Tensor, config: dict[str, Any] | None = None, **how: Any) -> dict[str, torch.Tensor]:
    call = AttentionCall.of(*tensors, return_lse=True, **how)
    spec = KernelSpec(FAMILY, call.problem, HERE, FAMILY.default(call.problem, HERE).replace(**config or {}))
    assert FAMILY.rejects(call.problem, HERE, spec.config) is None
    outputs = {name: t.fill_(math.nan) for name, t in call.new_outputs().items()}
    kernel.get(spec).launch(call, outputs)
    verdict = reference.check(call, outputs)
    assert verdict, verdict.message
    return outputs


@pytest.mark.parametrize(
    "how", [{}, {"causal": True}, {"window": (100, 3)}, {"window": (None, 5), "softcap": 15.0}, {"scale": -0.3}]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_masks_and_packed_heads(how: dict[str, Any], heads: int, kv_heads: int) -> None:
    for sq, sk in ((1, 1), (1, 1500), (3, 2), (7, 300), (40, 700)):
        verified(*drawn(FP32, sq, sk, heads, kv_heads, 64, 64), **how)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("packing", ["direct", "tile"])
def test_half_precision(dtype: torch.dtype, packing: str) -> None:
    for sq, sk in ((1, 700), (5, 300)):
        verified(*drawn(dtype, sq, sk, 4, 2, 64, 64), causal=True, config={"packing": packing})


@pytest.mark.parametrize(("d", "dv"), [(1, 1), (20, 12), (192, 128), (320, 300)])
def test_head_dims(d: int, dv: int) -> None:
    verified(*drawn(FP32, 3, 200, 2, 1, d, dv), causal=True)


def test_any_strides() -> None:
    q, k, v = drawn(FP32, 3, 400, 4, 2, 64, 64)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    one = [t[:1].expand(2, -1, -1, -1) for t in (k, v)]
    for tensors in (apart, [q, *one], [q[:, ::2], k[:, ::3], v[:, ::3]]):
        verified(*tensors)
    bhsd = [t.transpose(1, 2) for t in (q, k, v)]
    verified(*bhsd, layout="bhsd", causal=True)


def test_a_row_that_sees_nothing_and_numbers_that_are_none() -> None:
    q, k, v = drawn(FP32, 6, 3, 2, 2, 64, 64)
    made = verified(q, k, v, causal=True)
    assert not made["out"][:, :3].any() and (made["lse"][:, :, :3] == -math.inf).all()
    long = drawn(FP32, 2, 900, 2, 2, 64, 64)
    long[0][:, 1, 1] = math.nan
    call = AttentionCall.of(*long)
    outputs = call.new_outputs()
    kernel.get(KernelSpec(FAMILY, call.problem, HERE, FAMILY.default(call.problem, HERE))).launch(call, outputs)
    assert outputs["out"][:, 1, 1].isnan().all() and int(outputs["out"].isnan().sum()) == 2 * 64


def test_the_bits_do_not_depend_on_the_threads() -> None:
    tensors, threads = drawn(FP32, 1, 3000, 4, 1, 64, 64), torch.get_num_threads()
    call = AttentionCall.of(*tensors)
    found = kernel.get(KernelSpec(FAMILY, call.problem, HERE, FAMILY.default(call.problem, HERE)))
    made = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs = call.new_outputs()
            found.launch(call, outputs)
            made.append(outputs["out"])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(made[0], other) for other in made[1:])


def test_what_it_refuses() -> None:
    plain = Problem(dtype="fp32", head_dim=64)
    assert FAMILY.supports(plain, HERE) is None
    refused = {
        "needs a CPU": (plain, target.known("sm_90")),
        "no ALiBi": (plain.replace(alibi=True), HERE),
        "no dropout": (plain.replace(dropout=True), HERE),
        "no column intervals": (plain.replace(mask="intervals", intervals="lower1"), HERE),
    }
    for why, (problem, where) in refused.items():
        assert why in (FAMILY.supports(problem, where) or "")


# ---- calls ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Families that Python was asked for, with nothing tuned."""
    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path,))
    assert api._ops_registered()
    resolve.forget()
    names: list[str] = []
    answer = resolve.answer

    def noted(*args: Any, **options: Any) -> Any:
        found = answer(*args, **options)
        names.append(found.kernel.spec.family.name)
        return found

    monkeypatch.setattr(resolve, "answer", noted)
    yield names
    resolve.forget()


def test_few_rows_are_its_and_a_size_is_asked_for_once(served: list[str]) -> None:
    """As a cache grows by one a step, C++ knows what serves the next; in turns with a prompt, too."""
    with torch.no_grad():
        for rows, keys in ((1, 700), (33, 33), (1, 701), (34, 60), (8, 702), (9, 702), (1, 5)):
            q, k, v = drawn(FP32, rows, keys, 4, 1, 16, 16)
            assert right(fagen.attention(q, k, v, causal=True, return_lse=True), q, k, v, causal=True)
    assert served == ["cpu_few_rows", "cpu_forward"]


def test_its_regime_is_what_its_default_looks_at() -> None:
    for heads, rows in ((1, 32), (1, 33), (4, 8), (4, 9)):
        problem = Problem(dtype="fp32", head_dim=64, heads=heads, kv_heads=1, seqlen_q=rows, seqlen_k=4096)
        few = size_point.has_few_rows(problem, HERE)
        assert few == FAMILY.suits(problem) == (heads * rows <= 32)
        assert choose.choose(problem, HERE).family is families.get("cpu_few_rows" if few else "cpu_forward")
    masked = problem.replace(seqlen_q=1, alibi=True)
    assert choose.choose(masked, HERE).family is families.get("cpu_forward")
