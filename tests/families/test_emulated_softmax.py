"""simt_softmax runs on the CPU: every scheme, both directions, rows that begin anywhere, columns, parts and merges.

What a GPU has beyond the emulator (tests/emulator) is left to tests/gpu.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from fagen.families import simt_softmax
from fagen.ops.softmax.calls import Params, params
from fagen.ops.softmax.problem import SoftmaxProblem
from fagen.target import known
from tests.support import emulated
from tests.support.softmax import check_rows, sized, verify

FAMILY, TARGET = simt_softmax.FAMILY, known("sm_90")
# below, at and beyond one vector, a warp's, what is held; several rounds of the rest
LENGTHS = (1, 7, 33, 256, 300, 1029, 2500)
_SMALL: dict[str, Any] = {"threads": 32, "lines": 4, "held": 1, "vector_bytes": 16, "cluster": 1}
# a kernel each: of the problem, of the config
KERNELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "three passes": ({}, {"scheme": "three_pass", "threads": 128, "lines": 1}),
    "two passes, half a warp a row": ({"dtype": "bf16"}, {"scheme": "two_pass", "threads": 8, "lines": 8}),
    "registers, folded": ({"dtype": "fp16"}, {"scheme": "registers", "held": 2, "fold_scale": True}),
    "shared, widened, logarithm": (
        {"dtype": "fp16", "out_dtype": "fp32", "log": True},
        {"scheme": "shared", "held": 2, "threads": 128, "lines": 1},
    ),
    "parts": ({"dtype": "bf16"}, {"scheme": "split", "threads": 128, "lines": 1, "vector_bytes": 4}),
    "a cluster": (
        {"dtype": "bf16"},
        {"scheme": "registers", "threads": 128, "lines": 1, "cluster": 4, "held": 2, "vector_bytes": 4},
    ),
    "backward, a cluster, narrowed": (
        {"direction": "backward", "out_dtype": "bf16"}, {"scheme": "shared", "threads": 128, "lines": 1, "cluster": 2}
    ),
    "backward, parts, logarithm": (
        {"direction": "backward", "dtype": "fp16", "log": True}, {"scheme": "split", "threads": 128, "lines": 1}
    ),
    "columns, registers, backward": (
        {"along": "column", "direction": "backward"},
        {"scheme": "registers", "threads": 8, "lines": 32, "held": 2, "vector_bytes": 4},
    ),
    "columns, parts": (  # more of them than a team has threads
        {"along": "column", "dtype": "bf16"}, {"scheme": "split", "threads": 8, "lines": 32, "vector_bytes": 4}
    ),
}  # fmt: skip


def _problem(name: str) -> SoftmaxProblem:
    return SoftmaxProblem(**KERNELS[name][0])


@functools.cache
def _source(name: str) -> str:
    config = FAMILY.config({"fold_scale": False, **_SMALL, **KERNELS[name][1]})
    text, most = emulated.source(FAMILY, _problem(name), TARGET, config), "kMostBlocks = 1 << 30"
    assert most in text
    return text.replace(most, "kMostBlocks = 4")  # so that each has several groups of lines


@pytest.fixture
def launches(cache_folder: Path):
    def launch(name: str, seed: int = 0, units: int = 3):
        library = emulated.build(_source(name), cache_folder / "emulated", Params)
        return functools.partial(emulated.launch, library, seed=seed, units=units, fill=params)

    return launch


@pytest.mark.parametrize("name", KERNELS)
def test_right_at_every_length(name: str, launches) -> None:
    for number, problem in enumerate(sized(_problem(name), LENGTHS, (1, 3, 5, 33))):
        verify(problem, launches(name, seed=number, units=2 + number), seed=number)


@pytest.mark.parametrize("name", [name for name in KERNELS if "backward" not in name])
def test_rows_that_are_not_finite(name: str, launches) -> None:
    for length in (8, 700):
        check_rows(_problem(name), launches(name), length)


@pytest.mark.parametrize("name", ["two passes, half a warp a row", "backward, a cluster, narrowed"])
def test_rows_of_a_layout_that_vectors_do_not_fit(name: str, launches) -> None:
    """Input and output begin at different places of a vector: elements are then moved one by one."""
    from fagen.ops.softmax import calls

    problem = _problem(name).replace(rows=3, columns=290)
    made = calls.inputs(problem, "cpu", 3, True)
    if made.call.dout is not None:  # the inputs differ, too
        room = torch.empty(1, 3, 301)[..., 11:].copy_(made.call.dout)
        made = made.change(dout=room)
    out = torch.full((1, 3, 300), 7.0, dtype=made.call.out_dtype)
    for begin in range(1, 8):
        launches(name)(made.call, {"out": out[..., begin : begin + 290]})
        assert calls.check(made.call, {"out": out[..., begin : begin + 290]})
        assert (out[..., begin + 290 :] == 7).all()
        assert begin == 1 or (out[..., 1 : begin - 1] != 7).all()  # of the launch before
        assert (out[..., 0] == 7).all()


# ---- what is wrong is found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("columns, parts", "s.sum = s.sum * shrink(s.max, subtracted) +", "s.sum = s.sum +"),
        ("registers, folded", "if (s.max > before) s.sum *=", "if (false) s.sum *="),
        ("three passes", "      __syncthreads();\n", ""),  # read before it is written
        ("a cluster", "      ptx::cluster_sync();\n      const", "      const"),
    ],
)
def test_a_fault_is_found(name: str, old: str, new: str, cache_folder: Path) -> None:
    text = _source(name)
    assert old in text
    library = emulated.build(text.replace(old, new), cache_folder / "emulated", Params)
    launch = functools.partial(emulated.launch, library, units=3, fill=params)
    found = 0
    for seed, problem in enumerate(sized(_problem(name), LENGTHS, (3, 5))):
        try:
            verify(problem, launch, seed=seed)
        except AssertionError:
            found += 1
    assert found
