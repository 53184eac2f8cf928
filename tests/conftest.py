"""What all tests share: folders, time-outs that only a hang meets, and what this machine can do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# OpenMP's threads must not spin while they wait: the other core runs tests, too. Before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from fagen import notices
from fagen.build import toolchain
from fagen.db import store

HERE = Path(__file__).parent

# Tests of one group run one after another, in one process: they start many processes, a server, or use the one GPU.
GROUPS = {
    "test_shared.py": "processes", "test_faults.py": "processes", "test_freshness.py": "processes",
}  # fmt: skip
TIMEOUT = 900.0  # seconds on an idle machine


def cores() -> int:
    """Those that this process may use: of its affinity, and of its control group."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no control group, or no limit
    return count


def load() -> float:
    """Processes that want to run, for each core of the machine: at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    """Three for two cores, as far as memory bears torch and a compiler in each: they often wait, for a process that
    starts or for a time-out."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores() * 3 // 2, memory // (3 << 30)))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A test's time-out is there for hangs alone: --timeout, else $FAGEN_TEST_TIMEOUT, longer on a busy machine."""
    if getattr(config.option, "timeout", 0) is None:
        config.option.timeout = float(os.environ.get("FAGEN_TEST_TIMEOUT", TIMEOUT)) * load()


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled things are: $FAGEN_TEST_CACHE_DIR, kept across runs, or fresh and of all processes of this run."""
    keep, base = os.environ.get("FAGEN_TEST_CACHE_DIR"), tmp_path_factory.getbasetemp()
    if keep:
        return Path(keep)
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "cache"


@pytest.fixture(autouse=True, scope="session")
def _own_folders(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are built into the tests' cache, winners go into a folder of this process."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FAGEN_CACHE_DIR", str(cache_folder / "fagen"))
    patch.setenv("FAGEN_DB_DIR", str(tmp_path_factory.mktemp("db")))
    patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    patch.setenv("FAGEN_QUIET", "1")
    for name in ("FAGEN_BUILD", "FAGEN_DISABLE_JIT", "FAGEN_STALE", "FAGEN_NVCC", "FAGEN_CXX"):
        patch.delenv(name, raising=False)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _reasons_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test meets each reason for which PyTorch computes for the first time, whatever ran before it."""
    monkeypatch.setattr(notices, "_warned", set())


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/gpu needs a GPU and nvcc, tests/compile needs nvcc; what is left out says why."""
    lacks_nvcc = toolchain.nvcc() is None
    for item in items:
        folder = item.path.relative_to(HERE).parts[0] if HERE in item.path.parents else ""
        if folder in ("gpu", "compile"):
            item.add_marker(pytest.mark.gpu if folder == "gpu" else pytest.mark.nvcc)
            if lacks_nvcc:
                item.add_marker(pytest.mark.skip(reason="needs nvcc, which is not found"))
        if folder == "gpu" and not _gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU that torch sees"))
        group = "gpu" if folder == "gpu" else GROUPS.get(item.path.name)
        if group:
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def quick_machine(monkeypatch):
    """The machine's own rates by short samples: a run of the benchmark takes three."""
    from fagen.timing import machine

    monkeypatch.setattr(machine, "_ROUNDS", 3)
    monkeypatch.setattr(machine, "_SECONDS", 0.01)
    monkeypatch.setitem(machine._SIZES, "cpu", (256, "float32"))
    monkeypatch.setitem(machine._COPY_BYTES, "cpu", 1 << 24)


# ---- folders of a test, and a family that misbehaves ----------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path / "db"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path / "db",))  # nothing ships
    return tmp_path


@pytest.fixture
def fake(folders, monkeypatch):
    from tests.support import fake_family

    fake_family.install(monkeypatch.setattr)
    return folders


@pytest.fixture
def calm(fake, monkeypatch):
    """The fake family with styles that cost little time: 8 legal configs."""
    from tests.support import fake_family

    chosen = "plain,slow,wrong,broken"
    monkeypatch.setenv("FAKE_STYLES", chosen)  # of processes started from here
    monkeypatch.setattr(fake_family, "CHOSEN", tuple(chosen.split(",")))
    return fake
