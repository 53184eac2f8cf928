"""The database: nothing lost between writers, nothing trusted that is damaged, the right record found."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from fagen.cli.main import main
from fagen.db import merge, store
from fagen.db.record import SCHEMA, Record
from fagen.db.store import Database
from fagen.errors import DatabaseError
from fagen.ops.attention import forward
from fagen.ops.attention.problem import Problem
from fagen.target import Target, known

GPU = Target("sm_90", "NVIDIA H200", 132)
OTHER = Target("sm_90", "NVIDIA H100", 132)


def record(problem: Problem, target: Target = GPU, **changes) -> Record:
    fields = {
        "problem": problem, "arch": target.arch, "device": target.device, "family": "sm80_forward",
        "config": {"tile_m": 64}, "seconds": 1e-3, "spread": 1e-5, "default_seconds": 2e-3, "error": 1e-3,
        "source_hash": "0123", "date": "2026-01-01", "trials": 5,
    }  # fmt: skip
    return Record(**{**fields, **changes})


@pytest.fixture
def folders(tmp_path, monkeypatch):
    shipped, user = tmp_path / "shipped", tmp_path / "user"
    monkeypatch.setattr(store, "default_paths", lambda: (shipped, user))
    monkeypatch.setenv("FAGEN_DB_DIR", str(user))
    return shipped, user


def test_what_is_put_is_found_again(tmp_path):
    one = record(Problem(head_dim=64, seqlen_q=1024), environment={"torch": "2"})
    (path,) = merge.put([one], tmp_path)
    assert path == tmp_path / "sm_90" / "nvidia-h200.json"
    database = Database.load([tmp_path])
    assert database.records == [one]
    assert database.find(one.problem, GPU) == (one, "exact")
    assert database.origin(one) == path
    assert one.speedup == 2.0


def test_pytorchs_time_is_kept_and_need_not_be_there(tmp_path):
    one = record(Problem(head_dim=64, seqlen_q=1024), torch_seconds=1.5e-3)
    (path,) = merge.put([one], tmp_path)
    assert Database.load([tmp_path]).records == [one]
    content = json.loads(path.read_text())
    del content["records"][0]["torch_seconds"]
    path.write_text(json.dumps(content))
    assert [r.torch_seconds for r in Database.load([tmp_path]).records] == [0.0]
    for odd in ("fast", None, True, -1.0, float("inf"), float("nan")):
        content["records"][0]["torch_seconds"] = odd
        path.write_text(json.dumps(content))
        found, wrong = store.read_file(path)
        assert not found and "torch_seconds" in wrong[0]


def test_the_overlay_wins_and_shipped_records_stay(folders):
    shipped, user = folders
    a, b = Problem(seqlen_q=1024), Problem(seqlen_q=2048)
    merge.put([record(a), record(b)], shipped)
    merge.put([record(a, seconds=9.0)])
    database = Database.load()
    assert database.find(a, GPU)[0].seconds == 9.0
    assert database.find(b, GPU)[0].seconds == 1e-3
    assert database.origin(database.find(a, GPU)[0]).is_relative_to(user)


def test_the_nearest_size_and_other_devices_are_farther(tmp_path):
    near, elsewhere, far = (
        record(Problem(heads=64, batch=8, seqlen_q=4096, seqlen_k=keys), device)
        for keys, device in ((5000, GPU), (4096, OTHER), (16384, GPU))
    )
    merge.put([far, near, elsewhere], tmp_path)
    database = Database.load([tmp_path])
    wanted = Problem(heads=64, batch=8, seqlen_q=4096, seqlen_k=4096)
    assert [(r.key, how) for r, how in database.candidates(wanted, GPU)] == [
        (near.key, "nearest"), (elsewhere.key, "arch"), (far.key, "nearest"),
    ]  # fmt: skip
    assert database.find(wanted, OTHER) == (elsewhere, "exact")
    assert database.find(wanted, Target("sm_90", "NVIDIA H20", 78))[1] == "arch"
    assert database.find(wanted, Target("sm_80", "NVIDIA A100", 108)) is None
    assert database.find(wanted.replace(head_dim=64, head_dim_v=64), GPU) is None


def test_distance_looks_at_waves_and_windows():
    base = Problem(heads=32, kv_heads=8)
    assert forward.OP.distance(base, base, 132) == 0
    assert forward.OP.distance(base, base.replace(kv_heads=32), 132) == 0  # nor does sharing keys
    assert forward.OP.distance(base, base.replace(heads=16), 132) == pytest.approx(1)  # 0.97 waves or 1.9
    assert 1 < forward.OP.distance(base, base.replace(batch=16), 132) < 1.1  # 1.9 or very many
    long = base.replace(seqlen_q=16384, seqlen_k=16384)
    assert forward.OP.distance(long, long.replace(batch=4), 132) == 0  # many waves or more of them
    wide = Problem(mask="window", window_left=127, window_right=0, seqlen_q=4096)
    assert forward.OP.distance(wide, wide.replace(window_left=255), 132) == pytest.approx(1)
    assert forward.OP.distance(wide, wide.replace(window_left=-1), 132) == 5  # as many keys as there are
    assert forward.OP.distance(wide, wide.replace(seqlen_k=8192), 132) == 0  # the window is what a row sees of them


def test_few_waves_are_near_few_waves(tmp_path):
    """A short prompt of one request takes the plain schedule of another one, not that of a large batch."""
    few = record(Problem(mask="causal", heads=32, seqlen_q=1024))
    many = record(Problem(mask="causal", batch=8, heads=16, seqlen_q=2048))
    merge.put([few, many], tmp_path)
    wanted = Problem(mask="causal", heads=16, seqlen_q=1536)
    assert Database.load([tmp_path]).find(wanted, GPU) == (few, "nearest")


def test_heads_that_share_keys_have_records_of_their_own_where_kernels_pack_them(tmp_path):
    shared, own = Problem(heads=32, kv_heads=8, seqlen_q=1024), Problem(heads=32, seqlen_q=1024)
    for arch, packs in (("sm_90", True), ("sm_80", False)):
        where, folder = known(arch), tmp_path / arch
        merge.put([record(own, arch=arch, device=where.device)], folder)
        database = Database.load([folder])
        assert database.find(own, where)[1] == "exact"
        assert (database.find(shared, where) is None) is packs


def test_loaded_once_and_again_when_a_file_changes(tmp_path):
    merge.put([record(Problem())], tmp_path)
    first = Database.load([tmp_path])
    assert Database.load([tmp_path]) is first
    merge.put([record(Problem(seqlen_q=77))], tmp_path)
    assert len(Database.load([tmp_path]).records) == 2


@pytest.mark.parametrize(
    ("policy", "kept"), [("newer", "2026-03-01"), ("faster", "2026-01-01"), ("keep", "2026-01-01")]
)
def test_merge_policies(tmp_path, policy, kept):
    merge.put([record(Problem(), date="2026-01-01", seconds=1.0)], tmp_path)
    merge.put([record(Problem(), date="2026-03-01", seconds=2.0)], tmp_path, policy)
    (left,) = Database.load([tmp_path]).records
    assert left.date == kept


def _put_many(folder: str, writer: int) -> None:
    for turn in range(8):
        merge.put([record(Problem(seqlen_q=1 + writer * 100 + turn))], Path(folder))


def test_concurrent_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_put_many, args=(str(tmp_path), n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert len(Database.load([tmp_path]).records) == 32
    assert not list(tmp_path.glob("sm_90/.*"))  # no half-written file stays


def test_a_damaged_file_is_named_and_skipped(folders, capsys):
    shipped, user = folders
    good = record(Problem())
    merge.put([good], shipped)
    path = store.path_of(user, "sm_90", "NVIDIA H200")
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1, "records": [')
    database = Database.load()
    assert database.find(good.problem, GPU) == (good, "exact")
    assert len(database.warnings) == 1
    assert str(path) in database.warnings[0]
    assert "damaged" in database.warnings[0]
    assert main(["db", "validate"]) == 1
    assert str(path) in capsys.readouterr().err


def test_a_damaged_file_is_kept_beside_the_new_one(tmp_path):
    path = store.path_of(tmp_path, "sm_90", "NVIDIA H200")
    path.parent.mkdir(parents=True)
    path.write_text("garbage")
    merge.put([record(Problem())], tmp_path)
    assert len(Database.load([tmp_path]).records) == 1
    (kept,) = path.parent.glob("*.damaged-*")
    assert kept.read_text() == "garbage"


def test_one_bad_record_does_not_take_the_others_along(tmp_path):
    (path,) = merge.put([record(Problem(seqlen_q=s)) for s in (1, 2, 3)], tmp_path)
    content = json.loads(path.read_text())
    content["records"][1]["seconds"] = "fast"
    path.write_text(json.dumps(content))
    database = Database.load([tmp_path])
    assert len(database.records) == 2
    assert "record 1 is skipped" in database.warnings[0]


@pytest.mark.parametrize(
    "change", [{"seconds": 0.0}, {"spread": -1.0}, {"error": float("nan")}, {"seconds": True}, {"config": [1]}]
)
def test_impossible_records_are_refused(tmp_path, change):
    with pytest.raises(DatabaseError):
        merge.put([record(Problem(), **change)], tmp_path)
    assert not store.files(tmp_path)


def test_a_schema_from_the_future_is_refused_and_left_alone(folders, capsys):
    _, user = folders
    path = store.path_of(user, "sm_90", "NVIDIA H200")
    path.parent.mkdir(parents=True)
    text = json.dumps({"schema": SCHEMA + 1, "something": "new"})
    path.write_text(text)
    assert "newer fagen" in Database.load().warnings[0]
    with pytest.raises(DatabaseError, match="Upgrade fagen"):
        merge.put([record(Problem())])
    assert path.read_text() == text
    assert main(["db", "validate"]) == 1
    assert "Upgrade fagen" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DatabaseError, match="FAGEN_DB_DIR"):
        merge.put([record(Problem())], tmp_path)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "sm_90").write_text("")
    with pytest.raises(DatabaseError, match="FAGEN_DB_DIR"):
        merge.put([record(Problem())], tmp_path)


def test_commands(folders, tmp_path, capsys):
    shipped, _ = folders
    merge.put([record(Problem(mask="causal", seqlen_q=1024))], shipped)
    theirs = tmp_path / "theirs"
    merge.put([record(Problem(mask="causal", seqlen_q=4096))], theirs)
    assert main(["db", "merge", str(theirs), "--policy", "faster"]) == 0
    capsys.readouterr()
    assert main(["db", "list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert main(["db", "list"]) == 0
    said = capsys.readouterr()
    assert "shipped" in said.err
    assert "yours" in said.err
    assert said.out == ""
    assert main(["db", "show", "q4096"]) == 0
    assert "2.00x the default" in capsys.readouterr().err
    assert main(["db", "show", "nothing"]) == 1
    capsys.readouterr()
    assert main(["db", "export", "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["db", "export", "--format", "t4", "--out", str(tmp_path / "t4.json")]) == 0
    t4 = json.loads((tmp_path / "t4.json").read_text())
    assert t4["schema_version"] == "1.0.0"
    for result in t4["results"]:
        assert {"configuration", "times", "invalidity", "correctness"} <= set(result)
        assert result["invalidity"] == "correct"
    assert main(["db", "merge", str(tmp_path / "absent")]) == 2


def test_why_says_where_a_config_comes_from(folders, capsys):
    shipped, _ = folders
    merge.put([record(Problem(mask="causal", seqlen_q=4096, heads=32))], shipped)
    flags = ["--target", "sm_90", "--mask", "causal", "--seqlen", "3k", "--heads", "32", "--json"]
    assert main(["db", "why", *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["records"][0]["provenance"] == "nearest"
    assert any("lacks knob" in reason for reason in told["reasons"])  # the record's config is of no known family


def test_the_time_of_pytorch_is_kept_shown_and_optional(folders, tmp_path, capsys):
    (path,) = merge.put([record(Problem(), torch_seconds=4e-3)], tmp_path / "theirs")
    assert main(["db", "merge", str(tmp_path / "theirs")]) == 0
    assert main(["db", "show", "causal"]) == 1 and main(["db", "show", "none"]) == 0
    assert "PyTorch  4 ms, 4.00x the winner's time" in capsys.readouterr().err
    content = json.loads(path.read_text())
    del content["records"][0]["torch_seconds"]  # as before there was the field
    path.write_text(json.dumps(content))
    (old,) = store.read_file(path)[0]
    assert old.torch_seconds == 0.0
    for wrong in (-1.0, float("nan"), float("inf"), True, None, "1"):
        with pytest.raises(DatabaseError, match="torch_seconds"):
            record(Problem(), torch_seconds=wrong)


def test_the_list_has_a_head_and_names_the_family(folders, capsys):
    shipped, _ = folders
    merge.put([record(Problem(seqlen_q=64)), record(Problem(seqlen_q=128), family="sm90_forward", default_seconds=0)])
    assert main(["db", "list"]) == 0
    head, first, second, count = capsys.readouterr().err.splitlines()
    assert head.split() == ["arch", "device", "family", "time", "gain", "whose", "problem"]
    assert " sm90_forward " in first and " sm80_forward " in second and count == "2 winners"
    for name in ("family", "whose", "problem"):  # columns stand below their heads
        assert all(line[head.index(name) - 1] == " " != line[head.index(name)] for line in (first, second))
