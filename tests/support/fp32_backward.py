"""sm80_backward_fp32 in the tests: configs that hold every value of every knob, and the calls they are run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fagen.families import Config, sm80_backward_fp32
from fagen.target import known
from tests.support import backward

FAMILY = sm80_backward_fp32.FAMILY
BASE: dict[str, Any] = {
    "tile_m": 32, "tile_n": 64, "dq_route": "own_pass", "dq_tile_m": 64, "dq_tile_n": 32, "warps": 4,
    "key_passes": "one", "score_pieces": 2, "score_steps": 1, "stages": 2, "blocks_per_sm": 1,
}  # fmt: skip


def config(**changes: Any) -> Config:
    return FAMILY.config({**BASE, **changes})


_ADDED: dict[str, Any] = {"dq_route": "atomics", "dq_tile_n": 16}


# One config a line differs from BASE in what its name says; together they hold every value of every knob.
SCHEMES = {
    "base": config(score_steps=2),
    "small": config(tile_m=16, tile_n=32, dq_tile_m=32, dq_tile_n=16, warps=2, blocks_per_sm=3),
    "two_passes": config(key_passes="two", score_pieces=4, blocks_per_sm=2),
    "two_slabs": config(tile_m=16, tile_n=128, dq_tile_m=128, dq_tile_n=16, stages=3),
    "one_stage": config(tile_m=64, dq_tile_n=64, stages=1, key_passes="two"),
    "eight": config(warps=8, tile_m=16, tile_n=128, dq_tile_m=128),
    "tall": config(warps=8, tile_m=16, tile_n=256, dq_tile_m=256, dq_tile_n=16, stages=1),
    "added": config(**_ADDED),
    "added_small": config(**_ADDED, tile_m=16, tile_n=32, dq_tile_m=32, warps=2, key_passes="two", stages=1),
    "added_two_slabs": config(**_ADDED, tile_m=16, tile_n=128, dq_tile_m=128),
}
HEAD_DIMS = {
    "two_slabs": 32,
    "added_small": 96,
    "added_two_slabs": 32,
    "eight": 128,
    "one_stage": 96,
    "tall": 32,
}  # else 64


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
    Case("default", head_dim=d, head_dim_v=dv, mask=("causal", "none")[i % 2], aligned=d % 4 == 0, sizes=((40, 70),))
    for i, (d, dv) in enumerate(((256, 256), (64, 0), (1, 1), (7, 16), (33, 200), (40, 0), (192, 128), (16, 256)))
]
FEATURE_CASES = [
    Case("default", heads=4, kv_heads=2, mask="intervals", intervals="both4", window=(60, 30)),
    Case("default", softcap=5.0, alibi=True, dlse=True),
    Case("default", mask="window", window=(30, 10), dropout=0.3, alibi=True),
    Case("small", head_dim=48, mask="none", dropout=0.5, softcap=4.0),
    Case("two_slabs", head_dim=32, dropout=0.2),
    Case("added", heads=4, kv_heads=2, mask="intervals", intervals="both4", head_dim=40, dropout=0.2),
]
