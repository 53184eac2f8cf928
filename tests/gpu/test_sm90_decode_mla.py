"""sm90_decode_mla on a Hopper GPU against the op's own check: every knob value, pages, lengths, splits, graphs."""

from __future__ import annotations

import pytest
import torch

from fagen.ops.attention.decode import DecodeProblem
from fagen.ops.attention.decode_calls import CALLS
from tests.support.cases import present
from tests.support.decode_gpu import (
    Decoders,
    check,
    check_a_thousand_runs,
    check_each_alone,
    check_lengths_in_a_graph,
)
from tests.support.mla import FAMILY, Case

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90 (wgmma)"
)

KERNELS = Decoders(FAMILY)
_PAGES = (64, 0, 16, 32, 128, 256)
CASES = [
    Case(
        page=page, mask=("causal", "none")[(i + j) % 2], dtype=("bf16", "fp16")[i // 2 % 2],
        head_dim_v=(512, 256, 128)[j], sinks=(i + j) % 3 == 2, rescale=("deferred", "each")[(i // 2 + j) % 2],
        split_keys=(128, 256, 512, 1024)[i % 4],
    )
    for i, page in enumerate(_PAGES)
    for j in range(3)
]  # fmt: skip
SERVED = DecodeProblem(
    head_dim=576, head_dim_v=512, shared_kv=True, mask="none", page=64, batch=16, heads=128, kv_heads=1, seqlen_k=4096
)
DEFAULTS = [SERVED, SERVED.replace(mask="causal", seqlen_q=2), SERVED.replace(heads=16, dtype="fp16", page=0)]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    KERNELS.build(CASES, DEFAULTS)


def sanitize(case: Case) -> None:
    KERNELS.sanitize(case, 128, 1, 1, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Case) -> None:
    which = KERNELS.of(case)
    for problem in CALLS.check_problems(case.problem.replace(heads=128, kv_heads=1, seqlen_k=1500), present()):
        for seed in range(2):
            check(which, problem, seed)
    for batch, heads, rows, keys in ((2, 128, 1, 700), (3, 64, 4, 1111), (1, 80, 3, 140), (7, 16, 2, 2000)):
        check(which, case.problem.replace(batch=batch, heads=heads, kv_heads=1, seqlen_q=rows, seqlen_k=keys), 2)


@pytest.mark.parametrize("problem", DEFAULTS, ids=str)
@pytest.mark.parametrize(("batch", "keys"), [(1, 32768), (8, 9000), (64, 2048), (128, 700)])
def test_defaults_at_the_sizes_of_servers(problem: DecodeProblem, batch: int, keys: int) -> None:
    which = KERNELS.kernel(problem)
    for seed in range(3):
        check(which, problem.replace(batch=batch, seqlen_k=keys), seed, sample=True)


def test_a_graph_serves_changing_lengths() -> None:
    which, problem = KERNELS.kernel(SERVED), SERVED.replace(batch=7)
    check_lengths_in_a_graph(which, problem)


@pytest.mark.parametrize("splits", [-256, -1024])
def test_splits_of_fixed_size_make_a_sequence_independent_of_others(splits: int) -> None:
    which = KERNELS.kernel(SERVED)
    inputs = CALLS.inputs(SERVED.replace(batch=9, seqlen_k=8000), "cuda", 3, True).change(num_splits=splits)
    check_each_alone(which, inputs)


def test_a_thousand_runs_are_bitwise_equal() -> None:
    which, inputs = KERNELS.kernel(SERVED), CALLS.inputs(SERVED.replace(batch=3), "cuda", 0, True)
    check_a_thousand_runs(which, inputs)


def test_every_value_of_every_knob_is_run() -> None:
    for knob in FAMILY.knobs:
        assert {case.config[knob.name] for case in CASES} == set(knob.choices), knob.name
