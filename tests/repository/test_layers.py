"""The order of the packages: each line of LAYERS imports only itself and the lines above it; no module circles."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

from fagen.families import all_families

PACKAGE = Path(__file__).parents[2] / "fagen"
LAYERS = [
    {"errors"},
    {"env", "schema"},
    {"extensions", "notices", "target"},
    {"ops"},
    {"timing"},
    {"families"},
    {"codegen", "build"},
    {"runtime"},
    {"db"},
    {"verify"},
    {"dispatch"},
    {"tuner"},
    {"fp8_api"},
    {"api", "explanation", "softmax_api"},
    {"compat", "report"},
    {"bench"},
    {"ablation"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports_of(text: str, modules: set[str]) -> set[str]:
    """Modules of fagen that the text imports, wherever in it: at the top, in a function, for a type checker alone."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "fagen":
            for name in node.names:
                full = f"{node.module}.{name.name}"
                found.add(full if full in modules else node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "fagen"}
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    paths = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: imports_of(path.read_text(), set(paths)) - {"fagen", name} for name, path in paths.items()}


def package_of(module: str) -> str:
    return module.split(".")[1]


def test_every_package_has_its_place(graph):
    assert {package_of(module) for module in graph if module != "fagen"} == set(LEVEL)


def test_no_module_imports_upward(graph):
    upward = [
        f"{module} imports {other}" for module, others in graph.items() if module != "fagen" for other in others
        if LEVEL[package_of(other)] > LEVEL[package_of(module)]
    ]  # fmt: skip
    assert not upward, "\n".join(upward)


# what knows the op: its own C++ road, from a call to a launch, and the families' common arithmetic
OF_ATTENTION = {
    "dispatch.attention", "dispatch.decode", "dispatch.fp8", "dispatch.warmup", "families.cost",
    "families.sm90_backward_block", "families.sm90_backward_cost", "families.sm90_forward_block",
    "families.sm90_forward_cost", "families.sm90_forward_default", "runtime.binding", "runtime.decode_ops",
    "runtime.python_ops", "runtime.sinks",
}  # fmt: skip
OP_INDEPENDENT = {"timing", "families", "codegen", "build", "runtime", "db", "verify", "dispatch", "tuner"}


def test_attention_is_known_to_its_own_modules_alone(graph):
    """An op is an addition: what serves all of them imports none."""
    families = [family.name for family in all_families() if family.op != "softmax"]
    own = {f"fagen.{name}" for name in OF_ATTENTION} | {f"fagen.families.{name}" for name in families}
    knowing = {module for module, others in graph.items() if any("ops.attention" in other for other in others)}
    assert {module for module in knowing - {"fagen"} if package_of(module) in OP_INDEPENDENT} == own


def test_no_module_circles(graph):
    try:
        graphlib.TopologicalSorter({m: others for m, others in graph.items() if m != "fagen"}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_an_import_is_seen_wherever_it_stands():
    modules = {"fagen.a", "fagen.b", "fagen.b.c"}
    text = "from fagen import a\ndef f():\n    from fagen.b import c, d\nif TYPE_CHECKING:\n    import fagen.e"
    assert imports_of(text, modules) == {"fagen.a", "fagen.b.c", "fagen.b", "fagen.e"}
