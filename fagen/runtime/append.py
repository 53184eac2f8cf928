"""The kernel that appends to a cache, built once a target and loaded once a process: it serves all sizes and dtypes."""

from __future__ import annotations

from fagen import env
from fagen.build import cache
from fagen.build.job import Job, link_flags
from fagen.codegen import render
from fagen.errors import FagenError
from fagen.families import cpu_forward, device_limits
from fagen.notices import notify
from fagen.ops import abi
from fagen.runtime import background
from fagen.runtime.kernel import Library
from fagen.target import Target

HEADER = "fagen/abi/append.h"
Params = abi.params(HEADER)

_GPU_FLAGS = ("-O3", "-std=c++17", "-Xptxas=-v", "-lineinfo")
_libraries: dict[str, Library | None] = {}  # by arch; None: it cannot be built


def rendered(target: Target) -> str:
    """The source, its own headers still included by name."""
    template = "append/append.cu.j2" if target.is_gpu else "append/append.cpp.j2"
    return render.render(template) + abi.layout_function(HEADER)


def job(target: Target) -> Job:
    # products and sums are rounded one by one, as PyTorch does it
    flags = (device_limits.gencode(target), *_GPU_FLAGS) if target.is_gpu else (*cpu_forward.FLAGS, "-ffp-contract=off")
    suffix = ".cu" if target.is_gpu else ".cpp"
    about = {"arch": target.arch}
    return Job(
        _name(target), render.fold(rendered(target)), suffix, flags, link_flags(target, flags), target.arch, about=about
    )


def library(target: Target, capturing: bool) -> Library | None:
    """The kernel, compiled now where calls wait for that; None where PyTorch appends, for now or for good."""
    if target.arch in _libraries:
        return _libraries[target.arch]
    if capturing or background.pending(_name(target)):
        return None
    try:
        return _find(target)
    except FagenError as error:
        _give_up(target, error)
    return None


def build(target: Target) -> None:
    """Compile it ahead of the first call, here or for another machine."""
    if not _lacking(target):
        cache.make(job(target))


def _name(target: Target) -> str:
    return f"append-{target.arch}"


def _lacking(target: Target) -> str | None:
    return device_limits.needs_sm80(target) if target.is_gpu else None


def _find(target: Target) -> Library | None:
    mode = env.build_mode()
    if _lacking(target):
        _libraries[target.arch] = None
    elif mode == "wait":
        _libraries[target.arch] = _load(target)
    elif (artifact := cache.find(job(target))) is not None:
        _libraries[target.arch] = Library(artifact.path, Params)
    elif mode == "never":
        _libraries[target.arch] = None
    else:
        background.submit(_name(target), lambda: _load_beside(target))
    return _libraries.get(target.arch)


def _load(target: Target) -> Library:
    wanted = job(target)
    made = cache.make(wanted, tell=lambda: notify(f"compiling {wanted.name} (a few seconds, once)"))
    return Library(made.path, Params)


def _load_beside(target: Target) -> None:
    try:
        _libraries[target.arch] = _load(target)
    except FagenError as error:
        _give_up(target, error)


def _give_up(target: Target, error: FagenError) -> None:
    _libraries[target.arch] = None
    background.tell(f"PyTorch appends to caches: {' '.join(str(error).splitlines())}")
