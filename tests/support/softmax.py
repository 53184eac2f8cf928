"""Softmax kernels for tests: one call of each kind, checked by the op's own oracle, and rows that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fagen.ops.softmax import calls
from fagen.ops.softmax.call import SoftmaxCall
from fagen.ops.softmax.problem import SoftmaxProblem

inf, nan = math.inf, math.nan
# beside what a softmax makes of them in words: nothing finite, one NaN, one infinity, a part that is masked
ROWS = {
    "all -inf": [-inf] * 5, "+inf": [0.0, inf, 1.0], "NaN": [0.0, nan, 1.0], "NaN and -inf": [-inf, nan, -inf],
    "masked": [-inf, 2.0, -inf, 1.0], "both infinities": [inf, -inf], "large": [6e4, -6e4, 5.9e4], "one": [3.0],
}  # fmt: skip

Launch = Callable[[SoftmaxCall, dict[str, torch.Tensor]], None]


def sized(problem: SoftmaxProblem, lengths: tuple[int, ...], counts: tuple[int, ...]) -> Iterator[SoftmaxProblem]:
    """Problems of some lengths, each of another number of rows (or columns), in two batches now and then."""
    for i, length in enumerate(lengths):
        count, batch = counts[i % len(counts)], 1 + i % 2
        rows, columns = (count, length) if problem.along == "row" else (length, count)
        yield problem.replace(batch=batch, rows=rows, columns=columns)


def verify(problem: SoftmaxProblem, launch: Launch, seed: int = 0, device: str = "cpu") -> None:
    """Right by the oracle, between guards, at rows that begin anywhere."""
    made = calls.inputs(problem, device, seed, True)
    launch(made.call, made.outputs)
    verdict = calls.check(made.call, made.outputs)
    assert verdict, f"{problem}: {verdict.message}"
    assert made.damage() == "", problem


def check_rows(problem: SoftmaxProblem, launch: Launch, length: int, device: str = "cpu") -> None:
    """Rows that are not finite come out as PyTorch's: the same NaN, the same infinities, the rest near."""
    dtype: Any = calls._TORCH[problem.dtype]
    rows = [row * (length // len(row)) + row[:1] * (length % len(row)) for row in ROWS.values()]
    # what is special stands in one place alone, too: others must not outweigh it
    rows += [[0.0] * (length - 1) + [special] for special in (inf, nan, -inf)]
    x = torch.tensor(rows, dtype=dtype, device=device)[None]
    axis = 2
    if problem.along == "column":
        x, axis = x.transpose(1, 2).contiguous(), 1
    call = SoftmaxCall(x, calls._TORCH[problem.out_dtype], problem.along, problem.log)
    out = torch.full_like(x, 7.0, dtype=call.out_dtype)
    launch(call, {"out": out})
    want = calls.by_torch(call)
    tolerance = 4 * torch.finfo(call.out_dtype).eps
    torch.testing.assert_close(out, want, rtol=tolerance, atol=1e-6, equal_nan=True)
    assert want.isnan().any(axis).sum() == 7, "rows without NaN and with"
