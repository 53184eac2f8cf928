"""How many compilers run at a time: what cores and memory bear."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

COMPILE_BYTES = {"cpu": 1 << 30, "gpu": 2 << 30}  # what one compiler may need


def compile_workers(is_gpu: bool, *, measuring: bool = False) -> int:
    """As many as cores and memory bear. `measuring`: a GPU's measuring process and this one keep two of many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if measuring and is_gpu and cores > 4:
        cores -= 2
    return max(1, min(cores, free_memory() // COMPILE_BYTES["gpu" if is_gpu else "cpu"]))


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its control group's."""
    free = 8 << 30
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, max(0, limit - int((group / "memory.current").read_text())))
    return free
