"""What all tests share: folders of their own, and what this machine can do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fagen import toolchain

sys.path.insert(0, str(Path(__file__).parent / "cpu"))  # what several test files use stands in modules beside them


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are built into a fresh folder (FAGEN_TEST_CACHE_DIR keeps one across runs), winners into another."""
    keep = os.environ.get("FAGEN_TEST_CACHE_DIR")
    patch = pytest.MonkeyPatch()
    patch.setenv("FAGEN_CACHE_DIR", keep or str(_shared(tmp_path_factory) / "cache"))
    patch.setenv("FAGEN_DB_DIR", str(tmp_path_factory.mktemp("db")))
    patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    patch.setenv("FAGEN_QUIET", "1")
    for name in ("FAGEN_DISABLE_JIT", "FAGEN_STALE", "FAGEN_NVCC", "FAGEN_CXX"):
        patch.delenv(name, raising=False)
    yield
    patch.undo()


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder for all processes of a parallel run, so that each kernel is compiled once."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/gpu needs a GPU and nvcc, tests/compile needs nvcc; what is left out says why."""
    here = Path(__file__).parent
    lacks_nvcc = toolchain.nvcc() is None
    for item in items:
        folder = item.path.relative_to(here).parts[0] if here in item.path.parents else ""
        if folder in ("gpu", "compile"):
            item.add_marker(pytest.mark.gpu if folder == "gpu" else pytest.mark.nvcc)
            if lacks_nvcc:
                item.add_marker(pytest.mark.skip(reason="needs nvcc, which is not found"))
        if folder == "gpu" and not _gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU that torch sees"))
