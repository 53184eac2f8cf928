"""Where a time lies under the machine's roof: FLOPs, bytes that must move, and what the machine could do."""

from __future__ import annotations

import re
from typing import Any

from fagen.ops.attention.inputs import input_bytes
from fagen.ops.attention.problem import Problem
from fagen.report.load import Row, duration, mapping

# Dense products of 16-bit inputs summed in float32 (TFLOP/s) and memory (GB/s) from the vendors' data sheets, by a
# pattern of the device's name. They are what a sheet promises at boost clocks; no kernel gets there.
_SHEETS: tuple[tuple[str, float, float], ...] = (
    (r"\bB200\b", 2250, 8000),
    (r"\bH200\b", 989, 4800),
    (r"\bH100 PCIe\b", 756, 2000),
    (r"\bH100 80GB HBM3\b", 989, 3350),
    (r"\bA100.SXM4.80GB\b", 312, 2039),
    (r"\bA100 80GB PCIe\b", 312, 1935),
    (r"\bA100\b.*40GB\b", 312, 1555),
    (r"\bL40S\b", 362, 864),
    (r"\bRTX 4090\b", 165, 1008),
    (r"\bRTX 3090\b", 71, 936),
)


def of_machine(meta: Row) -> Row:
    """TFLOP/s and GB/s with where they come from; None where nothing is known."""
    kept = mapping(meta.get("machine"))
    tflops, gbs = duration(kept.get("tflops")), duration(kept.get("gbs"))
    if tflops or gbs:
        return {"tflops": tflops, "gbs": gbs, "source": "measured in the run"}
    device = str(mapping(meta.get("target")).get("device") or mapping(meta.get("environment")).get("device") or "")
    for pattern, flops, bandwidth in _SHEETS:
        if re.search(pattern, device):
            return {"tflops": flops, "gbs": bandwidth, "source": "data sheet: dense 16-bit products at boost clocks"}
    return {"tflops": None, "gbs": None, "source": ""}


def work(problem: Problem | None) -> Row | None:
    """FLOPs, and the bytes of q, k, v and o once each: no kernel can move less."""
    if problem is None:
        return None
    flops, moved = problem.flops(), input_bytes(problem)
    return {"flops": flops, "bytes": moved, "intensity": flops / moved} if flops > 0 else None


def rates(done: Row | None, seconds: float | None) -> tuple[float | None, float | None]:
    """TFLOP/s and GB/s of a call that takes so long."""
    if not done or not seconds:
        return None, None
    return done["flops"] / seconds / 1e12, done["bytes"] / seconds / 1e9


def roof(machine: Row, intensity: float) -> float | None:
    """TFLOP/s that the machine allows at an intensity (FLOP a byte)."""
    bounds = [bound for bound in (machine["tflops"], _under_memory(machine, intensity)) if bound]
    return min(bounds, default=None)


def bound_by(machine: Row, intensity: float) -> str:
    memory = _under_memory(machine, intensity)
    if not memory or not machine["tflops"]:
        return ""
    return "memory" if memory < machine["tflops"] else "arithmetic"


def _under_memory(machine: Row, intensity: float) -> float | None:
    return machine["gbs"] * intensity / 1e3 if machine["gbs"] else None


def share(value: float | None, of: Any) -> float | None:
    return value / of if value and of else None
