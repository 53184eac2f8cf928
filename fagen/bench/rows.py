"""A row of the benchmark: a problem under a name, its inputs, and the FLOPs of the cells that its mask leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fagen.ops.attention import inputs
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
    problem: Problem
    series: str = ""
    documents: tuple[int, ...] = ()  # lengths of the documents that each sequence holds
    prefix: int = 0  # keys that all rows see, the rest is causal

    @property
    def causal(self) -> bool:
        return self.problem.window_right == 0


def of_problem(problem: Problem) -> Row:
    """A row for a problem of the user's own."""
    if problem.intervals == "lower2":
        problem = problem.replace(window_right=0)  # what `fagen.attention` takes two columns for when it is causal
    key = problem.key.removeprefix("forward/")
    return Row(key, problem, problem.static_key.removeprefix("forward/"))


_TILE_ROWS, _MANY_KEYS = 128, 512


def needs_split_keys(problem: Problem, target: Target) -> bool:
    """Whether fewer blocks of rows than SMs have many keys each: SMs are idle unless several share a block's keys."""
    p = problem
    blocks = -(-p.seqlen_q // _TILE_ROWS) * p.heads * p.batch
    keys = min(p.seqlen_k, p.window_left + _TILE_ROWS) if p.window_left >= 0 else p.seqlen_k
    return target.is_gpu and blocks < target.units and keys >= _MANY_KEYS


def make_inputs(row: Row, where: Target | str, seed: int = 0) -> Inputs:
    """Random q, k and v, an `out` full of NaN, and the row's own intervals."""
    import torch

    from fagen.ops.attention import masks

    made = inputs.make_inputs(row.problem, where, seed)
    device = made.call.q.device
    if row.documents:
        ids = torch.arange(len(row.documents)).repeat_interleave(torch.tensor(row.documents))
        return made.change(intervals=masks.from_documents(ids[None], causal=row.causal).to(device))
    if row.prefix:
        return made.change(intervals=masks.from_prefix([row.prefix], row.problem.seqlen_q).to(device))
    return made


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


def flops(row: Row, call: AttentionCall) -> float:
    """2 products of 2 FLOP a visible cell; a causal square counts half, as the field counts."""
    p = row.problem
    if call.intervals is None:
        return p.flops()
    planes = call.intervals.shape[0] * call.intervals.shape[1]
    cells = visible_cells(p, call.intervals) * (p.batch * p.heads / planes)
    return 2.0 * cells * (p.head_dim + p.head_dim_v)


def least_bytes(row: Row) -> int:
    """What any kernel must read and write: q, O, and those keys and values that the band leaves to some row."""
    p = row.problem
    first = max(0, p.seqlen_k - p.seqlen_q - p.window_left) if p.window_left >= 0 else 0
    keys = p.seqlen_k - min(first, p.seqlen_k - 1)
    of_rows = p.batch * p.heads * p.seqlen_q * (p.head_dim + p.head_dim_v)
    return p.itemsize * (of_rows + p.batch * p.kv_heads * keys * (p.head_dim + p.head_dim_v))


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
