"""simt_backward in the tests: configs that hold every value of every knob, and the calls they are run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fagen.families import Config, simt_backward
from fagen.target import known
from tests.support import backward

FAMILY = simt_backward.FAMILY
BASE: dict[str, Any] = {
    "tile_own": 64, "tile_other": 64, "warps": 4, "cell_rows": 8, "sum_rows": 8, "chunk_d": 32, "chunk_rows": 64,
    "stages": 2, "copies": "cp_async", "blocks_per_sm": 1,
}  # fmt: skip


def config(**changes: Any) -> Config:
    return FAMILY.config({**BASE, **changes})


# One config a line differs from BASE in what its name says; together they hold every value of every knob.
SCHEMES = {
    "base": config(),
    "small": config(tile_own=32, tile_other=32, warps=2, cell_rows=4, sum_rows=4, chunk_d=16, chunk_rows=16),
    "tall": config(tile_own=128, tile_other=32, chunk_rows=32, blocks_per_sm=2),
    "wide": config(tile_other=128, warps=8, cell_rows=4, sum_rows=4),
    "three_stages": config(stages=3, blocks_per_sm=3, chunk_d=16, cell_rows=4),
    "registers": config(copies="registers", tile_other=32, sum_rows=4, chunk_d=64, chunk_rows=32),
    "many_lanes": config(tile_own=32, warps=8, cell_rows=4, chunk_rows=4),  # a gradient's row is of several warps
    "short_chunks": config(tile_own=32, warps=8, cell_rows=4, chunk_rows=8),
    "four_blocks": config(tile_own=32, tile_other=32, warps=2, cell_rows=4, chunk_rows=32, blocks_per_sm=4),
}
HEAD_DIMS = {"many_lanes": 528, "short_chunks": 272}  # else 64


@dataclass(frozen=True)
class Case(backward.Case):
    """A scheme "default" is the family's default on a Hopper card."""

    dtype: str = "fp32"

    @property
    def config(self) -> Config:
        if self.scheme == "default":
            return FAMILY.default(self.problem, known("sm_90")).replace(**dict(self.changes))
        return SCHEMES[self.scheme].replace(**dict(self.changes))


SCHEME_CASES = backward.in_turns(Case, SCHEMES, HEAD_DIMS)
DIM_CASES = [
    Case("default", head_dim=d, head_dim_v=dv, mask=("causal", "none")[i % 2], aligned=False, sizes=((40, 70),))
    for i, (d, dv) in enumerate(((1, 0), (7, 16), (33, 0), (100, 64), (128, 0), (257, 0), (40, 300), (1024, 0)))
]
FEATURE_CASES = [
    Case("default", heads=4, kv_heads=2, mask="intervals", intervals="both4", window=(60, 30)),
    Case("default", softcap=5.0, alibi=True, dlse=True),
    Case("default", mask="window", window=(30, 10), dropout=0.3, alibi=True),
    Case("default", dtype="bf16", head_dim=72, dropout=0.5),
    Case("default", dtype="fp16", head_dim=40, aligned=False, softcap=4.0),
    Case("base", magnitude=4.0, mask="none"),
]
