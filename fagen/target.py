"""What a kernel runs on. The numbers are known without the device, so a kernel can be made anywhere."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fagen import schema
from fagen.errors import InvalidArgument, UsageError

_SIMDS = ("", "avx512", "avx2", "neon", "generic")

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Target:
    """`arch` is cpu or sm_NN; sizes in bytes. `device` is the name under which winners are filed."""

    arch: str
    device: str
    units: int  # SMs of a GPU, cores of a CPU
    smem_per_block: int = 0
    smem_per_unit: int = 0
    l2: int = 0
    simd: str = ""  # cpu only: avx512, avx2, neon or generic

    @property
    def is_gpu(self) -> bool:
        return self.arch != "cpu"

    @property
    def capability(self) -> int:
        """80 for sm_80; 0 for the CPU."""
        return int(self.arch.removeprefix("sm_").rstrip("af")) if self.is_gpu else 0

    @classmethod
    def from_dict(cls, fields: Any) -> Target:
        """A target that a file states; raises InvalidArgument where it cannot be one."""
        if not isinstance(fields, dict):
            raise InvalidArgument(f"a target is an object of named fields, not {schema.shown(fields)}")
        unknown = [name for name in fields if name not in _CHECKS]
        if unknown:
            raise InvalidArgument(f"unknown target field {schema.shown(unknown[0])}")
        for name, check in _CHECKS.items():
            if name in fields:
                wrong = check(fields[name])
            else:
                wrong = "it is missing" if name in ("arch", "device", "units") else ""
            if wrong:
                raise InvalidArgument(f"a target's {name}: {wrong}")
        return cls(**fields)

    def __str__(self) -> str:
        return f"{self.arch} ({self.device}, {self.units} {'SMs' if self.is_gpu else 'cores'})"


def _simd(value: Any) -> str:
    return "" if value in _SIMDS else f"{schema.shown(value)} is none of {', '.join(_SIMDS[1:])}"


_CHECKS: dict[str, Callable[[Any], str]] = {
    "arch": schema.arch, "device": schema.text, "units": lambda value: schema.integer(value, 1),
    "smem_per_block": schema.integer, "smem_per_unit": schema.integer, "l2": schema.integer, "simd": _simd,
}  # fmt: skip

_KB = 1024
# arch: a representative device, SMs, shared memory per block (opt-in) and per SM, L2
_GPUS = {
    "sm_80": ("NVIDIA A100", 108, 163 * _KB, 164 * _KB, 40 << 20),
    "sm_86": ("NVIDIA RTX 3090", 82, 99 * _KB, 100 * _KB, 6 << 20),
    "sm_87": ("NVIDIA Orin", 16, 163 * _KB, 164 * _KB, 4 << 20),
    "sm_89": ("NVIDIA RTX 4090", 128, 99 * _KB, 100 * _KB, 72 << 20),
    "sm_90": ("NVIDIA H200", 132, 227 * _KB, 228 * _KB, 60 << 20),
    "sm_100": ("NVIDIA B200", 148, 227 * _KB, 228 * _KB, 126 << 20),
    "sm_120": ("NVIDIA RTX 5090", 170, 99 * _KB, 100 * _KB, 96 << 20),
}
ARCHS = ("cpu", *_GPUS)


def known(arch: str) -> Target:
    """The target of an architecture by name, for machines that do not have it."""
    if arch == "cpu":
        return host()
    if arch not in _GPUS:
        raise UsageError(f"unknown arch {arch!r}", f"known: {', '.join(ARCHS)}")
    device, units, per_block, per_unit, l2 = _GPUS[arch]
    return Target(arch, device, units, per_block, per_unit, l2)


@functools.cache
def host() -> Target:
    """This machine's CPU."""
    model, flags = platform.processor() or platform.machine(), ""
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    model = value.strip()
                elif key.strip() in ("flags", "Features"):
                    flags = value
                    break
    except OSError:
        pass
    words = set(flags.split())
    simd = "avx512" if {"avx512f", "avx512bw", "avx512vl"} <= words else "avx2" if {"avx2", "fma"} <= words else ""
    simd = simd or ("neon" if platform.machine() == "aarch64" else "generic")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Target("cpu", schema.printable(model), cores, simd=simd)


def count() -> int:
    """CUDA devices that torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu(index: int = 0) -> Target | None:
    """The CUDA device that torch sees, or None. Touches the driver: call it only when a GPU is asked for."""
    import torch

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    props = torch.cuda.get_device_properties(index)
    arch = f"sm_{props.major}{props.minor}"
    per_block = getattr(props, "shared_memory_per_block_optin", 0) or _GPUS.get(arch, _GPUS["sm_86"])[2]
    per_unit = getattr(props, "shared_memory_per_multiprocessor", 0) or per_block + _KB
    name = schema.printable(props.name)
    return Target(arch, name, props.multi_processor_count, per_block, per_unit, props.L2_cache_size)


def memory(target: Target, index: int = 0) -> int:
    """Bytes that this machine's device of the target has, or this machine itself; 0 if that is not known."""
    if target.is_gpu:
        import torch

        return torch.cuda.get_device_properties(index).total_memory if torch.cuda.is_available() else 0
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def detect() -> Target:
    """The GPU if there is one, else the CPU."""
    return gpu() or host()


@functools.cache
def _gpu(index: int) -> Target | None:
    return gpu(index)


def target_of(device: torch.device) -> Target | None:
    """Where a tensor lives; None for devices that no family knows."""
    if device.type == "cpu":
        return host()
    if device.type != "cuda":
        return None
    import torch

    return _gpu(device.index if device.index is not None else torch.cuda.current_device())
