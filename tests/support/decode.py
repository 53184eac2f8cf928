"""Decode kernels in the tests: the configs and problems that they run, on the CPU's emulator and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fagen.families import Config, sm80_decode
from fagen.ops.attention.decode import DecodeProblem

FAMILY = sm80_decode.FAMILY

BASE: dict[str, Any] = {
    "tile_m": 16, "tile_n": 64, "warps": 4, "partition": "keys", "stages": 3, "q_source": "registers",
    "rescale": "deferred", "split_keys": 128, "merged_by": "own_kernel", "blocks_per_sm": 1,
}  # fmt: skip
_COLUMNS: dict[str, Any] = {"partition": "columns", "stages": 2}


def config(**changes: Any) -> Config:
    return FAMILY.config({**BASE, **changes})


# One config a line differs from BASE in what its name says; together they hold every value of every knob.
SCHEMES = {
    "base": config(),
    "last_block": config(merged_by="last_block", stages=2, split_keys=256, blocks_per_sm=2),
    "one_warp": config(warps=1, tile_n=16, stages=8, q_source="shared", blocks_per_sm=4, split_keys=512),
    "two_warps": config(warps=2, tile_n=64, tile_m=32, stages=2, rescale="each"),
    "eight_warps": config(warps=8, tile_n=128, stages=2, split_keys=1024, merged_by="last_block"),
    "large": config(tile_n=256, stages=2, split_keys=256),
    "deep": config(tile_n=32, warps=2, stages=6, blocks_per_sm=3, rescale="each"),
    "four_stages": config(stages=4, tile_m=32, q_source="shared"),
    "columns": config(**_COLUMNS),
    "columns_32": config(**_COLUMNS, tile_m=32, q_source="shared", merged_by="last_block"),
    "cluster": config(merged_by="cluster", stages=2, blocks_per_sm=2),
    "cluster_columns": config(**_COLUMNS, tile_m=32, q_source="shared", merged_by="cluster"),
    "columns_64": config(**_COLUMNS, tile_m=64, q_source="shared", rescale="each"),
    "columns_eight": config(**_COLUMNS, tile_m=64, tile_n=128, warps=8, q_source="shared"),
    "columns_two_warps": config(**{**_COLUMNS, "stages": 3}, warps=2, tile_n=32),
}


@dataclass(frozen=True)
class Case:
    """A kernel: static problem and config."""

    scheme: str
    page: int = 0
    mask: str = "causal"
    dtype: str = "bf16"
    kv_dtype: str = ""
    head_dim: int = 64
    head_dim_v: int = 0
    softcap: bool = False
    sinks: bool = False
    shared_kv: bool = False
    aligned: bool = True
    changes: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def problem(self) -> DecodeProblem:
        return DecodeProblem(
            dtype=self.dtype, kv_dtype=self.kv_dtype, head_dim=self.head_dim, head_dim_v=self.head_dim_v,
            mask=self.mask, softcap=self.softcap, sinks=self.sinks, aligned=self.aligned, page=self.page,
            shared_kv=self.shared_kv,
        )  # fmt: skip

    @property
    def config(self) -> Config:
        return SCHEMES[self.scheme].replace(**dict(self.changes))

    def __str__(self) -> str:
        d = f"d{self.head_dim}" + (f"-{self.head_dim_v}" if self.head_dim_v else "")
        flags = [name for name in ("softcap", "sinks", "shared_kv") if getattr(self, name)] + (
            [] if self.aligned else ["unaligned"]
        )
        page = f"page{self.page}" if self.page else ""
        changes = (f"{k}={v}" for k, v in self.changes)
        return "-".join(filter(None, [self.scheme, page, self.mask, self.dtype, self.kv_dtype, d, *flags, *changes]))
