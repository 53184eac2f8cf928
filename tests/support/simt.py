"""simt_forward in the tests: configs that hold every value of every knob, and the calls they are run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fagen.families import Config, Family, simt_forward
from fagen.target import known
from tests.support import cases

FAMILY = simt_forward.FAMILY
BASE: dict[str, Any] = {
    "tile_m": 64, "tile_n": 64, "warps": 4, "score_rows": 8, "output_rows": 8, "chunk_d": 32, "chunk_keys": 32,
    "stages": 2, "q_source": "resident", "copies": "cp_async", "blocks_per_sm": 1, "block_order": "ascending",
}  # fmt: skip
_MANY: dict[str, Any] = {"tile_m": 32, "warps": 8, "score_rows": 4}  # a row of O is of several warps


def config(**changes: Any) -> Config:
    return FAMILY.config({**BASE, **changes})


# One config a line differs from BASE in what its name says; together they hold every value of every knob.
SCHEMES = {
    "base": config(),
    "small": config(tile_m=32, tile_n=32, warps=2, score_rows=4, output_rows=4, chunk_d=16, chunk_keys=16),
    "tall": config(tile_m=128, blocks_per_sm=2, block_order="sectioned"),
    "wide": config(tile_n=128, warps=8, score_rows=4, chunk_keys=64),
    "three_stages": config(stages=3, block_order="longest_first"),
    "registers": config(copies="registers", output_rows=4),
    "whole_tiles": config(chunk_d=64, chunk_keys=64, blocks_per_sm=3, block_order="descending"),
    "streamed": config(q_source="streamed", chunk_keys=16, blocks_per_sm=2),
    "streamed_registers": config(q_source="streamed", chunk_keys=16, copies="registers", warps=8, tile_n=128),
    "many_lanes": config(**_MANY, chunk_keys=4, q_source="streamed"),
    "many_lanes_stages": config(**_MANY, tile_n=128, chunk_keys=8, stages=3),
    "four_blocks": config(blocks_per_sm=4, chunk_keys=64, output_rows=4),
}
HEAD_DIMS = {"wide": 128, "streamed": 160, "streamed_registers": 160, "many_lanes": 528, "many_lanes_stages": 272}
HEAD_DIMS |= {"four_blocks": 32}  # else 64


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


BANDS = {"none": (-1, -1), "causal": (-1, -1), "window": (70, 20), "intervals": (-1, -1)}
KINDS = ("lower1", "lower2", "both2", "both4")


def _scheme(number: int, scheme: str) -> Case:
    """Masks turn from scheme to scheme, past those that a scheme cannot serve."""
    for turn in range(4):
        mask = list(BANDS)[(number + turn) % 4]
        kind = KINDS[number // 2 % 4] if mask == "intervals" else ""
        case = Case(
            scheme,
            mask=mask,
            intervals=kind,
            window=BANDS[mask],
            head_dim=HEAD_DIMS.get(scheme, 64),
            aligned=number % 3 > 0,
        )
        if not FAMILY.rejects(case.problem, known("sm_90"), case.config):
            return case
    raise AssertionError(f"{scheme} serves no mask: {FAMILY.rejects(case.problem, known('sm_90'), case.config)}")


SCHEME_CASES = [_scheme(number, scheme) for number, scheme in enumerate(SCHEMES)]
# each with the kernel of its padded head dim; those that fill no 16 bytes are not aligned
_SIZES = (1, 2, 3, 7, 16, 33, 40, 64, 72, 100, 128, 257, 513, 1024)
DIM_CASES = [
    Case("default", head_dim=d, mask="causal", heads=2, kv_heads=1, aligned=False) for d in _SIZES
] + [Case("default", head_dim=d, head_dim_v=dv, mask="none", heads=1, kv_heads=1)
     for d, dv in ((64, 16), (16, 256), (192, 128))]  # fmt: skip
FEATURE_CASES = [
    Case("default", softcap=15.0, alibi=True),
    Case("default", mask="window", window=(40, 9), dropout=0.3, alibi=True),
    Case("many_lanes", mask="none", dropout=0.5, head_dim=272, heads=2, kv_heads=1),
    Case("default", dtype="bf16", mask="intervals", intervals="both4", head_dim=72),
    Case("default", dtype="fp16", head_dim=40, aligned=False, softcap=20.0),
]
