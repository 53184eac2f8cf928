"""Backward kernels of a family on the GPU of the tests: built together, each run on its cases' sizes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fagen.codegen.spec import KernelSpec
from fagen.families import Family
from fagen.runtime import kernel
from fagen.runtime.kernel import Library
from tests.support.backward import Case, run
from tests.support.cases import build_specs, present


@dataclass(frozen=True)
class OnGpu:
    family: Family

    def spec(self, case: Case) -> KernelSpec:
        return KernelSpec(self.family, case.problem, present(), case.config)

    def legal(self, case: Case) -> bool:
        return self.family.rejects(case.problem, present(), case.config) is None

    def build(self, cases: Iterable[Case]) -> None:
        build_specs(self.spec(case) for case in cases if self.legal(case))

    def library(self, case: Case) -> Library:
        return _library(self.spec(case))

    def check(self, case: Case, **options: Any) -> None:
        """Against autograd, on each of the case's sizes."""
        stream = torch.cuda.current_stream().cuda_stream
        for seed, (rows, keys) in enumerate(case.sizes):
            verdict = run(case, rows, keys, self.library(case), stream, seed=seed, batch=2, device="cuda", **options)
            assert verdict, f"{rows}x{keys}: {verdict.message}"


@functools.cache
def _library(spec: KernelSpec) -> Library:
    return kernel.get(spec).library
