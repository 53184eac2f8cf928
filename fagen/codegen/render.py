"""Templates to source: the same bytes on any machine for the same inputs, and the hash of its code.

Jinja decides what text exists; constexpr C++ decides what it does. The rendered text includes our own headers;
`fold` pastes them in, so that the file that is tuned, dispatched and emitted is one self-contained document.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen import extensions
from fagen.errors import FagenError

if TYPE_CHECKING:
    import jinja2


_INCLUDE = re.compile(r'^#include "(fagen/[^"]+)"\s*$', re.MULTILINE)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _template(name: str) -> tuple[str, str, Callable[[], bool]] | None:
    """The text of a template from the first folder that has it, its path, and whether it is still the same."""
    path = next((folder / name for folder in extensions.template_folders() if (folder / name).is_file()), None)
    if path is None:
        return None
    written = path.stat().st_mtime_ns
    return path.read_text(), str(path), lambda: path.exists() and path.stat().st_mtime_ns == written


def render(template: str, **names: Any) -> str:
    """A template's text, own headers still included by name."""
    return _environment().get_template(template).render(**names)


def fold(source: str, *before: Path) -> str:
    """Paste every `#include "fagen/..."` in, once each, in order; from the folders `before` ours where they have it."""
    seen: set[str] = set()

    def paste(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        try:
            text = extensions.read_header(name, *before)
        except OSError as error:
            raise FagenError(f"header {name} cannot be read", str(error)) from error
        body = _INCLUDE.sub(paste, text.replace("#pragma once\n", ""))
        return f"// ---- {name} {'-' * max(4, 100 - len(name))}\n{body.rstrip()}\n"

    return _INCLUDE.sub(paste, source)


_LITERAL_OR_COMMENT = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", re.DOTALL)
_SPACE = re.compile(r"(?<=\S)\s+(?=\S)")


def code_of(text: str) -> str:
    """The text without its comments, and without the white space that no compiler sees; literals as hex."""
    text = _LITERAL_OR_COMMENT.sub(lambda m: " " if m[0].startswith("/") else f'"{m[0].encode().hex()}"', text)
    parts: list[str] = []
    for directive, lines in itertools.groupby(text.splitlines(), lambda line: line.lstrip().startswith("#")):
        if directive:
            parts += [" ".join(line.split()) for line in lines]
        else:
            parts.append(_SPACE.sub(_one_space, " ".join(lines).strip()))
    return "\n".join(part for part in parts if part)


def _one_space(match: re.Match[str]) -> str:
    """White space between a word and a sign separates nothing; between two words or two signs it may."""
    before, behind = match.string[match.start() - 1], match.string[match.end()]
    return "" if _is_word(before) != _is_word(behind) else " "


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def source_hash(text: str) -> str:
    """The hash of the code: a reworded comment or another line break leaves it alone."""
    return hashlib.sha256(code_of(text).encode()).hexdigest()[:16]
