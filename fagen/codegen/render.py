"""Problem, target and config to source: the same bytes on any machine for the same inputs.

Jinja decides what text exists; constexpr C++ decides what it does. The rendered text includes our own headers;
`fold` pastes them in, so that the file that is tuned, dispatched and emitted is one self-contained document.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen import env
from fagen.errors import FagenError
from fagen.families import Config, Family
from fagen.ops.attention.problem import INTERVAL_KINDS, Problem
from fagen.target import Target

if TYPE_CHECKING:
    import jinja2


_INCLUDE = re.compile(r'^#include "(fagen/[^"]+)"\s*$', re.MULTILINE)
_CPP_TYPES = {"fp32": "float", "fp16": "half_t", "bf16": "bfloat_t"}


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(env.data_dir("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def constants(family: Family, problem: Problem, target: Target, config: Config) -> list[tuple[str, str, str, str]]:
    """The constexpr block: (type, name, value, comment), knobs last."""
    rows = [
        ("int", "kHeadDim", str(problem.head_dim_padded), "of q and k, padded"),
        ("int", "kHeadDimV", str(problem.head_dim_v_padded), "of v and o, padded"),
        ("Mask", "kMask", f"Mask::{problem.mask}", "which cells are visible"),
        ("bool", "kSoftcap", str(problem.softcap).lower(), "s -> softcap * tanh(s / softcap)"),
        ("bool", "kAlibi", str(problem.alibi).lower(), "s -> s - slope * distance from the diagonal"),
        ("bool", "kAligned", str(problem.aligned).lower(), "rows are whole, aligned 16-byte pieces"),
        ("int", "kIntervalColumns", str(len(INTERVAL_KINDS.get(problem.intervals, ()))), "bounds a key carries"),
    ]
    have = INTERVAL_KINDS.get(problem.intervals, ())
    for bound in ("LTS", "LTE", "UTS", "UTE"):
        index = have.index(bound) if bound in have else -1
        rows.append(("int", f"k{bound}", str(index), f"column of {bound} in intervals, -1: absent"))
    for knob in family.knobs:
        kind, value = knob.literal(config[knob.name])
        rows.append((kind, knob.cpp, value, knob.doc.split(";")[0].split(". ")[0]))
    return rows


def render(family: Family, problem: Problem, target: Target, config: Config) -> str:
    """The kernel's source, its own headers still included by name."""
    family.require(problem, target, config)
    template = _environment().get_template(family.template)
    enums = {
        knob.cpp.removeprefix("k"): [str(c) for c in knob.choices]
        for knob in family.knobs
        if isinstance(knob.choices[0], str)
    }
    return template.render(
        family=family,
        problem=problem,
        static_key=problem.static_key,
        element=_CPP_TYPES[problem.dtype],
        arch=target.arch,
        config=config,
        enums=enums,
        constants=constants(family, problem, target, config),
        derived=family.derive(problem, target, config),
        **family.context(problem, config),
    )


def fold(source: str, *before: Path) -> str:
    """Paste every `#include "fagen/..."` in, once each, in order; from the folders `before` ours where they have it."""
    roots = (*before, env.data_dir("templates") / "include")
    seen: set[str] = set()

    def paste(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        try:
            text = next((root for root in roots if (root / name).exists()), roots[-1]).joinpath(name).read_text()
        except OSError as error:
            raise FagenError(f"header {name} cannot be read", str(error)) from error
        body = _INCLUDE.sub(paste, text.replace("#pragma once\n", ""))
        return f"// ---- {name} {'-' * max(4, 100 - len(name))}\n{body.rstrip()}\n"

    return _INCLUDE.sub(paste, source)


def source(family: Family, problem: Problem, target: Target, config: Config) -> str:
    """The self-contained source: what is built, hashed and emitted."""
    return fold(render(family, problem, target, config))


def source_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_hashes: dict[tuple[Any, ...], str] = {}


def current_hash(family: Family, problem: Problem, target: Target, config: Config) -> str:
    """Of the source that today's templates make; the sizes of the problem do not count."""

    key = family.name, problem.static_key, target, config
    if key not in _hashes:
        _hashes[key] = source_hash(source(family, problem, target, config))
    return _hashes[key]
