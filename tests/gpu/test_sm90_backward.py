"""sm90_backward on a Hopper GPU against gradients by PyTorch: knobs, ragged sizes, masks, heads, head dims, turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fagen.codegen.spec import KernelSpec
from fagen.families import Config
from fagen.ops.attention import gradients
from fagen.runtime import kernel
from fagen.target import known
from tests.families.test_emulated_sm90_backward import (
    CASES,
    DETERMINISTIC,
    FAMILY,
    SCHEMES,
    Case,
    make_call,
    poisoned,
)  # fmt: skip
from tests.support.cases import build_specs, present

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU (sm_90)"
)


MANY_BLOCKS = [
    case
    for scheme in SCHEMES
    for mask in ("none", "causal")
    if not FAMILY.rejects((case := Case(scheme, mask=mask, heads=16, kv_heads=4)).problem, known("sm_90"), case.config)
]
HEAD_DIMS = [(d, dv) for d in range(16, 257, 16) for dv in sorted({d, 64, 128})]
HEAD_DIMS += [(d, d) for d in (40, 72, 88, 104, 120)] + [(72, 40)]  # the kernels of the next multiples of 16


DROPPING = [
    case
    for scheme in SCHEMES
    for mask in ("causal", "none")
    if not FAMILY.rejects((case := Case(scheme, mask=mask, dropout=0.3)).problem, known("sm_90"), case.config)
]


def _default(sizes: tuple[int, int]) -> Case:
    case = Case("base", head_dim=sizes[0], head_dim_v=sizes[1])
    return replace(case, changes=tuple(FAMILY.default(case.problem, known("sm_90")).items()))


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    cases = [*CASES, *MANY_BLOCKS, *map(_default, HEAD_DIMS), *DROPPING, *DETERMINISTIC]
    build_specs(KernelSpec(FAMILY, case.problem, present(), case.config) for case in cases)


def check(case: Case, rows: int, keys: int, *, seed: int = 0, batch: int = 2, **more: Any) -> dict[str, torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(seed)
    call = make_call(case, rows, keys, g, batch=batch, **more)
    outputs = poisoned(call)
    kernel.get(KernelSpec(FAMILY, case.problem, present(), case.config)).launch(call, outputs)
    verdict = gradients.check(call, outputs)
    assert verdict, verdict.message
    return outputs


def _edges(config: Config) -> tuple[tuple[int, int], ...]:
    """Rows and keys below, at and above the edges of the config's own tiles, and of the stages of q."""
    m, n, ring = int(config.tile_m), int(config.tile_n), int(config.tile_m * config.q_stages)
    return (
        (1, n + 1), (m - 1, n - 1), (m, n), (m + 1, n + 1), (2 * m + 1, 2 * n - 1), (ring, n), (ring + m + 1, n + 1),
        (3 * m + 5, 1), (1300, 1300), (1300, 500), (500, 1300),
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_at_the_edges_of_tiles(case: Case) -> None:
    for seed, (rows, keys) in enumerate(_edges(case.config)):
        check(case, rows, keys, seed=seed, layout=("bshd", "bhsd")[seed % 2], dlse=seed % 3 == 1)


@pytest.mark.parametrize("case", MANY_BLOCKS, ids=str)
def test_many_blocks(case: Case) -> None:
    check(case, 1100, 1300, batch=4)


@pytest.mark.parametrize("case", DROPPING, ids=str)
def test_dropout(case: Case) -> None:
    for seed, (rows, keys) in enumerate(((77, 200), (333, 270), (700, 640))):
        check(case, rows, keys, seed=seed, dlse=seed == 1)


@pytest.mark.parametrize("sizes", HEAD_DIMS, ids=str)
def test_defaults_of_all_head_dims(sizes: tuple[int, int]) -> None:
    check(_default(sizes), 300, 400)


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_every_run_gives_the_same_bits(case: Case) -> None:
    first = check(case, 1300, 1300)
    for _ in range(20):
        again = check(case, 1300, 1300)
        assert all(torch.equal(first[name], again[name]) for name in first)
