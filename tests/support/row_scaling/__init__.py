"""A second, tiny op that lives outside of fagen: out[row, :] = +-a[row, :] * w[row], and, if wanted, each row's sum.

`FAGEN_EXTENSIONS=tests.support.row_scaling` makes it known. Of its family's styles only `plain` is right.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fagen import schema
from fagen.errors import InvalidArgument
from fagen.families.base import Config, Constraint, Family, Knob
from fagen.ops import abi
from fagen.ops.base import Calls, Constant, Op
from fagen.ops.inputs import Inputs, guarded
from fagen.ops.oracle import Verdict, compare
from fagen.target import Target

HEADER = "fagen/abi/row_scaling.h"
TEMPLATES = Path(__file__).parent / "templates"
Outputs = Mapping[str, torch.Tensor]

# ---- the problem ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaling:
    """`negated` changes the source, the sizes do not."""

    op: str = "row_scaling"
    negated: bool = False
    rows: int = 64
    columns: int = 64

    def __post_init__(self) -> None:
        if self.op != "row_scaling" or type(self.negated) is not bool:
            raise InvalidArgument(f"this is no row scaling: {self.op!r}, negated={self.negated!r}")
        for name in ("rows", "columns"):
            if wrong := schema.integer(getattr(self, name), 1):
                raise InvalidArgument(f"{name}: {wrong}")

    @property
    def dtype(self) -> str:
        return "fp32"

    @property
    def static_key(self) -> str:
        return "row_scaling/fp32" + ("/negated" if self.negated else "")

    @property
    def size_key(self) -> str:
        return f"r{self.rows}-c{self.columns}"

    @property
    def key(self) -> str:
        return f"{self.static_key}/{self.size_key}"

    def bytes(self) -> int:
        return 4 * self.rows * (2 * self.columns + 1)

    def flops(self) -> float:
        return float(self.rows * self.columns)

    def replace(self, **changes: Any) -> Scaling:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Any) -> Scaling:
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or not set(fields) <= set(names):
            raise InvalidArgument(f"a row scaling has the fields {', '.join(names)}")
        return cls(**fields)

    def __str__(self) -> str:
        return self.key


# ---- its calls ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScalingCall:
    a: torch.Tensor
    w: torch.Tensor
    negated: bool = False

    @property
    def problem(self) -> Scaling:
        return Scaling("row_scaling", self.negated, *self.a.shape)

    def check_tensors(self) -> None:
        if self.a.dim() != 2 or self.w.shape != self.a.shape[:1] or {self.a.dtype, self.w.dtype} != {torch.float32}:
            raise InvalidArgument("a must be float32 (rows, columns), w float32 (rows)")
        if self.a.device != self.w.device or self.a.stride(1) != 1 or not self.w.is_contiguous():
            raise InvalidArgument("a and w must be on one device, the rows of a and w contiguous")

    def inputs(self) -> dict[str, torch.Tensor]:
        return {"a": self.a, "w": self.w}

    def output_types(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"out": (tuple(self.a.shape), torch.float32), "sums": (tuple(self.w.shape), torch.float32)}


def _params(call: ScalingCall, outputs: Outputs) -> ctypes.Structure:
    params: Any = abi.params(HEADER)()
    for name, t in (("a", call.a), ("out", outputs["out"])):
        field = getattr(params, name)
        field.data, field.stride[0] = t.data_ptr(), t.stride(0)
    params.w, params.rows, params.columns = call.w.data_ptr(), *call.a.shape
    if "sums" in outputs:
        params.sums = outputs["sums"].data_ptr()
    return params


def _require(problem: Scaling, call: ScalingCall, outputs: Outputs) -> None:
    if call.negated != problem.negated:
        raise InvalidArgument(f"the kernel is for {problem.static_key}", f"the call is {call.problem.static_key}")


def _inputs(problem: Scaling, device: Any, seed: int, varied: bool) -> Inputs:
    """`varied`: rows that lie apart, so that a kernel must go by the strides."""
    random, shape = torch.Generator(device).manual_seed(seed), (problem.rows, problem.columns)
    pitch = problem.columns + 3 if varied else problem.columns
    a = torch.randn(problem.rows, pitch, generator=random, device=device)[:, : problem.columns]
    w = torch.randn(problem.rows, generator=random, device=device)
    where = torch.device(device)
    out = guarded(shape, torch.float32, where, pitch=pitch)
    sums = guarded(shape[:1], torch.float32, where)
    return Inputs.of(ScalingCall(a, w, problem.negated), {"out": out, "sums": sums})


def _scaled(call: ScalingCall, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    a, w = call.a.to(dtype), call.w.to(dtype)
    out = (-a if call.negated else a) * w[:, None]
    return {"out": out, "sums": out.sum(1)}


def _check(call: ScalingCall, outputs: Outputs) -> Verdict:
    exact, peer = _scaled(call, torch.float64), _scaled(call, torch.float32)
    worst = Verdict(True, 0.0, 0.0)
    for name, t in outputs.items():
        shape = (1, 1, call.a.shape[0], -1)
        tensors = (x.reshape(shape) for x in (t, exact[name], peer[name]))
        found = compare(name, *tensors, rounding=2**-24 if name == "out" else 2**-24 * math.sqrt(call.a.shape[1]))
        worst = max(worst, found, key=lambda verdict: verdict.ratio)
    return worst


def _check_problems(problem: Scaling, target: Target) -> list[Scaling]:
    sizes = [(1, 1), (3, 7), (65, 130)]
    return [
        problem.replace(rows=r, columns=c) for r, c in [*sizes, (min(problem.rows, 256), min(problem.columns, 256))]
    ]


CALLS = Calls(
    variants=(("out", "sums"), ("out",)),
    params=_params,
    require=_require,
    inputs=_inputs,
    check_problems=_check_problems,
    check=_check,
    check_sample=_check,
    torch_peer=lambda call: (lambda: _scaled(call, torch.float32), "a product"),
)

# ---- the op and its family ------------------------------------------------------------------------------------------


def _constants(problem: Scaling) -> list[Constant]:
    return [("bool", "kNegated", str(problem.negated).lower(), "the result changes its sign")]


OP = Op(
    name="row_scaling",
    title="row scaling",
    problem=Scaling,
    header=HEADER,
    constants=_constants,
    features=lambda problem, units: {"rows": math.log2(problem.rows), "columns": math.log2(problem.columns)},
    weights={"rows": 0.5, "columns": 1.0},
    flags=lambda problem: ["--op", "row_scaling", f"--rows={problem.rows}", f"--columns={problem.columns}"],
    torch_serves=lambda problem: False,
    calls=lambda: CALLS,
)

STYLES = ("plain", "wrong", "beside", "into_w", "unwritten", "broken")


def _alone(problem: Scaling, target: Target, config: Config) -> str | None:
    return f"one {config.style} is enough" if config.style != "plain" and config.unroll > 1 else None


FAMILY = Family(
    name="cpu_row_scaling",
    template="row_scaling/cpu.cpp.j2",
    op="row_scaling",
    dtypes=("fp32",),
    knobs=(
        Knob("unroll", "kUnroll", (1, 4, 8), "columns of a step"),
        Knob("style", "kStyle", STYLES, "how it behaves"),
    ),
    constraints=(Constraint("alone", _alone),),
    supports=lambda problem, target: "runs on the CPU only" if target.is_gpu else None,
    derive=lambda problem, target, config: {},
    default=lambda problem, target: Config({"unroll": 4, "style": "plain"}),
    flags=lambda target: ("-std=c++17", "-O2"),
)

OPS, FAMILIES = (OP,), (FAMILY,)
