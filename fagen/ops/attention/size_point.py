"""The features of a size point of attention, and how much each counts."""

from __future__ import annotations

import math

from fagen.ops.attention.problem import Problem

WEIGHTS = {"keys": 1.0, "waves": 1.0, "rows": 0.25}  # of the features of a size; see docs/database.md
MOST_WAVES, LEAST_WAVES = 4.0, 0.25  # beyond which their number no longer matters
WAVE_ROWS = 128  # of a block of rows, about


def features(problem: Problem, units: int, most_waves: float = MOST_WAVES) -> dict[str, float]:
    """What of a size point decides which config wins, in doublings; WEIGHTS says how much each counts.

    `keys` that a row sees: the length of the inner loop, and how much of the keys and values a cache holds. `waves`:
    blocks of rows over the device's units; with few of them plain schedules and small tiles win, with many it no
    longer matters how many. `rows` of a sequence: how much of the work lies at the diagonal.

    `Features` of csrc/table.h is the same in C++, for calls of a new size.
    """
    p = problem
    left, right = (p.seqlen_k if bound < 0 else bound for bound in (p.window_left, p.window_right))
    keys = p.seqlen_k if p.mask == "causal" else min(p.seqlen_k, left + right + 1)
    waves = p.batch * p.heads * -(-p.seqlen_q // WAVE_ROWS) / max(1, units)
    return {
        "keys": math.log2(keys),
        "waves": math.log2(min(max(waves, LEAST_WAVES), most_waves)),
        "rows": math.log2(p.seqlen_q),
    }
