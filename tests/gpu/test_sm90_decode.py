"""sm90_decode on a Hopper GPU against the op's own check: every knob value, pages, prompts, lengths, splits, graphs."""

from __future__ import annotations

import pytest
import torch

from fagen.ops.attention import decode_inputs
from fagen.ops.attention.decode import DecodeProblem
from fagen.ops.attention.decode_calls import CALLS
from tests.support.cases import present
from tests.support.decode90 import FAMILY, Case
from tests.support.decode_gpu import (
    Decoders,
    check,
    check_a_thousand_runs,
    check_each_alone,
    check_lengths_in_a_graph,
    launch,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90 (wgmma)"
)

KERNELS = Decoders(FAMILY)
_PAGES = (16, 0, 32, 64, 128, 256)
_MASKS = ("causal", "none", "window")
CASES = [
    Case(
        page=page, mask=_MASKS[(i + j) % 3], dtype=("bf16", "fp16")[(i + j) % 2], head_dim=dims[0], head_dim_v=dims[1],
        softcap=(i + j) % 4 == 3, sinks=(i + j) % 5 == 2, tile_m=tile[0], tile_n=tile[1], stages=tile[2],
        blocks_per_sm=tile[3], rescale=("deferred", "each")[(i // 2 + j) % 2], split_keys=(128, 256, 512, 1024)[i % 4],
    )
    for i, page in enumerate(_PAGES)
    for j, (dims, tile) in enumerate(
        [
            ((128, 0), (128, 128, 2, 1)), ((64, 0), (64, 32, 4, 3)), ((128, 0), (64, 64, 2, 2)),
            ((256, 0), (64, 64, 3, 1)), ((96, 64), (128, 64, 4, 1)), ((80, 0), (64, 32, 6, 1)),
            ((192, 128), (64, 128, 2, 1)),
        ]
    )
]  # fmt: skip
CASES.append(Case(page=0, tile_n=96))
SERVED = DecodeProblem(head_dim=128, mask="causal", page=16, batch=9, heads=32, kv_heads=8, seqlen_q=600, seqlen_k=4096)
DEFAULTS = [
    SERVED,
    SERVED.replace(head_dim=256, head_dim_v=256, heads=16, kv_heads=2),
    SERVED.replace(head_dim=64, head_dim_v=64, page=64, seqlen_q=1),
]
MIXED = [(1, 900 + 7 * b) for b in range(60)] + [(2048, 2048), (777, 5000), (64, 64), (0, 100), (3, 0)]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    KERNELS.build(CASES, DEFAULTS)


def sanitize(case: Case) -> None:
    KERNELS.sanitize(case, 8, 2, 40, 80)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Case) -> None:
    which = KERNELS.of(case)
    for problem in CALLS.check_problems(case.problem.replace(heads=4, kv_heads=1, seqlen_k=1500), present()):
        for seed in range(2):
            check(which, problem, seed)
    for batch, heads, kv_heads, rows, keys in ((2, 16, 2, 200, 700), (3, 8, 8, 130, 1111), (7, 16, 1, 5, 2000)):
        problem = case.problem.replace(batch=batch, heads=heads, kv_heads=kv_heads, seqlen_q=rows, seqlen_k=keys)
        check(which, problem, 2)


@pytest.mark.parametrize("splits", [0, 3, -512])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[18]], ids=str)
def test_prompts_among_single_tokens(case: Case, splits: int) -> None:
    which = KERNELS.of(case)
    rows, keys = (max(column) for column in zip(*MIXED, strict=True))
    problem = case.problem.replace(batch=len(MIXED), heads=16, kv_heads=4, seqlen_q=rows, seqlen_k=keys)
    inputs = decode_inputs.of_steps(problem, "cuda", 0, MIXED).change(num_splits=splits)
    launch(which, inputs)
    verdict = CALLS.check_sample(inputs.call, inputs.outputs)
    assert verdict and not inputs.damage(), f"{verdict.message} {inputs.damage()}"


@pytest.mark.parametrize("problem", DEFAULTS, ids=str)
@pytest.mark.parametrize(("batch", "keys"), [(1, 32768), (9, 9000), (65, 2048)])
def test_defaults_at_the_sizes_of_servers(problem: DecodeProblem, batch: int, keys: int) -> None:
    which = KERNELS.kernel(problem)
    for seed in range(3):
        check(which, problem.replace(batch=batch, seqlen_k=keys), seed, sample=True)


def test_a_graph_serves_changing_lengths() -> None:
    which, problem = KERNELS.kernel(SERVED), SERVED.replace(batch=6)
    check_lengths_in_a_graph(which, problem)


@pytest.mark.parametrize("splits", [-256, -1024])
def test_splits_of_fixed_size_make_a_sequence_independent_of_others(splits: int) -> None:
    which = KERNELS.kernel(SERVED)
    inputs = CALLS.inputs(SERVED.replace(batch=9, seqlen_q=1, seqlen_k=8000), "cuda", 3, True).change(num_splits=splits)
    check_each_alone(which, inputs)


def test_a_thousand_runs_are_bitwise_equal() -> None:
    which, inputs = KERNELS.kernel(SERVED), CALLS.inputs(SERVED.replace(batch=3), "cuda", 0, True)
    check_a_thousand_runs(which, inputs)


def test_every_value_of_every_knob_is_run() -> None:
    for knob in FAMILY.knobs:
        assert {case.config[knob.name] for case in CASES} == set(knob.choices), knob.name
