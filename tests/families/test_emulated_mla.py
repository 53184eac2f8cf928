"""sm90_decode_mla on the CPU (tests/emulator), against the op's own check: pages, groups, lengths, splits, tokens.

The inputs are those of the tuner's check: NaN in every row of the cache that no sequence has, entries of the page table
that are no page, permuted pages, ragged rows, splits of all kinds. Fences, registers and time are left to tests/gpu.
"""

from __future__ import annotations

import contextlib
import ctypes
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
from tests.support.mla import FAMILY, Case
from tests.support.thorough import sample

SM90 = known("sm_90")
CASES = [
    Case(page=64, mask="causal"),
    Case(page=16, dtype="fp16", rescale="each", sinks=True),
    Case(page=0, mask="causal", head_dim_v=256, split_keys=256),
    Case(page=128, dtype="fp16", mask="causal", sinks=True),
    Case(page=32, head_dim_v=512, mask="causal"),
    Case(page=256, rescale="each", split_keys=512),
    Case(page=0, dtype="fp16", split_keys=1024),
    Case(page=64, split_keys=256),
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


@pytest.mark.parametrize("case", sample(CASES, every=8), ids=str)
def test_right_whatever_comes_first(case: Case, folder: Path) -> None:
    number = CASES.index(case)
    problems = CALLS.check_problems(case.problem.replace(heads=4, kv_heads=1, seqlen_k=300), SM90)
    for index in sorted({0, 1 + number % 5, 1 + (number + 2) % 5}):  # of many; each is in several cases
        problem = problems[index]
        inputs = CALLS.inputs(problem, "cpu", number + index, True)
        emulated.launch(
            _library(case, folder), inputs.call, inputs.outputs, seed=index, units=2 + index, fill=make_params
        )
        verdict = CALLS.check(inputs.call, inputs.outputs)
        assert verdict and not inputs.damage(), f"{problem.size_key}: {verdict.message} {inputs.damage()}"


SHARED = CASES[0]


@pytest.mark.parametrize(
    ("batch", "heads", "rows", "keys"),
    [(2, 128, 1, 200), (3, 64, 4, 330), (1, 80, 3, 140)],  # a token of two tiles; ragged rows; tiles of two tokens
)
def test_row_tiles_that_share_keys(batch: int, heads: int, rows: int, keys: int, folder: Path) -> None:
    problem = SHARED.problem.replace(batch=batch, heads=heads, kv_heads=1, seqlen_q=rows, seqlen_k=keys)
    for seed in range(2):
        inputs = CALLS.inputs(problem, "cpu", seed, True)
        emulated.launch(_library(SHARED, folder), inputs.call, inputs.outputs, seed=seed, units=3, fill=make_params)
        verdict = CALLS.check(inputs.call, inputs.outputs)
        assert verdict and not inputs.damage(), f"seed {seed}: {verdict.message} {inputs.damage()}"


def _call(lengths: list[int], *, heads: int = 16, rows: int = 1, **more: Any) -> DecodeCall:
    """Sequences in pages of their own, one after the other."""
    g = torch.Generator().manual_seed(0)
    page, dim, most = SHARED.page, SHARED.problem.head_dim, -(-max(lengths) // SHARED.page)
    q = torch.randn(len(lengths), rows, heads, dim, generator=g, dtype=torch.bfloat16)
    k = torch.randn(len(lengths) * most, page, 1, dim, generator=g, dtype=torch.bfloat16)
    table = torch.arange(len(lengths) * most, dtype=torch.int32).view(len(lengths), most)
    return DecodeCall(
        q, k, k[..., : SHARED.head_dim_v], torch.tensor(lengths, dtype=torch.int32), table, window=(-1, 0), **more
    )


def _changed(call: DecodeCall, k: torch.Tensor, **more: Any) -> DecodeCall:
    return dataclasses.replace(call, k=k, v=k[..., : SHARED.head_dim_v], **more)


def test_splits_of_fixed_size_make_a_sequence_independent_of_others(folder: Path) -> None:
    """Bit for bit: whoever shares the batch, however long the others are, in whatever order blocks come."""
    call = _call([437, 90, 300], rows=2, num_splits=-128)
    together = run(SHARED, folder, call, seed=1, units=5)
    for b in range(3):
        one = slice(b, b + 1)
        alone = dataclasses.replace(
            call, q=call.q[one], seqlens_k=call.seqlens_k[one].clone(), page_table=call.page_table[one],
            most_keys=int(call.seqlens_k[b]),
        )  # fmt: skip
        found = run(SHARED, folder, alone, seed=7, units=2)
        assert all(torch.equal(found[name], together[name][one]) for name in found), b


def _two_splits(lengths: list[int]) -> DecodeCall:
    """On four SMs each of these two row tiles has two splits, if the kernel may choose."""
    return dataclasses.replace(_call([700, 700], rows=2), seqlens_k=torch.tensor(lengths, dtype=torch.int32))


@pytest.mark.parametrize("lengths", [[700, 130], [640, 600], [128, 129], [64, 0]], ids=str)
def test_two_splits_of_a_tile_merge_in_their_cluster(lengths: list[int], folder: Path) -> None:
    """Whoever of the two has keys; where a caller chose two, a kernel merges them."""
    call = _two_splits(lengths)
    for seed in range(3):
        verdict = CALLS.check(call, run(SHARED, folder, call, seed=seed, units=4))
        assert verdict, f"seed {seed}: {verdict.message}"
    outputs = {name: torch.empty(shape, dtype=t) for name, (shape, t) in call.output_types().items()}
    library = _library(SHARED, folder)
    library._library.emulator_begin(ctypes.c_uint64(0), ctypes.c_int(4))
    chosen, asked = (
        library.workspace_bytes(ctypes.byref(make_params(c, outputs)))
        for c in (call, dataclasses.replace(call, num_splits=2))
    )
    assert chosen == 0 < asked


def test_blocks_of_a_cluster_that_do_not_wait_are_wrong(folder: Path) -> None:
    text = emulated.source(FAMILY, SHARED.problem, SM90, FAMILY.require(SHARED.problem, SM90, SHARED.config))
    wait = "ptx::cluster_sync();\n    if (writes) add("
    assert wait in text
    library = emulated.build(text.replace(wait, "if (writes) add("), folder, Params)
    call = _two_splits([700, 650])
    outputs = {name: torch.empty(shape, dtype=t) for name, (shape, t) in call.output_types().items()}
    for seed in range(8):
        with contextlib.suppress(AssertionError):
            emulated.launch(library, call, outputs, seed=seed, units=4, fill=make_params)
            if CALLS.check(call, outputs):
                continue
        return
    pytest.fail("nothing went wrong")


def test_one_launch_serves_all_lengths_up_to_its_maximum(folder: Path) -> None:
    """As in a CUDA graph: the params stay, lengths and pages change on the device."""
    call = _call([400, 400, 400])
    library = _library(SHARED, folder)
    outputs = {name: torch.full(shape, math.nan, dtype=t) for name, (shape, t) in call.output_types().items()}
    for seed, lengths in enumerate(([400, 1, 0], [3, 399, 130], [0, 0, 257])):
        call.seqlens_k.copy_(torch.tensor(lengths))
        call.page_table.copy_(call.page_table.flip(0))
        emulated.launch(library, call, outputs, seed=seed, units=9, fill=make_params)
        verdict = CALLS.check(call, outputs)
        assert verdict, f"{lengths}: {verdict.message}"


def test_damaged_lengths_and_pages_stay_inside(folder: Path) -> None:
    """A length that is no length counts as the maximum, or as 0, an entry that is no page as the last page."""
    call = _call([128, 128])
    right = run(SHARED, folder, dataclasses.replace(call, seqlens_k=torch.tensor([128, 0], dtype=torch.int32)))
    call.seqlens_k.copy_(torch.tensor([1 << 30, -5]))
    found = run(SHARED, folder, call)
    assert all(torch.equal(found[name], right[name]) for name in found)
    table, last = call.page_table.clone(), call.page_table.clone()
    table[0] = torch.tensor([-1, 1 << 30])
    last[0] = call.k.shape[0] - 1
    other, want = (run(SHARED, folder, dataclasses.replace(call, page_table=t)) for t in (table, last))
    assert all(torch.equal(other[name], want[name]) for name in other)


def test_what_nobody_sees_may_hold_anything(folder: Path) -> None:
    """NaN behind the last key, and behind the last one that a tile's rows see."""
    call = _call([100, 65], rows=3)
    want = run(SHARED, folder, call)
    k = call.k.clone()
    k[1, 36:], k[3, 1:] = math.nan, math.inf
    found = run(SHARED, folder, _changed(call, k))
    assert all(torch.equal(found[name], want[name]) for name in found)


@pytest.mark.parametrize("magnitude", [30.0, 3e3, 133120.0])  # of the last, scores are beyond 2^31
def test_large_scores(magnitude: float, folder: Path) -> None:
    call = _call([437, 90, 300], num_splits=-128)
    call = _changed(call, call.k * magnitude, q=call.q * magnitude)
    verdict = CALLS.check(call, run(SHARED, folder, call))
    assert verdict, verdict.message


# Barriers and waits are taken away: one of some runs finds it.
_BROKEN = CASES[1]  # maxima move with every tile
_MISSING = [
    ("ptx::mbarrier_wait(part.full(slab), phase);", ""),  # keys are read before they are there
    ("ptx::mbarrier_wait(part.empty(), index / 2 % 2 ^ 1);", ""),  # or overwritten while others read them
    ("ptx::barrier_sync(kSecondWeights, L::kGroups * 128);", ""),  # weights are read before they are there
    ("ptx::barrier_sync(kFirstWeights, L::kGroups * 128);", ""),
    ("ptx::cp_async_wait<0>();", ""),  # or rows of q
    ("if (adopt_references(factor)) rescale(factor);", "adopt_references(factor);"),  # O stays behind others' maxima
    ("if (moved) rescale(factor);", ""),  # or behind its own
    ("clear_hidden_rows(1, key + C::kTileN);", ""),  # 0 times NaN
]


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), sample(_MISSING, every=5))
def test_who_does_not_wait_is_wrong(old: str, new: str, folder: Path) -> None:
    text = emulated.source(FAMILY, SHARED.problem, SM90, FAMILY.require(_BROKEN.problem, SM90, _BROKEN.config))
    assert old in text
    library = emulated.build(text.replace(old, new), folder, Params)
    problem = _BROKEN.problem.replace(batch=2, heads=128, kv_heads=1, seqlen_k=520)
    for seed in range(8):
        inputs = CALLS.inputs(problem, "cpu", seed, True)
        library._library.emulator_begin(seed, 1)
        params: Any = make_params(inputs.call, inputs.outputs)
        memory = torch.full((library.workspace_bytes(params) + 256,), 255, dtype=torch.uint8)
        params.workspace = -(-memory.data_ptr() // 256) * 256
        if library.launch(params, None) or not CALLS.check(inputs.call, inputs.outputs):
            return
    pytest.fail("nothing went wrong")
