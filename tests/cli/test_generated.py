"""generated/ is what the templates render today, and claims no verification that its sources do not have."""

from __future__ import annotations

import json
import shutil

import pytest

from fagen.cli import generated
from fagen.codegen import emit
from fagen.errors import MissingTool, UsageError, WrongResult

NAMES = list(generated.listed())


@pytest.mark.parametrize("name", NAMES)
def test_files_are_current(name):
    spec, provenance = generated.listed()[name]
    folder = generated.ROOT / name
    texts = {
        emit.source_name(spec): emit.kernel_text(spec, provenance),
        emit.HEADER: emit.header_text(spec),
        f"main{spec.suffix}": emit.example_text(spec),
    }
    assert {path.name for path in folder.iterdir()} == texts.keys()
    for file, text in texts.items():
        assert (folder / file).read_text() == text, f"{folder / file} is old; run: make generated"


def test_the_manifest_is_honest():
    kernels, entries = generated.listed(), generated.read_manifest()
    assert entries.keys() == kernels.keys(), "run: make generated"
    for name, entry in entries.items():
        assert entry["source_hash"] == kernels[name][0].hash, f"{name} changed; run: make generated"
        assert entry["config"] == dict(kernels[name][0].config)
        assert entry["status"] == generated.status(entry), f"{name} claims to be {entry['status']}"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A folder of its own with the CPU's kernel alone, as this machine has it."""
    monkeypatch.setattr(generated, "_CPU", generated.host())
    text = (generated.ROOT / generated.LIST).read_text()
    table = next(part for part in text.split("[[kernel]]") if 'arch = "cpu"' in part)
    (tmp_path / generated.LIST).write_text("[[kernel]]" + table)
    generated.write(tmp_path)
    return tmp_path


def test_a_verification_is_noted_and_goes_stale_with_its_source(copy):
    (name,) = generated.read_manifest(copy)
    assert generated.read_manifest(copy)[name]["status"] == "unverified"
    facts = {"source_hash": generated.read_manifest(copy)[name]["source_hash"], "device": "it", "error": 0.0}
    generated.record_verification(name, facts, copy)
    assert generated.read_manifest(copy)[name]["status"] == "verified"
    generated.write(copy)
    assert generated.read_manifest(copy)[name]["status"] == "verified", "rendering the same source keeps it"

    text = (copy / generated.LIST).read_text()
    (copy / generated.LIST).write_text(text + "softcap = true\n")
    assert generated.write(copy) == [name]
    entry = generated.read_manifest(copy)[name]
    assert entry["status"] == "stale"
    assert entry["verified"]["source_hash"] == facts["source_hash"]
    with pytest.raises(WrongResult, match="another source"):
        generated.record_verification(name, facts, copy)


def test_what_is_no_longer_listed_goes_and_no_other_folder(copy):
    (name,) = generated.read_manifest(copy)
    shutil.copytree(copy / name, copy / "mine")
    text = (copy / generated.LIST).read_text()
    (copy / generated.LIST).write_text(text.replace(f'name = "{name}"', 'name = "another"'))
    generated.write(copy)
    assert {path.name for path in copy.iterdir() if path.is_dir()} == {"another", "mine"}


def test_without_a_checkout_it_says_so(tmp_path):
    with pytest.raises(MissingTool, match="checkout"):
        generated.write(tmp_path / "generated")


def test_an_unknown_kernel_cannot_be_verified(copy):
    with pytest.raises(UsageError, match="'x'"):
        generated.record_verification("x", {"source_hash": ""}, copy)


def test_verify_here_runs_the_cpu_kernel_and_writes_what_it_saw(copy, monkeypatch):
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(copy / "cache-of-test"))
    monkeypatch.setattr(generated, "detect", generated.host)
    assert generated.verify_here(copy) == 0
    (entry,) = generated.read_manifest(copy).values()
    assert entry["status"] == "verified"
    assert entry["verified"]["device"] == generated.host().device
    assert entry["verified"]["seconds"] > 0
    assert json.loads((copy / generated.MANIFEST).read_text())["schema"] == 1


def test_a_wrong_kernel_is_not_noted(copy, monkeypatch):
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(copy / "cache-of-test"))

    def wrong(*args, **options):
        from fagen.ops.attention.reference import Verdict

        return Verdict(False, 1.0, 9.0, "O: error 1")

    monkeypatch.setattr("fagen.ops.attention.reference.check", wrong)
    assert generated.verify_here(copy) == 1
    (entry,) = generated.read_manifest(copy).values()
    assert entry["status"] == "unverified"
