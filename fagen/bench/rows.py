"""A row of the benchmark: a problem under a name, its inputs, and what a call of it must compute and move."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from fagen import ops
from fagen.errors import UsageError
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.inputs import Inputs

if TYPE_CHECKING:
    import torch

    from fagen.target import Target


TRAINING = "training"


@dataclass(frozen=True)
class Row:
    """`series` names the rows that differ in length alone. Packed documents and a prefix are masks of intervals."""

    name: str
    problem: Any  # attention's, or a softmax
    series: str = ""
    documents: tuple[int, ...] = ()  # lengths of the documents that each sequence holds
    prefix: int = 0  # keys that all rows see, the rest is causal
    steps: tuple[tuple[int, int], ...] = ()  # rows and keys of each sequence of decode, where they differ
    packed: bool = False  # the documents are the sequences of a call of `flash_attn_varlen_func`
    training: bool = False  # forward and backward through autograd, host included; the problem is backward's

    @property
    def op(self) -> str:
        return self.problem.op

    @property
    def measured(self) -> str:
        """The key of what the benchmark measures: the op, or a step of training."""
        return TRAINING if self.training else self.op

    @property
    def length(self) -> int:
        """The length by which rows of a series differ."""
        return int(getattr(self.problem, ops.get(self.op).length))

    @property
    def causal(self) -> bool:
        return self.problem.window_right == 0


def of_problem(problem: Any) -> Row:
    """A row for a problem of the user's own."""
    if getattr(problem, "intervals", "") == "lower2":
        problem = problem.replace(window_right=0)  # what `fagen.attention` takes two columns for when it is causal
    prefix = f"{problem.op}/"
    return Row(problem.key.removeprefix(prefix), problem, problem.static_key.removeprefix(prefix))


def deterministic(problem: Any) -> bool:
    """Whether two runs must agree in every bit, as a backward problem may ask."""
    return isinstance(problem, BackwardProblem) and problem.deterministic


def plain(row: Row) -> Row:
    """The row without dropout, its gradients in whatever order is the fastest."""
    problem = row.problem
    if deterministic(problem):
        problem = problem.replace(deterministic=False)
    if getattr(problem, "dropout", False):
        problem = problem.replace(dropout=False)
    return replace(row, problem=problem)


def as_op(problem: Any, op: str, *, same_bits: bool = False) -> Any:
    """The same sizes for an op; `same_bits` makes a backward problem deterministic."""
    op = "backward" if op == TRAINING else op
    if problem.op == op and not same_bits:
        return problem
    kind, its = ops.get(op), ops.get(problem.op)
    if kind.features is not its.features:  # features of a size point are what two ops can have in common
        raise UsageError(f"{problem.key} is no problem of {op}", f"sizes of {problem.op} mean something else")
    names = {field.name for field in fields(kind.problem)}
    given = {name: value for name, value in problem.to_dict().items() if name in names} | {"op": op}
    return kind.problem(**given | ({"deterministic": same_bits} if "deterministic" in names else {}))


def row_of_op(row: Row, op: str, *, same_bits: bool = False) -> Row:
    """A suite's row for an op, by the same name, which says as well whether it is deterministic."""
    problem, mark = as_op(row.problem, op, same_bits=same_bits), " deterministic" if same_bits else ""
    training = op == TRAINING
    return replace(row, problem=problem, name=row.name + mark, series=row.series + mark, training=training)


def make_inputs(row: Row, where: Target | str, seed: int = 0) -> Inputs:
    """Random tensors, outputs full of NaN, and the row's own intervals. A step of training draws its own dropout."""
    import torch

    from fagen.ops.attention import masks

    if row.steps:
        from fagen.ops.attention import decode_inputs

        return decode_inputs.of_steps(row.problem, where, seed, row.steps)
    problem = plain(row).problem if row.training else row.problem
    made: Inputs = ops.get(row.op).calls().inputs(problem, where, seed, False)
    if row.documents:
        device = made.call.q.device
        ids = torch.arange(len(row.documents)).repeat_interleave(torch.tensor(row.documents))
        return _masked(made, masks.from_documents(ids[None], causal=row.causal).to(device))
    if row.prefix:
        return _masked(made, masks.from_prefix([row.prefix], row.problem.seqlen_q).to(made.call.q.device))
    return made


def _masked(made: Inputs, intervals: torch.Tensor) -> Inputs:
    """The inputs with other intervals; what backward takes from forward follows from them."""
    from fagen.ops.attention import fallback
    from fagen.ops.attention.backward_call import BackwardCall

    changed = made.change(intervals=intervals)
    if not isinstance(changed.call, BackwardCall):
        return changed
    o, lse = fallback.attend(replace(changed.call.forward, want_lse=True))
    return changed.change(o=o, lse=lse)


def flops(row: Row, call: Any) -> float:
    """Of the cells that are visible; a causal square counts half, as the field counts."""
    of_call = ops.get(row.op).calls().flops
    return sum(of_call(one, call) for one in _parts(row))


def least_bytes(row: Row) -> int:
    """What any kernel must read and write."""
    return sum(ops.get(one.op).least_bytes(one) for one in _parts(row))


def _parts(row: Row) -> list[Any]:
    """Forward and backward of a step of training; a problem for each sequence of decode, where their sizes differ."""
    if row.training:
        return [row.problem.forward, row.problem]
    return [row.problem.replace(batch=1, seqlen_q=q, seqlen_k=k) for q, k in row.steps] or [row.problem]
