"""A row of the benchmark: a problem under a name, its inputs, and the FLOPs of the cells that its mask leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fagen import ops
from fagen.errors import UsageError
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.problem import INTERVAL_KINDS, Problem
from fagen.ops.inputs import Inputs

if TYPE_CHECKING:
    import torch

    from fagen.ops.attention.call import AttentionCall
    from fagen.target import Target


@dataclass(frozen=True)
class Row:
    """`series` names the rows that differ in length alone. Packed documents and a prefix are masks of intervals."""

    name: str
    problem: Any  # attention's, or a softmax
    series: str = ""
    documents: tuple[int, ...] = ()  # lengths of the documents that each sequence holds
    prefix: int = 0  # keys that all rows see, the rest is causal
    steps: tuple[tuple[int, int], ...] = ()  # rows and keys of each sequence of decode, where they differ

    @property
    def op(self) -> str:
        return self.problem.op

    @property
    def length(self) -> int:
        """The length by which rows of a series differ."""
        lengths = {"decode": "seqlen_k", "softmax": "length"}
        return int(getattr(self.problem, lengths.get(self.op, "seqlen_q")))

    @property
    def causal(self) -> bool:
        return self.problem.window_right == 0


def of_problem(problem: Any) -> Row:
    """A row for a problem of the user's own."""
    if problem.op == "softmax":
        return Row(problem.key, problem, problem.static_key)
    if problem.intervals == "lower2":
        problem = problem.replace(window_right=0)  # what `fagen.attention` takes two columns for when it is causal
    prefix = f"{problem.op}/"
    return Row(problem.key.removeprefix(prefix), problem, problem.static_key.removeprefix(prefix))


def deterministic(problem: Problem) -> bool:
    """Whether two runs must agree in every bit, as a backward problem may ask."""
    return isinstance(problem, BackwardProblem) and problem.deterministic


def as_op(problem: Problem, op: str, *, same_bits: bool = False) -> Problem:
    """The same sizes for an op; `same_bits` makes a backward problem deterministic."""
    if problem.op == op and not same_bits:
        return problem
    if "decode" in (problem.op, op):
        raise UsageError(f"{problem.key} is no problem of {op}", "sizes of decode mean something else")
    fields = {**problem.to_dict(), "op": op}
    if op == "backward":
        fields["deterministic"] = same_bits
    else:
        fields.pop("deterministic", None)
    kind: type[Problem] = ops.get(op).problem
    return kind(**fields)


def row_of_op(row: Row, op: str, *, same_bits: bool = False) -> Row:
    """A suite's row for an op, by the same name, which says as well whether it is deterministic."""
    problem, mark = as_op(row.problem, op, same_bits=same_bits), " deterministic" if same_bits else ""
    return replace(row, problem=problem, name=row.name + mark, series=row.series + mark)


_TILE_ROWS, _MANY_KEYS = 128, 512


def needs_split_keys(problem: Problem, target: Target) -> bool:
    """Whether fewer blocks of rows than SMs have many keys each: SMs are idle unless several share a block's keys."""
    p = problem
    if p.op != "forward":
        return False
    blocks = -(-p.seqlen_q // _TILE_ROWS) * p.heads * p.batch
    keys = min(p.seqlen_k, p.window_left + _TILE_ROWS) if p.window_left >= 0 else p.seqlen_k
    return target.is_gpu and blocks < target.units and keys >= _MANY_KEYS


def make_inputs(row: Row, where: Target | str, seed: int = 0) -> Inputs:
    """Random tensors, outputs full of NaN, and the row's own intervals."""
    import torch

    from fagen.ops.attention import masks

    if row.steps:
        from fagen.ops.attention import decode_inputs

        return decode_inputs.of_steps(row.problem, where, seed, row.steps)
    made: Inputs = ops.get(row.op).calls().inputs(row.problem, where, seed, False)
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


def options(row: Row, call: AttentionCall) -> dict[str, Any]:
    """The arguments of `fagen.attention` beside the tensors."""
    left, right = call.window
    return {
        "causal": row.causal,
        "window": (None if left < 0 else left, None if right < 0 or row.causal else right),
        "intervals": call.intervals,
        "softcap": call.softcap,
        "alibi_slopes": call.alibi_slopes,
    }


def flops(row: Row, call: Any) -> float:
    """By the op's products for each visible cell; a causal square counts half, as the field counts."""
    p = row.problem
    if row.steps:
        return sum(float(one.flops()) for one in _sequences(row))
    if row.op in ("decode", "softmax") or call.intervals is None:
        return float(p.flops())
    square = p.replace(mask="none", intervals="", window_left=-1, window_right=-1)
    planes = call.intervals.shape[0] * call.intervals.shape[1]
    return square.flops() / square.visible() * visible_cells(p, call.intervals) / planes


def least_bytes(row: Row) -> int:
    """What any kernel must read and write: q, O, and those keys and values that the band leaves to some row.

    Backward reads dO and the LSE beside them, and writes the gradient of all that forward reads.
    """
    p = row.problem
    if row.steps:
        return sum(one.bytes() for one in _sequences(row))
    if row.op in ("decode", "softmax"):
        return int(p.bytes())
    dims, backward = p.head_dim + p.head_dim_v, p.op == "backward"
    first = max(0, p.seqlen_k - p.seqlen_q - p.window_left) if p.window_left >= 0 else 0
    keys = p.seqlen_k - min(first, p.seqlen_k - 1)
    of_rows = p.batch * p.heads * p.seqlen_q * ((2 * dims * p.itemsize + 4) if backward else dims * p.itemsize)
    return of_rows + p.itemsize * p.batch * p.kv_heads * (keys + p.seqlen_k * backward) * dims


def _sequences(row: Row) -> list[Any]:
    """A problem for each sequence of a decode row."""
    return [row.problem.replace(batch=1, seqlen_q=rows, seqlen_k=keys) for rows, keys in row.steps]


def visible_cells(problem: Problem, intervals: torch.Tensor) -> int:
    """Cells that band and intervals leave, over all planes of the intervals: key by key, as lengths of row ranges."""
    import torch

    p, rows, bounds = problem, problem.seqlen_q, intervals.cpu().long()
    diagonal = torch.arange(p.seqlen_k) - (p.seqlen_k - rows)  # the row on the key's diagonal
    none, all_rows = torch.zeros_like(diagonal), torch.full_like(diagonal, rows)
    first = (diagonal - p.window_right).clamp(0, rows) if p.window_right >= 0 else none
    end = (diagonal + p.window_left + 1).clamp(0, rows) if p.window_left >= 0 else all_rows
    columns = dict(zip(INTERVAL_KINDS[p.intervals], bounds.unbind(-1), strict=True))
    lower = columns["LTS"], columns.get("LTE", all_rows)
    upper = columns.get("UTS", none), columns.get("UTE", none)

    def common(*ranges: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        start, stop = first, end
        for low, high in ranges:
            start, stop = torch.maximum(start, low), torch.minimum(stop, high)
        return (stop - start).clamp(min=0)

    seen = common((none, all_rows)) - common(lower) - common(upper) + common(lower, upper)
    return int(seen.sum())
