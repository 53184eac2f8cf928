"""The command line: quick help, exit codes, three-line errors, data on stdout, and problems from flags and files."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import types

import pytest

from fagen import errors, ops, target
from fagen.cli import arguments, main
from fagen.errors import FagenError, UsageError
from fagen.ops.attention import flags as flags_of
from fagen.ops.attention import parse
from fagen.ops.attention.problem import Problem
from fagen.target import known


def fagen(*words: str, **options):
    return subprocess.run([sys.executable, "-m", "fagen", *words], capture_output=True, text=True, **options)


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add_problem_flags(parser)
    return parser.parse_args(words)


# ---- help and errors ------------------------------------------------------------------------------------------------


def test_help_lists_every_verb():
    done = fagen("--help")
    assert done.returncode == 0
    for verb, text in main.VERBS.items():
        assert verb in done.stdout
        assert text in done.stdout


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in main.VERBS)], ids=" ".join)
def test_help_is_quick_since_it_imports_little(words):
    """Modules are counted, not seconds: 80 for the verbs' list, 150 for a verb."""
    most = 80 if len(words) == 1 else 150
    program = (
        "import sys\nbefore = len(sys.modules)\nfrom fagen.cli.main import main\n"
        f"try: code = main({words!r})\nexcept SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'optuna', 'jinja2', 'rich', 'numpy'} & set(sys.modules)\n"
        "count = len(sys.modules) - before\n"
        f"sys.exit(f'imported {{heavy}}, {{count}} modules' if heavy or count > {most} else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tuen"], "did you mean tune?"),
        (["emit", "--target", "sm_90"], "--out"),
        (["emit", "--target", "sm_1", "--out", "x"], "sm_1"),
        (["cache", "empty"], "empty"),
        (["explain", "--head-dim", "64", "--frobnicate"], "--frobnicate"),
        (["explain", "--target", "cpu", "--head-dim", "0"], "head_dim=0"),
        (["explain", "--target", "cpu", "--head-dim", "1100"], "head_dim=1100"),
        (["explain", "--target", "cpu", "--heads", "6", "--kv-heads", "4"], "heads=6 kv_heads=4"),
        (["explain", "--target", "sm_12"], "sm_80"),
        (["explain", "--target", "gpu:x"], "gpu:0"),
        (["explain", "--target", "cpu", "--problems", "/nonexistent.toml"], "/nonexistent.toml"),
        (["build", "--target", "cpu"], "nothing to build"),
        (["build", "--target", "cpu", "--jobs", "0", "--head-dim", "64"], "--jobs: '0' is no positive number"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_usage_is_two_with_at_most_three_lines(words, says):
    done = fagen(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
    assert "Traceback" not in done.stderr


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and those below it."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(deeper for action in below for child in action.choices.values() for deeper in parsers(child))]


@pytest.mark.parametrize("verb", main.VERBS)
def test_a_target_has_one_name(verb):
    """It is --target wherever one is named; --arch is its old name and shown nowhere."""
    for parser in parsers(main._parser(verb)):
        names = parser._option_string_actions
        assert ("--target" in names) == ("--arch" in names), parser.prog
        assert "--arch" not in parser.format_help()
        if "--target" in names:
            assert names["--arch"].dest == names["--target"].dest == "target"
            others = [action for action in parser._actions if action.required]
            words = [choice for action in others for choice in (*action.option_strings, "x")[-2:]]
            for flag in ("--target", "--arch"):
                assert parser.parse_args([*words, flag, "sm_80"]).target == "sm_80"
            assert parser.parse_args(words).target is None


def test_the_verbs_that_name_a_target():
    able = {verb for verb in main.VERBS for p in parsers(main._parser(verb)) if "--target" in p._option_string_actions}
    assert able == {"tune", "bench", "ablation", "explain", "build", "emit", "db"}


@pytest.mark.parametrize(
    ("name", "index"), [("gpu", 0), ("gpu:1", 1), ("cuda", 0), ("cuda:1", 1)], ids=lambda value: str(value)
)
def test_a_device_is_a_target(monkeypatch, name, index):
    monkeypatch.setattr("fagen.target.gpu", lambda number=0: known("sm_90") if number == index else None)
    assert arguments.target_from(name) == known("sm_90")
    with pytest.raises(errors.MissingTool, match="no GPU answers"):
        arguments.target_from("gpu:7")
    with pytest.raises(UsageError):
        arguments.target_from("cuda:x")


def test_no_verb_shows_help_and_is_wrong_usage():
    done = fagen()
    assert done.returncode == 2
    assert "usage: fagen" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FagenError("it failed"), 1),
        (UsageError("it is unclear"), 2),
        (errors.NoCandidate("nothing is legal"), 3),
        (errors.MissingTool("no nvcc", "looked on PATH", "install it"), 4),
        (KeyboardInterrupt(), 130),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 4),
        (ModuleNotFoundError("No module named 'fagen.lost'", name="fagen.lost"), 1),
        (ZeroDivisionError("a bug\nwith details"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def fail(args):
        raise error

    verb = types.SimpleNamespace(add=lambda subparsers: subparsers.add_parser("doctor"), run=fail)
    monkeypatch.setattr(main.importlib, "import_module", lambda name: verb)
    assert main.main(["doctor"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert 1 <= len(err.splitlines()) <= 3
    assert "Traceback" not in err
    if not isinstance(error, KeyboardInterrupt):
        with pytest.raises(type(error)):
            main.main(["doctor", "--debug"])


def test_version():
    import fagen as package

    assert fagen("--version").stdout.strip() == f"fagen {package.__version__}"


# ---- problems -------------------------------------------------------------------------------------------------------


def test_lists_multiply():
    problems = arguments.problems_from(
        flags("--head-dim", "64,192-128", "--mask", "none,causal", "--seqlen", "1k,4096")
    )
    assert len(problems) == 8
    assert {(p.head_dim, p.head_dim_v) for p in problems} == {(64, 64), (192, 128)}
    assert {p.seqlen_k for p in problems} == {1024, 4096}


def test_no_flag_is_no_problem():
    assert arguments.problems_from(flags()) == []
    assert arguments.one_problem(flags()) == arguments.expand({})[0]


def test_every_setting_reaches_the_problem():
    words = (
        "--dtype fp16 --head-dim 72-40 --window 128,0 --softcap --alibi --seqlen-q 5 --seqlen-k 2k --batch 3 --heads 8"
    )
    (problem,) = arguments.problems_from(flags(*words.split(), "--kv-heads", "2"))
    assert problem == Problem(
        dtype="fp16", head_dim=72, head_dim_v=40, mask="window", softcap=True, alibi=True, batch=3, heads=8,
        kv_heads=2, seqlen_q=5, seqlen_k=2048, window_left=128, window_right=0,
    )  # fmt: skip
    (problem,) = arguments.problems_from(flags("--interval-kind", "both2"))
    assert (problem.mask, problem.intervals) == ("intervals", "both2")


@pytest.mark.parametrize(
    "problem",
    [
        Problem(),
        Problem(dtype="fp16", head_dim=192, head_dim_v=128, mask="causal", batch=3, heads=8, kv_heads=2, seqlen_q=5),
        Problem(mask="window", window_left=128, window_right=-1, softcap=True, alibi=True, seqlen_q=7, seqlen_k=4096),
        Problem(mask="window", window_left=-1, window_right=-1),
        Problem(mask="intervals", intervals="both4"),
        Problem(mask="intervals", intervals="lower2", window_left=-1, window_right=0, aligned=False),
        Problem(dtype="bf16", head_dim=100, aligned=False),
        Problem(dtype="fp32", head_dim=2, head_dim_v=4, aligned=False),
        Problem(dtype="fp32", dropout=True, tf32=True),
    ],
    ids=lambda problem: problem.key.replace("/", "-"),
)
def test_a_problems_flags_give_it_back(problem):
    words = flags_of.of(problem)
    assert arguments.problems_from(flags(*words)) == [problem]
    command = ops.build_command(problem, "cpu")
    assert command.startswith("fagen build --dtype") and command.endswith("--target cpu")
    assert all(word in command for word in words)


def test_rows_that_are_not_whole_pieces_are_not_aligned():
    aligned = {p.head_dim: p.aligned for p in arguments.expand({"dtype": "bf16", "head_dim": "64,72,100"})}
    assert aligned == {64: True, 72: True, 100: False}


def test_the_default_dtype_is_the_targets():
    assert arguments.expand({}, known("cpu"))[0].dtype == "fp32"
    assert arguments.expand({}, known("sm_90"))[0].dtype == "bf16"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seqlen": "4x"}, "'4x'"),
        ({"seqlen": "0"}, "'0'"),
        ({"seqlen": "-1k"}, "'-1k'"),
        ({"head_dim": "128-"}, "'128-'"),
        ({"head_dim": "x"}, "'x'"),
        ({"mask": "diagonal"}, "diagonal"),
        ({"mask": "window"}, "--window"),
        ({"mask": "causal", "window": "3,0"}, "needs mask 'window' or 'intervals'"),
        ({"window": "3"}, "LEFT,RIGHT"),
        ({"window": "a,b"}, "LEFT,RIGHT"),
        ({"dtype": "fp8"}, "fp8"),
        ({"scale_block": 128}, "--scale-block needs op forward_fp8"),
        ({"seqlen": "1k", "seqlen_q": "1"}, "--seqlen excludes"),
        ({"colour": "red"}, "colour"),
        ({"interval_kind": "upper"}, "upper"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_understood(settings, says):
    with pytest.raises(UsageError) as caught:
        arguments.expand(settings)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("word", ["0", "-1", "1e12", "1000000000000", "2m1", "4 k", "3000m", "²", "٣", "9" * 5000, "k"])
def test_words_that_are_no_sizes(word):
    for setting in ("seqlen", "batch", "heads"):
        with pytest.raises(UsageError, match="is no size") as caught:
            arguments.expand({setting: word})
        assert len(str(caught.value)) < 300
    with pytest.raises(argparse.ArgumentTypeError):
        arguments.count(word)


def test_sizes():
    assert parse.sizes("4096,4k,1M, 2147483647") == [4096, 4096, 1 << 20, 2**31 - 1]


@pytest.mark.parametrize("value", ["false", "no", 1, 30.0, []])
def test_a_switch_of_a_file_is_a_bool(value):
    with pytest.raises(UsageError, match="softcap is true or false"):
        arguments.expand({"softcap": value})


@pytest.mark.parametrize("verb", ["tune", "bench"])
def test_a_problem_beyond_memory_is_refused_before_anything_runs(monkeypatch, capsys, verb):
    from fagen.build import cache

    monkeypatch.setattr("fagen.target.memory", lambda target, index=0: 1 << 30)
    monkeypatch.setattr(cache, "make", lambda *words, **named: pytest.fail("it compiled"))
    words = [verb, "--target", "cpu", "--dtype", "fp32", "--head-dim", "64", "--heads", "16", "--seqlen", "64k"]
    assert main.main(words) == 2
    said = capsys.readouterr().err
    assert "b1/h16-16/q65536-k65536 does not fit into memory" in said
    assert "its inputs and outputs take 1 GiB" in said and "has 1 GiB" in said


def test_an_example_beyond_memory_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("fagen.cli.commands.emit.memory", lambda target: 1 << 20)
    words = ["emit", "--arch", "cpu", "--dtype", "fp32", "--head-dim", "64", "--out", str(tmp_path), "--example"]
    assert main.main(words) == 0
    assert "the example's tensors take 0.0157 GiB, this machine has 0.000977 GiB" in capsys.readouterr().err


def test_this_machine_has_memory():
    assert target.memory(target.host()) > 1 << 28
    assert target.memory(known("sm_90")) >= 0


def test_problem_files_and_flags_say_the_same(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(
        '[[problem]]\ndtype = ["bf16", "fp16"]\nhead_dim = [64, "192-128"]\nmask = "causal"\nseqlen = "4k"\n\n'
        '[[problem]]\nwindow = "none,0"\nsoftcap = true\nseqlen = 100\n'
    )
    by_flags = arguments.problems_from(
        flags("--dtype", "bf16,fp16", "--head-dim", "64,192-128", "--mask", "causal", "--seqlen", "4k")
    ) + arguments.problems_from(flags("--window", "none,0", "--softcap", "--seqlen", "100"))
    assert arguments.problems_in(path) == by_flags


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[problem]]\nhead_dim = 0", "problem 1: head_dim=0"),
        ("[[problem]]\n[[problem]]\nmask = 'x'", "problem 2"),
        ("[[problem]]\nhead = 3", "'head'"),
        ("head_dim = 3", "no [[problem]]"),
        ("", "no [[problem]]"),
        ("[[problem", "is not TOML"),
    ],
)
def test_problem_files_that_are_wrong_are_named(tmp_path, text, says):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        arguments.problems_in(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


# ---- the small verbs ------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path / "db"))
    return tmp_path


def test_explain_says_what_and_why_and_keeps_stdout_for_data(home, capsys):
    assert main.main("explain --target cpu --head-dim 64 --mask causal --seqlen 256,512 --json".split()) == 0
    out, err = capsys.readouterr()
    reports = json.loads(out)
    assert [report["provenance"] for report in reports] == ["default", "default"]
    assert reports[0]["family"] == "cpu_forward"
    assert "cpu_forward" in err
    assert "sm80_forward" in err, "why the other family was not taken"


def test_explain_for_a_target_that_is_not_here(home, capsys):
    assert main.main("explain --target sm_80 --head-dim 512 --dtype fp16 --json".split()) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["kind"] == "torch"
    assert any("sm80_forward" in reason for reason in report["reasons"])


def test_build_then_explain_then_cache(home, capsys, monkeypatch):
    from fagen.runtime import binding

    monkeypatch.setattr(binding, "make", lambda: None)  # its own tests build it
    words = "--target cpu --head-dim 16 --dtype fp32 --seqlen 64,128".split()
    assert main.main(["build", *words, "--jobs", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["outcome"] == "ok", "two sizes share one kernel"
    assert main.main(["explain", *words, "--json"]) == 0
    assert all(report["built"] for report in json.loads(capsys.readouterr().out))

    assert main.main(["cache", "info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert len(info["kernels"]) == 1
    assert info["bytes"] > 1000
    assert main.main(["cache", "verify"]) == 0
    (entry,) = (home / "cache" / "kernels").iterdir()
    with open(entry / "kernel.so", "r+b") as library:
        library.write(b"damaged")
    assert main.main(["cache", "verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["damaged"] == [entry.name]
    assert main.main(["cache", "verify", "--remove"]) == 0
    assert not entry.exists()
    assert main.main(["cache", "clear", "--json"]) == 0
    assert list((home / "cache" / "kernels").iterdir()) == []


def test_cache_of_nothing(home, capsys):
    for action in ("info", "verify", "clear"):
        assert main.main(["cache", action]) == 0
    assert not (home / "cache").exists(), "looking makes no folder"


def test_a_failed_build_is_one(home, capsys, monkeypatch):
    from fagen.build import cache
    from fagen.runtime import binding

    def fail(*args, **options):
        raise errors.BuildError("the compiler refused", "error: 42")

    monkeypatch.setattr(binding, "make", lambda: None)
    monkeypatch.setattr(cache, "build", fail)
    assert main.main("build --target cpu --head-dim 16 --json".split()) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["error"].startswith("the compiler refused")
    assert "error: 42" in err
