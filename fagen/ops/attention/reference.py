"""The one oracle, for the tuner and the tests alike.

An output is right when its pattern of non-finite values is the reference's, and when, in every block of rows of
every head, its largest error is at most twice that of PyTorch computing in the same dtype (or once PyTorch's largest
in that head), plus one rounding of the output's dtype at the block's largest magnitude. The reference runs in float32
(float64 for float32 inputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fagen.ops.attention.masks import dense

if TYPE_CHECKING:
    import torch

ROW_BLOCK = 64
_BYTES_A_STEP = 512 << 20


@dataclass(frozen=True)
class Semantics:
    """What to compute, tensors aside: the arguments of `fagen.attention` in resolved form (-1: unbounded)."""

    window: tuple[int, int] = (-1, -1)
    kind: str = ""  # of the intervals
    softcap: float = 0.0
    scale: float | None = None


@dataclass(frozen=True)
class Verdict:
    ok: bool
    error: float  # the largest absolute error of the output
    ratio: float  # the largest error over its bound; at most 1 is right
    message: str = ""

    def __bool__(self) -> bool:
        return self.ok


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    semantics: Semantics,
    alibi: torch.Tensor | None = None,
    rows: slice = slice(None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention of bhsd tensors in their own dtype for some rows; rows that see nothing give 0 and -inf.

    `seen` is the dense mask of those rows. Differentiable; this is also the fallback of last resort.
    """
    import torch

    heads, kv_heads, group = q.shape[1], k.shape[1], q.shape[1] // k.shape[1]
    scale = semantics.scale if semantics.scale is not None else 1.0 / math.sqrt(q.shape[-1])
    sq, sk = q.shape[2], k.shape[2]
    q = q[:, :, rows]
    grouped = q.reshape(q.shape[0], kv_heads, group, q.shape[2], q.shape[3])
    scores = torch.matmul(grouped * scale, k[:, :, None].transpose(-1, -2)).flatten(1, 2)
    if semantics.softcap:
        scores = semantics.softcap * torch.tanh(scores / semantics.softcap)
    if alibi is not None:
        row = torch.arange(sq, device=q.device)[rows, None] + (sk - sq)
        distance = (row - torch.arange(sk, device=q.device)[None]).abs()
        slopes = alibi.to(scores.dtype).reshape(-1, heads, 1, 1)
        scores = scores - slopes * distance.to(scores.dtype)
    if seen is not None:
        if seen.shape[1] not in (1, heads):
            seen = seen.repeat_interleave(heads // seen.shape[1], dim=1)
        scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores.float() if scores.dtype != torch.float64 else scores, dim=-1)
    # a row that sees nothing: exp(-inf - 0) = 0 everywhere, in the gradient as well
    top = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == -math.inf, 0, top))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1, total)
    grouped = weights.reshape(q.shape[0], kv_heads, group, -1, sk)
    return torch.matmul(grouped, v[:, :, None]).flatten(1, 2), lse


def row_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    semantics: Semantics,
    intervals: torch.Tensor | None,
    only: Iterable[slice] | None = None,
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Blocks of rows whose scores fit in memory, and what they see (None: everything); bhsd tensors."""
    sq, sk = q.shape[2], k.shape[2]
    a_row = q.shape[0] * q.shape[1] * sk * 8
    step = max(ROW_BLOCK, _BYTES_A_STEP // max(1, a_row) // ROW_BLOCK * ROW_BLOCK)
    window, kind, device = semantics.window, semantics.kind, q.device
    for rows in only or (slice(start, min(start + step, sq)) for start in range(0, sq, step)):
        seen = None
        if window != (-1, -1) or intervals is not None:
            seen = dense(sq, sk, window=window, intervals=intervals, kind=kind, rows=rows, device=device)
        yield rows, seen


def check(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    semantics: Semantics,
    *,
    intervals: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
    layout: str = "bhsd",
    rows: Iterable[slice] | None = None,
) -> Verdict:
    """Whether `out` (and `lse`, if given) is attention of q, k, v, in all rows or in some. NaN never passes."""
    import torch

    if layout == "bshd":
        out, q, k, v = (t.transpose(1, 2) for t in (out, q, k, v))
    exact = torch.float64 if q.dtype == torch.float32 else torch.float32
    if tuple(out.shape) != (*q.shape[:3], v.shape[3]):
        return Verdict(False, math.inf, math.inf, f"shape {tuple(out.shape)}, not {(*q.shape[:3], v.shape[3])}")
    worst, largest, where = 0.0, 0.0, ""
    with torch.no_grad():
        exact_q, exact_k, exact_v = (t.to(exact) for t in (q, k, v))
        for block, seen in row_blocks(q, k, semantics, intervals, rows):
            ref, ref_lse = attend(exact_q, exact_k, exact_v, seen, semantics, alibi, block)
            low, low_lse = attend(q, k, v, seen, semantics, alibi, block)
            pairs = [("O", out[:, :, block], ref, low, torch.finfo(out.dtype).eps / 2)]
            if lse is not None:
                pairs.append(("LSE", lse[:, :, block, None], ref_lse[..., None], low_lse[..., None], 2e-5))
            for name, mine, want, peer, rounding in pairs:
                verdict = _compare(name, mine, want, peer, rounding, block.start)
                if verdict.ratio > worst:
                    worst, where = verdict.ratio, verdict.message
                if name == "O":
                    largest = max(largest, verdict.error)
    return Verdict(worst <= 1.0, largest, worst, where)


def _compare(
    name: str, mine: torch.Tensor, want: torch.Tensor, peer: torch.Tensor, rounding: float, start: int
) -> Verdict:
    """The largest error over its bound, block of rows by block of rows."""
    import torch

    mine, peer = mine.to(want.dtype), peer.to(want.dtype)
    broken = (torch.isfinite(mine) != torch.isfinite(want)) | torch.isnan(mine)
    broken |= torch.isinf(want) & (mine != want)
    if broken.any():
        at = [int(i) for i in broken.nonzero()[0]]
        message = f"{name} is {float(mine[tuple(at)])} where the reference is {float(want[tuple(at)])}"
        return Verdict(False, math.inf, math.inf, f"{message} at {_place(at, start)}")
    finite = torch.isfinite(want)
    zero = torch.zeros((), dtype=want.dtype, device=want.device)
    error = torch.where(finite, (mine - want).abs(), zero)
    allowed = torch.where(finite, (peer - want).abs(), zero).nan_to_num(0.0, 0.0, 0.0)
    size = torch.where(finite, want.abs(), zero)
    rows = error.shape[2]
    pad = -rows % ROW_BLOCK
    blocks = []
    for t in (error, allowed, size):
        t = torch.nn.functional.pad(t.amax(-1), (0, pad))
        blocks.append(t.reshape(*t.shape[:2], -1, ROW_BLOCK).amax(-1))
    # a block of few rows may be lucky: an error that PyTorch makes elsewhere in the same head is no fault here
    peer_bound = torch.maximum(2 * blocks[1], blocks[1].amax(-1, keepdim=True))
    bound = peer_bound + rounding * blocks[2] + 1e-6
    ratio = blocks[0] / bound
    flat = int(ratio.argmax())
    at = [int(i) for i in torch.unravel_index(torch.tensor(flat), ratio.shape)]
    worst, limit = float(ratio.flatten()[flat]), float(bound.flatten()[flat])
    at_rows = f"rows {start + at[2] * ROW_BLOCK}-{start + min(rows, (at[2] + 1) * ROW_BLOCK) - 1}"
    message = (
        f"{name}: error {float(blocks[0].flatten()[flat]):.3g}, bound {limit:.3g}, batch {at[0]} head {at[1]} {at_rows}"
    )
    return Verdict(worst <= 1.0, float(error.max()), worst, message)


def _place(at: list[int], start: int) -> str:
    return f"batch {at[0]} head {at[1]} row {start + at[2]} column {at[3]}"
