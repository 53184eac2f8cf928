"""sm80_forward_fp32 in the tests: configs that hold every value of every knob, and the calls they are run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fagen.families import Config, Family, sm80_forward_fp32
from fagen.target import known
from tests.support import cases

FAMILY = sm80_forward_fp32.FAMILY
BASE: dict[str, Any] = {
    "tile_m": 64, "tile_n": 32, "warps": 4, "products": "split", "score_steps": 1, "value_steps": 4, "stages": 2,
    "blocks_per_sm": 1, "block_order": "ascending",
}  # fmt: skip


def config(**changes: Any) -> Config:
    return FAMILY.config({**BASE, **changes})


# One config a line differs from BASE in what its name says; together they hold every value of every knob.
SCHEMES = {
    "base": config(value_steps=2),
    "two_slabs": config(warps=2, tile_n=48, score_steps=2, block_order="longest_first"),
    "one_stage": config(stages=1, blocks_per_sm=2, block_order="descending"),
    "three_stages": config(tile_m=32, warps=2, tile_n=16, value_steps=2, stages=3, blocks_per_sm=4),
    "one_warp": config(tile_m=16, warps=1, block_order="sectioned"),
    "two_slabs_of_eight": config(tile_m=256, warps=8, stages=1),
    "tall": config(tile_m=128, tile_n=64, warps=8, score_steps=2, value_steps=8),
    "three_blocks": config(blocks_per_sm=3),
    "single": config(products="single", stages=1),
}
HEAD_DIMS = {"two_slabs": 48, "one_warp": 256, "three_stages": 80, "tall": 128, "single": 32, "three_blocks": 16}
BANDS = {"none": (-1, -1), "causal": (-1, -1), "window": (70, 20), "intervals": (-1, -1)}


@dataclass(frozen=True)
class Case(cases.Case):
    """A scheme "default" is the family's default on a Hopper card."""

    dtype: str = "fp32"

    @property
    def config(self) -> Config:
        if self.scheme == "default":
            return FAMILY.default(self.problem, known("sm_90")).replace(**dict(self.changes))
        return SCHEMES[self.scheme].replace(**dict(self.changes))

    @property
    def family(self) -> Family:
        return FAMILY

    def __str__(self) -> str:
        mods = [name for name in ("softcap", "alibi") if getattr(self, name)]
        return "-".join([super().__str__(), *mods, *([] if self.aligned else ["unaligned"])])


# each scheme with a mask and what else there is of calls; head dims that fill no 16 bytes are not aligned
SCHEME_CASES = [
    Case("base", mask="window", window=(70, 20)),
    Case("two_slabs", head_dim=48, mask="causal", softcap=15.0, dropout=0.3),
    Case("one_stage", mask="intervals", intervals="both4", aligned=False),
    Case("single", head_dim=32, mask="window", window=(70, 20), tf32=True),
    Case("one_warp", head_dim=256, head_dim_v=240, mask="causal", heads=2, kv_heads=1),
    Case("two_slabs_of_eight", mask="none", heads=2, kv_heads=1),
    Case("three_stages", head_dim=72, head_dim_v=32, mask="none", dropout=0.5, alibi=True),
    Case("tall", head_dim=128, mask="intervals", intervals="lower1", heads=2, kv_heads=2),
    Case("three_blocks", head_dim=7, mask="causal", aligned=False),
]
DIM_CASES = [
    Case("default", head_dim=d, head_dim_v=dv, mask="causal", heads=2, kv_heads=1, aligned=d % 4 == 0)
    for d, dv in ((256, 256), (64, 64), (1, 1), (33, 200), (40, 40), (100, 100), (192, 128), (16, 256))
]
