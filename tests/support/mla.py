"""Latent decode kernels in the tests: the problems and configs that they run, on the CPU's emulator and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from fagen.families import Config, sm90_decode_mla
from fagen.ops.attention.decode import DecodeProblem

FAMILY = sm90_decode_mla.FAMILY


@dataclass(frozen=True)
class Case:
    """A kernel: static problem and config."""

    page: int = 64
    mask: str = "none"
    dtype: str = "bf16"
    head_dim_v: int = 128
    sinks: bool = False
    rescale: str = "deferred"
    split_keys: int = 128

    @property
    def problem(self) -> DecodeProblem:
        return DecodeProblem(
            dtype=self.dtype, head_dim=self.head_dim_v + sm90_decode_mla.ROTARY, head_dim_v=self.head_dim_v,
            mask=self.mask, sinks=self.sinks, page=self.page, shared_kv=True,
        )  # fmt: skip

    @property
    def config(self) -> Config:
        return FAMILY.config({knob.name: getattr(self, knob.name) for knob in FAMILY.knobs})

    def __str__(self) -> str:
        flags = ["sinks"] if self.sinks else []
        where = f"page{self.page}" if self.page else "contiguous"
        knobs = [self.rescale, f"split{self.split_keys}"]
        return "-".join([where, self.mask, self.dtype, f"dv{self.head_dim_v}", *knobs, *flags])
