"""Writes docs/knobs.md from the families, docs/reference.md from errors and variables. `make docs` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fagen import env, errors, families

FOLDER = Path(__file__).parent


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells) + "\n"


def knobs() -> str:
    """A section a family: what may vary, and what removes a combination."""
    text = "# Knobs and constraints\n\nMade by `make docs` from the families' declarations. Do not edit.\n"
    for family in families.all_families():
        module = sys.modules[f"fagen.families.{family.name}"]
        rows = [(f"`{k.name}`", f"`{k.cpp}`", ", ".join(map(str, k.choices)), k.doc) for k in family.knobs]
        text += f"\n## {family.name}\n\n{(module.__doc__ or '').strip()}\n\n"
        text += (
            f"Template `templates/{family.template}`; {', '.join(family.dtypes)}; {family.size():,} combinations.\n\n"
        )
        text += _table(("knob", "in C++", "values", "what it decides"), rows)
        names = ", ".join(f"`{c.name}`" for c in family.constraints)
        text += f"\nConstraints, in the order in which they are asked: {names or 'none'}.\n"
        text += "`fagen tune --dry-run` counts what each of them removes from a problem's space.\n"
    return text


def reference() -> str:
    """Errors with their exit codes, and environment variables."""
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FagenError)]
    rows = [(f"`{c.__name__}`", str(c.exit_code), " ".join((c.__doc__ or "").split())) for c in classes]
    text = "# Errors and variables\n\nMade by `make docs`. Do not edit.\n\n## Errors\n\n"
    text += "Every message is at most three lines: what happened, the numbers, what to do.\n\n"
    text += _table(("error", "exit code", "meaning"), rows)
    text += "\n## Environment variables\n\n"
    return text + _table(("variable", "meaning"), [(f"`{name}`", meaning) for name, meaning in env.VARIABLES.items()])


PAGES = {"knobs.md": knobs, "reference.md": reference}

if __name__ == "__main__":
    for file, make in PAGES.items():
        (FOLDER / file).write_text(make())
