"""How near to the best a tuning run of three minutes comes, compile time included and nothing known before.

    python benchmarks/three_minutes.py SPACE.jsonl.xz [--budget 3m] [--out FILE.json]

tunes the problem of each recorded space with an empty cache of kernels, without the database's winners or the family's
guesses, over the family's whole space. Then the run's winner, the family's default and the fastest that were recorded
are timed in turn in this process, so that clocks are the same for all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fagen.codegen.spec import KernelSpec
from fagen.families import Config
from fagen.tuner import evaluate, recorded_space
from fagen.tuner.messages import CompileRequest, FinalRequest

PEERS = 4  # of the recorded, the fastest


def tune(space: recorded_space.Recorded, budget: str, folder: str) -> tuple[dict, float]:
    """The run's own report, and its wall time."""
    problem = Path(folder, "problem.toml")
    p = space.problem
    settings = {
        "dtype": p.dtype, "head_dim": f"{p.head_dim}-{p.head_dim_v}", "mask": p.mask, "batch": p.batch,
        "heads": p.heads, "kv_heads": p.kv_heads, "seqlen_q": p.seqlen_q, "seqlen_k": p.seqlen_k,
    }  # fmt: skip
    if p.mask == "window":
        settings["window"] = f"{p.window_left},{p.window_right}"
    problem.write_text("[[problem]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
    words = ["--target", "gpu" if space.target.is_gpu else "cpu", "--family", space.family.name]
    words += ["--problems", str(problem), "--budget", budget, "--cold", "--out", f"{folder}/db", "--json"]
    fresh = {name: f"{folder}/{name}" for name in ("FAGEN_CACHE_DIR", "FAGEN_DB_DIR", "XDG_STATE_HOME")}
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "fagen", "tune", *words], env=os.environ | fresh, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)["results"][0], time.monotonic() - begin


def compare(space: recorded_space.Recorded, winner: Config) -> dict:
    """The winner among the fastest that were recorded."""
    ranked = sorted((e.seconds, c.to_json(), c) for c, e in space.entries.items() if e.seconds)
    default = space.family.default(space.problem, space.target)
    configs = {"winner": winner, "default": default} | {
        f"recorded #{i}": c for i, (_, _, c) in enumerate(ranked[:PEERS], 1)
    }
    entries = {}
    for label, config in configs.items():
        item = KernelSpec(space.family, space.problem, space.target, config)
        entries[label] = (item, evaluate.compile_one(CompileRequest(item, 120.0)).artifact)
    final = evaluate.final_round(FinalRequest(entries, seconds=4.0))
    return {label: {"seconds": final.timings[label].median, "config": dict(configs[label])} for label in configs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spaces", nargs="+", type=Path)
    parser.add_argument("--budget", default="3m")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for space in (space for path in args.spaces for space in recorded_space.read(path)):
        with tempfile.TemporaryDirectory() as folder:
            tuned, wall = tune(space, args.budget, folder)
        times = compare(space, space.family.config(tuned["config"]))
        best = min(times[label]["seconds"] for label in times if label.startswith("recorded"))
        row = {
            "problem": space.problem.key, "family": space.family.name, "wall_seconds": round(wall, 1),
            "trials": sum(tuned["outcomes"].values()), "outcomes": tuned["outcomes"],
            "over_best": times["winner"]["seconds"] / best,
            "over_default": times["winner"]["seconds"] / times["default"]["seconds"],
            "times": times,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{row['problem']}: {row['trials']} trials in {wall:.0f} s, {row['over_best']:.3f} of the best recorded, "
            f"{row['over_default']:.3f} of the default",
            file=sys.stderr,
        )
    data = {"command": " ".join(["python", "benchmarks/three_minutes.py", *sys.argv[1:]]), "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0 if all(row["over_best"] <= 1.02 for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
