"""What workers do with a candidate: build it; verify it, then time it in stages; time finalists against each other."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from fagen import ops
from fagen.errors import BuildError, CacheError, LaunchError
from fagen.ops.base import Problem
from fagen.ops.inputs import Inputs, input_sets
from fagen.runtime.kernel import launcher, load
from fagen.target import Target
from fagen.timing import nvml, sustained, timer
from fagen.timing.timer import Timing
from fagen.tuner.messages import (
    TORCH,
    Alive,
    CompileRequest,
    Final,
    FinalRequest,
    MeasureRequest,
    Probe,
    ReferenceCandidate,
    Request,
    Result,
)
from fagen.verify.checks import Damage, kept_inputs, synchronize, verify, where

# bytes: a few registers of a loop that waits anyway (a producer warp's) cost nothing; the clock decides about those
SPILL_TOLERANCE = 64
HOPELESS = 2.0  # times the best: given up after two calls
BEHIND = 1.15  # times the best: given up after a few
_COOLING_SECONDS = 0.5  # before what was timed on a slowed down GPU is timed again
_LOAD_SECONDS = 5e-3  # of calls that are under way while the state of the GPU is read
_FINAL_TRIES = 3

# ---- building -------------------------------------------------------------------------------------------------------


def compile_one(request: CompileRequest) -> Result:
    from fagen.build import cache

    start = time.monotonic()
    try:
        artifact = cache.build(request.spec, timeout=request.timeout)
    except CacheError:
        raise  # the disk's fault, and every other candidate's too
    except BuildError as error:
        late = error.killed and time.monotonic() - start >= request.timeout
        return Result("timeout" if late else "compile", str(error), killed=error.killed and not late)
    reason = refused_facts(artifact.facts)
    if reason:
        return Result("spill", reason, artifact=artifact)
    return Result("ok", artifact=artifact)


def refused_facts(facts: dict[str, Any]) -> str:
    """Why a kernel is not worth running by what ptxas says of it; "" if it may be."""
    for name, function in facts.get("functions", {}).items():
        spilled = function.get("spill_bytes", 0)
        if spilled > SPILL_TOLERANCE:
            return f"{name}: {spilled} bytes spilled at {function.get('registers', '?')} registers"
    return "ptxas serialized the warpgroup's products" if facts.get("serialized") else ""


# ---- verifying and timing -------------------------------------------------------------------------------------------


def import_torch() -> None:
    """Before the first request, so that no candidate's time limit pays for it."""
    import torch

    torch.zeros(1)


def measure_any(request: Request) -> Result | Final | Alive:
    """The measuring worker's handler."""
    start = time.monotonic()
    with _device(request):
        if isinstance(request, Probe):
            return probe(request)
        if isinstance(request, FinalRequest):
            return final_round(request)
        return replace(measure_one(request), took=time.monotonic() - start)


def probe(request: Probe) -> Alive:
    """A product on the device, waited for; raises what the device reports."""
    import torch

    ones = torch.ones(64, 64, device=where(request.target))
    if float((ones @ ones).sum()) != 64.0**3:
        raise RuntimeError("the device multiplies ones wrongly")
    limits, throttled = dict[str, float](), ""
    if request.limits and request.target.is_gpu:
        from fagen.timing.machine import Machine

        with contextlib.suppress(torch.cuda.OutOfMemoryError):  # a GPU that others use as well
            rates = Machine(request.target).sample("start")
            throttled = rates.get("throttled", "")
            limits = {"tflops": round(rates["tflops"], 1), "gbs": round(rates["gbps"], 1)}
        torch.cuda.empty_cache()
    return Alive(limits, throttled)


@contextlib.contextmanager
def _device(request: Request) -> Iterator[None]:
    if request.target.is_gpu:
        import torch

        with torch.cuda.device(request.device):
            yield
    else:
        yield


def measure_one(request: MeasureRequest) -> Result:
    """Right before fast. After an error of the device, or stray writes, the process is of no more use."""
    spec, error = request.spec, 0.0
    try:
        kernel = load(request.artifact, spec)
        sets = functools.partial(timing_inputs, spec.problem, spec.target, request.seed)
        error, message = verify(kernel, spec.problem, spec.target, lambda: sets()[0], kept_inputs)
        if message:
            return Result("wrong", message, error=error)
        call = timer.RoundRobin([launcher(kernel, inputs) for inputs in sets()])
        return replace(_time(call, request, _beside(request)), error=error)
    except Damage as damage:
        return Result("wrong", str(damage), error=error, fatal=True)
    except LaunchError as problem:
        return Result("crash", str(problem), fatal=spec.target.is_gpu)
    except RuntimeError as problem:  # torch's, for whatever the device reported
        return Result("crash", str(problem).splitlines()[0], fatal=True)


Clock = Callable[..., Timing]  # of what is to be timed, with rounds and seconds as measure.time_calls takes them


def _beside(request: MeasureRequest) -> Clock:
    """A clock that goes by the anchor, where there is one."""
    device, anchor = where(request.target), request.anchor
    if anchor is None:
        _anchored.cache_clear()  # with the inputs of another problem
        return lambda call, **how: timer.time_calls({"it": call}, device=device, **how)["it"]
    known = _anchored(anchor, request.seed)

    def clock(call: timer.Call, **how: Any) -> Timing:
        timings = timer.time_calls({"it": call, "anchor": known}, device=device, **how)
        it, scale = timings["it"], anchor.seconds / timings["anchor"].median
        return Timing(it.median * scale, it.spread * scale, it.samples)

    return clock


@functools.lru_cache(maxsize=1)
def _anchored(anchor: ReferenceCandidate, seed: int) -> timer.RoundRobin:
    kernel = load(anchor.artifact, anchor.spec)
    sets = timing_inputs(anchor.spec.problem, anchor.spec.target, seed)
    return timer.RoundRobin([launcher(kernel, inputs) for inputs in sets])


def _time(call: timer.RoundRobin, request: MeasureRequest, clock: Clock) -> Result:
    """Staged: one call, a few, many; a candidate that falls behind is given up early."""
    device = where(request.target)
    once = timer.time_once(call, device=device)
    if once > HOPELESS * request.best:  # once more: the first may have been disturbed
        once = min(once, timer.time_once(call, device=device))
    if once > HOPELESS * request.best:
        return Result("ok", timing=Timing(once, 0.0, 1))
    few = clock(call, rounds=3, max_seconds=1.0)
    if few.median > BEHIND * request.best:
        return Result("ok", timing=few)
    timing, state, again = _steadily(call, request.target, clock)
    return Result("ok", timing=timing, state=state, remeasured=again, whole=True)


def _steadily(call: Callable[[], object], target: Target, clock: Clock) -> tuple[Timing, dict[str, Any], int]:
    """Many calls, again where they scatter, and once more where the GPU was slowed down meanwhile; how it was."""

    def many() -> Timing:
        return clock(call, rounds=15, min_seconds=0.05, max_seconds=1.0)

    timing, again = timer.quietest(many)
    state = _state(call, timing.median, target)
    if nvml.SPOILING.isdisjoint(state.get("throttle", ())):
        return timing, state, again
    time.sleep(_COOLING_SECONDS)
    other = many()
    after = _state(call, other.median, target)
    if nvml.SPOILING.isdisjoint(after.get("throttle", ())) or other.median < timing.median:
        timing, state = other, after
    return timing, state, again + 1


def _state(call: Callable[[], object], seconds: float, target: Target) -> dict[str, Any]:
    """Of the GPU while it runs this."""
    if not target.is_gpu:
        return {}
    for _ in range(max(1, min(256, int(_LOAD_SECONDS / seconds)))):
        call()
    state = nvml.current()
    synchronize("cuda")
    return state


# ---- the final round ------------------------------------------------------------------------------------------------


def final_round(request: FinalRequest) -> Final:
    """Finalists and PyTorch on the same calls, each in bouts beside the first finalist, in this process."""
    first = next(iter(request.entries.values()))[0]
    sets = timing_inputs(first.problem, first.target, request.seed)
    calls: dict[str, timer.Call] = {}
    for label, (spec, artifact) in request.entries.items():
        kernel = load(artifact, spec)
        calls[label] = timer.RoundRobin([launcher(kernel, inputs) for inputs in sets])
    ask = ops.get(first.problem.op).calls().torch_peer
    (peer, how), *others = (ask(inputs.call) for inputs in sets)
    if peer is not None:
        try:
            peer()
            calls[TORCH] = timer.RoundRobin([peer, *(other for other, _ in others if other is not None)])
        except RuntimeError as error:
            how = str(error).splitlines()[0]
    rounds: list[tuple[float, dict[str, Timing], dict[str, Any]]] = []
    while not rounds or (min(rounds, key=_noise)[0] > timer.NOISY and len(rounds) < _FINAL_TRIES):
        timings = sustained.time_calls(
            calls, next(iter(calls)), device=where(first.target), seconds=request.seconds, seed=len(rounds)
        )
        ours = [timing for label, timing in timings.items() if label != TORCH]
        noise = statistics.median(timing.spread / timing.median for timing in ours)
        best = min(request.entries, key=lambda label: timings[label].median)
        state = _state(calls[best], timings[best].median, first.target)
        if not nvml.SPOILING.isdisjoint(state.get("throttle", ())):
            noise = math.inf
            time.sleep(_COOLING_SECONDS)
        rounds.append((noise, timings, state))
    _, timings, state = min(rounds, key=_noise)
    return Final(timings, {TORCH: how}, state, len(rounds))


def _noise(round_: tuple[float, dict[str, Timing], dict[str, Any]]) -> float:
    return round_[0]


@functools.lru_cache(maxsize=1)
def timing_inputs(problem: Problem, target: Target, seed: int) -> list[Inputs]:
    make = ops.get(problem.op).calls().inputs
    return [make(problem, where(target), seed + i, False) for i in range(input_sets(problem, target))]
