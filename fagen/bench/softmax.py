"""The suite `softmax`: rows of a softmax and its gradient, ours as a user calls it, and the peers that PyTorch has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fagen.bench import flash
from fagen.bench.ours import dispatched
from fagen.bench.peers import Cannot, Loaded, Prepare, Serve
from fagen.bench.rows import Inputs, Row
from fagen.ops.softmax.problem import SoftmaxProblem

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from fagen.ops.oracle import Verdict
    from fagen.ops.softmax.call import SoftmaxCall
    from fagen.target import Target

OP = "softmax"
# rows x columns, as users have them: attention's, classes, vocabularies, and rows that no block holds
_SIZES = (
    (64, 128), (4096, 128), (32768, 256), (16384, 1024), (4096, 4096), (4096, 8192), (2048, 32000), (1024, 50257),
    (1024, 128256), (128, 262144), (128, 1 << 20),
)  # fmt: skip
_COLUMNS = ((4096, 4096), (64, 262144))  # along them
_CPU_BYTES = 1 << 30  # of a row that a CPU measures


def suite(target: Target, direction: str) -> list[Row]:
    """Half precision and float32 on a GPU; on a CPU float32."""
    found = []
    for dtype in ("bf16", "fp32") if target.is_gpu else ("fp32",):
        for along, sizes in (("row", _SIZES), ("column", _COLUMNS)):
            for rows, columns in sizes:
                problem = SoftmaxProblem(direction=direction, dtype=dtype, along=along, rows=rows, columns=columns)
                if target.is_gpu or problem.bytes() <= _CPU_BYTES:
                    series = f"{direction} {dtype} {along}"
                    found.append(Row(f"{series} {rows}x{columns}", problem, series))
    return found


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(row: Row, inputs: Inputs) -> Serve:
    """`fagen.softmax` as a user calls it; of its gradient the kernel that dispatch picks."""
    from fagen import softmax_api
    from fagen.ops.softmax import calls

    call = inputs.call
    if call.dout is None:
        function = softmax_api.log_softmax if call.log else softmax_api.softmax
        return lambda i: function(i.call.x, i.call.axis, i.call.out_dtype)
    return dispatched(call, lambda i: calls.by_torch(i.call))


def check_sample(call: SoftmaxCall, given: Mapping[str, torch.Tensor], cells: int) -> tuple[Verdict, str]:
    from fagen.ops.softmax.calls import CALLS

    return CALLS.check_sample(call, given), "a sample of rows"


# ---- peers ----------------------------------------------------------------------------------------------------------


def eager(paths: Mapping[str, Path]) -> Loaded:
    from fagen.ops.softmax import calls

    return Loaded({OP: lambda row, inputs: lambda i: calls.by_torch(i.call)}, _torch_version())


def compiled(paths: Mapping[str, Path]) -> Loaded:
    """The textbook's formulas through torch.compile, for each row's shape by itself."""

    def prepare(row: Row, inputs: Inputs) -> Serve:
        import torch

        function: Callable[..., Any] = _backward if inputs.call.dout is not None else _forward
        call = inputs.call
        torch.compiler.reset()  # else the limit of recompilations makes later rows fail
        made = torch.compile(
            functools.partial(function, axis=call.axis, log=call.log, dtype=call.out_dtype),
            dynamic=False, fullgraph=True,
        )  # fmt: skip
        return lambda i: made(*i.call.inputs().values())

    return Loaded({OP: prepare}, _torch_version())


def quack(paths: Mapping[str, Path]) -> Loaded:
    """QuACK's functions for contiguous rows; its package may be among the wheels of `--fa4 DIR`."""
    if folder := paths.get("fa4"):
        flash.add_wheels(folder, "quack")
    module = flash.imported("quack.softmax", "pip install quack-kernels, or --fa4 names a folder of its wheels")
    return Loaded({OP: through_quack(module)}, flash.version_of("quack-kernels"))


def through_quack(module: Any) -> Prepare:
    def prepare(row: Row, inputs: Inputs) -> Serve:
        call = inputs.call
        if call.along != "row" or call.log:
            raise Cannot("it has softmax along contiguous rows, not " + ("its logarithm" if call.log else "columns"))
        if call.out_dtype != call.x.dtype:
            raise Cannot(f"it writes the dtype that it reads, not {call.out_dtype}")
        function = module.softmax_fwd if call.dout is None else lambda y, dout: module.softmax_bwd(dout, y)
        columns = call.x.shape[2]
        return lambda i: function(*(t.reshape(-1, columns) for t in i.call.inputs().values())).view_as(i.call.x)

    return prepare


def _forward(x: torch.Tensor, *, axis: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    import torch

    return (torch.log_softmax if log else torch.softmax)(x, axis, dtype=dtype)


def _backward(y: torch.Tensor, dout: torch.Tensor, *, axis: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    y, dout = y.float(), dout.float()
    if log:
        return (dout - y.exp() * dout.sum(axis, keepdim=True)).to(dtype)
    return (y * (dout - (y * dout).sum(axis, keepdim=True))).to(dtype)


def _torch_version() -> str:
    import torch

    return torch.__version__
