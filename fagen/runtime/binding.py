"""Builds and loads the C++ ops once. `python_ops.py` answers what they ask of Python.

Building them takes some 20 s. A call does not wait for that: `ready` starts it beside the calls, which go through
ctypes until the ops are there.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen import env
from fagen.build import cache
from fagen.build.job import Job
from fagen.errors import BuildError, FagenError
from fagen.notices import notify
from fagen.ops.attention import size_point, tiling
from fagen.runtime import background

if TYPE_CHECKING:
    from fagen.build.job import Artifact
    from fagen.ops.base import Op
    from fagen.target import Target


# without contraction a distance of sizes is rounded as in Python
_FLAGS = ("-O2", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off")

FUNCTIONS = ("fagen_launch", "fagen_error", "fagen_workspace_bytes")  # in the order in which the C++ reads them

_lock = threading.RLock()
_module: Any = None
_failure: FagenError | None = None
_begun = False  # whether this process has looked for a built one


def _after_fork() -> None:
    """In the child: a thread of the parent may have held the lock, or have been about to load."""
    global _lock, _begun
    _lock, _begun = threading.RLock(), False


os.register_at_fork(after_in_child=_after_fork)


def job() -> Job:
    from fagen.codegen import render

    folder = Path(__file__).parent / "csrc"
    source = (folder / "binding.cpp").read_text()
    texts = {name: (folder / name).read_text() for name in ("gradients.h", "launch.h", "table.h")}
    for name, text in {**texts, "constants.h": _constants()}.items():
        paste = text.replace("#pragma once\n", "").replace("\\", r"\\")
        source = re.sub(rf'#include "{name}"[^\n]*\n', paste, source)
    return Job("torch-binding", render.fold(source), ".cpp", _FLAGS, (), "cpu", links_torch=True)


def _constants() -> str:
    """Facts that Python declares, for the table."""
    names, values = ", ".join(size_point.WEIGHTS), ", ".join(map(repr, size_point.WEIGHTS.values()))
    return (
        f"namespace fagen {{\nstruct SizeWeights {{ double {names}; }};\n"
        f"constexpr SizeWeights kSizeWeights{{{values}}};\n"
        f"constexpr double kMostWaves = {size_point.MOST_WAVES!r}, kLeastWaves = {size_point.LEAST_WAVES!r};\n"
        f"constexpr int64_t kWaveRows = {size_point.WAVE_ROWS}, kTileRows = {size_point.TILE_ROWS};\n"
        f"constexpr int64_t kMostPacked = {size_point.MOST_PACKED}, kSharedKeys = {size_point.SHARED_KEYS};\n"
        f"constexpr double kTail = {tiling.TAIL!r};\n"
        f"inline bool switch_allows_tf32() {{ return {_tf32_switch()}; }}\n}}\n"
    )


def regime_limits(op: Op, target: Target) -> tuple[int, int, int]:
    """For a plan of the table: `FewRows` there."""
    if op.regime is not size_point.regime:
        return -1, -1, 0
    return size_point.most_idle_tiles(target), size_point.most_rows(target), int(size_point.packs(target))


def _tf32_switch() -> str:
    """PyTorch's switch in C++. It has had three interfaces; where there is a newer one, an older one may throw."""
    import torch

    header = (Path(torch.__file__).parent / "include" / "ATen" / "Context.h").read_text()
    if "Float32Backend" in header:
        asked = "at::Float32Backend::CUDA, at::Float32Op::MATMUL"
        return f"at::globalContext().float32Precision({asked}) == at::Float32Precision::TF32"
    if "float32Precision(" in header:
        return 'at::globalContext().float32Precision("cuda", "matmul") == "tf32"'
    return "at::globalContext().allowTF32CuBLAS()"


def make() -> Artifact:
    """The built binding; `fagen build` calls this too, so that a first call need not compile."""
    return cache.make(job())


def load() -> Any:
    """The extension module with its ops registered, built now if need be; None where that fails, warned once."""
    global _module, _failure
    with _lock:
        if _module is None and _failure is None:
            try:
                _module = _import(_build())
            except FagenError as error:
                _failure = error
                reason = " ".join(str(error).splitlines())
                background.tell(f"calls take a slow road, the C++ binding cannot be built: {reason}")
    background.warn_told()
    return _module


def ready() -> Any:
    """The module if it is loaded, or built and thus loaded at once; None while it is built beside the calls."""
    global _begun
    background.warn_told()
    if _module is None and _failure is None and not _begun:
        _begun = True
        try:
            built = cache.find(job()) is not None
        except FagenError:
            built = True  # no compiler, say: `load` finds the words
        if built or env.build_mode() == "never":
            return load()
    return _module


def start() -> None:
    """Build the module beside the calls, after what else is built there."""
    if _module is None and _failure is None:
        background.submit("binding", _load_beside, last=True)


def _load_beside() -> None:
    global _module, _failure
    try:
        artifact = _build()
        with _lock:
            if _module is None:
                _module = _import(artifact)
    except FagenError as error:
        _failure = error
        background.tell(f"calls take a slow road, the C++ binding cannot be built: {' '.join(str(error).splitlines())}")


def _build() -> Artifact:
    return cache.make(job(), tell=lambda: notify("compiling the PyTorch binding (about 20 s, once)"))


def _import(artifact: Artifact) -> Any:
    from importlib.machinery import ExtensionFileLoader
    from importlib.util import module_from_spec, spec_from_file_location

    from fagen.runtime import python_ops  # and torch, to which the library binds

    loader = ExtensionFileLoader("kernel", str(artifact.path))
    spec = spec_from_file_location("kernel", artifact.path, loader=loader)
    assert spec is not None
    try:
        module = module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildError("the C++ binding cannot be loaded", str(error), "run: fagen cache clear") from error
    python_ops.register()
    return module


def forget_table() -> None:
    """Let every following call ask Python again, which still knows what it loaded."""
    if _module is not None:
        _module.forget()
