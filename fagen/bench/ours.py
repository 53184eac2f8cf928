"""Our side of a row: the kernel that dispatch picks for a call, how it is launched, and what a result keeps of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fagen.bench.peers import Serve
from fagen.bench.rows import Inputs, Row

if TYPE_CHECKING:
    from fagen.ops.base import Call
    from fagen.runtime.kernel import Kernel
    from fagen.target import Target


def dispatched(call: Call, without: Callable[[Inputs], Any]) -> Serve:
    """The kernel that dispatch picks, launched as peers are, not through autograd; `without` one, what PyTorch does."""
    made = kernel_of(call)
    return launched(made) if made else without


def kernel_of(call: Call) -> Kernel | None:
    from fagen.dispatch import resolve

    where = _target(call)
    return resolve.kernel_for(call.problem, where) if where else None


def _target(call: Call) -> Target | None:
    from fagen.target import target_of

    return target_of(next(iter(call.inputs().values())).device)


def launched(made: Kernel) -> Serve:
    """A kernel, launched without dispatch: prepared once for each set of inputs."""
    from fagen.runtime.kernel import launcher

    names, calls = made.calls.timed, dict[int, Callable[[], object]]()

    def serve(i: Inputs) -> Any:
        if id(i) not in calls:
            calls[id(i)] = launcher(made, i)
        calls[id(i)]()
        return i.outputs[names[0]] if len(names) == 1 else tuple(i.outputs[name] for name in names)

    return serve


def choice(row: Row, inputs: Inputs) -> dict[str, Any]:
    """What dispatch picks for the row, and whether a kernel of ours really serves it. Of a step, its backward."""
    from fagen import explanation
    from fagen.dispatch import resolve

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said in the result
        where, problem = _target(inputs.call), row.problem if row.training else inputs.call.problem
        assert where is not None
        return chosen(explanation.explain_problem(problem, where), resolve.kernel_for(problem, where))


def chosen(report: Any, kernel: Kernel | None) -> dict[str, Any]:
    """The part of an explanation that a result keeps."""
    found = report.to_dict()
    names = ("key", "family", "config", "provenance", "record", "facts")
    return {name: found[name] for name in names} | {"served_by": "kernel" if kernel is not None else "torch"}
