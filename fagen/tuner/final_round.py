"""The final round of a problem: the best of the search, default, incumbent and PyTorch, hot, on one device.

Times of the search come from different minutes, devices and hosts; they only choose who takes part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fagen.codegen.spec import KernelSpec
from fagen.db.record import Record, now
from fagen.timing import nvml
from fagen.timing.timer import Timing
from fagen.tuner.evaluate import BEHIND
from fagen.tuner.messages import TORCH, Final
from fagen.tuner.pool import Pool
from fagen.tuner.result import DEFAULT, INCUMBENT, Tuned, choose

FINALISTS = 4  # beside the default and the incumbent
OF_EACH, MOST = 2, 12  # of each device and host that took part in the search; of all together
SECONDS = 3.0


@dataclass
class Known:
    """A candidate that was evaluated, now or in the run that is resumed, here or elsewhere."""

    item: KernelSpec
    outcome: str
    timing: Timing | None
    error: float
    reason: str = ""
    source: str = ""  # the device and host that timed it


def source(row: dict[str, Any]) -> str:
    """Of a line of trials.jsonl: times compare within it."""
    return f"{row.get('host', '')}/{(row.get('device') or {}).get('gpu', '')}"


def finalists(
    good: dict[KernelSpec, Known], default: KernelSpec, incumbent: KernelSpec | None
) -> dict[str, KernelSpec]:
    """Who takes part, by label."""
    labels = {DEFAULT: default}
    if incumbent is not None and incumbent != default:
        labels[INCUMBENT] = incumbent
    labels = {label: item for label, item in labels.items() if item in good}
    ranked = sorted(good, key=lambda item: _median(good, item))
    others = [item for item in ranked if item not in labels.values()]
    chosen = others[:FINALISTS]
    near = [item for item in others if _median(good, item) <= BEHIND * _median(good, ranked[0])]
    for place in sorted({good[item].source for item in near}):
        chosen += [item for item in near if good[item].source == place][:OF_EACH]
    return labels | {f"#{number}": item for number, item in enumerate([*dict.fromkeys(chosen)][:MOST], 1)}


def _median(good: dict[KernelSpec, Known], item: KernelSpec) -> float:
    timing = good[item].timing
    return timing.median if timing else math.inf


def run_final_round(
    pool: Pool,
    tuned: Tuned,
    known: dict[KernelSpec, Known],
    default: KernelSpec,
    incumbent: KernelSpec | None,
    seconds: float,
    note: Callable[[str], None],
) -> KernelSpec | None:
    """Time the best against default and incumbent, and fill in what came of it. The winner, if there is one."""
    good = {item: k for item, k in known.items() if k.timing is not None}
    if not good:
        ended = ", ".join(f"{count} {name}" for name, count in tuned.outcomes.items() if count)
        example = known.get(default) or next(iter(known.values()), None)
        said = f"; {example.outcome}: {' '.join(example.reason.split())}" if example else ""
        tuned.why = f"no valid candidate: {ended or 'none was tried'}{said}"
        return None
    labels = finalists(good, default, incumbent)
    beside = "the default" if DEFAULT in labels else "the first"
    note(f"final round: {len(labels)} configs and PyTorch, each beside {beside}")
    final = _timed(pool, labels, good, seconds)
    labels = {label: item for label, item in labels.items() if label in final.timings}
    best, tuned.why = choose(final.timings, labels)
    item, timing = labels[best], final.timings[best]
    if TORCH not in final.timings and final.notes.get("failed"):
        tuned.why += f"; {final.notes['failed']}"
    slowed = sorted(nvml.SPOILING.intersection(final.state.get("throttle", ())))
    if slowed:
        tuned.why += f"; the GPU was slowed down meanwhile ({', '.join(slowed)})"
    tuned.family, tuned.config = item.family.name, dict(item.config)
    tuned.seconds, tuned.spread = timing.median, timing.spread
    tuned.error, tuned.torch_mode = good[item].error, final.notes.get(TORCH, "")
    medians = {label: t.median for label, t in final.timings.items()}
    tuned.default_seconds, tuned.torch_seconds = medians.get(DEFAULT), medians.get(TORCH)
    tuned.incumbent_seconds = medians.get(INCUMBENT)
    tuned.device, tuned.rounds = final.state, final.rounds
    return item


def _timed(pool: Pool, labels: dict[str, KernelSpec], good: dict[KernelSpec, Known], seconds: float) -> Final:
    artifacts = pool.built(labels.values())
    entries = {label: (item, artifacts[item]) for label, item in labels.items() if item in artifacts}
    slowest = max(k.timing.median for k in good.values() if k.timing)
    final: Final | str = pool.final(entries, seconds, slowest) if entries else "no finalist could be built"
    if isinstance(final, Final):
        return final
    timings = {label: good[item].timing for label, item in labels.items()}
    return Final(
        {label: timing for label, timing in timings.items() if timing},
        {"failed": f"the final round failed ({final}), so these are the times of the search"},
    )


def record(tuned: Tuned, item: KernelSpec, trials: int, environment: dict[str, str]) -> Record:
    """The winner as the database keeps it, with the state of the GPU in its environment."""

    state = {name: ",".join(v) if isinstance(v, list) else f"{v:g}" for name, v in tuned.device.items()}
    return Record(
        problem=item.problem, arch=item.target.arch, device=item.target.device, family=item.family.name,
        config=dict(item.config), seconds=tuned.seconds or 0.0, spread=tuned.spread or 0.0,
        default_seconds=tuned.default_seconds or 0.0, error=tuned.error or 0.0,
        source_hash=item.hash, environment=environment | {k: v for k, v in state.items() if v},
        date=now(), trials=trials, torch_seconds=tuned.torch_seconds or 0.0,
    )  # fmt: skip
