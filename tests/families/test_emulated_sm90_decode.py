"""sm90_decode on the CPU (tests/emulator), against the op's own check: pages, groups, lengths, splits, prompts.

The inputs are those of the tuner's check: NaN in every row of the cache that no sequence has, entries of the page table
that are no page, permuted pages, ragged rows, splits of all kinds. Fences, registers and time are left to tests/gpu.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fagen.ops.attention.decode_call import DecodeCall
from fagen.ops.attention.decode_calls import CALLS, Params, make_params
from fagen.runtime.kernel import Library
from fagen.target import known
from tests.support import emulated
from tests.support.decode90 import FAMILY, Case
from tests.support.thorough import sample

SM90 = known("sm_90")
CASES = [
    Case(page=16, mask="causal", tile_m=128),
    Case(page=64, mask="window", dtype="fp16", sinks=True, stages=3, rescale="each"),
    Case(page=0, mask="none", head_dim=80, tile_n=32, softcap=True, blocks_per_sm=2),
    Case(page=128, mask="causal", head_dim=128, head_dim_v=64, tile_n=128, split_keys=256),
    Case(page=256, mask="window", head_dim=96, tile_m=128, tile_n=64, softcap=True, stages=4),
    Case(page=32, mask="none", dtype="fp16", head_dim=256, split_keys=512),
    Case(page=0, mask="causal", tile_n=96, stages=6, split_keys=1024, sinks=True, rescale="each", blocks_per_sm=1),
]


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    """Each test compiles the kernel that it runs, unless some test has."""
    return cache_folder / "emulated"


@functools.cache
def _library(case: Case, folder: Path) -> Library:
    config = FAMILY.require(case.problem, SM90, case.config)
    return emulated.build(emulated.source(FAMILY, case.problem, SM90, config), folder, Params)


def run(case: Case, folder: Path, call: DecodeCall, seed: int = 0, units: int = 3) -> dict[str, torch.Tensor]:
    """On a GPU of a few SMs; `seed` decides what comes first wherever that is open."""
    outputs = {name: torch.full(shape, math.nan, dtype=dtype) for name, (shape, dtype) in call.output_types().items()}
    emulated.launch(_library(case, folder), call, outputs, seed=seed, units=units, fill=make_params)
    return outputs


@pytest.mark.parametrize("case", sample(CASES, every=3), ids=str)
def test_right_whatever_comes_first(case: Case, folder: Path) -> None:
    number = CASES.index(case)
    problems = CALLS.check_problems(case.problem.replace(heads=4, kv_heads=1, seqlen_k=300), SM90)
    for index in sorted({0, 1 + number % 5, 1 + (number + 2) % 5, 5}):  # of many; each is in several cases
        problem = problems[index]
        inputs = CALLS.inputs(problem, "cpu", number + index, True)
        emulated.launch(
            _library(case, folder), inputs.call, inputs.outputs, seed=index, units=2 + index, fill=make_params
        )
        verdict = CALLS.check(inputs.call, inputs.outputs)
        assert verdict and not inputs.damage(), f"{problem.size_key}: {verdict.message} {inputs.damage()}"
