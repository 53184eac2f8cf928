"""What users do with databases that they share: merge, compare, check, prune, hand on."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from fagen import env, families
from fagen.cli.main import main
from fagen.codegen.spec import KernelSpec
from fagen.db import audit, merge, store
from fagen.db.merge import Decision, put
from fagen.db.record import SCHEMA, Record
from fagen.db.store import Database
from fagen.errors import DatabaseError
from fagen.ops.attention.problem import Problem
from fagen.target import known

GPU = known("sm_90")
FAMILY = families.get("sm90_forward")
PROBLEM = Problem(mask="causal", heads=32, seqlen_q=4096)
GUESSES = FAMILY.first_configs(PROBLEM, GPU)
LEAN = min(GUESSES, key=lambda c: FAMILY.resources(PROBLEM, GPU, c))
RICH = max(GUESSES, key=lambda c: FAMILY.resources(PROBLEM, GPU, c))


def record(problem: Problem = PROBLEM, config=LEAN, **changes) -> Record:
    fields = {
        "problem": problem, "arch": "sm_90", "device": "NVIDIA H200", "family": FAMILY.name, "config": dict(config),
        "seconds": 1e-3, "spread": 1e-5, "default_seconds": 2e-3, "error": 1e-3,
        "source_hash": KernelSpec(FAMILY, problem, GPU, config).hash, "date": "2026-02-01", "trials": 5,
        "environment": {"torch": "2.11", "driver": "580"},
    }  # fmt: skip
    return Record(**{**fields, **changes})


@pytest.fixture
def folders(tmp_path, monkeypatch):
    shipped, user = tmp_path / "shipped", tmp_path / "user"
    monkeypatch.setattr(store, "default_paths", lambda: (shipped, user))
    monkeypatch.setenv("FAGEN_DB_DIR", str(user))
    return shipped, user


def merged(old: Record, new: Record, policy: str, folder: Path) -> Decision:
    put([old], folder)
    (decision,) = merge.merge([new], folder, policy).decisions
    (left,) = Database.load([folder]).records
    assert left == (new if decision.action == "replaced" else old)
    return decision


# ---- merge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "changes", "action"),
    [
        ("newer", {"date": "2026-03-01", "seconds": 2e-3}, "replaced"),
        ("newer", {"date": "2026-01-01", "seconds": 1e-4}, "kept"),
        ("keep", {"date": "2026-03-01", "seconds": 1e-4}, "kept"),
        ("faster", {"seconds": 9.5e-4}, "replaced"),
        ("faster", {"seconds": 9.9e-4}, "kept"),  # 1 % with a noise of 1.4 %
        ("faster", {"seconds": 9.9e-4, "spread": 1e-7}, "kept"),  # the noise of the other is as large
        ("faster", {"seconds": 1.1e-3, "date": "2026-03-01"}, "kept"),
        ("newer", {}, "kept"),  # the same
    ],
)
def test_who_stays(tmp_path, policy, changes, action):
    assert merged(record(), record(**changes), policy, tmp_path).action == action


def test_among_equals_the_one_of_fewer_resources_whoever_comes_first(tmp_path):
    lean, rich = record(config=LEAN, seconds=1.005e-3), record(config=RICH)
    assert merged(rich, lean, "faster", tmp_path / "a").action == "replaced"
    assert merged(lean, rich, "faster", tmp_path / "b").action == "kept"
    assert merged(lean, record(config=RICH, seconds=9e-4), "faster", tmp_path / "c").action == "replaced"


@pytest.mark.parametrize("policy", ["newer", "faster"])
def test_what_todays_templates_make_stays_before_what_they_do_not(tmp_path, policy):
    stale = {"source_hash": "01d", "date": "2026-03-01", "seconds": 1e-4}
    assert merged(record(), record(**stale), policy, tmp_path / "a").action == "kept"
    assert merged(record(**stale), record(), policy, tmp_path / "b").action == "replaced"
    bad = dataclasses.replace(record(), config={"colour": 1}, date="2026-03-01", seconds=1e-4)
    assert merged(record(), bad, policy, tmp_path / "c").action == "kept"


def test_records_of_other_devices_never_meet(tmp_path):
    put([record()], tmp_path)
    done = merge.merge([record(device="NVIDIA H100", seconds=1e-5)], tmp_path, "faster")
    assert done.count("added") == 1
    assert {r.device for r in Database.load([tmp_path]).records} == {"NVIDIA H200", "NVIDIA H100"}
    with pytest.raises(DatabaseError, match="of another device"):
        merge.merge([record(device="NVIDIA-H200")], tmp_path, "faster")  # the same file name
    assert {r.device for r in Database.load([tmp_path]).records} == {"NVIDIA H200", "NVIDIA H100"}


def test_a_merge_reports_and_a_dry_run_changes_nothing(folders, tmp_path, capsys):
    _, user = folders
    theirs = tmp_path / "theirs.json"
    longer = PROBLEM.replace(seqlen_q=8192, seqlen_k=8192)
    (path,) = put([record(), record(longer)])
    before = path.read_bytes()
    new = record(seconds=5e-4, environment={"torch": "2.11", "driver": "590"})
    (made,) = put([new, record(longer, seconds=1.004e-3), record(Problem(mask="causal"))], tmp_path / "made")
    made.rename(theirs)
    command = ["db", "merge", str(theirs), "--policy", "faster"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert path.read_bytes() == before
    assert "would be (faster): 1 added, 1 replaced, 1 kept; nothing is written" in said
    assert f"replaced {PROBLEM.key} (sm90_forward): 50.0% faster" in said
    assert f"kept     {longer.key} (sm90_forward): 0.4% slower, within the noise of 1.4%" in said
    assert "measured under driver 580 and 590" in said
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["added"], told["replaced"], told["kept"]) == (1, 1, 1)
    assert told["written"] == [str(path)] and len(told["decisions"]) == 3
    assert {r.seconds for r in Database.load([user]).records} == {5e-4, 1e-3}
    assert main(command) == 0
    assert "0 added, 0 replaced, 3 kept" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["merge", "diff", "prune", "validate"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"schema": SCHEMA + 1}), "newer fagen"),
        ('{"schema": 1, "rec', "damaged"),
        ("[]", "no fagen database"),
    ],
)
def test_files_that_cannot_be_used_are_named_and_nothing_changes(folders, tmp_path, capsys, verb, text, words):
    (path,) = put([record()])
    theirs = tmp_path / "theirs.json"
    theirs.write_text(text)
    before = path.read_bytes()
    more = {"diff": ["yours", str(theirs)], "prune": [str(theirs), str(path), "--stale", "--yes"]}
    assert main(["db", verb, *more.get(verb, [str(theirs)])]) == 1
    said = capsys.readouterr().err
    assert words in said and str(theirs) in said
    assert path.read_bytes() == before and theirs.read_text() == text
    assert sorted(p.name for p in path.parent.iterdir() if p.suffix != ".lock") == [path.name]


def test_only_a_real_merge_sets_a_damaged_record_aside(folders, tmp_path):
    _, user = folders
    path = store.path_of(user, "sm_90", "NVIDIA H200")
    spoil(path)
    put([record(seconds=1e-4)], tmp_path / "theirs")
    for dry_run, copies in ((["--dry-run"], 0), ([], 1)):
        assert main(["db", "merge", str(tmp_path / "theirs"), *dry_run]) == 0
        assert len(list(path.parent.glob("*.damaged-*"))) == copies


def test_a_merge_that_must_fail_writes_no_file_before(folders, tmp_path, capsys):
    _, user = folders
    future = store.path_of(user, "sm_90", "NVIDIA H200")
    future.parent.mkdir(parents=True)
    future.write_text(json.dumps({"schema": SCHEMA + 1}))
    put([record(device="NVIDIA H100"), record()], tmp_path / "theirs")
    assert main(["db", "merge", str(tmp_path / "theirs")]) == 1
    assert "Upgrade fagen" in capsys.readouterr().err
    assert not store.path_of(user, "sm_90", "NVIDIA H100").exists()


# ---- diff ---------------------------------------------------------------------------------------------------------


def test_diff(folders, tmp_path, capsys):
    sizes = [PROBLEM.replace(batch=b) for b in (1, 2, 3, 4, 5)]
    alike, slower, other, mine, theirs = sizes
    put([record(alike), record(slower), record(other), record(mine)])
    folder = tmp_path / "theirs"
    put([record(alike, seconds=1.01e-3, date="2026-05-05"), record(slower, seconds=2e-3)], folder)
    put([record(other, RICH, seconds=1.001e-3), record(theirs)], folder)
    assert main(["db", "diff", "yours", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["key"]: row for row in told["differences"]}
    assert {key: row["what"] for key, row in rows.items()} == {
        slower.key: "time", other.key: "config", mine.key: "only a", theirs.key: "only b",
    }  # fmt: skip
    assert rows[slower.key]["ratio"] == pytest.approx(0.5)
    assert rows[other.key]["beyond_noise"] is False
    assert set(rows[other.key]["changed"]) == {name for name in LEAN if LEAN[name] != RICH[name]}
    assert main(["db", "diff", "yours", "yours"]) == 0
    assert "A has 4 winners, B 4: 0 only a, 0 only b, 0 config, 0 time" in capsys.readouterr().err
    assert main(["db", "diff", "yours", "shipped"]) == 0
    assert "4 only a" in capsys.readouterr().err


# ---- validate and prune -------------------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    """One record each that is stale, illegal, of no known family, twice there, and damaged; one that is good."""
    too_large = {**LEAN, "tile_m": 192, "tile_n": 208, "stages": 4}
    rows = [
        record(),
        record(PROBLEM.replace(batch=2), source_hash="01d"),
        dataclasses.replace(record(PROBLEM.replace(batch=3)), config=too_large),
        dataclasses.replace(record(PROBLEM.replace(batch=4)), family="sm42_forward"),
        record(PROBLEM.replace(batch=5)),
        record(PROBLEM.replace(batch=6)),
    ]
    content = [row.to_dict() for row in rows]
    content.append({**content[4], "date": "2026-09-09"})
    content[5]["seconds"] = "fast"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema": 1, "arch": "sm_90", "device": "NVIDIA H200", "records": content}))


def test_validate_finds_each_kind(folders, tmp_path, capsys):
    path = store.path_of(tmp_path / "some", "sm_90", "NVIDIA H200")
    spoil(path)
    assert main(["db", "validate", str(path), "--json"]) == 1
    out, said = capsys.readouterr()
    told = json.loads(out)
    kinds = sorted(finding["kind"] for finding in told["findings"])
    assert kinds == ["damaged", "duplicate", "illegal", "illegal", "stale"]
    assert len(told["wrong"]) == 4 and told["records"] == 6
    assert str(path) in said and "3 more" in said
    elsewhere = tmp_path / "any" / "sm_80" / "h200.json"
    (made,) = put([record()], tmp_path / "made")
    elsewhere.parent.mkdir(parents=True)
    made.rename(elsewhere)
    assert main(["db", "validate", str(elsewhere)]) == 1
    assert "expected sm_90/nvidia-h200.json" in capsys.readouterr().err


def test_stale_is_no_fault_unless_asked(folders, capsys):
    put([record(source_hash="01d")])
    assert main(["db", "validate"]) == 0
    assert "1 of another kernel source" in capsys.readouterr().err
    assert main(["db", "validate", "--strict"]) == 1
    assert "its kernel source was 01d, today it is " in capsys.readouterr().err


def test_what_ships_is_valid():
    for path in store.files(env.data_dir("tuning_db")):
        records, found = audit.check_file(path)
        assert records
        assert [finding for finding in found if finding.kind not in audit.HARMLESS] == []


def test_prune(folders, tmp_path, capsys):
    shipped, user = folders
    spoil(store.path_of(user, "sm_90", "NVIDIA H200"))
    (kept,) = put([record(source_hash="01d")], shipped)
    path = store.path_of(user, "sm_90", "NVIDIA H200")
    before = path.read_bytes()
    assert main(["db", "prune"]) == 0
    assert "3 winners would be removed; --yes removes them" in capsys.readouterr().err
    assert main(["db", "prune", "--stale", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        sorted(f["kind"] for f in told["found"]) == ["duplicate", "illegal", "illegal", "stale"]
        and told["removed"] == 0
    )
    assert path.read_bytes() == before
    assert main(["db", "prune", "--stale", "--yes"]) == 0
    assert "4 winners removed" in capsys.readouterr().err
    assert {r.problem.batch for r in store.read_file(path)[0]} == {1, 5}
    assert len(list(path.parent.glob("*.damaged-*"))) == 1  # the record that could not be read is not lost
    assert len(store.read_file(kept)[0]) == 1
    assert main(["db", "prune", str(shipped), "--stale", "--yes"]) == 0  # named, so it is meant
    assert not kept.exists()
    assert main(["db", "validate"]) == 0


# ---- export -------------------------------------------------------------------------------------------------------

_NUMBER = (int, float)


def check_t4(text: str) -> list[dict]:
    """What the schema of T4 1.0.0 asks of a results file; its results."""
    document = json.loads(text)
    assert document["schema_version"] == "1.0.0"
    for result in document["results"]:
        assert {"configuration", "times", "invalidity", "correctness"} <= set(result)
        assert isinstance(result["configuration"], dict) and isinstance(result["timestamp"], str)
        assert isinstance(result["objectives"], list) and isinstance(result["correctness"], _NUMBER)
        assert result["invalidity"] in ("timeout", "compile", "runtime", "correctness", "constraints", "correct")
        times = result["times"]
        assert isinstance(times["runtimes"], list) and times["compilation"] == times["compilation_time"]
        for name in ("compilation_time", "framework", "search_algorithm", "validation"):
            assert isinstance(times[name], _NUMBER)
        for one in result["measurements"]:
            assert isinstance(one["name"], str) and isinstance(one["unit"], str)
            assert isinstance(one["value"], (*_NUMBER, str, list)) and not isinstance(one["value"], bool)
    return document["results"]


def check_metadata(path: Path) -> dict:
    document = json.loads(path.read_text())
    assert document["schema_version"] == "1.0.0"
    metadata = document["metadata"]
    assert isinstance(metadata["hardware"]["hardware_description"], list)
    assert isinstance(metadata["hardware"]["operating_system"], str)
    assert isinstance(metadata["environment"]["device_query"], dict)
    assert all(isinstance(text, str) for text in metadata["environment"]["requirements"])
    return metadata


def test_export_of_winners(folders, tmp_path, capsys):
    shipped, _ = folders
    put([record(), record(Problem(mask="none"), GUESSES[0], source_hash="01d")], shipped)
    assert main(["db", "export"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["key"] for row in rows} == {PROBLEM.key, Problem().key}
    assert main(["db", "export", "--format", "csv"]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [json.loads(line["config"])["tile_m"] for line in lines] == [row["config"]["tile_m"] for row in rows]
    assert float(lines[0]["seconds"]) == rows[0]["seconds"]
    out = tmp_path / "winners.json"
    assert main(["db", "export", "--format", "t4", "--out", str(out)]) == 0
    results = check_t4(out.read_text())
    assert [r["times"]["runtimes"] for r in results] == [[1.0], [1.0]] and results[0]["correctness"] == 1
    assert check_metadata(tmp_path / "winners-metadata.json")["environment"]["requirements"] == ["torch==2.11"]
    assert main(["db", "export", "--format", "t4", "--out", str(tmp_path)]) == 0
    check_t4((tmp_path / "results.json").read_text())
    check_metadata(tmp_path / "metadata.json")


def test_a_run_is_exported_by_the_names_that_report_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(env, "runs_dir", lambda: tmp_path)
    row = {"problem": PROBLEM.key, "family": FAMILY.name, "config": dict(LEAN), "outcome": "compile"}
    for name in ("20260101-000000-cpu", "20260102-000000-cpu"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trials.jsonl").write_text(json.dumps(row | {"reason": name}) + "\n")
    said = {}
    for word in ("20260101-000000-cpu", "latest", str(tmp_path / "20260101-000000-cpu" / "trials.jsonl")):
        assert main(["db", "export", "--format", "t4", "--run", word]) == 0
        said[word] = {m["name"]: m["value"] for r in check_t4(capsys.readouterr().out) for m in r["measurements"]}
    assert [words["reason"] for words in said.values()] == [f"2026010{day}-000000-cpu" for day in (1, 2, 1)]
    assert main(["db", "export", "--format", "t4", "--run", "none"]) == 2
    assert "there is no run none" in capsys.readouterr().err


def test_strange_lines_of_a_run_are_exported_as_far_as_they_are_understood(tmp_path, capsys):
    good = {"problem": PROBLEM.key, "family": FAMILY.name, "config": dict(LEAN), "outcome": "ok", "seconds": 2e-3}
    odd = [
        {"facts": [1]}, {"facts": {"compile_seconds": "long"}}, {"config": [1]}, {"outcome": [1]}, {"seconds": "2"},
        {"seconds": 10**400}, {"spread": float("nan")}, {"date": None}, {"problem": {"batch": 10**400}}, {"error": {}},
    ]  # fmt: skip
    path = tmp_path / "trials.jsonl"
    path.write_text("\n".join(json.dumps(good | change) for change in odd) + "\n" + "[" * 100_000 + "\n")
    assert main(["db", "export", "--format", "t4", "--run", str(path)]) == 0
    assert len(check_t4(capsys.readouterr().out)) == len(odd)


def test_export_of_a_run_has_every_candidate(tmp_path, capsys):
    words = {
        "ok": "correct", "constraint": "constraints", "compile": "compile", "spill": "compile", "wrong": "correctness",
        "crash": "runtime", "timeout": "timeout",
    }  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    rows = [
        {"problem": PROBLEM.key, "family": FAMILY.name, "config": dict(LEAN), "outcome": outcome, "reason": "why",
         "seconds": 2e-3 if outcome == "ok" else None, "spread": 1e-5 if outcome == "ok" else None, "error": None,
         "facts": {"compile_seconds": 1.5, "registers": 168}, "date": "2026-02-01"}
        for outcome in words
    ]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    (run / "trials.jsonl").write_text("\n".join(lines) + '\n{"problem": "torn')
    (run / "run.json").write_text(json.dumps({"environment": {"torch": "2.11"}, "target": {"arch": "sm_90"}}))
    out = tmp_path / "t4.json"
    assert main(["db", "export", "--format", "t4", "--run", str(run), "--out", str(out)]) == 0
    results = check_t4(out.read_text())
    assert [r["invalidity"] for r in results] == list(words.values())
    assert [r["correctness"] for r in results] == [1, 0, 0, 0, 0, 0, 0]
    assert [r["times"]["runtimes"] for r in results] == [[2.0], [], [], [], [], [], []]
    assert all(r["times"]["compilation_time"] == 1500 for r in results)
    assert {"name": "registers", "value": 168, "unit": ""} in results[0]["measurements"]
    assert check_metadata(tmp_path / "t4-metadata.json")["hardware"]["hardware_description"][0]["arch"] == "sm_90"
    capsys.readouterr()
    assert main(["db", "export", "--format", "t4", "--run", str(tmp_path)]) == 2
    assert "is no run of fagen tune" in capsys.readouterr().err
    assert main(["db", "export", "--format", "csv", "--run", str(run)]) == 2
