"""Whether an output is right, for every op: the verdict, and the comparison with a reference that leads to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROW_BLOCK = 64


@dataclass(frozen=True)
class Verdict:
    ok: bool
    error: float  # the largest absolute error of the output
    ratio: float  # the largest error over its bound; at most 1 is right
    message: str = ""

    def __bool__(self) -> bool:
        return self.ok


def compare(
    name: str,
    mine: torch.Tensor,
    want: torch.Tensor,
    peer: torch.Tensor,
    *,
    rounding: float,
    factor: float = 2.0,
    start: int = 0,
) -> Verdict:
    """The largest error over its bound, block of rows by block of rows, of a tensor (batch, heads, rows, columns).

    `want` is exact, `peer` what PyTorch computes in the output's own dtype: an error may be `factor` times as large as
    the peer's, plus one `rounding` of the block's largest magnitude. `start` is the number of the first row.
    """
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
    peer_bound = torch.maximum(factor * blocks[1], blocks[1].amax(-1, keepdim=True))
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
