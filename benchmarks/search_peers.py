"""The search beside public tuners, on recorded spaces: how many trials each needs, over many seeds.

    python benchmarks/search_peers.py                        all methods, all of spaces/, 100 seeds; writes
                                                             search_peers.json and the tables of docs/search.md
    python benchmarks/search_peers.py --seeds 5 --methods guided,tpe --out some.json spaces/h200_d64*.xz
    python benchmarks/search_peers.py --raw FOLDER           keeps each method's seeds there, and goes on from them

Kernel Tuner is no dependency of fagen: `python -m venv --system-site-packages V; V/bin/pip install kernel_tuner==1.5`,
then run this with V/bin/python. Its strategies run in its simulation mode on the cache that `fagen db export --format
kernel_tuner` writes. A trial is a config that a tuner asked for and had not asked for before, whatever became of it.

Every method begins with nothing known, but `guided`, which begins with the family's default, as a run does, and
`guesses-N`, with N of the family's guesses. Ours and TPE are told times disturbed by their recorded spread, Kernel
Tuner's are not. All ties are chance. Regret is how far the best of what was tried is behind the best of the space.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fagen.db.record import now
from fagen.families import Config
from fagen.notices import say
from fagen.report import export
from fagen.tuner import recorded_space, simulate
from fagen.tuner.recorded_space import Recorded

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "search_peers.json"
TRIALS = 160
WITHIN, AFTER = (0.02, 0.01), (20, 40, 80, 160)
STRATEGIES = (
    "hybrid_vndx", "adaptive_tabu_greywolf", "bayes_opt", "genetic_algorithm", "diff_evo", "simulated_annealing",
)  # fmt: skip
_IDLE = 5000  # requests of a strategy for nothing new, after which it is taken for ended
Tried = Sequence[Config]  # in order, each once


# ---- ours, and what it is made of ------------------------------------------------------------------------------------


def guided(
    space: Recorded, seed: int, first: Iterable[Config] = (), cost: bool = True, sampler: str = "guided"
) -> Tried:
    """One at a time: each is told before the next is chosen."""
    whole = simulate.space_of(space)
    if not cost:
        whole = dataclasses.replace(whole, family=dataclasses.replace(whole.family, cost=None))
    search = simulate.begin(whole, sampler, seed, tuple(first), TRIALS)
    noise, tried = random.Random(f"{seed}/noise"), []
    while (config := search.next()) is not None:
        search.tell(config, simulate.disturbed(space.entries[config], noise), space.entries[config].outcome)
        tried.append(config)
    return tried


def ahead(space: Recorded, seed: int) -> Tried:
    """As a run is: many compilers, so that most are chosen before those in front of them are measured."""
    return simulate.replay(space, "guided", seed, workers=simulate.WORKERS, trials=TRIALS, cold=True).tried


def cost_alone(space: Recorded, seed: int) -> Tried:
    family, chance = space.family, random.Random(seed)
    assert family.cost is not None
    costs = [(family.cost(space.problem, space.target, c), chance.random(), c) for c in space.entries]
    return [config for _, _, config in sorted(costs, key=lambda row: row[:2])][:TRIALS]


def by_chance(space: Recorded, seed: int) -> Tried:
    return random.Random(seed).sample(list(space.entries), min(TRIALS, len(space.entries)))


def guesses(space: Recorded, count: int) -> list[Config]:
    family, where = space.family, (space.problem, space.target)
    return list(dict.fromkeys([family.default(*where), *family.first_configs(*where)]))[:count]


# ---- Kernel Tuner ----------------------------------------------------------------------------------------------------


def kernel_tuner(space: Recorded, seed: int, strategy: str) -> Tried:
    """Its simulation mode on a cache of the space, whose order is the seed's."""
    import kernel_tuner as kt
    import numpy as np
    from kernel_tuner import interface
    from kernel_tuner.runners.simulation import SimulationRunner
    from kernel_tuner.searchspace import Searchspace

    configs = random.Random(seed).sample(list(space.entries), len(space.entries))
    shuffled = dataclasses.replace(space, entries={config: space.entries[config] for config in configs})
    cache = json.loads(export.kernel_tuner(shuffled))
    by_key = dict(zip(cache["cache"], configs, strict=True))
    tried: dict[str, None] = {}
    idle = [0]  # requests since the last new config
    run = SimulationRunner.run

    def listening(self: Any, elements: Iterable[Any], options: Any) -> list[Any]:
        elements = list(elements)
        results: list[Any] = run(self, elements, options)
        before = len(tried)
        keys = (",".join(str(value) for value in element) for element in elements)
        tried.update((key, None) for key, result in zip(keys, results, strict=True) if result and key in by_key)
        idle[0] = 0 if len(tried) > before else idle[0] + 1
        if idle[0] > _IDLE:
            raise kt.util.StopCriterionReached("it asks for nothing new")
        return results

    def only_recorded(*args: Any, **options: Any) -> Searchspace:
        return Searchspace(None, None, None, from_cache=cache)

    random.seed(seed)
    np.random.seed(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        path = Path(folder) / "cache.json"
        path.write_text(json.dumps(cache))
        interface.Searchspace, SimulationRunner.run = only_recorded, listening
        try:
            with contextlib.suppress(kt.util.StopCriterionReached):
                kt.tune_kernel(
                    cache["kernel_name"], "", tuple(cache["problem_size"]), [], cache["tune_params"], lang="C",
                    cache=str(path), simulation_mode=True, strategy=strategy, quiet=True, seed=seed,
                    strategy_options={"max_fevals": min(TRIALS, len(configs))},
                )  # fmt: skip
        finally:
            interface.Searchspace, SimulationRunner.run = Searchspace, run
    return [by_key[key] for key in tried][:TRIALS]


METHODS: dict[str, Callable[[Recorded, int], Tried]] = {
    "guided": lambda space, seed: guided(space, seed, guesses(space, 1)),
    "guided-cold": guided,
    "guided-ahead": ahead,
    "guesses-3": lambda space, seed: guided(space, seed, guesses(space, 3)),
    "guesses-all": lambda space, seed: guided(space, seed, guesses(space, 99)),
    "cost-alone": cost_alone,
    "no-cost": lambda space, seed: guided(space, seed, cost=False),
    "tpe": lambda space, seed: guided(space, seed, sampler="tpe"),
    **{name: lambda space, seed, name=name: kernel_tuner(space, seed, name) for name in STRATEGIES},
    "random": by_chance,
}
_FEWER = {"cost-alone": 20, "tpe": 20, "bayes_opt": 30}  # seeds, at most: of what hardly differs, or takes seconds each
_WARM = {"guided", "guesses-3", "guesses-all"}  # begin with what is recorded beside the drawn configs


# ---- what came of it -------------------------------------------------------------------------------------------------


def score(space: Recorded, tried: Tried) -> dict[str, Any]:
    """Trials until within each of WITHIN (None: not reached), and the regret after some trials."""
    seconds = [space.entries[config].seconds or math.inf for config in tried]
    reached = {
        f"{within:.0%}": next((n for n, s in enumerate(seconds, 1) if s <= space.best * (1 + within)), None)
        for within in WITHIN
    }
    return {**reached, "regret": [min(seconds[:count]) / space.best - 1 for count in AFTER], "trials": len(tried)}


def quantile(values: Iterable[float | None], share: float) -> float | None:
    """None where so many are None."""
    ordered = sorted(math.inf if value is None else value for value in values)
    found = ordered[max(0, math.ceil(share * len(ordered)) - 1)]
    return None if found == math.inf else found


def summary(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means count what was not reached as one trial more than there were."""
    found: dict[str, Any] = {"runs": len(scores)}
    for within in (f"{w:.0%}" for w in WITHIN):
        trials = [s[within] for s in scores]
        found[within] = {
            "median": quantile(trials, 0.5), "p90": quantile(trials, 0.9), "missed": trials.count(None),
            "mean": round(statistics.fmean(TRIALS + 1 if t is None else t for t in trials), 2),
        }  # fmt: skip
    for place, count in enumerate(AFTER):
        regrets = [s["regret"][place] if math.isfinite(s["regret"][place]) else None for s in scores]
        quantiles = {"median": quantile(regrets, 0.5), "p90": quantile(regrets, 0.9)}
        found[f"regret {count}"] = {name: v if v is None else round(v, 5) for name, v in quantiles.items()}
    return found


def kind(space: Recorded) -> str:
    return "sampled" if "sampled" in space.head else "restricted"


def measure(name: str, space: Recorded, seeds: int, raw: Path | None) -> list[dict[str, Any]]:
    """One method on one space; seeds that a file of `raw` has are not run again."""
    path = raw / f"{space.head['key'].replace('/', '-')}+{name}.json" if raw else None
    known = json.loads(path.read_text()) if path and path.exists() else []
    ground, begin = space if name in _WARM else space.of_chance(), time.monotonic()
    for seed in range(len(known), seeds):
        known.append(score(ground, METHODS[name](ground, seed)))
        if path and (seed % 10 == 9 or seed == seeds - 1):
            path.write_text(json.dumps(known))
    found = summary(known[:seeds])
    say(f"{space.head['key'][8:]:<45} {name:<28}{words(found)}  {time.monotonic() - begin:.0f} s")
    return known[:seeds]


def words(found: dict[str, Any]) -> str:
    cells = []
    for within in (f"{w:.0%}" for w in WITHIN):
        middle, most = ("   -" if v is None else f"{v:4.0f}" for v in (found[within]["median"], found[within]["p90"]))
        cells.append(f"to {within} {middle} {most} ({found[within]['mean']:5.1f})")
    cells += [f"{n}: {_percent(found[f'regret {n}']['p90'])}" for n in AFTER]
    return "  ".join(cells)


def _percent(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.2%}"


def against(pooled: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The best public tuner to 1 %, by the mean, and how many times the trials of the cold search it needs."""
    public = {name: found["1%"]["mean"] for name, found in pooled.items() if name in (*STRATEGIES, "tpe")}
    if not public or "guided-cold" not in pooled:
        return {}
    best = min(public, key=lambda name: public[name])
    ours, theirs = pooled["guided-cold"]["1%"], pooled[best]["1%"]
    medians = None if not ours["median"] or not theirs["median"] else round(theirs["median"] / ours["median"], 2)
    return {"best public": best, "times the mean": round(theirs["mean"] / ours["mean"], 2), "times the median": medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spaces", nargs="*", type=Path, default=sorted((ROOT / "benchmarks" / "spaces").glob("*.xz")))
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--raw", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    names = [name.strip() for name in args.methods.split(",")]
    unknown = set(names) - set(METHODS)
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(METHODS)}")
    if args.raw:
        args.raw.mkdir(parents=True, exist_ok=True)
    spaces = [space for path in args.spaces for space in recorded_space.read(path)]
    pooled: dict[str, dict[str, list[dict[str, Any]]]] = {}
    result: dict[str, Any] = {
        "command": f"python benchmarks/search_peers.py --seeds {args.seeds}", "date": now(), "trials": TRIALS,
        "seeds": args.seeds, "fewer": _FEWER, "versions": versions(names), "spaces": [], "pooled": {}, "against": {},
    }  # fmt: skip
    for space in spaces:
        about = {name: space.head[name] for name in ("key", "family", "legal")}
        about |= {"device": space.target.device, "kind": kind(space), "configs": len(space.entries)}
        about |= {"drawn": len(space.of_chance().entries), "methods": {}}
        for name in names:
            seeds = min(args.seeds, _FEWER.get(name, args.seeds))
            scores = measure(name, space, seeds, args.raw)
            about["methods"][name] = summary(scores)
            pooled.setdefault(kind(space), {}).setdefault(name, []).extend(scores)
        result["spaces"].append(about)
    for group, methods in pooled.items():
        found = {name: summary(scores) for name, scores in methods.items()}
        result["pooled"][group], result["against"][group] = found, against(found)
        say(f"\n{group} spaces, all seeds together")
        for name, one in found.items():
            say(f"  {name:<28}{words(one)}")
        say(f"  {result['against'][group]}")
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, args.out)
    if args.out == OUT:
        subprocess.run([sys.executable, str(ROOT / "docs" / "tables.py")], check=True)


def versions(names: Sequence[str]) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("optuna", *(["kernel_tuner"] if set(STRATEGIES) & set(names) else []))}


if __name__ == "__main__":
    main()
