"""A call of `fagen.attention` and its oracle, for the tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import fagen
from fagen.ops.attention import reference
from fagen.ops.attention.call import AttentionCall

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # of `fagen.attention`


@dataclasses.dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict

    def call(self) -> AttentionCall:
        return AttentionCall.of(self.q, self.k, self.v, **self.options)

    def check(self, out: torch.Tensor, lse: torch.Tensor | None) -> reference.Verdict:
        return reference.check(self.call(), {"out": out} if lse is None else {"out": out, "lse": lse})


def example(b: int = 2, sq: int = 33, sk: int = 47, h: int = 4, hk: int = 2, d: int = 16, **options: object) -> Case:
    generator = torch.Generator().manual_seed(3)
    shapes = ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, d))
    return Case(*(torch.randn(shape, generator=generator) for shape in shapes), dict(options))


def run(case: Case) -> reference.Verdict:
    return case.check(*fagen.attention(case.q, case.k, case.v, return_lse=True, **case.options))


def right(result: Result, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> reference.Verdict:
    """Whether that is what `fagen.attention` should have returned for these arguments."""
    out, lse = (result, None) if isinstance(result, torch.Tensor) else result
    return Case(q, k, v, options).check(out, lse)
