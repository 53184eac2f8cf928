"""Ops and families that live outside of fagen, in modules that FAGEN_EXTENSIONS names.

A module has any of OPS (a tuple of `Op`), FAMILIES (a tuple of `Family`) and TEMPLATES (a folder as `templates/` is:
templates, and headers below `include/`). Processes inherit the variable, so the tuner's workers find them, too.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from fagen import env
from fagen.errors import UsageError
from fagen.schema import shown

T = TypeVar("T")


def modules() -> tuple[ModuleType, ...]:
    words = env.get("FAGEN_EXTENSIONS")
    return _imported(words) if words else ()


@functools.cache
def _imported(words: str) -> tuple[ModuleType, ...]:
    return tuple(_import(word.strip()) for word in words.split(","))


def _import(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"FAGEN_EXTENSIONS: {shown(name)} is no name of a module", remedy="names, separated by commas")
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the module does at import
        why = next(iter(str(error).splitlines()), "")
        raise UsageError(f"FAGEN_EXTENSIONS: {name} cannot be imported", f"{type(error).__name__}: {why}") from error


def with_offered(ours: tuple[T, ...], attribute: str, name: str = "name") -> tuple[T, ...]:
    """Ours, then what the extensions have under an attribute: of the same type, each of another name."""
    found = ours
    for module in modules():
        offered = getattr(module, attribute, ())  # absent, too, while the module itself is being imported
        if type(offered) is not tuple or not all(type(each) is type(ours[0]) for each in offered):
            raise UsageError(f"{attribute} of {module.__name__} is no tuple of {type(ours[0]).__name__}")
        found += offered
    names = [getattr(each, name) for each in found]
    if twice := next((each for each in names if names.count(each) > 1), None) if len(found) > len(ours) else None:
        raise UsageError(f"{shown(twice)} of an extension is taken", f"{attribute} have: {', '.join(names)}")
    return found


def template_folders() -> tuple[Path, ...]:
    """Where templates are, and headers below `include`: ours first, so that no other hides one of them."""
    others = tuple(Path(module.TEMPLATES) for module in modules() if hasattr(module, "TEMPLATES"))
    return env.data_dir("templates"), *others


def read_header(name: str, *before: Path) -> str:
    """The text of a header by the name under which kernels include it; from the folders `before` where they have it.

    Raises OSError.
    """
    roots = (*before, *(folder / "include" for folder in template_folders()))
    return next((root / name for root in roots if (root / name).exists()), roots[len(before)] / name).read_text()
