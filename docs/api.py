"""docs/api.md: every public name of fagen, with its signature and docstring. `make docs` writes it."""

from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any

import fagen

_COLUMNS = re.compile(r"^ |\S {2,}\S", re.MULTILINE)
HEAD = """# The API

Made by `make docs` from signatures and docstrings. Do not edit.

Each name is imported at its first use, so that `import fagen` alone does not import torch. Errors and environment
variables have [a page of their own](reference.md); what differs from other libraries stands in
[coming from](coming-from.md).
"""


def page() -> str:
    return HEAD + "".join(_entry(f"fagen.{name}", getattr(fagen, name)) for name in fagen.__all__)


def _entry(name: str, value: Any) -> str:
    if inspect.ismodule(value):
        return _heading(name) + _doc(value) + "".join(_entry(f"{name}.{n}", v) for n, v in _public(value).items())
    if inspect.isclass(value):
        return _heading(name) + _code(name, value) + _doc(value) + _members(value)
    if callable(value):
        return _heading(name) + _code(name, value) + _doc(value)
    return _heading(name) + f"`{type(value).__name__}`.\n"


def _heading(name: str) -> str:
    return f"\n{'#' * (1 + name.count('.'))} {name}\n\n".replace("__", "\\_\\_")


def _public(module: ModuleType) -> dict[str, Any]:
    """What the module itself defines."""
    mine = {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    return {name: value for name, value in mine.items() if not name.startswith("_")}


def _code(name: str, value: Any) -> str:
    """The signature, a parameter a line where one line is too short for it."""
    words = name.removeprefix("fagen.") if inspect.isclass(value) else name
    signature = inspect.signature(value)
    parameters = [_parameter(p) for p in signature.parameters.values()]
    kinds = [p.kind for p in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    told = not inspect.isclass(value) and signature.return_annotation is not signature.empty
    gives = f" -> {signature.return_annotation}" if told else ""
    line = f"{words}({', '.join(parameters)}){gives}"
    if len(line) > 100:
        line = f"{words}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){gives}"
    return f"```python\n{line}\n```\n\n"


def _parameter(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    told = parameter.annotation is not parameter.empty
    text = f"{star}{parameter.name}" + (f": {parameter.annotation}" if told else "")
    if parameter.default is parameter.empty:
        return text
    return f"{text} = {parameter.default!r}" if told else f"{text}={parameter.default!r}"


def _doc(value: Any) -> str:
    """The docstring; paragraphs that are laid out in columns stay as they are."""
    parts = (inspect.getdoc(value) or "").strip().split("\n\n")
    return "\n\n".join(f"```text\n{part}\n```" if _COLUMNS.search(part) else part for part in parts) + "\n"


def _members(of: type) -> str:
    """Methods and properties of a class of ours, a line each."""
    lines = []
    for name, member in vars(of).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
        words = name if isinstance(member, property) else f"{name}({', '.join(parameters)})"
        first = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
        lines.append(f"- `{words}`" + (f": {first}" if first else ""))
    return "\n" + "\n".join(lines) + "\n" if lines else ""
