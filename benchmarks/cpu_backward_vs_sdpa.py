"""cpu_backward against the backward of PyTorch's SDPA on this CPU: interleaved calls, the least time of each, ratios.

    OMP_NUM_THREADS=1 python benchmarks/cpu_backward_vs_sdpa.py --threads 1 --heads 2
    OMP_NUM_THREADS=1 python benchmarks/cpu_backward_vs_sdpa.py --threads 1 --knobs tile_m=64 loop_order=kv_outer

PyTorch's forward is done before, and its graph kept: only its backward is timed. One thread is timed by its CPU time,
more by the clock. `--knobs` times configs that differ from the default by comma-separated values of knobs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fagen import ops
from fagen.codegen.spec import KernelSpec
from fagen.families import Config, cpu_backward
from fagen.ops.attention import gradients
from fagen.ops.attention.backward import BackwardProblem
from fagen.runtime import kernel
from fagen.target import host

FAMILY = cpu_backward.FAMILY


def config_of(problem: BackwardProblem, words: str) -> Config:
    """The default with some knobs changed."""
    config = FAMILY.default(problem, host())
    for word in filter(None, words.split(",")):
        name, _, value = word.partition("=")
        config = config.replace(**{name: type(FAMILY.knob(name).choices[0])(value)})
    return FAMILY.config(config)


def measure_row(problem: BackwardProblem, args: argparse.Namespace) -> dict[str, Any]:
    made = ops.get("backward").calls().inputs(problem, host(), 0, False)
    peer, _ = ops.get("backward").calls().torch_peer(made.call)
    if peer is None:
        raise SystemExit(f"{problem}: PyTorch cannot do this")
    calls: dict[str, Callable[[], object]] = {"sdpa": peer}
    for words in ["", *args.knobs]:
        config = config_of(problem, words)
        if FAMILY.rejects(problem, host(), config):
            continue
        calls[words or "default"] = kernel.get(KernelSpec(FAMILY, problem, host(), config)).bind(
            made.call, made.outputs
        )
        calls[words or "default"]()
        verdict = gradients.check_sample(made.call, made.outputs)
        if not verdict:
            raise SystemExit(f"{problem} {config}: {verdict.message}")
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(args.rounds):
        for name, call in calls.items():
            start = clock()
            call()
            least[name] = min(least[name], clock() - start)
    return {"problem": problem.key, "seconds": least, "over_sdpa": {n: least["sdpa"] / t for n, t in least.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--knobs", nargs="*", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for length in args.lengths:
        for d in (64, 128):
            for mask in ("none", "causal"):
                problem = BackwardProblem(dtype=args.dtype, head_dim=d, mask=mask, heads=args.heads, seqlen_q=length)
                row = measure_row(problem, args)
                rows.append(row)
                times = "  ".join(
                    f"{n} {row['over_sdpa'][n]:.2f}x {problem.flops() / t / 1e9:.0f}" for n, t in row["seconds"].items()
                )
                print(f"{problem.key}: {times} GFLOP/s", flush=True)
    mean = statistics.geometric_mean(row["over_sdpa"]["default"] for row in rows)
    print(f"geometric mean of the default: {mean:.2f}x")
    if args.out:
        command = "python benchmarks/cpu_backward_vs_sdpa.py " + " ".join(sys.argv[1:])
        result = {"command": command, "device": str(host()), "torch": torch.__version__, "mean": mean, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
