"""sm90_backward_large in the tests: configs that hold every value of every knob, and the calls they are run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fagen.families import Config, sm90_backward_large
from fagen.target import known
from tests.support import backward

FAMILY = sm90_backward_large.FAMILY
BASE: dict[str, Any] = {
    "tile_other": 64, "chunk_d": 64, "stages": 4, "in_flight": 1, "chunks_under": 2, "resident": "both",
    "block_columns": 512, "share_cells": False, "cluster": 1, "block_order": "ascending",
}  # fmt: skip


def config(**changes: Any) -> Config:
    return FAMILY.config({**BASE, **changes})


# One config a line differs from BASE in what its name says; together they hold every value of every knob.
SCHEMES = {
    "base": config(),
    "pair": config(cluster=2, tile_other=128, stages=3, chunks_under=1),
    "four": config(cluster=4, resident="scores", stages=6, in_flight=2, block_order="longest_first"),
    "streamed": config(resident="none", stages=6, chunks_under=4, block_order="descending"),
    "streamed_pair": config(resident="none", cluster=2, tile_other=96, chunk_d=128, stages=2, chunks_under=0),
    "narrow": config(block_columns=256, stages=5, block_order="sectioned"),
    "narrow_pair": config(block_columns=384, cluster=2, in_flight=3, chunks_under=2, stages=6),
    "wide": config(block_columns=640, resident="scores", stages=4),
    "long_tiles": config(tile_other=192, resident="none", block_columns=256, stages=3, in_flight=2, chunks_under=0),
    "peers": config(share_cells=True, tile_other=128, resident="scores", block_columns=384),
    "peers_streamed": config(
        share_cells=True, tile_other=256, resident="none", block_columns=256, stages=5, in_flight=2
    ),
    **{f"stages{n}": config(stages=n, resident="none", block_columns=256) for n in (7, 8, 10, 12)},
}


@dataclass(frozen=True)
class Case(backward.Case):
    """A scheme "default" is the family's default."""

    head_dim: int = 320

    @property
    def config(self) -> Config:
        """Of the scheme; the fewest block_columns that share this problem's columns alike, as the family asks."""
        if self.scheme == "default":
            return FAMILY.default(self.problem, known("sm_90")).replace(**dict(self.changes))
        found = SCHEMES[self.scheme].replace(**dict(self.changes))
        while (FAMILY.rejects(self.problem, known("sm_90"), found) or ("",))[0] == "columns_matter":
            found = found.replace(block_columns=int(found.block_columns) - 128)
        return found
