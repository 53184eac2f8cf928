"""What the benchmark does for each op, and for a step of training: the one table that names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fagen.bench import attention, decode, fp8, rows, softmax
from fagen.bench import ours as kernels
from fagen.bench.peers import Prepare
from fagen.bench.rows import Inputs, Row
from fagen.errors import UsageError
from fagen.schema import shown
from fagen.target import Target

if TYPE_CHECKING:
    import torch

    from fagen.ops.oracle import Verdict

_MANY_CELLS = {"cuda": 1 << 32, "cpu": 1 << 25}
_FEW_CELLS = {"cuda": 1 << 25, "cpu": 1 << 22}  # where the reference takes several products in float32 a cell


@dataclass(frozen=True)
class OpBench:
    ours: Prepare  # what a user calls; of an op that autograd or a model calls, its kernel
    # of a call, its outputs by name, and how many scores may be checked in full: the verdict, and what was checked
    check: Callable[[Any, Mapping[str, torch.Tensor], int], tuple[Verdict, str]]
    cells: Mapping[str, int] = field(default_factory=dict)  # scores that are checked in full, on each device
    choice: Callable[[Row, Inputs], dict[str, Any]] = kernels.choice  # what dispatch picks
    reads: bool = False  # memory is read and hardly written: the machine's rate of reads bounds it
    by_binding: bool = False  # `ours` goes through the C++ op
    captured: bool = True  # into CUDA graphs, so that the host's time does not count
    needs_split_keys: Callable[[Any, Target], bool] = field(default=lambda problem, target: False)


OPS = {
    "forward": OpBench(
        attention.ours, attention.check_heads, _MANY_CELLS, attention.choice,
        by_binding=True, needs_split_keys=attention.needs_split_keys,
    ),
    "backward": OpBench(attention.our_gradients, attention.check_sample, _FEW_CELLS),
    rows.TRAINING: OpBench(
        attention.our_step, attention.check_sample, _FEW_CELLS, attention.choice, by_binding=True, captured=False
    ),
    "decode": OpBench(decode.ours, attention.check_sample, _FEW_CELLS, reads=True),
    "forward_fp8": OpBench(fp8.ours, attention.check_sample, _FEW_CELLS),
    "softmax": OpBench(softmax.ours, softmax.check_sample),
}  # fmt: skip


def get(op: str) -> OpBench:
    if op not in OPS:
        raise UsageError(f"fagen bench measures no {shown(op)}", f"its ops: {', '.join(OPS)}")
    return OPS[op]
