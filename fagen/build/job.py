"""A job: everything that can change a binary, and the key it is cached by; an artifact: the binary."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fagen import env
from fagen.build import toolchain
from fagen.codegen.render import source_hash
from fagen.codegen.spec import KernelSpec
from fagen.target import Target

KEY_SCHEMA = 1
MANIFEST = "manifest.json"
LIBRARY = "kernel.so"
LOG = "build.log"
SOURCES = ("kernel.cpp", "kernel.cu")


@dataclass(frozen=True)
class Artifact:
    """A published library and its build facts: compile_seconds, and of each device function what ptxas says of it."""

    path: Path
    key: str
    source_hash: str
    arch: str = "cpu"
    facts: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Job:
    """Everything that can change the binary, and nothing else, except `name` and `about` that only describe it."""

    name: str
    source: str
    suffix: str  # .cpp or .cu
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    arch: str
    links_torch: bool = False
    about: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_cuda(self) -> bool:
        return self.suffix == ".cu"

    def key(self) -> str:
        from fagen.target import host

        cpu = host() if "-march=native" in self.flags else None
        facts = {
            "schema": KEY_SCHEMA,
            "source": self.source,
            "suffix": self.suffix,
            "flags": self.flags,
            "link_flags": self.link_flags,
            "arch": self.arch,
            "cpu": [cpu.device, cpu.simd] if cpu else None,
            "cxx": toolchain.compiler_version(toolchain.require_cxx()),
            "nvcc": toolchain.compiler_version(toolchain.require_nvcc()) if self.is_cuda else None,
            "torch": toolchain.torch_version(),
            "python": sys.implementation.cache_tag if self.links_torch else None,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def folder(self, key: str) -> Path:
        return env.cache_dir() / "kernels" / f"{self.name}-{key[:16]}"


def link_flags(target: Target, flags: tuple[str, ...]) -> tuple[str, ...]:
    """The linker's, of a library that needs no torch."""
    if target.is_gpu:
        home = toolchain.cuda_home(toolchain.require_nvcc())
        more = [f"-L{home}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    else:
        more = [flag for flag in flags if flag.startswith("-fopenmp")]
    return "-Wl,--as-needed", *more


# ---- kernels ------------------------------------------------------------------------------------------------------


def make_job(spec: KernelSpec) -> Job:
    """The job that builds a kernel. Renders its source; nothing is run yet."""
    family, problem, target, text = spec.family, spec.problem, spec.target, spec.source
    about = {
        "family": family.name,
        "problem": problem.to_dict(),
        "static_key": problem.static_key,
        "config": dict(spec.config),
        "source_hash": source_hash(text),
    }
    return Job(
        name=f"{family.name}-{target.arch}-{problem.static_key.replace('/', '-')}",
        source=text,
        suffix=spec.suffix,
        flags=family.flags(target),
        link_flags=link_flags(target, family.flags(target)),
        arch=target.arch,
        about=about,
    )
