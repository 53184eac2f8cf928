"""cpu_decode against the oracle: every page size, dtype, mask and knob value, and how keys are split."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any

import pytest
import torch

from fagen import ops
from fagen.codegen.spec import KernelSpec
from fagen.errors import LaunchError
from fagen.families import cpu_decode
from fagen.ops.attention.decode_call import DecodeCall
from fagen.ops.attention.decode_problem import PAGES, DecodeProblem
from fagen.runtime import kernel
from fagen.runtime.kernel import Kernel
from fagen.target import Target, host, known
from fagen.verify import checks

FAMILY = cpu_decode.FAMILY
CALLS = ops.get("decode").calls()
# a static key each, and what its config has of its own: together every page size and every value of every knob
KERNELS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"dtype": "fp32", "head_dim": 64}, {}),
    (
        {"dtype": "bf16", "head_dim": 64, "head_dim_v": 48, "mask": "window", "page": 16, "sinks": True}
        | {"softcap": True},
        {"tile_n": 16, "tile_rows": 8, "block_rows": 1, "pieces": 16, "least_keys": 128},
    ),
    ({"dtype": "fp16", "head_dim": 32, "mask": "causal", "page": 1, "kv_dtype": "fp8_e4m3"}, {"packing": "tile"}),
    (
        {"dtype": "bf16", "head_dim": 40, "mask": "causal", "page": 32, "aligned": False},
        {"tile_n": 128, "tile_rows": 64, "prefetch": False, "least_keys": 512},
    ),
    ({"dtype": "bf16", "head_dim": 128, "kv_dtype": "fp8_e4m3", "page": 128, "softcap": True}, {"tile_rows": 16}),
    (
        {"dtype": "fp16", "head_dim": 96, "mask": "causal", "page": 256, "sinks": True},
        {"tile_n": 256, "pieces": 128, "least_keys": 1024},
    ),
    ({"dtype": "fp32", "head_dim": 16, "mask": "causal", "page": 64, "sinks": True}, {"tile_n": 32, "pieces": 64}),
]  # fmt: skip


@functools.cache
def built(index: int) -> Kernel:
    static, changes = KERNELS[index]
    problem = DecodeProblem(**static, heads=6, kv_heads=2, seqlen_q=2, seqlen_k=900)
    config = FAMILY.config({**FAMILY.default(problem, host()), **changes})
    return kernel.get(KernelSpec(FAMILY, problem, host(), config))


def outputs_of(k: Kernel, call: DecodeCall) -> dict[str, torch.Tensor]:
    outputs = {name: t.fill_(torch.nan) for name, t in call.new_outputs().items()}
    k.launch(call, outputs)
    return outputs


def test_all_is_covered() -> None:
    configs = [built(i).spec.config for i in range(len(KERNELS))]
    assert {static.get("page", 0) for static, _ in KERNELS} == set(PAGES)
    for knob in FAMILY.knobs:
        assert {c[knob.name] for c in configs} == set(knob.choices), knob.name


@pytest.mark.parametrize("index", range(len(KERNELS)))
def test_right_at_all_sizes(index: int) -> None:
    k = built(index)
    _, wrong = checks.compare(k, k.spec.problem, host())
    assert not wrong


@pytest.mark.parametrize("num_splits", [0, 1, 2, 5, 99, -1, -16, -100, -5000])
def test_splits(num_splits: int) -> None:
    for index, fields in ((0, {}), (6, {"seqlen_q": 3}), (1, {"window_left": 70})):
        k = built(index)
        problem = k.spec.problem.replace(batch=5, heads=4, kv_heads=2, seqlen_k=333, **fields)
        call = dataclasses.replace(CALLS.inputs(problem, "cpu", 3, True).call, num_splits=num_splits)
        verdict = CALLS.check(call, outputs_of(k, call))
        assert verdict, f"{k.spec.problem}: {verdict.message}"


def test_many_rows_take_several_tiles_of_rows() -> None:
    """A chunk of a prompt among single tokens: one sequence has 90 rows of 3 heads, the others fewer or none."""
    k = built(6)
    call = CALLS.inputs(k.spec.problem.replace(batch=5, seqlen_q=90, seqlen_k=400), "cpu", 2, True).call
    assert call.ragged and call.seqlen_q * 3 > 2 * k.spec.config.tile_rows
    verdict = CALLS.check(call, outputs_of(k, call))
    assert verdict, verdict.message


def one_sequence(call: DecodeCall, b: int) -> DecodeCall:
    index = slice(b, b + 1)
    return dataclasses.replace(
        call, q=call.q[index], seqlens_k=call.seqlens_k[index],
        page_table=None if call.page_table is None else call.page_table[index],
        cache_batch_idx=None if call.cache_batch_idx is None else call.cache_batch_idx[index],
        most_keys=int(call.seqlens_k[b]),
    )  # fmt: skip


def test_pinned_splits_do_not_depend_on_the_others() -> None:
    """Bitwise: alone, and among others of other lengths, whatever bound the caller says."""
    k = built(0)
    problem = k.spec.problem.replace(batch=4, heads=4, kv_heads=2, seqlen_q=1, seqlen_k=3000)
    call = CALLS.inputs(problem, "cpu", 3, True).call
    call = dataclasses.replace(call, seqlens_k=torch.tensor([3000, 2049, 700, 2500], dtype=torch.int32).clamp(
        max=call.seqlens_k
    ), num_splits=-256)  # fmt: skip
    together = outputs_of(k, call)
    for b in range(4):
        if int(call.seqlens_k[b]) == 0:
            continue
        alone = outputs_of(k, one_sequence(call, b))
        for name, t in alone.items():
            assert torch.equal(t[0], together[name][b]), f"sequence {b} of {int(call.seqlens_k[b])} keys: {name}"


def test_damaged_indices_are_refused() -> None:
    """Nothing outside is read or written, and the caller is told."""
    plain, paged = built(0), built(6)
    contiguous = CALLS.inputs(plain.spec.problem.replace(batch=3, seqlen_q=1, seqlen_k=70), "cpu", 1, False).call
    pages = CALLS.inputs(paged.spec.problem.replace(batch=3, seqlen_q=1, seqlen_k=70), "cpu", 1, False).call
    assert pages.page_table is not None
    rows = {"q": contiguous.q[:, 0], "most_rows": 2}

    def changed(t: torch.Tensor, value: int) -> torch.Tensor:
        copy = t.clone()
        copy.view(-1)[1] = value
        return copy

    def starts(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    broken: list[tuple[Kernel, DecodeCall, dict[str, Any], str]] = []
    for value in (-1, 71, 2**31 - 1, -(2**31)):
        for k, call in ((plain, contiguous), (paged, pages)):
            broken.append((k, call, {"seqlens_k": changed(call.seqlens_k, value)}, "a length"))
    for value in (-1, pages.k.shape[0], 2**31 - 1, -(2**31)):
        broken.append((paged, pages, {"page_table": changed(pages.page_table, value)}, "page table"))
        broken.append((plain, contiguous, {"cache_batch_idx": starts(0, value, 1)}, "cache_batch_idx"))
    for values in ((0, 2, 1, 3), (0, 3, 3, 3), (0, 1, 2, 2**31 - 1), (-1, 0, 1, 2), (0, 1, -(2**31), 3)):
        broken.append((plain, contiguous, {**rows, "cu_seqlens_q": starts(*values)}, "a length"))
    for k, call, change, message in broken:
        with pytest.raises(LaunchError, match=message):
            outputs_of(k, dataclasses.replace(call, **change))
    outputs_of(plain, dataclasses.replace(contiguous, **rows, cu_seqlens_q=starts(0, 1, 1, 3)))


def test_fp8_of_all_bits() -> None:
    """Every e4m3 value, NaN among them, comes out as PyTorch converts it."""
    k = built(2)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    v = values.reshape(8, 1, 1, 32)
    call = DecodeCall(
        q=torch.zeros(1, 1, 1, 32, dtype=torch.float16), k=torch.zeros(8, 1, 1, 32).to(values.dtype), v=v,
        seqlens_k=torch.ones(1, dtype=torch.int32), page_table=torch.zeros(1, 1, dtype=torch.int32), window=(-1, 0),
    )  # fmt: skip
    for row in range(8):
        one = dataclasses.replace(call, page_table=torch.full((1, 1), row, dtype=torch.int32))
        out = outputs_of(k, one)["out"].flatten()
        assert torch.equal(out.nan_to_num(9999), v[row].flatten().to(torch.float16).nan_to_num(9999))


def test_what_it_cannot_serve() -> None:
    assert FAMILY.supports(DecodeProblem(), known("sm_90")) == "needs a CPU, the target is sm_90"
    for dtype, head_dim, page in (("bf16", 128, 16), ("fp32", 256, 0), ("bf16", 576, 64)):
        own = DecodeProblem(dtype=dtype, head_dim=head_dim, page=page)
        for simd in ("avx512", "avx2", "neon"):
            FAMILY.require(own, Target("cpu", "test", 2, simd=simd), FAMILY.default(own, host()))
    for config, reason in (
        ({"packing": "tile"}, "direct_floats"),
        ({"tile_n": 256, "least_keys": 128}, "whole_splits"),
    ):
        fp32 = DecodeProblem(dtype="fp32")
        broken = FAMILY.rejects(fp32, host(), FAMILY.default(fp32, host()).replace(**config))
        assert broken is not None and broken[0] == reason
    large = DecodeProblem(dtype="fp32", head_dim=576)
    assert FAMILY.rejects(large, host(), FAMILY.default(large, host()).replace(tile_n=256, least_keys=256))


def test_a_page_size_that_is_not_its_own_is_refused() -> None:
    made = CALLS.inputs(built(0).spec.problem.replace(batch=1, seqlen_k=64), "cpu", 1, False)
    params: Any = CALLS.params(made.call, made.outputs)
    params.page_size = 32
    library = built(0).library
    assert b"pages are not of the size" in library.error(library.launch(ctypes.byref(params), None))
