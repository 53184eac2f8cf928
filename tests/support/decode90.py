"""Decode kernels of Hopper in the tests: the problems and configs that they run, on the CPU's emulator and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from fagen.families import Config, sm90_decode
from fagen.ops.attention.decode import DecodeProblem

FAMILY = sm90_decode.FAMILY


@dataclass(frozen=True)
class Case:
    """A kernel: static problem and config."""

    page: int = 16
    mask: str = "causal"
    dtype: str = "bf16"
    head_dim: int = 64
    head_dim_v: int = 0
    softcap: bool = False
    sinks: bool = False
    tile_m: int = 64
    tile_n: int = 64
    stages: int = 2
    rescale: str = "deferred"
    split_keys: int = 128
    blocks_per_sm: int = 1

    @property
    def problem(self) -> DecodeProblem:
        return DecodeProblem(
            dtype=self.dtype, head_dim=self.head_dim, head_dim_v=self.head_dim_v, mask=self.mask, softcap=self.softcap,
            sinks=self.sinks, page=self.page,
        )  # fmt: skip

    @property
    def config(self) -> Config:
        return FAMILY.config({knob.name: getattr(self, knob.name) for knob in FAMILY.knobs})

    def __str__(self) -> str:
        dims = f"d{self.head_dim}" + (f"-{self.head_dim_v}" if self.head_dim_v else "")
        flags = [name for name in ("softcap", "sinks") if getattr(self, name)]
        knobs = [f"{self.tile_m}x{self.tile_n}", f"stages{self.stages}", self.rescale, f"split{self.split_keys}"]
        where = f"page{self.page}" if self.page else "contiguous"
        return "-".join([where, self.mask, self.dtype, dims, *knobs, f"blocks{self.blocks_per_sm}", *flags])
