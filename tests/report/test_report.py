"""The page about a run: its figures, what it makes of runs that went wrong, and how it looks and acts in a browser."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import html.parser
import itertools
import json
import random
import re

import pytest

from fagen import env, families
from fagen.build import toolchain
from fagen.cli.main import main
from fagen.families import cpu_forward
from fagen.families.space import enumerate_space
from fagen.ops.attention.inputs import input_bytes
from fagen.ops.attention.problem import INTERVAL_KINDS, Problem
from fagen.report import charts, facts, knobs, limits, load, page, roofs
from fagen.target import Target
from fagen.tuner import final_round, journal
from fagen.tuner.messages import OUTCOMES
from fagen.tuner.result import Tuned
from fagen.tuner.search import Search, open_storage
from tests.support import browser

FAMILY = cpu_forward.FAMILY
HOST = Target("cpu", "Test CPU", 4, simd="avx2")
PROBLEM = Problem(dtype="fp32", head_dim=64, mask="causal", heads=4, seqlen_q=512)
BEGUN = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)
# The first knob decides nearly everything, the others nothing.
FIRST = FAMILY.knobs[0]


@pytest.fixture(scope="module")
def configs():
    legal = enumerate_space(FAMILY, PROBLEM, HOST).legal
    return [dict(config) for config in random.Random(0).sample(legal, len(legal))]


def seconds_of(config: dict, chance: random.Random) -> float:
    return 1e-3 * (1 + 0.3 * FIRST.choices.index(config[FIRST.name])) * (1 + 0.01 * chance.random())


def trial(number: int, config: dict, seconds: float | None, outcome: str = "ok", **more) -> dict:
    when = BEGUN + datetime.timedelta(seconds=2 * number)
    built = outcome not in ("constraint", "compile")
    return {
        "problem": PROBLEM.key, "family": FAMILY.name, "config": config, "outcome": outcome,
        "reason": "" if outcome == "ok" else f"it is a {outcome}: number {number}", "seconds": seconds,
        "spread": 1e-5 if seconds else None, "samples": 30 if seconds else 0, "error": 1e-6,
        "facts": {"compile_seconds": 1.5, "registers": 128} if built else {}, "source_hash": "abc" if built else "",
        "date": when.isoformat(), **more,
    }  # fmt: skip


def trials(configs: list[dict], count: int = 60) -> list[dict]:
    """Every fifth fails, by turns in each way that there is."""
    chance, found = random.Random(1), []
    for number in range(count):
        bad = number % 5 == 4
        outcome = OUTCOMES[1:][number // 5 % len(OUTCOMES[1:])] if bad else "ok"
        config = configs[number % len(configs)]
        found.append(trial(number, config, None if bad else seconds_of(config, chance), outcome))
    return found


def winner(rows: list[dict], **changes) -> dict:
    timed = sorted((row for row in rows if row["seconds"]), key=lambda row: row["seconds"])
    default = timed[len(timed) // 2]
    made = Tuned(
        PROBLEM.to_dict(), True, {}, FAMILY.name, timed[0]["config"], timed[0]["seconds"], 1e-5, 1e-6,
        default_config=default["config"], default_seconds=default["seconds"], torch_seconds=3e-3,
        torch_mode="is_causal", why="the fastest",
    )  # fmt: skip
    return {**dataclasses.asdict(made), **changes}


META = {
    "fingerprint": "f00d", "problems": [PROBLEM.to_dict()], "target": dataclasses.asdict(HOST),
    "environment": {"fagen": "0.1.0", "torch": "2.13.0"}, "seed": 7, "date": BEGUN.isoformat(),
}  # fmt: skip


def keep(folder, rows, winners=(), **meta):
    """A run's folder, written by the tuner's own hand."""
    run = journal.Run.create(folder, "test", {**META, **meta})
    for row in winners:
        run.append(journal.WINNERS, row)
    run.close()
    (run.path / journal.TRIALS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run.path


@pytest.fixture
def whole(tmp_path, configs):
    rows = trials(configs)
    return keep(tmp_path, rows, [winner(rows)])


class Parsed(html.parser.HTMLParser):
    """Tags, what they lead to, and the data that the script reads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.leads: list[str] = []
        self.data, self._inside = "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.leads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        self._inside = tag == "script" and found.get("id") == "data"

    def handle_data(self, data):
        self.data += data if self._inside else ""

    def handle_endtag(self, tag):
        self._inside = False


def made(path) -> tuple[dict, str]:
    found = facts.of_run(path)
    return found, page.render(found)


# ---- figures --------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_run(whole, configs):
    found, _ = made(whole)
    rows = trials(configs)
    (problem,) = found["problems"]
    ended = {o: sum(row["outcome"] == o for row in rows) for o in OUTCOMES}
    assert problem["outcomes"] == {o: count for o, count in ended.items() if count}
    gates = {stage["gate"]: stage["count"] for stage in problem["funnel"]}
    assert gates["tried"] == 60
    assert gates["legal"] == 60 - ended["constraint"]
    assert gates["compiled"] == gates["legal"] - ended["compile"] - ended["spill"]
    assert gates["right"] == gates["timed"] == ended["ok"]
    assert sum(sum(stage["lost"].values()) for stage in problem["funnel"]) == 60 - ended["ok"]

    best, default = problem["winner"]["seconds"], problem["default"]
    times = {entry["name"]: entry for entry in problem["times"]}
    assert list(times) == ["winner", "default", "PyTorch"]
    assert problem["over_default"] == times["default"]["seconds"] / best > 1
    assert problem["over_torch"] == pytest.approx(3e-3 / best)
    assert times["default"]["spread"] == 1e-5  # from the search: the final round keeps the winner's alone
    assert times["winner"]["tflops"] == pytest.approx(PROBLEM.flops() / best / 1e12)
    assert times["winner"]["gbs"] == pytest.approx(input_bytes(PROBLEM) / best / 1e9)
    assert problem["winner"]["facts"]["registers"] == 128
    assert set(default) == {knob.name for knob in FAMILY.knobs}
    assert found["state"] == "complete"
    assert found["seconds"] == 2 * 59
    assert found["summary"]["over_default"] == pytest.approx(problem["over_default"])


def test_legal_candidates_are_numbered_and_illegal_ones_lie_between(configs):
    rows = [trial(i, configs[i], 1e-3, "constraint" if i in (1, 2, 5) else "ok") for i in range(6)]
    (own,) = load.by_problem([], rows).values()
    assert [t["n"] for t in own] == [1, None, None, 2, 3, None]
    assert [t["at"] for t in own] == [1, 1.333, 1.667, 2, 3, 3.5]


def test_a_pause_is_no_work(configs, tmp_path):
    rows = trials(configs, 20)
    later = BEGUN + datetime.timedelta(hours=9)
    for number, row in enumerate(rows[10:]):
        row["date"] = (later + datetime.timedelta(seconds=number)).isoformat()
    found, text = made(keep(tmp_path, rows))
    assert found["seconds"] == 2 * 9 + 9
    assert found["pauses"] == [9 * 3600 - 2 * 9]
    assert "resumed after 8 h 59 min" in text
    assert "2 sittings" in text


def test_the_last_word_on_a_problem_counts(configs, tmp_path):
    rows = trials(configs)
    before = winner(rows, complete=False, seconds=9e-3)
    assert facts.of_run(keep(tmp_path, rows, [before]))["state"] == "unfinished"
    found = facts.of_run(keep(tmp_path, rows, [before, winner(rows)]))
    assert found["state"] == "complete"
    assert found["problems"][0]["winner"]["seconds"] < 2e-3


def test_other_peers_are_shown_where_they_were_recorded(configs, tmp_path):
    rows = trials(configs)
    won = winner(rows, fa3_seconds=4e-3, peers={"cudnn": {"seconds": 5e-3, "spread": 1e-4}, "mine": 6e-3})
    found, text = made(keep(tmp_path, rows, [won]))
    names = [entry["name"] for entry in found["problems"][0]["times"]]
    assert names == ["winner", "default", "PyTorch", "FlashAttention 3", "cuDNN", "mine"]
    assert "FlashAttention 3" in text


def test_the_roof_is_what_the_run_measured_else_the_data_sheet_else_unknown(configs, tmp_path):
    rows, work = trials(configs), limits.work(PROBLEM)
    assert work["intensity"] == pytest.approx(PROBLEM.flops() / input_bytes(PROBLEM))
    measured = facts.of_run(keep(tmp_path, rows, [winner(rows)], machine={"tflops": 2.0, "gbs": 10.0}))
    (problem,) = measured["problems"]
    assert (problem["bound"], problem["roof"]) == ("memory", pytest.approx(10 * work["intensity"] / 1e3))
    assert problem["of_roof"] == pytest.approx(problem["times"][0]["tflops"] / problem["roof"])
    sheet = limits.of_machine({"target": {"device": "NVIDIA H200"}})
    assert (sheet["tflops"], sheet["gbs"]) == (989, 4800)
    assert limits.bound_by(sheet, 1000) == "arithmetic"
    assert "data sheet" in sheet["source"]
    unknown, text = made(keep(tmp_path, rows, [winner(rows)]))
    assert unknown["problems"][0]["roof"] is None
    assert "No limit of this machine is known" in text


def boxes(picture: str) -> list[tuple[str, float, float, float, float]]:
    """The words of a picture that stand beside marks and lines, with the box each of them takes."""
    found = []
    for attributes, words in re.findall(r"<text ([^>]*)>([^<]*)</text>", picture):
        values = dict(re.findall(r'([\w-]+)="([^"]*)"', attributes))
        if values.get("class", "").split()[0] in ("note", "bar-value"):
            x, y, wide = float(values["x"]), float(values["y"]), 6.6 * len(words)
            left = x - wide if values.get("text-anchor") == "end" else x
            found.append((words, left, left + wide, y - 10, y + 3))
    return found


def drawn_limit(picture: str) -> list[tuple[float, float]]:
    """Points along the roof, a pixel apart; or along the line of the fastest."""
    path = re.search(r'<path d="([^"]*)" class="roof"', picture)
    if path:
        ends = [tuple(map(float, pair.split())) for pair in re.split("[ML]", path[1])[1:]]
    else:
        line = re.search(r'<line x1="([^"]*)" y1="([^"]*)" x2="([^"]*)" y2="([^"]*)" class="ref"', picture)
        ends = [(float(line[1]), float(line[2])), (float(line[3]), float(line[4]))]
    return [
        (x1 + (x2 - x1) * i / 500, y1 + (y2 - y1) * i / 500)
        for (x1, y1), (x2, y2) in itertools.pairwise(ends)
        for i in range(501)
    ]


@pytest.mark.parametrize("some", range(4))
def test_no_word_of_a_roofline_crosses_its_line_or_another(some):
    """At any intensity, from far under the roof to on it, with a roof or none."""
    for seed in range(some, 800, 4):
        draw = random.Random(seed)
        intensity = 10 ** draw.uniform(-1, 4)
        machine = {"tflops": 10 ** draw.uniform(-1.5, 3.4), "gbs": 10 ** draw.uniform(1, 4)}
        if some == 0:
            machine["gbs"] = None
        roof = min(machine["tflops"], (machine["gbs"] or 1e9) * intensity / 1e3)
        names = ("winner", "default", "PyTorch", "FlashAttention 3", "cuDNN", "incumbent")[: draw.randint(1, 6)]
        rates = [roof * 10 ** draw.uniform(-draw.choice((0.01, 0.5, 3)), 0) for _ in names]
        problem = {
            "work": {"intensity": intensity, "flops": 1e12}, "best": {"seconds": 1.0}, "trials": [],
            "times": [{"name": name, "tflops": rate} for name, rate in zip(names, rates, strict=True)],
        }  # fmt: skip
        picture = str(roofs.roofline([problem], machine, candidates=True))
        words = boxes(picture)
        assert len(words) == len(names) + 1
        limit = drawn_limit(picture)
        for word, left, right, top, bottom in words:
            assert not [(x, y) for x, y in limit if left < x < right and top < y < bottom], word
            assert left > 0
            assert right < roofs.WIDTH
            assert top > 0
            assert bottom < roofs.BOTTOM + 4
        for a, b in itertools.combinations(words, 2):
            apart = a[2] <= b[1] or b[2] <= a[1] or a[4] <= b[3] or b[4] <= a[3]
            assert apart, (a, b)


@pytest.mark.parametrize(
    ("throttle", "said"),
    [
        (["power", "heat"], "(power, heat 3)"),
        ("power", "(power 3)"),
        (True, "3 of 20 candidates, marked"),
        (4, "(4 3)"),
    ],
)
def test_throttling_is_said_whatever_its_form(configs, tmp_path, throttle, said):
    rows = [
        {**row, "device": {"clock_mhz": 1500 + i, "throttle": throttle if i < 3 else type(throttle)()}}
        for i, row in enumerate(trials(configs, 20))
    ]
    found, text = made(keep(tmp_path, rows))
    assert found["summary"]["throttled"] == found["problems"][0]["device"]["throttled"] == 3
    assert found["problems"][0]["device"]["ranges"]["clock_mhz"] == {"least": 1500, "median": 1509.5, "most": 1519}
    assert said in " ".join(text.split())
    assert "No throttling" in made(keep(tmp_path, [{**row, "device": {"power_w": 9}} for row in rows]))[1]


# ---- knobs ----------------------------------------------------------------------------------------------------------


def test_the_knob_that_decides_comes_first(configs, tmp_path):
    rows = trials(configs, 240)
    (part,) = facts.of_run(keep(tmp_path, rows))["problems"][0]["knobs"]
    first = part["knobs"][0]
    assert part["how"] == "PED-ANOVA"
    assert first["name"] == FIRST.name
    assert first["doc"] == FIRST.doc
    assert first["alone"] > 0.95
    assert sum(knob["importance"] for knob in part["knobs"]) == pytest.approx(1)
    assert all(knob["alone"] < 0.5 for knob in part["knobs"][1:])
    assert [value["value"] for value in first["values"]] == sorted(value["value"] for value in first["values"])
    assert sum(value["tried"] for value in first["values"]) == sum(row["outcome"] != "constraint" for row in rows)
    medians = [value["median"] for value in first["values"]]
    assert medians == sorted(medians)


def test_few_candidates_say_nothing_about_knobs(configs, tmp_path):
    found, text = made(keep(tmp_path, trials(configs, 8)))
    (part,) = found["problems"][0]["knobs"]
    assert all(knob["importance"] is None for knob in part["knobs"])
    assert "too few to tell" in text


def test_values_that_python_takes_for_equal_stay_apart():
    rows = [{"config": {"a": value}, "seconds": 1.0, "family": "", "outcome": "ok"} for value in (1, True, 0, False)]
    assert [repr(v["value"]) for v in knobs._values("a", rows)] == ["0", "1", "False", "True"]


def test_two_families_are_told_apart(configs, tmp_path):
    rows = trials(configs)
    for row in rows[40:]:
        row |= {"family": "gone_forward", "config": {"size": row["config"][FIRST.name], "shape": "round"}}
    found, text = made(keep(tmp_path, rows))
    assert [part["family"] for part in found["problems"][0]["knobs"]] == [FAMILY.name, "gone_forward"]
    assert "Which knobs mattered: gone_forward" in text


# ---- runs that are not as they should be ----------------------------------------------------------------------------


def test_nothing_but_failures(configs, tmp_path):
    rows = [trial(i, configs[i], None, OUTCOMES[1:][i % 6]) for i in range(30)]
    lost = winner(trials(configs), family="", config=None, seconds=None, why="no valid candidate: all failed")
    found, text = made(keep(tmp_path, rows, [lost]))
    assert found["state"] == "failed"
    assert "no valid candidate: all failed" in text
    assert "it is a wrong: number 3" in text
    assert [reason["count"] for reason in found["problems"][0]["reasons"]] == [5] * 6


def test_an_empty_run_and_one_without_a_word(tmp_path):
    assert "nothing was built or timed" in made(keep(tmp_path, []))[1]
    bare = tmp_path / "bare"
    bare.mkdir()
    for odd in ("{torn", "[" * 100_000):
        (bare / journal.META).write_text(odd)
        found, text = made(bare)
        assert found["problems"] == []
        assert "not recorded" in text


def test_rows_that_lack_keys_or_make_no_sense(configs, tmp_path):
    rows = [
        {"problem": PROBLEM.key, "outcome": "ok", "seconds": 1e-3},
        {"problem": PROBLEM.key, "outcome": "evaporated", "config": configs[0]},
        {"problem": PROBLEM.key, "config": configs[1], "seconds": 2e-3, "spread": float("nan"), "date": "yesterday"},
        {"problem": PROBLEM.key, "outcome": "ok", "seconds": -1, "config": None, "facts": 3, "device": []},
        {"problem": PROBLEM.key, "outcome": "ok", "seconds": float("inf"), "facts": {"registers": float("nan")}},
        {"problem": "not/a/key", "outcome": "ok", "seconds": 1e-3, "config": {"a": 1}},
        {"problem": PROBLEM.to_dict(), "outcome": "ok", "seconds": 3e-3},
        {"outcome": "ok"},
    ]
    path = keep(tmp_path, rows, [{"problem": "nonsense"}, {}])
    with open(path / journal.TRIALS, "a") as file:
        file.write('"a word"\n{"problem": "torn')
    found, text = made(path)
    assert [len(problem["trials"]) for problem in found["problems"]] == [6, 0, 1]
    assert found["summary"]["timed"] == 4
    json.dumps(found, allow_nan=False)
    json.loads(Parsed(text).data)


def test_words_from_a_compiler_stay_words(configs, tmp_path):
    rows = trials(configs)
    rows[4]["reason"] = "</script><script>alert(1)</script><img src=http://x.example/>"
    rows[0]["config"] = {**rows[0]["config"], "<b>odd</b>": "<i>"}
    found, text = made(keep(tmp_path, rows, [winner(rows)], environment={"torch": "<b>2"}))
    parsed = Parsed(text)
    assert parsed.tags.count("script") == 2
    assert not {"img", "i>"} & set(parsed.tags)
    points = json.loads(parsed.data)["sections"][0]["points"]
    assert points["4"][json.loads(parsed.data)["fields"].index("reason")] == rows[4]["reason"]
    assert found["environment"]["torch"] == "<b>2"


def test_the_page_leads_nowhere(whole):
    _, text = made(whole)
    leads = Parsed(text).leads
    assert all(lead.startswith("#") or lead == "data:," for lead in leads)
    assert not re.findall(r"url\(|@import", text)
    assert set(re.findall(r"https?://[^\"']*", text)) <= {"http://www.w3.org/2000/svg"}


def test_thousands_of_candidates_make_a_page_of_bounded_size(configs, tmp_path):
    rows = trials(configs, 8000)
    found, text = made(keep(tmp_path, rows))
    (problem,) = found["problems"]
    shown = charts.drawn(problem["trials"], page.MOST_POINTS)
    assert len(shown) == page.MOST_POINTS
    assert set(charts.improvements(problem["trials"])) <= set(shown)
    assert len(text) < 4 << 20
    assert "6,000 of 8,000 are drawn" in text


# ---- which run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "runs_dir", lambda: tmp_path / "runs")
    return tmp_path / "runs"


def test_the_latest_run_is_taken_and_a_name_is_enough(runs, configs, capsys):
    paths = [keep(runs, trials(configs, count)) for count in (5, 7)]
    assert main(["report"]) == 0
    assert (paths[1] / "report.html").is_file()
    assert main(["report", paths[0].name, "--out", str(runs / "first.html"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["run"] == paths[0].name
    assert "first.html" in err
    assert Parsed((runs / "first.html").read_text()).tags.count("section") == 2
    assert not list(runs.glob("**/*.part"))


def test_a_file_of_candidates_alone(tmp_path, configs):
    file = tmp_path / "recorded.jsonl"
    short = [{name: row[name] for name in ("problem", "outcome", "seconds", "config")} for row in trials(configs)]
    file.write_text("".join(json.dumps(row) + "\n" for row in short))
    assert main(["report", str(file)]) == 0
    text = (tmp_path / "recorded.html").read_text()
    assert "candidates alone" in text
    assert FIRST.doc in text  # the knobs tell whose they are
    gates = {stage["gate"]: stage["count"] for stage in facts.of_run(file)["problems"][0]["funnel"]}
    assert gates["compiled"] == gates["right"] + sum(row["outcome"] in ("wrong", "crash", "timeout") for row in short)
    assert "d64/causal" in text


def test_bad_input_is_named_and_changes_nothing(runs, configs, tmp_path, capsys):
    def complains(*words: str) -> str:
        assert main(["report", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) <= 3
        return err

    assert "no run to report on" in complains()
    path = keep(runs, trials(configs, 5))
    assert path.name in complains("nowhere")
    (tmp_path / "other").mkdir()
    assert "is no run of fagen tune" in complains(str(tmp_path / "other"))
    (tmp_path / "other" / "words.txt").write_text("some words\n")
    assert "holds no candidates" in complains(str(tmp_path / "other" / "words.txt"))
    assert "cannot be written" in complains(path.name, "--out", str(tmp_path / "none" / "page.html"))
    (path / journal.META).write_text(json.dumps({"schema": 99}))
    assert "another version" in complains(path.name)
    assert sorted(p.name for p in path.iterdir()) == [".lock", journal.META, journal.TRIALS]


def test_a_key_says_what_its_problem_is():
    for problem in (
        PROBLEM,
        Problem(head_dim=192, head_dim_v=128, softcap=True, alibi=True, heads=8, kv_heads=2, seqlen_k=77),
        Problem(mask="window", window_left=1024, window_right=0, aligned=False, batch=3),
        Problem(mask="window", window_right=5),
        Problem(dtype="fp32", mask="causal", dropout=True, tf32=True, aligned=False),
        *(Problem(mask="intervals", intervals=kind) for kind in INTERVAL_KINDS),
    ):
        assert load.problem_of(problem.key) == problem


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_a_run_of_the_tuner(runs, tmp_path, capsys, monkeypatch):
    """From the search to the page, and the study in the run's folder as Optuna reads it."""
    import optuna

    monkeypatch.setattr(final_round, "SECONDS", 0.3)

    words = "--target cpu --dtype fp32 --head-dim 32 --mask causal --seqlen 64 --heads 2 --trials 2 --workers 1"
    assert main(["tune", *words.split(), "--out", str(tmp_path / "db"), "--json"]) == 0
    (won,) = json.loads(capsys.readouterr().out)["results"]
    assert main(["report", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (problem,) = found["problems"]
    assert found["state"] == "complete"
    assert problem["key"] == won["key"]
    assert problem["winner"]["config"] == won["config"]
    assert problem["over_default"] == pytest.approx(won["speedup"])
    assert [t["n"] for t in problem["trials"] if t["n"]] == [1, 2]
    (run,) = runs.iterdir()
    text = (run / "report.html").read_text()
    assert charts.milliseconds(won["seconds"]) in text
    assert found["environment"]["torch"] in text

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(run / journal.STUDY)))
    (study,) = optuna.get_all_study_summaries(storage)
    assert study.study_name.endswith(won["key"])
    assert study.best_trial.value == min(t["seconds"] for t in problem["trials"] if t["seconds"])


# ---- Optuna's own tools ---------------------------------------------------------------------------------------------


def test_optuna_opens_the_study_of_a_run(tmp_path):
    """As its dashboard does, by the file's path; the trials are those of the search."""
    import optuna

    space = enumerate_space(FAMILY, PROBLEM, HOST)
    path, chance = tmp_path / journal.STUDY, random.Random(2)
    search = Search(space, open_storage(str(path)), seed=0, first=[], limit=20, exhaustive=False)
    told: dict = {}
    search.known(space.legal[0], 5e-3)  # as after --resume
    while (config := search.next()) is not None:
        told[config] = None if len(told) % 4 == 3 else seconds_of(config, chance)
        search.tell(config, told[config], "wrong: on purpose")

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    (name,) = optuna.study.get_all_study_names(storage)
    assert name == f"{FAMILY.name}:{PROBLEM.key}"
    study = optuna.load_study(study_name=name, storage=storage)
    complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    pruned = [t for t in study.trials if t.state == optuna.trial.TrialState.PRUNED]
    values = {families.Config(t.params): t.value for t in complete}
    assert values == {space.legal[0]: 5e-3, **{config: s for config, s in told.items() if s}}
    assert {t.user_attrs["reason"] for t in pruned} >= {"wrong: on purpose"}
    assert study.best_value == min(s for s in told.values() if s)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    binary = browser.path()
    if binary is None:
        pytest.skip(f"no browser to look at the page with; one of {', '.join(browser.NAMES)} (apt install chromium)")
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(browser.browse(binary, tmp_path_factory.mktemp("profile")))
        except browser.DoesNotStart as error:
            pytest.skip(str(error))
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory, configs):
    """A page of each kind of run."""
    folder, rows = tmp_path_factory.mktemp("pages"), trials(configs)
    second = PROBLEM.replace(seqlen_q=1024, seqlen_k=1024)
    more = [{**row, "problem": second.key, "seconds": row["seconds"] and 4 * row["seconds"]} for row in rows]
    state = {"power_w": 600.5, "temp_c": 60}
    hot = [
        {**row, "device": {**state, "clock_mhz": 1500 - i, "throttle": "power" if i > 50 else ""}}
        for i, row in enumerate(rows)
    ]
    kinds = {
        "whole": keep(folder, rows, [winner(rows)]),
        "two": keep(folder, [*rows, *more], [winner(rows)], problems=[PROBLEM.to_dict(), second.to_dict()]),
        "hot": keep(folder, hot, [winner(rows)], machine={"tflops": 2.0, "gbs": 20.0}),
        "failures": keep(folder, [row for row in rows if not row["seconds"]]),
        "empty": keep(folder, []),
        "many": keep(folder, trials(configs, 5000)),
    }
    for kind, path in kinds.items():
        (folder / f"{kind}.html").write_text(made(path)[1])
    return folder


VISIBLE = "[...document.querySelectorAll('.search svg')].find(svg => svg.getBoundingClientRect().width)"
TIP = "document.getElementById('tip')"


def place(tab, mark: str) -> tuple[float, float]:
    """Where the middle of a mark of the visible picture is on the screen."""
    return tab.run(
        f"(() => {{ const svg = {VISIBLE}; svg.scrollIntoView({{block: 'center'}});"
        f" const b = svg.querySelector('{mark}').getBoundingClientRect();"
        " return [b.x + b.width / 2, b.y + b.height / 2] })()"
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["whole", "two", "hot", "failures", "empty"])
def test_a_page_is_drawn_without_a_complaint(tab, pages, kind, width, dark):
    tab.problems.clear()
    tab.view(width, dark=dark)
    tab.open(pages / f"{kind}.html")
    assert tab.problems == []
    assert tab.requests == []
    assert tab.run("document.documentElement.scrollWidth") <= width
    ink, paper = (
        sum(map(int, re.findall(r"\d+", tab.run(f"getComputedStyle(document.documentElement).{name}"))[:3]))
        for name in ("color", "backgroundColor")
    )
    assert (ink > 600 and paper < 120) if dark else (ink < 200 and paper > 700)
    outside = """[...document.querySelectorAll('figure svg text')].filter(text => {
        const own = text.getBoundingClientRect(), svg = text.ownerSVGElement.getBoundingClientRect();
        return own.width && (own.right > svg.right + 12 || own.left < svg.left - 12) }).map(text => text.textContent)"""
    assert tab.run(outside) == []


def test_every_candidate_is_drawn(tab, pages, configs):
    rows = trials(configs)
    timed = sum(row["outcome"] == "ok" for row in rows)
    tab.view(1280)
    tab.open(pages / "whole.html")
    count = f"[{VISIBLE}.querySelectorAll('circle[data-i]').length, {VISIBLE}.querySelectorAll('rect[data-i]').length]"
    assert tab.run(count) == [timed, 60 - timed]
    before = tab.run(f"{VISIBLE}.getAttribute('aria-label')")
    assert before.startswith(f"60 candidates in order, {timed} timed")
    tab.run("document.querySelector('.by-t').click()")
    assert tab.run(count) == [timed, 60 - timed]
    assert "of work" in tab.run(f"{VISIBLE}.textContent")
    assert tab.run("document.querySelectorAll('svg:not([aria-label])').length") == 0
    assert tab.run("document.querySelectorAll('svg.slice').length") == min(6, len(FAMILY.knobs))


def test_thousands_are_drawn_up_to_the_bound(tab, pages):
    tab.problems.clear()
    tab.view(1280)
    tab.open(pages / "many.html")
    assert tab.run(f"{VISIBLE}.querySelectorAll('[data-i]').length") == 5000
    assert tab.problems == []


def test_a_point_says_what_it_is(tab, pages, configs):
    rows = trials(configs)
    tab.problems.clear()
    tab.view(1280)
    tab.open(pages / "whole.html")
    assert tab.run(f"{TIP}.hidden")
    number = 7
    tab.mouse("mouseMoved", *place(tab, f'circle[data-i="{number}"]'))
    said = tab.run(f"{TIP}.innerText")
    assert not tab.run(f"{TIP}.hidden")
    assert f"{rows[number]['seconds'] * 1e3:.4g} ms" in said
    for name, value in rows[number]["config"].items():
        assert re.search(rf"{name}\s+{value}\b", said), said
    assert "registers 128" in said
    marked = tab.run(
        "[...document.querySelectorAll('.ring')].map(ring => ring.ownerSVGElement.classList.contains('slice'))"
    )
    assert marked.count(False) == 2  # by order and by time
    assert marked.count(True) == min(6, len(FAMILY.knobs))  # the same candidate in the slices
    tab.mouse("mouseMoved", 3, 3)
    assert tab.run(f"{TIP}.hidden")
    assert tab.run("document.querySelectorAll('.ring').length") == 0

    failed = next(i for i, row in enumerate(rows) if row["outcome"] == "wrong")
    at = place(tab, f'rect[data-i="{failed}"]')
    tab.mouse("mouseMoved", *at)
    assert rows[failed]["reason"] in tab.run(f"{TIP}.innerText")
    for kind in ("mousePressed", "mouseReleased"):
        tab.mouse(kind, *at)
    tab.mouse("mouseMoved", 3, 3)
    assert not tab.run(f"{TIP}.hidden"), "a click holds it"
    tab.key("Escape")
    assert tab.run(f"{TIP}.hidden")
    assert tab.problems == []


def test_the_keyboard_walks_through_the_points(tab, pages, configs):
    rows = trials(configs)
    tab.view(1280)
    tab.open(pages / "whole.html")
    tab.run(f"{VISIBLE}.focus()")
    tab.key("ArrowRight")
    assert f"{rows[0]['seconds'] * 1e3:.4g} ms" in tab.run(f"{TIP}.innerText")
    tab.key("ArrowRight")
    assert f"{rows[1]['seconds'] * 1e3:.4g} ms" in tab.run(f"{TIP}.innerText")
    assert tab.run("document.querySelectorAll('.ring').length") > 0
    tab.key("Escape")
    assert tab.run(f"{TIP}.hidden")


def test_a_name_leads_to_its_problem(tab, pages):
    tab.view(1280)
    tab.open(pages / "two.html")
    links = "[...document.querySelectorAll('a')].map(a => a.getAttribute('href').slice(1))"
    wanted = tab.run(links)
    assert sorted(set(wanted)) == ["problem-1", "problem-2"]
    assert tab.run(f"{links}.every(id => document.getElementById(id))")
    dots = tab.run("document.querySelectorAll('figure.wide:not(.search) .dot').length")
    assert dots == 3 + 1  # winner, default and PyTorch of the first; the second's search did not end


def test_on_paper_it_is_light_and_whole(tab, pages):
    tab.view(900, dark=True, media="print")
    tab.open(pages / "whole.html")
    assert tab.run("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("document.documentElement.scrollWidth") <= 900
    tab.view(1280)
