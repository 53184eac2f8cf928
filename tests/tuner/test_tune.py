"""The tuner on real processes: candidates that crash, hang and lie, runs that are killed, winners that are used."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fagen import families
from fagen.build.job import Artifact
from fagen.cli.main import main
from fagen.codegen.spec import KernelSpec
from fagen.db import merge, store
from fagen.db.record import Record
from fagen.dispatch import resolve
from fagen.errors import FagenError, UsageError
from fagen.families import Config, Family, Knob
from fagen.families.space import enumerate_space
from fagen.ops.attention import suite
from fagen.ops.attention.forward_calls import check_problems
from fagen.ops.attention.inputs import make_inputs
from fagen.ops.attention.problem import Problem
from fagen.target import host, known
from fagen.timing import load
from fagen.timing.timer import Timing
from fagen.tuner import budget, evaluate, journal, progress, result, tune, workers
from fagen.tuner.messages import MeasureRequest, Result
from fagen.tuner.pool import Pool
from fagen.tuner.result import Options, Tuned
from fagen.tuner.search import Search, open_storage
from tests.support import runs
from tests.support.fake_family import ENDS, FAMILY, PROBLEM, misbehave
from tests.support.runs import rows


def options(folder: Path, **changes) -> Options:
    return Options(**{"trials": 50, "runs": folder / "runs", "run_timeout": 60.0, "workers": 2, **changes})


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_candidate_ends_in_one_outcome_and_the_fastest_right_one_wins(fake, capsys, monkeypatch):
    monkeypatch.setattr(load, "MOST", 2.0)  # a busy machine shall not wait long for the one that hangs
    report = tune.run([PROBLEM], host(), options(fake, run_timeout=runs.patient(5.0)), progress.Lines())
    ended = {(r["config"]["style"], r["config"]["variant"]): r["outcome"] for r in rows(report.run)}
    assert len(ended) == len(rows(report.run)) == 6 + len(ENDS)  # 3 variants of the 2 right styles, one of each other
    reasons = {r["config"]["style"]: r["reason"] for r in rows(report.run)}
    for style, (outcome, word) in ENDS.items():
        assert ended[style, 1] == outcome
        assert word in reasons[style]
    assert {outcome for (style, _), outcome in ended.items() if style in ("plain", "slow")} == {"ok"}
    assert all(r["reason"] for r in rows(report.run) if r["outcome"] != "ok")
    assert all(r["source_hash"] and r["seconds"] > 0 for r in rows(report.run) if r["outcome"] == "ok")

    (tuned,) = report.results
    assert tuned.config["style"] == "plain"
    assert tuned.default_config == {"style": "slow", "variant": 1}
    assert tuned.speedup > 1.5
    assert tuned.torch_seconds > 0
    assert tuned.torch_mode == "is_causal"
    assert 0 < tuned.error < 1e-4
    assert report.exit_code == 0

    (record,) = store.Database.load().records
    assert record.problem == PROBLEM
    assert record.config == tuned.config
    assert record.environment["torch"]
    assert report.written == [store.path_of(fake / "db", "cpu", host().device)]
    said = capsys.readouterr()
    assert said.out == ""
    assert "SIGSEGV" in said.err
    table = progress.table(report)
    assert PROBLEM.key in table
    assert "winner   style=plain" in table
    assert "default  style=slow variant=1" in table
    assert "from fagen import attention" in progress.closing(report)


def test_the_incumbent_is_tried_and_kept_when_nothing_beats_it(calm):
    best = {"style": "plain", "variant": 2}
    merge.put([Record(PROBLEM, "cpu", host().device, FAMILY.name, best, 1.0, 0.0, 1.0, 0.0, "0a54")])
    report = tune.run([PROBLEM], host(), options(calm, trials=3))
    assert best in [r["config"] for r in rows(report.run)]
    assert report.results[0].config["style"] == "plain"
    assert report.results[0].incumbent_seconds > 0


@pytest.mark.slow
def test_a_killed_worker_costs_one_candidate(calm, monkeypatch):
    """Killed at rest it costs none; with a candidate in hand, that one."""
    send, killed = workers.Worker.send, []

    def deadly(worker, request, seconds, job=None):
        lives = worker._process is not None and worker._process.is_alive() and worker._ready
        chosen = lives and isinstance(request, MeasureRequest) and request.spec.config.style == "plain"
        if killed or not chosen:
            return send(worker, request, seconds, job)
        killed.append(request.spec.config)
        os.kill(worker.pid, signal.SIGSTOP)  # it shall not answer before it dies
        send(worker, request, seconds, job)
        os.kill(worker.pid, signal.SIGKILL)

    monkeypatch.setattr(workers.Worker, "send", deadly)

    class Killer(progress.Progress):
        def problem(self, problem, place, search, pool):
            self.pool = pool

        def candidate(self, item, result, search):
            if len(search.seen) == 1:
                (worker,) = self.pool.devices
                os.kill(worker.pid, signal.SIGKILL)
                worker._process.join(30)

    report = tune.run([PROBLEM], host(), options(calm), Killer())
    ended = {Config(r["config"]): (r["outcome"], r["reason"]) for r in rows(report.run)}
    assert len(ended) == len(rows(report.run)) == 8
    assert ended[killed[0]] == ("crash", "the worker died: SIGKILL")
    assert [outcome for outcome, _ in ended.values()].count("crash") == 1
    assert report.results[0].config["style"] == "plain"


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_repeats_nothing(calm):
    """Killed before the first trial, among the trials, in the final round; then it ends, with all it found."""
    kept: list[dict] = []
    below: list[int] = []
    moments = {
        "it compiles": lambda said: "space " in said,
        "it measures": lambda said: len(rows(calm / "runs")) >= 3,
        "the final round": lambda said: "final round" in said,
    }
    for moment in moments.values():
        child = runs.begin(calm, resume="latest")
        said = Tail(child)
        runs.until(lambda: moment(said()), child)  # noqa: B023
        below += workers._descendants(child.pid)
        runs.end(child)
        assert rows(calm / "runs")[: len(kept)] == kept
        kept = rows(calm / "runs")
        (run,) = (calm / "runs").iterdir()
        with open(run / journal.TRIALS, "ab") as file:
            file.write(b'{"problem": "torn')  # as if it had died writing
    assert len(kept) == 8
    assert not list(journal.read_lines(run / journal.WINNERS))
    report = tune.run([PROBLEM], host(), options(calm, resume="latest"))
    assert report.run == run
    assert rows(run) == kept
    assert len({Config(r["config"]) for r in kept}) == 8
    assert report.results[0].config["style"] == "plain"
    assert below
    runs.until(lambda: not any(runs.running(pid) for pid in below))

    again = tune.run([PROBLEM], host(), options(calm, resume="latest"))  # a finished run has nothing left to do
    assert rows(run) == kept
    assert again.results == report.results
    assert len(store.Database.load([calm / "db"]).records) == 1


def test_a_winner_is_in_the_database_before_its_problem_counts_as_done(calm, monkeypatch):
    def killed(*words):
        raise KeyboardInterrupt

    won = Tuned(PROBLEM.to_dict(), True, {"ok": 1}, "fake_forward", {"style": "plain", "variant": 1}, 1.0)
    record = Record(PROBLEM, "cpu", host().device, FAMILY.name, won.config, 1.0, 0.0, 1.0, 0.0, "0a54")
    monkeypatch.setattr(tune._Tuner, "tune_problem", lambda *words: (won, record))
    monkeypatch.setattr(merge, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        tune.run([PROBLEM], host(), options(calm, trials=1))
    monkeypatch.undo()
    (run,) = (calm / "runs").iterdir()
    assert not list(journal.read_lines(run / journal.WINNERS))


class Tail:
    """What a process has said so far."""

    def __init__(self, child):
        self.child, self.text = child, ""
        os.set_blocking(child.stderr.fileno(), False)

    def __call__(self) -> str:
        self.text += (self.child.stderr.read() or b"").decode()
        return self.text


def start_run(folder: Path) -> tuple[subprocess.Popen, Path]:
    """A run in its own process, with some candidates done."""
    child = runs.begin(folder)
    runs.until(lambda: sum(r["outcome"] == "ok" for r in rows(folder / "runs")) >= 2, child)
    (run,) = (folder / "runs").iterdir()
    return child, run


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_was_found(calm, number):
    child, run = start_run(calm)
    os.kill(child.pid, number)
    _, said = child.communicate(timeout=runs.PATIENCE)
    assert child.returncode == 130, said.decode()
    (winner,) = journal.read_lines(run / journal.WINNERS)
    assert winner["config"] in [r["config"] for r in rows(run) if r["outcome"] == "ok"]
    assert not winner["complete"]
    assert len(store.Database.load([calm / "db"]).records) == 1
    assert number.name in said.decode()


@pytest.mark.parametrize(("how", "ends"), [('trap "" HUP; exec "$@"', False), ('exec "$@"', True)])
def test_a_lost_terminal_ends_a_run_unless_it_is_ignored(how, ends):
    """As nohup starts it."""
    code = """
import os, signal
from fagen.tuner import evaluate, progress, tune
with tune._signals(progress.Progress()) as event:
    os.kill(os.getpid(), signal.SIGHUP)
    hung_up = event.is_set()
    os.kill(os.getpid(), signal.SIGTERM) if not hung_up else None
    print(hung_up, event.is_set())
"""
    command = ["sh", "-c", how, "sh", sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def heeded() -> None:  # even if these tests run under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    done = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=heeded)
    assert done.stdout.split() == [str(ends), "True"], done.stderr


def test_only_failures_is_no_valid_candidate(fake, monkeypatch):
    styles = Knob("style", "kStyle", ("broken", "segfault", "wrong"), "none is of use")
    default = Config({"style": "wrong", "variant": 1})
    bad = dataclasses.replace(FAMILY, knobs=(styles, FAMILY.knobs[1]), default=lambda p, t: default)
    monkeypatch.setattr(families, "all_families", lambda: (bad,))
    report = tune.run([PROBLEM], host(), options(fake))
    assert report.exit_code == 3
    why = report.results[0].why
    assert "no valid candidate: 1 compile, 1 wrong, 1 crash; wrong: " in why
    assert "error" in why
    assert report.written == []
    assert store.Database.load().records == []


@pytest.mark.slow
def test_a_small_share_leaves_the_incumbent_its_chance(calm, monkeypatch):
    """And no problem starves because those before it held their final rounds."""
    monkeypatch.setattr(budget.Budget, "each", lambda self, problems: 0.01)
    best = {"style": "plain", "variant": 3}
    problems = [PROBLEM, PROBLEM.replace(seqlen_q=96), PROBLEM.replace(seqlen_q=80)]
    merge.put([Record(p, "cpu", host().device, FAMILY.name, best, 1.0, 0.0, 1.0, 0.0, "0a54") for p in problems])
    report = tune.run(problems, host(), options(calm, trials=None, budget=3600))
    assert len(report.results) == 3 and all(tuned.incumbent_seconds for tuned in report.results)
    assert all(best in [r["config"] for r in rows(report.run) if r["problem"] == p.key] for p in problems)
    assert len(rows(report.run)) < 24, "no more than was under way"


def test_a_budget_ends_the_search(calm, monkeypatch):
    """A budget too short is raised to what one problem needs, so the end of its share is set here."""
    monkeypatch.setattr(budget.Budget, "each", lambda self, problems: 0.0)
    report = tune.run([PROBLEM], host(), options(calm, trials=None, budget=3600))
    (measured,) = [r for r in rows(report.run) if r["outcome"] != "compile"]
    assert measured["config"] == dict(FAMILY.default(PROBLEM, host()))
    assert report.results[0].default_seconds is not None


def test_the_default_is_measured_first_whichever_is_built_first(fake):
    default = FAMILY.default(PROBLEM, host())
    built = Result("ok", artifact=Artifact(fake / "kernel.so", "key", "0a54"))
    with Pool(
        host(), fake / "log", workers=1, seed=0, compile_timeout=60, run_timeout=2
    ) as pool:  # fmt: skip
        ranks = {default: 0, default.replace(variant=4): 1}  # the second: an incumbent
        pool._rank = lambda config: ranks.get(config, 2)
        pool._replies = lambda workers: [(pool.compilers[0], built)]
        for variant in (2, 4, 1, 3):
            pool.compilers[0].job = KernelSpec(FAMILY, PROBLEM, host(), default.replace(variant=variant))
            pool._collect(lambda *told: None)
        assert [item.config.variant for item, _ in pool.ready] == [1, 4, 2, 3]


def test_tune_record_dispatch_on_the_real_cpu_family(folders, capsys):
    import torch

    from fagen.dispatch import choose
    from fagen.ops.attention import reference
    from fagen.runtime import kernel

    flags = "--target cpu --dtype fp32 --head-dim 32 --mask causal --seqlen 96 --heads 2 --trials 3 --json"
    assert main(["tune", *flags.split()]) == 0
    told = json.loads(capsys.readouterr().out)
    (tuned,) = told["results"]
    assert sum(tuned["outcomes"].values()) >= 3
    problem = Problem.from_dict(tuned["problem"])
    choice = choose.choose(problem, host(), ours=True)  # PyTorch may have been faster
    assert (choice.kind, choice.provenance) == ("family", "exact")
    assert dict(choice.config) == tuned["config"]
    near = problem.replace(seqlen_q=50, seqlen_k=50)
    assert choose.choose(near, host(), ours=True).provenance == "nearest"
    built = kernel.get(choice.spec)
    inputs = make_inputs(problem, host())
    outputs = {"out": inputs.outputs["out"]}
    built.launch(inputs.call, outputs)
    assert torch.isfinite(outputs["out"]).all()
    assert reference.check(inputs.call, outputs)


@pytest.mark.slow
def test_live_calls_pick_up_a_new_winner(calm, monkeypatch):
    """The op remembers its kernels; what is tuned in the same process makes it look again."""
    import torch

    import fagen
    from fagen import api

    q = torch.randn(1, 192, 2, 16)
    k = torch.randn(1, 192, 1, 16)
    asked = []
    assert api._ops_registered()
    answer = resolve.answer
    monkeypatch.setattr(resolve, "answer", lambda *p, **how: asked.append(answer(*p, **how)) or asked[-1])
    for _ in range(2):
        fagen.attention(q, k, k, causal=True, return_lse=True)  # or PyTorch would be asked, which is faster
    assert [found.kernel.spec.config.style for found in asked] == ["slow"]
    for attempt in range(4):  # on a busy machine the default may win by chance
        tune.run([PROBLEM], host(), options(calm, trials=9))
        fagen.attention(q, k, k, causal=True, return_lse=True)
        assert len(asked) == attempt + 2
        if asked[-1].kernel.spec.config.style == "plain":
            break
    assert asked[-1].kernel.spec.config.style == "plain"
    resolve.forget()


# ---- the command ----------------------------------------------------------------------------------------------------


def test_dry_run_runs_nothing(fake, capsys):
    flags = ["--target", "cpu", "--dtype", "fp32", "--head-dim", "16", "--mask", "causal"]
    assert main(["tune", *flags, "--dry-run", "--json"]) == 0
    (space,) = json.loads(capsys.readouterr().out)["spaces"]
    assert (space["total"], space["legal"], space["removed"]) == (30, 14, {"alone": 16})
    assert main(["tune", *flags, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "14 of 30" in said.err
    assert not (fake / "state").exists()


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--budget", "soon"], 2, "no time"),
        (["--trials", "0"], 2, "no positive number"),
        (["--dtype", "fp64"], 2, "fp64"),
        (["--target", "sm_90"], 4, "sm_90"),
        (["--family", "cpu_sideways"], 2, "unknown family 'cpu_sideways'"),
        (["--family", "sm80_forward"], 1, "sm80_forward: needs a GPU"),
        (["--resume", "/nowhere"], 2, "no run of fagen tune"),
        (["--storage", "nonsense"], 2, "no URL of a database"),
        (["--gpus", "all"], 2, "drop one of them"),
    ],
)
def test_what_cannot_be_done_is_said(folders, capsys, flags, code, said, monkeypatch):
    import fagen.target

    monkeypatch.setattr(fagen.target, "gpu", lambda index=0: None)
    words = flags if "--target" in flags else ["--target", "cpu", *flags]
    try:
        got = main(["tune", *words])
    except SystemExit as stop:
        got = stop.code
    assert got == code
    assert said in capsys.readouterr().err


def test_suites_are_served():
    for target in (host(), known("sm_90")):
        problems = suite.default(target)
        assert len(problems) == len(set(problems)) >= 5
        for problem in problems:
            assert families.candidates(problem, target)[0]


# ---- the search -----------------------------------------------------------------------------------------------------


def make_search(folder: Path, **changes) -> Search:
    space = enumerate_space(FAMILY, PROBLEM, host())
    first = [FAMILY.default(PROBLEM, host())]
    wanted = {"seed": 0, "first": first, "limit": None, "exhaustive": False, **changes}
    return Search(space, open_storage(str(folder / "study")), **wanted)


@pytest.mark.parametrize("exhaustive", [True, False])
def test_a_search_hands_out_each_legal_config_once(tmp_path, exhaustive):
    search = make_search(tmp_path, exhaustive=exhaustive)
    found = []
    while (config := search.next()) is not None:
        found.append(config)
        search.tell(config, 1.0 if config.style == "plain" else None, "failed")
    assert found[0] == FAMILY.default(PROBLEM, host())
    assert len(found) == len(set(found)) == 14
    assert set(found) == set(search.space.legal)
    assert all(name == "alone" for name, _ in search.rejected.values())
    values = [t.value for t in search._study.trials if t.params["style"] == "plain" and t.value is not None]
    assert values
    states = {t.state.name for t in search._study.trials}
    assert states == {"COMPLETE", "PRUNED"}


def test_optuna_itself_can_open_the_study(tmp_path):
    import optuna

    search = make_search(tmp_path, limit=4)
    while (config := search.next()) is not None:
        search.tell(config, 1.0)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study")))
    (loaded,) = optuna.get_all_study_summaries(storage)
    assert loaded.study_name == f"fake_forward:{PROBLEM.key}"
    assert optuna.load_study(study_name=loaded.study_name, storage=storage).best_value == 1.0


def test_many_in_flight_at_once(tmp_path):
    search = make_search(tmp_path)
    flying = [search.next() for _ in range(14)]
    assert len(set(flying)) == 14
    assert search.next() is None
    for config in flying:
        search.tell(config, 1.0)
    assert all(t.state.is_finished() for t in search._study.trials)


def test_known_candidates_count_and_are_not_repeated(tmp_path):
    search = make_search(tmp_path, limit=5)
    for config in search.space.legal[:3]:
        search.known(config, 2.0)
    assert search.best == 2.0
    found = [search.next(), search.next()]
    assert search.next() is None
    assert not set(found) & set(search.space.legal[:3])


def test_the_sampler_beats_chance(tmp_path):
    """On a smooth space of 3456 configs, 60 candidates: the median of some seeds is better than random's."""
    knobs = tuple(Knob(f"k{i}", f"kK{i}", (0, 1, 2, 3, 4, 5) if i < 3 else (0, 1), "x") for i in range(7))
    easy = Family(
        "easy", "", "forward", ("fp32",), knobs, (), lambda p, t: None, lambda p, t, c: {}, lambda p, t: Config({})
    )
    space = enumerate_space(easy, PROBLEM, host())

    def cost(config: Config) -> float:
        return 1.0 + sum(abs(value - (2 if index < 3 else 1)) for index, value in enumerate(config.values()))

    ours, chance = [], []
    for seed in range(5):
        storage = open_storage(str(tmp_path / f"study{seed}"))
        search = Search(space, storage, seed=seed, first=[], limit=60, exhaustive=False)
        while (config := search.next()) is not None:
            search.tell(config, cost(config))
        ours.append(search.best)
        chance.append(min(cost(c) for c in random.Random(seed).sample(space.legal, 60)))
    assert sorted(ours)[2] < sorted(chance)[2]
    assert sorted(ours)[2] <= 2.0


# ---- winners --------------------------------------------------------------------------------------------------------


def finalists(*names: str) -> dict[str, KernelSpec]:
    found = {}
    for index, name in enumerate(names):
        config = Config({"style": "plain", "variant": 3 - index % 3})
        found[name] = KernelSpec(FAMILY, PROBLEM, host(), config)
    return found


def quiet(seconds: float) -> Timing:
    return Timing(seconds, seconds / 1000, 30)


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"default": 1.0, "#1": 0.8}, "#1"),
        ({"default": 1.0, "#1": 0.998}, "default"),
        ({"default": 1.0, "incumbent": 0.8, "#1": 0.799}, "incumbent"),
        ({"default": 0.8, "incumbent": 1.0, "#1": 0.799}, "default"),
        ({"default": 1.0, "incumbent": 0.8, "#1": 0.6}, "#1"),
        ({"#1": 1.0}, "#1"),
        ({"default": 1.0, "#1": 0.5, "#2": 0.501}, "#2"),  # a tie: fewer resources
        ({"default": 1.0, "#1": 0.5, "#2": 0.6}, "#1"),
    ],
)
def test_who_wins(monkeypatch, times, winner):
    monkeypatch.setattr(families, "all_families", lambda: (FAMILY,))
    timings = {name: quiet(seconds) for name, seconds in times.items()}
    timings["torch"] = quiet(0.1)
    assert result.choose(timings, finalists(*times))[0] == winner


def test_noise_wins_nothing(monkeypatch):
    monkeypatch.setattr(families, "all_families", lambda: (FAMILY,))
    timings = {"default": Timing(1.0, 0.3, 30), "#1": Timing(0.9, 0.3, 30)}
    assert result.choose(timings, finalists(*timings))[0] == "default"


def test_check_sizes_keep_the_static_key():
    for mask in ("none", "causal", "window"):
        problem = Problem(
            dtype="bf16", mask=mask, heads=32, kv_heads=4, seqlen_q=9000, window_left=5 if mask == "window" else -1
        )
        found = check_problems(problem, host())
        assert {p.static_key for p in found} == {problem.static_key}
        assert any(p.seqlen_q > p.seqlen_k for p in found)
        assert max(p.seqlen_q for p in found) <= 512
        assert found[-1].heads // found[-1].kv_heads == 4


# ---- the run's folder -----------------------------------------------------------------------------------------------


def test_a_torn_line_is_cut_before_the_next_is_written(tmp_path):
    run = journal.Run.create(tmp_path, "cpu", {"fingerprint": "f"})
    run.append(journal.TRIALS, {"a": 1})
    run.close()
    with open(run.path / journal.TRIALS, "ab") as file:
        file.write(b'{"a": 2')
    assert [r["a"] for r in journal.read_lines(run.path / journal.TRIALS)] == [1]
    again = journal.Run.open(run.path, "f")
    again.append(journal.TRIALS, {"a": 3})
    assert [r["a"] for r in again.rows(journal.TRIALS)] == [1, 3]
    with pytest.raises(FagenError, match="belongs to another process"):
        journal.Run.open(run.path, "f")
    again.close()


def test_a_run_of_other_sources_is_not_resumed(tmp_path):
    run = journal.Run.create(tmp_path, "cpu", {"fingerprint": "old"})
    run.close()
    assert journal.latest(tmp_path, "old") == run.path
    assert journal.latest(tmp_path, "new") is None
    with pytest.raises(UsageError, match="other kernel sources"):
        journal.Run.open(run.path, "new")


def test_tuned_survives_the_journal():
    tuned = Tuned(PROBLEM.to_dict(), True, {"ok": 1}, seconds=1.0, default_seconds=2.0)
    assert tuned.key == PROBLEM.key
    assert tuned.speedup == 2.0


# ---- workers --------------------------------------------------------------------------------------------------------


def ask(worker: workers.Worker, request, seconds: float):
    worker.send(request, seconds)
    found = []
    runs.until(lambda: (reply := worker.poll()) is not None and not found.append(reply))
    return found[0]


def test_workers_may_die(tmp_path):
    worker = workers.Worker(misbehave, tmp_path / "log")
    try:
        assert ask(worker, "echo", runs.PATIENCE) == "echo"
        assert isinstance(ask(worker, "raise", runs.PATIENCE), ValueError)
        died = ask(worker, "segv", runs.PATIENCE)
        assert (died.timed_out, "SIGSEGV" in died.reason) == (False, True)
        assert "exit code 7" in ask(worker, "exit", runs.PATIENCE).reason
        assert ask(worker, "sleep", 0.5).timed_out
        assert ask(worker, "echo", runs.PATIENCE) == "echo"
        dead = worker.pid
        os.kill(dead, signal.SIGKILL)
        runs.until(lambda: not worker._process.is_alive())  # all of its threads, not the first alone
        assert ask(worker, "echo", runs.PATIENCE) == "echo"  # it died at rest, so the next request is not blamed
        assert "said on stdout" in (tmp_path / "log").read_text()
    finally:
        worker.kill()
    assert worker.pid is None


# ---- several GPUs, by name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "target", "said"),
    [
        ("0,x", None, "cannot be read"),
        ("0,²", None, "cannot be read"),
        ("٣", None, "cannot be read"),
        ("9" * 5000, None, "cannot be read"),
        ("0,7", None, "no GPU 7"),
        ("all", "gpu:1", "drop one of them"),
        ("all", "cpu", "drop one of them"),
        ("all", None, "different kinds"),
        ("0,2", None, (0, 2)),
        ("1", "gpu", (1,)),
    ],
)
def test_the_gpus_of_a_run(monkeypatch, words, target, said):
    import fagen.target
    from fagen.cli.commands import tune

    kinds = ["sm_90", "sm_80", "sm_90"]
    monkeypatch.setattr(fagen.target, "count", lambda: len(kinds))
    monkeypatch.setattr(fagen.target, "gpu", lambda i=0: known(kinds[i]) if i < len(kinds) else None)
    if isinstance(said, tuple):
        assert tune.gpus(words, target) == said
        return
    with pytest.raises(FagenError, match=said):
        tune.gpus(words, target)


def test_a_spill_in_any_kernel_of_a_library_is_refused():
    main, small = {"registers": 168, "spill_bytes": 0}, {"registers": 32, "spill_bytes": 0}
    both = {"forward_kernel": main, "plan_kernel": small}
    assert evaluate.refused_facts({**main, "functions": both}) == ""
    assert evaluate.refused_facts({}) == "", "of a CPU's compiler nothing is known"
    both["plan_kernel"] = small | {"spill_bytes": evaluate.SPILL_TOLERANCE + 1}
    assert evaluate.refused_facts({**main, "functions": both}) == "plan_kernel: 65 bytes spilled at 32 registers"
    both["plan_kernel"] = small | {"spill_bytes": evaluate.SPILL_TOLERANCE}
    assert evaluate.refused_facts({**main, "functions": both}) == ""
    assert "serialized" in evaluate.refused_facts({**main, "serialized": 1})
