"""The kernels that make fp8 numbers of q, k and v, built once a target and loaded once a process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fagen import env
from fagen.build import cache
from fagen.build.job import Job, link_flags
from fagen.codegen import render
from fagen.errors import FagenError, LaunchError
from fagen.families import device_limits
from fagen.notices import notify, warn_fallback
from fagen.ops import abi
from fagen.runtime.kernel import Library, launch_on_stream
from fagen.target import Target

if TYPE_CHECKING:
    import torch

HEADER = "fagen/abi/quantize.h"
Params = abi.params(HEADER)
_FLAGS = ("-O3", "-std=c++17", "-Xptxas=-v", "-lineinfo")
_LEAST_CAPABILITY = 89  # that converts to e4m3
_libraries: dict[str, Library | None] = {}  # by arch; None: it cannot be built


def rendered() -> str:
    """The source, its own headers still included by name."""
    return render.render("quantize/quantize.cu.j2") + abi.layout_function(HEADER)


def job(target: Target) -> Job:
    flags = (device_limits.gencode(target), *_FLAGS)
    name, about = f"quantize-{target.arch}", {"arch": target.arch}
    return Job(name, render.fold(rendered()), ".cu", flags, link_flags(target, flags), target.arch, about=about)


def library(target: Target) -> Library | None:
    """Compiled now where calls wait for that; None where PyTorch quantises."""
    if not target.is_gpu or target.capability < _LEAST_CAPABILITY:
        return None
    if target.arch not in _libraries:
        wanted = job(target)
        found = cache.find(wanted)
        if found is None and env.build_mode() != "wait":
            return None
        try:
            made = found or cache.make(wanted, tell=lambda: notify(f"compiling {wanted.name} (a few seconds, once)"))
            _libraries[target.arch] = Library(made.path, Params)
        except FagenError as error:
            _libraries[target.arch] = None
            warn_fallback(f"PyTorch quantises: {' '.join(str(error).splitlines())}")
    return _libraries[target.arch]


def launch(found: Library, params: Any, t: torch.Tensor) -> None:
    """On the stream that is current on the tensor's device."""
    status = launch_on_stream(found, params, t)
    if status:
        text = (found.error(status) or b"unknown").decode(errors="replace")
        raise LaunchError(f"fp8 numbers could not be made: {text}", f"of a tensor {tuple(t.shape)}")
