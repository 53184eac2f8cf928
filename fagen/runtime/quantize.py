"""The kernels that make fp8 numbers of q, k and v."""

from __future__ import annotations

from fagen.runtime.helper import Helper

HELPER = Helper(
    "quantize", "fagen/abi/quantize.h", "quantize/quantize.cu.j2", None, "PyTorch quantises",
    capability=89,  # converts to e4m3
)  # fmt: skip
Params = HELPER.params
