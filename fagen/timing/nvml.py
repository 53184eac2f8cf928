"""The state of a GPU as the driver's own library tells it: clocks, power, temperature, why it is slowed down.

It only reads. Where there is no library, or it does not know a fact, the fact is left out and nothing is raised.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

LIBRARY = "libnvidia-ml.so.1"

_READINGS = {  # name: function, arguments between handle and result, unit in ours
    "clock_mhz": ("nvmlDeviceGetClockInfo", (1,), 1.0),
    "clock_max_mhz": ("nvmlDeviceGetMaxClockInfo", (1,), 1.0),
    "memory_mhz": ("nvmlDeviceGetClockInfo", (2,), 1.0),
    "power_w": ("nvmlDeviceGetPowerUsage", (), 1e-3),
    "power_limit_w": ("nvmlDeviceGetEnforcedPowerLimit", (), 1e-3),
    "temp_c": ("nvmlDeviceGetTemperature", (0,), 1.0),
}
# bits of the reasons for a lowered clock; what is idle, or set so by its owner, is no reason worth telling
_REASONS = {
    0x04: "power_cap",
    0x08: "hw_slowdown",
    0x20: "thermal",
    0x40: "hw_thermal",
    0x80: "power_brake",
}
# these mean that a time taken meanwhile is not the kernel's; at its power cap a GPU simply is what it is
SPOILING = frozenset({"hw_slowdown", "thermal", "hw_thermal", "power_brake"})
_MOST_PROCESSES = 256  # on one GPU that are counted


def read(uuid: str) -> dict[str, Any]:
    """What is known of the GPU of this UUID now; `throttle` lists the reasons for a lowered clock."""
    found = _find(uuid)
    if found is None:
        return {}
    library, handle = found
    facts: dict[str, Any] = {}
    for name, (function, arguments, unit) in _READINGS.items():
        value = ctypes.c_uint()
        if _ask(library, function, handle, *arguments, ctypes.byref(value)):
            facts[name] = round(value.value * unit, 1)
    bits = ctypes.c_ulonglong()
    if _ask(library, "nvmlDeviceGetCurrentClocksThrottleReasons", handle, ctypes.byref(bits)):
        facts["throttle"] = [name for bit, name in _REASONS.items() if bits.value & bit]
    return facts


def current() -> dict[str, Any]:
    """Of torch's current device; nothing where torch has none."""
    return of(current_index())


def current_index() -> int:
    """Of torch's current device; -1 where it has none."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else -1


def of(index: int) -> dict[str, Any]:
    """Of the device that torch calls so."""
    uuid = _uuid(index)
    return read(uuid) if uuid else {}


def others(index: int) -> int:
    """How many other processes compute on the device that torch calls so, as far as the driver tells."""
    found = _find(_uuid(index)) if _uuid(index) else None
    return sum(pid != os.getpid() for pid in _pids(*found)) if found else 0


def _uuid(index: int) -> str:
    import torch

    if not 0 <= index < torch.cuda.device_count():
        return ""
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


def _pids(library: ctypes.CDLL, handle: ctypes.c_void_p) -> list[int]:
    count, rows = ctypes.c_uint(_MOST_PROCESSES), (_Process * _MOST_PROCESSES)()
    if not _ask(library, "nvmlDeviceGetComputeRunningProcesses_v3", handle, ctypes.byref(count), rows):
        return []
    return [row.pid for row in rows[: count.value]]


def _ask(library: ctypes.CDLL, function: str, *arguments: Any) -> bool:
    """Whether the library has the function and it succeeded."""
    asked = getattr(library, function, None)
    return asked is not None and asked(*arguments) == 0


@functools.lru_cache(maxsize=64)
def _find(uuid: str) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    handle = ctypes.c_void_p()
    if not _ask(library, "nvmlInit_v2"):
        return None
    if not _ask(library, "nvmlDeviceGetHandleByUUID", name.encode(), ctypes.byref(handle)):
        return None
    return library, handle
