"""`fagen completion`: a script that completes verbs, options and their values, written from the parsers themselves."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fagen.cli.arguments import add_verb
from fagen.notices import emit_json, emit_text

_EXAMPLES = """examples:
  source <(fagen completion bash)                          now; or for good:
  fagen completion bash > ~/.local/share/bash-completion/completions/fagen
  fagen completion zsh > ~/.zfunc/_fagen                   with fpath+=(~/.zfunc) before compinit
  fagen completion fish > ~/.config/fish/completions/fagen.fish"""
FILES = ("<files>",)  # stands for values that are paths


@dataclass(frozen=True)
class Option:
    """An option or a positional argument (without names): its values are words, FILES, unknown (), or None: none."""

    names: tuple[str, ...]
    values: tuple[str, ...] | None
    help: str


@dataclass(frozen=True)
class Verb:
    """`words` are "tune", "db merge", or "" for fagen itself."""

    words: str
    options: tuple[Option, ...]
    verbs: tuple[tuple[str, str], ...]  # the verbs below it, with what each does

    @property
    def names(self) -> list[str]:
        below = [name for name, _ in self.verbs]
        values = [v for o in self.options if not o.names and o.values not in (None, FILES) for v in o.values or ()]
        return [*below, *values, *(name for option in self.options for name in option.names)]

    @property
    def takes_files(self) -> bool:
        return any(not option.names and option.values == FILES for option in self.options)


def add(subparsers: Any) -> None:
    about = "Print a script that completes verbs, options and values in a shell."
    parser = add_verb(subparsers, "completion", about, _EXAMPLES)
    parser.add_argument("shell", choices=list(SHELLS), help="the shell that reads it: %(choices)s")


def run(args: argparse.Namespace) -> int:
    script = SHELLS[args.shell](verbs())
    if args.json:
        emit_json({"shell": args.shell, "script": script})
    else:
        emit_text(script)
    return 0


# ---- from the parsers ------------------------------------------------------------------------------------------------


def values_of() -> dict[str, tuple[str, ...]]:
    """Values of options for which argparse has no choices, since they take lists or names that are looked up."""
    from fagen import families
    from fagen.cli import presets
    from fagen.ops.attention.problem import DTYPES, INTERVAL_KINDS, MASKS
    from fagen.target import ARCHS

    return {
        "--target": ("gpu", *ARCHS),
        "--dtype": tuple(DTYPES),
        "--mask": tuple(MASKS),
        "--interval-kind": tuple(INTERVAL_KINDS),
        "--preset": tuple(presets.PRESETS),
        "--family": tuple(family.name for family in families.all_families()),
        "--config": ("best", "default"),
    }


def verbs() -> list[Verb]:
    """All verbs, fagen itself first."""
    from fagen.cli import main

    root = main._parser(None)
    found = [Verb("", tuple(_options(root)), tuple(main.VERBS.items()))]
    for name in main.VERBS:
        below = _subparsers(main._parser(name))
        found += _walk(below.choices[name], name)
    return found


def _walk(parser: argparse.ArgumentParser, words: str) -> Iterator[Verb]:
    own = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    below = own[0].choices if own else {}
    told = {choice.dest: choice.help or "" for action in own for choice in action._choices_actions}
    yield Verb(words, tuple(_options(parser)), tuple((name, told.get(name, "")) for name in below))
    for name, child in below.items():
        yield from _walk(child, f"{words} {name}")


def _subparsers(parser: argparse.ArgumentParser) -> argparse._SubParsersAction:
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    known = values_of()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
            continue
        text = (action.help or "") % {**vars(action), "choices": ", ".join(map(str, action.choices or ()))}
        yield Option(tuple(action.option_strings), _values(action, known), " ".join(text.split()))


def _values(action: argparse.Action, known: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    if action.option_strings and action.nargs == 0:
        return None
    if action.choices is not None:
        return tuple(map(str, action.choices))
    named = next((known[name] for name in action.option_strings if name in known), None)
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    a_path = getattr(action.type, "__name__", "") == "Path" or metavar.startswith(("FILE", "DIR"))
    return FILES if a_path or not action.option_strings else named or ()


# ---- the scripts -----------------------------------------------------------------------------------------------------

_BASH = """# bash completion of fagen. Made by: fagen completion bash
_fagen_words() { COMPREPLY=($(compgen -P "${word%"${word##*,}"}" -W "$*" -- "${word##*,}")); }
_fagen_files() {
  local found
  compopt -o filenames 2>/dev/null
  mapfile -t found < <(compgen -f -- "$word")
  COMPREPLY+=("${found[@]}")
}
_fagen() {
  local verb= i word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
  COMPREPLY=()
  if [ "$word" = = ]; then word=; elif [ "$before" = = ]; then before=${COMP_WORDS[COMP_CWORD - 2]}; fi
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "$verb ${COMP_WORDS[i]}" in
      VERBS) verb="$verb ${COMP_WORDS[i]}" ;;
    esac
  done
CASES
}
complete -F _fagen fagen
"""
_ZSH = """#compdef fagen
# zsh completion of fagen. Made by: fagen completion zsh
_fagen_words() { compset -P '*,'; compadd -- "$@"; }
_fagen_files() { _files; }
_fagen() {
  local verb= i before=${words[CURRENT - 1]}
  for ((i = 2; i < CURRENT; i++)); do
    case "$verb ${words[i]}" in
      VERBS) verb="$verb ${words[i]}" ;;
    esac
  done
CASES
}
if [ "$funcstack[1]" = _fagen ]; then _fagen "$@"; else compdef _fagen fagen; fi
"""


def _cases(found: list[Verb]) -> str:
    """What bash and zsh have in common: values after an option, else the names that a verb takes."""
    after: dict[tuple[str, ...], list[str]] = {}
    for verb in found:
        for option in verb.options:
            if option.names and option.values is not None:
                after.setdefault(option.values, []).extend(f"{_place(verb)}:{name}" for name in option.names)
    lines = ['  case "$verb:$before" in']
    for values, places in after.items():
        action = "_fagen_files" if values == FILES else f"_fagen_words {shlex.join(values)}" if values else ":"
        lines.append(f"    {_patterns(places)}) {action}; return ;;")
    lines += ["  esac", '  case "$verb" in']
    for verb in found:
        action = f"_fagen_words {shlex.join(verb.names)}" + ("; _fagen_files" if verb.takes_files else "")
        lines.append(f"    {_patterns([_place(verb)])}) {action} ;;")
    return "\n".join([*lines, "  esac"])


def _place(verb: Verb) -> str:
    """The verb as the scripts build it, a blank before each word."""
    return f" {verb.words}" if verb.words else ""


def _patterns(places: list[str]) -> str:
    return " | ".join(f"'{place}'" for place in places)


def _bash_like(template: str) -> Callable[[list[Verb]], str]:
    def script(found: list[Verb]) -> str:
        places = _patterns([_place(verb) for verb in found if verb.words])
        return template.replace("VERBS", places).replace("CASES", _cases(found))

    return script


def _fish(found: list[Verb]) -> str:
    lines = ["# fish completion of fagen. Made by: fagen completion fish", "complete -c fagen -f"]
    for verb in found:
        seen = [f"__fish_seen_subcommand_from {word}" for word in verb.words.split()]
        if verb.verbs:
            names = " ".join(name for name, _ in verb.verbs)
            seen.append(f"not __fish_seen_subcommand_from {names}")
        when = f" -n {shlex.quote('; and '.join(seen))}"
        for name, text in verb.verbs:
            lines.append(f"complete -c fagen{when} -a {name} -d {_fish_quoted(text)}")
        for option in verb.options:
            names = "".join(f" -l {n[2:]}" if n.startswith("--") else f" -s {n[1:]}" for n in option.names)
            must = "" if option.values is None or not option.names else " -r" if option.values == FILES else " -x"
            value = " -F" if option.values == FILES else f" -a {_fish_quoted(' '.join(option.values or ()))}"
            if names or option.values:
                lines.append(f"complete -c fagen{when}{names}{must}{value} -d {_fish_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[list[Verb]], str]] = {"bash": _bash_like(_BASH), "zsh": _bash_like(_ZSH), "fish": _fish}
