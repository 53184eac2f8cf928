"""The clock, and the inputs that are timed and verified.

Times are medians over interleaved rounds: every candidate once a round, the order turned by one each round, so that a
drift of clocks or temperature falls on all alike. GPU samples are CUDA graph replays where a call can be captured,
else CUDA events around eager calls; the CPU has perf_counter.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import truediv
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from fagen import masks, verify
from fagen.problem import INTERVAL_KINDS, TORCH_DTYPES, Problem
from fagen.target import Target
from fagen.verify import Semantics

if TYPE_CHECKING:
    import torch

    from fagen.kernel import Kernel

Call = Callable[[], object]

SOFTCAP = 30.0
DOCUMENTS = 4  # a sequence, in the inputs of the intervals mask
LEAST_GAIN = 0.005  # below this no difference counts, however quiet the machine was
_SAMPLE_SECONDS = {"cpu": 2e-4, "cuda": 1e-3}  # calls are repeated in a sample until it lasts this long
_MOST_CALLS = 256  # in a sample
_FEW_CALLS = 8  # that hide the start of a graph
_MOST_SETS = 32  # of inputs
_MOST_BYTES = 2 << 30  # of all input sets together
GUARD_BYTES = 4096  # before and behind each output
_SENTINEL = -1536.0  # what nobody may overwrite; exact in every dtype
_SAMPLED_HEADS, _SAMPLED_BLOCKS = 4, 4  # that are checked at a problem's own size
LOUD = 0.05  # a spread above this part of the median is worth another try


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: median, half the interquartile range, how many samples."""

    median: float
    spread: float
    samples: int

    @property
    def uncertainty(self) -> float:
        """Standard error of the median, were the samples normal."""
        return 1.86 * self.spread / math.sqrt(self.samples)

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        if len(samples) < 2:
            return cls(samples[0], 0.0, 1)
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(middle, (high - low) / 2, len(samples))


def quietest(measure: Callable[[], Timing], tries: int = 3, seconds: float = 1.5) -> tuple[Timing, int]:
    """A timing of small spread, else the quietest of `tries` more begun within `seconds`; and how many more."""
    best, again, until = measure(), 0, time.monotonic() + seconds
    while best.spread > LOUD * best.median and again < tries and time.monotonic() < until:
        best = min(best, measure(), key=lambda t: t.spread / t.median)
        again += 1
    return best, again


def beats(a: Timing, b: Timing) -> bool:
    """Whether a is faster than b by more than the noise of both."""
    noise = 2 * math.hypot(a.uncertainty, b.uncertainty)
    return b.median - a.median > max(noise, LEAST_GAIN * b.median)


def lost(seconds: float, spread: float, other: float) -> bool:
    """Whether a time that was kept is longer than another of the same round, beyond its noise; 0: there is no other."""
    return 0 < other < seconds - max(spread, LEAST_GAIN * seconds)


# ---- inputs ---------------------------------------------------------------------------------------------------------


class Inputs(dict[str, Any]):
    """The arguments of a call by name. Remembers what no kernel may change."""

    def __init__(self) -> None:
        super().__init__()
        self._guarded: dict[str, torch.Tensor] = {}

    def guard(self, name: str, shape: tuple[int, ...], shown: int, dtype: torch.dtype, device: torch.device) -> None:
        """An output full of NaN, with sentinels before, behind, and between rows that show less than they hold."""
        import torch

        guard = GUARD_BYTES // dtype.itemsize
        memory = torch.full((math.prod(shape) + 2 * guard,), _SENTINEL, dtype=dtype, device=device)
        self[name] = memory[guard:-guard].view(shape)[..., :shown].fill_(math.nan)
        self._guarded[name] = memory  # a tensor made in inference mode, or inside an op, does not know its base

    def seal(self) -> Inputs:
        self._sums = {name: _bits(self[name]) for name in ("q", "k", "v")}
        return self

    def damage(self) -> str:
        """What a kernel wrote where it must not: into q, k or v, or beside its outputs. Empty if it did not."""
        changed = [f"wrote into its input {name}" for name, bits in self._sums.items() if _bits(self[name]) != bits]
        beside = [f"wrote outside of {n}" for n, memory in self._guarded.items() if not _intact(self[n], memory)]
        return " and ".join(changed + beside)


def _bits(t: torch.Tensor) -> int:
    """Of all bits of a tensor's memory, whatever they mean; sums of integers have no order."""
    import torch

    memory = t.new_empty(0).set_(t.untyped_storage()).view(torch.uint8)
    whole = memory.numel() // 8 * 8
    return int(memory[:whole].view(torch.int64).sum()) + int(memory[whole:].sum())


def _intact(t: torch.Tensor, memory: torch.Tensor) -> bool:
    guard = GUARD_BYTES // t.element_size()
    between = memory[guard:-guard].view(*t.shape[:-1], -1)[..., t.shape[-1] :]
    return all(bool((part == _SENTINEL).all()) for part in (memory[:guard], memory[-guard:], between))


def make_inputs(problem: Problem, where: Target | torch.device | str, seed: int = 0, *, varied: bool = False) -> Inputs:
    """Random normal q, k, v in bshd, `out` and `lse` full of NaN, and what the mask and features need.

    `varied` gives each kv head its own intervals, with holes where the kind can have them; for verification.
    """
    import torch

    device = torch.device(("cuda" if where.is_gpu else "cpu") if isinstance(where, Target) else where)
    dtype = getattr(torch, TORCH_DTYPES[problem.dtype])
    random = torch.Generator(device).manual_seed(seed)
    p = problem

    def shape(length: int, heads: int, dim: int) -> tuple[int, ...]:
        # a row of one element more than it shows starts anywhere
        return p.batch, length, heads, dim if p.aligned else dim + 1

    def tensor(length: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(shape(length, heads, dim), generator=random, dtype=dtype, device=device)[..., :dim]

    inputs = Inputs()
    inputs |= {
        "q": tensor(p.seqlen_q, p.heads, p.head_dim),
        "k": tensor(p.seqlen_k, p.kv_heads, p.head_dim),
        "v": tensor(p.seqlen_k, p.kv_heads, p.head_dim_v),
        "intervals": None,
        "alibi_slopes": None,
        "layout": "bshd",
        "semantics": Semantics((p.window_left, p.window_right), p.intervals, SOFTCAP if p.softcap else 0.0, None),
    }
    inputs.guard("out", shape(p.seqlen_q, p.heads, p.head_dim_v), p.head_dim_v, dtype, device)
    inputs.guard("lse", (p.batch, p.heads, p.seqlen_q), p.seqlen_q, torch.float32, device)
    if p.intervals:
        inputs["intervals"] = documents(p, seed, varied=varied).to(device)
    if p.alibi:
        slopes = [2.0 ** (-8.0 * (head + 1) / p.heads) for head in range(p.heads)]
        inputs["alibi_slopes"] = (
            torch.tensor(slopes, dtype=torch.float32, device=device).expand(p.batch, -1).contiguous()
        )
    return inputs.seal()


def launcher(kernel: Kernel, inputs: dict[str, Any], *, lse: bool = False) -> Call:
    """The kernel on these inputs, to be called again and again.

    A GPU launch is prepared anew each time, since a graph captures it on a stream of its own.
    """
    s = inputs["semantics"]
    tensors = [inputs[name] for name in ("q", "k", "v", "out")] + ([inputs["lse"]] if lse else [])
    options = {name: inputs[name] for name in ("intervals", "alibi_slopes", "layout")}
    options |= {"window": s.window, "scale": s.scale, "softcap": s.softcap}
    if inputs["q"].is_cuda:
        return functools.partial(kernel.launch, *tensors, **options)
    return kernel.bind(*tensors, **options)


def check(inputs: dict[str, Any], *, lse: bool = True) -> verify.Verdict:
    """Whether what a kernel left in `out` and `lse` is right."""
    return verify.check(
        inputs["out"], inputs["lse"] if lse else None, inputs["q"], inputs["k"], inputs["v"], inputs["semantics"],
        intervals=inputs["intervals"], alibi=inputs["alibi_slopes"], layout=inputs["layout"],
    )  # fmt: skip


def check_sample(inputs: dict[str, Any], seed: int = 0, *, lse: bool = False) -> verify.Verdict:
    """Whether `out` (and `lse`, if asked) is right in a few heads and blocks of rows, first and last among them.

    For sizes at which to check all of it would take longer than to time it.
    """
    random = Random(seed)
    batch, rows, heads, _ = inputs["q"].shape
    group = heads // inputs["k"].shape[2]
    planes = batch * heads
    chosen = {0, planes - 1, *(random.randrange(planes) for _ in range(_SAMPLED_HEADS - 2))}
    last = (rows - 1) // verify.ROW_BLOCK
    blocks = {0, last, *(random.randint(0, last) for _ in range(_SAMPLED_BLOCKS - 2))}
    slices = [slice(i * verify.ROW_BLOCK, min(rows, (i + 1) * verify.ROW_BLOCK)) for i in sorted(blocks)]
    worst = verify.Verdict(True, 0.0, 0.0)
    for plane in sorted(chosen):
        b, h = divmod(plane, heads)
        mine, shared = (slice(b, b + 1), slice(None), slice(h, h + 1)), slice(h // group, h // group + 1)
        theirs = (mine[0], slice(None), shared)
        intervals, alibi = inputs["intervals"], inputs["alibi_slopes"]
        if intervals is not None:
            intervals = intervals[mine[0], shared] if intervals.shape[1] > 1 else intervals[mine[0]]
        verdict = verify.check(
            inputs["out"][mine], inputs["lse"][mine[0], mine[2]] if lse else None,
            inputs["q"][mine], inputs["k"][theirs], inputs["v"][theirs],
            inputs["semantics"], intervals=intervals, alibi=None if alibi is None else alibi[mine[0], mine[2]],
            layout=inputs["layout"], rows=slices,
        )  # fmt: skip
        if not verdict:
            return dataclasses.replace(verdict, message=f"sample of batch {b} head {h}: {verdict.message}")
        worst = max(worst, verdict, key=lambda v: v.ratio)
    return worst


def documents(problem: Problem, seed: int, *, varied: bool) -> torch.Tensor:
    """Intervals of packed documents of random lengths, in the problem's kind: int32 (batch, 1 or kv_heads, Sk, n)."""
    import torch

    p, random = problem, torch.Generator().manual_seed(seed)
    planes = p.batch * (p.kv_heads if varied else 1)
    cuts = torch.randint(1, max(2, p.seqlen_k), (planes, min(DOCUMENTS, p.seqlen_k) - 1), generator=random)
    ids = (torch.arange(p.seqlen_k)[None, :, None] >= cuts[:, None, :]).sum(-1)
    bounds = masks.from_documents(ids, causal=False)[:, 0] - (p.seqlen_k - p.seqlen_q)
    end, start = bounds.clamp(0, p.seqlen_q).unbind(-1)
    bottom = torch.full_like(end, p.seqlen_q)
    columns = {"LTS": end, "LTE": (end + bottom + 1) // 2 if varied else bottom}
    columns |= {"UTS": start // 2 if varied else torch.zeros_like(start), "UTE": start}
    chosen = torch.stack([columns[name] for name in INTERVAL_KINDS[p.intervals]], dim=-1).to(torch.int32)
    return chosen.reshape(p.batch, -1, *chosen.shape[1:]).contiguous()


def input_bytes(problem: Problem) -> int:
    p = problem
    of_q = p.batch * p.heads * p.seqlen_q * (p.head_dim + p.head_dim_v)
    return p.itemsize * (of_q + p.batch * p.kv_heads * p.seqlen_k * (p.head_dim + p.head_dim_v))


def input_sets(problem: Problem, target: Target) -> int:
    """How many sets of inputs to take in turn, so that a GPU's L2 does not hold what the next call reads."""
    size = input_bytes(problem)
    if not target.is_gpu or size >= 3 * target.l2:
        return 1
    return max(1, min(-(-3 * target.l2 // size), _MOST_SETS, _MOST_BYTES // size))


class InTurn:
    """One call that goes through several, one at a time: the same kernel on each set of inputs."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.count, self._turn = len(calls), itertools.cycle(calls)

    def __call__(self) -> object:
        return next(self._turn)()


# ---- the clock ------------------------------------------------------------------------------------------------------


class Sampler(Protocol):
    """Takes the seconds of one call, out of `calls` of them."""

    calls: int

    def sample(self) -> float: ...


class _CpuSampler:
    def __init__(self, call: Call) -> None:
        self.call, self.calls = call, 1

    def sample(self) -> float:
        start = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        return (time.perf_counter() - start) / self.calls


class _GpuSampler:
    """`calls` calls in one graph replay where the call can be captured, else eagerly, between two events."""

    def __init__(self, call: Call) -> None:
        import torch

        self.call, self.calls = call, 1
        self.graph: torch.cuda.CUDAGraph | None = None
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def capture(self) -> None:
        """A graph of `calls` calls. Whatever cannot be captured is timed eagerly."""
        import torch

        graph = torch.cuda.CUDAGraph()
        try:
            with warnings.catch_warnings(), torch.cuda.graph(graph):
                warnings.simplefilter("error")  # torch only warns of a graph that captured nothing
                for _ in range(self.calls):
                    self.call()
        except (RuntimeError, Warning):
            torch.cuda.synchronize()
            return
        self.graph = graph

    def sample(self) -> float:
        import torch

        torch.cuda.synchronize()
        self.start.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            for _ in range(self.calls):
                self.call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3 / self.calls


def time_once(call: Call, *, device: torch.device | str) -> float:
    """Seconds of one call, roughly. Short calls of a GPU are captured, so that the host's time does not count."""
    sampler = sampler_of(call, device)
    seconds = sampler.sample()
    if isinstance(sampler, _GpuSampler) and seconds < _SAMPLE_SECONDS["cuda"]:
        sampler.calls = max(getattr(call, "count", 1), _FEW_CALLS)
        sampler.capture()
        seconds = sampler.sample()
    return seconds


def sampler_of(call: Call, device: torch.device | str) -> Sampler:
    return _GpuSampler(call) if str(device).startswith("cuda") else _CpuSampler(call)


def prepared(calls: Mapping[str, Call], device: torch.device | str) -> dict[str, Sampler]:
    """What times each of these calls: warm, and of so many calls a sample that it lasts long enough."""
    least = _SAMPLE_SECONDS["cuda" if str(device).startswith("cuda") else "cpu"]
    samplers = {name: sampler_of(call, device) for name, call in calls.items()}
    for name, sampler in samplers.items():
        sampler.sample()  # warm
        wanted = math.ceil(least / max(sampler.sample(), 1e-9))
        sampler.calls = max(getattr(calls[name], "count", 1), min(_MOST_CALLS, wanted))
        if isinstance(sampler, _GpuSampler):
            sampler.capture()
            sampler.sample()
    return samplers


def time_calls(
    calls: Mapping[str, Call],
    *,
    device: torch.device | str,
    rounds: int = 7,
    min_seconds: float = 0.0,
    max_seconds: float = math.inf,
) -> dict[str, Timing]:
    """Time calls against each other: at least `rounds` rounds, more until `min_seconds` are spent in all.

    `max_seconds` ends it earlier, but not before three rounds.
    """
    samplers = prepared(calls, device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, start = list(calls), time.perf_counter()
    for turn in itertools.count():
        spent = time.perf_counter() - start
        if (turn >= rounds and spent >= min_seconds) or (turn >= 3 and spent >= max_seconds):
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(samplers[name].sample())
    return against_each_other(samples)


def against_each_other(samples: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """The timings of calls that took turns. What slowed all of a round, as a clock that drifts, is not their noise."""
    several = len(samples)
    if several == 1:
        return {name: Timing.of(values) for name, values in samples.items()}
    medians = [statistics.median(values) for values in samples.values()]
    level = [statistics.median(map(truediv, times, medians)) for times in zip(*samples.values(), strict=True)]
    own = math.sqrt(several / (several - 1))  # each has a part in the level
    steady = {name: Timing.of(list(map(truediv, values, level))) for name, values in samples.items()}
    return {name: dataclasses.replace(timing, spread=own * timing.spread) for name, timing in steady.items()}
