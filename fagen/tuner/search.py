"""One family's search for one problem: Optuna by ask and tell over the family's knobs.

Every knob is a parameter of its own, so that the sampler learns which values are illegal, do not build or are slow. A
point it asks for that is illegal or known already is answered at once; after a few of those in a row, the nearest
legal configuration not yet seen is tried in its place.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import statistics
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fagen.errors import FagenError
from fagen.families import Config, Family
from fagen.families.base import Value
from fagen.families.space import Space
from fagen.ops.base import Problem
from fagen.target import Target

if TYPE_CHECKING:
    import optuna

    from fagen.tuner.model import Model

SAMPLERS = ("guided", "tpe", "random")
STARTUP = 8  # candidates by chance before TPE is asked
PROBES = 12  # candidates of a family that is far behind another one's best
FAR_BEHIND = 1.25  # times that best
FIRST_SHARE = 0.75  # of a problem's time for the first family that can serve it; the others share the rest
GUESSES = 1  # of a family's that are tried before a model that its cost model begins, the default among them
MISSES = 3  # answers without a new candidate, then one is picked
KEEP_REMEDY = "free some space, then go on with --resume"
_LOOK_AT = 4096  # unseen configs compared to find the nearest


def open_storage(path: str) -> optuna.storages.BaseStorage:
    """Optuna's journal, begun anew: the trials of a run that is resumed are told to it again.

    It is written without locks or syncs: no other process writes it, and what happened is kept in trials.jsonl.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    class Journal(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            try:
                with open(path, "ab") as file:
                    file.write(b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs))
            except OSError as error:
                raise FagenError(f"study {path} cannot be kept", str(error), KEEP_REMEDY) from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        open(path, "wb").close()
    except OSError as error:
        raise FagenError(f"study {path} cannot be kept", str(error), KEEP_REMEDY) from error
    return optuna.storages.JournalStorage(Journal(path))


class Search:
    """Hands out candidates (`next`) and hears what became of them (`tell`). `limit`: how many it may hand out.

    `whole`: each is measured in full, however slow it is. `rival`: seconds of another family's best. `musts` and the
    default are measured however short the time is: a winner must beat them.
    """

    def __init__(
        self, space: Space, storage: Any, *, seed: int, first: Iterable[Config], limit: int | None, exhaustive: bool,
        whole: bool = False, sampler: str = SAMPLERS[0], rival: float = math.inf,
        musts: Iterable[Config] = (),  # beside the default
        name: str = "",  # of a study that others may have begun
    ) -> None:  # fmt: skip
        import optuna

        from fagen.tuner.chosen_sampler import ChosenSampler

        self.space, self.limit, self.exhaustive, self.whole, self.sampler = space, limit, exhaustive, whole, sampler
        self.rival = rival
        # every candidate handed out and told: its seconds, None if it failed
        self.seen: dict[Config, float | None] = {}
        self.best = math.inf
        self.rejected: dict[Config, tuple[str, str]] = {}  # illegal ones asked for: constraint and reason
        self._legal = frozenset(space.legal)
        default = space.family.default(space.problem, space.target)
        self._musts = [config for config in dict.fromkeys([default, *musts]) if config in self._legal]
        self._flight: dict[Config, list[optuna.Trial]] = {}
        self._random = random.Random(f"{seed}/{space.family.name}/{space.problem.key}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which of these are explicit defaults differs between versions
            chooser = (
                optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=STARTUP)
                if sampler == "tpe"
                else optuna.samplers.RandomSampler(seed=seed)  # which is always told what to choose
            )
        self._told = ChosenSampler(chooser)
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.CategoricalDistribution(values) for name, values in _used(space).items()
        }
        self._study = optuna.create_study(
            storage=storage,
            sampler=self._told,
            study_name=name or f"{space.family.name}:{space.problem.key}",
            load_if_exists=bool(name),
            direction="minimize",
        )
        self._order = self._random.sample(space.legal, len(space.legal))
        self._model = self._make_model(seed) if sampler == "guided" and not exhaustive else None
        begin = self._order if exhaustive or sampler == "random" else self._order[:STARTUP] if sampler == "tpe" else []
        self._queue = iter([*dict.fromkeys(first), *begin])

    def _make_model(self, seed: int) -> Model:
        from fagen.tuner.model import Model

        family, problem, target = self.space.family, self.space.problem, self.space.target
        cost = functools.partial(family.cost, problem, target) if family.cost else None
        return Model(self.space.legal, cost, f"{seed}/{problem.key}")

    @property
    def waiting(self) -> bool:
        """Whether more may come after `next` had none: from other processes that search with this one."""
        return False

    def rank(self, config: Config) -> int:
        """Its place among those that are measured first."""
        return self._musts.index(config) if config in self._musts else len(self._musts)

    def needs(self, config: Config) -> bool:
        """Whether a winner must beat it."""
        return config in self._musts

    @property
    def lacking(self) -> bool:
        """Whether one is missing that a winner must beat."""
        return any(config not in self.seen for config in self._musts)

    @property
    def issued(self) -> int:
        return len(self.seen) + len(self._flight)

    @property
    def goal(self) -> int:
        """How many candidates there will be, at most."""
        most = len(self._legal) if self.limit is None else min(len(self._legal), self.limit)
        return min(most, PROBES) if self.best > FAR_BEHIND * self.rival and not self.exhaustive else most

    @property
    def bar(self) -> float:
        """The time that a candidate is measured against, and cut short when it is far behind."""
        return math.inf if self.whole else self.best

    def known(self, config: Config, seconds: float | None) -> None:
        """A candidate of an earlier run."""
        import optuna

        if config in self.seen or config not in self._legal:
            return
        trial = optuna.trial.create_trial(
            params=dict(config),
            distributions=self._distributions,
            value=seconds,
            state=optuna.trial.TrialState.COMPLETE if seconds is not None else optuna.trial.TrialState.PRUNED,
        )
        self._study.add_trial(trial)
        self._note(config, seconds)

    def next(self) -> Config | None:
        """A new legal candidate, now in flight; None when there is none left to hand out."""
        if self.issued >= self.goal:
            return None
        misses, asked = 0, None
        while True:
            chosen = self._from_queue() or self._from_model()
            if chosen is None and (self.sampler != "tpe" or misses >= MISSES):
                chosen = self._nearest(asked)
            self._told.choice = chosen
            trial = self._study.ask(self._distributions)
            asked = self.space.family.config({name: trial.params[name] for name in self._distributions})
            if asked not in self._legal:
                broken = self.space.family.rejects(self.space.problem, self.space.target, asked)
                self.rejected[asked] = broken or ("unknown", "not among the legal ones")
                self._prune(trial, f"constraint: {self.rejected[asked][0]}")
            elif asked in self.seen:
                self._answer(trial, self.seen[asked])
            elif asked in self._flight:
                self._flight[asked].append(trial)
            else:
                self._flight[asked] = [trial]
                if self._model:
                    self._model.take(asked)
                return asked
            misses += 1

    def tell(self, config: Config, seconds: float | None, reason: str = "") -> None:
        """What became of a candidate: its time, or why it has none."""
        for trial in self._flight.pop(config):
            if seconds is None:
                self._prune(trial, reason)
            else:
                self._study.tell(trial, seconds)
        self._note(config, seconds)

    def _note(self, config: Config, seconds: float | None) -> None:
        self.seen[config] = seconds
        if self._model:
            self._model.tell(config, seconds)
        if seconds is not None:
            self.best = min(self.best, seconds)

    def _answer(self, trial: optuna.Trial, seconds: float | None) -> None:
        if seconds is None:
            self._prune(trial, "known to fail")
        else:
            self._study.tell(trial, seconds)

    def _prune(self, trial: optuna.Trial, reason: str) -> None:
        import optuna

        trial.set_user_attr("reason", reason)
        self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def _unseen(self, config: Config) -> bool:
        return config not in self.seen and config not in self._flight

    def _from_queue(self) -> Config | None:
        return next((config for config in self._queue if config in self._legal and self._unseen(config)), None)

    def _from_model(self) -> Config | None:
        while self._model and (config := self._model.propose()) is not None:
            if self._unseen(config):
                return config
            self._model.take(config)  # others have it in hand
        return None

    def _nearest(self, asked: Config | None) -> Config:
        """The unseen legal config that differs in the fewest knobs, ties by chance."""
        unseen = itertools.islice((config for config in self._order if self._unseen(config)), _LOOK_AT)
        if asked is None:
            return next(unseen)
        return min(unseen, key=lambda config: sum(config[name] != value for name, value in asked.items()))


class Pace:
    """How many candidates to have on their way: enough that the measuring process never waits, and no more, since
    each was chosen without knowing what became of those before it."""

    def __init__(self) -> None:
        self._compile: list[float] = []
        self._measure: list[float] = []

    def compiled(self, seconds: float) -> None:
        self._compile.append(seconds)

    def measured(self, seconds: float) -> None:
        self._measure.append(seconds)

    def ahead(self, workers: int, measurers: int = 1) -> int:
        if len(self._measure) < 4 or not self._compile:
            return workers + 1
        lasts, takes = (statistics.median(among[-32:]) for among in (self._compile, self._measure))
        return min(2 * workers + 1, math.ceil(measurers * 1.2 * lasts / takes) + 2 * measurers + 1)


def guesses(family: Family, problem: Problem, target: Target, sampler: str = SAMPLERS[0]) -> list[Config]:
    """What to try first, the default before all. A cost model knows better than most of the family's own guesses."""
    found = list(dict.fromkeys([family.default(problem, target), *family.first_configs(problem, target)]))
    return found[:GUESSES] if family.cost and sampler == "guided" else found


def portion(turn: int, count: int) -> float:
    """Of a problem's time, what is over when the search of so many families' `turn`-th ends."""
    return 1.0 if count == 1 else FIRST_SHARE + (1 - FIRST_SHARE) * turn / (count - 1)


def _used(space: Space) -> dict[str, tuple[Value, ...]]:
    """The values of each knob that some legal config has, in the knob's order."""
    return {
        knob.name: tuple(c for c in knob.choices if c in among)
        for knob in space.family.knobs
        if (among := {config[knob.name] for config in space.legal})
    }
