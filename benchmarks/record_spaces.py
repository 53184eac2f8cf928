"""Records random legal configs of several problems, each measured in full: what the search is judged by.

    python benchmarks/record_spaces.py OUT --seconds 540                  problems/spaces.toml on this machine's GPU
    python benchmarks/record_spaces.py OUT --seconds 540 --resume LAST    goes on with the files of an earlier OUT
    python benchmarks/record_spaces.py OUT --pack benchmarks/spaces       nothing is run: OUT's files, compressed

A line is written as soon as a config is measured, so that a call that is cut off loses nothing but what is under way.
Compiling is the limit: several configs go into one translation unit, each in a namespace of its own, which shares the
headers and the host's half of the work between them and leaves the device code as it is. Times are told in those of
the family's default, which is timed in turn with every config: an earlier call's clock is then this one's, too.
The family's own guesses are recorded beside the drawn configs, and marked.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fagen import families, notices, ops
from fagen.build import compiler, toolchain
from fagen.build.job import Artifact, Job, make_job
from fagen.cli import arguments
from fagen.codegen.spec import KernelSpec
from fagen.db.record import environment, now
from fagen.errors import FagenError, LaunchError
from fagen.families import Config
from fagen.families.space import enumerate_space
from fagen.ops import abi
from fagen.ops.attention.problem import Problem
from fagen.runtime.kernel import Kernel, launcher
from fagen.target import Target
from fagen.timing import timer
from fagen.tuner import evaluate, recorded_space, tune
from fagen.tuner.evaluate import import_torch
from fagen.tuner.workers import Death, Worker
from fagen.verify import checks

HERE = Path(__file__).parent
COLUMNS = (*recorded_space.COLUMNS, recorded_space.DRAWN)
FIRST = 4  # problems that come before the others
UNIT, FIRST_UNIT = 8, 2  # configs of a translation unit; of the first ones, so that there is soon something to measure
TURN = 128  # configs of a problem before the next problem has its turn
COMPILE_SECONDS, MEASURE_SECONDS = 300.0, 20.0  # that a unit, a config may take
MOST_WAITING = 256  # compiled configs that wait to be measured
ENDING = 30.0  # seconds before the end from which on no unit is begun
BROKEN = 12  # crashes in a row after which it is the device that is broken
_FUNCTIONS = re.compile(r"\b(fagen_(?:launch|error|workspace_bytes|params_layout))\(")


@dataclass(frozen=True)
class Unit:
    """Configs of one problem that are compiled together."""

    items: tuple[KernelSpec, ...]
    folder: str


@dataclass(frozen=True)
class Built:
    """What became of a config's compilation: its library and its place in there, or why there is none."""

    item: KernelSpec
    outcome: str
    library: str = ""
    place: int = 0
    facts: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Timed:
    """To be measured; `default` is timed in turn with it where its time is known."""

    built: Built
    default: Built | None = None
    seconds: float = 0.0  # that the default took


# ---- what workers do -------------------------------------------------------------------------------------------------


def be_nice() -> None:
    os.nice(10)


def compile_unit(unit: Unit) -> list[Built]:
    """All of a unit; one by one where they do not compile together."""
    folder, start = Path(tempfile.mkdtemp(dir=unit.folder)), time.monotonic()
    jobs = [make_job(i) for i in unit.items]
    done = _run_compiler(jobs, folder)
    if done.returncode and len(unit.items) > 1:
        return [one for item in unit.items for one in compile_unit(Unit((item,), unit.folder))]
    if done.returncode:
        return [Built(unit.items[0], "compile", facts={"reason": done.stderr[-300:]})]
    logs, each = _logs(done.stderr, len(jobs)), (time.monotonic() - start) / len(jobs)
    found = []
    for place, (item, log) in enumerate(zip(unit.items, logs, strict=True)):
        facts = {"compile_seconds": round(each, 3), **compiler.parse_ptxas(log)}
        outcome = "spill" if evaluate.refused_facts(facts) else "ok"
        found.append(Built(item, outcome, str(folder / "unit.so"), place, facts))
    return found


def _run_compiler(jobs: list[Job], folder: Path) -> subprocess.CompletedProcess[str]:
    """The object, then the library; what the first of them to fail said."""
    source, thing, library = (str(folder / name) for name in (f"unit{jobs[0].suffix}", "unit.o", "unit.so"))
    Path(source).write_text(join([job.source for job in jobs]))
    cxx, flags = str(toolchain.require_cxx()), jobs[0].flags
    command = [cxx, "-fPIC"]
    if jobs[0].is_cuda:
        command = [str(toolchain.require_nvcc()), "-ccbin", cxx, "-Xcompiler=-fPIC"]
    told = {"capture_output": True, "text": True, "cwd": folder}
    done = subprocess.run([*command, *flags, "-c", source, "-o", thing], **told)
    if done.returncode:
        return done
    linked = subprocess.run([cxx, "-shared", thing, "-o", library, *jobs[0].link_flags], **told)
    for name in (source, thing):  # thousands of them would fill a small disk
        Path(name).unlink()
    return linked if linked.returncode else done


def join(sources: list[str]) -> str:
    """One translation unit of several kernels' sources: a namespace each, their exported functions numbered."""
    headers = dict.fromkeys(re.findall(r"^#include <.*>$", "\n".join(sources), re.MULTILINE))
    parts = [
        f"namespace candidate_{n}_ {{\n"
        + _FUNCTIONS.sub(rf"\1_{n}(", re.sub(r"^#include <.*>$", "", text, flags=re.MULTILINE))
        + f"\n}}  // namespace candidate_{n}_\n"
        for n, text in enumerate(sources)
    ]
    return "\n".join([*headers, *parts])


def _logs(log: str, count: int) -> list[str]:
    """What ptxas said of each: a line without a function's name is about the last one that was named."""
    parts, at = [""] * count, 0
    for line in log.splitlines(keepends=True):
        named = re.search(r"candidate_(\d+)_", line)
        at = int(named[1]) if named else at
        parts[at] += line
    return parts


def measure_one(request: Timed) -> dict[str, Any]:
    """Verified as the tuner does, then timed in full."""
    item, start = request.built.item, time.monotonic()
    known: dict[str, Any] = {"outcome": "wrong"}
    try:
        kernel = load(request.built)
        inputs = functools.partial(evaluate.timing_inputs, item.problem, item.target, 0)
        known["error"], message = checks.verify(
            kernel, item.problem, item.target, lambda: inputs()[0], checks.kept_inputs
        )
        if message:
            known["reason"] = message
        else:
            call = timer.RoundRobin([launcher(kernel, each) for each in inputs()])
            known |= {"outcome": "ok", **_time(call, request)}
    except checks.Damage as damage:
        known |= {"reason": str(damage), "fatal": True}
    except (LaunchError, RuntimeError) as error:
        known |= {"outcome": "crash", "reason": str(error).splitlines()[0], "fatal": item.target.is_gpu}
    return known | {"measure_seconds": round(time.monotonic() - start, 4)}


def _time(call: timer.RoundRobin, request: Timed) -> dict[str, Any]:
    calls, device = {"it": call}, checks.where(request.built.item.target)
    if request.default:
        calls["default"] = _default_call(request.default)

    def clock() -> timer.Timing:
        timings = timer.time_calls(calls, device=device, rounds=9, min_seconds=0.03, max_seconds=0.6)
        scale = request.seconds / timings["default"].median if request.default else 1.0
        return timer.Timing(*(v * scale for v in (timings["it"].median, timings["it"].spread)), timings["it"].samples)

    timing, _ = timer.quietest(clock, tries=2, seconds=0.5)
    return {"seconds": timing.median, "spread": timing.spread, "samples": timing.samples}


_defaults: dict[Built, timer.RoundRobin] = {}


def _default_call(built: Built) -> timer.RoundRobin:
    if built not in _defaults:
        _defaults.clear()  # with another problem's inputs
        sets = evaluate.timing_inputs(built.item.problem, built.item.target, 0)
        _defaults[built] = timer.RoundRobin([launcher(load(built), inputs) for inputs in sets])
    return _defaults[built]


def load(built: Built) -> Kernel:
    """The kernel of a unit's library."""
    library = ctypes.CDLL(built.library)
    struct = ctypes.POINTER(abi.params(ops.get(built.item.problem.op).header))
    names = {name: getattr(library, f"fagen_{name}_{built.place}") for name in ("launch", "error", "workspace_bytes")}
    names["launch"].restype, names["launch"].argtypes = ctypes.c_int, [struct, ctypes.c_void_p]
    names["error"].restype, names["error"].argtypes = ctypes.c_char_p, [ctypes.c_int]
    names["workspace_bytes"].restype, names["workspace_bytes"].argtypes = ctypes.c_uint64, [struct]
    item, functions = built.item, SimpleNamespace(**names)
    return Kernel(item, _artifact(built), functions)  # type: ignore[arg-type]


def _artifact(built: Built) -> Artifact:
    return Artifact(Path(built.library), f"{built.library}:{built.place}", "", built.item.target.arch, built.facts)


# ---- what is recorded ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Of one problem: what to record, the default first, then the guesses, then drawn ones in their order."""

    problem: Problem
    target: Target
    family: str
    legal: int
    configs: tuple[Config, ...]
    drawn: frozenset[Config]

    @property
    def name(self) -> str:
        p, device = self.problem, self.target.device
        card = re.search(r"\b[A-Z]+\d+\b", device)
        size = f"d{p.head_dim}_{'full' if p.mask == 'none' else p.mask}_{p.seqlen_q}"
        return f"{card[0].lower() if card else self.target.arch}_{size}_sample"


def plan(work: tuple[Problem, Target, int]) -> Plan:
    problem, target, count = work
    family = families.searched(problem, target)[0][0]
    space = enumerate_space(family, problem, target).of(problem)
    chance = random.Random(f"record/{problem.key}")
    drawn = chance.sample(space.legal, min(count, len(space.legal)))
    first = [family.default(problem, target), *family.first_configs(problem, target)]
    legal = set(space.legal)
    configs = tuple(c for c in dict.fromkeys([*first, *drawn]) if c in legal)
    return Plan(problem, target, family.name, len(space.legal), configs, frozenset(drawn))


def plans(problems: list[Problem], target: Target, count: int) -> list[Plan]:
    """In as many processes as there are problems: counting a space takes seconds."""
    with multiprocessing.get_context("spawn").Pool(len(problems)) as pool:
        return pool.map(plan, [(problem, target, count) for problem in problems])


class File:
    """A problem's lines on the disk, those of an earlier call among them."""

    def __init__(self, plan: Plan, out: Path, last: Path | None) -> None:
        self.plan, self.path = plan, out / f"{plan.name}.jsonl"
        self.done: dict[Config, float | None] = {}
        about = {
            "fixed": {}, "staged": False, "sources": tune.sources_hash(), "environment": environment(plan.target),
            "date": now(), "sampled": len(plan.drawn), "unit": UNIT,
        }  # fmt: skip
        head = recorded_space.head_of(
            families.get(plan.family), plan.problem, plan.target, plan.legal, COLUMNS, **about
        )
        lines = whole_lines(self.path) or whole_lines(last / self.path.name if last else self.path)
        if lines:
            before = json.loads(lines[0])
            for name in ("key", "target", "family", "knobs", "columns", "sources", "legal"):
                if before[name] != json.loads(json.dumps(head[name])):
                    raise SystemExit(f"{self.path.name} was of another {name}: {before[name]}, not {head[name]}")
        text = "".join(lines) if lines else _text(head)
        for line in lines[1:]:
            values = json.loads(line)
            config = Config(dict(zip(head["knobs"], values, strict=False)))
            self.done[config] = values[len(head["knobs"]) + COLUMNS.index("seconds")]
        part = self.path.with_suffix(".part")
        part.write_text(text)
        os.replace(part, self.path)

    @property
    def default(self) -> Config:
        return self.plan.configs[0]

    def put(self, config: Config, row: dict[str, Any]) -> None:
        self.done[config] = row.get("seconds")
        with open(self.path, "ab", buffering=0) as file:
            file.write(
                _text(
                    recorded_space.line_of(config, row | {recorded_space.DRAWN: config in self.plan.drawn}, COLUMNS)
                ).encode()
            )

    def item(self, config: Config) -> KernelSpec:
        return KernelSpec(families.get(self.plan.family), self.plan.problem, self.plan.target, config)


def _text(line: Any) -> str:
    return json.dumps(line, separators=(",", ":")) + "\n"


def whole_lines(path: Path) -> list[str]:
    """Without one that was being written when its process was killed."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def order(files: list[File]) -> Iterator[tuple[File, Config]]:
    """What is lacking: the defaults, then the problems in turn, the first ones before the others."""
    yield from ((file, file.default) for file in files)
    for group in (files[:FIRST], files[FIRST:]):
        for begin in range(0, max((len(file.plan.configs) for file in group), default=0), TURN):
            for file in group:
                yield from ((file, c) for c in file.plan.configs[begin : begin + TURN] if c != file.default)


# ---- the loop --------------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, files: list[File], workers: int, until: float, folder: str) -> None:
        self.until, self.folder, self.files = until, folder, {file.plan.problem: file for file in files}
        log = Path(folder) / "workers.log"
        self.compilers = [Worker(compile_unit, log, be_nice) for _ in range(workers)]
        self.measurer = Worker(measure_one, log, import_torch)
        self.measurer.start()
        known = {file.default for file in files if file.default in file.done}
        # a default that is known is compiled all the same, since others are timed beside it
        self.left = deque((f, c) for f, c in order(files) if c not in f.done or (c == f.default and c in known))
        self.defaults: dict[Problem, Built] = {}
        self.ready: dict[Problem, deque[Built]] = {problem: deque() for problem in self.files}
        self.turn: Problem | None = None  # whose configs are measured
        self.counts: dict[str, int] = {}
        self.crashes, self.spent = 0, {"compiling": 0.0, "measuring": 0.0}

    def run(self) -> None:
        said = begin = time.monotonic()
        try:
            while time.monotonic() < self.until and (self.more or self.busy):
                self._feed_compilers()
                self._feed_measurer()
                self._collect()
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    self.say(said - begin)
        finally:
            for worker in (*self.compilers, self.measurer):
                worker.kill()
        self.say(time.monotonic() - begin)

    @property
    def more(self) -> bool:
        return bool(self.left) and time.monotonic() < self.until - ENDING

    @property
    def busy(self) -> bool:
        return any(w.busy for w in (*self.compilers, self.measurer)) or any(self.ready.values())

    def say(self, seconds: float) -> None:
        done, waiting = sum(self.counts.values()), sum(map(len, self.ready.values()))
        each = {name: spent / max(done, 1) for name, spent in self.spent.items()}
        notices.say(
            f"{seconds:4.0f} s  {done} configs, {done / max(seconds, 1):.2f} a second, {waiting} wait to be measured; "
            f"{each['compiling']:.2f} s of a compiler and {each['measuring']:.3f} s of the device each; "
            + " ".join(f"{name}:{count}" for name, count in sorted(self.counts.items()))
        )

    def _feed_compilers(self) -> None:
        for worker in self.compilers:
            if worker.busy or not self.more or sum(map(len, self.ready.values())) >= MOST_WAITING:
                continue
            file, size = self.left[0][0], UNIT if self.defaults else FIRST_UNIT
            unit = []
            while self.left and len(unit) < size and self.left[0][0] is file:
                unit.append(self.left.popleft()[1])
            items = tuple(file.item(config) for config in unit)
            worker.since = time.monotonic()
            worker.send(Unit(items, self.folder), COMPILE_SECONDS, items)

    def _feed_measurer(self) -> None:
        if self.measurer.busy:
            return
        able = [problem for problem, queue in self.ready.items() if queue and problem in self.defaults]
        if able:  # stays with a problem as long as it can, since each has inputs of its own
            self.turn = self.turn if self.turn in able else max(able, key=lambda problem: len(self.ready[problem]))
            built = self.ready[self.turn].popleft()
            file, default = self.files[self.turn], self.defaults[self.turn]
            seconds = file.done.get(file.default)
            self.measurer.send(Timed(built, default if seconds else None, seconds or 0.0), MEASURE_SECONDS, built)

    def _collect(self) -> None:
        workers = [worker for worker in (*self.compilers, self.measurer) if worker.busy]
        connection.wait([thing for worker in workers for thing in worker.waits_on], timeout=0.1)
        for worker in workers:
            reply = worker.poll()
            if reply is not None:
                self._hear_measured(worker.job, reply) if worker is self.measurer else self._hear_built(worker, reply)

    def _hear_built(self, worker: Worker, reply: Any) -> None:
        self.spent["compiling"] += time.monotonic() - worker.since
        if isinstance(reply, FagenError | OSError):
            raise reply
        if not isinstance(reply, list):
            reply = [Built(item, "timeout" if isinstance(reply, Death) else "compile") for item in worker.job]
        for built in reply:
            file = self.files[built.item.problem]
            if built.outcome != "ok":
                self._done(built, {"outcome": built.outcome})
            elif built.item.config == file.default:
                self.defaults[built.item.problem] = built
                if built.item.config not in file.done:
                    self.ready[built.item.problem].appendleft(built)
            else:
                self.ready[built.item.problem].append(built)

    def _hear_measured(self, built: Built, reply: Any) -> None:
        if isinstance(reply, Death):
            reply = {"outcome": "timeout" if reply.timed_out else "crash", "reason": reply.reason}
        elif isinstance(reply, Exception):
            reply = {"outcome": "crash", "reason": repr(reply)}
        if reply.get("fatal"):
            self.measurer.kill()
            self.measurer.start()
        self.spent["measuring"] += reply.get("measure_seconds", 0.0)
        self.crashes = self.crashes + 1 if reply["outcome"] in ("crash", "timeout") else 0
        if self.crashes >= BROKEN:
            raise SystemExit(f"the device does not work any more: {reply['reason']}")
        self._done(built, reply)

    def _done(self, built: Built, row: dict[str, Any]) -> None:
        file = self.files[built.item.problem]
        file.put(built.item.config, {**built.facts, **row})
        self.counts[row["outcome"]] = self.counts.get(row["outcome"], 0) + 1
        if row["outcome"] in ("wrong", "crash", "timeout", "compile"):
            reason = row.get("reason", built.facts.get("reason", ""))
            notices.say(f"{row['outcome']}: {built.item.config}: {reason}")
        if built.item.config == file.default and row["outcome"] != "ok":
            raise SystemExit(f"the default of {file.plan.name} is {row['outcome']}: nothing can be timed beside it")


def pack(out: Path, folder: Path) -> None:
    """Each file of a recording, read once more, then compressed."""
    for path in sorted(out.glob("*_sample.jsonl")):
        text = "".join(whole_lines(path))
        path.write_text(text)
        (space,) = recorded_space.read(path)
        (folder / f"{path.name}.xz").write_bytes(lzma.compress(text.encode(), preset=9))
        outcomes: dict[str, int] = {}
        for entry in space.entries.values():
            outcomes[entry.outcome] = outcomes.get(entry.outcome, 0) + 1
        notices.say(
            f"{path.stem}: {len(space.entries)} of {space.head['legal']} configs, best {space.best:.6g} s, {outcomes}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of the whole call")
    parser.add_argument("--configs", type=int, default=1050, help="drawn of each problem")
    parser.add_argument("--resume", type=Path, metavar="LAST", help="folder of an earlier call's files")
    parser.add_argument("--problems", type=Path, default=HERE / "problems" / "spaces.toml")
    parser.add_argument("--target", default="gpu")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time")
    parser.add_argument("--pack", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    if args.pack:
        return pack(args.out, args.pack)
    target = arguments.present(args.target, arguments.target_from(args.target), "recording for", "use --target cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    found = plans(arguments.problems_in(args.problems, target), target, args.configs)
    files = [File(plan, args.out, args.resume) for plan in found]
    for file in files:
        notices.say(
            f"{file.path.name}: {len(file.done)} of {len(file.plan.configs)} known, {file.plan.legal} are legal"
        )
    with tempfile.TemporaryDirectory(prefix="fagen-record-") as folder:
        Recorder(files, args.workers, until, folder).run()


if __name__ == "__main__":
    main()
