"""An op is an addition: a second one, known by FAGEN_EXTENSIONS alone, goes the whole road."""

from __future__ import annotations

import ctypes
import json
import subprocess
import types

import pytest
import torch

import fagen
from fagen import extensions, families, ops
from fagen.build import toolchain
from fagen.codegen import emit
from fagen.codegen.spec import KernelSpec
from fagen.db import store
from fagen.db.record import Record
from fagen.dispatch import choose, kernels, resolve
from fagen.errors import FagenError, InvalidArgument, UsageError
from fagen.families import Config
from fagen.ops import abi
from fagen.runtime import kernel
from fagen.target import host
from fagen.tuner import final_round
from fagen.tuner.messages import OUTCOMES
from fagen.verify import checks
from tests.support.row_scaling import FAMILY, OP, Scaling, ScalingCall
from tests.support.runs import rows

NAME = "tests.support.row_scaling"
HERE, PROBLEM = host(), Scaling(rows=300, columns=200)

needs_cxx = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")


@pytest.fixture
def known(folders, monkeypatch):
    monkeypatch.setenv("FAGEN_EXTENSIONS", NAME)
    yield folders
    kernels.forget()


def spec(problem: Scaling = PROBLEM, **knobs: object) -> KernelSpec:
    return KernelSpec(FAMILY, problem, HERE, Config({"unroll": 4, "style": "plain", **knobs}))


def call(problem: Scaling = PROBLEM) -> ScalingCall:
    return ScalingCall(torch.randn(problem.rows, problem.columns), torch.randn(problem.rows), problem.negated)


# ---- the registry ---------------------------------------------------------------------------------------------------


def test_it_is_known_only_where_the_variable_names_it(known, monkeypatch):
    assert ops.get("row_scaling") is OP and families.get("cpu_row_scaling") is FAMILY
    assert ops.problem_from(PROBLEM.to_dict()) == PROBLEM and ops.is_problem(PROBLEM)
    monkeypatch.delenv("FAGEN_EXTENSIONS")
    with pytest.raises(InvalidArgument, match="op 'row_scaling' is unknown"):
        ops.get("row_scaling")
    assert FAMILY not in families.all_families() and not ops.is_problem(PROBLEM)


@pytest.mark.parametrize("word", ["../evil", "os;x", "a b", "", ",", "no_such_module_at_all", "tests.support.nowhere"])
def test_a_name_that_is_no_module_is_refused(monkeypatch, word):
    monkeypatch.setenv("FAGEN_EXTENSIONS", f"{NAME},{word}")
    with pytest.raises(UsageError, match="FAGEN_EXTENSIONS") as caught:
        ops.all_ops()
    assert len(str(caught.value).splitlines()) <= 3


def test_what_an_extension_offers_is_of_its_type_and_has_a_name_of_its_own(monkeypatch):
    def offer(**attributes: object) -> None:
        monkeypatch.setattr(extensions, "modules", lambda: (types.SimpleNamespace(__name__="it", **attributes),))

    offer(OPS=(OP, "no op"))
    with pytest.raises(UsageError, match="OPS of it is no tuple of Op"):
        ops.all_ops()
    offer(OPS=(OP, OP))
    with pytest.raises(UsageError, match="'row_scaling' of an extension is taken"):
        ops.all_ops()
    offer(FAMILIES=(FAMILY, FAMILY))
    with pytest.raises(UsageError, match="'cpu_row_scaling' of an extension is taken"):
        families.all_families()


def test_no_extension_hides_a_template_or_header_of_ours(monkeypatch, tmp_path):
    (tmp_path / "include/fagen/abi").mkdir(parents=True)
    (tmp_path / "include/fagen/abi/tensor.h").write_text("int hidden;")
    (tmp_path / "preamble.j2").write_text("hidden")
    monkeypatch.setattr(extensions, "modules", lambda: (types.SimpleNamespace(TEMPLATES=tmp_path, OPS=()),))
    from fagen.codegen import render

    assert "hidden" not in render.fold('#include "fagen/abi/tensor.h"\n')
    assert "hidden" not in render.render("preamble.j2", **_names())
    with pytest.raises(FagenError, match=r"header fagen/abi/none.h cannot be read"):
        render.fold('#include "fagen/abi/none.h"\n')


def _names() -> dict[str, object]:
    forward = ops.get("forward")
    family = families.get("cpu_forward")
    return {
        "op": forward, "family": family, "static_key": "", "arch": "cpu", "config": "", "enums": {}, "constants": [],
        "derived": {},
    }  # fmt: skip


# ---- render, build, launch, verify ----------------------------------------------------------------------------------


def test_its_source_has_its_own_head_and_header(known):
    text = spec(PROBLEM.replace(negated=True)).source
    assert text.startswith("// cpu_row_scaling: row scaling for row_scaling/fp32/negated on cpu\n")
    assert "static constexpr bool kNegated = true;" in text and "enum class Style { plain, wrong" in text
    assert "typedef struct fagen_row_scaling_params" in text and '#include "fagen/' not in text
    assert "Mask" not in text and "softmax" not in text
    assert spec().hash == spec(PROBLEM.replace(rows=5)).hash != spec(PROBLEM.replace(negated=True)).hash


@needs_cxx
@pytest.mark.parametrize("negated", [False, True])
def test_it_runs_and_passes_the_checks(known, negated):
    problem = PROBLEM.replace(negated=negated)
    made, it = kernel.get(spec(problem)), call(problem)
    out, sums = torch.empty(300, 200), torch.empty(300)
    made.launch(it, {"out": out, "sums": sums})
    want = (-it.a if negated else it.a) * it.w[:, None]
    assert torch.equal(out, want) and torch.allclose(sums, want.sum(1), atol=1e-4)
    made.launch(it, {"out": out.zero_()})
    assert torch.equal(out, want)
    assert checks.compare(made, problem, HERE)[1] == ""


@needs_cxx
@pytest.mark.parametrize(
    ("style", "words"),
    [
        ("wrong", "out: error"),
        ("beside", "wrote outside of out"),
        ("into_w", "wrote into its input w"),
        ("unwritten", "out is nan"),
    ],
)
def test_the_shared_checks_catch_a_broken_one(known, style, words):
    assert words in checks.compare(kernel.get(spec(style=style, unroll=1)), PROBLEM, HERE)[1]


@needs_cxx
def test_a_call_that_the_kernel_would_read_astray_is_refused(known):
    made, it = kernel.get(spec()), call()
    good, sums = torch.empty(300, 200), torch.empty(300)
    refused = [
        (it, {}, "the outputs must be out, sums or out"),
        (it, {"out": good, "lse": sums}, "the outputs must be"),
        (it, {"sums": sums}, "the outputs must be"),
        (it, {"out": torch.empty(200, 300)}, "out must be torch.float32"),
        (it, {"out": good.double()}, "out must be torch.float32"),
        (it, {"out": good, "sums": torch.empty(600)[::2]}, "its last dimension contiguous"),
        (ScalingCall(it.a, it.w[:-1]), {"out": good}, "a must be float32"),
        (ScalingCall(it.a, it.w, negated=True), {"out": good}, "the kernel is for row_scaling/fp32"),
    ]
    for wrong, outputs, words in refused:
        with pytest.raises(InvalidArgument, match=words):
            made.launch(wrong, outputs)


# ---- tune, record, dispatch -----------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_cxx
def test_it_is_tuned_recorded_and_dispatched(known, monkeypatch):
    """By the tuner's own workers, which find the op by the variable."""
    monkeypatch.setattr(final_round, "SECONDS", 0.3)
    report = fagen.tune(PROBLEM, trials=5, budget=120, target=HERE, workers=1, seed=1, quiet=True)
    (record,) = report.records
    assert record.problem == PROBLEM and record.family == "cpu_row_scaling" and record.config["style"] == "plain"
    assert record.torch_seconds > 0, "PyTorch was timed beside it"
    ends = {row["config"]["style"]: row["outcome"] for row in rows(report.run)}
    assert {end for style, end in ends.items() if style != "plain"} <= {"wrong", "compile"} and set(
        ends.values()
    ) <= set(OUTCOMES)
    assert ends["plain"] == "ok"

    (kept,) = store.Database.load().records
    assert kept == record == Record.from_dict(record.arch, record.device, json.loads(json.dumps(record.to_dict())))

    choice = choose.choose(PROBLEM, HERE)
    assert choice.provenance == "exact" and dict(choice.config) == record.config
    assert choose.choose(PROBLEM.replace(rows=301), HERE).provenance == "nearest"
    assert choose.choose(PROBLEM.replace(negated=True), HERE).provenance == "default"
    found = resolve.kernel_for(PROBLEM, HERE)
    assert dict(found.spec.config) == record.config
    assert resolve.kernel_for(PROBLEM.replace(rows=7), HERE).spec.config == found.spec.config
    it, out = call(), torch.empty(300, 200)
    found.launch(it, {"out": out})
    assert torch.equal(out, it.a * it.w[:, None])


# ---- emit -----------------------------------------------------------------------------------------------------------


@needs_cxx
def test_it_is_emitted_and_runs_without_fagen(known, tmp_path):
    it, made = spec(unroll=8), tmp_path / "made"
    manifest = emit.compile_all(it, made, emit.write(it, "chosen by hand", made))
    assert manifest["problem"] == PROBLEM.to_dict() and (made / "kernel.so").exists()
    for path in made.iterdir():
        assert path.suffix == ".so" or "ttention" not in path.read_text(), path.name
    with pytest.raises(UsageError, match="row scaling has no example program"):
        emit.example_text(it)

    main = made / "main.c"
    main.write_text(
        '#include <stdio.h>\n#include <string.h>\n#include "kernel.h"\n'
        "int main(void) {\n  float a[] = {1, 2, 3, 4}, w[] = {2, -1}, out[4];\n"
        "  fagen_row_scaling_params p = {.a = {a, {2}}, .out = {out, {2}}, .w = w, .rows = 2, .columns = 2};\n"
        "  if (strcmp(fagen_params_layout(), FAGEN_PARAMS_LAYOUT)) return 2;\n"
        "  int code = fagen_launch(&p, 0);\n"
        '  printf("%g %g %g %g\\n", out[0], out[1], out[2], out[3]);\n  return code;\n}\n'
    )
    compiler = str(toolchain.require_cxx())
    subprocess.run(
        [compiler, "-x", "c++", "-std=c++20", "main.c", "-x", "none", "./kernel.so", "-o", "main"], cwd=made, check=True
    )
    done = subprocess.run([made / "main"], cwd=made, check=True, capture_output=True, text=True)
    assert done.stdout == "2 4 -3 -4\n"

    library = ctypes.CDLL(str(made / "kernel.so"))
    a, w, out = torch.randn(3, 5), torch.randn(3), torch.empty(3, 5)
    params = OP.calls().params(ScalingCall(a, w), {"out": out})
    assert type(params) is abi.params(OP.header) and library.fagen_launch(ctypes.byref(params), None) == 0
    assert torch.equal(out, a * w[:, None])
