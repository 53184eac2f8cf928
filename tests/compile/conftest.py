"""Kernels through nvcc, their device code alone: what ptxas says of it, at half the cost of a whole library."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

from fagen.build import cache, toolchain
from fagen.build.compiler import parse_ptxas
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec

Facts = Callable[..., dict[str, Any]]


@pytest.fixture
def device_facts(cache_folder: Path) -> Facts:
    """As `cache.build(spec).facts` has them; of a `whole` library where the host code is to compile as well."""

    def facts(spec: KernelSpec, *, whole: bool = False) -> dict[str, Any]:
        if whole:
            return cache.build(spec).facts
        job = make_job(spec)
        path = cache_folder / "device" / f"{job.key()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock")):
            if not path.exists():
                part = path.with_suffix(".part")
                part.write_text(json.dumps(parse_ptxas(_compile(job.source, job.flags, path.with_suffix(".cu")))))
                part.rename(path)
        return json.loads(path.read_text())

    return facts


def _compile(text: str, flags: tuple[str, ...], source: Path) -> str:
    source.write_text(text)
    command = [str(toolchain.require_nvcc()), *flags, "-ccbin", str(toolchain.require_cxx()), "-cubin", str(source)]
    done = subprocess.run([*command, "-o", str(source.with_suffix(".cubin"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:8000]
    return done.stdout + done.stderr
