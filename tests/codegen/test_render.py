"""Rendered source: the same bytes everywhere, self-contained, and all that was decided stands in it."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fagen import env, families, target
from fagen.codegen import render
from fagen.codegen.spec import KernelSpec
from fagen.errors import FagenError, InvalidConfig
from fagen.families import Config
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
    return KernelSpec(family, problem, where, family.default(problem, where)).source


@pytest.mark.parametrize(("name", "arch", "fields"), CASES)
def test_source_is_one_self_contained_document(name: str, arch: str, fields: dict) -> None:
    text = made(name, arch, fields)
    problem = Problem(**fields)
    assert '#include "' not in text and not re.search(r"\{%-? [a-z]|\{\{ ", text)
    assert problem.static_key in text.splitlines()[0] and arch in text.splitlines()[0]
    assert text.count("typedef struct fagen_forward_params") == 1
    for path in (str(ROOT), os.path.expanduser("~")):
        assert path not in text
    for knob in filter(lambda knob: knob.cpp, families.get(name).knobs):
        assert re.search(rf"static constexpr \w+ {knob.cpp} = ", text)


@pytest.mark.parametrize(("name", "arch", "fields"), CASES)
def test_sizes_do_not_reach_the_source(name: str, arch: str, fields: dict) -> None:
    sizes = {"batch": 3, "heads": 6, "kv_heads": 2, "seqlen_q": 17, "seqlen_k": 1000}
    if fields.get("mask") == "window":
        sizes |= {"window_left": 9, "window_right": 4}
    family, where = families.get(name), target.known(arch)
    config = family.default(Problem(**fields), where)
    assert (
        KernelSpec(family, Problem(**fields), where, config).source
        == KernelSpec(family, Problem(**fields, **sizes), where, config).source
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
        assert KernelSpec(family, problem, where, broken).rendered
    assert family.rejects(problem, where, broken)[0] in str(caught.value)  # type: ignore[index]


def test_fold_pastes_each_header_once(tmp_path: Path) -> None:
    (tmp_path / "fagen").mkdir()
    (tmp_path / "fagen" / "a.h").write_text('#pragma once\n#include "fagen/b.h"\nint a;\n')
    (tmp_path / "fagen" / "b.h").write_text("#pragma once\nint b;\n")
    text = render.fold('#include <math.h>\n#include "fagen/a.h"\n#include "fagen/b.h"\nint c;\n', tmp_path)
    assert re.findall(r"int \w;", text) == ["int b;", "int a;", "int c;"] and "#include <math.h>" in text
    with pytest.raises(FagenError, match="missing.h cannot be read"):
        render.fold('#include "fagen/missing.h"\n', tmp_path)


# ---- the hash of the code -------------------------------------------------------------------------------------------

CODE = '#define f(x) x\nint a = 1;  // one\nasm("mov  b;");\nint c = a - -a;\n'


@pytest.mark.parametrize(
    "same",
    [
        CODE.replace("// one", "// another word"),
        CODE.replace("  // one", "/* on\n two lines */"),
        CODE.replace("int a = 1;", "int a\n    =1 ;"),
        CODE.replace("\n", "\n\n  "),
    ],
)
def test_comments_and_white_space_leave_the_hash_alone(same: str) -> None:
    assert same != CODE and render.source_hash(same) == render.source_hash(CODE)


@pytest.mark.parametrize(
    "other",
    [
        CODE.replace("= 1", "= 2"),
        CODE.replace("- -a", "--a"),
        CODE.replace("int a", "inta"),
        CODE.replace("mov  b", "mov b"),
        CODE.replace("f(x) x", "f (x) x"),
        CODE.replace("#define f(x) x\n", "#define f(x) x "),
        CODE.replace("// one", "// one\nint d;"),
        CODE.replace('"mov  b;"', '"// mov  b;"'),
    ],
)
def test_code_changes_the_hash(other: str) -> None:
    assert other != CODE and render.source_hash(other) != render.source_hash(CODE)


def test_a_reworded_comment_in_a_header_makes_no_record_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = KernelSpec(families.get("sm90_forward"), Problem(), target.known("sm_90"), _default("sm90_forward", "sm_90"))
    before = render.source_hash(one.source)
    shutil.copytree(env.data_dir("templates"), tmp_path / "templates")
    for header in (tmp_path / "templates").rglob("*.cuh"):
        header.write_text("// a new word\n" + header.read_text().replace("#pragma once\n", "#pragma once\n\n// more\n"))
    original = env.data_dir
    monkeypatch.setattr(env, "data_dir", lambda kind: tmp_path / kind if kind == "templates" else original(kind))
    assert "a new word" in one.source and render.source_hash(one.source) == before


# ---- specs ----------------------------------------------------------------------------------------------------------


def _default(family: str, arch: str) -> Config:
    return families.get(family).default(Problem(), target.known(arch))


def test_a_spec_travels_by_its_familys_name() -> None:
    one = KernelSpec(families.get("sm80_forward"), Problem(), target.known("sm_80"), _default("sm80_forward", "sm_80"))
    other = pickle.loads(pickle.dumps(one))
    assert other == one and hash(other) == hash(one) and other.family is one.family
    longer = dataclasses.replace(one, problem=one.problem.replace(seqlen_q=77))
    assert longer != one and longer.key == one.key and longer.hash == one.hash
    assert dataclasses.replace(one, target=target.known("sm_90")) != one
