"""The kernels that this process has loaded, or could not build: by family, static key, target and config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec, Key
from fagen.errors import FagenError
from fagen.notices import notify
from fagen.runtime import kernel
from fagen.runtime.kernel import Kernel
from fagen.target import Target

in_memory: dict[Key, Kernel] = {}
failed: set[Key] = set()  # cannot be built; PyTorch computes instead


def forget() -> None:
    in_memory.clear()
    failed.clear()


def built(spec: KernelSpec) -> Kernel:
    """Loaded, and compiled before that if need be, which is said. Rendered and read once a process."""
    key = spec.key
    found = in_memory.get(key)
    if found is None:
        job = make_job(spec)

        def tell() -> None:
            notify(f"compiling {job.name} (about {cache.expected_seconds(spec.family, spec.target):.0f} s, once)")

        found = in_memory[key] = kernel.load(cache.make(job, tell=tell), spec)
    return found


def loaded(spec: KernelSpec) -> Kernel | None:
    """Loaded, and from the cache before that; None where it is not built, or may not be read now."""
    key = spec.key
    if key not in in_memory and not capturing(spec.target):
        with contextlib.suppress(FagenError):  # no compiler here, or a library that does not load
            artifact = cache.lookup(spec)
            if artifact is not None:
                in_memory[key] = kernel.load(artifact, spec)
                prime(spec)
    return in_memory.get(key)


def build_together(specs: Iterable[KernelSpec]) -> None:
    """Compile what is not built of several kernels at the same time, if it is more than one. Whoever asks for one that
    cannot be built learns why."""

    def attempt(spec: KernelSpec) -> None:
        with contextlib.suppress(FagenError):
            built(spec)

    missing = [spec for spec in specs if not _is_built(spec)]
    if len(missing) > 1:
        with ThreadPoolExecutor(len(missing)) as pool:
            list(pool.map(attempt, missing))


def _is_built(spec: KernelSpec) -> bool:
    with contextlib.suppress(FagenError):
        return spec.key in in_memory or spec.key in failed or cache.lookup(spec) is not None
    return True  # no compiler, say


def capturing(target: Target) -> bool:
    if not target.is_gpu:
        return False
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def prime(spec: KernelSpec) -> None:
    """Run it, if it is loaded, once on next to nothing: CUDA loads a kernel's code when it is first launched."""
    found, target = in_memory.get(spec.key), spec.target
    if found is None or not target.is_gpu or not device_is_ready(target):
        return
    from fagen.verify import checks

    with contextlib.suppress(RuntimeError), checks.plain_modes("cuda"):  # out of memory, say: its first call loads it
        problem = found.calls.check_problems(found.spec.problem, target)[0]
        kernel.launcher(found, found.calls.inputs(problem, "cuda", 0, False))()


def device_is_ready(target: Target) -> bool:
    """Whether the current device is the target itself, and free to run something."""
    from fagen.target import gpu, host

    if not target.is_gpu:
        return target.device == host().device
    import torch

    if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return False
    here = gpu(torch.cuda.current_device())
    return here is not None and (here.arch, here.device) == (target.arch, target.device)
