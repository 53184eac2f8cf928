"""Each check of a kernel, by one made to break just that: the tuner's verdict, and that on a winner gone stale."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fagen.build import toolchain
from fagen.codegen.spec import KernelSpec
from fagen.families import Config
from fagen.runtime import kernel
from fagen.runtime.kernel import Kernel
from fagen.target import host
from fagen.tuner import evaluate
from fagen.tuner.messages import MeasureRequest
from fagen.verify import checks
from tests.support import fake_family

pytestmark = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
FAMILY, PROBLEM, HERE = fake_family.FAMILY, fake_family.PROBLEM, host()
PLAIN = Config({"style": "plain", "variant": 1})
OWN = PROBLEM.batch  # no small size has so many batches
Fault = Callable[[Any], None]  # of a launch's params


def floats(address: int, at: int) -> torch.Tensor:
    """One element of memory, counted from a tensor's first one."""
    return torch.frombuffer((ctypes.c_float * 1).from_address(address + 4 * at), dtype=torch.float32)


def address(p: Any, name: str) -> int:
    return p.lse if name == "lse" else getattr(p, name).data


def elements(p: Any, name: str) -> int:
    return p.batch * p.heads * p.seqlen_q * (p.head_dim_v if name == "o" else 1)


def write(name: str, value: float, *, at: int = 0, end: bool = False, only: str = "") -> Fault:
    """One element is written after the kernel ran, counted from the first, or from one past the last.

    `only` where the problem has its "own" size, or where it is a "small" one.
    """

    def fault(p: Any) -> None:
        if address(p, name) and only in ("", "own" if p.batch == OWN else "small"):
            place = at + (elements(p, name) if end else 0)
            floats(address(p, name), place).fill_(value)

    return fault


last = functools.partial(write, at=-1, end=True)


def without_lse(p: Any) -> None:
    """Wrong only as it is timed."""
    if not p.lse:
        floats(p.o.data, 0).fill_(7.0)


NAN = float("nan")
FAULTS = {
    "before out": (write("o", 0.0, at=-1), "wrote outside of out"),
    "far before out": (write("o", 0.0, at=-1000), "wrote outside of out"),
    "behind out": (write("o", 0.0, end=True), "wrote outside of out"),
    "before lse": (write("lse", 0.0, at=-1), "wrote outside of lse"),
    "behind lse": (write("lse", 0.0, end=True), "wrote outside of lse"),
    "into q": (write("q", 9.0), "wrote into its input q"),
    "into k": (write("k", 9.0), "wrote into its input k"),
    "into v": (write("v", 9.0), "wrote into its input v"),
    "nan": (last("o", NAN, only="small"), "O is nan"),
    "nan in lse": (last("lse", NAN, only="small"), "LSE is nan"),
    "infinite": (last("o", float("inf"), only="small"), "O is inf"),
    "out wrong": (last("o", 0.3, only="small"), "O: error"),
    "lse wrong": (last("lse", 0.3, only="small"), "LSE: error"),
    "not written at its own size": (last("o", NAN, only="own"), "part of out was not written"),
    "lse not written at its own size": (last("lse", NAN, only="own"), "part of lse was not written"),
    "wrong at its own size": (last("o", 0.3, only="own"), "sample of batch 2 head 1: O: error"),
    "lse wrong at its own size": (last("lse", 0.3, only="own"), "sample of batch 2 head 1: LSE: error"),
    "wrong without an lse": (without_lse, "sample of batch 0 head 0: O: error"),
}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    fake_family.install(monkeypatch.setattr)
    return kernel.get(KernelSpec(FAMILY, PROBLEM, HERE, PLAIN))


def spoiled(good: Kernel, fault: Fault) -> Kernel:
    """The kernel, and after each launch the fault."""

    class Library:
        error, workspace_bytes = good.library.error, good.library.workspace_bytes

        @staticmethod
        def launch(reference: object, stream: object) -> int:
            status = good.library.launch(reference, stream)
            fault(reference._obj)  # type: ignore[attr-defined]
            return status

    return dataclasses.replace(good, library=Library())  # type: ignore[arg-type]


def by_the_tuner(it: Kernel, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(evaluate, "load", lambda *args: it)
    checks.kept_inputs.cache_clear()
    evaluate.timing_inputs.cache_clear()
    asked = MeasureRequest(KernelSpec(FAMILY, PROBLEM, HERE, PLAIN), it.artifact)
    result = evaluate.measure_one(asked)
    assert (result.outcome == "ok") == (result.reason == "")
    assert result.fatal == ("wrote" in result.reason), "the process is of no more use"
    return result.reason


def by_trust(it: Kernel, monkeypatch: pytest.MonkeyPatch) -> str:
    return checks.compare(it, PROBLEM, HERE)[1]


@pytest.mark.parametrize("judge", [by_the_tuner, by_trust])
def test_a_right_kernel_passes(plain, monkeypatch, judge):
    assert judge(spoiled(plain, lambda p: None), monkeypatch) == ""


@pytest.mark.parametrize("judge", [by_the_tuner, by_trust])
@pytest.mark.parametrize("name", FAULTS)
def test_a_kernel_that_breaks_one_thing_is_caught(plain, monkeypatch, name, judge):
    fault, words = FAULTS[name]
    assert words in judge(spoiled(plain, fault), monkeypatch)


def test_an_output_of_which_nothing_is_written_is_caught(plain, monkeypatch):
    """Outputs that are left over from an earlier kernel would look right."""
    checks.kept_inputs.cache_clear()
    make = functools.cache(checks.check_inputs)
    own = functools.partial(make, PROBLEM, "cpu", False)
    assert checks.verify(plain, PROBLEM, HERE, own, make)[1] == ""
    idle = dataclasses.replace(plain, library=_idle(plain))
    assert "O is nan" in checks.verify(idle, PROBLEM, HERE, own, make)[1]


def _idle(good: Kernel) -> object:
    class Library:
        error, workspace_bytes = good.library.error, good.library.workspace_bytes
        launch = staticmethod(lambda reference, stream: 0)

    return Library()


def test_where_memory_is_short_the_small_sizes_have_to_do(plain, monkeypatch):
    make = checks.check_inputs

    def short(problem, where, varied):
        if problem == PROBLEM:
            raise torch.OutOfMemoryError("no")
        return make(problem, where, varied)

    monkeypatch.setattr(checks, "check_inputs", short)
    assert checks.compare(spoiled(plain, FAULTS["wrong at its own size"][0]), PROBLEM, HERE)[1] == ""
