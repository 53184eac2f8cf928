"""docs/softmax.md: its code is run from top to bottom, and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from fagen.build import toolchain

PAGE = Path(__file__).parents[2] / "docs" / "softmax.md"


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_the_page_says_what_its_code_prints() -> None:
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    printed, shown = "", 0
    for kind, text in blocks:
        if kind == "python":
            assert not printed, f"the page leaves out: {printed}"
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, str(PAGE), "exec"), names)
            printed = out.getvalue()
        else:
            assert text == printed
            printed, shown = "", shown + 1
    assert shown >= 6 and not printed
