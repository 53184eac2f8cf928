"""What a model may ever ask for: no size up to the bound gets a kernel that was not built ahead."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fagen import env, families, target
from fagen.build import cache, compilers, toolchain
from fagen.cli import arguments
from fagen.cli.commands import build
from fagen.cli.main import main
from fagen.codegen.spec import KernelSpec
from fagen.db import merge, store
from fagen.db.record import Record
from fagen.dispatch import choose, kernels, resolve, warmup
from fagen.errors import InvalidArgument
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.problem import Problem
from fagen.runtime import binding
from tests.support import runs

FAMILY, HERE, H200 = families.get("cpu_forward"), target.host(), target.known("sm_90")
SMALL = Problem(dtype="fp32", head_dim=16, mask="causal", heads=2, seqlen_q=64)


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "default_paths", lambda: (env.data_dir("tuning_db"),))
    monkeypatch.setattr(kernels, "loaded", lambda *args: None)


def asked(draw: random.Random, problem: Problem, most: int) -> Problem:
    length = lambda low: max(low, min(most, round(2 ** draw.uniform(0, most.bit_length()))))  # noqa: E731
    rows = length(1)
    keys = length(rows) if problem.mask == "causal" else length(1)
    return problem.replace(batch=draw.choice([1, 1, 2, 3, 8, 64]), seqlen_q=rows, seqlen_k=keys)


@pytest.mark.parametrize("model", ["llama3-8b", "llama3.2-1b", "gemma3-4b", "bert-base"])
def test_no_size_asks_for_more(model: str, shipped: None) -> None:
    draw = random.Random(model)
    for problem in arguments.expand({"preset": model}, H200):
        most = 131072
        sizes = warmup.sizes(problem, H200, most)
        assert all(max(p.seqlen_q, p.seqlen_k) <= most and p.static_key == problem.static_key for p in sizes)
        kernels = {choose.choose(size, H200, ours=True).config for size in sizes}
        for _ in range(1500):
            size = asked(draw, problem, most)
            assert choose.choose(size, H200, ours=True).config in kernels, size.key


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_few_rows_and_gradients_ask_for_no_more(arch: str, backward: bool, mask: str, shipped: None) -> None:
    """Of few rows on many keys several blocks share the keys, by a kernel of its own."""
    draw, where, most = random.Random(mask), target.known(arch), 32768
    problem = Problem(mask=mask, head_dim=80, heads=8, kv_heads=2)  # which no record is of
    problem = BackwardProblem.of(problem) if backward else problem
    built = {choose.choose(size, where, ours=True).config for size in warmup.sizes(problem, where, most)}
    splits = set()
    for _ in range(60):
        rows = draw.choice([1, 16, 17, 64, 100, 300, 1024])
        keys = max(rows, round(2 ** draw.uniform(0, 15)))
        size = problem.replace(batch=draw.choice([1, 1, 2, 16]), seqlen_q=rows, seqlen_k=keys)
        config = choose.choose(size, where, ours=True).config
        assert config in built, size.key
        splits.add(dict(config).get("splits"))
    assert backward or len(splits) > 1, "some of these sizes split keys"


def test_the_readme_counts_them(shipped: None) -> None:
    (problem,) = arguments.expand({"preset": "llama3-8b"}, H200)
    text = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    told = re.search(r"llama3-8b needs (\d+) kernels on an H200 and (\d+) on an H100", text)
    assert told is not None
    for card, count in (("NVIDIA H200", told[1]), ("NVIDIA H100 80GB HBM3", told[2])):
        here = dataclasses.replace(H200, device=card)
        kernels = {choose.choose(p, here, ours=True).config for p in warmup.sizes(problem, here, 131072)}
        assert len(kernels) == int(count), card


def test_a_small_bound_asks_for_less(shipped: None) -> None:
    (problem,) = arguments.expand({"preset": "llama3-8b"}, H200)
    few, many = (
        {choose.choose(p, H200, ours=True).config for p in warmup.sizes(problem, H200, n)} for n in (512, 131072)
    )
    assert len(few) < len(many)


def test_defaults_are_asked_for_a_grid(shipped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(dtype="fp16", head_dim=128, mask="causal", heads=8, kv_heads=8)
    family, draw = families.get("sm90_forward"), random.Random("grid")
    kernels = {family.default(p, H200) for p in warmup.sizes(problem, H200, 20000)}
    assert len(kernels) > 1
    for _ in range(400):
        size = asked(draw, problem, 20000)
        assert family.default(size, H200) in kernels, size.key


@pytest.mark.parametrize("most", [0, -1, 1 << 40])
def test_a_bound_that_makes_no_sense(most: int, shipped: None) -> None:
    with pytest.raises(InvalidArgument, match="out of range"):
        warmup.sizes(SMALL, HERE, most)


@pytest.fixture(params=["this device", "another"])
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list]:
    """Two records of a static key, the second of a config of its own, of this device or of another."""

    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path / "db",))
    configs = [FAMILY.default(SMALL, HERE), FAMILY.default(SMALL, HERE).replace(tile_n=64)]
    devices = HERE.device, HERE.device if request.param == "this device" else "Another CPU"
    for length, config, device in zip((32, 4096), configs, devices, strict=True):
        problem = SMALL.replace(seqlen_q=length, seqlen_k=length)
        mine = KernelSpec(FAMILY, problem, HERE, config).hash
        merge.put([
            Record(problem=problem, arch="cpu", device=device, family=FAMILY.name, config=dict(config),
                      seconds=1e-3, spread=1e-5, default_seconds=0.0, error=0.0, source_hash=mine)
        ], tmp_path / "db")  # fmt: skip
    resolve.forget()
    yield configs
    resolve.forget()


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_after_warmup_nothing_is_compiled_or_read(two: list, monkeypatch: pytest.MonkeyPatch) -> None:
    assert warmup.warmup([SMALL], HERE) == 1
    assert warmup.warmup([SMALL], HERE, max_seqlen=8192) == 2
    monkeypatch.setattr(cache, "find", lambda job: pytest.fail("read"))
    monkeypatch.setattr(cache, "make", lambda job: pytest.fail("compiled"))
    served = {resolve.kernel_for(SMALL.replace(seqlen_q=n, seqlen_k=n), HERE).spec.config for n in (1, 64, 8192)}
    assert served == set(two)


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_what_it_built_has_run_once(two: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA loads code at the first launch, half a millisecond that the first call would wait."""
    run: list[KernelSpec] = []
    monkeypatch.setattr(kernels, "prime", lambda spec: run.append(spec) if spec.key in kernels.in_memory else None)
    assert warmup.warmup([SMALL], HERE, max_seqlen=64) == len({spec.key for spec in run}) == len(run)


def test_build_says_how_many_kernels_that_is(two: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = "build --target cpu --dtype fp32 --head-dim 16 --mask causal --heads 2 --max-seqlen 8k --json"
    assert main(words.split()) == 0
    told = capsys.readouterr()
    assert "forward/fp32/d16/causal: 2 kernels serve any batch and all lengths up to 8192" in told.err
    rows = json.loads(told.out)
    assert {row["config"]["tile_n"] for row in rows} == {c.tile_n for c in two} and len(rows) == 2


class Compilers:
    """In the place of compilers: none ends before as many run as are expected to, however busy the machine is."""

    def __init__(self, expected: int) -> None:
        self.barrier, self.lock = threading.Barrier(expected, timeout=runs.PATIENCE), threading.Lock()
        self.running = self.most = self.all = 0

    def run(self, spec: KernelSpec) -> dict[str, str]:
        with self.lock:
            self.running, self.all = self.running + 1, self.all + 1
            self.most = max(self.most, self.running)
        self.barrier.wait()
        time.sleep(0.05)  # for one too many to be seen
        with self.lock:
            self.running -= 1
        return {"outcome": "ok"}


@pytest.mark.parametrize("verb", ["warmup", "build", "build --jobs 3"])
@pytest.mark.parametrize(("free", "expected"), [(1 << 40, 6), (5 << 30, 2), (1, 1)], ids=["ample", "little", "none"])
def test_as_many_compile_at_a_time_as_cores_and_memory_bear(
    verb: str, free: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Compilers(3 if "--jobs" in verb else expected)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(compilers, "free_memory", lambda: free)
    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path / "db",))
    monkeypatch.setattr(binding, "load", lambda: None)
    monkeypatch.setattr(binding, "make", lambda: None)
    monkeypatch.setattr(kernels, "built", running.run)
    monkeypatch.setattr(build, "_build", running.run)
    monkeypatch.setattr(resolve, "answer", lambda *args, **named: None)
    dims = (32, 64, 96, 128, 192, 256)
    if verb == "warmup":
        assert warmup.warmup([Problem(head_dim=dim, heads=8) for dim in dims], H200) == len(dims)
    else:
        words = f"--target sm_90 --heads 8 --seqlen 1k --head-dim {','.join(map(str, dims))}"
        assert main([*verb.split(), *words.split()]) == 0
    assert running.all == len(dims) and running.most == running.barrier.parties
