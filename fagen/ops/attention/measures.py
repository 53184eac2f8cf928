"""Measures of a size of attention that defaults look at, as tests that the C++ table makes, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fagen.ops.attention import size_point
from fagen.ops.attention.size_point import TILE_ROWS

if TYPE_CHECKING:
    from fagen.target import Target

# Of a problem, by tiles of so many rows or keys (of packed heads TILE_ROWS at least), on a target. `AtMost` of
# csrc/table.h has the same, in this order.
MEASURES: dict[str, Callable[[Any, int, Target], int]] = {
    "keys": lambda p, tile, t: p.seqlen_k,
    "seen_keys": lambda p, tile, t: min(p.seqlen_k, p.window_left + p.seqlen_q) if p.window_left >= 0 else p.seqlen_k,
    "rows": lambda p, tile, t: p.seqlen_q,
    "shorter": lambda p, tile, t: min(p.seqlen_q, p.seqlen_k),
    "packed_heads": lambda p, tile, t: size_point.packed_heads(p, max(tile, TILE_ROWS)),
    "packed_rows": lambda p, tile, t: p.seqlen_q * size_point.packed_heads(p, max(tile, TILE_ROWS)),
    "row_blocks": lambda p, tile, t: -(-p.seqlen_q // tile) * p.heads * p.batch,
    "key_blocks": lambda p, tile, t: -(-p.seqlen_k // tile) * p.kv_heads * p.batch,
    "few_rows": lambda p, tile, t: int(size_point.has_few_rows(p, t)),  # of ops whose regime that is
}


@dataclass(frozen=True)
class AtMost:
    """Whether a measure is at most a limit."""

    measure: str  # of MEASURES
    limit: int = 0
    tile: int = 1

    def holds(self, problem: Any, target: Target) -> bool:
        return MEASURES[self.measure](problem, self.tile, target) <= self.limit

    @property
    def words(self) -> tuple[int, int, int]:
        """For the table in C++."""
        return [*MEASURES].index(self.measure), self.tile, self.limit
