"""sm80_decode on a GPU against the op's own check: every knob value, pages, groups, lengths, splits, fp8, graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fagen import target
from fagen.ops.attention.decode import DecodeProblem
from fagen.ops.attention.decode_calls import CALLS
from tests.support.cases import present
from tests.support.decode import FAMILY, SCHEMES, Case
from tests.support.decode_gpu import (
    Decoders,
    check,
    check_a_thousand_runs,
    check_each_alone,
    check_lengths_in_a_graph,
)

KERNELS = Decoders(FAMILY)
FP8: Any = {"kv_dtype": "fp8_e4m3"}
_PAGES = (0, 1, 16, 32, 64, 128, 256)
_MASKS = ("causal", "none", "window")
SCHEME_CASES = [
    Case(name, page=_PAGES[(i + j) % 7], mask=_MASKS[(i + j) % 3], dtype=("bf16", "fp16")[i % 2], sinks=j == 1)
    for i, name in enumerate(SCHEMES)
    for j in range(3)
]
PAGE_CASES = [
    Case(name, page=page, mask=mask, **more)
    for name in ("base", "columns_two_warps", "large")
    for page, mask in zip(_PAGES, _MASKS * 3, strict=False)
    for more in ({}, FP8)
]
FP8_CASES = [
    Case(name, page=page, dtype=dtype, head_dim=128, **FP8)
    for name, page in (("base", 16), ("columns", 64), ("eight_warps", 0), ("last_block", 1), ("columns_64", 256))
    for dtype in ("bf16", "fp16")
]
SCORE_CASES = [
    Case(name, page=16, softcap=softcap, sinks=sinks, mask=mask)
    for name in ("base", "columns", "last_block")
    for softcap, sinks, mask in ((True, False, "none"), (False, True, "window"), (True, True, "causal"))
]
SHARED_CASES = [
    Case(name, page=page, head_dim=d, head_dim_v=dv, shared_kv=True, mask=mask, **more)
    for name, page, d, dv, mask in (
        ("base", 16, 128, 128, "causal"), ("columns", 64, 576, 512, "none"), ("columns_32", 64, 576, 512, "causal"),
        ("columns_two_warps", 1, 192, 128, "window"), ("last_block", 0, 96, 64, "none"),
    )
    for more in ({}, FP8)
]  # fmt: skip
UNALIGNED_CASES = [
    Case("base", aligned=False, head_dim=50, page=16),
    Case("columns_two_warps", aligned=False, head_dim=64, dtype="fp16", mask="none"),
    Case("one_warp", aligned=False, head_dim=33, page=1, **FP8),
    Case("base", aligned=False, head_dim=1, head_dim_v=20, mask="window"),
]
HERE = target.known("sm_90" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0) else "sm_80")
ALL = [
    case
    for case in (*SCHEME_CASES, *PAGE_CASES, *FP8_CASES, *SCORE_CASES, *SHARED_CASES, *UNALIGNED_CASES)
    if not FAMILY.rejects(case.problem, HERE, case.config)
]

_DIMS = ((16, 0), (32, 0), (40, 0), (64, 0), (80, 0), (96, 0), (112, 0), (128, 0), (192, 128), (192, 0), (256, 0))
# of each problem its default: what people run
DEFAULTS = [
    DecodeProblem(
        head_dim=d, head_dim_v=dv, mask=_MASKS[i % 3], dtype=("bf16", "fp16")[i % 2], page=_PAGES[(i + 2 * j) % 7],
        kv_dtype=kv, batch=5, heads=16, kv_heads=4, seqlen_q=1 + 2 * (i % 2), seqlen_k=5000,
        window_left=700 if i % 3 == 2 else -1, window_right=0 if i % 3 == 2 else -1,
        aligned=not kv or d % 16 == 0,
    )
    for i, (d, dv) in enumerate(_DIMS)
    for j, kv in enumerate(("", "fp8_e4m3"))
]  # fmt: skip
LATENT = DecodeProblem(
    head_dim=576, head_dim_v=512, shared_kv=True, mask="causal", page=64, batch=5, heads=128, kv_heads=1, seqlen_k=3000
)
DEFAULTS += [LATENT, LATENT.replace(kv_dtype="fp8_e4m3"), LATENT.replace(heads=16, seqlen_q=2, dtype="fp16")]
SERVED = DecodeProblem(head_dim=128, mask="causal", page=16, batch=32, heads=32, kv_heads=8, seqlen_k=4096)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    KERNELS.build(ALL, DEFAULTS)


def sanitize(case: Case) -> None:
    KERNELS.sanitize(case, 4, 2, 1, 5)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_the_reference(case: Case) -> None:
    which = KERNELS.of(case)
    for problem in CALLS.check_problems(case.problem.replace(heads=4, kv_heads=1, seqlen_k=1500), present()):
        for seed in range(2):
            check(which, problem, seed)


@pytest.mark.parametrize("problem", DEFAULTS, ids=str)
def test_defaults_against_the_reference(problem: DecodeProblem) -> None:
    which = KERNELS.kernel(problem)
    check(which, problem, 0)
    for batch, rows in ((3, 9), (1, 1), (40, 1)):
        check(which, problem.replace(batch=batch, seqlen_q=rows), 1, sample=True)


@pytest.mark.parametrize("merged_by", ["own_kernel", "last_block"])
def test_long_and_many(merged_by: str) -> None:
    case = Case("base", page=16, head_dim=128, changes=(("merged_by", merged_by), ("stages", 2)))
    which = KERNELS.of(case)
    for batch, keys in ((1, 131072), (64, 9000), (256, 700)):
        problem = SERVED.replace(batch=batch, seqlen_k=keys)
        for seed in range(4):
            check(which, problem, seed, sample=True)


@pytest.mark.parametrize("merged_by", ["own_kernel", "last_block"])
def test_a_graph_serves_changing_lengths(merged_by: str) -> None:
    case = Case("base", page=16, head_dim=128, changes=(("merged_by", merged_by), ("stages", 2)))
    which, problem = KERNELS.of(case), SERVED.replace(batch=7)
    check_lengths_in_a_graph(which, problem)


def test_two_streams_do_not_share_counters() -> None:
    case = Case("last_block", page=16, head_dim=128)
    which, streams = KERNELS.of(case), (torch.cuda.Stream(), torch.cuda.Stream())
    sets = [CALLS.inputs(SERVED.replace(batch=2 + i, seqlen_k=20000), "cuda", i, True) for i in range(2)]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, inputs in zip(streams, sets, strict=True):
            with torch.cuda.stream(stream):
                which.launch(inputs.call, inputs.outputs)
    torch.cuda.synchronize()
    for inputs in sets:
        verdict = CALLS.check_sample(inputs.call, inputs.outputs)
        assert verdict, verdict.message


@pytest.mark.parametrize("merged_by", ["own_kernel", "last_block"])
@pytest.mark.parametrize("splits", [-256, -1024])
def test_splits_of_fixed_size_make_a_sequence_independent_of_others(merged_by: str, splits: int) -> None:
    case = Case("base", page=16, head_dim=128, changes=(("merged_by", merged_by), ("stages", 2)))
    which = KERNELS.of(case)
    inputs = CALLS.inputs(SERVED.replace(batch=9, seqlen_k=8000), "cuda", 3, True).change(num_splits=splits)
    check_each_alone(which, inputs)


def test_a_thousand_runs_are_bitwise_equal() -> None:
    case = Case("last_block", page=16, head_dim=128)
    which, inputs = KERNELS.of(case), CALLS.inputs(SERVED.replace(batch=3), "cuda", 0, True)
    check_a_thousand_runs(which, inputs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_fp8_number_is_exact(dtype: str) -> None:
    """One key: O is its row of v. Denormals among them, which the products must not flush."""
    case = Case("base", page=16, dtype=dtype, **FP8)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes % 128 == 127] = 0  # NaN
    v = torch.zeros(1, 16, 4, 64, dtype=torch.uint8)
    v[0, 0] = codes.view(4, 64)
    v = v.cuda().view(torch.float8_e4m3fn)
    torch_dtype = torch.float16 if dtype == "fp16" else torch.bfloat16
    which = KERNELS.of(case)
    inputs = CALLS.inputs(case.problem.replace(batch=1, heads=4, kv_heads=4, seqlen_k=16), "cuda", 0, False)
    inputs.call.seqlens_k.fill_(1)
    one = torch.ones_like(inputs.call.v_scale)
    table = torch.zeros_like(inputs.call.page_table)
    call = dataclasses.replace(inputs.call, k=v, v=v, k_scale=one, v_scale=one, page_table=table)
    which.launch(call, inputs.outputs)
    assert torch.equal(inputs.outputs["out"][0], v[0, :1].to(torch_dtype))
    scores = (call.q[0, 0].double() * v[0, 0].double()).sum(1) / 8
    assert torch.allclose(inputs.outputs["lse"][0, :, 0].double(), scores, rtol=1e-5, atol=1e-5)


def test_every_value_of_every_knob_is_run() -> None:
    clusters = set() if HERE.capability >= 90 else {"cluster"}
    for knob in FAMILY.knobs:
        assert {case.config[knob.name] for case in ALL} == set(knob.choices) - clusters, knob.name
