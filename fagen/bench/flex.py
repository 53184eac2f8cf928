"""FlexAttention: compiled anew for each row, its mask in the form that its own users write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.bench import rows
from fagen.bench.autograd import steps, through_autograd
from fagen.bench.peers import Cannot, Loaded, Prepare, Serve
from fagen.bench.rows import TRAINING, Inputs, Row
from fagen.ops.attention.problem import INTERVAL_KINDS

if TYPE_CHECKING:
    import torch

    from fagen.ops.attention.call import AttentionCall

Mod = Callable[..., Any]


def load(paths: Mapping[str, Path], *, compiled: bool = True) -> Loaded:
    import torch

    forward = _prepare(compiled)
    by_op = {"forward": forward, "backward": through_autograd(forward), TRAINING: steps(forward)}
    return Loaded(by_op, f"torch {torch.__version__}")


def _prepare(compiled: bool) -> Prepare:
    def prepare(row: Row, inputs: Inputs) -> Serve:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        p, call = row.problem, inputs.call
        if rows.deterministic(p):
            raise Cannot("it has no deterministic mode")
        if p.dropout:
            raise Cannot("it has no dropout")
        mask, score = mask_mod(row, call), score_mod(row, call)
        batch, heads = _planes(row, call)
        blocks = None
        if mask is not None:
            blocks = create_block_mask(mask, batch, heads, p.seqlen_q, p.seqlen_k, device=str(call.q.device))
        attend: Any = flex_attention
        if compiled:
            torch.compiler.reset()  # else the limit of recompilations makes later rows eager
            attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        shared = p.heads != p.kv_heads

        def serve(i: Inputs) -> torch.Tensor:
            return attend(*i.call.bhsd(), score_mod=score, block_mask=blocks, enable_gqa=shared).transpose(1, 2)

        return serve

    return prepare


def _planes(row: Row, call: AttentionCall) -> tuple[int | None, int | None]:
    """Batches and heads whose masks differ; None where one serves all."""
    intervals = call.intervals
    if intervals is None or row.documents or row.prefix:
        return None, None
    batch, planes = intervals.shape[:2]
    return (batch if batch > 1 else None), (row.problem.heads if planes > 1 else None)


def mask_mod(row: Row, call: AttentionCall) -> Mod | None:
    """Which (batch, head, row, key) is visible; None: all are."""
    from torch.nn.attention.flex_attention import and_masks

    p = row.problem
    shift, left, right = p.seqlen_k - p.seqlen_q, p.window_left, p.window_right
    parts: list[Mod] = []
    if row.documents:
        parts.append(_documents(row, call.q.device))
    elif row.prefix:
        prefix = row.prefix
        parts.append(lambda b, h, q, k: (k < prefix) | (q + shift >= k))
    elif call.intervals is not None:
        parts.append(_intervals(row, call.intervals))
    if right >= 0:
        parts.append(lambda b, h, q, k: q + shift + right >= k)
    if left >= 0:
        parts.append(lambda b, h, q, k: q + shift - k <= left)
    return and_masks(*parts) if parts else None


def _documents(row: Row, device: torch.device) -> Mod:
    import torch

    ids = torch.arange(len(row.documents)).repeat_interleave(torch.tensor(row.documents)).to(device)
    return lambda b, h, q, k: ids[q] == ids[k]


def _intervals(row: Row, intervals: torch.Tensor) -> Mod:
    p, columns = row.problem, INTERVAL_KINDS[row.problem.intervals]
    batch, planes = intervals.shape[:2]
    group = p.heads // planes

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        bound = {
            name: intervals[b if batch > 1 else 0, h // group if planes > 1 else 0, k, n]
            for n, name in enumerate(columns)
        }
        hidden = q >= bound["LTS"]
        if "LTE" in bound:
            hidden = hidden & (q < bound["LTE"])
        if "UTE" in bound:
            above = q < bound["UTE"]
            hidden = hidden | (above & (q >= bound["UTS"]) if "UTS" in bound else above)
        return ~hidden

    return seen


def score_mod(row: Row, call: AttentionCall) -> Mod | None:
    """Softcap, then ALiBi, as `fagen.attention` orders them."""
    import torch

    p, cap, slopes = row.problem, call.softcap, call.alibi_slopes
    if not cap and slopes is None:
        return None
    shift = p.seqlen_k - p.seqlen_q

    def change(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        if cap:
            score = cap * torch.tanh(score / cap)
        if slopes is not None:
            score = score - slopes[b, h] * (q + shift - k).abs()
        return score

    return change
