"""What a run does where time is short or the machine is busy: budgets, time limits, second chances, what it says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import fagen
from fagen import families
from fagen.build import cache
from fagen.build.job import Artifact
from fagen.codegen.spec import KernelSpec
from fagen.db import merge, store
from fagen.db.record import Record
from fagen.errors import NoCandidate, UsageError
from fagen.target import Target, host, known
from fagen.timing import load, nvml
from fagen.timing.timer import Timing
from fagen.tuner import budget, journal, progress, tune
from fagen.tuner.budget import Budget, Least
from fagen.tuner.messages import Alive, Final, Result
from fagen.tuner.patience import Patience
from fagen.tuner.pool import Pool
from fagen.tuner.result import Options, Report, Tuned
from fagen.tuner.workers import Death
from tests.support import runs
from tests.support.fake_family import FAMILY, PROBLEM

DEFAULT = FAMILY.default(PROBLEM, host())
ITEM = KernelSpec(FAMILY, PROBLEM, host(), DEFAULT)
PROBLEMS = [PROBLEM, PROBLEM.replace(seqlen_q=96), PROBLEM.replace(seqlen_q=80)]
GPU = known("sm_90")


def options(folder: Path, **changes) -> Options:
    return Options(**{"trials": 50, "runs": folder / "runs", "run_timeout": 60.0, "workers": 2, **changes})


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(load, "stretch", lambda: 1.0)
    monkeypatch.setattr(load, "average", lambda: 0.0)
    return Clock(monkeypatch)


# ---- the budget -----------------------------------------------------------------------------------------------------


@pytest.fixture
def needs(monkeypatch):
    """Every problem needs 10 s, and the first process 5."""
    monkeypatch.setattr(budget, "least", lambda *words: Least(5.0, 6.0, 3.0, 1.0))


def test_a_budget_that_is_enough_is_no_matter(clock, needs):
    mine = Budget(36.0)
    assert mine.plan(PROBLEMS, host()) == ""
    assert mine.ends == 1036.0 and mine.among(PROBLEMS) == 3
    assert Budget(None).plan(PROBLEMS, host()) == "" and Budget(None).fits(PROBLEM)
    assert Budget(None).each(3) == float("inf")


def test_a_budget_that_is_short_is_said_and_kept(clock, needs):
    mine = Budget(28.0)
    said = mine.plan(PROBLEMS, host())
    assert "a budget of 28 s is too short for all" in said and "3 problems need about 35 s at least" in said
    assert "6 s to compile" in said and "the first one 15 s" in said
    assert mine.ends == 1028.0
    assert mine.among(PROBLEMS) == 2, "what is left goes to those that can be served"
    assert mine.share(2, 1).reserved == 1.0, "before any final round was held, as planned"
    mine.finals.append(3.0)
    assert mine.share(2, 1).reserved == 3.0
    clock.now = 1018.0
    assert mine.fits(PROBLEM) and mine.each(mine.among(PROBLEMS)) == 10.0
    clock.now = 1018.5
    assert not mine.fits(PROBLEM)


def test_a_budget_that_is_too_short_for_one_takes_what_one_needs(clock, needs):
    mine = Budget(10.0, begun=998.0)
    said = mine.plan(PROBLEMS, host())
    assert "too short for any problem, so this run takes about 15 s" in said
    assert mine.ends == 1015.0
    assert mine.among(PROBLEMS) == 1


def test_the_least_grows_with_the_load_and_knows_what_is_built(monkeypatch):
    monkeypatch.setattr(families, "all_families", lambda: (FAMILY,))
    monkeypatch.setattr(cache, "expected_seconds", lambda family, target: 4.0)
    monkeypatch.setattr(cache, "lookup", lambda *words: None)
    alone, busy = budget.least(PROBLEM, host()), budget.least(PROBLEM, host(), None, 3.0)
    assert alone.compile == 5.0 and busy.each == pytest.approx(3 * alone.each) and busy.start == 3 * alone.start
    monkeypatch.setattr(cache, "lookup", lambda *words: "there")
    assert budget.least(PROBLEM, host()).compile == 0.0


@pytest.fixture
def served(calm, monkeypatch):
    """Every problem that is begun has a winner at once."""

    def one(tuner, problem, to_come, place):
        won = {"family": FAMILY.name, "config": {"style": "plain", "variant": 2}, "seconds": 1.0}
        record = Record(problem, "cpu", host().device, FAMILY.name, won["config"], 1.0, 0.0, 2.0, 0.0, "0a54")
        return Tuned(problem.to_dict(), True, {"ok": 3}, **won, default_seconds=2.0), record

    monkeypatch.setattr(tune._Tuner, "tune_problem", one)
    return calm


def test_what_does_not_fit_is_left_and_can_be_resumed(served, monkeypatch):
    """One problem is served; the run says so, ends well, and a second one goes on with the others."""
    monkeypatch.setattr(budget, "least", lambda *words: Least(0.0, 3000.0, 0.0, 0.0))
    heard: list[str] = []

    class Ear(progress.Progress):
        def note(self, text: str) -> None:
            heard.append(text)

    report = tune.run(PROBLEMS, host(), options(served, budget=10.0), Ear())
    assert [tuned.key for tuned in report.results] == [PROBLEM.key] and report.results[0].config
    assert report.left == [p.key for p in PROBLEMS[1:]] and report.exit_code == 0
    assert any("too short for any problem" in text for text in heard)
    said = progress.closing(report, "fagen tune --resume RUN")
    assert f"not begun  {PROBLEMS[1].key}" in said and "fagen tune --resume RUN" in said
    again = tune.run(PROBLEMS, host(), options(served, resume="latest"))
    assert again.run == report.run and again.left == []
    assert all(tuned.config for tuned in again.results) and len(again.results) == 3
    assert again.results[0] == report.results[0]


def test_a_run_ends_with_its_budget_whatever_is_missing(calm, monkeypatch):
    """The end comes while the default compiles: there is no winner, and nothing counts as done."""
    monkeypatch.setattr(budget, "least", lambda *words: Least(0.0, 0.0, 0.0, 0.0))
    report = tune.run([PROBLEM], host(), options(calm, budget=1e-3))
    (tuned,) = report.results
    assert not tuned.config and not tuned.complete and tuned.why == "the budget ended before its default was measured"
    assert report.exit_code == NoCandidate.exit_code
    assert not [r for r in runs.rows(report.run) if r["outcome"] == "ok"]


def test_an_earlier_winner_that_was_not_measured_in_time_stays(calm, monkeypatch):
    best = {"style": "plain", "variant": 3}
    merge.put([Record(PROBLEM, "cpu", host().device, FAMILY.name, best, 1e-9, 0.0, 1.0, 0.0, "0a54")])
    built = Artifact(calm / "kernel.so", "key", "0a54")

    def explore(pool, search, deadline, done, over) -> None:
        """The default is measured, and then the budget is spent."""
        assert search.next() == DEFAULT
        done(ITEM, Result("ok", timing=Timing(1.0, 0.0, 15), artifact=built))

    monkeypatch.setattr(Pool, "explore", explore)
    monkeypatch.setattr(Pool, "ended", True)
    monkeypatch.setattr(Pool, "built", lambda pool, items: dict.fromkeys(items, built))
    monkeypatch.setattr(Pool, "final", lambda pool, entries, *words: Final(dict.fromkeys(entries, Timing(1.0, 0.0, 9))))
    report = tune.run([PROBLEM], host(), options(calm))
    (tuned,) = report.results
    assert tuned.config == dict(DEFAULT) and not tuned.complete and not report.records
    assert "the earlier winner was not measured any more, and stays" in tuned.why
    assert [dict(r.config) for r in store.Database.load().records] == [best]
    monkeypatch.setattr(Pool, "ended", False)  # without it the default would be the new winner
    assert tune.run([PROBLEM], host(), options(calm)).records


@pytest.mark.parametrize(("word", "seconds"), [("10", 10.0), ("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0)])
def test_times_are_read_as_the_help_says(word, seconds):
    assert budget.duration(word) == seconds


@pytest.mark.parametrize("word", ["soon", "0", "-1", "1d", "", "1e3", "nan"])
def test_other_words_are_no_times(word):
    with pytest.raises(UsageError, match="is no time"):
        budget.duration(word)


# ---- a busy machine -------------------------------------------------------------------------------------------------


def test_time_limits_grow_with_the_load(monkeypatch):
    limits = Patience(host(), 120.0, 10.0)
    limits.slowdown = lambda: 1.0
    alone = limits.compiling(ITEM), limits.measuring(ITEM, 1e-3), limits.probing(), limits.final(3, 2.0, 1e-3)
    limits.slowdown = lambda: 4.0
    busy = limits.compiling(ITEM), limits.measuring(ITEM, 1e-3), limits.probing(), limits.final(3, 2.0, 1e-3)
    assert busy == pytest.approx([4 * seconds for seconds in alone])


def test_the_slowdown_is_what_load_and_clock_say(monkeypatch, clock):
    monkeypatch.setattr(load, "cores", lambda: 2)
    slowdown = load.Slowdown()
    assert slowdown() == 1.0
    monkeypatch.setattr(load, "average", lambda: 9.0)
    assert slowdown() == 1.0, "measured a moment ago"
    clock.now += 60
    assert slowdown() == 4.5
    monkeypatch.setattr(load, "stretch", lambda: 6.0)
    clock.now += 60
    assert slowdown() == 6.0
    monkeypatch.setattr(load, "average", lambda: 1e6)
    clock.now += 60
    assert slowdown() == load.MOST, "what hangs must end some time"


def test_working_takes_at_least_its_time():
    assert load.stretch() >= 0.99


class Worker:
    """Takes requests, and remembers for how long."""

    def __init__(self) -> None:
        self.busy, self.job, self.limits, self.killed = False, None, [], 0

    def send(self, request, seconds, job=None) -> None:
        self.busy, self.job = True, job
        self.limits.append(seconds)

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def pool(tmp_path):
    """One that has a measuring process and a compiler that are played, and a default in hand."""
    said: list[str] = []
    pool = Pool(host(), tmp_path / "log", workers=1, seed=0, compile_timeout=9, run_timeout=7, note=said.append)
    pool.patience.slowdown = lambda: 1.0
    pool.devices, pool.compilers = {Worker(): 0}, [Worker()]
    pool._needed = lambda config: config == DEFAULT
    pool._artifacts[ITEM] = Artifact(tmp_path / "kernel.so", "key", "0a54")
    pool.said = said
    return pool


LATE = Death(True, "no answer within 18 s; the worker was killed")


@pytest.mark.parametrize("death", [LATE, Death(False, "the worker died: SIGKILL")])
def test_a_default_that_does_not_answer_is_tried_again_with_more_time(pool, death):
    ended: list[tuple[KernelSpec, Result]] = []
    (worker,) = pool.devices
    first = pool.patience.measuring(ITEM, 1.0)
    pool._hear_measurer(worker, ITEM, death, lambda *told: ended.append(told))
    assert not ended and [item for item, _ in pool.ready] == [ITEM]
    assert worker.killed and "it is tried once more" in pool.said[0]
    assert pool.patience.measuring(ITEM, 1.0) == 3 * first
    pool.ready.clear()
    pool._hear_measurer(worker, ITEM, death, lambda *told: ended.append(told))
    probing = worker.job  # a fresh process says first that the device works
    pool._hear_probe(worker, probing, Alive(), lambda *told: ended.append(told))
    assert [(item, found.outcome) for item, found in ended] == [(ITEM, "timeout" if death.timed_out else "crash")]
    assert not pool.ready


def test_other_candidates_get_no_second_chance(pool):
    ended = []
    (worker,) = pool.devices
    other = KernelSpec(FAMILY, PROBLEM, host(), DEFAULT.replace(variant=2))
    pool._artifacts[other] = pool._artifacts[ITEM]
    pool._hear_measurer(worker, other, LATE, lambda *told: ended.append(told))
    pool._hear_probe(worker, worker.job, Alive(), lambda *told: ended.append(told))
    assert [item for item, _ in ended] == [other] and not pool.ready


def test_a_wrong_default_gets_no_second_chance(pool):
    ended = []
    (worker,) = pool.devices
    pool._hear_measurer(worker, ITEM, Result("wrong", "off by 1"), lambda *told: ended.append(told))
    assert [found.outcome for _, found in ended] == ["wrong"]


def test_a_default_that_compiles_too_long_is_compiled_again_with_more_time(pool):
    ended = []
    (compiler,) = pool.compilers
    pool._hear_compiler(compiler, ITEM, Result("timeout", "killed after 9 s"), lambda *told: ended.append(told))
    assert not ended and list(pool._again) == [ITEM]
    pool._compile(compiler, ITEM, ITEM)
    assert compiler.limits == [27 + 30]
    pool._hear_compiler(compiler, ITEM, Result("timeout", "killed after 27 s"), lambda *told: ended.append(told))
    assert [found.outcome for _, found in ended] == ["timeout"]


def test_a_problem_that_failed_is_tried_again_when_its_run_is_resumed(calm):
    """Its default was too late, as on a busy machine. What was wrong is known, and so are other problems' winners."""
    mine = options(calm)
    run = journal.Run.create(mine.runs, "cpu", {"fingerprint": tune.fingerprint(PROBLEMS[:2], host(), mine)})
    run.append(journal.WINNERS, vars(tuned(why="no valid candidate: 1 timeout")))
    run.append(journal.WINNERS, vars(Tuned(PROBLEMS[1].to_dict(), True, {"ok": 1}, **WON)))
    for problem in PROBLEMS[:2]:
        for outcome in ("timeout", "crash", "wrong"):
            row = {"problem": problem.key, "family": FAMILY.name, "config": dict(DEFAULT), "outcome": outcome}
            row |= {"reason": "", "seconds": None, "spread": None, "samples": 0, "error": None}
            run.append(journal.TRIALS, row)
    found = tune._Tuner(run, host(), mine, None, progress.Progress(), None)
    run.close()
    assert list(found.finished) == [PROBLEMS[1].key]
    assert [row["outcome"] for row in found.rows if row["problem"] == PROBLEM.key] == ["wrong"]
    assert len([row for row in found.rows if row["problem"] == PROBLEMS[1].key]) == 3


# ---- what is said ---------------------------------------------------------------------------------------------------


def tuned(**facts) -> Tuned:
    return Tuned(PROBLEM.to_dict(), True, {"ok": 3}, **facts)


WON = {"config": {"style": "plain", "variant": 2}, "seconds": 1.0, "default_config": dict(DEFAULT), "why": "because"}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (WON | {"default_seconds": 2.0}, "2.00x the default"),
        (WON | {"config": dict(DEFAULT), "default_seconds": 1.0}, "the default itself"),
        (WON | {"default_seconds": 0.98}, "0.98x the default, a tie within the noise"),
        (WON | {"default_seconds": 1.001}, "1.00x the default, a tie within the noise"),
        (WON | {"default_seconds": None}, "the default was not timed"),
    ],
)
def test_the_winners_line_leaves_nothing_unexplained(capsys, facts, words):
    found = tuned(**facts)
    progress.Lines().done(found)
    assert f", {words} (because)" in capsys.readouterr().err
    table = progress.table(Report(Path("run"), host(), [found]))
    plain = words == "2.00x the default"
    assert ("2.00x" if plain else words) in table and "0.98x " not in table.replace(words, "")


def test_the_winners_line_tells_the_state_and_a_faster_pytorch(capsys):
    state = {"clock_mhz": 1410.0, "clock_max_mhz": 1980.0, "power_w": 699.0, "power_limit_w": 700.0, "temp_c": 61.0}
    found = tuned(**WON, default_seconds=2.0, torch_seconds=0.9, device={**state, "throttle": ["power_cap"]})
    progress.Lines().done(found)
    said = capsys.readouterr().err
    assert "state    1410 of 1980 MHz, 699 of 700 W, 61 C, power_cap, hot and sustained" in said
    assert "PyTorch is faster: 900 ms against 1000 ms" in said
    progress.Lines().done(tuned(**WON, default_seconds=2.0, torch_seconds=0.999, spread=0.01))
    assert "PyTorch" not in capsys.readouterr().err


def report_of(*found: Tuned, **facts) -> Report:
    return Report(Path("/state/run-1"), host(), list(found), **facts)


def test_a_run_that_saved_winners_ends_well_and_says_what_failed():
    good, bad = tuned(**WON, default_seconds=2.0), tuned(why="no valid candidate: 1 timeout; timeout: no answer")
    assert report_of(good, bad).exit_code == 0
    assert report_of(bad, bad).exit_code == 3
    assert report_of().exit_code == 0
    assert report_of(good, bad, interrupted=True).exit_code == 130
    assert report_of(good, bad).to_dict()["failed"] == [PROBLEM.key]
    said = progress.closing(report_of(good, bad), "fagen tune --resume /state/run-1")
    assert f"no winner  {PROBLEM.key}: no valid candidate: 1 timeout" in said
    assert "go on with what is missing:  fagen tune --resume /state/run-1" in said
    assert progress.closing(report_of(good)) == ""


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("tune", "tune"),
        ("tune --resume --budget 10", "tune --budget 10"),
        ("tune --resume old --budget 10", "tune --budget 10"),
        ("tune --resume=old --json", "tune --json"),
        ("tune --storage postgresql://me:secret@host/x", "tune --storage URL"),
        ("tune --storage=postgresql://me:secret@host/x?password=y --cold", "tune --storage=URL --cold"),
    ],
)
def test_the_command_that_resumes(words, command):
    from fagen.cli.commands import tune

    assert tune.resuming(words.split(), Path("/a run")) == f"fagen {command} --resume '/a run'"


@pytest.mark.parametrize(
    ("target", "average", "others", "state", "words"),
    [
        (host(), 1.0, 0, {}, ""),
        (host(), 9.0, 2, {}, "load 9.0 on 2 cores"),
        (GPU, 1.0, 0, {"clock_mhz": 345, "clock_max_mhz": 1980, "throttle": []}, ""),
        (GPU, 1.0, 1, {}, "1 other process on the GPU"),
        (GPU, 9.0, 2, {"throttle": ["thermal"]}, "load 9.0 on 2 cores; 2 other processes on the GPU; GPU at a lowered"),
        (GPU, 1.0, 0, {"clock_mhz": 900, "clock_max_mhz": 1980, "throttle": ["power_cap"]}, "GPU at 900 of 1980 MHz, "),
    ],
)
def test_what_is_off_with_the_machine(monkeypatch, target: Target, average, others, state, words):
    monkeypatch.setattr(load, "average", lambda: average)
    monkeypatch.setattr(load, "cores", lambda: 2)
    monkeypatch.setattr(nvml, "others", lambda index: others if index == 1 else 99)
    monkeypatch.setattr(nvml, "of", lambda index: state)
    monkeypatch.setattr(nvml, "current_index", lambda: 1)
    said = load.note(target)
    assert said == load.note(target, 1)
    assert words in said and bool(said) == bool(words) and "\n" not in said


def test_under_load_a_power_limit_is_no_news():
    hot = {"clock_mhz": 1410.0, "clock_max_mhz": 1980.0, "throttle": ["power_cap"]}
    assert load.throttled(hot, under_load=True) == ""
    assert load.throttled(hot, under_load=False) == "GPU at 1410 of 1980 MHz, power_cap"
    assert load.throttled({**hot, "throttle": ["thermal", "power_cap"]}, under_load=True).endswith("MHz, thermal")
    assert load.throttled({**hot, "throttle": []}, under_load=True) == "GPU at 1410 of 1980 MHz", "set so by its owner"
    assert load.throttled({**hot, "throttle": []}, under_load=False) == ""
    assert load.throttled({}, under_load=True) == "" and load.described({}) == ""


# ---- from Python ----------------------------------------------------------------------------------------------------


def test_tuning_from_python(served, capsys):
    report = fagen.tune(PROBLEM, trials=3, target=host(), quiet=True)
    (record,) = report.records
    assert record.problem == PROBLEM and record.seconds > 0
    assert report.results[0].config == record.config
    assert [r.key for r in store.Database.load().records] == [PROBLEM.key]
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="is no time"):
        fagen.tune([PROBLEM], budget="soon")
    with pytest.raises(UsageError, match="nothing to tune"):
        fagen.tune([])
    with pytest.raises(UsageError, match="no problem"):
        fagen.tune(["d128"])


def test_tuning_from_python_hands_its_options_on(monkeypatch, folders):
    asked: list[tuple] = []
    monkeypatch.setattr(tune, "run", lambda *words: asked.append(words) or report_of())
    fagen.tune(
        [PROBLEM], budget="2m", target=host(), out=str(folders), family=FAMILY.name, gpus=(0, 1), resume="latest"
    )
    fagen.tune(iter([PROBLEM, PROBLEM]), budget=7, target=host())
    fagen.tune([PROBLEM], target=host())
    (first, target, given, heard), second, third = asked
    assert first == [PROBLEM] and target == host() and isinstance(heard, progress.Progress)
    assert (given.budget, given.out, given.family, given.devices) == (120.0, folders, FAMILY.name, (0, 1))
    assert given.resume == "latest" and given.begun
    assert second[0] == [PROBLEM] and second[2].budget == 7.0 and second[2].trials is None
    assert third[2].budget == budget.BUDGET_SECONDS
