"""A call of `fagen.attention` and its oracle, for the tests."""

from __future__ import annotations

import dataclasses

import torch

import fagen
from fagen.ops.attention import masks, reference
from fagen.ops.attention.reference import Semantics


@dataclasses.dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict

    def semantics(self) -> Semantics:
        o = self.options
        left, right = (-1 if bound is None else bound for bound in o.get("window", (None, None)))
        intervals = o.get("intervals")
        kind = masks.interval_kind(intervals.shape[3], o.get("causal", False)) if intervals is not None else ""
        window = (left, 0 if o.get("causal") else right)
        return Semantics(window, kind, o.get("softcap", 0.0), o.get("scale"))

    def check(self, out: torch.Tensor, lse: torch.Tensor | None) -> reference.Verdict:
        tensors = {"intervals": self.options.get("intervals"), "alibi": self.options.get("alibi_slopes")}
        layout = self.options.get("layout", "bshd")
        return reference.check(out, lse, self.q, self.k, self.v, self.semantics(), layout=layout, **tensors)


def example(b: int = 2, sq: int = 33, sk: int = 47, h: int = 4, hk: int = 2, d: int = 16, **options: object) -> Case:
    generator = torch.Generator().manual_seed(3)
    shapes = ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, d))
    return Case(*(torch.randn(shape, generator=generator) for shape in shapes), dict(options))


def run(case: Case) -> reference.Verdict:
    return case.check(*fagen.attention(case.q, case.k, case.v, return_lse=True, **case.options))
