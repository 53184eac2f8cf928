"""sm80_decode on the CPU (tests/emulator), against the op's own check: pages, groups, lengths, splits, tokens, fp8.

The inputs are those of the tuner's check: NaN in every row of the cache that no sequence has, entries of the page table
that are no page, permuted pages, ragged rows, splits of all kinds. Registers and time are left to tests/gpu.
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

from fagen.dispatch import decode as dispatch
from fagen.errors import InvalidArgument
from fagen.families import sm80_decode
from fagen.ops.attention.decode import DecodeProblem
from fagen.ops.attention.decode_call import DecodeCall
from fagen.ops.attention.decode_calls import CALLS, Params, make_params
from fagen.ops.inputs import Inputs, guarded
from fagen.runtime.kernel import Library
from fagen.target import known
from tests.support import emulated
from tests.support.decode import FAMILY, Case
from tests.support.thorough import sample

SM80, SM90 = known("sm_80"), known("sm_90")
FP8: Any = {"kv_dtype": "fp8_e4m3"}
CASES = [
    Case("base", page=16, head_dim=128, sinks=True),
    Case("base", page=64, mask="none", dtype="fp16"),
    Case("last_block", page=1, mask="window", sinks=True),
    Case("last_block", mask="none", head_dim=96),
    Case("cluster", page=16, head_dim=128, sinks=True),
    Case("cluster_columns", page=64, mask="window", head_dim=128, dtype="fp16", **FP8),
    Case("base", page=1, **FP8),
    Case("two_warps", page=16, mask="window", dtype="fp16", softcap=True),
    Case("columns", page=32, mask="none", dtype="fp16", head_dim=128, sinks=True, **FP8),
    Case("columns", page=256, softcap=True, head_dim=192, head_dim_v=128),
    Case("one_warp", aligned=False, head_dim=50, mask="window"),
    Case("one_warp", page=16, head_dim=32, softcap=True),
    Case("four_stages", page=128, head_dim=80, **FP8),
    Case("base", page=64, head_dim=256, head_dim_v=64, mask="none"),
    Case("columns_64", page=64, softcap=True),
    Case("columns_64", page=1, mask="window", head_dim=128, dtype="fp16"),
    Case("large", page=32, head_dim=80, head_dim_v=32),
    Case("large", mask="window", head_dim=64, sinks=True, **FP8),
    Case("columns_two_warps", page=16, mask="window"),
    Case("columns_two_warps", head_dim=64, head_dim_v=128, aligned=False, softcap=True),
    Case("eight_warps", page=16, mask="none", dtype="fp16", **FP8),
    Case("eight_warps", page=128, head_dim=64, sinks=True),
    Case("columns", page=64, head_dim=192, head_dim_v=128, shared_kv=True),
    Case("base", page=1, head_dim=96, head_dim_v=64, shared_kv=True, mask="none", **FP8),
    Case("deep", page=1, head_dim=48),
    Case("columns_eight", page=16, head_dim=128, sinks=True),
    Case("deep", mask="none", head_dim=40, aligned=False, **FP8),
    Case("columns_32", page=256, mask="none"),
    Case("columns_32", page=16, dtype="fp16", head_dim=128, sinks=True, **FP8),
]


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    """Each test compiles the kernel that it runs, unless some test has."""
    return cache_folder / "emulated"


@functools.cache
def _library(case: Case, folder: Path) -> Library:
    where = SM90 if case.config.merged_by == "cluster" else SM80
    config = FAMILY.require(case.problem, where, case.config)
    return emulated.build(emulated.source(FAMILY, case.problem, where, config), folder, Params)


def run(case: Case, folder: Path, call: DecodeCall, seed: int = 0, units: int = 3) -> dict[str, torch.Tensor]:
    """On a GPU of a few SMs; `seed` decides what comes first wherever that is open."""
    outputs = {name: torch.full(shape, math.nan, dtype=dtype) for name, (shape, dtype) in call.output_types().items()}
    emulated.launch(_library(case, folder), call, outputs, seed=seed, units=units, fill=make_params)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(CASES, every=6), ids=str)
def test_right_whatever_comes_first(case: Case, folder: Path) -> None:
    number = CASES.index(case)
    problems = CALLS.check_problems(case.problem.replace(heads=4, kv_heads=1, seqlen_k=300), SM80)
    chosen = {0, 1 + number % 5, 1 + (number + 2) % 5}  # of many; each is in several cases
    for index in sorted(chosen):
        problem = problems[index]
        inputs = CALLS.inputs(problem, "cpu", number + index, True)
        emulated.launch(
            _library(case, folder), inputs.call, inputs.outputs, seed=index, units=2 + index, fill=make_params
        )
        verdict = CALLS.check(inputs.call, inputs.outputs)
        assert verdict and not inputs.damage(), f"{problem.size_key}: {verdict.message} {inputs.damage()}"


def _call(case: Case, lengths: list[int], *, rows: int = 1, heads: int = 4, seed: int = 0, **more: Any) -> DecodeCall:
    """Sequences in pages of their own, one after the other."""
    g = torch.Generator().manual_seed(seed)
    page, most = case.page, -(-max(lengths) // case.page)
    q = torch.randn(len(lengths), rows, heads, case.head_dim, generator=g, dtype=torch.bfloat16)
    k, v = (
        torch.randn(len(lengths) * most, page, 1, case.head_dim, generator=g, dtype=torch.bfloat16) for _ in range(2)
    )
    table = torch.arange(len(lengths) * most, dtype=torch.int32).view(len(lengths), most)
    return DecodeCall(q, k, v, torch.tensor(lengths, dtype=torch.int32), table, **more)


PINNED = Case("last_block", page=16)


@pytest.mark.parametrize(("scheme", "splits"), [("last_block", -64), ("cluster", -64), ("cluster", -192)])
def test_splits_of_fixed_size_make_a_sequence_independent_of_others(scheme: str, splits: int, folder: Path) -> None:
    """Bit for bit: whoever shares the batch, however long the others are, in whatever order blocks come; 600 keys by 64
    are more than a cluster has blocks, 90 are not."""
    pinned = Case(scheme, page=16)
    call = _call(pinned, [437, 90, 600], rows=2, num_splits=splits)
    together = run(pinned, folder, call, seed=1, units=5)
    for b in range(3):
        one = slice(b, b + 1)
        length = int(call.seqlens_k[b])
        alone = dataclasses.replace(
            call,
            q=call.q[one],
            seqlens_k=call.seqlens_k[one].clone(),
            page_table=call.page_table[one],
            most_keys=length,
        )
        found = run(pinned, folder, alone, seed=7, units=2)
        assert all(torch.equal(found[name], together[name][one]) for name in found), b


def test_one_launch_serves_all_lengths_up_to_its_maximum(folder: Path) -> None:
    """As in a CUDA graph: the params stay, lengths and pages change on the device."""
    call = _call(PINNED, [600, 600, 600])
    library = _library(PINNED, folder)
    outputs = {name: torch.full(shape, math.nan, dtype=t) for name, (shape, t) in call.output_types().items()}
    for seed, lengths in enumerate(([600, 1, 0], [3, 599, 130], [0, 0, 257])):
        call.seqlens_k.copy_(torch.tensor(lengths))
        call.page_table.copy_(call.page_table.flip(0))
        emulated.launch(library, call, outputs, seed=seed, units=9, fill=make_params)
        verdict = CALLS.check(call, outputs)
        assert verdict, f"{lengths}: {verdict.message}"


def test_the_second_kernel_may_start_early(folder: Path) -> None:
    """As from sm_90 on, where it is launched before the first has ended."""
    case, where = Case("base", page=16), known("sm_90")
    text = emulated.source(FAMILY, case.problem, where, FAMILY.require(case.problem, where, case.config))
    assert "early = 1" in text
    call = _call(case, [437, 90, 600], rows=2, num_splits=4)
    outputs = {name: torch.full(shape, math.nan, dtype=t) for name, (shape, t) in call.output_types().items()}
    emulated.launch(emulated.build(text, folder, Params), call, outputs, units=9, fill=make_params)
    verdict = CALLS.check(call, outputs)
    assert verdict, verdict.message


def test_damaged_lengths_and_pages_stay_inside(folder: Path) -> None:
    """A length that is no length counts as the maximum, or as 0, an entry that is no page as the last page."""
    call = _call(PINNED, [64, 64])
    right = run(PINNED, folder, dataclasses.replace(call, seqlens_k=torch.tensor([64, 0], dtype=torch.int32)))
    call.seqlens_k.copy_(torch.tensor([1 << 30, -5]))
    found = run(PINNED, folder, call)
    assert all(torch.equal(found[name], right[name]) for name in found)
    table = call.page_table.clone()
    table[0, 1:3] = torch.tensor([-1, 1 << 30])
    last = call.page_table.clone()
    last[0, 1:3] = call.k.shape[0] - 1
    other, want = (run(PINNED, folder, dataclasses.replace(call, page_table=t)) for t in (table, last))
    assert all(torch.equal(other[name], want[name]) for name in other)
    rows = torch.tensor([-3, 1, 9], dtype=torch.int32)  # of a q of two rows
    ragged = dataclasses.replace(call, q=call.q[:, 0], cu_seqlens_q=rows, most_rows=2)
    inputs = {name: guarded(*types, torch.device("cpu")) for name, types in ragged.output_types().items()}
    launched = Inputs.of(ragged, inputs)
    emulated.launch(_library(PINNED, folder), ragged, launched.outputs, fill=make_params)
    assert not launched.damage() and torch.equal(launched.outputs["out"], right["out"][:, 0])


@pytest.mark.parametrize("magnitude", [30.0, 3e3, 133120.0])  # of the last, scores are beyond 2^31
def test_large_scores(magnitude: float, folder: Path) -> None:
    call = _call(PINNED, [437, 90, 600], num_splits=-64)
    call = dataclasses.replace(call, q=call.q * magnitude, k=call.k * magnitude)
    verdict = CALLS.check(call, run(PINNED, folder, call))
    assert verdict, verdict.message


# Barriers and waits are taken away: one of some runs finds it.
_BROKEN = Case("columns", page=32, mask="none", dtype="fp16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("products, [] { __syncthreads(); }", "products, [] {}"),  # tiles are overwritten while others read them
        ("ptx::cp_async_wait<C::kStages - 2>();", ""),  # or read before they are there
        ("__syncthreads();  // all weights are there", ""),  # as are other warps' weights
        ("bool there = down < rows_end;", "bool there = bytes > 0;"),  # rows that no sequence has are read
    ],
)
def test_who_does_not_wait_is_wrong(old: str, new: str, folder: Path) -> None:
    text = emulated.source(FAMILY, _BROKEN.problem, SM80, _BROKEN.config)
    assert old in text
    library = emulated.build(text.replace(old, new), folder, Params)
    problem, found = _BROKEN.problem.replace(batch=2, heads=4, kv_heads=1, seqlen_q=3, seqlen_k=574), []
    for seed in range(8):
        inputs = CALLS.inputs(problem, "cpu", seed, True)
        emulated.launch(library, inputs.call, inputs.outputs, seed=seed, units=1, fill=make_params)
        found.append(bool(CALLS.check(inputs.call, inputs.outputs)))
    assert not all(found)


WINDOW = Case("last_block", page=1, mask="window", sinks=True)


def test_keys_outside_of_every_window_are_not_read(folder: Path) -> None:
    """Pages behind the window may be somebody else's by now, or no pages at all."""
    call = _call(WINDOW, [300, 77], rows=3, window=(40, 0), sinks=torch.zeros(4))
    want = run(WINDOW, folder, call)
    k, v, table = call.k.clone(), call.v.clone(), call.page_table.clone()
    for b, length in enumerate((300, 77)):
        gone = call.page_table[b, : length - 3 - 40].long()
        k[gone], v[gone] = math.nan, math.nan
        table[b, : length - 3 - 40] = 0x7FFFFFF0
    found = run(WINDOW, folder, dataclasses.replace(call, k=k, v=v, page_table=table))
    assert all(torch.equal(found[name], want[name]) for name in found)


FP8_CASES = [Case("base", page=1, **FP8), Case("columns_two_warps", page=16, dtype="fp16", sinks=True, **FP8)]


@pytest.mark.parametrize("case", FP8_CASES, ids=str)
def test_every_fp8_number_is_exact(case: Case, folder: Path) -> None:
    """One key: O is its row of v. The values are all finite codes, denormals and both zeros among them."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes % 128 == 127] = 0  # NaN
    dtype = torch.float16 if case.dtype == "fp16" else torch.bfloat16
    v = torch.zeros(1, case.page, 4, 64, dtype=torch.uint8)
    v[0, 0] = codes.view(4, 64)
    v = v.view(torch.float8_e4m3fn)
    q = torch.ones(1, 1, 4, 64, dtype=dtype)
    call = DecodeCall(
        q, v, v, torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32),
        sinks=torch.full((4,), -math.inf) if case.sinks else None,
    )  # fmt: skip
    found = run(case, folder, call)
    assert torch.equal(found["out"], v[0, :1].to(dtype)[None])
    scores = v[0, 0].double().sum(1) / 8
    assert torch.allclose(found["lse"][0, :, 0].double(), scores, rtol=1e-6, atol=1e-6)


def test_a_call_tells_that_v_is_a_part_of_k() -> None:
    call = _call(PINNED, [40])
    shared = dataclasses.replace(call, v=call.k[..., :32])
    assert shared.problem.shared_kv and shared.problem.static_key.endswith("d64-32/none/page16/shared-kv")
    apart = dataclasses.replace(shared, v=call.v[..., :32])  # of the same strides
    later = dataclasses.replace(shared, v=call.k[..., 32:])
    assert not apart.problem.shared_kv and not later.problem.shared_kv
    assert dispatch._all_facts(shared) != dispatch._all_facts(apart)  # whose tensors differ in addresses alone
    outputs = shared.new_outputs()
    CALLS.require(shared.problem, shared, outputs)
    CALLS.require(apart.problem, shared, outputs)  # who reads both reads the same twice
    with pytest.raises(InvalidArgument, match="the kernel is for"):
        CALLS.require(shared.problem, apart, outputs)
    with pytest.raises(InvalidArgument, match="more columns"):
        DecodeProblem(head_dim=64, head_dim_v=128, shared_kv=True)


@pytest.mark.parametrize(("scheme", "most_without_memory"), [("last_block", 1), ("cluster", 8)])
def test_the_kernels_rule_of_splits_is_pythons(scheme: str, most_without_memory: int, folder: Path) -> None:
    """The cost model knows how many splits a launch has: the workspace holds as many, but those of a cluster."""
    case, row_bytes = Case(scheme, page=16), 4 * 64 + 8
    for units, batch, keys in ((1, 1, 40), (4, 3, 600), (20, 1, 4000), (60, 2, 9000), (60, 64, 9000)):
        call = _call(case, [keys])
        call = dataclasses.replace(call, q=call.q.expand(batch, -1, -1, -1), seqlens_k=call.seqlens_k.expand(batch))
        target = dataclasses.replace(SM80, units=units)
        problem = case.problem.replace(batch=batch, heads=4, kv_heads=1, seqlen_k=keys)
        splits = sm80_decode.splits_of(problem, target, case.config)
        library = _library(case, folder)
        library._library.emulator_begin(ctypes.c_uint64(0), ctypes.c_int(units))
        params = make_params(call, {"out": call.q})
        need = library.workspace_bytes(ctypes.byref(params))
        assert need // (batch * 16 * row_bytes) == (splits if splits > most_without_memory else 0), splits
