"""How long calls keep the host while sizes change: prompts of random lengths, a cache that grows, batches that change.

    python benchmarks/stalls.py --peers sdpa,fa3 --fa3 _C.so --out benchmarks/stalls.json

Every size is new to the process, and the device is idle at each call, so that a time is the host's alone (on a CPU the
computation is in it). Before that the kernels of all lengths up to the longest are built and loaded (`fagen.warmup`;
--no-warmup leaves that out). A child process with an empty cache tells what the first call ever takes, once for each
FAGEN_BUILD. Times in seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fagen
from fagen.bench import peers
from fagen.bench.rows import Row
from fagen.build import cache
from fagen.build.job import Job
from fagen.cli import arguments
from fagen.db.record import environment, now
from fagen.notices import emit_json, say
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.problem import TORCH_DTYPES, Problem
from fagen.ops.inputs import Inputs
from fagen.target import Target

Call = Callable[[Inputs], object]

STALL = 0.05  # seconds of a call that a user of a server notices
SHAPES = {  # of the problem, and the longest sequence
    "gpu": (Problem(dtype="bf16", head_dim=128, mask="causal", heads=32, kv_heads=8), 8192),
    "cpu": (Problem(dtype="fp32", head_dim=16, mask="causal", heads=2, kv_heads=1), 128),
}


# ---- sizes ----------------------------------------------------------------------------------------------------------


def sizes(scenario: str, count: int, longest: int, draw: random.Random) -> list[tuple[int, int, int]]:
    """(batch, rows, keys) of each call, all different."""
    if scenario == "cache":
        start = max(1, longest - count)
        return [(1, 1, start + n) for n in range(min(count, longest - start + 1))]
    found: dict[tuple[int, int, int], None] = {}
    for _ in range(20 * count):
        batch = 1 if scenario == "prompts" else draw.randint(1, 16)
        length = draw.randint(1, longest if scenario == "prompts" else max(1, longest // 8))
        found[batch, length, length] = None
        if len(found) == count:
            break
    return list(found)


def inputs(p: Problem, target: Target, some: list[tuple[int, int, int]]) -> Iterator[Inputs]:
    """Tensors of each size, cut out of ones that hold the largest: what the caller allocates is not timed."""
    device, dtype = "cuda" if target.is_gpu else "cpu", getattr(torch, TORCH_DTYPES[p.dtype])
    most = [max(size[i] for size in some) for i in range(3)]
    make = lambda rows, heads: torch.randn(most[0], rows, heads, p.head_dim, device=device, dtype=dtype)  # noqa: E731
    q, k, v = make(most[1], p.heads), make(most[2], p.kv_heads), make(most[2], p.kv_heads)
    for batch, rows, keys in some:
        yield Inputs(AttentionCall(q[:batch, :rows], k[:batch, :keys], v[:batch, :keys], window=(-1, 0)), {})


# ---- who is called --------------------------------------------------------------------------------------------------


def ours(i: Inputs) -> object:
    return fagen.attention(i.call.q, i.call.k, i.call.v, causal=True)


def sdpa(i: Inputs) -> object:
    q, k, v = i.call.bhsd()
    square = q.shape[2] == k.shape[2]  # a single row sees all keys
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=square, enable_gqa=True)


def others(names: list[str], problem: Problem, target: Target, paths: dict[str, Path]) -> tuple[dict[str, Call], dict]:
    """How each is called, and why others are not. What a peer prepares does not depend on sizes."""
    found: dict[str, Call] = {"sdpa": sdpa} if "sdpa" in names else {}
    here, absent = peers.load([n for n in names if n != "sdpa"], "cuda" if target.is_gpu else "cpu", paths)
    nothing = torch.empty(0, device="cuda" if target.is_gpu else "cpu")
    given = Inputs(AttentionCall(nothing, nothing, nothing), {})  # only its device is asked for
    for name, loaded in here.items():
        try:
            found[name] = loaded.prepare(Row("stalls", problem), given)
        except peers.Cannot as error:
            absent[name] = str(error)
    return found, absent


# ---- measuring ------------------------------------------------------------------------------------------------------


def synchronize(target: Target) -> None:
    if target.is_gpu:
        torch.cuda.synchronize()


def timed(call: Call, given: Iterator[Inputs], target: Target) -> list[float]:
    seconds = []
    for tensors in given:
        synchronize(target)
        start = time.perf_counter()
        call(tensors)
        seconds.append(time.perf_counter() - start)
    synchronize(target)
    return seconds


def facts(seconds: list[float]) -> dict[str, float | int]:
    first, rest = seconds[0], sorted(seconds[1:]) or [seconds[0]]
    return {
        "calls": len(seconds), "first": first, "median": statistics.median(rest),
        "p99": rest[min(len(rest) - 1, int(0.99 * len(rest)))], "worst": rest[-1],
        "over_50_ms": sum(value > STALL for value in seconds),
    }  # fmt: skip


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of what this process compiles meanwhile. Others may fill the same cache."""
    names: list[str] = []
    compile_job = cache._compile

    def counted(job: Job, *args: Any) -> Path:
        names.append(job.name)
        return compile_job(job, *args)

    cache._compile = counted
    try:
        yield names
    finally:
        cache._compile = compile_job


def measure(args: argparse.Namespace, problem: Problem, longest: int, target: Target) -> dict[str, Any]:
    calls, absent = others(args.peers, problem, target, {"fa3": args.fa3} if args.fa3 else {})
    data: dict[str, Any] = {"absent": absent, "scenarios": {}}
    if not args.no_warmup:
        start = time.perf_counter()
        data["warmup"] = {"kernels": fagen.warmup([problem], target, max_seqlen=longest)}
        data["warmup"]["seconds"] = time.perf_counter() - start
    gc.collect()
    gc.disable()
    with compilations() as compiled:
        for scenario in ("prompts", "cache", "batches"):
            draw = random.Random(f"{args.seed}/{scenario}")
            some = sizes(scenario, args.calls, longest, draw)
            found = data["scenarios"][scenario] = {}
            for name, call in {"fagen": ours, **calls}.items():
                found[name] = facts(timed(call, inputs(problem, target, some), target))
    gc.enable()
    data["compiled_after_warmup"] = len(compiled)
    return data


# ---- the first call ever --------------------------------------------------------------------------------------------


def first(args: argparse.Namespace) -> dict[str, float]:
    """In a process and a cache of its own; of each FAGEN_BUILD that calls can be made with."""
    found = {}
    for mode in ("wait", "background"):
        with tempfile.TemporaryDirectory() as cache:
            variables = {**os.environ, "FAGEN_CACHE_DIR": cache, "FAGEN_BUILD": mode}
            command = [sys.executable, __file__, "--child", *(["--target", args.target] if args.target else [])]
            done = subprocess.run(command, env=variables, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"the first call failed with FAGEN_BUILD={mode}:\n{done.stderr}")
            found[mode] = float(done.stdout)
    return found


def child(problem: Problem, longest: int, target: Target) -> None:
    given = list(inputs(problem, target, [(1, longest, longest)]))
    sdpa(given[0])  # what torch itself does once
    emit_json(timed(ours, iter(given), target)[0])


# ---- the script -----------------------------------------------------------------------------------------------------


def tell(data: dict[str, Any]) -> None:
    for mode, seconds in data.get("first_call_ever", {}).items():
        say(f"first call ever, FAGEN_BUILD={mode}: {seconds:.2f} s")
    for scenario, found in data["scenarios"].items():
        for name, f in found.items():
            times = "  ".join(f"{n} {f[n] * 1e6:9.1f} us" for n in ("first", "median", "p99", "worst"))
            say(f"{scenario:<8} {name:<6} {f['calls']} calls  {times}  over 50 ms: {f['over_50_ms']}")
    say(f"compiled after warm-up: {data['compiled_after_warmup']}")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="cpu or gpu (default: the GPU, else the CPU)")
    parser.add_argument("--calls", type=int, default=300, help="of each scenario (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", type=lambda text: [n for n in text.split(",") if n], default=["sdpa"])
    parser.add_argument("--fa3", type=Path, metavar="FILE", help="FlashAttention 3's built library, _C.so")
    parser.add_argument("--no-warmup", action="store_true", help="build no kernel ahead")
    parser.add_argument("--no-first", action="store_true", help="leave out the first call ever")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    target = arguments.target_from(args.target)
    problem, longest = SHAPES["gpu" if target.is_gpu else "cpu"]
    with torch.no_grad():
        if args.child:
            child(problem, longest, target)
            return
        data: dict[str, Any] = {
            "command": "python benchmarks/stalls.py " + " ".join(sys.argv[1:] if words is None else words),
            "date": now(), "device": target.device, "environment": environment(target),
            "problem": problem.static_key, "heads": [problem.heads, problem.kv_heads], "longest": longest,
        }  # fmt: skip
        if not args.no_first:
            data["first_call_ever"] = first(args)
        data |= measure(args, problem, longest, target)
    if args.out:
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    tell(data)


if __name__ == "__main__":
    main()
