"""What type checkers and editors see of fagen is what there is."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import fagen

PACKAGE = Path(fagen.__file__).parent
CONFIG = """[mypy]
no_implicit_reexport = true
[mypy-torch.*,optuna.*,rich.*,jinja2.*,platformdirs.*,filelock.*,numpy.*]
follow_imports = skip
"""
USER = """import fagen
from fagen import attention, sdpa

fagen.atention
fagen.attention(1, 2, 3, casual=True)
attention(1, 2, 3, causal="yes")
sdpa(1, 2, 3, is_causal=True)
fagen.masks.from_documants
fagen.Problem(heads="many")
fagen.attention(1, 2, 3, causal=True, window=(5, None))
reveal_type(fagen.Problem().heads)
reveal_type(fagen.explain)
reveal_type(attention(1, 2, 3))
reveal_type(attention(1, 2, 3, return_lse=False))
reveal_type(attention(1, 2, 3, causal=True, return_lse=True))
reveal_type(fagen.attention(1, 2, 3, return_lse=bool(fagen.__version__)))
attention(1, 2, 3, return_lse="yes")
try:
    pass
except fagen.FagenError as error:
    error.remedi
from fagen import nothing
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[int, str]:
    """What mypy says of a user's program by its lines, fagen lying among an environment's packages."""
    pytest.importorskip("mypy", reason="no mypy (pip install mypy)")
    folder = tmp_path_factory.mktemp("types")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "env" / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (packages / "fagen").symlink_to(PACKAGE, target_is_directory=True)
    (folder / "env" / "bin").mkdir()
    (folder / "env" / "bin" / "python").symlink_to(sys.executable)
    (folder / "env" / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    (folder / "mypy.ini").write_text(CONFIG)
    (folder / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--python-executable", str(folder / "env" / "bin" / "python"), "user.py"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    found = re.findall(r"^user\.py:(\d+): (?:error|note): (.*)$", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    return {int(line): text for line, text in reversed(found)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("fagen.atention", 'has no attribute "atention"'),
        ("casual=True", 'Unexpected keyword argument "casual"'),
        ('causal="yes"', 'No overload variant of "attention" matches'),
        ("from_documants", 'has no attribute "from_documants"'),
        ('heads="many"', 'incompatible type "str"; expected "int"'),
        ("remedi", 'has no attribute "remedi"'),
        ("import nothing", 'has no attribute "nothing"'),
        ("Problem().heads", '"int"'),
        ("reveal_type(fagen.explain)", "Explanation"),
        ("reveal_type(attention(1, 2, 3))", 'is "Any"'),
        ("3, return_lse=False", 'is "Any"'),  # a tensor: torch is not followed here
        ("return_lse=True", 'is "tuple[Any, Any]"'),
        ("return_lse=bool(", 'is "Any | tuple[Any, Any]"'),
        ('return_lse="yes"', 'No overload variant of "attention" matches'),
    ],
)
def test_mypy_sees(seen, line, says):
    (number,) = (n for n, text in enumerate(USER.splitlines(), 1) if line in text)
    assert says in seen.get(number, "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("line", ["import fagen", "import attention, sdpa", "is_causal=True", "window=(5, None)"])
def test_mypy_has_nothing_to_say_of(seen, line):
    (number,) = (n for n, text in enumerate(USER.splitlines(), 1) if text.endswith((line, f"{line})")))
    assert number not in seen


def test_what_is_declared_is_what_is_imported():
    """The block for checkers and the table for the first use name the same things."""
    (block,) = (
        node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )  # fmt: skip
    declared = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for name in node.names:
            assert name.name == name.asname, "only such an import is public to a checker"
            declared[name.name] = node.module
    assert {n: f"{w}.{n}" if n in ("masks", "hf") else w for n, w in declared.items()} == fagen._WHERE
    for name in declared:
        there = importlib.import_module(fagen._WHERE[name])
        assert getattr(fagen, name) is getattr(there, name, there)
    assert (PACKAGE / "py.typed").is_file()


def test_the_variants_of_attention_have_its_arguments():
    """A new argument of the function is one of each variant that checkers see."""
    whole = inspect.signature(fagen.attention).parameters
    variants = [inspect.signature(variant).parameters for variant in typing.get_overloads(fagen.attention)]
    assert [seen["return_lse"].annotation for seen in variants] == ["Literal[False]", "Literal[True]", "bool"]
    for seen in variants:
        assert list(seen) == list(whole)
        for name, there in whole.items():
            assert seen[name].kind == there.kind
            if name != "return_lse":
                assert seen[name].annotation == there.annotation
                assert (seen[name].default is ...) == (there.default is not there.empty)


def test_import_takes_nothing_along():
    program = (
        "import sys, fagen\nfagen.Problem, fagen.FagenError\n"
        "assert not {'torch', 'jinja2', 'optuna', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="'atention'"):
        _ = fagen.atention
