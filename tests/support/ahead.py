"""Kernels of tests/gpu, built where there is nvcc and no GPU, for one that is rented by the minute.

    python -m tests.support.ahead FOLDER sm90_decode sm90_forward_fp8 ...      builds those of tests/gpu/test_NAME.py
    FAGEN_TEST_CACHE_DIR=FOLDER python -m pytest -p tests.support.ahead -n 16 --dist load tests/gpu/test_NAME.py ...

Loaded as a plugin it finds a CUDA kernel by its source, flags and architecture, whatever compilers and PyTorch the two
machines have, and gives each worker a GPU of $GPUS.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fagen.build import cache, job
from fagen.codegen.spec import KernelSpec
from fagen.errors import FagenError
from fagen.target import Target

# as target.gpu() sees it
H100 = Target("sm_90", "NVIDIA H100 80GB HBM3", units=132, smem_per_block=232448, smem_per_unit=233472, l2=52428800)
_full_key = job.Job.key


def _key(made: job.Job) -> str:
    if not made.is_cuda:
        return _full_key(made)
    return hashlib.sha256(json.dumps([made.source, made.suffix, made.flags, made.arch]).encode()).hexdigest()


def pytest_configure() -> None:
    job.Job.key = _key  # type: ignore[method-assign]
    worker, gpus = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("GPUS")
    if worker and gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(int(worker.removeprefix("gw")) % int(gpus))


def specs(names: Iterable[str]) -> list[KernelSpec]:
    """What the fixtures of those tests would build first."""
    from tests.support import backward_gpu, cases, decode_gpu

    found: dict[tuple[object, ...], KernelSpec] = {}

    def build_specs(some: Iterable[KernelSpec]) -> None:
        found.update({(spec.family.name, spec.problem.static_key, spec.config): spec for spec in some})

    shared = {"present": lambda: H100, "build_specs": build_specs, "build_all": cases.build_all}
    modules = [importlib.import_module(f"tests.gpu.test_{name}") for name in names]
    for module in (cases, backward_gpu, decode_gpu, *modules):
        for name in shared.keys() & vars(module).keys():
            setattr(module, name, shared[name])
    for module in modules:
        vars(module)["_built"]._get_wrapped_function()()
    return list(found.values())


def main(folder: str, *names: str) -> int:
    pytest_configure()
    os.environ["FAGEN_CACHE_DIR"] = str(Path(folder).absolute() / "fagen")

    def one(spec: KernelSpec) -> str:
        try:
            cache.make(job.make_job(spec))
        except FagenError as error:
            return f"{spec.family.name} {spec.problem.static_key} {spec.config}: {error}"
        return ""

    wanted = specs(names)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        failed = [message for message in pool.map(one, wanted) if message]
    print(*failed, f"{len(wanted) - len(failed)} of {len(wanted)} kernels are in {folder}", sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
