"""cpu_softmax against PyTorch's softmax on this CPU: interleaved calls, the least time of each, ratios.

    OMP_NUM_THREADS=1 python benchmarks/cpu_softmax_vs_torch.py --threads 1
    OMP_NUM_THREADS=1 python benchmarks/cpu_softmax_vs_torch.py --threads 1 --knobs scheme=stored unroll=8,chunk=1024

Both write into an output that is there already, where PyTorch can. One thread is timed by its CPU time, more by the
clock. Each kernel is verified first. `--knobs` times configs that differ from the default by knobs; `--op` times
`fagen.softmax` itself as a user calls it beside `torch.softmax`, each with an output of its own.
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
from fagen.families import Config, cpu_softmax
from fagen.ops.softmax import calls as softmax_calls
from fagen.ops.softmax.call import SoftmaxCall
from fagen.ops.softmax.problem import SoftmaxProblem
from fagen.runtime import kernel
from fagen.target import host

FAMILY = cpu_softmax.FAMILY
SIZES = ("64x128", "512x256", "128x1024", "512x4096", "64x32000", "8x131072", "128x262144", "128x1048576", "1x16777216")
MOST_SECONDS = 12.0  # of a row, after three rounds


def config_of(problem: SoftmaxProblem, words: str) -> Config:
    """The default with some knobs changed."""
    config = FAMILY.default(problem, host())
    for word in filter(None, words.split(",")):
        name, _, value = word.partition("=")
        config = config.replace(**{name: type(FAMILY.knob(name).choices[0])(value)})
    return FAMILY.config(config)


def torch_into(call: SoftmaxCall, out: torch.Tensor) -> Callable[[], object]:
    """PyTorch's own kernel, with no allocation."""
    aten, log = torch.ops.aten, call.log
    if call.dout is None:
        into = (aten._log_softmax if log else aten._softmax).out
        if call.x.dtype == call.out_dtype:
            return lambda: into(call.x, call.axis, False, out=out)
        return lambda: softmax_calls.by_torch(call)
    if call.x.dtype == call.out_dtype and log:
        return lambda: aten._log_softmax_backward_data.out(call.dout, call.x, call.axis, call.x.dtype, out=out)
    if call.x.dtype == call.out_dtype:
        return lambda: aten._softmax_backward_data.out(call.dout, call.x, call.axis, call.x.dtype, grad_input=out)
    return lambda: softmax_calls.by_torch(call)


def as_a_user(problem: SoftmaxProblem, call: SoftmaxCall) -> dict[str, Callable[[], object]]:
    import fagen

    ours, theirs = (getattr(m, "log_softmax" if problem.log else "softmax") for m in (fagen, torch))
    return {"torch": lambda: theirs(call.x, call.axis), "default": lambda: ours(call.x, call.axis)}


def measure_row(problem: SoftmaxProblem, args: argparse.Namespace) -> dict[str, Any]:
    made = ops.get("softmax").calls().inputs(problem, host(), 0, False)
    if args.op:
        calls = as_a_user(problem, made.call)
    else:
        calls = {"torch": torch_into(made.call, torch.empty_like(made.outputs["out"]))}
        for words in ["", *args.knobs]:
            config = config_of(problem, words)
            if FAMILY.rejects(problem, host(), config):
                continue
            run = kernel.get(KernelSpec(FAMILY, problem, host(), config)).bind(made.call, made.outputs)
            calls[words or "default"] = run
            run()
            verdict = softmax_calls.check_sample(made.call, made.outputs)
            if not verdict:
                raise SystemExit(f"{problem} {config}: {verdict.message}")
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    repeat = max(1, min(256, 2_000_000 // (problem.count * problem.length)))
    least, begun = dict.fromkeys(calls, float("inf")), time.perf_counter()
    for turn in range(args.rounds):
        for name, call in calls.items():
            start = clock()
            for _ in range(repeat):
                call()
            least[name] = min(least[name], (clock() - start) / repeat)
        if turn >= 2 and time.perf_counter() - begun > MOST_SECONDS:
            break
    return {"problem": problem.key, "seconds": least, "over_torch": {n: least["torch"] / t for n, t in least.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--direction", default="forward", choices=("forward", "backward"))
    parser.add_argument("--along", default="row", choices=("row", "column"))
    parser.add_argument("--log", action="store_true")
    parser.add_argument("--op", action="store_true", help="fagen.softmax as a user calls it, forward")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="RxC")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--knobs", nargs="*", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with torch.no_grad():
        for size in args.sizes:
            r, c = map(int, size.split("x"))
            how = {"direction": args.direction, "dtype": args.dtype, "log": args.log, "along": args.along}
            row = measure_row(SoftmaxProblem(**how, rows=r, columns=c), args)
            rows.append(row)
            times = "  ".join(f"{n} {row['over_torch'][n]:.2f}x {t * 1e6:.1f}" for n, t in row["seconds"].items())
            print(f"{row['problem']}: {times} us", flush=True)
    mean = statistics.geometric_mean(row["over_torch"]["default"] for row in rows)
    print(f"geometric mean of the default: {mean:.2f}x, least {min(r['over_torch']['default'] for r in rows):.2f}x")
    if args.out:
        command = "python benchmarks/cpu_softmax_vs_torch.py " + " ".join(sys.argv[1:])
        result = {"command": command, "device": str(host()), "torch": torch.__version__, "mean": mean, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
