"""The kernels that this process has loaded, or could not build: by family, static key, target and config."""

from __future__ import annotations

import contextlib

from fagen.build import cache
from fagen.build.job import make_job
from fagen.errors import FagenError
from fagen.families import Config, Family
from fagen.notices import notify
from fagen.ops.attention.problem import Problem
from fagen.runtime import kernel
from fagen.runtime.kernel import Kernel
from fagen.target import Target

Key = tuple[str, str, Target, Config]  # family, static key, target, config: all that makes a kernel

in_memory: dict[Key, Kernel] = {}
failed: set[Key] = set()  # cannot be built; PyTorch computes instead


def forget() -> None:
    in_memory.clear()
    failed.clear()


def key_of(family: Family, problem: Problem, target: Target, config: Config) -> Key:
    return family.name, problem.static_key, target, config


def built(family: Family, problem: Problem, target: Target, config: Config) -> Kernel:
    """Loaded, and compiled before that if need be, which is said. Rendered and read once a process."""
    key = key_of(family, problem, target, config)
    found = in_memory.get(key)
    if found is None:
        job = make_job(family, problem, target, config)

        def tell() -> None:
            notify(f"compiling {job.name} (about {cache.expected_seconds(family, target):.0f} s, once)")

        found = in_memory[key] = kernel.load(cache.make(job, tell=tell), family, problem, config)
    return found


def loaded(family: Family, problem: Problem, target: Target, config: Config) -> Kernel | None:
    """Loaded, and from the cache before that; None where it is not built, or may not be read now."""
    key = key_of(family, problem, target, config)
    if key not in in_memory and not capturing(target):
        with contextlib.suppress(FagenError):  # no compiler here, or a library that does not load
            artifact = cache.lookup(family, problem, target, config)
            if artifact is not None:
                in_memory[key] = kernel.load(artifact, family, problem, config)
                _prime(in_memory[key], target)
    return in_memory.get(key)


def capturing(target: Target) -> bool:
    if not target.is_gpu:
        return False
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _prime(found: Kernel, target: Target) -> None:
    """Run it once on next to nothing: CUDA loads a kernel's code when it is first launched, in milliseconds."""
    if not target.is_gpu or not device_is_ready(target):
        return
    import torch

    from fagen.ops.attention.call import AttentionCall
    from fagen.ops.attention.problem import INTERVAL_KINDS, TORCH_DTYPES

    p, here = found.problem, torch.device("cuda", torch.cuda.current_device())
    columns, window = len(INTERVAL_KINDS.get(p.intervals, ())), {"causal": (-1, 0), "window": (0, 0)}
    dtype = getattr(torch, TORCH_DTYPES[p.dtype])
    with contextlib.suppress(RuntimeError), torch.no_grad():  # out of memory, say: then its first call loads it
        q, k, v = (torch.zeros(1, 1, 1, n, dtype=dtype, device=here) for n in (p.head_dim, p.head_dim, p.head_dim_v))
        call = AttentionCall(
            q, k, v, window=window.get(p.mask, (-1, -1)), kind=p.intervals, softcap=float(p.softcap),
            intervals=torch.zeros(1, 1, 1, columns, dtype=torch.int32, device=here) if columns else None,
            alibi_slopes=torch.zeros(1, dtype=torch.float32, device=here) if p.alibi else None,
        )  # fmt: skip
        found.launch(call, call.new_outputs())


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
