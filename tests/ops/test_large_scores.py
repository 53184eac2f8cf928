"""Finite inputs give finite, right outputs, also where one float32 FMA cannot hold score * scale - reference."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from fagen.codegen.spec import KernelSpec
from fagen.families import cpu_forward
from fagen.ops.attention import reference
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.problem import Problem
from fagen.runtime import kernel
from fagen.target import host, known
from tests.support import emulated
from tests.support.cases import HOPPER, Case, run

# one of each way in which scores become weights
SCHEMES = ("tma", "tma_rescale_each", "base", "overlap", "split_k", "kv_outer", "pairs")
MAGNITUDES = {"bf16": (3e3, 133120.0, 1e8), "fp16": (3e3,)}  # scores up to 2^50; fp16 itself ends at 65504


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cuda_kernels(scheme: str, cache_folder: Path) -> None:
    dtype = "fp16" if scheme in ("tma_rescale_each", "pairs") else "bf16"
    for magnitude in MAGNITUDES[dtype]:
        case = Case(scheme, heads=2, kv_heads=1, dtype=dtype, magnitude=magnitude)
        target = known("sm_90" if case.family is HOPPER else "sm_80")
        text = emulated.source(case.family, case.problem, target, case.config)
        library = emulated.build(
            text, cache_folder / "emulated"
        )  # a second emulator in one process would be in its way
        verdict = run(case, 130, 300, batch=1, device="cpu", launch=functools.partial(emulated.launch, library))
        assert verdict, f"{magnitude}: {verdict.message}"


@pytest.mark.parametrize("magnitude", [3e3, 133120.0, 1e8])
def test_cpu_kernel(magnitude: float) -> None:
    family = cpu_forward.FAMILY
    problem = Problem(dtype="bf16", head_dim=64, mask="causal")
    one = kernel.get(KernelSpec(family, problem, host(), family.default(problem, host())))
    q, k, v = ((torch.randn(1, 2, n, 64) * m).bfloat16() for n, m in ((130, magnitude), (300, magnitude), (300, 1.0)))
    outputs = {"out": torch.full_like(q, torch.nan), "lse": torch.full((1, 2, 130), torch.nan)}
    call = AttentionCall.of(q, k, v, layout="bhsd", causal=True)
    one.launch(call, outputs)
    verdict = reference.check(call, outputs)
    assert verdict, verdict.message
