"""fagen db portfolio: the smallest set of configs, by what was measured alone, and the records that use it."""

from __future__ import annotations

import itertools
import json
import lzma
import random
from pathlib import Path

import pytest

from fagen import families, target
from fagen.cli.main import main
from fagen.db import merge, store
from fagen.db.record import Record
from fagen.families import Config
from fagen.ops.attention.problem import Problem
from fagen.tuner import portfolio
from fagen.tuner.portfolio import UNVERIFIED, Times

ROOT = Path(__file__).parents[2]
FAMILY, H200 = families.get("sm90_forward"), target.known("sm_90")
PLACE = ("sm_90", "nvidia-h200", "forward/bf16/d128/causal")
BASE = FAMILY.default(Problem(mask="causal"), H200)


def problem(length: int) -> Problem:
    return Problem(mask="causal", heads=32, kv_heads=8, seqlen_q=length)


def config(tile_n: int) -> Config:
    made = BASE.replace(tile_n=tile_n)
    assert not FAMILY.rejects(problem(1024), H200, made)
    return made


def kernel(tile_n: int) -> portfolio.Kernel:
    return FAMILY.name, config(tile_n)


def record(length: int, tile_n: int, seconds: float = 1e-3, **changes: object) -> Record:
    fields: dict = {
        "problem": problem(length), "arch": "sm_90", "device": "NVIDIA H200", "family": FAMILY.name,
        "config": dict(config(tile_n)), "seconds": seconds, "spread": 1e-6, "default_seconds": 2e-3, "error": 1e-3,
        "source_hash": f"{tile_n:016x}", "date": "2026-01-01",
    }  # fmt: skip
    return Record(**fields | changes)


def times(length: int, **seconds: float) -> Times:
    """t96=1.0: the config with tile_n 96 took 1.0 there."""
    return Times(problem(length), {kernel(int(name[1:])): value for name, value in seconds.items()})


def size(length: int) -> str:
    return problem(length).size_key


# ---- ratios -------------------------------------------------------------------------------------------------------


def test_a_ratio_is_of_one_run_and_to_the_winner() -> None:
    records = [record(512, 96), record(1024, 112)]
    sources = [
        times(512, t96=2.0, t112=2.02, t128=1.9),  # of another day: the winner is the recorded one all the same
        times(512, t96=1.0, t112=1.03),
        times(1024, t96=1.0, t128=1.0),  # without the winner: not to be compared
        times(2048, t96=1.0),  # no recorded size
    ]
    known = portfolio.ratios(records, sources)
    assert known == {
        size(512): {kernel(96): 1.0, kernel(112): pytest.approx(1.03), kernel(128): pytest.approx(0.95)},
        size(1024): {kernel(112): 1.0},
    }
    assert next(iter(known[size(512)])) == kernel(96)


def test_without_records_the_fastest_of_a_source_wins() -> None:
    known = portfolio.ratios([], [times(512, t96=1.0, t112=0.5)])
    assert known == {size(512): {kernel(112): 1.0, kernel(96): 2.0}}


def test_of_several_families_the_fastest_wins_and_unknown_configs_count_for_nothing() -> None:
    records = [record(512, 96, 2e-3), record(512, 112, 1e-3, config={"colour": 1}), record(512, 128, 3e-3)]
    assert portfolio.ratios(records, []) == {size(512): {kernel(96): 1.0}}


# ---- the set ------------------------------------------------------------------------------------------------------


def test_one_kernel_that_is_good_enough_replaces_three() -> None:
    records = [record(n, t) for n, t in ((512, 96), (1024, 112), (2048, 128))]
    sources = [
        times(512, t96=1.0, t112=1.009), times(1024, t112=1.0, t96=1.2), times(2048, t128=1.0, t112=1.0099, t96=1.011),
    ]  # fmt: skip
    known = portfolio.ratios(records, sources)
    found = portfolio.choose(PLACE, known, 0.01)
    assert found.chosen == (kernel(112),) and found.exact
    assert found.serves[size(2048)] == (kernel(112), pytest.approx(1.0099))
    assert len(portfolio.choose(PLACE, known, 0.005).chosen) == 3


def test_what_was_not_measured_is_not_covered() -> None:
    records = [record(512, 96), record(1024, 112)]
    assert len(portfolio.choose(PLACE, portfolio.ratios(records, []), 1.0).chosen) == 2


def test_greed_is_mended() -> None:
    """The kernel that covers most sizes is not in the smallest set."""
    a, b = [f"a{i}" for i in range(4)], [f"b{i}" for i in range(4)]
    covers = {96: a[:3] + b[:2], 112: a, 128: b, 80: [a[3]], 64: b[2:]}
    known = {s: {kernel(n): 1.0 for n, sizes in covers.items() if s in sizes} for s in a + b}
    assert len(portfolio._greedy({kernel(n): frozenset(s) for n, s in covers.items()}, known)) == 3
    found = portfolio.choose(PLACE, known, 0.01)
    assert set(found.chosen) == {kernel(112), kernel(128)} and found.exact


@pytest.mark.parametrize("seed", range(25))
def test_no_smaller_set_does(seed: int) -> None:
    """Beside every set there is."""
    draw = random.Random(seed)
    kernels = [kernel(n) for n in (48, 64, 80, 96, 112, 128)]
    known = {}
    for n in range(draw.randint(1, 8)):
        winner = draw.choice(kernels)
        others = {k: 1 + draw.choice([0.0, 0.004, 0.009, 0.02, 0.3]) for k in kernels if draw.random() < 0.7}
        known[f"size {n}"] = {winner: 1.0, **{k: v for k, v in others.items() if k != winner}}
    found = portfolio.choose(PLACE, known, 0.01)
    assert all(ratio <= 1.01 for _, ratio in found.serves.values()) and found.exact
    sets = [
        (count, portfolio._cost(some, known))
        for count in range(1, 7) for some in itertools.combinations(kernels, count)
        if all(any(costs.get(k, 9) <= 1.01 for k in some) for costs in known.values())
    ]  # fmt: skip
    least, cost = min(sets)
    assert len(found.chosen) == least and portfolio._cost(found.chosen, known) == pytest.approx(cost)


def test_a_search_that_takes_too_long_leaves_the_greedy_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfolio, "_MOST_STEPS", 0)
    known = portfolio.ratios([record(512, 96), record(1024, 112)], [])
    found = portfolio.choose(PLACE, known, 0.01)
    assert len(found.chosen) == 2 and not found.exact


# ---- the command --------------------------------------------------------------------------------------------------


def space(path: Path, length: int, entries: dict[int, float]) -> Path:
    """A recorded space as fagen tune --record writes it."""
    knobs = [knob.name for knob in FAMILY.knobs]
    head = {
        "format": "fagen-space", "schema": 1, "key": problem(length).key, "family": FAMILY.name,
        "problem": problem(length).to_dict(), "legal": len(entries), "knobs": knobs,
        "target": {f: getattr(H200, f) for f in ("arch", "device", "units", "smem_per_block", "smem_per_unit", "l2")},
        "columns": ["outcome", "seconds", "spread", "compile_seconds", "measure_seconds"],
    }  # fmt: skip
    lines = [head]
    for tile_n, seconds in entries.items():
        wrong = seconds < 0
        row = ["wrong" if wrong else "ok", None if wrong else seconds, 1e-7, 1.0, 1.0]
        lines.append([*(config(tile_n)[k] for k in knobs), *row])  # type: ignore[arg-type]
    with lzma.open(path, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


@pytest.fixture
def database(tmp_path: Path) -> Path:
    other = [record(512, 96, device="NVIDIA H200", problem=problem(512).replace(mask="none", window_right=-1))]
    records = [record(512, 96), record(1024, 112), record(2048, 128), *other]
    (path,) = merge.put(records, tmp_path / "db")
    return path


def test_records_are_written_that_use_the_set(tmp_path: Path, database: Path, capsys: pytest.CaptureFixture) -> None:
    spaces = [
        space(tmp_path / "a.jsonl.xz", 512, {96: 1e-3, 112: 1.005e-3, 80: -1}),
        space(tmp_path / "b.jsonl.xz", 2048, {128: 2e-3, 112: 2.01e-3}),
    ]
    out, words = tmp_path / "out.json", ["db", "portfolio", "causal", "--from", str(database), "--json", "--times"]
    assert main([*words, *map(str, spaces), "--apply", "--out", str(out)]) == 0
    (told,) = json.loads(capsys.readouterr().out)["portfolios"]
    assert (told["winners"], len(told["kernels"]), told["exact"]) == (3, 1, True)
    before = {r.key: r for r in store.read_file(database)[0]}
    records, wrong = store.read_file(out)
    assert not wrong and len(records) == 4
    for one in records:
        old = before[one.key]
        if "causal" not in one.key or old.config == dict(config(112)):
            assert one == old
        else:
            assert one.config == dict(config(112)) and one.source_hash == f"{112:016x}"  # the same kernel as at 1024
            assert one.seconds == pytest.approx(old.seconds * 1.005) and one.date > old.date
    assert {r.problem.seqlen_q: r.source_hash for r in records if "causal" in r.key} == dict.fromkeys(
        (512, 1024, 2048), f"{112:016x}"
    )


def test_a_kernel_that_no_record_knows_is_to_be_verified() -> None:
    records = [record(512, 96), record(1024, 112)]
    sources = [times(512, t96=1.0, t80=1.0), times(1024, t112=1.0, t80=1.0)]
    found = portfolio.choose(PLACE, portfolio.ratios(records, sources), 0.01)
    assert {r.source_hash for r in portfolio.apply(found, records, sources)} == {UNVERIFIED}
    sources[0].facts[kernel(80)] = {"source_hash": "a" * 16, "error": 0.5}
    made = portfolio.apply(found, records, sources)
    assert {(r.source_hash, r.error) for r in made} == {("a" * 16, 0.5)}


def test_the_shipped_spaces_and_runs_can_be_read(capsys: pytest.CaptureFixture) -> None:
    bench = ROOT / "benchmarks"
    paths = [*sorted((bench / "spaces").glob("*.xz")), bench / "h200_run", bench / "h200_between.json"]
    found = portfolio.read(paths)
    causal = [t.problem.size_key for t in found["sm_90", "nvidia-h200", "forward/bf16/d128/causal"]]
    assert {"b1/h32-8/q8192-k8192", "b1/h32-8/q1024-k1024", "b1/h40-8/q12288-k12288"} <= set(causal)
    assert all(t.seconds for times in found.values() for t in times)
    shipped = str(ROOT / "tuning_db" / "sm_90" / "nvidia-h200.json")
    assert main(["db", "portfolio", "d128/causal", "--from", shipped, "--times", *map(str, paths)]) == 0
    assert "forward/bf16/d128/causal on sm_90 (nvidia-h200): " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--apply"], "go together"),
        (["nothing/like/it"], "no record and no time"),
        (["--times", "/nowhere"], "cannot be read"),
        (["--times", "odd.json"], "no times that can be read"),
        (["--times", "."], "is no run of fagen tune"),
    ],
)
def test_it_refuses(words: list[str], complaint: str, tmp_path: Path, database: Path, monkeypatch, capsys) -> None:
    (tmp_path / "odd.json").write_text('{"target": 7}')
    monkeypatch.chdir(tmp_path)
    assert main(["db", "portfolio", "--from", str(database), *words]) == 2
    assert complaint in capsys.readouterr().err


def test_a_file_that_is_no_database_is_not_touched(tmp_path: Path, database: Path, capsys) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text("precious")
    assert main(["db", "portfolio", "--from", str(database), "--apply", "--out", str(mine)]) == 1
    assert mine.read_text() == "precious" and "mine.json" in capsys.readouterr().err
    merge.put([record(512, 96, device="NVIDIA H100")], tmp_path / "other")
    (other,) = store.files(tmp_path / "other")
    before = other.read_bytes()
    assert main(["db", "portfolio", "--from", str(database), "--apply", "--out", str(other)]) == 1
    assert other.read_bytes() == before and "another device" in capsys.readouterr().err


def test_two_devices_do_not_go_into_one_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    merge.put([record(512, 96), record(512, 96, device="NVIDIA H100")], tmp_path / "db")
    words = ["db", "portfolio", "--from", str(tmp_path / "db"), "--apply", "--out", str(tmp_path / "x.json")]
    assert main(words) == 2 and "one file" in capsys.readouterr().err
