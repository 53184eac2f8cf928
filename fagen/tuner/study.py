"""`tune`: search for each problem, a final round among the best, and the winners to the database."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fagen import binding, db, env, families
from fagen.errors import FagenError, UnsupportedProblem, UsageError
from fagen.families import Config, Family
from fagen.measure import Timing
from fagen.problem import Problem
from fagen.space import Fixed, Space, enumerate_space
from fagen.target import Target
from fagen.tuner import journal
from fagen.tuner.candidate import OUTCOMES, TORCH, Candidate, Final, Result
from fagen.tuner.journal import Run
from fagen.tuner.pool import Pool
from fagen.tuner.progress import Progress
from fagen.tuner.result import DEFAULT, INCUMBENT, Options, Report, Tuned, choose
from fagen.tuner.search import Search, open_storage, portion
from fagen.tuner.workers import compile_workers

SEARCH_SHARE = 0.85  # of a problem's time; the rest is for the final round
FINALISTS = 4  # beside the default and the incumbent
FINAL_SECONDS = 3.0
NEIGHBOURS = 3


def spaces(problem: Problem, target: Target, only: str | None = None, fixed: Fixed | None = None) -> list[Space]:
    """The search spaces of all families that can serve the problem, or of one by name; some knobs may be restricted."""
    able, reasons = families.candidates(problem, target)
    if only is not None:
        able = [family for family in able if family.name == families.get(only).name]
    if not able:
        first = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UnsupportedProblem(f"no family can serve {problem.static_key} on {target.arch}", first)
    found = [enumerate_space(family, problem, target, fixed) for family in able]
    if not any(space.legal for space in found):
        removed = {name: count for space in found for name, count in space.removed.items() if count}
        numbers = ", ".join(f"{name} removes {count}" for name, count in removed.items())
        raise UsageError(f"no config of {problem.static_key} is legal with these --fix", numbers, "fix fewer knobs")
    return [space.with_default() for space in found if space.legal]


def fingerprint(problems: Sequence[Problem], target: Target, options: Options) -> str:
    """What a run must share with this one to be resumed: problems, device, knobs, kernel sources, kind of search."""
    digest = hashlib.sha256()
    if options.fixed or options.exhaustive:
        digest.update(repr((sorted(options.fixed.items()), options.exhaustive)).encode())
    for problem in problems:
        for family in families.candidates(problem, target)[0]:
            if options.family not in (None, family.name):
                continue
            knobs = [(knob.name, knob.choices) for knob in family.knobs]
            digest.update(repr((problem.key, target.arch, target.device, family.name, knobs)).encode())
    return hashlib.sha256(digest.digest() + sources_hash().encode()).hexdigest()[:16]


def sources_hash() -> str:
    """Of all that kernels are made from."""
    digest, folder = hashlib.sha256(), env.data_dir("templates")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def tune(problems: Sequence[Problem], target: Target, options: Options, progress: Progress | None = None) -> Report:
    """Tune each problem and keep the winners. What a signal interrupts is kept, and can be resumed."""
    with contextlib.closing(progress or Progress()) as progress:
        for problem in problems:
            able = families.candidates(problem, target)[0]
            if options.fixed or not any(options.family in (None, family.name) for family in able):
                spaces(problem, target, options.family, options.fixed)  # raises the reasons, before anything runs
        with contextlib.closing(_open_run(problems, target, options, progress)) as run:
            return _tune(run, problems, target, options, progress)


def _tune(run: Run, problems: Sequence[Problem], target: Target, options: Options, progress: Progress) -> Report:
    workers = options.workers or compile_workers(target.is_gpu)
    pool = Pool(
        target, run.path / journal.LOG, workers=workers, seed=options.seed, device=options.device,
        compile_timeout=options.compile_timeout, run_timeout=options.run_timeout,
    )  # fmt: skip
    progress.start(target, workers, run.path)
    with pool, _signals(progress) as interrupted:
        return _Tuner(run, target, options, pool, progress, interrupted).all(problems)


def _open_run(problems: Sequence[Problem], target: Target, options: Options, progress: Progress) -> Run:
    runs, mark = options.runs or env.runs_dir(), fingerprint(problems, target, options)
    if options.resume is not None:
        path = journal.latest(runs, mark) if options.resume == "latest" else Path(options.resume)
        if path is not None:
            return Run.open(path, mark)
        progress.note("no earlier run of these problems and kernel sources; starting a new one")
    meta = {
        "fingerprint": mark,
        "problems": [problem.to_dict() for problem in problems],
        "target": dataclasses.asdict(target),
        "environment": db.environment(target),
        "sources": sources_hash(),
        "family": options.family,
        "fixed": options.fixed,
        "exhaustive": options.exhaustive,
        "seed": options.seed,
        "date": db.now(),
    }
    return Run.create(runs, f"{target.arch}-{mark[:8]}", meta)


@contextlib.contextmanager
def _signals(progress: Progress) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one raises."""
    event, before = threading.Event(), {}

    def handle(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        progress.note(f"{signal.Signals(number).name}: saving what was found; once more to stop at once")

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Known:
    """A candidate that was evaluated, now or in the run that is resumed."""

    item: Candidate
    outcome: str
    timing: Timing | None
    error: float
    reason: str = ""


class _Tuner:
    def __init__(
        self, run: Run, target: Target, options: Options, pool: Pool, progress: Progress, interrupted: threading.Event
    ) -> None:
        self.run, self.target, self.options = run, target, options
        self.pool, self.progress, self.interrupted = pool, progress, interrupted
        self.storage = open_storage(str(run.path / journal.STUDY))
        self.rows = [row for row in run.rows(journal.TRIALS) if row.get("outcome") in OUTCOMES]
        self.finished = {t.key: t for t in (Tuned(**row) for row in run.rows(journal.WINNERS)) if t.complete}
        self.environment = db.environment(target)
        self.started = time.monotonic()
        self.spaces: dict[str, list[Space]] = {}

    def all(self, problems: Sequence[Problem]) -> Report:
        report = Report(self.run.path, self.target)
        for index, problem in enumerate(problems):
            if problem.key in self.finished:
                report.results.append(self.finished[problem.key])
                continue
            if self.interrupted.is_set():
                break
            share = math.inf
            if self.options.budget is not None:
                left = self.options.budget - (time.monotonic() - self.started)
                share = max(0.0, left) / sum(p.key not in self.finished for p in problems[index:])
            tuned, record = self.one(problem, share, (index, len(problems)))
            report.results.append(tuned)
            self.run.append(journal.WINNERS, dataclasses.asdict(tuned))
            if record:
                written = db.put([record], self.options.out)
                binding.forget()  # live calls of this process find the new winner
                report.written = sorted({*report.written, *written})
            self.progress.done(tuned)
        report.interrupted = self.interrupted.is_set()
        return report

    # ---- one problem --------------------------------------------------------------------------------------------

    def one(self, problem: Problem, seconds: float, place: tuple[int, int]) -> tuple[Tuned, db.Record | None]:
        known: dict[Candidate, _Known] = {}
        found = self._spaces(problem)
        begin, incumbent, left = time.monotonic(), self._incumbent(problem), 0
        for turn, space in enumerate(found):
            search = self._search(space, seconds / len(found), known)
            deadline = begin + SEARCH_SHARE * seconds * portion(turn, len(found))
            self.progress.problem(problem, place, search, self.pool, deadline)
            self.pool.explore(search, deadline, functools.partial(self._done, search, known), self._over)
            left += len(search.space.legal) - len(search.seen)
        default = Candidate(found[0].family.name, problem, self.target, found[0].family.default(problem, self.target))
        outcomes = Counter(row["outcome"] for row in self.rows if row["problem"] == problem.key)
        whole = not self.interrupted.is_set() and not (self.options.exhaustive and left)
        tuned = Tuned(
            problem.to_dict(), whole, {name: outcomes[name] for name in OUTCOMES},
            default_config=dict(default.config),
        )  # fmt: skip
        record = self._final(tuned, known, default, incumbent)
        return tuned, record

    def _spaces(self, problem: Problem) -> list[Space]:
        """Counted in full once for each static key: constraints look at nothing else."""
        if problem.static_key not in self.spaces:
            self.spaces[problem.static_key] = spaces(problem, self.target, self.options.family, self.options.fixed)
        return [dataclasses.replace(space, problem=problem) for space in self.spaces[problem.static_key]]

    def _over(self) -> bool:
        self.progress.refresh()
        return self.interrupted.is_set()

    def _incumbent(self, problem: Problem) -> Candidate | None:
        """What the database has for exactly this problem, if it is still legal."""
        for record, provenance in self._database().candidates(problem, self.target):
            if provenance != "exact":
                return None
            config = _legal(record, problem, self.target)
            if config and self.options.family in (None, record.family):
                return Candidate(record.family, problem, self.target, config)
        return None

    def _database(self) -> db.Database:
        return db.Database.load((*db.default_paths(), *([self.options.out] if self.options.out else [])))

    def _search(self, space: Space, seconds: float, known: dict[Candidate, _Known]) -> Search:
        family, problem = space.family, space.problem
        records = [r for r, _ in self._database().candidates(problem, self.target) if r.family == family.name]
        winners = [(r, _legal(r, problem, self.target)) for r in records[: NEIGHBOURS + 1]]
        exact = [config for record, config in winners if config and record.key == problem.key]
        first = [family.default(problem, self.target), *exact, *family.seeds(problem, self.target)]
        first += [config for _, config in winners if config]
        first = first[:1] if self.options.cold else first
        room = self.options.trials if self.options.trials is not None else seconds  # a second a candidate, about
        rival = min((k.timing.median for k in known.values() if k.timing), default=math.inf)  # of other families
        search = Search(
            space, self.storage, seed=self.options.seed, first=first, limit=self.options.trials,
            exhaustive=self.options.exhaustive or len(space.legal) <= room, whole=self.options.exhaustive,
            sampler=self.options.sampler, rival=rival,
        )  # fmt: skip
        for row in self.rows:
            if row["problem"] == problem.key and row["family"] == family.name and row["outcome"] != "constraint":
                self._remember(search, row, known)
        return search

    def _remember(self, search: Search, row: dict[str, Any], known: dict[Candidate, _Known]) -> None:
        """A line of the run that is resumed."""
        config = search.space.family.config(row["config"])
        item = Candidate(row["family"], search.space.problem, self.target, config)
        timing = Timing(row["seconds"], row["spread"], row["samples"]) if row["outcome"] == "ok" else None
        known[item] = _Known(item, row["outcome"], timing, row["error"], row["reason"])
        search.known(config, timing.median if timing else None)

    def _done(self, search: Search, known: dict[Candidate, _Known], item: Candidate, result: Result) -> None:
        """A candidate's end: to the disk first, then to Optuna."""
        for config, (name, reason) in search.rejected.items():
            illegal = Candidate(item.family, item.problem, self.target, config)
            self._keep(illegal, Result("constraint", f"{name}: {reason}"))
        search.rejected.clear()
        self._keep(item, result)
        seconds = result.timing.median if result.timing else None
        known[item] = _Known(item, result.outcome, result.timing, result.error, result.reason)
        search.tell(item.config, seconds, f"{result.outcome}: {result.reason}")
        self.progress.candidate(item, result, search)

    def _keep(self, item: Candidate, result: Result) -> None:
        timing = result.timing
        row = {
            "problem": item.problem.key,
            "family": item.family,
            "config": dict(item.config),
            "outcome": result.outcome,
            "reason": result.reason,
            "seconds": timing.median if timing else None,
            "spread": timing.spread if timing else None,
            "samples": timing.samples if timing else 0,
            "measure_seconds": round(result.took, 4),
            "error": result.error if math.isfinite(result.error) else None,
            "facts": result.artifact.facts if result.artifact else {},
            "source_hash": result.artifact.source_hash if result.artifact else "",
            "date": db.now(),
        }
        self.rows.append(row)
        self.run.append(journal.TRIALS, row)

    # ---- the final round ----------------------------------------------------------------------------------------

    def _final(
        self, tuned: Tuned, known: dict[Candidate, _Known], default: Candidate, incumbent: Candidate | None
    ) -> db.Record | None:
        """Time the best against default and incumbent, fill in what came of it, and make the winner's record."""
        good = {item: k for item, k in known.items() if k.timing is not None}
        if not good:
            ended = ", ".join(f"{count} {name}" for name, count in tuned.outcomes.items() if count)
            example = known.get(default) or next(iter(known.values()), None)
            said = f"; {example.outcome}: {' '.join(example.reason.split())}" if example else ""
            tuned.why = f"no valid candidate: {ended or 'none was tried'}{said}"
            return None
        labels = {DEFAULT: default}
        if incumbent is not None and incumbent != default:
            labels[INCUMBENT] = incumbent
        labels = {label: item for label, item in labels.items() if item in good}
        ranked = sorted(good, key=lambda item: good[item].timing.median)  # type: ignore[union-attr]
        others = [item for item in ranked if item not in labels.values()][:FINALISTS]
        labels |= {f"#{number}": item for number, item in enumerate(others, 1)}
        self.progress.note(f"final round: {len(labels)} configs and PyTorch, in turn")
        final = self._time_finalists(labels, good)
        labels = {label: item for label, item in labels.items() if label in final.timings}
        best, tuned.why = choose(final.timings, labels)
        item, timing = labels[best], final.timings[best]
        if TORCH not in final.timings and final.notes.get("failed"):
            tuned.why += f"; {final.notes['failed']}"
        tuned.family, tuned.config, tuned.seconds, tuned.spread = (
            item.family,
            dict(item.config),
            timing.median,
            timing.spread,
        )
        tuned.error, tuned.torch_mode = good[item].error, final.notes.get(TORCH, "")
        medians = {label: t.median for label, t in final.timings.items()}
        tuned.default_seconds, tuned.torch_seconds = medians.get(DEFAULT), medians.get(TORCH)
        tuned.incumbent_seconds = medians.get(INCUMBENT)
        return self._record(tuned, item, len(known))

    def _time_finalists(self, labels: dict[str, Candidate], good: dict[Candidate, _Known]) -> Final:
        artifacts = self.pool.built(labels.values())
        entries = {label: (item, artifacts[item]) for label, item in labels.items() if item in artifacts}
        slowest = max(k.timing.median for k in good.values() if k.timing)
        seconds = FINAL_SECONDS if not self.interrupted.is_set() else FINAL_SECONDS / 3
        final: Final | str = self.pool.final(entries, seconds, slowest) if entries else "no finalist could be built"
        if isinstance(final, Final):
            return final
        timings = {label: good[item].timing for label, item in labels.items()}
        return Final(
            {label: timing for label, timing in timings.items() if timing},
            {"failed": f"the final round failed ({final}), so these are the times of the search"},
        )

    def _record(self, tuned: Tuned, item: Candidate, trials: int) -> db.Record:
        from fagen import render

        family = families.get(item.family)
        source = render.source(family, item.problem, self.target, item.config)
        return db.Record(
            problem=item.problem, arch=self.target.arch, device=self.target.device, family=item.family,
            config=dict(item.config), seconds=tuned.seconds or 0.0, spread=tuned.spread or 0.0,
            default_seconds=tuned.default_seconds or 0.0, error=tuned.error or 0.0,
            source_hash=render.source_hash(source), environment=self.environment, date=db.now(), trials=trials,
        )  # fmt: skip


def _legal(record: db.Record, problem: Problem, target: Target) -> Config | None:
    """A record's config, if this version's family still takes it for this problem."""
    try:
        family: Family = families.get(record.family)
        return family.require(problem, target, family.config(record.config))
    except FagenError:
        return None
