"""How long attention takes by one tiling or another, roughly, as tests that the C++ table makes, too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fagen.ops.attention import size_point

if TYPE_CHECKING:
    from fagen.target import Target

_asked: tuple[Any, int, dict[Tiling, float]] = None, 0, {}
UNPACKED, PACKED, ALONE = range(3)
TAIL = 0.15  # of the longest tile of rows, that the last unit is late where they differ


@dataclass(frozen=True)
class Tiling:
    """Tiles of rows by tiles of keys, and the cycles that they take. `Tiling` of csrc/table.h is the same in C++."""

    rows: int
    keys: int
    packing: int  # PACKED: rows of heads that share keys lie in one tile; ALONE: only for heads that share none
    visit: int  # cycles of a tile of keys
    start: int  # and of a tile of rows, beside those

    @property
    def code(self) -> int:
        code = 0
        for value, bits in ((self.rows, 12), (self.keys, 12), (self.packing, 2), (self.visit, 18), (self.start, 18)):
            assert 0 <= value < 1 << bits, self
            code = code << bits | int(value)
        return code

    def cycles(self, problem: Any, units: int) -> float:
        """Until the last of the units is done. Several tests ask for the same of one problem."""
        global _asked
        asked = _asked
        if asked[0] is not problem or asked[1] != units:
            asked = _asked = problem, units, {}
        found = asked[2].get(self)
        if found is None:
            found = asked[2][self] = self._cycles(problem, units)
        return found

    def _cycles(self, problem: Any, units: int) -> float:
        p, group = problem, problem.heads // problem.kv_heads
        packed = size_point.packed_heads(p, self.rows) if self.packing == PACKED else 1
        if (self.packing == PACKED and packed == 1) or (self.packing == ALONE and group > 1):
            return math.inf
        right = p.window_right
        even = right < 0 and p.window_left < 0
        rows = p.seqlen_q if even else min(p.seqlen_q, p.seqlen_k + max(0, right))
        tile = self.rows // packed
        tiles = max(1, -(-rows // tile))
        most, mean = self._visits(p, rows, tile, tiles, tile if p.window_left >= 0 else 64 // packed, right)
        pieces = float(tiles) * (group // packed) * p.kv_heads * p.batch
        last, each = most * self.visit + self.start, mean * self.visit + self.start
        if pieces <= units:
            return last
        return math.ceil(pieces / units) * each if even else pieces * each / units + TAIL * last

    def _visits(self, p: Any, rows: int, tile: int, tiles: int, own: int, right: int) -> tuple[float, float]:
        """Tiles of keys that the longest tile of rows sees, and the mean one, in closed form.

        A warpgroup may be done with keys after its `own` rows, and what it saves the others use, but not where all of
        them see few. A bound that is no multiple of a tile of keys costs a part of one.
        """
        n = self.keys
        most, seen = float(-(-p.seqlen_k // n)), float(p.seqlen_k)
        if right < 0 and p.window_left < 0:
            return most, most
        if right >= 0:
            ends, short = max(1, -(-rows // own)), max(0, rows - right) // own  # those that do not see the last key
            missing = short * float(rows - right) - 0.5 * own * short * float(short + 1)
            part = _mean_part(rows - right - p.seqlen_k, own, n) * short + -p.seqlen_k % n * (ends - short)
            seen += (part - missing) / ends
        if p.window_left >= 0:
            hidden = p.seqlen_k - rows - p.window_left  # from the first row
            first = min(tiles, 0 if hidden >= 0 else -(hidden // tile))  # that does not see the first key
            missing = 0.5 * tile * float(first + tiles - 1) * (tiles - first) + float(hidden) * (tiles - first)
            seen += (_mean_part(hidden, tile, n) * (tiles - first) - missing) / tiles
            if right >= 0:
                most = min(most, float((p.window_left + tile + right + n - 1) // n + 1))
        return most, max(0.0, min(most, seen / n))


def _mean_part(first: int, step: int, n: int) -> float:
    """Of first, first + step, ...: what they are beyond multiples of n, in the mean."""
    least = math.gcd(step, n)
    return 0.5 * (n - least) + first % least


@dataclass(frozen=True)
class Cheaper:
    """Whether the first tiling is no dearer than the other."""

    first: Tiling
    other: Tiling

    def holds(self, problem: Any, target: Target) -> bool:
        return self.first.cycles(problem, target.units) <= self.other.cycles(problem, target.units)

    @property
    def words(self) -> tuple[int, int, int]:
        return -1, self.first.code, self.other.code


@dataclass(frozen=True)
class Short:
    """Whether a tiling takes at most so many cycles."""

    tiling: Tiling
    limit: int

    def holds(self, problem: Any, target: Target) -> bool:
        return self.tiling.cycles(problem, target.units) <= self.limit

    @property
    def words(self) -> tuple[int, int, int]:
        return -2, self.tiling.code, self.limit
