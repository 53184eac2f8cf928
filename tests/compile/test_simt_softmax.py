"""simt_softmax through nvcc, without a GPU: no spills in defaults, what Python and CUDA share, its constraints."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.families import simt_softmax
from fagen.families.space import enumerate_space
from fagen.ops.softmax.problem import SoftmaxProblem
from tests.compile.conftest import Facts
from tests.support.thorough import sample

FAMILY = simt_softmax.FAMILY
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# a length for each default, few rows and many
SIZES = ((9999, 100), (9999, 1500), (9999, 9000), (9999, 30_000), (9999, 300_000), (5, 300_000))
KINDS: tuple[dict[str, Any], ...] = (
    {"dtype": "bf16"}, {"dtype": "fp32", "log": True}, {"dtype": "fp16", "out_dtype": "fp32"},
    {"dtype": "fp16", "direction": "backward"}, {"dtype": "fp32", "out_dtype": "bf16", "direction": "backward"},
)  # fmt: skip
COLUMNS = [SoftmaxProblem(**kind, along="column", rows=n) for kind in KINDS for n in (50, 500)]
PROBLEMS = [SoftmaxProblem(**kind, rows=r, columns=c) for kind in KINDS for r, c in SIZES] + COLUMNS


@pytest.mark.parametrize("arch", ARCHS)
def test_every_problem_has_a_legal_default_and_first_guesses(arch: str) -> None:
    where = target.known(arch)
    for problem in PROBLEMS:
        FAMILY.require(problem, where, FAMILY.default(problem, where))
        for config in FAMILY.first_configs(problem, where):
            FAMILY.require(problem, where, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "problem"), sample([(arch, p) for p in PROBLEMS for arch in ("sm_80", "sm_90")], every=17), ids=str
)
def test_defaults_compile_without_spills(arch: str, problem: SoftmaxProblem, device_facts: Facts) -> None:
    where = target.known(arch)
    spec = KernelSpec(FAMILY, problem, where, FAMILY.default(problem, where))
    facts = device_facts(spec, whole=problem == PROBLEMS[0])
    assert facts["spill_bytes"] == 0 and 0 < facts["registers"] <= 128, facts


def test_disagreement_with_python_is_a_compile_error() -> None:
    problem, where = SoftmaxProblem(columns=100), target.known("sm_80")
    job = make_job(KernelSpec(FAMILY, problem, where, FAMILY.default(problem, where)))
    wrong = job.source.replace("block_threads = 128", "block_threads = 64")
    assert wrong != job.source
    with pytest.raises(cache.BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))


ROW, COLUMN = SoftmaxProblem(dtype="bf16"), SoftmaxProblem(dtype="bf16", along="column")
BACK = SoftmaxProblem(dtype="fp16", direction="backward")
BASE = {
    "scheme": "two_pass",
    "threads": 256,
    "lines": 1,
    "vector_bytes": 16,
    "held": 1,
    "cluster": 1,
    "fold_scale": False,
}
OF_COLUMNS = {"threads": 8, "lines": 32, "vector_bytes": 4}


@pytest.mark.parametrize(
    ("problem", "name", "words", "broken", "mended"),
    [
        (ROW, "block_fits", "1024 x 4 = 4096 threads", {"threads": 1024, "lines": 4}, {"threads": 128, "lines": 4}),
        (ROW, "block_fits", "32 x 1 = 32 threads", {"threads": 32}, {"threads": 32, "lines": 4}),
        (ROW, "coalesced", "1 thread a row", {"threads": 1, "lines": 128}, {"threads": 8, "lines": 128}),
        (COLUMN, "coalesced", "256 threads x 1 columns", {"vector_bytes": 4}, OF_COLUMNS),
        (COLUMN, "coalesced", "only repeats 4", {**OF_COLUMNS, "vector_bytes": 8}, OF_COLUMNS),
        (BACK, "one_way", "backward has no maximum", {"scheme": "three_pass"}, {}),
        (ROW, "one_way", "parts of one row", {"scheme": "split", "lines": 4}, {"scheme": "split"}),
        (ROW, "one_way", "holds nothing", {"held": 2}, {"scheme": "registers", "held": 2}),
        (ROW, "one_row", "clusters need sm_90", {"scheme": "registers", "cluster": 2}, {"scheme": "registers"}),
        (ROW, "folds", "bf16 times log2 e", {"fold_scale": True}, {}),
        (BACK, "folds", "cancels in the quotient", {"fold_scale": True}, {}),
        (ROW, "registers_fit", "32 > 16 registers", {"scheme": "registers", "threads": 1024, "held": 8},
         {"scheme": "registers", "threads": 1024, "held": 4}),
        (BACK, "smem_fits", "262144 > 158720 bytes", {"scheme": "shared", "threads": 1024, "held": 8},
         {"scheme": "shared", "threads": 1024, "held": 4}),
    ],
)  # fmt: skip
def test_a_constraint_says_no_with_its_numbers(
    problem: SoftmaxProblem, name: str, words: str, broken: dict[str, Any], mended: dict[str, Any]
) -> None:
    where = target.known("sm_80")
    told = FAMILY.rejects(problem, where, FAMILY.config({**BASE, **broken}))
    assert told is not None and told[0] == name and words in told[1], told
    assert FAMILY.rejects(problem, where, FAMILY.config({**BASE, **mended})) is None


def test_a_cluster_has_one_row_that_it_holds() -> None:
    hopper, knobs = target.known("sm_90"), {"scheme": "registers", "threads": 512, "cluster": 8}
    assert FAMILY.rejects(ROW, hopper, FAMILY.config({**BASE, **knobs})) is None
    for problem, changes, words in (
        (ROW, {"scheme": "two_pass"}, "holds nothing"), (ROW, {"threads": 128, "lines": 4}, "shares one row"),
        (COLUMN, OF_COLUMNS, "shares one row"),
    ):  # fmt: skip
        told = FAMILY.rejects(problem, hopper, FAMILY.config({**BASE, **knobs, **changes}))
        assert told is not None and told[0] == "one_row" and words in told[1]


@pytest.mark.slow
def test_a_cluster_compiles_without_spills(device_facts: Facts) -> None:
    hopper, knobs = target.known("sm_90"), {"scheme": "registers", "threads": 1024, "held": 4, "cluster": 8}
    facts = device_facts(KernelSpec(FAMILY, ROW, hopper, FAMILY.config({**BASE, **knobs})))
    assert facts["spill_bytes"] == 0 and facts["registers"] <= 64, facts


def test_folding_is_for_half_precision() -> None:
    half = SoftmaxProblem(dtype="fp16", out_dtype="fp32")
    assert FAMILY.rejects(half, target.known("sm_80"), FAMILY.config({**BASE, "fold_scale": True})) is None


@pytest.mark.parametrize("problem", [ROW, COLUMN, BACK], ids=str)
def test_the_space_is_what_the_constraints_leave(problem: SoftmaxProblem) -> None:
    where = target.known("sm_90")
    space = enumerate_space(FAMILY, problem, where)
    assert len(space.legal) + sum(space.removed.values()) == space.total == FAMILY.size()
    assert all(FAMILY.rejects(problem, where, config) is None for config in space.legal)
    assert FAMILY.default(problem, where) in space.legal


def test_what_it_cannot_serve() -> None:
    assert "needs a GPU" in str(FAMILY.supports(ROW, target.host()))
    assert "elements" in str(FAMILY.supports(ROW.replace(columns=(1 << 30) + 1), target.known("sm_80")))
