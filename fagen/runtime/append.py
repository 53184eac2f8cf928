"""The kernel that appends to a cache."""

from __future__ import annotations

from fagen.runtime.helper import Helper

HEADER = "fagen/abi/append.h"
# products and sums are rounded one by one, as PyTorch does it
HELPER = Helper(
    "append", HEADER, "append/append.cu.j2", "append/append.cpp.j2", "PyTorch appends to caches",
    cpu_flags=("-ffp-contract=off",),
)  # fmt: skip
Params = HELPER.params
library, build, job, rendered = HELPER.library, HELPER.build, HELPER.job, HELPER.rendered
