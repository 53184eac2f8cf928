"""What a person sees of a run: a live panel on a terminal, a line per event elsewhere, a table at the end.

All of it goes to stderr. `Progress` itself is silent, for callers that want none.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen import notices
from fagen.codegen.spec import KernelSpec
from fagen.notices import clock, milliseconds
from fagen.ops.base import Problem
from fagen.target import Target
from fagen.timing import load

if TYPE_CHECKING:
    from fagen.tuner.messages import Result
    from fagen.tuner.pool import Pool
    from fagen.tuner.result import Report, Tuned
    from fagen.tuner.search import Search


class Progress:
    """Hears what happens. Says nothing."""

    def start(self, target: Target, workers: int, run: Path) -> None: ...
    def note(self, text: str) -> None: ...
    def problem(self, problem: Problem, place: tuple[int, int], search: Search, pool: Pool) -> None: ...
    def candidate(self, item: KernelSpec, result: Result, search: Search) -> None: ...
    def refresh(self) -> None: ...
    def done(self, tuned: Tuned) -> None: ...
    def close(self) -> None: ...


class Lines(Progress):
    """A line per event."""

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal or a pipe that is gone is no reason to stop
            notices.say(text)

    def start(self, target: Target, workers: int, run: Path) -> None:
        self.say(f"target   {target}")
        self.say(f"run      {run}  ({workers} compilers at a time)")

    def note(self, text: str) -> None:
        self.say(f"note     {text}")

    def problem(self, problem: Problem, place: tuple[int, int], search: Search, pool: Pool) -> None:
        known = f", {search.issued} known from before" if search.issued else ""
        self.say(f"problem  {place[0] + 1}/{place[1]} {problem}")
        self.say(f"space    {search.space.family.name}: {len(search.space.legal)} of {search.space.total} legal{known}")

    def candidate(self, item: KernelSpec, result: Result, search: Search) -> None:
        said = f"{result.outcome}: {_first_line(result.reason)}"
        if result.timing:
            said = f"{milliseconds(result.timing.median):>8}  best {milliseconds(search.best)}"
        self.say(f"trial    {len(search.seen)}/{search.goal}  {said}  [{item.config}]")

    def done(self, tuned: Tuned) -> None:
        if tuned.config is None:
            self.say(f"nothing  {tuned.why}")
            return
        self.say(f"winner   {milliseconds(tuned.seconds)}, {tuned.gain} ({tuned.why})")
        if state := load.described(tuned.device):
            self.say(f"state    {state}, hot and sustained")
        if tuned.behind:
            self.say(f"note     {tuned.behind}; calls of this size are served by it where it can")


class Live(Lines):
    """A panel that is redrawn; what stays is printed above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as Panel

        self.console = Console(stderr=True)
        self.panel = Panel(console=self.console, refresh_per_second=4, transient=True)
        self.panel.start()
        self.now: tuple[Problem, tuple[int, int], Search, Pool] | None = None
        self.failed: dict[str, int] = {}
        self.default: float | None = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def problem(self, problem: Problem, place: tuple[int, int], search: Search, pool: Pool) -> None:
        super().problem(problem, place, search, pool)
        self.now, self.failed, self.default = (problem, place, search, pool), {}, None
        self.refresh()

    def candidate(self, item: KernelSpec, result: Result, search: Search) -> None:
        if result.timing and item.config == search.space.family.default(item.problem, item.target):
            self.default = result.timing.median
        if not result.timing:
            self.failed[result.outcome] = self.failed.get(result.outcome, 0) + 1
        self.refresh()

    def refresh(self) -> None:
        if self.now is None:
            return
        from rich.table import Table

        problem, place, search, pool = self.now
        table = Table.grid(padding=(0, 2))
        table.add_row("problem", f"{place[0] + 1}/{place[1]}  {problem}")
        tried = f"{len(search.seen)} of at most {search.goal}"
        failures = ", ".join(f"{count} {name}" for name, count in self.failed.items())
        table.add_row("tried", tried + (f"  ({failures})" if failures else ""))
        table.add_row("compiling", f"{pool.compiling}, {len(pool.ready)} built and waiting")
        for device in sorted(pool.devices.values()):
            item = pool.measuring.get(device)
            where = f"on GPU {device}" if len(pool.devices) > 1 else "measuring"
            table.add_row(where, str(item.config) if item else "-")
        table.add_row("best so far", self._best(search))
        table.add_row("time left", clock(pool.until - time.monotonic()))
        self.panel.update(table)

    def _best(self, search: Search) -> str:
        if not search.seen or search.best == float("inf"):
            return "-"
        gain = f"  {self.default / search.best:.2f}x the default" if self.default else ""
        return f"{milliseconds(search.best)}{gain}"

    def done(self, tuned: Tuned) -> None:
        self.now = None
        super().done(tuned)

    def close(self) -> None:
        self.panel.stop()


def make() -> Progress:
    """Live on a terminal that rich can draw on."""
    if sys.stderr.isatty():
        try:
            return Live()
        except ImportError:
            pass
    return Lines()


# ---- the table at the end -------------------------------------------------------------------------------------------

_HEAD = ("problem", "default", "winner", "speed-up", "error", "PyTorch", "vs PyTorch")


def _row(tuned: Tuned) -> tuple[str, ...]:
    gain = "-" if not tuned.speedup else "tie" if tuned.speedup < 1 else f"{tuned.speedup:.2f}x"
    error = f"{tuned.error:.1e}" if tuned.error is not None else "-"
    peer = f"{tuned.torch_seconds / tuned.seconds:.2f}x" if tuned.torch_seconds and tuned.seconds else "-"
    times = (milliseconds(tuned.default_seconds), milliseconds(tuned.seconds))
    return (tuned.key, *times, gain, error, milliseconds(tuned.torch_seconds), peer)


def table(report: Report) -> str:
    """Problems, times, winners and defaults as plain text."""
    rows = [_HEAD, *(_row(tuned) for tuned in report.results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = []
    for index, row in enumerate(rows):
        lines.append(
            "  ".join(
                text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
            )
        )
        if index == 0:
            lines.append("  ".join("-" * width for width in widths))
            continue
        tuned = report.results[index - 1]
        if not tuned.config:
            lines.append(f"    nothing  {tuned.why}")
            continue
        plain = tuned.speedup and tuned.speedup >= 1.005
        lines.append(f"    winner   {_words(tuned.config)}" + ("" if plain else f"  ({tuned.gain}: {tuned.why})"))
        if tuned.config != tuned.default_config:
            lines.append(f"    default  {_words(tuned.default_config)}")
    return "\n".join(lines)


def _words(config: dict[str, Any] | None) -> str:
    return " ".join(f"{name}={value}" for name, value in (config or {}).items())


def closing(report: Report, command: str = "fagen tune") -> str:
    """Where the winners are, what to do with them, and what has none. `command`: the words that resume the run."""
    lines = []
    if report.written:
        lines.append(f"winners written to {', '.join(str(path) for path in report.written)}")
        lines.append("use them:  from fagen import attention   (it finds them by itself; fagen explain says which)")
    lines += [f"no winner  {tuned.key}: {_first_line(tuned.why)}" for tuned in report.failed]
    lines += [f"not begun  {key}: the budget had no time for it" for key in report.left]
    if report.interrupted or report.failed or report.left:
        lines.append(f"{'interrupted; ' if report.interrupted else ''}go on with what is missing:  {command}")
    return "\n".join(lines)


def space_table(spaces: list[Any]) -> str:
    """What --dry-run shows: sizes of the spaces and what each constraint removed."""
    lines = []
    for space in spaces:
        lines.append(f"{space.problem}")
        lines.append(f"  {space.family.name}: {len(space.legal)} of {space.total} configs are legal")
        lines += [f"    {name:<20}removed {count}" for name, count in space.removed.items()]
    return "\n".join(lines)


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
