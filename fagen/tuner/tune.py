"""`tune`: search for each problem, a final round among the best, and the winners to the database."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import signal
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fagen import env, extensions, families
from fagen.build.compilers import compile_workers
from fagen.codegen.spec import KernelSpec
from fagen.db import merge, store
from fagen.db.record import Record, environment, now
from fagen.errors import FagenError, UnsupportedProblem, UsageError
from fagen.families import Config, Family
from fagen.families.space import Fixed, Space, enumerate_space
from fagen.ops.base import Problem
from fagen.target import Target
from fagen.timing import load
from fagen.tuner import final_round, journal, resumed
from fagen.tuner.budget import SHORTEST_FINAL, Budget
from fagen.tuner.final_round import Known
from fagen.tuner.journal import Run
from fagen.tuner.messages import OUTCOMES, Result
from fagen.tuner.patience import RETRIED
from fagen.tuner.pool import Pool
from fagen.tuner.progress import Progress
from fagen.tuner.result import Options, Report, Tuned
from fagen.tuner.rows import known_of, row_of
from fagen.tuner.search import Search, guesses, open_storage
from fagen.tuner.shared import Board, SharedSearch

NEIGHBOURS = 3
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def spaces(problem: Problem, target: Target, only: str | None = None, fixed: Fixed | None = None) -> list[Space]:
    """The search spaces of all families that can serve the problem, or of one by name; some knobs may be restricted."""
    able, reasons = families.searched(problem, target, only)
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
        for family in families.searched(problem, target, options.family)[0]:
            knobs = [(knob.name, knob.choices) for knob in family.knobs]
            digest.update(repr((problem.key, target.arch, target.device, family.name, knobs)).encode())
    return hashlib.sha256(digest.digest() + sources_hash().encode()).hexdigest()[:16]


def sources_hash() -> str:
    """Of all that kernels are made from."""
    digest = hashlib.sha256()
    for folder in extensions.template_folders():
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run(problems: Sequence[Problem], target: Target, options: Options, progress: Progress | None = None) -> Report:
    """Tune each problem and keep the winners. What a signal interrupts is kept, and can be resumed."""
    options = dataclasses.replace(options, begun=options.begun or time.monotonic())
    with contextlib.closing(progress or Progress()) as progress:
        for problem in problems:
            if options.fixed or not families.searched(problem, target, options.family)[0]:
                spaces(problem, target, options.family, options.fixed)  # raises the reasons, before anything runs
        merge.require_writable(options.out or env.user_db_dir(), target.arch, target.device)
        if options.storage:  # before a run is begun
            Board(options.storage, "").close()
        with contextlib.closing(_open_run(problems, target, options, progress)) as run:
            return _tune(run, problems, target, options, progress)


def _tune(run: Run, problems: Sequence[Problem], target: Target, options: Options, progress: Progress) -> Report:
    workers = options.workers or compile_workers(target.is_gpu, measuring=True)
    pool = Pool(
        target, run.path / journal.LOG, workers=workers, seed=options.seed, devices=options.devices,
        compile_timeout=options.compile_timeout, run_timeout=options.run_timeout, note=progress.note,
    )  # fmt: skip
    progress.start(target, workers, run.path)
    if busy := load.note(target, options.devices[0]):
        progress.note(busy)
    with pool, _signals(progress) as interrupted, _board(run, options, progress) as board:
        return _Tuner(run, target, options, pool, progress, interrupted, board).tune_all(problems)


@contextlib.contextmanager
def _board(run: Run, options: Options, progress: Progress) -> Iterator[Board | None]:
    """What is shared with other processes, under a name that this run keeps when it is resumed."""
    if options.storage is None:
        yield None
        return
    run.describe(owner=run.meta.get("owner") or f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}")
    with contextlib.closing(Board(options.storage, run.meta["owner"], options.grace)) as board:
        progress.note(f"shared through {board.shown} as {board.owner}")
        yield board


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
        "environment": environment(target),
        "sources": sources_hash(),
        "family": options.family,
        "fixed": options.fixed,
        "exhaustive": options.exhaustive,
        "seed": options.seed,
        "date": now(),
    }
    return Run.create(runs, f"{target.arch}-{mark[:8]}", meta)


@contextlib.contextmanager
def _signals(progress: Progress) -> Iterator[threading.Event]:
    """An event that the first SIGINT, SIGTERM or lost terminal sets; the second one raises. Under nohup a lost
    terminal stays ignored."""
    event, before = threading.Event(), {}

    def handle(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        progress.note(f"{signal.Signals(number).name}: saving what was found; once more to stop at once")

    if threading.current_thread() is threading.main_thread():
        nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        before = {number: signal.signal(number, handle) for number in _ENDING if number not in nohup}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Tuner:
    def __init__(
        self,
        run: Run,
        target: Target,
        options: Options,
        pool: Pool,
        progress: Progress,
        interrupted: threading.Event,
        board: Board | None = None,
    ) -> None:
        self.board = board
        self.run, self.target, self.options = run, target, options
        self.pool, self.progress, self.interrupted = pool, progress, interrupted
        self.storage = board.storage if board else open_storage(str(run.path / journal.STUDY))
        last = {t.key: t for t in resumed.winners(run.rows(journal.WINNERS), progress.note) if t.complete}
        failed = {key for key, tuned in last.items() if not tuned.config}  # these are tried again
        self.finished = {key: tuned for key, tuned in last.items() if key not in failed}
        self.rows = [
            row for row in resumed.candidates(run.rows(journal.TRIALS), progress.note)
            if not (row["outcome"] in RETRIED and row.get("problem") in failed)
        ]  # fmt: skip
        self.environment = environment(target)
        self.budget = Budget(options.budget, options.begun)
        self.spaces: dict[str, list[Space]] = {}

    def tune_all(self, problems: Sequence[Problem]) -> Report:
        report = Report(self.run.path, self.target)
        open_ = [p for p in problems if p.key not in self.finished]
        if short := self.budget.plan(open_, self.target, self.options.family):
            self.progress.note(short)
        self.pool.ends = self.budget.ends
        for index, problem in enumerate(problems):
            if problem.key in self.finished:
                report.results.append(self.finished[problem.key])
                continue
            if self.interrupted.is_set():
                break
            if problem is not open_[0] and not self.budget.fits(problem):
                report.left.append(problem.key)
                continue
            to_come = [p for p in problems[index + 1 :] if p.key not in self.finished]
            tuned, record = self.tune_problem(problem, to_come, (index, len(problems)))
            report.results.append(tuned)
            if record:  # before the run remembers that this problem is done
                written = merge.put([record], self.options.out)
                from fagen.dispatch import resolve

                resolve.forget()  # live calls of this process find the new winner
                report.written = sorted({*report.written, *written})
                report.records.append(record)
            self.run.append(journal.WINNERS, dataclasses.asdict(tuned))
            self.progress.done(tuned)
        report.interrupted = self.interrupted.is_set()
        return report

    # ---- one problem --------------------------------------------------------------------------------------------

    def tune_problem(
        self, problem: Problem, to_come: Sequence[Problem], place: tuple[int, int]
    ) -> tuple[Tuned, Record | None]:
        known: dict[KernelSpec, Known] = {}
        found = self._spaces(problem)
        problems = self.budget.among([problem, *to_come])
        planned, share = self.budget.each(problems), self.budget.share(problems, len(found))
        incumbent, left, lacking = self._incumbent(problem), 0, False
        for turn, space in enumerate(found):
            search = self._search(space, self.budget.each(problems) / len(found), known)
            self.pool.ahead = self._ahead([*found[turn + 1 :], *(self._spaces(to_come[0]) if to_come else [])])
            self.progress.problem(problem, place, search, self.pool)
            deadline, done = functools.partial(share.deadline, turn), functools.partial(self._done, search, known)
            over = functools.partial(self._over, search, known)
            try:
                self.pool.explore(search, deadline, done, over)
            finally:
                if isinstance(search, SharedSearch):
                    search.close()
            left, lacking = left + len(search.space.legal) - len(search.seen), lacking or search.lacking
        if self.pool.limits:
            self.run.describe(machine=self.pool.limits)
        default = KernelSpec(found[0].family, problem, self.target, found[0].family.default(problem, self.target))
        outcomes = Counter(row["outcome"] for row in self.rows if row["problem"] == problem.key)
        stopped = self.interrupted.is_set() or (self.pool.ended and lacking)
        whole = not stopped and not (self.options.exhaustive and left)
        tuned = Tuned(
            problem.to_dict(), whole, {name: outcomes[name] for name in OUTCOMES},
            default_config=dict(default.config),
        )  # fmt: skip
        if not stopped:
            self.pool.build_ahead()
        begin = time.monotonic()
        seconds = final_round.SECONDS / 3 if self.interrupted.is_set() else self.budget.of_final(planned)
        seconds = SHORTEST_FINAL if self.pool.ended else seconds
        item = final_round.run_final_round(self.pool, tuned, known, default, incumbent, seconds, self.progress.note)
        self.budget.finals.append(time.monotonic() - begin)
        if not item and self.pool.ended:
            tuned.why = "the budget ended before its default was measured"
        if item and stopped and incumbent and incumbent not in known and not self.options.cold:
            tuned.why += "; the earlier winner was not measured any more, and stays"
            return tuned, None
        return tuned, final_round.record(tuned, item, len(known), self.environment) if item else None

    def _ahead(self, spaces: list[Space]) -> deque[KernelSpec]:
        """What the next searches will ask for first."""
        found = []
        for space in spaces:
            family, problem = space.family, space.problem
            incumbent = self._incumbent(problem)
            first = guesses(family, problem, self.target, self.options.sampler)
            found += [KernelSpec(family, problem, self.target, config) for config in first]
            found += [incumbent] if incumbent else []
        return deque(dict.fromkeys(found))

    def _spaces(self, problem: Problem) -> list[Space]:
        """Counted in full once for each static key: constraints look at nothing else."""
        if problem.static_key not in self.spaces:
            self.spaces[problem.static_key] = spaces(problem, self.target, self.options.family, self.options.fixed)
        same = self.spaces[problem.static_key]  # but for the default, which may be another at another size
        return [space.of(problem) for space in same]

    def _over(self, search: Search, known: dict[KernelSpec, Known]) -> bool:
        if isinstance(search, SharedSearch):
            for row in search.news():
                self.merge_remote_result(search, row, known)
        self.progress.refresh()
        return self.interrupted.is_set()

    def merge_remote_result(self, search: SharedSearch, row: dict[str, Any], known: dict[KernelSpec, Known]) -> None:
        """What another process found, or this run before it was killed."""
        self._append(row)
        found = self._recalled(search, row)
        known[found.item] = found
        search.tell(
            found.item.config, found.timing.median if found.timing else None, f"{found.outcome}: {found.reason}"
        )
        self.progress.candidate(found.item, Result(found.outcome, found.reason, found.timing, found.error), search)

    def _incumbent(self, problem: Problem) -> KernelSpec | None:
        """What the database has for exactly this problem, if it is still legal."""
        for record, provenance in self._database().candidates(problem, self.target):
            if provenance != "exact":
                return None
            config = _legal(record, problem, self.target)
            if config and self.options.family in (None, record.family):
                return KernelSpec(families.get(record.family), problem, self.target, config)
        return None

    def _database(self) -> store.Database:
        return store.Database.load((*store.default_paths(), *([self.options.out] if self.options.out else [])))

    def _search(self, space: Space, seconds: float, known: dict[KernelSpec, Known]) -> Search:
        family, problem = space.family, space.problem
        records = [r for r, _ in self._database().candidates(problem, self.target) if r.family == family.name]
        winners = [(r, _legal(r, problem, self.target)) for r in records[: NEIGHBOURS + 1]]
        exact = [config for record, config in winners if config and record.key == problem.key]
        default, *others = guesses(family, problem, self.target, self.options.sampler)
        near = [config for _, config in winners if config]
        first = [default] if self.options.cold else [default, *exact, *others, *near]
        room = self.options.trials if self.options.trials is not None else seconds  # a second a candidate, about
        rival = min((k.timing.median for k in known.values() if k.timing), default=math.inf)  # of other families
        rows = [
            row for row in self.rows
            if row["problem"] == problem.key and row["family"] == family.name and row["outcome"] != "constraint"
        ]  # fmt: skip
        search = self._new_search(
            space, rows, first=first, exhaustive=self.options.exhaustive or len(space.legal) <= room, rival=rival,
            musts=[] if self.options.cold else exact,
        )  # fmt: skip
        for row in rows:
            self._remember(search, row, known)
        return search

    def _new_search(self, space: Space, rows: list[dict[str, Any]], **how: Any) -> Search:
        seed, limit = self.options.seed, self.options.trials
        how |= {"whole": self.options.exhaustive, "sampler": self.options.sampler}
        if self.board is None:
            return Search(space, self.storage, seed=seed, limit=limit, **how)
        mark = fingerprint([space.problem], self.target, dataclasses.replace(self.options, family=space.family.name))
        compiler = self.environment.get("nvcc") or self.environment.get("cxx", "")
        name = f"{space.family.name}:{space.problem.key}:{mark}:{hashlib.sha256(compiler.encode()).hexdigest()[:8]}"
        salt = int(hashlib.sha256(self.board.owner.encode()).hexdigest()[:6], 16)  # or all would ask for the same
        own = [row for row in rows if row.get("host", self.board.owner) == self.board.owner]
        search = SharedSearch(
            space, self.storage, board=self.board, name=name, seed=seed + salt, limit=limit, done=len(own), **how
        )
        search.publish({space.family.config(row["config"]): row for row in own})
        return search

    def _remember(self, search: Search, row: dict[str, Any], known: dict[KernelSpec, Known]) -> None:
        """A line of the run that is resumed."""
        found = self._recalled(search, row)
        known[found.item] = found
        search.known(found.item.config, found.timing.median if found.timing else None)

    def _recalled(self, search: Search, row: dict[str, Any]) -> Known:
        return known_of(row, search.space.family, search.space.problem, self.target)

    def _done(self, search: Search, known: dict[KernelSpec, Known], item: KernelSpec, result: Result) -> None:
        """A candidate's end: to the disk first, then to Optuna."""
        for config, (name, reason) in search.rejected.items():
            illegal = dataclasses.replace(item, config=config)
            self._append(self._row(illegal, Result("constraint", f"{name}: {reason}")))
        search.rejected.clear()
        row = self._row(item, result)
        if isinstance(search, SharedSearch) and not search.finish(item.config, row):
            return  # another process has it by now
        self._append(row)
        seconds = result.timing.median if result.timing else None
        known[item] = Known(item, result.outcome, result.timing, result.error, result.reason, final_round.source(row))
        search.tell(item.config, seconds, f"{result.outcome}: {result.reason}")
        self.progress.candidate(item, result, search)

    def _row(self, item: KernelSpec, result: Result) -> dict[str, Any]:
        return row_of(item, result, self.board.owner if self.board else "")

    def _append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.run.append(journal.TRIALS, row)


def _legal(record: Record, problem: Problem, target: Target) -> Config | None:
    """A record's config, if this version's family still takes it for this problem."""
    try:
        family: Family = families.get(record.family)
        return family.require(problem, target, family.config(record.config))
    except FagenError:
        return None
