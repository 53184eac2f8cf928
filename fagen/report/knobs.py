"""Which knobs mattered: Optuna's importances over the candidates that were timed, and each knob's values one by one."""

from __future__ import annotations

import math
import statistics
import warnings
from typing import Any

from fagen import families
from fagen.errors import FagenError
from fagen.report.load import Row

LEAST = 10  # timed candidates, for importances to say anything
# How many of the fastest are compared with the rest: a tenth, but at least these where that is no more than half. Of
# four made-up searches of 48 in which one knob decides, it came first in two with a tenth (5), in three with these.
FASTEST = 16


def of_families(rows: list[Row]) -> list[Row]:
    """A part a family, the one with the most timed candidates first."""
    legal = [row for row in rows if row["outcome"] != "constraint" and row["config"]]
    names = list(dict.fromkeys(row["family"] for row in legal))
    parts = [_of_family(name, [row for row in legal if row["family"] == name]) for name in names]
    return sorted(parts, key=lambda part: -part["timed"])


def _of_family(name: str, rows: list[Row]) -> Row:
    docs = _docs(name)
    timed = [row for row in rows if row["seconds"]]
    knobs = [knob for knob in (docs or rows[0]["config"]) if any(knob in row["config"] for row in rows)]
    whole = [row for row in timed if all(knob in row["config"] for knob in knobs)]
    shares, how = importances(knobs, whole)
    order = sorted(knobs, key=lambda knob: -shares.get(knob, 0.0)) if shares else knobs
    return {
        "family": name,
        "timed": len(timed),
        "how": how,
        "fastest": round(share_of_fastest(len(whole)) * len(whole)) if shares else None,
        "knobs": [
            {
                "name": knob, "doc": docs.get(knob, ""), "importance": shares.get(knob),
                "alone": explained(knob, whole) if shares else None, "values": _values(knob, rows),
            }
            for knob in order
        ],
    }  # fmt: skip


def _docs(family: str) -> dict[str, str]:
    """What each knob decides, in the family's order; nothing of a family that this version does not have."""
    try:
        return {knob.name: knob.doc for knob in families.get(family).knobs}
    except FagenError:
        return {}


def importances(knobs: list[str], timed: list[Row]) -> tuple[dict[str, float], str]:
    """Each knob's share, and how it was found or why not.

    Optuna's PED-ANOVA asks which knobs set the fastest apart from the rest. It copes with a search that tries good
    values more often, and unlike Optuna's other evaluators it needs no further package.
    """
    if len(timed) < LEAST:
        return {}, f"{len(timed)} timed candidates are too few to tell: at least {LEAST}"
    if len({row["seconds"] for row in timed}) < 2:
        return {}, "all times are the same"
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the evaluator is experimental
            found = optuna.importance.get_param_importances(
                study(knobs, timed), evaluator=_ped_anova(share_of_fastest(len(timed)))
            )
    except (RuntimeError, ValueError) as error:
        return {}, f"Optuna could not tell: {' '.join(str(error).split())}"
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {knob: float(found.get(knob, 0.0)) for knob in knobs}, "PED-ANOVA"


def share_of_fastest(timed: int) -> float:
    return min(0.5, max(0.1, FASTEST / timed))


def _ped_anova(share: float) -> Any:
    import optuna

    evaluator: Any = optuna.importance.PedAnovaImportanceEvaluator
    try:
        return evaluator(target_quantile=share)
    except TypeError:  # its name in optuna 4.5
        return evaluator(baseline_quantile=share)


def study(knobs: list[str], timed: list[Row]) -> Any:
    """An Optuna study in memory that holds these candidates."""
    import optuna

    distributions: dict[str, Any] = {
        knob: optuna.distributions.CategoricalDistribution(_choices(row["config"][knob] for row in timed))
        for knob in knobs
    }
    made = optuna.create_study(direction="minimize")
    for row in timed:
        params = {knob: row["config"][knob] for knob in knobs}
        made.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=math.log(row["seconds"]))
        )
    return made


def explained(knob: str, timed: list[Row]) -> float:
    """The share of the variance of log time that the knob's value alone accounts for."""
    times = [math.log(row["seconds"]) for row in timed]
    mean = statistics.fmean(times)
    total = sum((time - mean) ** 2 for time in times)
    groups: dict[str, list[float]] = {}
    for row, time in zip(timed, times, strict=True):
        groups.setdefault(repr(row["config"][knob]), []).append(time)
    between = sum(len(group) * (statistics.fmean(group) - mean) ** 2 for group in groups.values())
    return min(1.0, between / total) if total else 0.0


def _choices(values: Any) -> tuple[Any, ...]:
    """Distinct and in a sensible order; True is not 1."""
    found = {repr(value): value for value in values}
    return tuple(sorted(found.values(), key=_rank))


def _rank(value: Any) -> tuple[int, float, str]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return 0, float(value), ""
    return 1, 0.0, str(value)


def _values(knob: str, rows: list[Row]) -> list[Row]:
    """What became of the candidates that had each value."""
    found = []
    able = [row for row in rows if knob in row["config"]]
    for value in _choices(row["config"][knob] for row in able):
        own = [row for row in able if repr(row["config"][knob]) == repr(value)]
        times = sorted(row["seconds"] for row in own if row["seconds"])
        found.append({
            "value": value, "tried": len(own), "timed": len(times), "best": times[0] if times else None,
            "median": statistics.median(times) if times else None,
        })  # fmt: skip
    return found
