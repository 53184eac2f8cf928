"""FAGEN_BUILD, builds that nobody waits for, and the road through ctypes until the binding is there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fagen
from fagen import api, env, explanation, families, target
from fagen.build import cache, toolchain
from fagen.build.job import Artifact, Job
from fagen.codegen.spec import KernelSpec
from fagen.db import merge, store
from fagen.db.record import Record
from fagen.dispatch import choose, freshness, kernels, resolve
from fagen.errors import BuildError, LaunchError, UsageError
from fagen.families import Config
from fagen.ops.attention import fallback
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.problem import Problem
from fagen.runtime import background, binding
from fagen.verify import checks
from tests.support.calls import example, run

pytestmark = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
FAMILY, HERE = families.get("cpu_forward"), target.host()
PROBLEM = Problem(dtype="fp32", head_dim=16, mask="causal", heads=2, seqlen_q=64)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path / "db",))
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path / "db"))
    assert api._ops_registered()
    resolve.forget()
    yield tmp_path
    background.wait()
    background._told.clear()
    resolve.forget()


class Builds:
    """Compilations that end when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.begun, self.failure = threading.Event(), [], None
        make, find, done = cache.make, cache.find, set()

        def made(job: Job, **named: object) -> Artifact:
            if job.key() in done:
                return make(job)
            self.begun.append(threading.current_thread().name)
            assert self.gate.wait(300)
            if self.failure is not None:
                raise self.failure
            done.add(job.key())
            return make(job)

        monkeypatch.setattr(cache, "make", made)
        monkeypatch.setattr(cache, "find", lambda job: find(job) if job.key() in done else None)

    def end(self) -> None:
        self.gate.set()
        background.wait()
        self.gate.clear()


def configs(count: int) -> list[Config]:
    default = FAMILY.default(PROBLEM, HERE)
    others = (default.replace(**{knob.name: choice}) for knob in FAMILY.knobs for choice in knob.choices)
    return [c for c in dict.fromkeys([default, *others]) if not FAMILY.rejects(PROBLEM, HERE, c)][:count]


def put(length: int, config: Config, source_hash: str | None = None) -> None:
    problem = PROBLEM.replace(seqlen_q=length, seqlen_k=length)
    mine = KernelSpec(FAMILY, problem, HERE, config).hash if source_hash is None else source_hash
    merge.put([
        Record(problem=problem, arch="cpu", device=HERE.device, family=FAMILY.name, config=dict(config),
                  seconds=1e-3, spread=1e-5, default_seconds=0.0, error=0.0, source_hash=mine)
    ])  # fmt: skip


def attend(length: int) -> Config | None:
    """The config that serves a causal call of this length; None where PyTorch did. The result is right either way."""
    used: list[object] = []
    case = example(b=1, sq=length, sk=length, h=2, causal=True)
    assert run(case)
    used.append(resolve.kernel_for(case.call().problem, HERE))
    return used[0].spec.config if used[0] is not None else None


# ---- the variable -----------------------------------------------------------------------------------------------


def test_the_mode_has_an_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.build_mode() == "wait"
    for word in ("wait", "background", "never"):
        monkeypatch.setenv("FAGEN_BUILD", word)
        assert env.build_mode() == word
    monkeypatch.setenv("FAGEN_BUILD", "background")
    monkeypatch.setenv("FAGEN_DISABLE_JIT", "1")
    assert env.build_mode() == "never"
    monkeypatch.setenv("FAGEN_BUILD", "sometimes")
    with pytest.raises(UsageError, match="known: wait, background, never"):
        env.build_mode()


def test_never_is_an_error_that_says_nothing_of_compiling(
    monkeypatch: pytest.MonkeyPatch, folders: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(folders / "cache"))
    monkeypatch.setenv("FAGEN_BUILD", "never")
    monkeypatch.delenv("FAGEN_QUIET")
    for _ in range(2):
        with pytest.raises(BuildError, match="FAGEN_BUILD=never forbids"):
            run(example())
    assert "compiling" not in capsys.readouterr().err


# ---- background -------------------------------------------------------------------------------------------------


def test_pytorch_serves_until_the_kernel_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAGEN_BUILD", "background")
    builds = Builds(monkeypatch)
    with pytest.warns(fallback.FallbackWarning, match="is being compiled"):
        assert attend(40) is None
    assert attend(41) is None  # another size: neither another warning nor another build
    report = explanation.explain_problem(PROBLEM, HERE)
    assert "built    not yet" in str(report) and "until    PyTorch (FAGEN_BUILD=background)" in str(report)
    assert report.to_dict()["meanwhile"]["kind"] == "torch"
    builds.end()
    assert builds.begun == ["fagen-background"]
    assert attend(40) == attend(41) == FAMILY.default(PROBLEM, HERE)
    report = explanation.explain_problem(PROBLEM, HERE)
    assert "built    yes" in str(report) and report.meanwhile is None


def test_the_nearest_kernel_that_is_built_serves_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    default, near, far = configs(3)
    put(40, near)
    put(512, far)
    put(2048, default)
    builds = Builds(monkeypatch)
    builds.gate.set()
    assert [attend(n) for n in (38, 2000)] == [near, default]  # waits, and builds these two
    builds.gate.clear()
    resolve.forget()
    monkeypatch.setenv("FAGEN_BUILD", "background")
    assert attend(38) == near
    assert attend(200) == near and attend(900) == default  # 512 is nearer to both
    assert len(builds.begun) == 3 and builds.begun[-1] == "fagen-background"
    text = str(explanation.explain_problem(PROBLEM.replace(seqlen_q=500, seqlen_k=500), HERE))
    assert f"config   {far}" in text and f"until    {FAMILY.name}: " in text
    builds.end()
    assert [attend(n) for n in (200, 900, 38, 2000)] == [far, far, near, default]
    assert len(builds.begun) == 3


def test_a_kernel_that_is_ready_while_another_call_chooses_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAGEN_BUILD", "background")
    builds = Builds(monkeypatch)
    warnings.simplefilter("ignore", fallback.FallbackWarning)
    make_plan = resolve._make_plan

    def slowly(*args):
        plan = make_plan(*args)  # before it is ready
        monkeypatch.setattr(resolve, "_make_plan", make_plan)
        builds.end()
        return plan

    monkeypatch.setattr(resolve, "_make_plan", slowly)
    case = example(b=1, sq=64, sk=64, h=2, causal=True)
    fagen.attention(case.q, case.k, case.v, causal=True)
    assert attend(64) == attend(65) == FAMILY.default(PROBLEM, HERE)


def test_a_build_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    default, other = configs(2)
    put(64, other)
    monkeypatch.setenv("FAGEN_BUILD", "background")
    builds = Builds(monkeypatch)
    builds.failure = BuildError("cannot compile it", "error: 7", log="error")
    warnings.simplefilter("ignore", fallback.FallbackWarning)
    assert attend(64) is None
    builds.end()
    with pytest.warns(UserWarning, match="cannot compile it error: 7"):
        assert attend(64) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", fallback.FallbackWarning)
        assert attend(64) is None and attend(65) is None
    assert len(builds.begun) == 1


def test_a_changed_source_is_passed_over_where_calls_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    default, other = configs(2)
    put(64, other, source_hash="0" * 16)
    monkeypatch.setenv("FAGEN_BUILD", "background")
    monkeypatch.setattr(checks, "compare", lambda *args: pytest.fail("verified in a call"))
    monkeypatch.setattr(freshness, "_verdicts", {})
    monkeypatch.setattr(freshness, "_read", lambda path: None)  # another test may have verified the same kernel
    kernels.built(KernelSpec(FAMILY, PROBLEM, HERE, default))
    assert attend(64) == default
    text = str(explanation.explain_problem(PROBLEM, HERE))
    assert "was not verified; FAGEN_BUILD=background forbids" in text
    assert "this verifies it ahead: FAGEN_BUILD=wait fagen build " in text
    assert choose.choose(PROBLEM, HERE).config == other  # that is what `fagen build` compiles and verifies


@pytest.mark.parametrize("mode", ["wait", "background"])
def test_nothing_is_built_in_a_capture(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But what is loaded may be used."""
    default, other = configs(2)
    monkeypatch.setenv("FAGEN_BUILD", mode)
    monkeypatch.setattr(kernels, "capturing", lambda target: True)
    monkeypatch.setattr(cache, "make", lambda job: pytest.fail("compiled"))
    monkeypatch.setattr(cache, "find", lambda job: pytest.fail("read"))
    if mode == "wait":
        with pytest.raises(LaunchError, match="fagen build"):
            resolve.answer(PROBLEM, HERE)
        return
    with pytest.warns(fallback.FallbackWarning, match="a CUDA graph is being captured"):
        assert resolve.answer(PROBLEM, HERE) == resolve.Answer(False, None)
    kernel = object()
    kernels.in_memory[FAMILY.name, PROBLEM.static_key, HERE, other] = kernel  # type: ignore[assignment]
    assert resolve.answer(PROBLEM, HERE) == resolve.Answer(False, kernel)  # for this call: nothing is remembered


# ---- the binding, and the road through ctypes -------------------------------------------------------------------


@pytest.fixture
def no_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process where it is not built yet; its build is not begun."""
    registered = binding.load()
    for module, name, value in (
        (api, "_fast", None), (binding, "_module", None), (binding, "_failure", None), (binding, "_begun", True),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(binding, "start", lambda: None)
    monkeypatch.setattr(binding, "_import", lambda artifact: registered)  # ops register once


CALLS = [
    {},
    {"causal": True},
    {"window": (9, 3), "softcap": 2.0},
    {"alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 1.0])},
    {"alibi_slopes": torch.tensor([[0.5, 0.1, 0.2, 1.0]]), "causal": True},
    {"intervals": torch.randint(0, 34, (1, 2, 47, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(1))},
    {"scale": 0.3},
]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("options", CALLS, ids=lambda o: "-".join(o) or "plain")
def test_both_roads_give_the_same(
    options: dict, layout: str, no_binding: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = example(layout=layout, **options)
    if layout == "bhsd":
        case.q, case.k, case.v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
    slow = fagen.attention(case.q, case.k, case.v, return_lse=True, **case.options)
    assert api._fast is None and case.check(*slow)
    out = torch.full((*case.q.shape[:3], 32), torch.nan)[..., :16]
    again = fagen.attention(case.q, case.k, case.v, out=out, **case.options)
    assert again is out and torch.equal(out, slow[0])
    monkeypatch.undo()
    fast = fagen.attention(case.q, case.k, case.v, return_lse=True, **case.options)
    assert api._fast is not None
    assert torch.equal(slow[0], fast[0]) and torch.equal(slow[1], fast[1])


def test_calls_move_over_when_the_binding_is_built(no_binding: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = example(causal=True)
    first = fagen.attention(case.q, case.k, case.v, causal=True)
    assert api._fast is None
    monkeypatch.setattr(binding, "_begun", False)  # another process has built it
    assert torch.equal(fagen.attention(case.q, case.k, case.v, causal=True), first)
    assert api._fast is not None


def test_what_wants_to_see_an_op_waits_for_the_binding(no_binding: None) -> None:
    class Mine(torch.Tensor):
        pass

    case = example()
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def plain(q: torch.Tensor) -> bool:
        return api._plain(AttentionCall(q, case.k, case.v))

    assert not plain(case.q.as_subclass(Mine)) and plain(torch.nn.Parameter(case.q))
    torch.vmap(lambda t: seen.append(plain(t)) or t)(case.q)
    assert seen == [False]
    with Mode():
        fagen.attention(case.q, case.k, case.v)
    assert any("fagen.forward" in str(name) for name in seen), seen


@pytest.mark.slow
def test_a_first_call_waits_for_its_kernel_alone(folders: Path) -> None:
    """And the process ends without waiting for the binding, and leaves neither a compiler nor half a kernel."""
    code = (
        "import torch, fagen\nfrom fagen import api\nfrom fagen.runtime import background\n"
        "q = torch.randn(1, 8, 2, 16)\n"
        "out = fagen.attention(q, q, q)\n"
        "assert api._fast is None and background.pending('binding')\n"
        "import os, pathlib, time\n"
        "scratch = pathlib.Path(os.environ['FAGEN_CACHE_DIR'], 'tmp')\n"
        "while background.pending('binding') and not list(scratch.rglob('kernel.cpp')): time.sleep(0.01)\n"
        "print(out.shape)\n"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "FAGEN_CACHE_DIR": str(folders / "cache"), "FAGEN_QUIET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "compiling" in line]
    assert ["binding" in line for line in said] == [False, True], done.stderr
    assert [p.parent.name.split("-")[0] for p in (folders / "cache" / "kernels").glob("*/*.so")] == ["cpu_few_rows"]
    assert not list((folders / "cache" / "tmp").rglob("kernel.*"))
    mine = f"FAGEN_CACHE_DIR={folders / 'cache'}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert mine not in (process / "environ").read_bytes().split(b"\0"), process
        except OSError:
            continue


def test_torch_compile_waits_for_the_binding(no_binding: None) -> None:
    case = example(causal=True)
    compiled = torch.compile(lambda q, k, v: fagen.attention(q, k, v, causal=True) + 1, backend="eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(case.q, case.k, case.v)
    assert torch.equal(out, fagen.attention(case.q, case.k, case.v, causal=True) + 1) and api._fast is not None


# ---- the thread -------------------------------------------------------------------------------------------------


def test_what_is_pending_is_not_begun_twice_and_last_comes_last() -> None:
    gate, order = threading.Event(), []
    assert background.submit("a", gate.wait) and not background.submit("a", gate.wait)
    assert background.submit("z", lambda: order.append("z"), last=True)
    assert background.submit("b", lambda: order.append("b"))
    assert background.pending("z")
    gate.set()
    background.wait()
    assert order == ["b", "z"] and not background.pending("z")


def test_the_thread_outlives_a_failure() -> None:
    def fail() -> None:
        raise RuntimeError("out of luck")

    done = []
    background.submit("fails", fail)
    background.submit("works", lambda: done.append(1))
    background.wait()
    assert done == [1]
    with pytest.warns(UserWarning, match="RuntimeError: out of luck"):
        background.warn_told()


def test_a_forked_copy_has_a_thread_of_its_own() -> None:
    gate = threading.Event()
    background.submit("waits", gate.wait)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        pid = os.fork()
    if pid == 0:
        done = []
        background.submit("waits", lambda: done.append(1))
        background.wait(60)
        os._exit(0 if done and binding._lock.acquire(timeout=5) else 1)
    gate.set()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
