"""sm90_decode on the CPU (tests/emulator), against the op's own check: pages, groups, lengths, splits, prompts.

The inputs are those of the tuner's check: NaN in every row of the cache that no sequence has, entries of the page table
that are no page, permuted pages, ragged rows, splits of all kinds. Fences, registers and time are left to tests/gpu.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fagen.ops.attention import decode_inputs
from fagen.ops.attention.decode_call import DecodeCall
from fagen.ops.attention.decode_calls import CALLS, Params, make_params
from fagen.ops.inputs import Inputs, guarded
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


@pytest.mark.parametrize("case", sample(CASES, every=6), ids=str)
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


MIXED = CASES[0]


@pytest.mark.parametrize("splits", [0, 3])
def test_prompts_among_single_tokens(splits: int, folder: Path) -> None:
    """More sequences than a warp has lanes, some without rows or keys; blocks find the rows that there are."""
    steps = [(1, 20 + 3 * b) for b in range(45)]
    steps[0], steps[33], steps[44], steps[7], steps[8] = (70, 100), (33, 33), (90, 300), (0, 40), (1, 0)
    rows, keys = (max(column) for column in zip(*steps, strict=True))
    problem = MIXED.problem.replace(batch=45, heads=8, kv_heads=2, seqlen_q=rows, seqlen_k=keys)
    made = decode_inputs.of_steps(problem, "cpu", 0, steps)
    inputs = made.change(num_splits=splits)
    assert inputs.call.ragged
    emulated.launch(_library(MIXED, folder), inputs.call, inputs.outputs, seed=splits + 200, units=4, fill=make_params)
    verdict = CALLS.check(inputs.call, inputs.outputs)
    assert verdict and not inputs.damage(), verdict.message


def test_blocks_are_those_of_the_rows_that_there_are(folder: Path) -> None:
    """The workspace of a launch that splits tells how many row tiles it counts on: not every sequence's most rows."""
    steps = [(1, 64)] * 30 + [(256, 512)]
    problem = MIXED.problem.replace(batch=31, heads=4, kv_heads=1, seqlen_q=256, seqlen_k=512)
    call = dataclasses.replace(decode_inputs.of_steps(problem, "cpu", 0, steps).call, num_splits=2)
    library = _library(MIXED, folder)
    library._library.emulator_begin(ctypes.c_uint64(0), ctypes.c_int(3))
    need = library.workspace_bytes(ctypes.byref(make_params(call, call.new_outputs())))
    tiles = -(-286 * 4 // MIXED.tile_m) + 31
    assert need == tiles * 2 * MIXED.tile_m * (64 * 4 + 8) < 31 * 8 * 2 * MIXED.tile_m * 64 * 4 / 4


def _call(lengths: list[int], *, rows: int = 1, **more: Any) -> DecodeCall:
    """Sequences in pages of their own, one after the other."""
    g = torch.Generator().manual_seed(0)
    page, most = MIXED.page, -(-max(lengths) // MIXED.page)
    q = torch.randn(len(lengths), rows, 4, 64, generator=g, dtype=torch.bfloat16)
    k, v = (torch.randn(len(lengths) * most, page, 1, 64, generator=g, dtype=torch.bfloat16) for _ in range(2))
    table = torch.arange(len(lengths) * most, dtype=torch.int32).view(len(lengths), most)
    return DecodeCall(q, k, v, torch.tensor(lengths, dtype=torch.int32), table, window=(-1, 0), **more)


def test_splits_of_fixed_size_make_a_sequence_independent_of_others(folder: Path) -> None:
    """Bit for bit: whoever shares the batch, in whatever order blocks come, packed or not."""
    call = _call([437, 90, 300], rows=2, num_splits=-128)
    together = run(MIXED, folder, call, seed=1, units=5)
    starts = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    packed = run(MIXED, folder, dataclasses.replace(call, q=call.q.flatten(0, 1), cu_seqlens_q=starts, most_rows=2))
    assert torch.equal(packed["out"].view_as(together["out"]), together["out"])
    for b in range(3):
        one = slice(b, b + 1)
        alone = dataclasses.replace(
            call, q=call.q[one], seqlens_k=call.seqlens_k[one].clone(), page_table=call.page_table[one],
            most_keys=int(call.seqlens_k[b]),
        )  # fmt: skip
        found = run(MIXED, folder, alone, seed=7, units=2)
        assert all(torch.equal(found[name], together[name][one]) for name in found), b


def test_the_order_of_parts_does_not_depend_on_the_longest_sequence(folder: Path) -> None:
    """The longest has as many splits as eight threads merge, the other as many as two do: in the order of two the
    huge values of that one cancel, in another order they are infinite on the way."""
    call = _call([2100, 700], num_splits=-128)
    call.q[1] = 0.0  # all weights are 1
    pages = 128 // MIXED.page
    for split, sign in enumerate((1, 1, -1, -1, 1, -1)):
        first = call.page_table.shape[1] + split * pages
        call.v[first : first + pages] = sign * 2e36
    together = run(MIXED, folder, call)
    assert together["out"].isfinite().all()
    one = slice(1, 2)
    alone = dataclasses.replace(
        call, q=call.q[one], seqlens_k=call.seqlens_k[one].clone(), page_table=call.page_table[one], most_keys=700
    )
    assert torch.equal(run(MIXED, folder, alone)["out"], together["out"][one])


def test_many_splits(folder: Path) -> None:
    """Several threads share the parts of the same columns, and some of them have none."""
    call = _call([1500, 70, 330], num_splits=21)
    verdict = CALLS.check(call, run(MIXED, folder, call))
    assert verdict, verdict.message


def test_damaged_lengths_pages_and_rows_stay_inside(folder: Path) -> None:
    """A length that is no length counts as the maximum, or as 0, an entry that is no page as the last page; rows that
    are no rows of q are not written."""
    call = _call([64, 64])
    right = run(MIXED, folder, dataclasses.replace(call, seqlens_k=torch.tensor([64, 0], dtype=torch.int32)))
    call.seqlens_k.copy_(torch.tensor([1 << 30, -5]))
    found = run(MIXED, folder, call)
    assert all(torch.equal(found[name], right[name]) for name in found)
    table, last = call.page_table.clone(), call.page_table.clone()
    table[0, 1:3] = torch.tensor([-1, 1 << 30])
    last[0, 1:3] = call.k.shape[0] - 1
    other, want = (run(MIXED, folder, dataclasses.replace(call, page_table=t)) for t in (table, last))
    assert all(torch.equal(other[name], want[name]) for name in other)
    for rows in ([-3, 1, 9], [2, 1, 1 << 30], [1 << 30, 0, -7]):
        starts = torch.tensor(rows, dtype=torch.int32)
        ragged = dataclasses.replace(call, q=call.q[:, 0], cu_seqlens_q=starts, most_rows=2)
        made = {name: guarded(*types, torch.device("cpu")) for name, types in ragged.output_types().items()}
        launched = Inputs.of(ragged, made)
        emulated.launch(_library(MIXED, folder), ragged, launched.outputs, fill=make_params)
        assert not launched.damage(), rows


@pytest.mark.parametrize("magnitude", [30.0, 3e3, 133120.0])  # of the last, scores are beyond 2^31
def test_large_scores(magnitude: float, folder: Path) -> None:
    call = _call([437, 90, 300], num_splits=-128)
    call = dataclasses.replace(call, q=call.q * magnitude, k=call.k * magnitude)
    verdict = CALLS.check(call, run(MIXED, folder, call))
    assert verdict, verdict.message


# Barriers and waits are taken away: one of some runs finds it.
_BROKEN = CASES[1]  # a window: rows are cleared at both ends; maxima move with every tile
_MISSING = [
    ("ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);", ""),  # tiles are overwritten while others read them
    ("rings.v.wait();", ""),  # values are read before they are there
    ("clear_hidden_rows(key);", ""),  # 0 times NaN
    ("rings.k.wait();", ""),  # keys are read before they are there
    ("ptx::cp_async_wait<0>();", ""),  # or rows of q
    ("if (moved) state.rescale(factor);", ""),  # O stays behind its maxima
    ("    wait_values();\n      if", "    rings.v.release();\n      if"),  # or the product has not ended
]


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), sample(_MISSING, every=7))
def test_who_does_not_wait_is_wrong(old: str, new: str, folder: Path) -> None:
    text = emulated.source(FAMILY, _BROKEN.problem, SM90, FAMILY.require(_BROKEN.problem, SM90, _BROKEN.config))
    assert old in text
    library = emulated.build(text.replace(old, new), folder, Params)
    problem = _BROKEN.problem.replace(
        batch=2, heads=4, kv_heads=1, seqlen_q=3, seqlen_k=574, window_left=200, window_right=0
    )
    for seed in range(8):
        inputs = CALLS.inputs(problem, "cpu", seed, True)
        library._library.emulator_begin(seed, 1)
        params: Any = make_params(inputs.call, inputs.outputs)
        memory = torch.full((library.workspace_bytes(params) + 256,), 255, dtype=torch.uint8)
        params.workspace = -(-memory.data_ptr() // 256) * 256
        if library.launch(params, None) or not CALLS.check(inputs.call, inputs.outputs):
            return
    pytest.fail("nothing went wrong")
