"""A record: a config that won, its times, its error, and where that was measured. The constructor validates."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fagen import ops, schema
from fagen.errors import DatabaseError, FagenError, InvalidArgument
from fagen.schema import shown
from fagen.target import Target

SCHEMA = 1


def slug(device: str) -> str:
    """A device's name as a file name: 'NVIDIA H200' -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Record:
    """A winner: which config, how fast, how exact, and where that was measured. Times in seconds.

    The constructor is the door: each field is of its type and domain (`_CHECKS`), whoever wrote it.
    """

    problem: Any  # of any op
    arch: str
    device: str
    family: str
    config: dict[str, Any]
    seconds: float
    spread: float  # half the interquartile range: the noise band of `seconds`
    default_seconds: float  # of the family's default config in the same round; 0: the default did not run
    error: float  # largest absolute error of the output when it was verified
    source_hash: str
    environment: dict[str, str] = field(default_factory=dict)
    date: str = ""
    trials: int = 0
    torch_seconds: float = 0.0  # of PyTorch's own attention in the same round; 0: it was not measured

    def __post_init__(self) -> None:
        if not ops.is_problem(self.problem):
            raise DatabaseError(f"a record's problem is none: {shown(self.problem)}")
        for name, check in _CHECKS.items():
            wrong = check(getattr(self, name))
            if wrong:
                raise DatabaseError(f"record {self.key}: {name}: {wrong}")

    @property
    def key(self) -> str:
        return self.problem.key

    @property
    def speedup(self) -> float:
        return self.default_seconds / self.seconds if self.default_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file, whose head carries arch and device."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["arch"], fields["device"]
        return {**fields, "problem": self.problem.to_dict()}

    @classmethod
    def from_dict(cls, arch: str, device: str, fields: Any) -> Record:
        """Raises DatabaseError with what is wrong."""
        if not isinstance(fields, dict):
            raise DatabaseError(f"a record is no JSON object: {shown(fields)}")
        odd = (_REQUIRED - fields.keys()) | (fields.keys() - _REQUIRED - _OPTIONAL)
        if odd:
            raise DatabaseError("a record lacks a field or has one too many", ", ".join(map(shown, sorted(odd))))
        try:
            problem = ops.problem_from(fields["problem"])
        except InvalidArgument as error:
            raise DatabaseError("a record's problem cannot be read", str(error).splitlines()[0]) from error
        return cls(**{**fields, "arch": arch, "device": device, "problem": problem})


_CHECKS: dict[str, Callable[[Any], str]] = {
    "arch": schema.arch, "device": schema.text, "family": schema.identifier, "config": schema.config,
    "seconds": schema.seconds, "spread": schema.spread, "default_seconds": schema.seconds_or_none,
    "error": schema.number, "source_hash": schema.source_hash, "environment": schema.environment,
    "date": schema.date, "trials": schema.integer, "torch_seconds": schema.seconds_or_none,
}  # fmt: skip
_OPTIONAL = {"environment", "date", "trials", "torch_seconds"}
_REQUIRED = {f.name for f in dataclasses.fields(Record)} - {"arch", "device"} - _OPTIONAL


def environment(target: Target) -> dict[str, str]:
    """What a time depends on besides the kernel, kept in each record. Missing facts are left out."""
    import platform

    import torch

    import fagen

    facts = {"fagen": getattr(fagen, "__version__", ""), "torch": torch.__version__, "device": target.device}
    facts |= {"python": platform.python_version(), "units": str(target.units)}
    with contextlib.suppress(ImportError, OSError, FagenError):
        from fagen.build import toolchain

        compiler = toolchain.nvcc() if target.is_gpu else toolchain.cxx()
        if compiler:
            facts["nvcc" if target.is_gpu else "cxx"] = str(toolchain.compiler_version(compiler)).splitlines()[0]
    if target.is_gpu:
        with contextlib.suppress(OSError):
            line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
            facts["driver"] = next(iter(re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", line)), "")
    return {name: schema.printable(value) for name, value in facts.items() if value}
