"""Decode kernels on a GPU: built, launched and checked, and what all families of them are asked alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fagen.codegen.spec import KernelSpec
from fagen.families import Config, Family
from fagen.ops.attention.decode_calls import CALLS
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.ops.inputs import Inputs
from fagen.runtime import kernel
from fagen.runtime.kernel import Kernel
from tests.support.cases import build_specs, present


class Case(Protocol):
    @property
    def problem(self) -> DecodeProblem: ...
    @property
    def config(self) -> Config: ...


@dataclass(frozen=True)
class Decoders:
    """Kernels of one family: of a case, or of a problem's default."""

    family: Family

    def spec(self, problem: DecodeProblem, case: Any = None) -> KernelSpec:
        config = self.family.default(problem, present()) if case is None else case.config
        return KernelSpec(self.family, problem, present(), self.family.require(problem, present(), config))

    def kernel(self, problem: DecodeProblem, case: Any = None) -> Kernel:
        return kernel.get(self.spec(problem, case))

    def of(self, case: Case) -> Kernel:
        return self.kernel(case.problem, case)

    def build(self, cases: Iterable[Case], defaults: Iterable[DecodeProblem]) -> None:
        """On all cores."""
        build_specs([*(self.spec(case.problem, case) for case in cases), *map(self.spec, defaults)])

    def sanitize(self, case: Case, heads: int, kv_heads: int, *rows: int) -> None:
        """Two small launches, for tools that slow them down: one whose splits the kernel chooses, one with three."""
        which = self.of(case)
        for batch, each, splits in zip((3, 2), rows, (0, 3), strict=True):
            sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "seqlen_q": each, "seqlen_k": 300}
            inputs = CALLS.inputs(case.problem.replace(**sizes), "cuda", batch, True).change(num_splits=splits)
            launch(which, inputs)
            assert CALLS.check(inputs.call, inputs.outputs)


def launch(which: Kernel, inputs: Inputs) -> None:
    """On outputs of NaN."""
    for t in inputs.outputs.values():
        t.fill_(float("nan"))
    which.launch(inputs.call, inputs.outputs)
    torch.cuda.synchronize()


def check(which: Kernel, problem: DecodeProblem, seed: int, sample: bool = False) -> None:
    inputs = CALLS.inputs(problem, "cuda", seed, True)
    launch(which, inputs)
    verdict = (CALLS.check_sample if sample else CALLS.check)(inputs.call, inputs.outputs)
    assert verdict and not inputs.damage(), f"{problem.key} seed {seed}: {verdict.message} {inputs.damage()}"


def check_lengths_in_a_graph(which: Kernel, problem: DecodeProblem) -> None:
    """One captured launch serves lengths and pages that change on the device."""
    inputs = CALLS.inputs(problem, "cuda", 0, False)
    call, graph = inputs.call, torch.cuda.CUDAGraph()
    which.launch(call, inputs.outputs)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        which.launch(call, inputs.outputs)
    numbers = torch.Generator("cuda").manual_seed(1)
    for step in range(30):
        lengths = torch.randint(0, problem.seqlen_k + 1, (problem.batch,), device="cuda", generator=numbers)
        call.seqlens_k.copy_(lengths if step else torch.full_like(lengths, problem.seqlen_k))
        call.page_table.copy_(call.page_table.flip(0))
        for t in inputs.outputs.values():
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        verdict = CALLS.check_sample(call, inputs.outputs)
        assert verdict, f"step {step}: {verdict.message}"


def check_each_alone(which: Kernel, inputs: Inputs) -> None:
    """Every sequence of a paged batch by itself, with no more room than it needs, gives the same bits."""
    launch(which, inputs)
    call = inputs.call
    for b in range(call.batch):
        one = slice(b, b + 1)
        alone = dataclasses.replace(
            call, q=call.q[one], seqlens_k=call.seqlens_k[one].clone(), page_table=call.page_table[one].clone(),
            most_keys=max(1, int(call.seqlens_k[b])),
        )  # fmt: skip
        outputs = {name: torch.empty_like(t[one]) for name, t in inputs.outputs.items()}
        which.launch(alone, outputs)
        assert all(torch.equal(outputs[name], t[one]) for name, t in inputs.outputs.items()), b


def check_a_thousand_runs(which: Kernel, inputs: Inputs) -> None:
    """They are bitwise equal."""
    launch(which, inputs)
    first = {name: t.clone() for name, t in inputs.outputs.items()}
    for _ in range(1000):
        which.launch(inputs.call, inputs.outputs)
        assert all(torch.equal(t, first[name]) for name, t in inputs.outputs.items())
