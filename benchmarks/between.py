"""What dispatch by nearest size costs on sizes that were never tuned, and which distance would have cost least.

    fagen tune --problems benchmarks/problems/h200_between.toml --budget 40m --out TUNED
    python benchmarks/between.py --tuned TUNED --out benchmarks/h200_between.json
    python benchmarks/between.py --fit benchmarks/h200_between.json      # no GPU: the recorded times alone

For each problem the configs of all records of its static key are timed against each other in one interleaved run, with
the family's default, its first guesses, and the config that tuning the problem itself found (--tuned). A ratio is a
config's time over the tuned one's; without --tuned, over the fastest of all. Every kernel is verified before it is
timed. Since all neighbours were timed, --fit can tell what any other distance would have picked.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fagen import env, families
from fagen.bench.prebuild import together
from fagen.build import cache
from fagen.build.compilers import compile_workers
from fagen.cli import arguments
from fagen.codegen.spec import KernelSpec
from fagen.db import store
from fagen.db.record import Record, environment, now
from fagen.errors import FagenError
from fagen.families import Config, Family
from fagen.ops.attention import forward, size_point
from fagen.ops.attention.inputs import make_inputs
from fagen.ops.attention.problem import Problem
from fagen.ops.inputs import input_sets
from fagen.runtime import kernel
from fagen.runtime.kernel import launcher
from fagen.target import Target
from fagen.timing import timer
from fagen.verify import checks

GUESSES = 3  # of the family, beside its default
SUITE = Path(__file__).parent / "problems" / "h200_between.toml"
# what --fit tries: weights of waves and rows (keys count 1), and from how many waves on they no longer matter
GRID = ((0.0, 0.5, 1.0, 2.0), (0.0, 0.25, 0.5, 1.0), (2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0))


def neighbours(problem: Problem, target: Target, records: store.Database) -> list[Record]:
    """Records of the family that dispatch takes, the nearest first."""
    found = [r for r, how in records.candidates(problem, target) if how == "nearest"]
    return [r for r in found if r.family == found[0].family]


def configs_of(
    problem: Problem, target: Target, records: store.Database, tuned: store.Database | None
) -> tuple[Family, dict[str, Config], dict[str, Any]]:
    """The family, what is timed under its label, and under which labels the default, the tuned one and neighbours are.

    A config that several stand for is timed once.
    """
    near = neighbours(problem, target, records)
    family = families.get(near[0].family) if near else families.candidates(problem, target)[0][0]
    labels: dict[Config, str] = {}
    wanted = [("default", family.default(problem, target))]
    if tuned is not None:
        won = [r for r, how in tuned.candidates(problem, target) if how == "exact" and r.family == family.name]
        wanted += [("tuned", family.config(record.config)) for record in won[:1]]
    wanted += [(f"neighbour {n}", family.config(r.config)) for n, r in enumerate(near)]
    wanted += [(f"guess {n}", c) for n, c in enumerate(family.first_configs(problem, target)[:GUESSES])]
    for label, config in wanted:
        if not family.rejects(problem, target, config):
            labels.setdefault(config, label)
    of: dict[str, Any] = {label: labels.get(config) for label, config in wanted if label in ("default", "tuned")}
    of["neighbours"] = [
        {"size": r.problem.size_key, "problem": r.problem.to_dict(), "label": labels.get(family.config(r.config))}
        for r in near
    ]
    return family, {label: config for config, label in labels.items()}, of


def compile_all(work: Iterable[tuple[Family, Problem, Target, Config]]) -> None:
    """Every kernel once, many compilers at a time; what fails here fails again where it is loaded, and is told."""
    jobs = list({(f.name, p.static_key, c): (f, p, t, c) for f, p, t, c in work}.values())
    missing = [item for item in jobs if cache.lookup(KernelSpec(*item)) is None]
    print(f"{len(jobs)} kernels, {len(missing)} to compile", flush=True)

    def attempt(item: tuple[Family, Problem, Target, Config]) -> None:
        try:
            cache.build(KernelSpec(*item))
        except FagenError as error:
            print(f"{item[1].static_key} {item[3]}: {error.what}", flush=True)

    if missing:
        together(attempt, missing, compile_workers(missing[0][2].is_gpu, measuring=True))


def measure_row(
    problem: Problem, target: Target, records: store.Database, tuned: store.Database | None, args: argparse.Namespace
) -> dict[str, Any]:
    family, configs, labels = configs_of(problem, target, records, tuned)
    device = "cuda" if target.is_gpu else "cpu"
    sets = [make_inputs(problem, target, i) for i in range(input_sets(problem, target))]
    calls, failed = {}, {}
    for label, config in configs.items():
        try:
            loaded = kernel.get(KernelSpec(family, problem, target, config))
            _, wrong = verified(family.name, problem, target, loaded)
        except FagenError as error:
            failed[label] = error.what
            continue
        if wrong:
            failed[label] = wrong
        else:
            calls[label] = timer.RoundRobin([launcher(loaded, inputs) for inputs in sets])
    times = timer.time_calls(calls, device=device, rounds=args.rounds, min_seconds=args.seconds, max_seconds=8.0)
    return {
        "problem": problem.key, "fields": problem.to_dict(), "family": family.name,
        "configs": {label: dict(config) for label, config in configs.items()},
        "seconds": {label: t.median for label, t in times.items()},
        "spread": {label: t.spread for label, t in times.items()},
        "failed": failed, **labels,
    }  # fmt: skip


_seen: dict[tuple[str, str, Config], tuple[float, str]] = {}


def verified(family: str, problem: Problem, target: Target, loaded: kernel.Kernel) -> tuple[float, str]:
    """Once a kernel, though it serves many sizes."""
    key = family, problem.static_key, loaded.spec.config
    if key not in _seen:
        _seen[key] = checks.compare(loaded, problem, target)
    return _seen[key]


# ---- what the times say ---------------------------------------------------------------------------------------------

Distance = Callable[[Problem, Problem], float]


def baseline(row: dict[str, Any]) -> float:
    """The time of the config that tuning this very problem found; of the fastest where it was not tuned."""
    seconds = row["seconds"]
    return seconds.get(row.get("tuned") or "", min(seconds.values()))


def ratio(row: dict[str, Any], label: str | None) -> float | None:
    seconds = row["seconds"].get(label or "")
    return seconds / baseline(row) if seconds else None


def picked(row: dict[str, Any], distance: Distance, count: int = 1) -> list[str]:
    """Labels of the nearest records that could be timed, by a distance; ties as dispatch settles them."""
    asked = Problem.from_dict(row["fields"])
    usable = [(Problem.from_dict(n["problem"]), n["label"]) for n in row["neighbours"] if n["label"] in row["seconds"]]
    return [label for _, label in sorted(usable, key=lambda n: (distance(asked, n[0]), n[0].key))[:count]]


def weighted(units: int, weights: dict[str, float], most_waves: float) -> Distance:
    def distance(a: Problem, b: Problem) -> float:
        one, other = size_point.features(a, units, most_waves), size_point.features(b, units, most_waves)
        return sum(weight * abs(one[name] - other[name]) for name, weight in weights.items())

    return distance


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value]
    return statistics.geometric_mean(known) if known else None


def summary(rows: list[dict[str, Any]], target: Target) -> dict[str, Any]:
    """Geometric means of the ratios: of what dispatch picks, and of what else it might have picked."""
    today = functools.partial(forward.OP.distance, units=target.units)
    nearest = [ratio(row, next(iter(picked(row, today)), None) or row["default"]) for row in rows]
    of_three = [min((ratio(row, x) or 9.9 for x in picked(row, today, 3)), default=None) for row in rows]
    of_all = [min((ratio(row, x) or 9.9 for x in picked(row, today, 99)), default=None) for row in rows]
    known = [value for value in nearest if value]
    modelled = [ratio(row, cheapest(row, picked(row, today, 3), target)) for row in rows]
    return {
        "problems": len(rows), "tuned": sum(bool(row.get("tuned")) for row in rows),
        "nearest": mean(nearest), "nearest_worst": max(known, default=None),
        "beyond_5_percent": sum(value > 1.05 for value in known),
        "best_of_3_nearest": mean(of_three), "model_of_3_nearest": mean(modelled), "best_of_all_records": mean(of_all),
        "default": mean(ratio(row, row["default"]) for row in rows),
        "fastest_of_all": mean(ratio(row, min(row["seconds"], key=row["seconds"].get)) for row in rows),
    }  # fmt: skip


def cheapest(row: dict[str, Any], labels: list[str], target: Target) -> str | None:
    """By the family's model of cost, where it has one."""
    cost = getattr(families.get(row["family"]), "cost", None)
    if cost is None or not labels:
        return None
    asked = Problem.from_dict(row["fields"])
    return min(labels, key=lambda label: cost(asked, target, Config(row["configs"][label])))


def fit(rows: list[dict[str, Any]], units: int) -> list[dict[str, Any]]:
    """Every distance of the grid, the best first."""
    found = []
    for waves, of_rows, most in itertools.product(*GRID):
        weights = {"keys": 1.0, "waves": waves, "rows": of_rows}
        distance = weighted(units, weights, most)
        ratios = [ratio(row, next(iter(picked(row, distance)), None) or row["default"]) for row in rows]
        worst = max((value for value in ratios if value), default=math.inf)
        found.append({"weights": weights, "most_waves": most, "mean": mean(ratios) or math.inf, "worst": worst})
    return sorted(found, key=lambda entry: (entry["mean"], entry["worst"]))


def tell(data: dict[str, Any]) -> None:
    rows, target = data["rows"], Target.from_dict(data["target"])
    units = target.units
    today = functools.partial(forward.OP.distance, units=units)
    for row in rows:
        label = next(iter(picked(row, today)), None) or row["default"]
        size = next((n["size"] for n in row["neighbours"] if n["label"] == label), "default")
        text = f"{ratio(row, label) or float('nan'):.3f}"
        print(f"{row['problem']:58} {text}  {size}")
    for name, value in summary(rows, target).items():
        print(f"{name:22}{value:.4f}" if isinstance(value, float) else f"{name:22}{value}")
    waves = f"at most {size_point.MOST_WAVES:g} waves"
    print(f"today's weights {size_point.WEIGHTS}, {waves}; the best of {len(fit(rows, units))}:")
    for entry in fit(rows, units)[:5]:
        print(f"  {entry['mean']:.4f} worst {entry['worst']:.3f}  {entry['weights']} {entry['most_waves']:g} waves")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=Path, default=SUITE)
    parser.add_argument("--db", type=Path, default=env.data_dir("tuning_db"), help="where dispatch takes winners from")
    parser.add_argument("--tuned", type=Path, help="a database in which the problems themselves were tuned")
    parser.add_argument("--target", help="cpu or gpu (default: the GPU, else the CPU)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="least time a problem")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--fit", type=Path, metavar="JSON", help="say what recorded times tell, and measure nothing")
    args = parser.parse_args(words)
    if args.fit:
        tell(json.loads(args.fit.read_text()))
        return
    target = arguments.target_from(args.target)
    problems = arguments.problems_in(args.problems, target)
    records, tuned = store.Database.load([args.db]), store.Database.load([args.tuned]) if args.tuned else None
    for warning in [*records.warnings, *(tuned.warnings if tuned else [])]:
        print(f"warning: {warning}")
    plans = [(problem, configs_of(problem, target, records, tuned)) for problem in problems]
    compile_all((family, p, target, c) for p, (family, configs, _) in plans for c in configs.values())
    data: dict[str, Any] = {
        "command": "python benchmarks/between.py " + " ".join(sys.argv[1:] if words is None else words),
        "target": dataclasses.asdict(target),
        "date": now(),
        "environment": environment(target),
        "rows": [],
    }
    with torch.no_grad():
        for problem in problems:
            data["rows"].append(measure_row(problem, target, records, tuned, args))
            print(f"{len(data['rows'])}/{len(problems)} {problem.key}", flush=True)
            if args.out:  # what was measured is kept whatever comes after
                data["summary"] = summary(data["rows"], target)
                args.out.write_text(json.dumps(data, indent=1) + "\n")
    tell(data)


if __name__ == "__main__":
    main()
