"""`fagen tune --simulate`: the search, replayed on recorded spaces without the machine that they were recorded on.

The very Search of a run is asked and told, with as many candidates in flight as a run would have: a clock stands in
for the workers. A candidate takes a free compiler for as long as its compilation took when it was recorded, then
waits for the one measuring process, and is told its recorded time, disturbed by its recorded spread.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
import random
import re
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fagen.errors import UsageError
from fagen.families import Config
from fagen.families.space import Space
from fagen.tuner.recorded_space import Recorded, RecordedTrial
from fagen.tuner.search import Pace, Search, guesses

WITHIN = (0.02, 0.05)  # of the best, that are reported
WORKERS = 14  # compilers of a machine with 16 cores
COMPILE_SECONDS, MEASURE_SECONDS = 2.0, 0.3  # where a record has none


@dataclass(frozen=True)
class Replay:
    """One search of one space: trials and simulated seconds until within each of WITHIN, None where it did not come
    as near; and what was tried, in the order in which it was told."""

    hits: dict[float, tuple[int, float] | None]
    tried: tuple[Config, ...] = ()


@dataclass(frozen=True)
class Summary:
    """Medians over the seeds. A search that did not come as near counts as the whole space."""

    space: str
    family: str
    sampler: str
    configs: int
    seeds: int
    trials: dict[str, float]
    fraction: dict[str, float]
    seconds: dict[str, float]
    missed: dict[str, int]  # seeds that did not come as near within the limit

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def space_of(recorded: Recorded) -> Space:
    """What was recorded, as the space that is searched."""
    legal = tuple(recorded.entries)
    return Space(recorded.family, recorded.problem, recorded.target, legal, {}, len(legal))


def replay(
    recorded: Recorded, sampler: str, seed: int, *, workers: int, trials: int | None = None, cold: bool = False
) -> Replay:
    """`cold`: begin without the default and the family's other guesses, which were chosen by earlier searches."""
    recorded = recorded.of_chance() if cold else recorded
    first = [] if cold else guesses(recorded.family, recorded.problem, recorded.target, sampler)
    search = begin(space_of(recorded), sampler, seed, first, trials)
    return run(search, recorded, workers, random.Random(f"{seed}/noise"))


def begin(space: Space, sampler: str, seed: int, first: Sequence[Config], trials: int | None = None) -> Search:
    """The search of a run, kept in memory."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.InMemoryStorage()
    return Search(space, storage, seed=seed, first=first, limit=trials, exhaustive=False, sampler=sampler)


def run(search: Search, recorded: Recorded, workers: int, noise: random.Random) -> Replay:
    """The loop of the pool, by a clock of events; until all is found, or the search has no more where it is limited."""
    goals = {within: recorded.best * (1 + within) for within in WITHIN}
    found: dict[float, tuple[int, float] | None] = dict.fromkeys(WITHIN)
    now, tried = 0.0, list[Config]()
    compiling: list[tuple[float, int, Config]] = []  # when done
    ready: deque[Config] = deque()
    measuring: tuple[float, Config] | None = None
    order, pace = 0, Pace()
    while True:
        while (
            len(compiling) < workers
            and len(compiling) + len(ready) < pace.ahead(workers)
            and (config := search.next()) is not None
        ):
            order += 1
            lasts = recorded.entries[config].compile_seconds or COMPILE_SECONDS
            pace.compiled(lasts)
            heapq.heappush(compiling, (now + lasts, order, config))
        if measuring is None and ready:
            config = ready.popleft()
            lasts = recorded.entries[config].measure_seconds or MEASURE_SECONDS
            pace.measured(lasts)
            measuring = now + lasts, config
        if measuring and (not compiling or measuring[0] <= compiling[0][0]):
            (now, config), measuring = measuring, None
            entry = recorded.entries[config]
            search.tell(config, disturbed(entry, noise), entry.outcome)
            tried.append(config)
            for within, goal in goals.items():
                if found[within] is None and entry.seconds is not None and entry.seconds <= goal:
                    found[within] = len(tried), now
            if search.limit is None and all(found.values()):
                break
        elif compiling:
            now, _, config = heapq.heappop(compiling)
            entry = recorded.entries[config]
            if entry.outcome in ("compile", "spill"):
                search.tell(config, None, entry.outcome)
                tried.append(config)
            else:
                ready.append(config)
        else:
            break
    return Replay(found, tuple(tried))


def disturbed(entry: RecordedTrial, noise: random.Random) -> float | None:
    """As another measurement might have come out."""
    if entry.seconds is None:
        return None
    return max(entry.seconds + noise.gauss(0, min(entry.spread, 0.02 * entry.seconds)), 0.5 * entry.seconds)


def _job(work: tuple[Recorded, str, int], **how: Any) -> Replay:
    recorded, sampler, seed = work
    return replay(recorded, sampler, seed, **how)


def simulate(
    spaces: Sequence[Recorded], samplers: Sequence[str], seeds: int, *, workers: int = WORKERS,
    trials: int | None = None, cold: bool = False, jobs: int = 1,
) -> list[Summary]:  # fmt: skip
    """Every sampler on every space, `seeds` times; `jobs` processes share them."""
    work = [(space, sampler, seed) for space in spaces for sampler in samplers for seed in range(seeds)]
    job = functools.partial(_job, workers=workers, trials=trials, cold=cold)
    if jobs > 1:
        import multiprocessing

        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            replays = pool.map(job, work, chunksize=1)
    else:
        replays = [job(item) for item in work]
    each = iter(replays)
    return [_summary(space, sampler, [next(each) for _ in range(seeds)]) for space in spaces for sampler in samplers]


def _summary(space: Recorded, sampler: str, replays: list[Replay]) -> Summary:
    count = len(space.entries)
    trials, seconds, missed = {}, {}, {}
    for within in WITHIN:
        name, hits = f"{within:.0%}", [r.hits[within] for r in replays]
        trials[name] = statistics.median(hit[0] if hit else count for hit in hits)
        seconds[name] = statistics.median(hit[1] if hit else math.inf for hit in hits)
        missed[name] = sum(hit is None for hit in hits)
    fraction = {name: value / count for name, value in trials.items()}
    return Summary(
        space.head["key"], space.family.name, sampler, count, len(replays), trials, fraction, seconds, missed
    )


# ---- what is expected of it ------------------------------------------------------------------------------------------


def expectation(words: str) -> tuple[str, float]:
    """`within=2%,trials=15%` as ("2%", 0.15)."""
    match = re.fullmatch(r"within=(\d+)%,trials=(\d+(?:\.\d+)?)%", words.replace(" ", ""))
    names = [f"{within:.0%}" for within in WITHIN]
    if match is None or f"{match[1]}%" not in names:
        raise UsageError(
            f"{words!r} is no expectation", f"within is one of {', '.join(names)}", "it is like within=2%,trials=15%"
        )
    return f"{match[1]}%", float(match[2]) / 100


def misses(summaries: Sequence[Summary], words: str) -> list[str]:
    """Where the first sampler took more trials than expected, or more than chance where that was replayed as well."""
    within, most = expectation(words)
    found, chance = [], {(s.space, s.family): s.trials[within] for s in summaries if s.sampler == "random"}
    for s in summaries:
        if s.sampler != summaries[0].sampler:
            continue
        if s.fraction[within] > most:
            found.append(
                f"{s.space}: within {within} after {s.fraction[within]:.1%} of the trials, more than {most:.1%}"
            )
        if s.sampler != "random" and s.trials[within] >= chance.get((s.space, s.family), math.inf):
            found.append(f"{s.space}: {s.trials[within]:.0f} trials, random {chance[s.space, s.family]:.0f}")
    return found


def table(summaries: Sequence[Summary]) -> str:
    """A paragraph a space, a line a sampler."""
    lines = []
    for space, family in dict.fromkeys((s.space, s.family) for s in summaries):
        mine = [s for s in summaries if (s.space, s.family) == (space, family)]
        lines.append(f"{space}  {family}: {mine[0].configs} configs, median of {mine[0].seeds} seeds")
        for s in mine:
            cells = [
                f"within {name}: {s.trials[name]:4.0f} trials {s.fraction[name]:6.1%} {s.seconds[name]:6.1f} s"
                + (f" ({s.missed[name]} missed)" if s.missed[name] else "")
                for name in s.trials
            ]
            lines.append(f"  {s.sampler:<8}{'   '.join(cells)}")
    return "\n".join(lines)
