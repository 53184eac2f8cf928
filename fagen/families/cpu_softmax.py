"""Softmax for any CPU, forward and backward: OpenMP, vectors as wide as the machine's, sums in float32.

A row is cut into chunks by its length alone; what is reduced of each is merged in their order. Threads share the rows,
or where there are few the chunks of each row, and every result has the same bits whatever their number.
"""

from __future__ import annotations

from typing import Any

from fagen.families.base import Config, Constraint, Family, Knob
from fagen.families.cpu_forward import FLAGS
from fagen.families.reads import nothing
from fagen.ops.softmax.problem import SoftmaxProblem
from fagen.target import Target

ELEMENTS = {"fp32": "float", "fp16": "half_t", "bf16": "bfloat_t"}

KNOBS = (
    Knob(
        "scheme", "kScheme", ("three_pass", "two_pass", "stored"),
        "safe, a pass each for maximum, sum, output; online, chunk by chunk; online with each exponential kept",
    ),
    Knob("chunk", "kChunk", (1024, 4096, 16384), "elements that are reduced at a time"),
    Knob("unroll", "kUnroll", (1, 2, 4, 8), "vectors side by side; along columns also those of a tile"),
)  # fmt: skip


def _scheme_fits(p: SoftmaxProblem, t: Target, c: Config) -> str | None:
    if p.direction == "backward" and c.scheme != "two_pass":
        return f"backward sums and writes: scheme={c.scheme} only repeats two_pass"
    if c.scheme == "stored" and p.log:
        return "the logarithm writes no exponential: nothing to keep"
    if c.scheme == "stored" and p.along == "column" and p.out_dtype != "fp32":
        return f"along columns exponentials are kept in the output, which is {p.out_dtype}"
    return None


def _whole_rows(p: SoftmaxProblem, t: Target, c: Config) -> str | None:
    return f"three passes have no chunks, so chunk={c.chunk} only repeats 1024" if _repeats_chunk(c) else None


def _repeats_chunk(c: Config) -> bool:
    return c.scheme == "three_pass" and c.chunk != 1024


def _supports(p: SoftmaxProblem, t: Target) -> str | None:
    return f"needs a CPU, the target is {t.arch}" if t.is_gpu else None


def _context(p: SoftmaxProblem, c: Config) -> dict[str, Any]:
    return {"out_element": ELEMENTS[p.out_dtype]}


def _make(p: SoftmaxProblem, t: Target, **changes: int | str) -> Config:
    """The default config with changes."""
    keeps = p.direction == "forward" and not p.log and (p.along == "row" or p.out_dtype == "fp32")
    values: dict[str, int | str] = {
        "scheme": "stored" if keeps else "two_pass", "chunk": 4096, "unroll": 4,
    }  # fmt: skip
    return FAMILY.config(values | changes)


def _first(p: SoftmaxProblem, t: Target) -> list[Config]:
    default = _make(p, t)
    tried = [
        _make(p, t, unroll=2), _make(p, t, chunk=1024), _make(p, t, scheme="two_pass"),
        _make(p, t, scheme="three_pass", chunk=1024),
    ]  # fmt: skip
    return [c for c in dict.fromkeys(tried) if c != default and FAMILY.rejects(p, t, c) is None]


FAMILY = Family(
    name="cpu_softmax",
    template="cpu/softmax.cpp.j2",
    op="softmax",
    dtypes=("fp32", "bf16", "fp16"),
    knobs=KNOBS,
    constraints=(
        Constraint("scheme_fits", _scheme_fits, ("scheme",)),
        Constraint("whole_rows", _whole_rows, ("scheme", "chunk")),
    ),
    supports=_supports,
    derive=lambda p, t, c: {},
    default=_make,
    default_reads=nothing,
    flags=lambda t: FLAGS,
    context=_context,
    first_configs=_first,
)
