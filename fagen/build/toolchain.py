"""Which compilers build the kernels. Paths are looked up each time (cheap); versions are asked once per binary."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from fagen import env
from fagen.errors import MissingTool

_WRAPPERS = ("ccache", "sccache", "distcc")


def nvcc() -> Path | None:
    """FAGEN_NVCC, then CUDA_HOME or CUDA_PATH, then PATH, then the usual place."""
    asked = env.get("FAGEN_NVCC")
    if asked:
        return _executable(asked)
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        found = _executable(f"{home}/bin/nvcc") if home else None
        if found:
            return found
    return _executable("nvcc") or _executable("/usr/local/cuda/bin/nvcc")


def cxx() -> Path | None:
    """FAGEN_CXX, then CXX (a compiler cache in front of it is left out), then g++, then c++."""
    asked = env.get("FAGEN_CXX")
    if asked:
        return _executable(asked)
    words = [word for word in shlex.split(os.environ.get("CXX", "")) if Path(word).name not in _WRAPPERS]
    for name in (*words[:1], "g++", "c++"):
        found = _executable(name)
        if found:
            return found
    return None


def require_nvcc() -> Path:
    found = nvcc()
    if found is None:
        raise MissingTool(
            "no nvcc found",
            f"FAGEN_NVCC={env.get('FAGEN_NVCC')}",
            "install the CUDA toolkit, or set CUDA_HOME or FAGEN_NVCC",
        )
    return found


def require_cxx() -> Path:
    found = cxx()
    if found is None:
        raise MissingTool(
            "no C++ compiler found", f"FAGEN_CXX={env.get('FAGEN_CXX')}", "install g++, or set CXX or FAGEN_CXX"
        )
    return found


def compiler_version(path: Path) -> str:
    """The compiler's own words, one line. A binary replaced in place is asked again."""
    try:
        stat = path.stat()
    except OSError as error:
        raise MissingTool(f"compiler {path} cannot be used", str(error)) from error
    return _version(str(path), stat.st_mtime_ns, stat.st_size)


@functools.cache
def torch_version() -> str:
    """As its package says it, which needs no import of torch; looking that up takes milliseconds."""
    from importlib.metadata import version

    return version("torch")


def cuda_home(compiler: Path) -> Path:
    """The toolkit of an nvcc, which may be a wrapper script that lives elsewhere."""
    beside = compiler.resolve().parent.parent
    if (beside / "include" / "cuda_runtime.h").exists():
        return beside
    match = re.search(r"^#\$ TOP=(.+)$", _run([str(compiler), "--dryrun", "-x", "cu", "/dev/null"]), re.MULTILINE)
    if match is None:
        raise MissingTool(f"the toolkit of {compiler} cannot be found", "", "set CUDA_HOME to its folder")
    return Path(match[1]).resolve()


def _executable(name: str) -> Path | None:
    found = shutil.which(name)
    return Path(found).absolute() if found else None


@functools.cache
def _version(path: str, mtime: int, size: int) -> str:
    lines = [line.strip() for line in _run([path, "--version"]).splitlines() if line.strip()]
    # nvcc says its number in its last two lines, host compilers in the first
    return " ".join(lines[-2:] if any("nvcc" in line.lower() for line in lines[:1]) else lines[:1])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingTool(f"compiler {command[0]} cannot be run", str(error)) from error
    return done.stdout + done.stderr
