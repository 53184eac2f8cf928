"""One call of the backward op: a forward call, what it gave, and the gradients of that."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments
from fagen.ops.attention.arguments import is_aligned
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.call import AttentionCall

GRADIENTS = {"dq": "q", "dk": "k", "dv": "v"}  # each output, and the input whose gradient it is


@dataclass(frozen=True, eq=False)
class BackwardCall(AttentionCall):
    """`o` and `lse` are what forward made of the call, `dout` and `dlse` their gradients; no `dlse` is one of zeros."""

    o: torch.Tensor = field(kw_only=True)
    lse: torch.Tensor = field(kw_only=True)
    dout: torch.Tensor = field(kw_only=True)
    dlse: torch.Tensor | None = field(default=None, kw_only=True)

    @classmethod
    def after(
        cls,
        forward: AttentionCall,
        o: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
        dlse: torch.Tensor | None = None,
    ) -> BackwardCall:
        """Raise InvalidArgument for what does not belong to the forward call, which is valid."""
        fields: dict[str, Any] = {f.name: getattr(forward, f.name) for f in dataclasses.fields(AttentionCall)}
        fields |= {"out": None, "want_lse": False}
        call = cls(**fields, o=o, lse=lse, dout=dout, dlse=dlse)
        call._check_results()
        return call

    @property
    def forward(self) -> AttentionCall:
        """The call that this one differentiates."""
        return AttentionCall(**{f.name: getattr(self, f.name) for f in dataclasses.fields(AttentionCall)})

    def check_tensors(self) -> None:
        super().check_tensors()
        self._check_results()

    def _check_results(self) -> None:
        results = super().output_types()
        named = [("o", self.o, "out"), ("dout", self.dout, "out"), ("lse", self.lse, "lse")]
        if self.dlse is not None:
            named.append(("dlse", self.dlse, "lse"))
        for name, t, like in named:
            arguments.dense(name, t)
            shape, dtype = results[like]
            if tuple(t.shape) != shape or t.dtype != dtype or t.device != self.q.device:
                have = f"it is {t.dtype} {tuple(t.shape)} on {t.device}"
                raise InvalidArgument(f"{name} must be {dtype} {shape} on {self.q.device}", have)

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, torch.Tensor]:
        results = {"o": self.o, "dout": self.dout, "lse": self.lse, "dlse": self.dlse}
        return super().inputs() | {name: t for name, t in results.items() if t is not None}

    def output_types(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        of = {name: getattr(self, like) for name, like in GRADIENTS.items()}
        return {name: (tuple(t.shape), t.dtype) for name, t in of.items()}

    def new_outputs(self) -> dict[str, torch.Tensor]:
        return {name: self.q.new_empty(shape, dtype=dtype) for name, (shape, dtype) in self.output_types().items()}

    def of_bhsd(self, t: torch.Tensor) -> torch.Tensor:
        """A tensor of the call's layout as (batch, heads, rows, head_dim)."""
        return t if self.layout == "bhsd" else t.transpose(1, 2)

    # ---- what can serve it ------------------------------------------------------------------------------------------

    @property
    def unreadable(self) -> str:
        found = super().unreadable
        if found:
            return found
        for name in ("o", "dout"):
            t = getattr(self, name)
            if t.stride(-1) != 1 and t.shape[-1] > 1:
                return f"the last dimension of {name} is not contiguous"
        for name in ("lse", "dlse"):
            t = getattr(self, name)
            if t is not None and not t.is_contiguous():
                return f"{name} is not contiguous"
        return ""

    @property
    def problem(self) -> BackwardProblem:
        forward = super().problem
        aligned = forward.aligned and is_aligned(self.o) and is_aligned(self.dout)
        return BackwardProblem.of(forward.replace(aligned=aligned), deterministic=self.deterministic)
