"""cpu_forward against PyTorch's SDPA on this CPU: one interleaved run a row, medians, ratios, their geometric mean.

    python benchmarks/cpu_vs_sdpa.py --threads 2 --out benchmarks/cpu_vs_sdpa.json

`default` is the family's default config, `best` the fastest of the default and the seeds in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from fagen.codegen.spec import KernelSpec
from fagen.db.record import environment
from fagen.families import cpu_forward
from fagen.ops.attention import reference
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.inputs import make_inputs
from fagen.ops.attention.problem import Problem
from fagen.runtime import kernel
from fagen.target import host
from fagen.timing import timer

VERIFIED_UP_TO = 1024  # rows; the float64 reference of longer ones takes longer than the measurement


def problems(dtype: str) -> list[Problem]:
    return [
        Problem(dtype=dtype, head_dim=d, mask=mask, heads=8, seqlen_q=length)
        for d in (64, 128)
        for length in (512, 1024, 4096)
        for mask in ("none", "causal")
    ]


def calls_of(problem: Problem, layout: str) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What is timed against each other, and the config behind each name."""
    target, family = host(), cpu_forward.FAMILY
    inputs = make_inputs(problem, target)
    q, k, v, out = (t.transpose(1, 2) for t in (inputs.call.q, inputs.call.k, inputs.call.v, inputs.outputs["out"]))
    if layout == "bhsd":
        q, k, v, out = (t.contiguous() for t in (q, k, v, out))
    call = AttentionCall(q, k, v, layout="bhsd", window=inputs.call.window)
    causal = problem.mask == "causal"
    calls: dict[str, Callable[[], object]] = {
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=causal),
    }
    configs = {}
    for i, config in enumerate([family.default(problem, target), *family.first_configs(problem, target)]):
        name = f"seed {i}" if i else "default"
        calls[name] = kernel.get(KernelSpec(family, problem, target, config)).bind(call, {"out": out})
        configs[name] = str(config)
        if problem.seqlen_q <= VERIFIED_UP_TO:
            out.fill_(math.nan)
            calls[name]()
            verdict = reference.check(call, {"out": out})
            if not verdict:
                raise SystemExit(f"{problem} {config}: {verdict.message}")
    return calls, configs


def measure_row(problem: Problem, layout: str, args: argparse.Namespace) -> dict[str, Any]:
    calls, configs = calls_of(problem, layout)
    with torch.no_grad():
        times = timer.time_calls(calls, device="cpu", rounds=args.rounds, min_seconds=args.seconds)
    best = min(configs, key=lambda name: times[name].median)
    sdpa = times["sdpa"].median
    return {
        "problem": problem.key,
        "seconds": {name: t.median for name, t in times.items()},
        "spread": {name: t.spread for name, t in times.items()},
        "configs": configs,
        "best": best,
        "gflops_sdpa": problem.flops() / sdpa / 1e9,
        "gflops_best": problem.flops() / times[best].median / 1e9,
        "default_over_sdpa": sdpa / times["default"].median,
        "best_over_sdpa": sdpa / times[best].median,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--layout", default="bhsd", choices=("bhsd", "bshd"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0, help="least time a row")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    print(f"{'problem':42} {'SDPA':>8} {'best':>8} GFLOP/s   default/SDPA   best/SDPA")
    rows = []
    for problem in problems(args.dtype):
        row = measure_row(problem, args.layout, args)
        rows.append(row)
        ratios = f"{row['default_over_sdpa']:14.2f}x {row['best_over_sdpa']:10.2f}x ({row['best']})"
        print(f"{row['problem']:42} {row['gflops_sdpa']:8.0f} {row['gflops_best']:8.0f} {ratios}", flush=True)
    means = {
        name: statistics.geometric_mean(row[name] for row in rows) for name in ("default_over_sdpa", "best_over_sdpa")
    }
    print("geometric mean: " + ", ".join(f"{name} {value:.3f}x" for name, value in means.items()))
    if args.out:
        command = "python benchmarks/cpu_vs_sdpa.py " + " ".join(sys.argv[1:])
        result = {
            "command": command,
            "device": str(host()),
            "threads": args.threads,
            "layout": args.layout,
            "environment": environment(host()),
            "geometric_mean": means,
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
