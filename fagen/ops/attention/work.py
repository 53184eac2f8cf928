"""How much a call of attention must compute and move, whoever computes it: for rates, and for what bounds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fagen.ops.attention.problem import INTERVAL_KINDS, Problem

if TYPE_CHECKING:
    import torch

    from fagen.ops.attention.backward_call import BackwardCall
    from fagen.ops.attention.call import AttentionCall


def flops(problem: Problem, call: AttentionCall | BackwardCall) -> float:
    """By the op's products for each visible cell; a causal square counts half, as the field counts."""
    intervals = call.intervals
    if intervals is None:
        return float(problem.flops())
    square = problem.replace(mask="none", intervals="", window_left=-1, window_right=-1)
    planes = intervals.shape[0] * intervals.shape[1]
    return square.flops() / square.visible() * visible_cells(problem, intervals) / planes


def least_bytes(problem: Problem) -> int:
    """Forward reads q and writes O, and reads those keys and values that the band leaves to some row."""
    p = problem
    return _row_bytes(p) + p.itemsize * p.batch * p.kv_heads * _keys_in_band(p) * (p.head_dim + p.head_dim_v)


def least_bytes_backward(problem: Problem) -> int:
    """Backward reads dO and the LSE beside them, and writes the gradient of all that forward reads."""
    p = problem
    rows = 2 * _row_bytes(p) + 4 * p.batch * p.heads * p.seqlen_q
    return rows + p.itemsize * p.batch * p.kv_heads * (_keys_in_band(p) + p.seqlen_k) * (p.head_dim + p.head_dim_v)


def _row_bytes(p: Problem) -> int:
    return p.itemsize * p.batch * p.heads * p.seqlen_q * (p.head_dim + p.head_dim_v)


def _keys_in_band(p: Problem) -> int:
    first = max(0, p.seqlen_k - p.seqlen_q - p.window_left) if p.window_left >= 0 else 0
    return p.seqlen_k - min(first, p.seqlen_k - 1)


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
