"""The kernels of a differentiated call: which family, when they are built, what `explain` and `warmup` say of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fagen
from fagen import api, families, target
from fagen.build import cache, toolchain
from fagen.build.job import Artifact, Job
from fagen.cli.main import main
from fagen.codegen.spec import KernelSpec
from fagen.db import store
from fagen.dispatch import choose, kernels, resolve, warmup
from fagen.errors import BuildError
from fagen.ops.attention import derivatives, fallback
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.problem import SIMT_SERVES, TORCH_DTYPES, Problem
from fagen.runtime import background
from fagen.target import ARCHS

HERE, PATIENCE = target.host(), 300.0
needs_compiler = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
GPUS = [arch for arch in ARCHS if arch.startswith("sm_")]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path / "db",))
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path / "db"))
    resolve.forget()
    yield tmp_path
    background.wait()
    background._told.clear()
    resolve.forget()


# ---- which family ------------------------------------------------------------------------------------------------


def chosen(arch: str, **fields: object) -> str:
    choice = choose.choose(BackwardProblem(**{"dtype": "bf16", "head_dim": 128, **fields}), target.known(arch))
    assert choice.provenance == "default" and choice.spec is not None, choice.reasons
    return choice.spec.family.name


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "window"])
def test_hopper_takes_its_own_family_where_rows_are_aligned(mask: str, deterministic: bool) -> None:
    for dims in ((16, 16), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)):
        fields = {"mask": mask, "head_dim": dims[0], "head_dim_v": dims[1], "deterministic": deterministic}
        assert chosen("sm_90", **fields) == "sm90_backward"
        assert chosen("sm_90", aligned=False, **fields) == "sm80_backward"


@pytest.mark.parametrize("arch", [arch for arch in GPUS if arch != "sm_90"])
def test_other_gpus_take_the_family_of_all(arch: str) -> None:
    for deterministic in (False, True):
        assert chosen(arch, deterministic=deterministic) == "sm80_backward"
    choice = choose.choose(BackwardProblem(dtype="fp32"), target.known(arch))
    assert (choice.spec is not None) == ("fp32" in SIMT_SERVES) and any(
        "not fp32" in reason for reason in choice.reasons
    )


@pytest.mark.parametrize(
    ("device", "where"), [("cpu", HERE), *(("cuda", target.known(arch)) for arch in GPUS)], ids=str
)
def test_a_trace_knows_the_dtypes_that_the_families_serve(device: str, where: target.Target) -> None:
    for name, of_torch in TORCH_DTYPES.items():
        able, _ = families.serving(BackwardProblem(dtype=name), where)
        assert (getattr(torch, of_torch) in derivatives.TRAINED[device]) == bool(able), (name, device)


@pytest.mark.parametrize(
    ("device", "where"), [("cpu", HERE), *(("cuda", target.known(arch)) for arch in GPUS)], ids=str
)
def test_a_trace_knows_the_head_dims_that_the_families_serve(device: str, where: target.Target) -> None:
    for d in (64, 256, 257, 512, 1024):
        able, _ = families.serving(BackwardProblem(dtype="bf16", head_dim=d), where)
        trained = derivatives.TRAINED.get(where.arch, derivatives.TRAINED[device])
        assert (d <= trained[torch.bfloat16]) == bool(able), (d, device)
    q = torch.zeros(1, 3, 1, 300, requires_grad=True)
    assert derivatives.refusal(q, q, q, None) == "no backward kernel takes head_dim 300 on device cpu: 256 at most"


@pytest.mark.parametrize("deterministic", [False, True])
def test_large_head_dims_have_a_family_on_hopper(deterministic: bool) -> None:
    for fields, first in (
        ({"head_dim": 512}, ["sm90_backward_large"]),
        ({"head_dim": 64, "head_dim_v": 264, "dtype": "fp16"}, ["sm90_backward_large"]),
        ({"head_dim": 512, "dropout": True}, []),
        ({"head_dim": 512, "aligned": False}, []),
        ({"head_dim": 512, "dtype": "fp32"}, ["simt_backward"]),
    ):
        problem = BackwardProblem(**fields, deterministic=deterministic)
        able, _ = families.serving(problem, target.known("sm_90"))
        assert [family.name for family in able] == first, fields
        able, _ = families.serving(problem, target.known("sm_80"))
        assert "sm90_backward_large" not in {family.name for family in able}


def test_a_call_of_a_large_head_dim_asks_for_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(derivatives.TRAINED, target.host().arch, {torch.float32: 512})
    q, wider = (torch.zeros(1, 3, 1, d, requires_grad=True) for d in (300, 513))
    assert derivatives.refusal(q, q, q, None) == ""
    assert derivatives.refusal(wider, wider, wider, None).endswith("512 at most")


def test_a_problem_and_its_gradients_name_each_other() -> None:
    forward = Problem(mask="window", window_left=7, heads=6, kv_heads=2, aligned=False, softcap=True, seqlen_q=9)
    backward = BackwardProblem.of(forward, deterministic=True)
    assert backward.forward == forward and type(backward.forward) is Problem
    assert backward.static_key == forward.static_key.replace("forward", "backward") + "/deterministic"


# ---- when they are built -----------------------------------------------------------------------------------------


def leaves(dim: int, rows: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(1, rows, 2, dim, generator=generator).requires_grad_() for _ in range(3)]


class Compilations:
    """Those that are begun: none is found built, and none ends before as many as `together` have begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
        self.begun: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        barrier, make, done = threading.Barrier(together), cache.make, set()

        def made(job: Job, **named: object) -> Artifact:
            if job.key() not in done:
                self.begun.append(job.name.partition("-")[0])
                barrier.wait(PATIENCE)
                assert self.gate.wait(PATIENCE)
                done.add(job.key())
            return make(job)

        find = cache.find
        monkeypatch.setattr(cache, "make", made)
        monkeypatch.setattr(cache, "find", lambda job: find(job) if job.key() in done else None)


@needs_compiler
def test_forward_and_backward_are_compiled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert api._ops_registered()
    compilations = Compilations(monkeypatch, together=2)
    monkeypatch.setattr(fallback, "attend", lambda *_: pytest.fail("PyTorch computed"))
    inputs = leaves(24)
    out = fagen.attention(*inputs, causal=True)
    assert sorted(compilations.begun) == ["cpu_backward", "cpu_forward"]
    out.sum().backward()
    assert len(compilations.begun) == 2 and all(t.grad is not None for t in inputs)


@needs_compiler
def test_in_the_background_one_does_not_wait_for_the_call_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert api._ops_registered()
    monkeypatch.setenv("FAGEN_BUILD", "background")
    compilations = Compilations(monkeypatch, together=1)
    compilations.gate.clear()
    inputs = leaves(24)
    with pytest.warns(fallback.FallbackWarning, match="is being compiled"):
        fagen.attention(*inputs, causal=True).sum().backward()
    assert len(background._pending) == 2
    compilations.gate.set()
    background.wait()
    assert sorted(compilations.begun) == ["cpu_backward", "cpu_forward"]
    monkeypatch.setattr(fallback, "attend", lambda *_: pytest.fail("PyTorch computed"))
    again = leaves(24)
    fagen.attention(*again, causal=True).sum().backward()
    for a, b in zip(inputs, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


@needs_compiler
def test_where_one_cannot_be_compiled_pytorch_computes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert api._ops_registered()
    make = cache.make

    def made(job: Job, **named: object) -> Artifact:
        if job.name.startswith("cpu_backward"):
            raise BuildError("no luck with it", "")
        return make(job, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "make", made)
    monkeypatch.setattr(cache, "find", lambda job: None)
    inputs = leaves(24)
    with pytest.warns(fallback.FallbackWarning, match="no luck with it"):
        fagen.attention(*inputs, causal=True).sum().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in inputs)


@needs_compiler
def test_a_forward_call_compiles_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert api._ops_registered()
    compilations = Compilations(monkeypatch, together=1)
    with torch.no_grad():
        fagen.attention(*leaves(24), causal=True)
    assert compilations.begun == ["cpu_forward"]


@needs_compiler
def test_gradients_wait_for_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not PyTorch's in the first calls and ours in the later ones: they have other bits."""
    waited = []
    registered = api._ops_registered
    monkeypatch.setattr(api, "_fast", None)
    monkeypatch.setattr(api, "_ops_ready", lambda: False)
    monkeypatch.setattr(api, "_ops_registered", lambda: waited.append(1) or registered())
    inputs = leaves(16)
    with monkeypatch.context() as patch:
        patch.setattr(fallback, "attend", lambda *_: pytest.fail("PyTorch computed"))
        fagen.attention(*inputs).sum().backward()
    assert waited
    waited.clear()
    monkeypatch.setattr(api, "_fast", None)
    with torch.no_grad():
        fagen.attention(*inputs)
    assert not waited
    monkeypatch.setenv("FAGEN_BUILD", "background")
    fagen.attention(*inputs).sum().backward()
    assert not waited


# ---- explain, warmup, build --------------------------------------------------------------------------------------


def test_explain_names_the_kernel_of_the_gradients() -> None:
    q, k, v = leaves(16)
    report = fagen.explain(q, k, v, causal=True, deterministic=True)
    assert report.choice.family is not None and report.choice.family.name == "cpu_forward"
    assert report.gradients is not None and report.gradients.choice.family is not None
    assert report.gradients.choice.family.name == "cpu_backward"
    first, second = str(report).split("\n\n")
    assert first.startswith("problem  forward/fp32/d16/causal/") and "picked   cpu_forward" in first
    assert second.startswith("problem  backward/fp32/d16/causal/deterministic/") and "picked   cpu_backward" in second
    assert report.to_dict()["gradients"]["family"] == "cpu_backward"
    for quiet in ([t.detach() for t in (q, k, v)], (q, k, v)):
        with torch.no_grad():
            assert fagen.explain(*quiet, causal=True).gradients is None


def test_explain_says_that_pytorch_computes_what_it_differentiates(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = leaves(16)
    backward = families.get("cpu_backward")
    unable = [family for family in families.all_families() if family is not backward]
    monkeypatch.setattr(families, "all_families", lambda: tuple(unable))
    report = fagen.explain(q, k, v)
    assert report.choice.kind == "torch" and report.gradients is not None
    assert "not      PyTorch computes the gradients, and the output with them" in str(report)
    assert any("needs a GPU" in reason for reason in report.gradients.choice.reasons)
    double = [t.double().detach().requires_grad_() for t in (q, k, v)]
    assert "no backward kernel takes torch.float64 on device cpu" in str(fagen.explain(*double))


@needs_compiler
@pytest.mark.parametrize("kind", [Problem, BackwardProblem])
@pytest.mark.parametrize("max_seqlen", [None, 256])
def test_warmup_of_gradients_makes_a_step_of_training_ready(
    max_seqlen: int | None, kind: type[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = kind(dtype="fp32", head_dim=16, mask="causal", heads=2, seqlen_q=40)
    assert warmup.warmup([problem], HERE, max_seqlen=max_seqlen, gradients=kind is Problem) == (
        3 if max_seqlen else 2  # few rows have a forward kernel of their own
    )
    monkeypatch.setattr(cache, "make", lambda job, **_: pytest.fail(f"{job.name} was compiled"))
    monkeypatch.setattr(cache, "find", lambda job: pytest.fail(f"{job.name} was read"))
    monkeypatch.setattr(fallback, "attend", lambda *_: pytest.fail("PyTorch computed"))
    inputs = leaves(16)
    fagen.attention(*inputs, causal=True).sum().backward()
    assert all(t.grad is not None for t in inputs)


@needs_compiler
def test_build_of_gradients_compiles_both(capsys: pytest.CaptureFixture) -> None:
    assert main("build --op backward --target cpu --dtype fp32 --head-dim 16 --mask causal --heads 2".split()) == 0
    assert "2 kernels ready, 0 failed" in capsys.readouterr().err
    for op in ("forward", "backward"):
        problem = (Problem if op == "forward" else BackwardProblem)(dtype="fp32", head_dim=16, mask="causal", heads=2)
        spec = choose.choose(problem, HERE).spec
        assert isinstance(spec, KernelSpec) and spec.family.name == f"cpu_{op}"
        assert kernels.loaded(spec) is not None
