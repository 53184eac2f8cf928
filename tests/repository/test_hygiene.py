"""Habits of the code that a reader may rely on: small files, asm in one place, knobs declared once, no stray prints."""

from __future__ import annotations

import ast
import functools
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from fagen import families

ROOT = Path(__file__).parents[2]
PYTHON = sorted(p for p in (ROOT / "fagen").rglob("*.py"))
TEMPLATES = sorted(p for p in (ROOT / "templates").rglob("*") if p.is_file())
# wgmma.j2 writes an instruction's forms, of which C++ has no loop over registers
KERNELS = [p for p in TEMPLATES if p.suffix == ".j2" and p.parent.name not in ("example", "ptx")]
CPP = [p for p in TEMPLATES if p.suffix in (".h", ".cuh")] + sorted((ROOT / "fagen" / "runtime" / "csrc").glob("*"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(path: Path) -> str:
    """Without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/|\{#.*?#\}", "", path.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("path", [*PYTHON, *TEMPLATES], ids=name)
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_functions_are_small(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


@pytest.mark.parametrize("path", TEMPLATES, ids=name)
def test_asm_stays_in_ptx(path):
    if path.parent.name == "ptx":
        return
    assert not re.search(r"\basm\b", code(path))
    assert "__CUDA_ARCH__" not in code(path)


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_templates_spend_few_jinja_tags(path):
    text = path.read_text()
    assert len(re.findall(r"\{%", text)) <= 10
    assert len(text.splitlines()) <= 300
    depth = 0
    for line in code(path).splitlines():  # no tag inside a loop of the kernel
        if depth == 0 and re.search(r"\b(for|while) \(", line):
            depth = line.count("{") - line.count("}")
        elif depth > 0:
            assert "{%" not in line, line
            depth += line.count("{") - line.count("}")


@pytest.mark.parametrize("family", families.all_families(), ids=lambda family: family.name)
def test_a_knob_is_declared_once_and_used(family):
    """Its name is written in its family alone, and its constant somewhere in C++."""
    sources = "\n".join(code(path) for path in TEMPLATES)
    own = ROOT / "fagen" / "families" / f"{family.name}.py"
    assert own.is_file(), "a family has its template's name"
    for knob in family.knobs:
        read = knob.cpp or rf"config\.{knob.name}"
        assert re.search(rf"\b{read}\b", sources), f"no C++ reads {read}"
        others = [p for p in PYTHON if p.parent.name != "families" and knob.name in _strings(p)]
        assert not others, f"{knob.name} is repeated in {others}"


@functools.cache
def _strings(path: Path) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {token.string.strip("\"'") for token in tokens if token.type == tokenize.STRING}


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_only_notices_writes_to_stdout_and_only_env_reads_the_variables(path):
    text = path.read_text()
    calls = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    prints = [
        c.lineno for c in calls if "sys.stderr" not in [ast.unparse(k.value) for k in c.keywords if k.arg == "file"]
    ]
    assert not prints or path.name == "notices.py", f"print on lines {prints}"
    assert path.name == "env.py" or not re.findall(r"environ[^\n]*FAGEN_|getenv", text)


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_heavy_imports_wait_for_their_use(path):
    """What `import fagen` and the command line's help reach imports nothing heavy at its top level."""
    heavy = {"optuna", "jinja2", "rich", "numpy", "transformers"}
    on_tensors = (
        "api.py arguments.py attention.py call.py derivatives.py dropout.py fallback.py python_ops.py sinks.py".split()
    )
    on_tensors += [
        "backward_call.py",
        "backward_calls.py",
        "gradients.py",
        "cache_update.py",
        "decode.py",
        "decode_call.py",
        "cache_append.py",
        "decode_checks.py",
        "decode_ops.py",
        "merge.py",
        "decode_calls.py",
        "decode_inputs.py",
        "decode_reference.py",
        "calls.py",
        "stats.py",
        "softmax_api.py",
        "known_softmax.py",
        *("fp8.py", "fp8_api.py", "fp8_call.py", "fp8_calls.py", "fp8_launch.py", "fp8_order.py", "fp8_quantize.py"),
    ]  # which only their op imports
    if path.name not in on_tensors and path.parent.name != "compat":
        heavy.add("torch")
    # only a search imports the first two, only `hf.register` the last
    allowed = {"model.py": {"numpy"}, "chosen_sampler.py": {"optuna"}, "hf_masks.py": {"transformers"}}
    heavy -= allowed.get(path.name, set())
    for node in ast.parse(path.read_text()).body:
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not heavy & {module.split(".")[0] for module in modules}, f"line {node.lineno}"


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def _clock(node: ast.AST) -> bool:
    """Whether a clock is read somewhere in it."""
    names = ("monotonic", "perf_counter", "process_time")
    return any(isinstance(n, ast.Attribute) and n.attr in names for n in ast.walk(node))


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_no_test_asserts_that_something_is_quick(path):
    """A machine may be as busy as it likes. At least so many seconds may be asked for, at most so many may not."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
            read = {ast.unparse(n.targets[0]) for n in ast.walk(function) if isinstance(n, ast.Assign) and _clock(n)}
            for told in (n for n in ast.walk(function) if isinstance(n, ast.Assert)):
                for c in (n for n in ast.walk(told) if isinstance(n, ast.Compare)):
                    limit = isinstance(c.ops[-1], ast.Lt | ast.LtE) and isinstance(c.comparators[-1], ast.Constant)
                    seconds = _clock(c.left) or ast.unparse(c.left) in read
                    assert not (limit and seconds), f"line {told.lineno}: {ast.unparse(told)}"


def test_the_layout_is_as_documented():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "fagen").glob("*.py"):
        if not path.name.startswith("_"):
            assert f"`{path.name}`" in text, f"docs/architecture.md does not mention {path.name}"


def test_what_the_sanitizer_runs_can_be_imported() -> None:
    """On a GPU alone it is run, and tests move."""
    from tests.gpu import test_sanitizer

    for text in test_sanitizer.IDS:
        imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "<sanitizer>", "exec"), {})  # noqa: S102


def test_kernels_of_gpu_tests_are_known_without_a_gpu() -> None:
    """In a process of its own: it gives those tests another GPU."""
    told = "from tests.support import ahead; print(len(ahead.specs(['sm90_decode_mla', 'sm80_forward_fp32'])))"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50
