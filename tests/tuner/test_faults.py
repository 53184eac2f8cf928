"""What may go wrong around a candidate: compilers and workers that are ended, full disks, devices that break."""

from __future__ import annotations

import errno
import math
import os
import pty
import re
import signal
import time
import types
from collections import deque
from pathlib import Path

import pytest

from fagen.build import cache, toolchain
from fagen.codegen.spec import KernelSpec
from fagen.db import store
from fagen.errors import CacheError, DatabaseError, FagenError
from fagen.families import Config
from fagen.families.space import enumerate_space
from fagen.target import host
from fagen.timing import load
from fagen.tuner import budget, journal, tune, workers
from fagen.tuner.messages import Result
from fagen.tuner.pool import Pool
from fagen.tuner.result import Options
from fagen.tuner.search import FIRST_SHARE, Search, open_storage
from tests.support import runs
from tests.support.fake_family import FAMILY, PROBLEM

DEFAULT = FAMILY.default(PROBLEM, host())


def options(folder: Path, **changes) -> Options:
    return Options(**{"trials": 50, "runs": folder / "runs", "run_timeout": 60.0, "workers": 2, **changes})


@pytest.fixture
def compiler(calm, monkeypatch):
    """A compiler that does something else first; kernels are built in a cache of their own."""
    real, script = toolchain.require_cxx(), calm / "compiler"

    def make(text: str) -> None:
        script.write_text(f'#!/bin/sh\ncase "$*" in *kernel.cpp*) {text} ;; esac\nexec {real} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("FAGEN_CXX", str(script))
        monkeypatch.setenv("FAGEN_CACHE_DIR", str(calm / "cache"))

    return make


class Explored:
    """A search through a pool, and what was told of each candidate."""

    def __init__(self, folder: Path, first: list[Config], **how) -> None:
        self.said: list[str] = []
        self.ended: dict[Config, Result] = {}
        self.asked = 0.0  # when the deadline was
        self.pool = Pool(
            host(), folder / "log", workers=2, seed=0, compile_timeout=240, run_timeout=60, note=self.said.append, **how
        )
        space = enumerate_space(FAMILY, PROBLEM, host())
        storage = open_storage(str(folder / "study"))
        self.search = Search(space, storage, seed=0, first=first, limit=len(first), exhaustive=False)

    def run(self, watch=lambda pool: None, begin=lambda: None) -> dict[Config, Result]:
        def done(item: KernelSpec, result: Result) -> None:
            assert item.config not in self.ended
            self.ended[item.config] = result
            self.search.tell(item.config, result.timing.median if result.timing else None)

        def deadline() -> float:
            self.asked = time.monotonic()
            return self.asked + 3600

        with self.pool:
            begin()
            self.pool.explore(self.search, deadline, done, lambda: bool(watch(self.pool)))
        return self.ended


# ---- compilers ------------------------------------------------------------------------------------------------------


def test_a_compiler_that_is_ended_is_tried_once_more(compiler, calm):
    """As the system does where memory runs out: once each, and then always."""
    first = [DEFAULT, DEFAULT.replace(style="plain")]
    compiler(f"if mkdir {calm}/once 2>/dev/null || [ -e {calm}/always ]; then kill -9 $$; fi")
    explored = Explored(calm, first)
    assert [r.outcome for r in explored.run().values()] == ["ok", "ok"]
    assert explored.said == ["a compiler was ended from outside; at most 1 at a time from here on"]
    (calm / "always").touch()
    (result,) = Explored(calm, [DEFAULT.replace(variant=2)]).run().values()
    assert result.outcome == "compile"
    assert "the compiler was killed" in result.reason
    assert "fewer compilers at a time" in result.reason


def test_a_compile_worker_that_is_ended_costs_nothing(compiler, calm):
    compiler("sleep 1")
    ended = []

    def watch(pool: Pool) -> None:
        if not ended and pool.compiling:
            ended.append(pool.compilers[0].pid)
            ended.extend(workers._descendants(ended[0]))
            os.kill(ended[0], signal.SIGKILL)

    (result,) = Explored(calm, [DEFAULT]).run(watch).values()
    assert result.outcome == "ok"
    runs.until(lambda: not any(runs.running(pid) for pid in ended))


def test_a_full_disk_under_the_cache_ends_the_run_and_blames_no_candidate(compiler, calm):
    compiler('echo "error writing to kernel.o: No space left on device" >&2; exit 1')
    with pytest.raises(CacheError, match="no space left") as caught:
        tune.run([PROBLEM], host(), options(calm))
    assert caught.value.exit_code == 1
    assert runs.rows(calm / "runs") == []


def test_compilers_wait_for_memory(calm, monkeypatch):
    from fagen.tuner import pool as module

    pool = Explored(calm, [DEFAULT]).pool
    monkeypatch.setattr(module, "free_memory", lambda: 0)
    assert pool._room(), "one may always run"
    pool.compilers[0].busy = True
    assert not pool._room()
    monkeypatch.setattr(module, "free_memory", lambda: 1 << 40)
    assert pool._room()
    pool._allowed = 1
    assert not pool._room()


def test_workers_are_ended_before_the_run_is_when_memory_runs_out(tmp_path):
    worker = workers.Worker(_about_itself, tmp_path / "log", oom=500)
    try:
        worker.send("?", 60)
        replies = []
        runs.until(lambda: replies or (replies.append(r) if (r := worker.poll()) else None))
        assert replies == [("500", 0)]
    finally:
        worker.kill()


def test_a_worker_may_take_longer_to_start_on_a_busy_machine(tmp_path, monkeypatch):
    now, busy = [0.0], [1.0]
    monkeypatch.setattr(workers, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(load, "average", lambda: busy[0] * load.cores())
    monkeypatch.setattr(load, "stretch", lambda: 1.0)
    monkeypatch.setattr(load, "_FRESH_SECONDS", 0.0)
    worker = workers.Worker(_about_itself, tmp_path / "log", _never_ready)
    try:
        worker.send("?", 60)
        busy[0] = 3.0  # since it was started
        for now[0] in (workers.START_SECONDS - 1, workers.START_SECONDS + 1, 3 * workers.START_SECONDS - 1):
            assert worker.poll() is None and worker.pid is not None
        now[0] = 3 * workers.START_SECONDS + 1
        with pytest.raises(FagenError, match=f"did not start\nwithin {3 * workers.START_SECONDS:.0f} s"):
            worker.poll()
        assert worker.pid is None
        worker.send("?", 60)
        busy[0], now[0] = 1.0, now[0] + workers.START_SECONDS + 1
        with pytest.raises(FagenError, match=f"did not start\nwithin {workers.START_SECONDS:.0f} s"):
            worker.poll()
    finally:
        worker.kill()


def _never_ready() -> None:
    time.sleep(runs.PATIENCE)


def _about_itself(request: str) -> tuple[str, int]:
    import resource

    return Path("/proc/self/oom_score_adj").read_text().strip(), resource.getrlimit(resource.RLIMIT_CORE)[0]


# ---- the run's folder and the database ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_under_the_run_keeps_what_was_written_and_the_run_goes_on(calm, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FagenError, match="cannot be kept") as caught:
            tune.run([PROBLEM], host(), options(calm))
    assert "No space left" in str(caught.value) and "--resume" in str(caught.value)
    kept = runs.rows(calm / "runs")
    assert len(kept) == 4, "the line that could not be synced was whole all the same"
    report = tune.run([PROBLEM], host(), options(calm, resume="latest"))
    assert runs.rows(report.run)[:4] == kept
    assert len(runs.rows(report.run)) == 8


def test_optunas_journal_on_a_full_disk(tmp_path):
    storage = open_storage(str(tmp_path / "study"))
    (tmp_path / "study").unlink()
    (tmp_path / "study").symlink_to("/dev/full")
    with pytest.raises(FagenError, match="cannot be kept") as caught:
        storage._backend.append_logs([{"op": 0}])
    assert "--resume" in str(caught.value)
    with pytest.raises(FagenError, match="cannot be kept"):
        open_storage(str(tmp_path / "no" / "folder"))


def test_a_database_from_the_future_stops_a_run_before_it_begins(calm):
    path = store.path_of(calm / "db", "cpu", host().device)
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 99}')
    with pytest.raises(DatabaseError, match="newer fagen"):
        tune.run([PROBLEM], host(), options(calm))
    assert not (calm / "runs").exists()
    assert path.read_text() == '{"schema": 99}'


def test_winners_that_could_not_be_written_stop_a_run_before_it_begins(calm):
    (calm / "file").touch()
    with pytest.raises(DatabaseError, match="no folder that this user can write to"):
        tune.run([PROBLEM], host(), options(calm, out=calm / "file" / "db"))
    assert not (calm / "runs").exists()


# ---- devices --------------------------------------------------------------------------------------------------------


def test_a_device_that_does_not_work_is_no_candidates_fault(calm, monkeypatch):
    (calm / "broken").write_text("0")
    monkeypatch.setenv("FAKE_BROKEN", str(calm / "broken"))
    with pytest.raises(FagenError, match="does not work any more") as caught:
        tune.run([PROBLEM], host(), options(calm))
    assert "bad mood" in str(caught.value)
    assert not [r for r in runs.rows(calm / "runs") if r["outcome"] != "compile"]


@pytest.mark.slow
def test_several_devices_on_a_terminal(calm, monkeypatch):
    """One of three is broken: the run goes on with two. What a person sees of it."""
    (calm / "broken").write_text("2")
    monkeypatch.setenv("FAKE_BROKEN", str(calm / "broken"))
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    child = runs.begin(calm, stderr=theirs, devices=[0, 1, 2])
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert child.wait(runs.PATIENCE) == 0, shown.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    for word in ("problem", "tried", "compiling", "on GPU 0", "on GPU 1", "best so far", "time left", "x the default"):
        assert word in text, word
    assert "device 2 does not work any more and is given up" in " ".join(text.split())
    ended = runs.rows(calm / "runs")
    assert len(ended) == 8
    assert {r["device"].get("gpu") for r in ended if r["outcome"] == "ok"} <= {0, 1}
    (run,) = (calm / "runs").iterdir()
    (winner,) = journal.read_lines(run / journal.WINNERS)
    assert winner["config"]["style"] == "plain"


@pytest.mark.slow
def test_two_devices_measure_at_once(calm):
    configs = [DEFAULT.replace(style=s, variant=v) for s in ("slow", "plain") for v in (1, 2, 3)]
    explored = Explored(calm, configs, devices=(0, 1))
    explored.pool.quiet = False
    together = []

    def ready() -> None:  # or one device might be done before the other one's process, or the next kernel, is there
        explored.pool.built(KernelSpec(FAMILY, PROBLEM, host(), config) for config in configs)
        runs.until(lambda: explored.pool._collect(lambda *told: None) or len(explored.pool._alive) == 2)

    ended = explored.run(lambda pool: together.append(len(pool.measuring)), ready)
    assert max(together) == 2
    assert {r.state["gpu"] for r in ended.values()} == {0, 1}
    assert {r.outcome for r in ended.values()} == {"ok"}


# ---- the clock of a problem -----------------------------------------------------------------------------------------


def test_a_problems_time_begins_when_something_can_be_measured(calm, monkeypatch):
    monkeypatch.setenv("FAKE_COLD", "2")
    explored = Explored(calm, [DEFAULT])
    begin = time.monotonic()
    explored.run()
    assert explored.asked - begin >= 2
    assert explored.pool._compiled


def test_a_problems_share_is_counted_from_its_beginning(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    left = [100.0]
    share = budget.Share(lambda: left[0], families=2, reserved=2.0)
    now[0], left[0] = 1030.0, 70.0  # a cold start of 30 s
    assert share.deadline(0) == pytest.approx(1030 + budget.SEARCH_SHARE * 70 * FIRST_SHARE)
    now[0] = 1060.0
    assert share.deadline(1) == pytest.approx(1030 + budget.SEARCH_SHARE * 70), "the last one has what is left"
    assert budget.Share(lambda: math.inf, 1).deadline(0) == math.inf
    assert budget.Share(lambda: 10.0, 1, reserved=4.0).deadline(0) == pytest.approx(1060 + 6), "final rounds are long"
    assert budget.Share(lambda: 1.0, 1, reserved=4.0).deadline(0) == 1060


def test_compilers_that_would_be_too_late_build_for_the_next_search(calm, monkeypatch):
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(calm / "cache"))
    following = PROBLEM.replace(head_dim=8, head_dim_v=8)
    explored = Explored(calm, [DEFAULT])
    pool, search = explored.pool, explored.search
    pool.quiet = False
    pool._seconds.extend([10.0] * 4)
    pool.until = time.monotonic() + 5
    assert not pool._too_late(search), "not before the default was measured"
    search.seen[DEFAULT] = 1.0
    assert pool._too_late(search)
    pool.until = time.monotonic() + 60
    assert not pool._too_late(search)
    pool.ahead = deque([KernelSpec(FAMILY, following, host(), DEFAULT)])
    with pool:
        pool.build_ahead()
        assert pool.compiling == 1 and not pool.ahead
        runs.until(lambda: pool._collect(explored.ended.__setitem__) or not pool.compiling)
    assert cache.lookup(KernelSpec(FAMILY, following, host(), DEFAULT))
    assert not explored.ended, "nobody is told"
