"""Records are data from strangers: whatever a file holds, it is taken as a record or skipped with a word."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fagen import env, explanation, families, schema
from fagen.cli.main import main
from fagen.codegen import emit
from fagen.codegen.spec import KernelSpec
from fagen.db import audit, merge, store
from fagen.db import record as db_record
from fagen.db.record import SCHEMA, Record, environment
from fagen.db.store import Database
from fagen.dispatch import choose
from fagen.errors import DatabaseError, FagenError, InvalidArgument
from fagen.ops.attention import forward
from fagen.ops.attention.problem import Problem
from fagen.target import known

GPU = known("sm_90")
FAMILY = families.get("sm90_forward")
PROBLEM = Problem(mask="causal", heads=32, seqlen_q=4096)
CONFIG = dict(FAMILY.default(PROBLEM, GPU))
HUGE = 10**400
INJECTED = 'true; static int system(const char*); static int x = system("true")'


def record(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "problem": PROBLEM, "arch": "sm_90", "device": "NVIDIA H200", "family": FAMILY.name, "config": {**CONFIG},
        "seconds": 1e-3, "spread": 1e-5, "default_seconds": 2e-3, "error": 1e-3, "source_hash": "01d",
        "date": "2026-02-01", "trials": 5, "environment": {"torch": "2.11", "units": "132"},
    }  # fmt: skip
    return Record(**{**fields, **changes})


def content(**changes: Any) -> dict[str, Any]:
    """A file with one record, some of its fields changed; those of its problem under their own names."""
    row = record().to_dict()
    for name, value in changes.items():
        (row["problem"] if name in row["problem"] else row)[name] = value
    return {"schema": 1, "arch": "sm_90", "device": "NVIDIA H200", "records": [row]}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    shipped, user = tmp_path / "shipped", tmp_path / "user"
    monkeypatch.setattr(store, "default_paths", lambda: (shipped, user))
    monkeypatch.setenv("FAGEN_DB_DIR", str(user))
    return shipped, user


# ---- the schema -----------------------------------------------------------------------------------------------------

_PROBLEMS: dict[str, list[Any]] = {
    "op": [1, "sideways"], "dtype": [[], "fp8"], "mask": [None, "none; code"], "intervals": ["x", "lower1", 0],
    "aligned": [INJECTED, 1, None], "softcap": ["true", 0, 30.0], "alibi": [[], 1],
    "head_dim": [True, 0, 1025, HUGE, "64", 64.0], "head_dim_v": [-1, 1025, None],
    "batch": [0, -1, True, HUGE, 2**31, 1.0, float("nan"), None], "heads": ["32", 2**31], "kv_heads": [5, HUGE, False],
    "seqlen_q": [2**31, 10**12, float("inf")], "seqlen_k": [-5, 2**31, {}],
    "window_left": [-2, 2**31, None, 0.5], "window_right": ["0", True],
}  # fmt: skip
_RECORDS: dict[str, list[Any]] = {
    "problem": [None, [], "forward", {"batch": 1, 3: 4}],
    "family": ["", "Sm90", "../sm90", "sm90 forward", "a\nb", None, "a" * 65],
    "config": [None, [1], {"a": 1.5}, {"a": None}, {"a": HUGE}, {"a": "x\ny"}, {"a": 'x"'}, {"a;": 1}, {"a": {}}],
    "seconds": [0, -1, True, "1", None, float("nan"), float("inf"), HUGE, 1e-300, 1e12],
    "spread": [-1, None, float("nan"), HUGE, [1]],
    "default_seconds": [-1.0, float("inf"), "0", 1e-300],
    "error": [-1e-9, float("nan"), HUGE, None],
    "source_hash": ["", "xyz", "01D", 1, "0" * 65],
    "environment": [None, [], {"a": 1}, {"a b": "c"}, {"a": "line\nbreak"}, {"a": "x" * 501}, {"a": "\x1b[2J"},
                    {str(n): "" for n in range(65)}],
    "date": [None, 2026, "yesterday", "2026-13-01", "2026-01-01\n", "2026-02-30", "20260101"],
    "trials": [-1, 1.0, True, None, HUGE],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in _PROBLEMS.items() for v in vs])
def test_a_problem_is_checked_at_its_constructor(name: str, value: Any) -> None:
    changes = {name: value, **({"mask": "window"} if "window" in name else {})}
    with pytest.raises(InvalidArgument) as caught:
        dataclasses.replace(PROBLEM, **changes)
    assert len(str(caught.value)) < 400 and len(str(caught.value).splitlines()) <= 3
    with pytest.raises(DatabaseError):
        Record.from_dict("sm_90", "NVIDIA H200", content(**changes)["records"][0])


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in _RECORDS.items() for v in vs])
def test_a_record_is_checked_at_its_constructor(name: str, value: Any) -> None:
    with pytest.raises(DatabaseError) as caught:
        record(**{name: value})
    assert len(str(caught.value)) < 400 and len(str(caught.value).splitlines()) <= 3
    with pytest.raises(DatabaseError):
        Record.from_dict("sm_90", "NVIDIA H200", content(**{name: value})["records"][0])


@pytest.mark.parametrize("arch", ["../../outside", "/etc", "sm_90/..", "", "sm_", "sm_90x", "cpu\n", "sm_٩٠", None, 90])
def test_an_arch_names_no_other_folder(tmp_path: Path, arch: Any) -> None:
    with pytest.raises(DatabaseError):
        record(arch=arch)
    with pytest.raises(DatabaseError):
        store.path_of(tmp_path, arch, "NVIDIA H200")


@pytest.mark.parametrize("device", ["a\nb", "\x1b[2J", "x" * 201, "\u202eevil", "\ud800", 5, None])
def test_a_device_is_a_printable_name(tmp_path: Path, device: Any) -> None:
    with pytest.raises(DatabaseError):
        record(device=device)
    with pytest.raises(DatabaseError):
        store.path_of(tmp_path, "cpu", device)


@pytest.mark.parametrize("device", ["..", "../../x", "/etc/passwd", ".", "日本", "a" * 200])
def test_whatever_a_device_is_called_its_file_stays_in_the_folder(tmp_path: Path, device: str) -> None:
    (path,) = merge.put([record(device=device)], tmp_path)
    assert path.parent == tmp_path / "sm_90" and path.resolve().is_relative_to(tmp_path.resolve())
    assert Database.load([tmp_path]).records == [record(device=device)]


def test_this_machines_own_names_are_taken() -> None:
    from fagen.target import host

    record(arch="cpu", device=host().device, environment=environment(host()), date=db_record.now())


def test_merge_writes_nowhere_else(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    victim = tmp_path / "outside" / "nvidia-h200.json"
    victim.parent.mkdir()
    victim.write_text("theirs")
    for arch in ("../outside", str(victim.parent)):
        theirs = tmp_path / "theirs.json"
        theirs.write_text(json.dumps({**content(), "arch": arch}))
        assert main(["db", "merge", str(theirs)]) == 1
        assert "is damaged" in capsys.readouterr().err
    assert victim.read_text() == "theirs" and not folders[1].exists()


# ---- files ----------------------------------------------------------------------------------------------------------


def _deep(path: Path) -> None:
    path.write_text('{"schema": 1, "records": ' + "[" * 200_000)


def _large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(store.MOST_BYTES + 1)  # a hole


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _text(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


STRANGE: dict[str, Callable[[Path], Any]] = {
    "deep": _deep, "large": _large, "loop": _loop, "pipe": os.mkfifo, "folder": Path.mkdir,
    "dangling": lambda path: path.symlink_to("nowhere"), "device": lambda path: path.symlink_to("/dev/zero"),
    "empty": _text(""), "binary": lambda path: path.write_bytes(bytes(range(256))), "digits": _text("9" * 10_000),
    "no head": _text('{"schema": 1}'), "odd schema": _text('{"schema": true, "records": []}'),
    "arch": _text(json.dumps({**content(), "arch": "../x"})),
    "device name": _text(json.dumps({**content(), "device": 1})),
    "records": _text(json.dumps({**content(), "records": {}})),
    "rows": _text(json.dumps({**content(), "records": [HUGE, 1]})),
    "key twice": _text(json.dumps(content()).replace('"seconds"', '"seconds": 1.0, "seconds"')),
    "head twice": _text(json.dumps(content()).replace('"schema"', '"schema": 1, "schema"')),
}  # fmt: skip
STRANGE |= {
    f"{name}={schema.shown(value)}": _text(json.dumps(content(**{name: value})))
    for name, value in [("batch", float("nan")), ("batch", HUGE), ("date", None), ("environment", [1]),
                        ("seconds", "1"), ("seconds", float("inf")), ("aligned", INJECTED), ("config", {"a": []})]
}  # fmt: skip


@pytest.fixture(params=STRANGE, ids=str)
def strange(request: pytest.FixtureRequest, folders: tuple[Path, Path]) -> Path:
    """A file in the overlay of which nothing can be used, where this device's winners go."""
    path = store.path_of(folders[1], "sm_90", "NVIDIA H200")
    path.parent.mkdir(parents=True)
    STRANGE[request.param](path)
    return path


def test_a_strange_file_breaks_no_call(folders: tuple[Path, Path], strange: Path) -> None:
    merge.put([record(date="2026-01-01")], folders[0])
    database = Database.load()
    assert database.records == [record(date="2026-01-01")]
    assert database.warnings and all(str(strange) in text and len(text) < 800 for text in database.warnings)
    assert choose.choose(PROBLEM, GPU, stale="trust").provenance == "exact"
    assert any(str(strange) in reason for reason in explanation.explain_problem(PROBLEM, GPU).choice.reasons)


def test_a_strange_file_breaks_no_command(strange: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def state() -> tuple[int, ...]:
        now = os.lstat(strange)
        return now.st_ino, now.st_mode, now.st_size, now.st_mtime_ns

    before = state()
    where = ["--target", "sm_90", "--mask", "causal"]
    for words, codes in (
        (["db", "list"], [0]), (["db", "show", "d128"], [1]), (["db", "why", *where], [0]), (["explain", *where], [0]),
        (["db", "export"], [0]), (["db", "export", "--format", "csv"], [0]), (["db", "export", "--format", "t4"], [0]),
        (["db", "validate"], [1]), (["db", "prune", "--yes"], [0, 1]), (["db", "diff", "yours", "shipped"], [0]),
        (["db", "merge", str(strange), "--out", str(tmp_path / "out")], [0, 1, 2]),
    ):  # fmt: skip
        assert main(words) in codes, words
        said = capsys.readouterr().err
        assert "unexpected" not in said, said
        assert "explain" in words or str(strange) in said or len(codes) > 1
    assert state() == before, "nothing was written over it"


def test_a_winner_is_not_lost_to_a_strange_file(folders: tuple[Path, Path], strange: Path) -> None:
    """As at the end of a search; what was there is kept beside it, whatever it is."""
    before = os.lstat(strange)
    merge.require_writable(folders[1], "sm_90", "NVIDIA H200")  # as at its begin
    for turn in (1, 2):
        assert merge.put([record(trials=turn)]) == [strange]
        assert Database.load().records == [record(trials=turn)] and not Database.load().warnings
    (aside,) = strange.parent.glob("*.damaged-*")
    kept = os.lstat(aside)
    assert (kept.st_ino, stat.S_IFMT(kept.st_mode)) == (before.st_ino, stat.S_IFMT(before.st_mode))
    assert not list(strange.parent.glob(".*"))


def test_two_damaged_files_of_a_second_are_both_kept(folders: tuple[Path, Path]) -> None:
    path = store.path_of(folders[1], "sm_90", "NVIDIA H200")
    path.parent.mkdir(parents=True)
    for turn in ("first", "second", "third"):
        path.write_text(turn)
        merge.put([record()])
    assert {p.read_text() for p in path.parent.glob("*.damaged-*")} == {"first", "second", "third"}


def test_a_file_whose_folder_is_called_newer_fagen_is_damaged_like_others(tmp_path: Path) -> None:
    path = store.path_of(tmp_path / "newer fagen", "sm_90", "NVIDIA H200")
    path.parent.mkdir(parents=True)
    path.write_text("garbage")
    assert merge.put([record()], tmp_path / "newer fagen") == [path]


@pytest.mark.parametrize("make", ["pipe", "folder", "device"])
def test_only_regular_files_are_read(tmp_path: Path, make: str) -> None:
    STRANGE[make](tmp_path / "it.json")
    with pytest.raises(DatabaseError, match="is no regular file"):
        store.read_file(tmp_path / "it.json")


def test_a_search_that_could_not_keep_its_winner_does_not_begin(tmp_path: Path) -> None:
    (path,) = merge.put([record(device="NVIDIA-H200")], tmp_path)
    with pytest.raises(DatabaseError, match="of another device"):
        merge.require_writable(tmp_path, "sm_90", "NVIDIA H200")
    path.write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(DatabaseError, match="newer fagen"):
        merge.require_writable(tmp_path, "sm_90", "NVIDIA H200")


def test_devices_that_share_a_file_name_are_refused_before_any_write(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="of another device"):
        merge.put([record(), record(device="NVIDIA-H200")], tmp_path)
    assert not store.files(tmp_path)


def test_odd_folders_hold_no_files(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "README.md").write_text("")
    (path,) = merge.put([record()], tmp_path)
    assert store.files(tmp_path) == [path]
    for folder in ("loop", "pipe", "README.md", "absent"):
        assert store.files(tmp_path / folder) == []


# ---- source ---------------------------------------------------------------------------------------------------------

HOSTILE = ["a\nint x;", "a\r\nint x;", "a\x0bb", "a\x85b", "a\u2028b", "\u202egnp", "ends in \\", "ends in \\  ",
           "ends in ??/", "*/ int x; /*", '"', "\ud800", "\x00", "日本 ok"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_comment_holds_any_text(text: str, tmp_path: Path) -> None:
    spec = KernelSpec(FAMILY, PROBLEM, GPU, FAMILY.default(PROBLEM, GPU))
    manifest = emit.write(spec, f"tuned on {text}", tmp_path, example=True)
    written = (tmp_path / emit.source_name(spec)).read_bytes().decode("utf-8")
    banner, _, rest = written.partition("\n\n")
    assert rest == spec.source
    assert re.fullmatch(r"(//[^\n]*\n)*//[^\n]*", banner) and len(banner.splitlines()) == banner.count("\n") + 1
    assert all(c.isprintable() for c in banner.replace("\n", ""))
    for lines in (banner, emit._comment([text, f"tuned on {text}"])):
        assert not re.search(r"(\\|\?\?/)\s*$", lines, re.MULTILINE), "the next line would be of the comment, too"
    assert json.loads((tmp_path / emit.MANIFEST).read_text())["provenance"] == manifest["provenance"]


# ---- anything at all ------------------------------------------------------------------------------------------------

_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
    | st.sampled_from([HUGE, -HUGE, 2**31, 2**31 - 1, "", "0", "sm90_forward", *HOSTILE, INJECTED])
)  # fmt: skip
_JSON = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)
_FIELDS = [f.name for f in dataclasses.fields(Problem)]
_ROW = [f.name for f in dataclasses.fields(Record) if f.name not in ("arch", "device")]
_CHANGES = st.dictionaries(st.sampled_from(["arch", "device", *_FIELDS, *_ROW, "more", *CONFIG]), _JSON, max_size=3)


TEMPLATES = "".join(p.read_text() for p in env.data_dir("templates").rglob("*") if p.is_file())


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [s for pair in value.items() for item in pair for s in _strings(item)]
    return (
        [s for item in value for s in _strings(item)] if isinstance(value, list) else [value] * isinstance(value, str)
    )


@settings(deadline=None, max_examples=150)
@given(_CHANGES)
def test_any_json_is_a_record_or_an_error_of_ours(changes: dict[str, Any]) -> None:
    arch, device = (changes.get(name, value) for name, value in (("arch", "sm_90"), ("device", "NVIDIA H200")))
    row = record().to_dict()
    for name, value in changes.items():
        inside = row["problem"] if name in _FIELDS and isinstance(row["problem"], dict) else row
        inside = row["config"] if name in CONFIG and isinstance(row["config"], dict) else inside
        if name not in ("arch", "device"):
            inside[name] = value
    try:
        found = Record.from_dict(arch, device, row)
    except DatabaseError:
        return
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    assert audit.state(found)[0] in ("current", "stale", "illegal")
    forward.OP.distance(PROBLEM, found.problem, 132), found.problem.flops(), found.problem.bytes(), found.speedup
    try:
        target = audit.target_of(found)
        family = families.get(found.family)
        text = KernelSpec(
            family, found.problem, target, family.require(found.problem, target, family.config(found.config))
        ).source
    except FagenError:
        return
    code = re.sub(r"//[^\n]*", "", text)
    for line in re.findall(r".*\bstatic constexpr .*", code[: code.index("struct Derived")]):
        assert re.fullmatch(r"\s*static constexpr \w+ k\w+ = [\w:-]+;\s*", line), line
    for word in _strings(changes):
        assert word in TEMPLATES or re.fullmatch(r"\w+", word, re.ASCII) or word not in code
