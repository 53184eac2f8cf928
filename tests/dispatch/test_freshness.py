"""A winner whose kernel source has changed since: verified before its first use, once a machine, or passed over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fagen
from fagen import env, explanation, ops
from fagen.build import toolchain
from fagen.cli.main import main
from fagen.codegen import spec
from fagen.codegen.spec import KernelSpec
from fagen.db import merge, store
from fagen.db.record import Record
from fagen.dispatch import choose, freshness, kernels, resolve
from fagen.errors import BuildError, UsageError
from fagen.families import Config
from fagen.ops.attention import reference
from fagen.runtime import binding
from fagen.target import Target, host
from fagen.verify import checks
from tests.support import fake_family
from tests.support.calls import right

pytestmark = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
FAMILY, PROBLEM, HERE = fake_family.FAMILY, fake_family.PROBLEM, host()


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache where no other test leaves a verdict, or removes one. The binding comes from the cache of all tests."""
    binding.load()
    return tmp_path_factory.mktemp("freshness") / "cache"


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A family whose kernels can be told to misbehave, an empty database, and a cache without verdicts."""
    fake_family.install(monkeypatch.setattr)
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(own_cache))
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path / "db"))
    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path / "shipped", tmp_path / "db"))
    _forget(monkeypatch)
    yield tmp_path
    for path in (env.cache_dir() / "verified").glob("*"):
        path.unlink()
    resolve.forget()


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(freshness, "_verdicts", {})
    monkeypatch.setattr(spec, "_hashes", {})


def config(style: str = "plain", variant: int = 1) -> Config:
    return Config({"style": style, "variant": variant})


def record(style: str = "plain", variant: int = 1, *, seqlen: int = 192, source_hash: str = "01d") -> Record:
    return Record(
        problem=PROBLEM.replace(seqlen_q=seqlen, seqlen_k=seqlen), arch="cpu", device=HERE.device, family=FAMILY.name,
        config=dict(config(style, variant)), seconds=1e-3, spread=1e-5, default_seconds=2e-3, error=1e-6,
        source_hash=source_hash, date="2026-01-01",
    )  # fmt: skip


def today(style: str = "plain", variant: int = 1) -> str:
    return KernelSpec(FAMILY, PROBLEM, HERE, config(style, variant)).hash


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    runs: list[object] = []
    compare = checks.compare
    monkeypatch.setattr(checks, "compare", lambda *args: runs.append(args) or compare(*args))
    return runs


def test_an_unchanged_source_is_not_verified(monkeypatch):
    runs = count_runs(monkeypatch)
    merge.put([record(source_hash=today())])
    choice = choose.choose(PROBLEM, HERE, check=True)
    assert (choice.provenance, choice.trust.state) == ("exact", "current")
    assert not runs


def test_a_changed_source_is_verified_once_a_machine(monkeypatch, capfd):
    monkeypatch.delenv("FAGEN_QUIET")
    runs = count_runs(monkeypatch)
    merge.put([record()])
    assert choose.choose(PROBLEM, HERE).trust.state == "unverified"  # explain and build run nothing
    assert not runs
    choice = choose.choose(PROBLEM, HERE, check=True)
    assert (choice.config, choice.trust.state) == (config(), "verified")
    assert len(runs) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if "verified" in line]
    assert len(said) == 1 and "right, largest error" in said[0] and PROBLEM.key in said[0]
    near = PROBLEM.replace(seqlen_q=100, seqlen_k=100)
    assert choose.choose(near, HERE, check=True).trust.state == "verified"  # the same source
    _forget(monkeypatch)
    choice = choose.choose(PROBLEM, HERE)
    assert choice.trust.state == "verified" and "verified here 20" in choice.trust.text
    assert len(runs) == 1
    merge.put([record(source_hash="01de7")])  # what counts is today's source, not what it was
    assert choose.choose(PROBLEM, HERE, check=True).trust.state == "verified"
    assert len(runs) == 1


@pytest.mark.parametrize(("style", "words"), [("wrong", "wrong at"), ("broken", "cannot be built")])
def test_a_kernel_that_has_become_bad_is_passed_over(monkeypatch, style, words):
    runs = count_runs(monkeypatch)
    merge.put([record(style), record(seqlen=256, source_hash=today())])
    choice = choose.choose(PROBLEM, HERE, check=True)
    assert (choice.provenance, choice.config) == ("nearest", config())
    assert any(words in reason and "exact record" in reason for reason in choice.reasons), choice.reasons
    _forget(monkeypatch)
    built = []
    monkeypatch.setattr(kernels, "built", lambda *args: built.append(args))
    text = str(explanation.explain_problem(PROBLEM, HERE))
    assert words in text and "source   current" in text
    assert choose.choose(PROBLEM, HERE, check=True).config == config()
    assert len(runs) == (style == "wrong") and not built  # remembered


def test_a_failure_that_may_pass_is_not_remembered(monkeypatch):
    merge.put([record()])

    def killed(*args):
        raise BuildError("the compiler was killed", log="...", killed=True)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "built", killed)
        assert choose.choose(PROBLEM, HERE, check=True).provenance == "default"
    _forget(monkeypatch)
    assert choose.choose(PROBLEM, HERE, check=True).trust.state == "verified"


_DIES = """
from tests.support import fake_family
from fagen import target
from fagen.dispatch import choose
fake_family.install()
choice = choose.choose(fake_family.PROBLEM, target.host(), check=True)
print(choice.provenance, choice.reasons)
"""


def test_a_kernel_that_kills_its_process_does_so_once(fake):
    merge.put([record("segfault")])
    variables = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "FAGEN_DB_DIR": str(fake / "db"),
        "PYTHONFAULTHANDLER": "1",
    }
    variables["FAGEN_CACHE_DIR"] = str(fake / "cache")  # where no other test removes what the first one leaves
    command = [sys.executable, "-c", _DIES]
    first = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert first.returncode == -signal.SIGSEGV, first.stderr
    second = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("default")
    assert "an earlier process ended while it verified this kernel" in second.stdout


@pytest.mark.slow
def test_processes_that_start_together_verify_once(fake):
    merge.put([record()])
    variables = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "FAGEN_DB_DIR": str(fake / "db"),
        "FAGEN_QUIET": "0",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", _DIES], env=variables, **pipes) for _ in range(3)]
    told = [rank.communicate(timeout=300) for rank in ranks]
    assert all(out.startswith("exact") for out, _ in told), told
    assert sum("verified fake_forward" in err for _, err in told) == 1, told


def test_two_bad_ones_are_enough(monkeypatch):
    """A template that makes nothing right does not cost a compilation for every record."""
    runs = count_runs(monkeypatch)
    monkeypatch.setattr(checks, "compare", lambda *args: runs.append(args) or (1.0, "wrong at b1"))
    merge.put([record("plain", variant, seqlen=seqlen) for variant, seqlen in ((1, 192), (2, 200), (3, 210))])
    choice = choose.choose(PROBLEM, HERE, check=True)
    assert choice.provenance == "default" and len(runs) == 2
    passed_over = [reason for reason in choice.reasons if reason.partition(" record ")[0] in ("exact", "nearest")]
    assert ["not tried" in reason for reason in passed_over] == [False, False, True]


def test_an_interrupted_verification_is_no_verdict(monkeypatch):
    merge.put([record()])

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checks, "compare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            choose.choose(PROBLEM, HERE, check=True)
    assert choose.choose(PROBLEM, HERE, check=True).trust.state == "verified"


def test_a_verification_that_fails_by_itself_is_no_verdict_on_the_kernel(monkeypatch):
    merge.put([record()])

    def failing(*args):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(checks, "compare", failing)
        choice = choose.choose(PROBLEM, HERE, check=True)
    assert choice.provenance == "default"
    assert any("could not be verified: RuntimeError: out of luck" in reason for reason in choice.reasons)
    _forget(monkeypatch)
    assert choose.choose(PROBLEM, HERE, check=True).trust.state == "verified"


def test_what_the_caller_has_set_does_not_reach_the_verification(monkeypatch):
    merge.put([record()])
    before, seen = torch.get_default_dtype(), []
    check = reference.check
    monkeypatch.setattr(reference, "check", lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or check(*args))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert choose.choose(PROBLEM, HERE, check=True).trust.state == "verified"
    finally:
        torch.set_default_dtype(before)
    assert seen and not any(seen)


def test_the_variable_decides(monkeypatch):
    runs = count_runs(monkeypatch)
    merge.put([record()])
    monkeypatch.setenv("FAGEN_STALE", "trust")
    assert choose.choose(PROBLEM, HERE, check=True).trust.state == "trusted"
    monkeypatch.setenv("FAGEN_STALE", "refuse")
    choice = choose.choose(PROBLEM, HERE, check=True)
    assert choice.provenance == "default" and any("FAGEN_STALE=refuse" in reason for reason in choice.reasons)
    monkeypatch.setenv("FAGEN_STALE", "perhaps")
    with pytest.raises(UsageError, match="known: verify, trust, refuse"):
        choose.choose(PROBLEM, HERE, check=True)
    assert not runs


def test_nothing_is_verified_where_nothing_may_be_compiled(monkeypatch):
    runs = count_runs(monkeypatch)
    merge.put([record()])
    with monkeypatch.context() as patch:
        patch.setenv("FAGEN_DISABLE_JIT", "1")
        choice = choose.choose(PROBLEM, HERE, check=True)
        assert choice.provenance == "default" and not runs
        assert any(ops.build_command(PROBLEM, "cpu") in reason for reason in choice.reasons)
    choose.choose(PROBLEM, HERE, check=True)
    monkeypatch.setenv("FAGEN_DISABLE_JIT", "1")
    assert choose.choose(PROBLEM, HERE, check=True).trust.state == "verified"  # it was, before


def test_a_device_that_is_not_here_is_not_waited_for(monkeypatch):
    runs = count_runs(monkeypatch)
    elsewhere = Target("cpu", "Another CPU", 2)
    merge.put([record()])
    choice = choose.choose(PROBLEM, elsewhere, check=True)
    assert (choice.provenance, choice.trust.state) == ("arch", "unverified") and not runs


def test_a_cache_that_cannot_be_written_costs_each_process_a_check(monkeypatch, tmp_path):
    merge.put([record()])
    kernel = kernels.built(KernelSpec(FAMILY, PROBLEM, HERE, config()))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernels, "built", lambda *args: kernel)
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / "file"))
    runs = count_runs(monkeypatch)
    for _ in range(2):
        assert choose.choose(PROBLEM, HERE, check=True).trust.state == "verified"
    assert len(runs) == 1


def test_a_verdict_that_others_could_have_written_is_none(monkeypatch):
    merge.put([record("wrong")])
    path = env.cache_dir() / "verified" / f"{today('wrong')}-{freshness._slug(HERE)}.json"
    good = {"ok": True, "reason": "right", "error": 0.0, "date": ""}
    freshness._write(path, good)
    assert path.stat().st_mode & 0o777 == 0o600
    assert freshness._read(path) is not None
    for at, mode in ((path, 0o602), (path.parent, 0o720)):
        before = at.stat().st_mode
        at.chmod(mode)
        assert freshness._read(path) is None
        at.chmod(before)
    path.chmod(0o620)
    assert choose.choose(PROBLEM, HERE, check=True).trust is None, "the record is wrong, whatever the verdict said"


def test_attention_verifies_on_its_first_call_alone(monkeypatch):
    runs = count_runs(monkeypatch)
    judged = []
    judge = freshness.check
    monkeypatch.setattr(freshness, "check", lambda *args, **named: judged.append(args) or judge(*args, **named))
    merge.put([record()])
    resolve.forget()
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    q, k, v = (torch.ones(1, PROBLEM.seqlen_q, heads, 16) for heads in (2, 1, 1))
    outs = [fagen.attention(q, k, v, causal=True)]
    first = len(judged)
    outs += [fagen.attention(q, k, v, causal=True) for _ in range(2)]
    assert len(runs) == 1 and len(judged) == first
    assert torch.equal(torch.rand(1), wanted)  # the caller's random numbers are as they were
    for out in outs:
        assert right(out, q, k, v, causal=True)
    text = str(fagen.explain(q, k, v, causal=True))
    assert "source   verified: the source has changed since it was tuned (01d, now " in text


def test_build_verifies_ahead_and_builds_what_else_may_serve(monkeypatch, tmp_path, capsys):
    file = tmp_path / "one.toml"
    file.write_text(
        '[[problem]]\ndtype = "fp32"\nhead_dim = 16\nmask = "causal"\nheads = 2\nkv_heads = 1\nseqlen = 192'
    )
    words = ["build", "--problems", str(file), "--target", "cpu", "--json"]
    monkeypatch.setattr(binding, "make", lambda: None)  # it is loaded

    def built() -> list[str]:
        assert main(words) == 0
        return [row["config"]["style"] for row in json.loads(capsys.readouterr().out)]

    merge.put([record("plain", 2)])
    assert built() == ["plain"], choose.choose(PROBLEM, HERE).reasons
    assert choose.choose(PROBLEM, HERE).trust.state == "verified"
    merge.put([record("wrong")])
    assert built() == ["wrong", "slow"]  # the default instead of what is wrong
    merge.put([record("plain", 3)])
    monkeypatch.setattr(kernels, "device_is_ready", lambda target: False)  # as where kernels are made for others
    assert built() == ["plain", "slow"]
