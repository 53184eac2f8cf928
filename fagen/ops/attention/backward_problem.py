"""The problem of the backward op."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fagen.errors import InvalidArgument
from fagen.ops.attention.problem import Problem


@dataclass(frozen=True)
class BackwardProblem(Problem):
    """The same fields as a forward problem. The static key adds whether two runs must agree in every bit."""

    op: str = "backward"
    deterministic: bool = False

    def _check(self) -> None:
        super()._check()
        if self.tf32:
            raise InvalidArgument("backward has no tf32", "no family rounds products of gradients to TF32")

    @classmethod
    def of(cls, forward: Problem, *, deterministic: bool = False) -> BackwardProblem:
        """The gradients of a forward problem's call, whether it allows TF32 or not."""
        return cls(**{**forward.to_dict(), "op": "backward", "deterministic": deterministic, "tf32": False})

    @property
    def forward(self) -> Problem:
        """The problem of the call that is differentiated."""
        names = (field.name for field in fields(Problem))
        return Problem(**{**{name: getattr(self, name) for name in names}, "op": "forward"})

    @property
    def static_key(self) -> str:
        return super().static_key + ("/deterministic" if self.deterministic else "")

    def bytes(self) -> int:
        """Memory of a call's inputs and outputs: those of forward read, and gradients like q, k, v and O."""
        p = self
        of_rows = p.batch * p.heads * p.seqlen_q * (p.head_dim + p.head_dim_v)
        of_keys = p.batch * p.kv_heads * p.seqlen_k * (p.head_dim + p.head_dim_v)
        return super().bytes() + (of_rows + of_keys) * self.itemsize

    def flops(self) -> float:
        """5 products where forward has 2: S, dK and dQ of head_dim, dP and dV of head_dim_v."""
        d, dv = self.head_dim, self.head_dim_v
        return super().flops() * (3 * d + 2 * dv) / (d + dv)
