"""The final round's clock, on a simulated GPU whose own clock follows the power of what runs on it."""

from __future__ import annotations

import math
import types
from random import Random

import pytest

from fagen import families
from fagen.codegen.spec import KernelSpec
from fagen.families import Config
from fagen.target import host
from fagen.timing import sustained, timer
from fagen.timing.timer import Timing
from fagen.tuner import result
from tests.support.fake_family import FAMILY, PROBLEM

LIMIT = 1.0  # of power


class Gpu:
    """Kernels by name: seconds of a call at the full clock, and power there. `lag`: seconds in which the clock goes
    most of the way to what the power limit allows; `wander`: how far it strays, in some seconds and back."""

    def __init__(self, kernels: dict[str, tuple[float, float]], lag: float, wander: float = 0.0) -> None:
        self.kernels, self.lag, self.wander = kernels, lag, wander
        self.now, self.clock, self.chance = 0.0, 1.0, Random(3)

    def run(self, name: str) -> None:
        work, power = self.kernels[name]
        self.now += 2e-5  # the host starts it
        while work > 0:
            step = min(5e-5, work / self.clock)
            stays = min(1.0, LIMIT / power) * (1 + self.wander * math.sin(2 * self.now))
            self.clock += (stays - self.clock) * (1 - math.exp(-step / self.lag))
            self.now, work = self.now + step, work - step * self.clock
            if work < 1e-9:
                return

    def sampler(self, call, device):
        gpu = self

        class Sampler:
            calls = 1

            def sample(self) -> float:
                begin = gpu.now
                for _ in range(self.calls):
                    call()
                return (gpu.now - begin) / self.calls * gpu.chance.uniform(0.995, 1.005)

        return Sampler()


@pytest.fixture
def winners(monkeypatch):
    """By the rule of short calls in turn, and by that of bouts beside a reference."""
    monkeypatch.setattr(families, "all_families", lambda: (FAMILY,))

    def find(gpu: Gpu, seconds: float = 3.0) -> tuple[str, str]:
        monkeypatch.setattr(timer, "sampler_of", gpu.sampler)
        for module in (timer, sustained):
            monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: gpu.now))
        calls = {name: lambda name=name: gpu.run(name) for name in gpu.kernels}
        ours = [name for name in calls if name != "torch"]
        configs = [Config({"style": "plain", "variant": n}) for n, _ in enumerate(ours, 1)]
        labels = {name: KernelSpec(FAMILY, PROBLEM, host(), config) for name, config in zip(ours, configs, strict=True)}
        old = timer.time_calls(calls, device="cuda", rounds=30, min_seconds=seconds / 2, max_seconds=seconds)
        new = sustained.time_calls(calls, "default", device="cuda", seconds=seconds)
        find.times = old, new
        return result.choose(old, labels)[0], result.choose(new, labels)[0]

    return find


def test_who_follows_a_cool_kernel_is_not_taken_for_fast(winners):
    """PyTorch draws little power, so that the clock rises for whoever is timed after it, which always is the default.
    By itself #1 is 6 % faster; in turn nothing beats the default."""
    gpu = Gpu({"default": (0.686e-3, 1.5), "#1": (0.645e-3, 1.5), "torch": (3e-3, 0.5)}, lag=3e-3)
    assert winners(gpu) == ("default", "#1")
    _, new = winners.times
    assert new["#1"].median / new["default"].median == pytest.approx(645 / 686, abs=0.004)
    assert new["default"].median == pytest.approx(0.686e-3 * 1.5, rel=0.02), "the time at its own clock"


def test_what_is_fast_only_on_a_cool_gpu_does_not_win(winners):
    """#1 needs more power than the limit allows: in turn with cool ones it runs at the full clock, by itself it can
    not. Who uses it runs it layer after layer."""
    gpu = Gpu({"default": (0.70e-3, 0.95), "#1": (0.64e-3, 1.3), "torch": (2e-3, 0.4)}, lag=15e-3)
    assert winners(gpu) == ("#1", "default")


@pytest.mark.parametrize("seconds", [0.4, 3.0])
def test_a_clock_that_strays_is_nobodys_noise(winners, seconds):
    gpu = Gpu({"default": (0.686e-3, 1.0), "#1": (0.665e-3, 1.0), "#2": (0.684e-3, 1.0)}, lag=1e-3, wander=0.1)
    assert winners(gpu, seconds)[1] == "#1"
    _, new = winners.times
    assert all(timing.spread < 0.01 * timing.median for timing in new.values())
    assert new["default"].samples >= sustained.ROUNDS


def test_equal_kernels_tie(winners):
    gpu = Gpu({"default": (0.686e-3, 1.2), "#1": (0.686e-3, 1.2), "torch": (1e-3, 0.5)}, lag=5e-3, wander=0.05)
    assert winners(gpu)[1] == "default"


def test_bouts_keep_to_their_seconds(winners):
    """However many take part; calls that are longer than a bout get one sample each."""
    many = Gpu({"default": (1e-3, 1.0), **{f"#{n}": (1e-3, 1.0) for n in range(1, 13)}}, lag=1e-3)
    begin = many.now
    winners(many, 0.5)
    assert many.now - begin < 0.5 + 0.7 + 13 * 0.05, "both rules together, with their warm-up"
    long = Gpu({"default": (0.2, 1.0), "#1": (0.1, 1.0)}, lag=1e-3)
    assert winners(long, 0.4)[1] == "#1"
    assert winners.times[1]["#1"].samples == sustained.LEAST_ROUNDS


def test_the_warm_up_ends_when_the_clock_stands_still(monkeypatch):
    """A GPU that was idle begins at its full clock."""
    taken = []
    for lag in (1e-3, 0.2):
        gpu = Gpu({"it": (1e-3, 1.5)}, lag=lag)
        monkeypatch.setattr(sustained, "time", types.SimpleNamespace(perf_counter=lambda gpu=gpu: gpu.now))
        sustained._warm(gpu.sampler(lambda gpu=gpu: gpu.run("it"), "cuda"), 3.0)
        assert gpu.clock == pytest.approx(1 / 1.5, rel=0.03)
        taken.append(gpu.now)
    assert taken[0] < 0.35 < taken[1] < 3.0


def test_a_single_call_is_its_own_reference(winners):
    gpu = Gpu({"default": (1e-3, 1.0)}, lag=1e-3)
    assert winners(gpu, 0.2) == ("default", "default")
    assert isinstance(winners.times[1]["default"], Timing)
