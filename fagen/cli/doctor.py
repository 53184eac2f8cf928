"""What this machine has and lacks for fagen, what each missing thing costs, and how to get it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fagen import env
from fagen.build import cachedir, toolchain
from fagen.errors import CacheError, FagenError

_ENOUGH_BYTES = 1 << 30


@dataclass(frozen=True)
class Diagnosis:
    """`status` is ok; note (fine without it, but know the cost); missing (get it); problem (repair it)."""

    name: str
    status: str
    detail: str
    cost: str = ""
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Diagnosis]:
    return [finding for check in CHECKS for finding in check()]


def exit_code(findings: list[Diagnosis]) -> int:
    states = {finding.status for finding in findings}
    return 4 if "missing" in states else 1 if "problem" in states else 0


# ---- the machine ----------------------------------------------------------------------------------------------------


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def _driver_cuda() -> str:
    """The newest CUDA that the driver runs, as 13.0; empty without a driver."""
    number = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)):
            return ""
    except (OSError, AttributeError):
        return ""
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _python() -> Iterator[Diagnosis]:
    yield Diagnosis("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")


def _torch() -> Iterator[Diagnosis]:
    try:
        import torch
    except (ImportError, OSError) as error:
        cost = "no op, no tuning and no verification; fagen emit still works"
        yield Diagnosis("torch", "missing", str(error).splitlines()[0], cost, "pip install torch")
        return
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    yield Diagnosis("torch", "ok", f"{torch.__version__}, {cuda}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            props = torch.cuda.get_device_properties(index)
            detail = f"{props.name}, sm_{props.major}{props.minor}, {props.multi_processor_count} SMs"
            old = props.major < 8
            cost = "the GPU kernels need sm_80 or newer; PyTorch serves this one" if old else ""
            yield Diagnosis(f"gpu {index}", "note" if old else "ok", detail, cost)
    elif not _has_nvidia_driver():
        yield Diagnosis("gpu", "note", "none found", "kernels for GPUs can be emitted and compiled, not run")
    elif not torch.version.cuda:
        cost = "the GPU stays unused"
        yield Diagnosis(
            "gpu", "problem", "there is an NVIDIA driver, and a torch for CPUs", cost, "install a torch with CUDA"
        )
    else:
        cost, remedy = (
            "the GPU stays unused",
            "see that nvidia-smi works, and that torch's CUDA is no newer than the driver's",
        )
        yield Diagnosis("gpu", "problem", "there is a driver, and torch sees no GPU", cost, remedy)


def _load() -> Iterator[Diagnosis]:
    """Whether times that are taken now would tell anything."""
    from fagen import target
    from fagen.timing import load

    devices = 0
    with suppress(ImportError, OSError):  # without torch there still is a CPU
        devices = target.count()
    for index in range(max(1, devices)):
        found = (target.gpu(index) if devices else None) or target.host()
        said = load.note(found, index)
        name = f"load of gpu {index}" if found.is_gpu else "load"
        cost = "what is tuned or measured now may not hold" if said else ""
        quiet = f"{load.average():.1f} on {load.cores()} cores"
        yield Diagnosis(name, "note" if said else "ok", said or quiet, cost, "wait until it is idle" if said else "")


def _driver() -> Iterator[Diagnosis]:
    newest = _driver_cuda()
    if not newest:
        return
    yield Diagnosis("driver", "ok", f"runs CUDA {newest} and older")
    compiler = toolchain.nvcc()
    match = re.search(r"release (\d+)\.", toolchain.compiler_version(compiler)) if compiler else None
    if match and int(match[1]) > int(newest.split(".")[0]):
        cost = f"kernels built by nvcc {match[1]} do not start on this driver"
        yield Diagnosis(
            "driver and nvcc",
            "problem",
            f"nvcc {match[1]}, driver {newest}",
            cost,
            "update the driver, or use an older nvcc",
        )


def _compilers() -> Iterator[Diagnosis]:
    cxx = toolchain.cxx()
    if cxx is None:
        cost = "nothing can be built: no kernel, and not the binding to torch"
        yield Diagnosis("c++ compiler", "missing", "no g++ or c++", cost, "apt install g++, or set CXX or FAGEN_CXX")
    else:
        yield _compiles(cxx)
    nvcc = toolchain.nvcc()
    if nvcc:
        yield Diagnosis("nvcc", "ok", f"{toolchain.compiler_version(nvcc)} at {nvcc}")
    else:
        status = "missing" if _has_nvidia_driver() else "note"
        cost = "no kernel for a GPU can be built; fagen emit still writes sources"
        yield Diagnosis("nvcc", status, "not found", cost, "install the CUDA toolkit, or set CUDA_HOME or FAGEN_NVCC")


def _compiles(cxx: Path) -> Diagnosis:
    """One small OpenMP library, as a kernel of the CPU family is."""
    with cachedir.scratch() as folder:
        source = folder / "try.cpp"
        source.write_text("#include <omp.h>\n#include <vector>\nint threads() { return omp_get_max_threads(); }\n")
        command = [str(cxx), "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-o", f"{source}.so", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    version = f"{toolchain.compiler_version(cxx)} at {cxx}"
    if done.returncode == 0:
        return Diagnosis("c++ compiler", "ok", version)
    first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
    return Diagnosis(
        "c++ compiler", "problem", f"{version}: {first}", "nothing can be built", "it must build C++17 with OpenMP"
    )


def _ninja() -> Iterator[Diagnosis]:
    import importlib.util

    found = shutil.which("ninja")
    if found or importlib.util.find_spec("ninja"):
        yield Diagnosis("ninja", "ok", found or "as a Python package")
    else:
        yield Diagnosis("ninja", "missing", "not found", "nothing can be built", "pip install ninja")


# ---- the folders ----------------------------------------------------------------------------------------------------


def _writable(path: Path) -> str:
    """Why no file can be made in the folder, or in the place where it would be made; empty if one can."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        with tempfile.TemporaryFile(dir=path):
            return ""
    except OSError as error:
        return str(error)


def _existing(path: Path) -> Path:
    return path if path.exists() or path == path.parent else _existing(path.parent)


def _no_execution(path: Path) -> bool:
    return bool(os.statvfs(_existing(path)).f_flag & getattr(os, "ST_NOEXEC", 0))


def _cache() -> Iterator[Diagnosis]:
    from fagen.build import housekeeping

    path = env.cache_dir()
    yield from _folder("cache", path, "kernels are built anew in every process", "FAGEN_CACHE_DIR")
    if _no_execution(path):
        cost, remedy = "built kernels cannot be loaded", "set FAGEN_CACHE_DIR to a folder on another file system"
        yield Diagnosis("cache", "problem", f"{path} lies on a file system mounted noexec", cost, remedy)
    try:
        held = housekeeping.entries()
    except CacheError as error:
        cost = "no kernel is built or loaded: PyTorch computes every call"
        yield Diagnosis("cache", "problem", f"{error.what} ({error.numbers})", cost, error.remedy)
        return
    refused = [entry.refused for entry in held if entry.refused]
    if refused:
        cost = "what these kernels would serve, PyTorch computes"
        detail = f"{len(refused)} refused: {refused[0].what} ({refused[0].numbers})"
        yield Diagnosis("cache entries", "problem", detail, cost, refused[0].remedy)
    damaged = [entry.path.name for entry in held if not entry.intact and not entry.refused]
    if damaged:
        cost = "none: they are built again when needed"
        yield Diagnosis(
            "cache entries", "problem", f"{len(damaged)} damaged: {damaged[0]}", cost, "fagen cache verify --remove"
        )


def _temporary() -> Iterator[Diagnosis]:
    path = Path(tempfile.gettempdir())
    yield from _folder("temporary files", path, "the compilers cannot work", "TMPDIR")
    if _no_execution(path):
        cost = "only where the cache cannot be written: kernels are then built here, and cannot be loaded"
        yield Diagnosis("temporary files", "note", f"{path} is mounted noexec", cost, "set TMPDIR to another folder")


def _database() -> Iterator[Diagnosis]:
    from fagen.db.store import Database

    path = env.user_db_dir()
    yield from _folder("your winners", path, "what fagen tune finds cannot be kept", "FAGEN_DB_DIR")
    database = Database.load()
    yield Diagnosis("database", "ok", f"{len(database.records)} winners")
    for warning in database.warnings:
        yield Diagnosis("database", "problem", warning, "these records are not used", "repair or remove the file")


def _folder(name: str, path: Path, cost: str, variable: str) -> Iterator[Diagnosis]:
    reason = _writable(path)
    if reason:
        yield Diagnosis(
            name, "problem", f"{path} cannot be written: {reason}", cost, f"set {variable} to a folder that can"
        )
        return
    free = shutil.disk_usage(_existing(path)).free
    detail = f"{path}, {free / 1e9:.1f} GB free"
    if free < _ENOUGH_BYTES:
        yield Diagnosis(name, "problem", detail, "builds may run out of space", f"free some, or set {variable}")
    else:
        yield Diagnosis(name, "ok", detail)


def _data() -> Iterator[Diagnosis]:
    templates = env.data_dir("templates")
    if (templates / "preamble.j2").is_file():
        yield Diagnosis("templates", "ok", str(templates))
    else:
        yield Diagnosis("templates", "problem", f"none in {templates}", "nothing can be made", "install fagen again")


def _variables() -> Iterator[Diagnosis]:
    for name, value in env.settings().items():
        if name in env.VARIABLES:
            yield Diagnosis(name, "ok", value)
        else:
            known = ", ".join(env.VARIABLES)
            yield Diagnosis(
                name, "note", f"{value!r}: fagen reads no such variable", "it has no effect", f"known: {known}"
            )


def _guarded(check: Callable[[], Iterator[Diagnosis]]) -> Callable[[], list[Diagnosis]]:
    """A check that fails is a finding: the doctor looks at the rest."""

    def run() -> list[Diagnosis]:
        found = []
        try:
            for finding in check():
                found.append(finding)
        except (FagenError, OSError) as error:
            found.append(Diagnosis(check.__name__.strip("_"), "problem", " ".join(str(error).splitlines())))
        return found

    return run


CHECKS = [
    _guarded(check)
    for check in (_python, _torch, _load, _driver, _compilers, _ninja, _data, _cache, _temporary, _database, _variables)
]
