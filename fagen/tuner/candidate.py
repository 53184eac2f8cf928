"""What workers do with a candidate: build it; verify it, then time it in stages; time finalists against each other."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fagen import families, measure
from fagen.errors import BuildError, LaunchError
from fagen.families import Config
from fagen.measure import Timing
from fagen.problem import Problem
from fagen.target import Target

if TYPE_CHECKING:
    from fagen.build import Artifact
    from fagen.kernel import Kernel

# bytes: a few registers of a loop that waits anyway (a producer warp's) cost nothing; the clock decides about those
SPILL_TOLERANCE = 64
OUTCOMES = ("ok", "constraint", "compile", "spill", "wrong", "crash", "timeout")
HOPELESS = 2.0  # times the best: given up after two calls
BEHIND = 1.15  # times the best: given up after a few
_VERIFY_SEQLEN = {"cpu": 512, "gpu": 2048}  # the largest of the problem itself, made small
_VERIFY_HEADS = 4
_MASK_BYTES = 1 << 30  # the largest dense mask that PyTorch's SDPA is given


@dataclass(frozen=True)
class Candidate:
    """A config of a family for a problem on a target."""

    family: str
    problem: Problem
    target: Target
    config: Config


@dataclass(frozen=True)
class Result:
    """What became of a candidate: exactly one of OUTCOMES, and what is known about it."""

    outcome: str
    reason: str = ""
    timing: Timing | None = None
    error: float = 0.0
    artifact: Artifact | None = None
    took: float = 0.0  # seconds that verifying and timing took
    fatal: bool = False  # the process that measured it must not go on


@dataclass(frozen=True)
class CompileRequest:
    candidate: Candidate
    timeout: float


@dataclass(frozen=True)
class MeasureRequest:
    candidate: Candidate
    artifact: Artifact
    seed: int = 0
    best: float = math.inf  # seconds of the best so far
    device: int = 0

    @property
    def target(self) -> Target:
        return self.candidate.target


@dataclass(frozen=True)
class FinalRequest:
    """Finalists of one problem under labels."""

    entries: dict[str, tuple[Candidate, Artifact]]
    seed: int = 0
    device: int = 0
    seconds: float = 2.0

    @property
    def target(self) -> Target:
        return next(iter(self.entries.values()))[0].target


@dataclass(frozen=True)
class Final:
    timings: dict[str, Timing]
    notes: dict[str, str] = field(default_factory=dict)  # why a label has no timing, or how SDPA was asked


TORCH = "torch"  # the label of PyTorch's SDPA, timed among the finalists

# ---- building -------------------------------------------------------------------------------------------------------


def compile_one(request: CompileRequest) -> Result:
    from fagen import build

    candidate, start = request.candidate, time.monotonic()
    family = families.get(candidate.family)
    try:
        artifact = build.build(family, candidate.problem, candidate.target, candidate.config, timeout=request.timeout)
    except BuildError as error:
        late = error.killed and time.monotonic() - start >= request.timeout
        return Result("timeout" if late else "compile", str(error))
    spilled = artifact.facts.get("spill_bytes", 0)
    if spilled > SPILL_TOLERANCE:
        registers = artifact.facts.get("registers", "?")
        return Result("spill", f"{spilled} bytes spilled at {registers} registers", artifact=artifact)
    if artifact.facts.get("serialized"):
        return Result("spill", "ptxas serialized the warpgroup's products", artifact=artifact)
    return Result("ok", artifact=artifact)


# ---- verifying and timing -------------------------------------------------------------------------------------------


def import_torch() -> None:
    """Before the first request, so that no candidate's time limit pays for it."""
    import torch

    torch.zeros(1)


def measure_any(request: MeasureRequest | FinalRequest) -> Result | Final:
    """The measuring worker's handler."""
    start = time.monotonic()
    with _device(request):
        if isinstance(request, FinalRequest):
            return final_round(request)
        return replace(measure_one(request), took=time.monotonic() - start)


@contextlib.contextmanager
def _device(request: MeasureRequest | FinalRequest) -> Iterator[None]:
    if request.target.is_gpu:
        import torch

        with torch.cuda.device(request.device):
            yield
    else:
        yield


def measure_one(request: MeasureRequest) -> Result:
    """Right before fast. After an error of the device the process is of no more use."""
    candidate = request.candidate
    try:
        kernel = _load(candidate, request.artifact)
        error, message = _verify(kernel, candidate)
        if message:
            return Result("wrong", message, error=error)
        timing = _time(kernel, request)
    except LaunchError as problem:
        return Result("crash", str(problem), fatal=candidate.target.is_gpu)
    except RuntimeError as problem:  # torch's, for whatever the device reported
        return Result("crash", str(problem).splitlines()[0], fatal=True)
    if timing is None:
        return Result("wrong", "part of the output was not written at the problem's own size", error=error)
    return Result("ok", timing=timing, error=error)


def _load(candidate: Candidate, artifact: Artifact) -> Kernel:
    from fagen import kernel

    return kernel.load(artifact, families.get(candidate.family), candidate.problem, candidate.config)


def check_problems(problem: Problem, target: Target) -> list[Problem]:
    """Sizes of the problem's static key at and off the edges of tiles, single rows, all rows hidden; then itself."""
    shapes = [(1, 1), (1, 129), (65, 63), (130, 257), (256, 256), (200, 77)]
    heads = [(4, 2), (2, 2), (3, 1)]
    bands = [(problem.window_left, problem.window_right), (17, 0), (40, 9), (-1, 5), (0, 0), (33, -1)]
    found = []
    for index, (seqlen_q, seqlen_k) in enumerate(shapes):
        q_heads, kv_heads = heads[index % len(heads)]
        left, right = bands[index] if problem.mask == "window" else bands[0]
        sizes = {"batch": 2, "heads": q_heads, "kv_heads": kv_heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        found.append(problem.replace(**sizes, window_left=left, window_right=right))
    most = _VERIFY_SEQLEN["gpu" if target.is_gpu else "cpu"]
    group = min(problem.heads // problem.kv_heads, _VERIFY_HEADS)
    lengths = {"seqlen_q": min(problem.seqlen_q, most), "seqlen_k": min(problem.seqlen_k, most)}
    return [*found, problem.replace(batch=1, heads=group, kv_heads=1, **lengths)]


@functools.lru_cache(maxsize=64)
def _check_inputs(problem: Problem, where: str, varied: bool) -> dict[str, Any]:
    return measure.make_inputs(problem, where, seed=1, varied=varied)


def _verify(kernel: Kernel, candidate: Candidate) -> tuple[float, str]:
    """The largest error, and what is wrong, if anything."""
    where, worst = "cuda" if candidate.target.is_gpu else "cpu", 0.0
    problems = check_problems(candidate.problem, candidate.target)
    for problem in problems:
        inputs = _check_inputs(problem, where, problem is not problems[-1])
        inputs["out"].fill_(math.nan)
        inputs["lse"].fill_(math.nan)
        measure.launcher(kernel, inputs, lse=True)()
        _synchronize(where)
        verdict = measure.check(inputs)
        worst = max(worst, verdict.error)
        if not verdict:
            return worst, f"{problem.size_key}: {verdict.message}"
    return worst, ""


def _synchronize(where: str) -> None:
    if where == "cuda":
        import torch

        torch.cuda.synchronize()


@functools.lru_cache(maxsize=1)
def _timing_inputs(problem: Problem, target: Target, seed: int) -> list[dict[str, Any]]:
    return [measure.make_inputs(problem, target, seed + i) for i in range(measure.input_sets(problem, target))]


def _time(kernel: Kernel, request: MeasureRequest) -> Timing | None:
    """Staged: one call, a few, many; a candidate that falls behind is given up early. None: NaN was left."""
    import torch

    candidate = request.candidate
    sets = _timing_inputs(candidate.problem, candidate.target, request.seed)
    device = "cuda" if candidate.target.is_gpu else "cpu"
    call = measure.InTurn([measure.launcher(kernel, inputs) for inputs in sets])
    sets[0]["out"].fill_(math.nan)
    call()
    _synchronize(device)
    if not bool(torch.isfinite(sets[0]["out"]).all()):
        return None
    once = measure.time_once(call, device=device)
    if once > HOPELESS * request.best:  # once more: the first may have been disturbed
        once = min(once, measure.time_once(call, device=device))
    if once > HOPELESS * request.best:
        return Timing(once, 0.0, 1)
    few = measure.time_calls({"it": call}, device=device, rounds=3, max_seconds=1.0)["it"]
    if few.median > BEHIND * request.best:
        return few
    return measure.time_calls({"it": call}, device=device, rounds=15, min_seconds=0.05, max_seconds=1.0)["it"]


# ---- the final round ------------------------------------------------------------------------------------------------


def final_round(request: FinalRequest) -> Final:
    """Finalists and PyTorch's SDPA, interleaved in this process."""
    first = next(iter(request.entries.values()))[0]
    sets = _timing_inputs(first.problem, first.target, request.seed)
    calls: dict[str, measure.Call] = {}
    for label, (candidate, artifact) in request.entries.items():
        kernel = _load(candidate, artifact)
        calls[label] = measure.InTurn([measure.launcher(kernel, inputs) for inputs in sets])
    peers, how = [sdpa_call(first.problem, inputs) for inputs in sets], "not possible with this mask"
    if peers[0] is not None:
        try:
            peers[0][0]()
            calls[TORCH], how = measure.InTurn([peer[0] for peer in peers if peer]), peers[0][1]
        except RuntimeError as error:
            how = str(error).splitlines()[0]
    device = "cuda" if first.target.is_gpu else "cpu"
    timings = measure.time_calls(
        calls, device=device, rounds=30, min_seconds=request.seconds / 2, max_seconds=request.seconds
    )
    return Final(timings, {TORCH: how})


def sdpa_call(problem: Problem, inputs: dict[str, Any]) -> tuple[Callable[[], object], str] | None:
    """PyTorch's SDPA on the same inputs and how it is asked, or None where it cannot do this."""
    import torch

    from fagen import masks

    if problem.softcap or problem.alibi:
        return None
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    arguments: dict[str, Any] = {"enable_gqa": problem.heads != problem.kv_heads}
    band = (problem.window_left, problem.window_right)
    how = "no mask"
    if problem.mask == "causal" and problem.seqlen_q == problem.seqlen_k:
        arguments["is_causal"], how = True, "is_causal"
    elif problem.mask != "none":
        planes = problem.batch * problem.heads if problem.mask == "intervals" else 1
        if planes * problem.seqlen_q * problem.seqlen_k > _MASK_BYTES:
            return None
        arguments["attn_mask"] = masks.dense(
            problem.seqlen_q, problem.seqlen_k, window=band, intervals=inputs["intervals"], kind=problem.intervals,
            device=q.device,
        )  # fmt: skip
        how = "attn_mask"
    call = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, **arguments)
    return call, how
