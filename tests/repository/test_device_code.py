"""Habits of the device code: one namespace, masks as types, comments that name their subject."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADERS = sorted(p for p in (ROOT / "templates" / "include" / "fagen").rglob("*") if p.suffix in (".h", ".cuh"))
TEMPLATES = sorted(p for p in (ROOT / "templates").rglob("*") if p.is_file())


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "templates"))


def code(path: Path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text())


@pytest.mark.parametrize("path", HEADERS, ids=name)
def test_a_header_is_of_one_namespace(path: Path) -> None:
    """The params are C, and seen by whoever calls a kernel."""
    if path.parent.name == "abi":
        assert "namespace" not in code(path)
        return
    spaces = re.findall(r"^namespace ([\w:]+) \{", code(path), re.MULTILINE)
    assert spaces == ["fagen::ptx" if path.parent.name == "ptx" else "fagen"]
    before, _, rest = code(path).partition(f"namespace {spaces[0]} {{")
    outside = before + rest.rpartition("\n}")[2]
    assert not [line for line in outside.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("path", [p for p in TEMPLATES if p.suffix != ".h" and "cpu" not in p.parts], ids=name)
def test_masks_are_types(path: Path) -> None:
    """Only the types ask which mask the config has; the rest asks the type."""
    assert name(path) == "include/fagen/mask/mask.cuh" or "kMask " not in code(path)


@pytest.mark.parametrize("path", TEMPLATES, ids=name)
def test_comments_name_their_subject(path: Path) -> None:
    """A comment does not begin with a relative clause. A line may, that goes on from the one above."""
    before = ""
    for line in path.read_text().splitlines():
        goes_on = before.strip().startswith("//") and line.strip().startswith("//")
        assert goes_on or not re.search(r"//\s+(What|Who|Whose|Which|Of)\b", line), line
        before = line
