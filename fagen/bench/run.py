"""A run: each row's participants are verified, then timed against each other, and what came of each is kept.

Outcomes: `ok`; `wrong` (outside the oracle's bound, not timed); `cannot` (no way to compute the row); `failed`
(it raised). Nothing of a peer ends the run but an error that the GPU does not recover from.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fagen.bench import attention, by_op, family, memory, peers, rows
from fagen.bench.peers import OURS, PLAIN, Cannot, Prepare
from fagen.bench.rows import Inputs, Row
from fagen.errors import LaunchError
from fagen.target import Target
from fagen.timing.machine import Machine

if TYPE_CHECKING:
    from fagen.ops.oracle import Verdict
    from fagen.timing import timer

FORMAT = 1
_HOST_CALLS, _HOST_ROUNDS = 200, 9

Result = dict[str, Any]
Hook = Callable[[Result], None]


@dataclass(frozen=True)
class Settings:
    rounds: int = 15
    min_seconds: float = 0.5  # of a row, all participants together
    seed: int = 0


def bench(
    chosen: list[Row],
    others: Mapping[str, Prepare],
    target: Target,
    settings: Settings,
    *,
    held: str | None = None,
    on_row: Hook,
    on_sample: Hook = lambda sample: None,
) -> tuple[list[Result], Machine]:
    """All rows, in order; the machine's own rates at the start, in the middle and at the end.

    `held` is the one family that ours may take.
    """
    import torch

    machine = Machine(target, reads=by_op.get(chosen[0].measured).reads)
    found: list[Result] = []
    with torch.no_grad():
        on_sample(machine.sample("start"))
        for number, row in enumerate(chosen):
            if number == len(chosen) // 2 and number:
                on_sample(machine.sample("middle"))
            found.append(time_row(row, {OURS: _ours(row, target, held), **others}, target, settings, held))
            _shares(found[-1], machine)
            on_row(found[-1])
        on_sample(machine.sample("end"))
    for result in found:
        _shares(result, machine)
    return found, machine


def _ours(row: Row, target: Target, held: str | None) -> Prepare:
    return family.ours(held, target) if held else by_op.get(row.measured).ours


def _shares(result: Result, machine: Machine) -> None:
    """What bounds the row by the machine's rates so far, and how near each participant comes to that."""
    least, result["bound"] = machine.least_seconds(result["flops"], result["bytes"])
    for facts in result["participants"].values():
        if "seconds" in facts:
            facts["share"] = least / facts["seconds"]


def time_row(
    row: Row, participants: Mapping[str, Prepare], target: Target, settings: Settings, held: str | None = None
) -> Result:
    """Participants verified, then timed in turn."""
    from fagen.ops.inputs import input_sets

    device = "cuda" if target.is_gpu else "cpu"
    count = input_sets(row.problem, target)

    def inputs_of(one: Row) -> list[Inputs]:
        return [rows.make_inputs(one, target, settings.seed + i) for i in range(count)]

    sets, how = inputs_of(row), by_op.get(row.measured)
    flops = rows.flops(row, sets[0].call)
    result: Result = {
        "name": row.name, "series": row.series, "length": row.length, "problem": row.problem.to_dict(),
        "key": row.problem.key, "flops": flops, "bytes": rows.least_bytes(row), "input_sets": count,
        "needs_split_keys": how.needs_split_keys(row.problem, target), "participants": {},
    }  # fmt: skip
    result["choice"] = _choice(row, sets[0], target, held)
    calls = {}
    for name, prepare in participants.items():
        one = rows.plain(row) if name == PLAIN else row
        facts, call = _participant(prepare, one, sets if one == row else inputs_of(one), device, name)
        result["participants"][name] = facts
        if call is not None:
            calls[name] = call
    if calls:
        _time(result, calls, device, settings, captured=how.captured)
    del calls, call, sets
    free(device)
    return result | compared(result["participants"])


def _time(
    result: Result, calls: Mapping[str, timer.RoundRobin], device: str, settings: Settings, *, captured: bool
) -> None:
    from fagen.timing import timer

    clock = functools.partial(timer.time_calls, device=device, rounds=settings.rounds, captured=captured)
    try:
        times = clock(calls, min_seconds=settings.min_seconds)
    except RuntimeError as error:  # no memory for a graph, say: the next row may have it
        alive(device, "a participant", result["name"])
        times = {}
        for name in calls:
            result["participants"][name] |= {"outcome": "failed", "reason": peers.reason(error)}
    for name, timing in times.items():
        result["participants"][name] |= {
            "seconds": timing.median, "spread": timing.spread, "samples": timing.samples,
            "uncertainty": timing.uncertainty, "tflops": result["flops"] / timing.median / 1e12,
            "gbps": result["bytes"] / timing.median / 1e9,
        }  # fmt: skip


def _participant(
    prepare: Prepare, row: Row, sets: list[Inputs], device: str, name: str
) -> tuple[Result, timer.RoundRobin | None]:
    """What is known of it before the clock runs, and its calls, one for each set of inputs."""
    facts, serve = prepared(prepare, row, sets[0], device, name, sets[1:])
    if serve is None:
        return facts, None
    if row.training:
        facts["peak_bytes"] = memory.peak(serve, sets[0], device)
    return facts, _repeated(serve, sets, facts)


def _repeated(serve: peers.Serve, sets: Sequence[Inputs], facts: Result) -> timer.RoundRobin:
    from fagen.timing import timer

    if isinstance(serve, peers.Held):
        return timer.RoundRobin([_Shielded(serve.serve, i, facts) for i in sets], session=serve.session)
    return timer.RoundRobin([_Shielded(serve, i, facts) for i in sets])


def _choice(row: Row, inputs: Inputs, target: Target, held: str | None) -> Result:
    try:
        return family.choice(row, target, held) if held else by_op.get(row.measured).choice(row, inputs)
    except Exception as error:  # the call itself will raise it again, and be told as failed
        return {"served_by": "nothing", "reason": peers.reason(error)}


class _Shielded:
    """A call for the clock, which knows what to do with a RuntimeError of what cannot be captured, and of no other."""

    def __init__(self, serve: peers.Serve, inputs: Inputs, facts: Result) -> None:
        self.serve, self.inputs, self.facts = serve, inputs, facts

    def __call__(self) -> None:
        try:
            self.serve(self.inputs)
        except Exception as error:  # it did before: so it is the capture that it does not stand
            self.facts["not_captured"] = peers.reason(error)
            raise RuntimeError(str(error)) from error


def free(device: str) -> None:
    """Graphs keep pools of memory, and lie in cycles."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


# ---- right, before fast ---------------------------------------------------------------------------------------------


def prepared(
    prepare: Prepare, row: Row, inputs: Inputs, device: str, name: str, more: Sequence[Inputs] = ()
) -> tuple[Result, peers.Serve | None]:
    """A participant's outcome so far, and how to call it if what it gave is right.

    It is called on `more` inputs as well: what it keeps of each set must be there before a graph is captured. A step
    of training that drops weights at random is verified without.
    """
    start, serve = time.perf_counter(), None
    drops = row.training and row.problem.dropout
    checked_row = rows.plain(row) if drops else row
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # SDPA says in warnings why a backend refuses
        try:
            serve = prepare(checked_row, inputs)
            out = serve(inputs)
            synchronize(device)
            seconds = time.perf_counter() - start
            verdict, checked = verified(out, inputs.call, by_op.get(row.measured).cells.get(device, 0))
            if drops:
                serve, checked = prepare(row, inputs), f"{checked}, without dropout"
                more = [inputs, *more]
            for other in more if verdict.ok else ():
                serve(other)
            synchronize(device)
        except Cannot as error:
            return {"outcome": "cannot", "reason": str(error)}, None
        except Exception as error:  # whatever a participant raises is its outcome
            alive(device, name, row.name)
            hints = [str(warning.message).strip().splitlines()[0] for warning in said if str(warning.message).strip()]
            return {"outcome": "failed", "reason": "; ".join([peers.reason(error), *hints[-2:]])[:400]}, None
    facts = {
        "outcome": "ok" if verdict.ok else "wrong", "error": finite(verdict.error),
        "error_over_bound": finite(verdict.ratio), "verified": checked, "first_call_seconds": seconds,
    }  # fmt: skip
    if not verdict.ok:
        return facts | {"reason": verdict.message}, None
    return facts, serve


def finite(value: float) -> float | None:
    """JSON has no word for infinity."""
    return value if math.isfinite(value) else None


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def alive(device: str, name: str, where: str) -> None:
    """An illegal access poisons the GPU's context: nothing that follows could be trusted."""
    try:
        synchronize(device)
    except RuntimeError as error:
        raise LaunchError(
            f"{name} left the GPU in an error state on {where}", str(error).splitlines()[0], "run without it"
        ) from error


def verified(out: Any, call: Any, cells: int) -> tuple[Verdict, str]:
    """By the op's oracle: all of the outputs, or, where that takes too long, a part of the same outputs."""
    from fagen import ops

    op = call.problem.op
    names = ops.get(op).calls().timed
    given = dict(zip(names, out if isinstance(out, tuple) else (out,), strict=True))
    return by_op.get(op).check(call, given, cells)


# ---- ours against the best of the others ----------------------------------------------------------------------------


def compared(participants: Mapping[str, Result], among: set[str] | None = None) -> Result:
    """The fastest peer and how many times faster than it we are; `among` leaves out other peers.

    `of_plain` is our speed over that of ours without what the row asks for beyond attention.
    """
    speeds = {name: facts["tflops"] for name, facts in participants.items() if "tflops" in facts}
    ours, plain = speeds.pop(OURS, None), speeds.pop(PLAIN, None)
    if among is not None:
        speeds = {name: speed for name, speed in speeds.items() if name in among}
    best = max(speeds, key=lambda name: speeds[name], default=None)
    found = {"best_peer": best, "ratio": ours / speeds[best] if ours and best else None}
    return found | {"of_plain": ours / plain} if ours and plain else found


def summary(found: list[Result]) -> Result:
    whole = [result for result in found if not result.get("needs_split_keys")]
    return {
        "rows": len(found),
        **_ratios(found),
        "without_split_keys": _ratios(whole) if len(whole) < len(found) else None,
        "of_plain": _ratios(found, "of_plain") if any("of_plain" in result for result in found) else None,
        "ours_not_ok": [r["name"] for r in found if r["participants"][OURS]["outcome"] != "ok"],
        "ours_by_torch": [r["name"] for r in found if r["choice"].get("served_by") == "torch"],
    }


def _ratios(found: list[Result], to: str = "ratio") -> Result:
    """Of the rows that have a peer; those where it is the faster one, the worst first."""
    ratios = {result["name"]: result[to] for result in found if result.get(to)}
    behind = sorted((name for name in ratios if ratios[name] < 1), key=lambda name: ratios[name])
    worst = min(ratios, key=lambda name: ratios[name], default=None)
    return {
        "compared": len(ratios),
        "ahead": sum(ratio > 1 for ratio in ratios.values()),
        "geometric_mean": statistics.geometric_mean(ratios.values()) if ratios else None,
        "worst": {"name": worst, "ratio": ratios[worst]} if worst else None,
        "behind": behind,
    }


# ---- host time ------------------------------------------------------------------------------------------------------


def host(others: Mapping[str, Prepare], target: Target) -> Result:
    """How long a call keeps the host, at a size whose kernel takes less than that. A CPU computes meanwhile."""
    import torch

    from fagen.ops.attention.problem import Problem

    device = "cuda" if target.is_gpu else "cpu"
    problem = Problem(dtype="bf16", head_dim=64, mask="causal", heads=4, seqlen_q=128)
    row = Row("host time", problem)
    found: Result = {"problem": problem.key, "participants": {}}
    with torch.no_grad():
        inputs = rows.make_inputs(row, target)
        calls: dict[str, timer.RoundRobin] = {}
        for name, prepare in {OURS: attention.ours_eager, **others}.items():
            facts, serve = prepared(prepare, row, inputs, device, name)
            found["participants"][name] = facts
            if serve is not None:
                calls[name] = _repeated(serve, [inputs], facts)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(_HOST_ROUNDS):
            for name, call in calls.items():
                samples[name].append(_host_seconds(call, device))
    for name, values in samples.items():
        found["participants"][name] |= {"microseconds": statistics.median(values) * 1e6}
    return found


def _host_seconds(call: timer.RoundRobin, device: str) -> float:
    with call.session():
        for _ in range(3):
            call()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(_HOST_CALLS):
            call()
        seconds = (time.perf_counter() - start) / _HOST_CALLS
        synchronize(device)
    return seconds
