"""What the machine itself can do, and the state it is in: matrix products, copies, clocks, power, temperature."""

from __future__ import annotations

import functools
import statistics
from typing import TYPE_CHECKING, Any

from fagen.target import Target
from fagen.timing import load
from fagen.timing import nvml as nvml_of

if TYPE_CHECKING:
    import torch

_SIZES = {"cuda": (8192, "bfloat16"), "cpu": (1024, "float32")}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # far more than any cache holds
_ROUNDS, _SECONDS = 15, 0.3
_UNDER_LOAD = 100  # products that are under way while the clocks are read


class Machine:
    """The rates of a square matrix product and of a copy, sampled in the course of a run as the rows are timed.

    `reads` adds the rate of `torch.sum`, which writes next to nothing: it bounds what only reads.
    """

    def __init__(self, target: Target, *, reads: bool = False) -> None:
        import torch

        self.reads = reads
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
        from fagen.timing import timer

        clock = functools.partial(timer.time_calls, device=self.device, rounds=_ROUNDS, min_seconds=_SECONDS)
        product = clock({"product": self._product})["product"].median
        found = {"when": when, "tflops": 2 * self.size**3 / product / 1e12, "gbps": self._bandwidth(clock)}
        if self.reads:
            found["read_gbps"] = self._read_rate(clock)
        self.samples.append(found | self._state())
        return self.samples[-1]

    def _bandwidth(self, clock: Any) -> float:
        """GB/s of a copy, read and written; its memory is only held meanwhile."""
        import torch

        size = _COPY_BYTES[self.device]
        source, target = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        return 2 * size / clock({"copy": functools.partial(target.copy_, source)})["copy"].median / 1e9

    def _read_rate(self, clock: Any) -> float:
        """GB/s of a sum over as much memory."""
        import torch

        size = _COPY_BYTES[self.device]
        source = torch.zeros(size // 4, dtype=torch.float32, device=self.device)
        out = torch.zeros((), dtype=torch.float32, device=self.device)
        call = functools.partial(torch.sum, source, dim=0, out=out)
        return float(size / clock({"read": call})["read"].median / 1e9)

    def _state(self) -> dict[str, Any]:
        if self.device == "cpu":
            return {}
        import torch

        for _ in range(_UNDER_LOAD):
            self._product()
        state = nvml_of.current()
        torch.cuda.synchronize()
        said = load.throttled(state, under_load=True)
        return _ours(state) | ({"throttled": said} if said else {})

    @property
    def what(self) -> str:
        return f"{self.dtype} matrix product {self.size}x{self.size}x{self.size}"

    def limits(self) -> dict[str, float]:
        """TFLOP/s and GB/s: the medians of the samples."""
        names = ("tflops", "gbps", "read_gbps") if self.reads else ("tflops", "gbps")
        return {name: statistics.median(sample[name] for sample in self.samples) for name in names}

    def least_seconds(self, flops: float, moved: float) -> tuple[float, str]:
        """The least time for so many FLOPs and bytes, and which of the two takes it."""
        rates = self.limits()
        memory = moved / rates["read_gbps" if self.reads else "gbps"] / 1e9
        compute = flops / rates["tflops"] / 1e12
        return max((compute, "compute"), (memory, "memory"))


# our names of the driver's readings
_NAMES = {"clock_mhz": "sm_mhz", "memory_mhz": "memory_mhz", "power_w": "power_w"}
_NAMES |= {"power_limit_w": "power_limit_w", "temp_c": "temperature_c"}


def _ours(facts: dict[str, Any]) -> dict[str, Any]:
    """Readings of the driver's library; what it does not tell is left out."""
    return {name: facts[theirs] for theirs, name in _NAMES.items() if theirs in facts}
