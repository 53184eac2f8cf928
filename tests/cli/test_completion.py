"""The shells' completion: derived from the parsers, and asked in the shells that are here."""

from __future__ import annotations

import functools
import shutil
import subprocess

import pytest

from fagen.cli import main
from fagen.cli.commands import completion

CASES = [
    (["tu"], ["tune"]),  # a verb
    (["db", "me"], ["merge"]),  # a verb below another
    (["tune", "--bud"], ["--budget"]),  # an option
    (["--debug", "db", "list", "--js"], ["--json"]),
    (["db", "merge", "--policy", ""], ["faster", "keep", "newer"]),  # a choice
    (["cache", "i"], ["info"]),
    (["explain", "--target", "sm_9"], ["sm_90"]),  # a value that argparse does not know
    (["tune", "--seqlen", ""], []),  # a value that nobody knows
    (["emit", "--out", "fold"], ["folder"]),  # a path
    (["report", "a f"], ["a file.jsonl"]),
]


@functools.cache
def made(shell: str) -> str:
    return completion.SHELLS[shell](completion.verbs())


@pytest.fixture
def ask(tmp_path):
    """What the shell offers for the last word, in a folder with a file and a folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "a file.jsonl").touch()

    def ask(shell: str, program: str, *words: str) -> list[str]:
        if shutil.which(shell) is None:
            pytest.skip(f"no {shell}")
        script = tmp_path / f"fagen.{shell}"
        script.write_text(made(shell))
        command = [shell, *(["-f"] if shell == "zsh" else []), "-c", program, *([shell] if shell != "fish" else [])]
        done = subprocess.run([*command, str(script), *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return sorted(line.rstrip("/") for line in done.stdout.splitlines())

    return ask


_BASH = """source "$1"; shift
complete -p fagen | grep -q 'complete -F _fagen fagen' || exit 9
COMP_WORDS=(fagen "$@"); COMP_CWORD=$#; _fagen
for word in "${COMPREPLY[@]}"; do echo "$word"; done"""


@pytest.mark.parametrize(("words", "offers"), CASES, ids=lambda value: "-".join(value)[:30])
def test_bash(ask, words, offers):
    assert ask("bash", _BASH, *words) == offers


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        (["emit", "--mask", "none,c"], ["none,causal"]),  # the last of a list
        (["db", "merge", "--policy", "="], ["faster", "keep", "newer"]),  # bash takes --policy=f apart
        (["db", "merge", "--policy", "=", "k"], ["keep"]),
    ],
    ids=lambda value: "-".join(value)[:30],
)
def test_bash_takes_words_apart(ask, words, offers):
    assert ask("bash", _BASH, *words) == offers


_ZSH = """compdef() { [ "$1" = _fagen ] || exit 9 }
compset() { return 0 }
compadd() { shift; for word in "$@"; do [[ $word = "$last"* ]] && echo "$word"; done; return 0 }
_files() { for word in "$last"*; do echo "$word"; done }
source "$1"; shift
last="${@[-1]}" words=(fagen "$@"); CURRENT=${#words}; _fagen"""


@pytest.mark.parametrize(("words", "offers"), CASES, ids=lambda value: "-".join(value)[:30])
def test_zsh(ask, words, offers):
    assert ask("zsh", _ZSH, *words) == offers


_FISH = """source $argv[1]
complete -C $argv[2] | string replace -r '\\t.*' ''
true"""


@pytest.mark.parametrize(("words", "offers"), CASES, ids=lambda value: "-".join(value)[:30])
def test_fish(ask, words, offers):
    line = " ".join(["fagen", *(word.replace(" ", "\\ ") for word in words)])
    assert ask("fish", _FISH, line) == offers


def test_every_verb_and_every_option_of_the_parsers_is_offered():
    found = {verb.words: verb for verb in completion.verbs()}
    assert found[""].names[: len(main.VERBS)] == list(main.VERBS)
    assert {"db list", "db export"} <= found.keys()
    options = {name for verb in found.values() for option in verb.options for name in option.names}
    assert {"--target", "--budget", "--policy"} <= options
    assert "--arch" not in options, "what help hides is not offered"
    assert completion.values_of().keys() <= options, "values of an option that does not exist"
    for name in options:
        if name.startswith("--"):
            assert f" -l {name[2:]} " in made("fish")
            assert name in made("bash")
            assert name in made("zsh")


def test_the_command_prints_the_script_and_nothing_else(capsys):
    for shell in completion.SHELLS:
        assert main.main(["completion", shell]) == 0
        out, err = capsys.readouterr()
        assert out == made(shell)
        assert err == ""
    assert main.main(["completion", "bash", "--json"]) == 0
    assert '"shell": "bash"' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main.main(["completion", "tcsh"])
