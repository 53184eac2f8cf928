"""What the machine itself can do, and the state it is in: the rate of matrix products, clocks, power, temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fagen import nvml as nvml_of
from fagen.target import Target

if TYPE_CHECKING:
    import torch

_SIZES = {"cuda": (8192, "bfloat16"), "cpu": (1024, "float32")}
_ROUNDS, _SECONDS = 15, 0.3
_UNDER_LOAD = 100  # products that are under way while the clocks are read


class Machine:
    """The rate of a square matrix product, sampled in the course of a run as the rows are timed."""

    def __init__(self, target: Target) -> None:
        import torch

        self.device = "cuda" if target.is_gpu else "cpu"
        self.size, self.dtype = _SIZES[self.device]
        shape, dtype = (self.size, self.size), getattr(torch, self.dtype)
        self._a, self._b = (torch.randn(shape, device=self.device).to(dtype) for _ in range(2))
        self._c = torch.empty_like(self._a)
        self.samples: list[dict[str, Any]] = []

    def _product(self) -> torch.Tensor:
        import torch

        return torch.mm(self._a, self._b, out=self._c)

    def sample(self, when: str) -> dict[str, Any]:
        from fagen import measure

        seconds = measure.time_calls(
            {"product": self._product}, device=self.device, rounds=_ROUNDS, min_seconds=_SECONDS
        )["product"].median
        self.samples.append({"when": when, "tflops": 2 * self.size**3 / seconds / 1e12, **self._state()})
        return self.samples[-1]

    def _state(self) -> dict[str, Any]:
        if self.device == "cpu":
            return {}
        import torch

        for _ in range(_UNDER_LOAD):
            self._product()
        found = nvml()
        torch.cuda.synchronize()
        return found

    @property
    def what(self) -> str:
        return f"{self.dtype} matrix product {self.size}x{self.size}x{self.size}"

    def limit(self) -> float:
        """TFLOP/s: the median of the samples."""
        import statistics

        return statistics.median(sample["tflops"] for sample in self.samples)


# our names of the driver's readings
_NAMES = {"clock_mhz": "sm_mhz", "memory_mhz": "memory_mhz", "power_w": "power_w"}
_NAMES |= {"power_limit_w": "power_limit_w", "temp_c": "temperature_c"}


def nvml() -> dict[str, float]:
    """Readings of the current GPU by the driver's library; what it does not tell is left out. Nothing is changed."""
    facts = nvml_of.current()
    return {name: facts[theirs] for theirs, name in _NAMES.items() if theirs in facts}
