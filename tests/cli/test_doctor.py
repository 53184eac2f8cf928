"""The doctor finds what is missing, says what it costs and how to get it, and never falls over what it finds."""

from __future__ import annotations

import json

import pytest

from fagen import env
from fagen.build import toolchain
from fagen.cli import doctor, main


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path / "db"))
    return tmp_path


def finding(name: str) -> doctor.Diagnosis:
    return next(f for f in doctor.examine() if f.name == name)


def test_every_finding_that_is_not_fine_says_what_it_costs():
    findings = doctor.examine()
    names = {f.name for f in findings}
    assert {
        "python",
        "torch",
        "c++ compiler",
        "nvcc",
        "ninja",
        "templates",
        "cache",
        "your winners",
        "database",
    } <= names
    for f in findings:
        assert f.status in ("ok", "note", "missing", "problem")
        assert f.status == "ok" or f.cost, f


def test_looking_makes_no_folder(home):
    doctor.examine()
    assert list(home.iterdir()) == []


def test_no_compiler_is_exit_code_four(monkeypatch, capsys):
    monkeypatch.setenv("FAGEN_CXX", "/nonexistent/g++")
    assert main.main(["doctor", "--json"]) == 4
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["ok"] is False
    missing = next(f for f in report["findings"] if f["name"] == "c++ compiler")
    assert missing["status"] == "missing"
    assert "install g++" in missing["remedy"] or "apt install g++" in missing["remedy"]
    assert "cost: nothing can be built" in err


def test_a_compiler_that_cannot_compile(monkeypatch, home):
    broken = home / "g++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("FAGEN_CXX", str(broken))
    found = finding("c++ compiler")
    assert found.status == "problem"
    assert "no such thing" in found.detail


@pytest.mark.parametrize(("driver", "status"), [(True, "missing"), (False, "note")])
def test_no_nvcc_matters_where_a_driver_is(monkeypatch, driver, status):
    monkeypatch.setenv("FAGEN_NVCC", "/nonexistent/nvcc")
    monkeypatch.setattr(doctor, "_has_nvidia_driver", lambda: driver)
    found = finding("nvcc")
    assert found.status == status
    assert "CUDA toolkit" in found.remedy


def test_a_driver_without_a_torch_for_it(monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "_has_nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = finding("gpu")
    assert found.status == "problem"
    assert "torch with CUDA" in found.remedy


def test_an_nvcc_newer_than_the_driver(monkeypatch, home):
    monkeypatch.setattr(doctor, "_driver_cuda", lambda: "12.4")
    monkeypatch.setattr(toolchain, "nvcc", lambda: home / "nvcc")
    version = toolchain.compiler_version
    monkeypatch.setattr(
        toolchain, "compiler_version", lambda p: "release 13.0, V13" if p == home / "nvcc" else version(p)
    )
    assert finding("driver and nvcc").status == "problem"


def test_folders_that_cannot_be_written(monkeypatch, home):
    (home / "file").write_text("")
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(home / "file" / "cache"))
    found = finding("cache")
    assert found.status == "problem"
    assert "FAGEN_CACHE_DIR" in found.remedy


def test_little_space_and_noexec(monkeypatch):
    monkeypatch.setattr(doctor, "_ENOUGH_BYTES", 1 << 80)
    monkeypatch.setattr(doctor, "_no_execution", lambda path: True)
    found = [f for f in doctor.examine() if f.name in ("cache", "temporary files")]
    assert any("run out of space" in f.cost for f in found)
    assert any("noexec" in f.detail and "cannot be loaded" in f.cost for f in found)


def test_a_busy_machine_is_noted(monkeypatch):
    from fagen import target
    from fagen.timing import load

    monkeypatch.setattr(target, "count", lambda: 0)
    monkeypatch.setattr(load, "average", lambda: 0.5)
    assert finding("load").status == "ok"
    monkeypatch.setattr(load, "average", lambda: 2.0 * load.cores())
    found = finding("load")
    assert found.status == "note" and "this machine is busy" in found.detail and found.cost and found.remedy

    def none():
        raise ImportError("no torch")

    monkeypatch.setattr(target, "count", none)
    assert finding("load").status == "note"


def test_damaged_entries_and_records(home, capsys):
    (home / "cache" / "kernels" / f"half-done-{'0' * 16}").mkdir(parents=True)
    (home / "db" / "cpu").mkdir(parents=True)
    (home / "db" / "cpu" / "some.json").write_text("{")
    assert finding("cache entries").remedy == "fagen cache verify --remove"
    problems = [f for f in doctor.examine() if f.name == "database" and f.status == "problem"]
    assert "some.json" in problems[0].detail
    assert main.main(["doctor"]) in (1, 4)
    assert "some.json" in capsys.readouterr().err


def test_variables_are_listed_and_misspelt_ones_found(monkeypatch):
    monkeypatch.setenv("FAGEN_CACHEDIR", "/x")
    assert finding("FAGEN_CACHEDIR").status == "note"
    assert finding("FAGEN_DB_DIR").status == "ok"
    assert all(name in finding("FAGEN_CACHEDIR").remedy for name in env.VARIABLES)


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def check():
        yield doctor.Diagnosis("first", "ok", "")
        raise OSError("the disk is gone")

    found = doctor._guarded(check)()
    assert [f.status for f in found] == ["ok", "problem"]
    assert "the disk is gone" in found[1].detail
