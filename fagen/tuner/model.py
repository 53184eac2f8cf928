"""What is known of a space so far, as a guess of every config's time: which one is worth trying next.

A Gaussian process over the logarithm of the time. Its mean is the family's cost model where there is one. Two
configs are alike in the knobs that they share, numbers the more so the nearer they are: a part of the time is each
knob's own and adds up (a few trials say something about all configs), a part belongs to the combination. Candidates
in flight count as if they had come out as guessed, so that many can be asked for at once and differ. So do those that
failed, which say nothing about times: a second process guesses which configs work at all.

The legal configs are a finite list, and a row of the Cholesky factor is added for each candidate; a proposal costs
milliseconds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from fagen.families import Config
from fagen.families.base import Value

POOL = 8192  # configs that are kept in mind: the cheapest by the cost model, and some by chance
NOISE = 1e-4  # variance of a time's logarithm: 1 % from one measurement to the next
CLIP = 0.9  # log of how many times the best something is; what is slower is just slow
PRIOR = 0.08  # variance around the mean before anything is known
MISTRUST = 0.5  # of the cost model's slope
# part of the distance of two numbers that is the same however near they are: 128 keys a tile beat 112 and 144
ODD = 0.5
# how the knobs matter and how much a measurement is disturbed, decided by likelihood; the first until then
_SHAPES = [
    (share, scale, noise) for share in (0.6, 0.35, 0.85) for scale in (0.8, 0.35, 1.8) for noise in (NOISE, 9 * NOISE)
]
FAILURE_NOISE = 0.05  # variance of whether a config works, beside a prior of 1
LEAST_HOPE = 0.05  # what a config's hope to work is not taken for less than
CAUTION = 3  # power of that hope: what fails leaves its neighbours unknown, and the unknown promises much
_REFIT = (8, 16, 32, 64, 128, 256, 512)  # told candidates after which the shape is chosen anew

Array = np.ndarray


class Model:
    def __init__(self, configs: Sequence[Config], cost: Callable[[Config], float] | None, seed: int | str) -> None:
        self._random = random.Random(seed)
        logs = np.array([math.log(cost(c)) for c in configs]) if cost else np.zeros(len(configs))
        keep = self._pool(logs, len(configs))
        self._random.shuffle(keep)  # the first of equals is proposed: not always the same one
        self.configs = [configs[i] for i in keep]
        self.index = {config: i for i, config in enumerate(self.configs)}
        self._prior = logs[keep] - logs[keep].mean()
        spread = float(self._prior.std())
        self._slope = self._prior / spread * min(spread, 1.0) * MISTRUST if spread > 0 else self._prior
        self._codes, self._apart = self._distances()
        self._taken: list[int] = []  # in order
        self._values: list[float | None] = []  # their log seconds; None in flight and of what failed
        self._failed: list[int] = []
        self._pivots: list[float] = []
        self._free = np.ones(len(self.configs), bool)
        self._refits = list(_REFIT)
        self._shape(*_SHAPES[0])

    def _pool(self, logs: Array, count: int) -> list[int]:
        if count <= POOL:
            return list(range(count))
        ranked = [int(i) for i in np.argsort(logs, kind="stable")[: POOL * 3 // 4]]
        among = set(ranked)
        rest = [i for i in range(count) if i not in among]
        return ranked + self._random.sample(rest, POOL - len(ranked))

    def _distances(self) -> tuple[Array, list[Array]]:
        """Each config's place among the values of each knob, and how far those are apart: 0 to 1."""
        codes, apart = [], []
        for name in self.configs[0]:
            values = sorted({config[name] for config in self.configs}, key=_order)
            if len(values) == 1:
                continue
            place = {value: i for i, value in enumerate(values)}
            codes.append([place[config[name]] for config in self.configs])
            ranks = np.arange(len(values))
            unequal = (ranks[:, None] != ranks[None, :]).astype(float)
            if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
                near = np.abs(ranks[:, None] - ranks[None, :]) / max(2, len(values) - 1)
                apart.append(ODD * unequal + (1 - ODD) * near)
            else:
                apart.append(unequal)
        return np.array(codes, int).reshape(len(codes), len(self.configs)), apart

    # ---- the process --------------------------------------------------------------------------------------------

    def _shape(self, share: float, scale: float, noise: float) -> None:
        """Of the variance, `share` is the knobs' own; likeness falls with distance times `scale`."""
        self._share, self._noise = share, noise
        self._like = [np.exp(-scale * table) for table in self._apart]
        self._alone = [np.exp(-2.5 * scale * table) for table in self._apart]
        self._likeness: dict[int, Array] = {}
        self._rows, self._pivots = np.zeros((0, len(self.configs))), []
        self._left = np.full(len(self.configs), PRIOR) + PRIOR + self._slope**2
        taken, self._taken = self._taken, []
        for index in taken:
            self._add(index)

    def _alike(self, index: int) -> Array:
        """How alike each config is to this one: 0 to 1."""
        if index in self._likeness:
            return self._likeness[index]
        together, alone = np.ones(len(self.configs)), np.zeros(len(self.configs))
        for code, like, own in zip(self._codes, self._like, self._alone, strict=True):
            together *= like[code[index]][code]
            alone += own[code[index]][code]
        alone = alone / len(self._like) if self._like else together
        self._likeness[index] = self._share * alone + (1 - self._share) * together
        return self._likeness[index]

    def _kernel(self, index: int) -> Array:
        level = PRIOR  # it is unknown as well
        return PRIOR * self._alike(index) + level + self._slope[index] * self._slope

    def _add(self, index: int) -> None:
        """A row more of the Cholesky factor, for a candidate that was taken."""
        count = len(self._taken)
        if count == len(self._rows):
            self._rows = np.vstack([self._rows, np.zeros((max(32, count), len(self.configs)))])
        before = self._rows[:count]
        pivot = math.sqrt(max(float(self._left[index]), 0.0) + self._noise)
        self._rows[count] = (self._kernel(index) - before[:, index] @ before) / pivot
        self._left -= self._rows[count] ** 2
        self._pivots.append(pivot)
        self._taken.append(index)

    def _residuals(self) -> tuple[list[float | None], float]:
        """What came out over the mean, slow ones clipped; and the best log of a time."""
        best = min((value for value in self._values if value is not None), default=0.0)
        return [
            None if value is None else min(value, best + CLIP) - float(self._prior[index])
            for index, value in zip(self._taken, self._values, strict=True)
        ], best

    def _solve(self) -> tuple[Array, Array, float]:
        """Mean and deviation of every config's log time, and the best so far."""
        residuals, best = self._residuals()
        told = [value for value in residuals if value is not None]
        level = sum(told) / len(told) if told else 0.0
        count = len(self._taken)
        z = np.zeros(count)
        for n, (index, value) in enumerate(zip(self._taken, residuals, strict=True)):
            if value is not None:  # else as guessed, which is zero here
                z[n] = (value - level - float(self._rows[:n, index] @ z[:n])) / self._pivots[n]
        mean = self._prior + level + z @ self._rows[:count]
        return mean, np.sqrt(np.maximum(self._left, 0)), best

    # ---- what the search asks and tells --------------------------------------------------------------------------

    def take(self, config: Config) -> None:
        """It is in flight now."""
        index = self.index.get(config)
        if index is not None and self._free[index]:
            self._add(index)
            self._values.append(None)
            self._free[index] = False

    def tell(self, config: Config, seconds: float | None) -> None:
        self.take(config)
        index = self.index.get(config)
        if index is None:
            return
        self._values[self._taken.index(index)] = math.log(seconds) if seconds else None
        if not seconds:
            self._failed.append(index)
        told = sum(value is not None for value in self._values)
        if self._refits and told >= self._refits[0]:
            self._refits = [n for n in self._refits if n > told]
            self._choose_shape()

    def propose(self) -> Config | None:
        """The config from which the largest improvement is expected; None when all are taken."""
        if not self._free.any():
            return None
        mean, deviation, best = self._solve()
        if not any(value is not None for value in self._values):
            best = float(mean[self._free].min())
        z = (best - mean) / np.maximum(deviation, 1e-9)
        gain = deviation * (z * _normal_below(z) + np.exp(-z * z / 2) / math.sqrt(2 * math.pi))
        gain = gain * self._hope()
        gain[~self._free] = -1.0
        return self.configs[int(np.argmax(gain))]

    def _hope(self) -> Array | float:
        """The weight of a gain by how likely the config works at all."""
        if not self._failed:
            return 1.0
        worked = [index for index, value in zip(self._taken, self._values, strict=True) if value is not None]
        told = self._failed + worked
        alike = np.array([self._alike(index) for index in told])
        missing = np.array([-1.0] * len(self._failed) + [0.0] * len(worked))
        weights = np.linalg.solve(alike[:, told] + FAILURE_NOISE * np.eye(len(told)), missing)
        return np.clip(1 + weights @ alike, LEAST_HOPE, 1) ** CAUTION

    def _choose_shape(self) -> None:
        """The shape under which what was told is likeliest."""
        residuals, _ = self._residuals()
        told = [(i, r) for i, r in zip(self._taken, residuals, strict=True) if r is not None][-160:]
        places = np.array([index for index, _ in told])
        values = np.array([value for _, value in told])
        values = values - values.mean()
        best, chosen = -math.inf, _SHAPES[0]
        for shape in _SHAPES:
            covariance = self._covariance(places, *shape[:2]) + shape[2] * np.eye(len(places))
            try:
                factor = np.linalg.cholesky(covariance)
            except np.linalg.LinAlgError:
                continue
            z = np.linalg.solve(factor, values)
            likelihood = -0.5 * float(z @ z) - float(np.log(np.diag(factor)).sum())
            if likelihood > best:
                best, chosen = likelihood, shape
        self._shape(*chosen)

    def _covariance(self, places: Array, share: float, scale: float) -> Array:
        together, alone = np.ones((len(places),) * 2), np.zeros((len(places),) * 2)
        for code, table in zip(self._codes, self._apart, strict=True):
            apart = table[code[places]][:, code[places]]
            together *= np.exp(-scale * apart)
            alone += np.exp(-2.5 * scale * apart)
        alone = alone / len(self._apart) if self._apart else together
        slope = self._slope[places]
        return PRIOR * (share * alone + (1 - share) * together) + PRIOR + slope[:, None] * slope[None, :]


def _order(value: Value) -> tuple[bool, Value]:
    return isinstance(value, str), value


def _normal_below(z: Array) -> Array:
    """The normal distribution's function, to 1e-3: enough to rank candidates."""
    return 1 / (1 + np.exp(-np.clip(1.5976 * z + 0.070566 * z**3, -500, 500)))
