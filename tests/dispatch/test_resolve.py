"""The road of a call: when Python is asked for a kernel, what is remembered, what happens where parts are missing."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import fagen
from fagen import api, families
from fagen.build import cache
from fagen.build.job import Job
from fagen.codegen.spec import KernelSpec
from fagen.dispatch import resolve
from fagen.dispatch.plan import TORCH, Answer
from fagen.errors import BuildError, LaunchError, MissingTool
from fagen.families import Config
from fagen.ops import abi
from fagen.ops.attention import fallback
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.params import Params
from fagen.ops.attention.problem import Problem
from fagen.runtime import binding, kernel, python_ops
from fagen.target import host
from tests.support.calls import example, run

NOTHING = list(TORCH.words)  # an answer without a plan


@pytest.fixture(autouse=True)
def _quiet_fallbacks() -> None:
    """No kernel is replaced by PyTorch unnoticed."""
    warnings.simplefilter("error", fallback.FallbackWarning)
    assert api._ops_registered()  # calls take the C++ road


def test_describe_names_the_static_mask() -> None:
    def described(**options: object) -> object:
        case = example(**options)
        return AttentionCall.of(case.q, case.k, case.v, **case.options).problem

    assert described().mask == "none" and described(causal=True).mask == "causal"
    assert described(window=(None, 0)).mask == "causal" and described(window=(3, 3), causal=True).window_right == 0
    assert described(window=(3, None)).mask == "window"
    both = described(intervals=torch.zeros(1, 1, 47, 2, dtype=torch.int32), causal=True, window=(5, None))
    assert (both.mask, both.intervals, both.window_left, both.window_right) == ("intervals", "lower2", 5, 0)
    assert described(d=13).aligned is False and described(d=20).aligned is True


def test_a_second_call_does_not_ask_python(monkeypatch: pytest.MonkeyPatch) -> None:
    case = example(causal=True)
    fagen.attention(case.q, case.k, case.v, causal=True)
    asked = []
    monkeypatch.setattr(python_ops, "_decide", lambda *args, **named: asked.append(args) or NOTHING)
    fagen.attention(case.q, case.k, case.v, causal=True)
    fagen.attention(case.q[:1], case.k[:1], case.v[:1], causal=True)  # nor for another size
    assert not asked
    resolve.forget()
    fagen.attention(case.q, case.k, case.v, causal=True)
    assert len(asked) == 1
    resolve.forget()


@pytest.mark.parametrize("what", ["window", "softcap", "alibi_slopes", "intervals", "layout", "out", "alignment"])
def test_the_table_tells_calls_apart(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever decides the kernel or the legality of a call is part of its key."""
    case = example(sq=4, sk=4, h=4, hk=4)
    other: dict = {
        "window": {"window": (1, 1)},
        "softcap": {"softcap": 1.0},
        "alibi_slopes": {"alibi_slopes": torch.ones(4)},
        "intervals": {"intervals": torch.full((1, 1, 4, 1), 4, dtype=torch.int32)},
        "layout": {"layout": "bhsd"},
        "out": {"out": torch.empty(2, 4, 4, 20)[..., 1:17]},
        "alignment": {},
    }[what]
    resolve.forget()
    asked = []
    monkeypatch.setattr(python_ops, "_decide", lambda *args, **named: asked.append(args) or NOTHING)
    fagen.attention(case.q, case.k, case.v)
    if what == "alignment":
        case.q = torch.empty(2, 4, 4, 17)[..., 1:]
    fagen.attention(case.q, case.k, case.v, **other)
    resolve.forget()
    assert len(asked) == 2


def test_a_failed_launch_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        '#include <stdint.h>\nextern "C" {\nint fagen_launch(const void*, void*) { return 7; }\n'
        'const char* fagen_error(int) { return "out of luck"; }\n'
        "uint64_t fagen_workspace_bytes(const void*) { return 0; }\n"
        f'const char* fagen_params_layout(void) {{ return "{abi.layout(Params)}"; }}\n}}\n'
    )
    artifact = cache.make(Job("unlucky", source, ".cpp", (), (), "cpu"))
    broken = kernel.load(artifact, KernelSpec(families.get("cpu_forward"), Problem(), host(), Config({})))
    monkeypatch.setattr(python_ops, "_decide", lambda *args, **named: list(Answer(True, broken).words))
    resolve.forget()
    case = example()
    with pytest.raises(LaunchError, match="out of luck"):
        fagen.attention(case.q, case.k, case.v)
    resolve.forget()


def _without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_fast", None)
    monkeypatch.setattr(binding, "_module", None)
    monkeypatch.setattr(binding, "_failure", None)
    monkeypatch.setattr(binding, "_begun", False)


def test_without_the_binding_kernels_are_called_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MissingTool("no C++ compiler found")

    _without(monkeypatch)
    monkeypatch.setattr(binding, "_build", fail)
    with pytest.warns(UserWarning, match="binding cannot be built: no C"):
        assert run(example(causal=True))
    case = example(causal=True)
    out = torch.empty(2, 33, 4, 16)
    assert fagen.attention(case.q, case.k, case.v, causal=True, out=out) is out and case.check(out, None)
    with pytest.warns(fallback.FallbackWarning, match="head_dim"):
        assert run(example(d=1100))


def test_without_a_compiler_pytorch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAGEN_CXX", str(tmp_path / "none"))
    resolve.forget()
    with pytest.warns(fallback.FallbackWarning, match="no C\\+\\+ compiler found"):
        assert run(example())
    resolve.forget()


def test_forbidden_to_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FAGEN_DISABLE_JIT", "1")
    resolve.forget()
    monkeypatch.delenv("FAGEN_QUIET")
    with pytest.raises(BuildError, match="fagen build --dtype .* --head-dim .* --target cpu"):
        run(example())
    assert "compiling" not in capsys.readouterr().err
    resolve.forget()


def test_a_first_call_says_that_it_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FAGEN_QUIET")
    resolve.forget()
    case = example()
    for _ in range(2):
        fagen.attention(case.q, case.k, case.v)
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    assert "compiling cpu_forward" in said.err and " s, once" in said.err
