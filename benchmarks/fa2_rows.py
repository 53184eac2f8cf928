"""fagen.attention against PyTorch's FA2 backend on the rows of problems/fa2_rows.toml, interleaved in one run.

    python benchmarks/fa2_rows.py [--out benchmarks/h200_fa2_rows.json] [--family sm80_forward]

Every output is checked by the oracle before it is timed. Times are medians over interleaved rounds.
`--family` holds the comparison to one family even where dispatch would pick a faster one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fagen import db, families, kernel, measure, target, verify
from fagen.cliutil import problems_in
from fagen.problem import Problem

HERE = Path(__file__).parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def config_for(problem: Problem, where: target.Target, name: str) -> tuple[Any, str]:
    """What dispatch picks within one family, and its provenance."""
    family = families.get(name)
    for record, provenance in db.Database.load().candidates(problem, where):
        if record.family == name:
            config = family.config(record.config)
            if not family.rejects(problem, where, config):
                return config, provenance
    return family.default(problem, where), "default"


def row(problem: Problem, where: target.Target, name: str, rounds: int) -> dict[str, Any]:
    g = torch.Generator("cuda").manual_seed(0)
    shape = (problem.batch, problem.seqlen_q, problem.heads, problem.head_dim)
    q, k, v = (torch.randn(shape, device="cuda", generator=g).to(DTYPES[problem.dtype]) for _ in range(3))
    out = torch.full_like(q, torch.nan)
    config, provenance = config_for(problem, where, name)
    built = kernel.get(families.get(name), problem, where, config)

    def ours() -> None:
        built.launch(q, k, v, out, layout="bshd")

    ours()
    semantics = verify.Semantics(window=(problem.window_left, problem.window_right))
    verdict = verify.check(out, None, q, k, v, semantics, layout="bshd")
    if not verdict:
        raise SystemExit(f"{problem.key}: {verdict.message}")
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))

    def fa2() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(qt, kt, vt, is_causal=problem.mask == "causal")

    times = measure.time_calls({"fagen": ours, "fa2": fa2}, device="cuda", rounds=rounds)
    flops = problem.flops()
    return {
        "problem": problem.key, "config": dict(config), "provenance": provenance, "max_error": verdict.error,
        **{n: {"seconds": t.median, "spread": t.spread, "tflops": flops / t.median / 1e12} for n, t in times.items()},
        "ratio": times["fa2"].median / times["fagen"].median,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--family", default="sm80_forward")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    where = target.gpu()
    if where is None:
        raise SystemExit("needs a GPU")
    rows = []
    for problem in problems_in(HERE / "problems" / "fa2_rows.toml"):
        rows.append(row(problem, where, options.family, options.rounds))
        r = rows[-1]
        tflops = "  ".join(f"{name} {r[name]['tflops']:4.0f}" for name in ("fa2", "fagen"))
        print(f"{r['problem']:55} {tflops}  {r['ratio']:.3f}x  {r['provenance']}")
    mean = math.exp(sum(math.log(r["ratio"]) for r in rows) / len(rows))
    print(f"geometric mean {mean:.3f}x, worst {min(r['ratio'] for r in rows):.3f}x")
    if options.out:
        facts = {
            "command": " ".join(["python benchmarks/fa2_rows.py", *sys.argv[1:]]),
            "environment": db.environment(where),
            "device": where.device,
        }
        options.out.write_text(json.dumps({**facts, "geometric_mean": mean, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
