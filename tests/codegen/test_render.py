"""Rendered source: the same bytes everywhere, self-contained, and all that was decided stands in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fagen import families, target
from fagen.codegen import render
from fagen.errors import FagenError, InvalidConfig
from fagen.ops.attention.problem import Problem

ROOT = Path(__file__).parents[2]
CASES = [
    ("cpu_forward", "cpu", {"dtype": "fp32", "head_dim": 64, "mask": "causal"}),
    ("cpu_forward", "cpu", {"dtype": "bf16", "head_dim": 40, "mask": "intervals", "intervals": "both4", "alibi": True}),
    ("sm80_forward", "sm_80", {"dtype": "fp16", "head_dim": 128, "mask": "window", "softcap": True}),
    ("sm80_forward", "sm_90", {"dtype": "bf16", "head_dim": 192, "head_dim_v": 128}),
]


def made(name: str, arch: str, fields: dict) -> str:
    family, problem, where = families.get(name), Problem(**fields), target.known(arch)
    return render.source(family, problem, where, family.default(problem, where))


@pytest.mark.parametrize(("name", "arch", "fields"), CASES)
def test_source_is_one_self_contained_document(name: str, arch: str, fields: dict) -> None:
    text = made(name, arch, fields)
    problem = Problem(**fields)
    assert '#include "' not in text and not re.search(r"\{%-? [a-z]|\{\{ ", text)
    assert problem.static_key in text.splitlines()[0] and arch in text.splitlines()[0]
    assert text.count("typedef struct fagen_params") == 1
    for path in (str(ROOT), os.path.expanduser("~")):
        assert path not in text
    for knob in families.get(name).knobs:
        assert re.search(rf"static constexpr \w+ {knob.cpp} = ", text)


@pytest.mark.parametrize(("name", "arch", "fields"), CASES)
def test_sizes_do_not_reach_the_source(name: str, arch: str, fields: dict) -> None:
    sizes = {"batch": 3, "heads": 6, "kv_heads": 2, "seqlen_q": 17, "seqlen_k": 1000}
    if fields.get("mask") == "window":
        sizes |= {"window_left": 9, "window_right": 4}
    family, where = families.get(name), target.known(arch)
    config = family.default(Problem(**fields), where)
    assert render.source(family, Problem(**fields), where, config) == render.source(
        family, Problem(**fields, **sizes), where, config
    )


def test_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import hashlib, tests.codegen.test_render as t\n"
        "print(*(hashlib.sha256(t.made(*case).encode()).hexdigest() for case in t.CASES if case[1] != 'cpu'))"
    )
    outs = set()
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "HOME": str(tmp_path), "LC_ALL": "C", "TZ": "Asia/Tokyo"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outs.add(done.stdout)
    assert len(outs) == 1


def test_an_illegal_config_is_not_rendered() -> None:
    family, problem, where = families.get("sm80_forward"), Problem(head_dim=256), target.known("sm_86")
    largest = {knob.name: knob.choices[-1] for knob in family.knobs}
    broken = family.default(problem, where).replace(**{k: v for k, v in largest.items() if isinstance(v, int)})
    with pytest.raises(InvalidConfig) as caught:
        render.render(family, problem, where, broken)
    assert family.rejects(problem, where, broken)[0] in str(caught.value)  # type: ignore[index]


def test_fold_pastes_each_header_once(tmp_path: Path) -> None:
    (tmp_path / "fagen").mkdir()
    (tmp_path / "fagen" / "a.h").write_text('#pragma once\n#include "fagen/b.h"\nint a;\n')
    (tmp_path / "fagen" / "b.h").write_text("#pragma once\nint b;\n")
    text = render.fold('#include <math.h>\n#include "fagen/a.h"\n#include "fagen/b.h"\nint c;\n', tmp_path)
    assert re.findall(r"int \w;", text) == ["int b;", "int a;", "int c;"] and "#include <math.h>" in text
    with pytest.raises(FagenError, match="missing.h cannot be read"):
        render.fold('#include "fagen/missing.h"\n', tmp_path)
