"""sm80_forward through nvcc, no GPU needed: five architectures, no spills in defaults, the rendered text itself."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.families import sm80_forward
from fagen.ops.attention.problem import Problem
from tests.compile.conftest import Facts
from tests.support.thorough import sample

FAMILY = sm80_forward.FAMILY
GOLDENS = Path(__file__).parent / "goldens"

# (arch, problem): each arch with each mask and head dim somewhere, each problem somewhere on each kind of arch
_MANY = {"batch": 8, "heads": 32}  # tiles of rows for every SM
_FEW = {"seqlen_q": 64, "seqlen_k": 4096}
PROBLEMS = {
    "d128-causal": Problem(head_dim=128, mask="causal", **_MANY),
    "d64-none": Problem(head_dim=64, **_MANY),
    "d256-causal-fp16": Problem(head_dim=256, mask="causal", dtype="fp16", **_MANY),
    "d192-128-window": Problem(head_dim=192, head_dim_v=128, mask="window", window_left=100, window_right=0, **_MANY),
    "d64-lower1": Problem(head_dim=64, mask="intervals", intervals="lower1", **_MANY),
    "d128-both4": Problem(head_dim=128, mask="intervals", intervals="both4", **_MANY),
    "d96-softcap-alibi": Problem(head_dim=96, softcap=True, alibi=True, **_MANY),
    "d80-unaligned": Problem(head_dim=80, aligned=False, **_MANY),
    "d256-causal-few": Problem(head_dim=256, mask="causal", **_FEW),
    "d128-both4-few": Problem(head_dim=128, mask="intervals", intervals="both4", **_FEW),
}
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SETS = [(arch, name) for i, arch in enumerate(ARCHS) for j, name in enumerate(PROBLEMS) if (i + j) % 3 == 0 or j < 1]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), sample(SETS, every=5))
def test_defaults_compile_without_spills(arch: str, name: str, device_facts: Facts) -> None:
    problem, where = PROBLEMS[name], target.known(arch)
    config = FAMILY.require(problem, where, FAMILY.default(problem, where))
    facts = device_facts(KernelSpec(FAMILY, problem, where, config), whole=(arch, name) == SETS[0])
    assert facts["spill_bytes"] == 0, (facts, config)
    assert 0 < facts["registers"] <= 255


@pytest.mark.parametrize("arch", ARCHS)
def test_every_legal_problem_has_a_legal_default(arch: str) -> None:
    where = target.known(arch)
    for d in range(16, 257, 16):
        for dv in (d, 16, 128, 256):
            for mask in ("none", "causal"):
                problem = Problem(head_dim=d, head_dim_v=dv, mask=mask)
                FAMILY.require(problem, where, FAMILY.default(problem, where))


@pytest.mark.parametrize("arch", ARCHS)
def test_few_rows_share_many_keys(arch: str) -> None:
    where = target.known(arch)
    found = {name: FAMILY.default(problem, where).splits for name, problem in PROBLEMS.items()}
    assert found == {name: "keys" if name.endswith("few") else "none" for name in PROBLEMS}
    few = PROBLEMS["d256-causal-few"]
    for other in (few.replace(seqlen_k=511), few.replace(heads=200), few.replace(seqlen_q=64 * 200, seqlen_k=64 * 200)):
        assert FAMILY.default(other, where).splits == "none"
    config = FAMILY.default(few, where)
    assert FAMILY.cost is not None
    assert FAMILY.cost(few, where, config) < FAMILY.cost(few, where, config.replace(splits="none")) / 4
    assert FAMILY.repeats(few.replace(heads=600), config) and not FAMILY.repeats(few, config)
    for changes in ({"partition": "pairs"}, {"loop_order": "kv_outer", "stages": 1}):
        broken = FAMILY.rejects(few, where, config.replace(**changes))  # type: ignore[arg-type]
        assert broken and broken[0] == "splitting_fits"


@pytest.mark.parametrize("name", ["d128-causal", "d64-lower1", "d96-softcap-alibi"])
def test_golden(name: str) -> None:
    """What Jinja writes, byte for byte. After a wanted change: FAGEN_UPDATE_GOLDENS=1, and read the diff."""
    problem, where = PROBLEMS[name], target.known("sm_90")
    text = KernelSpec(FAMILY, problem, where, FAMILY.default(problem, where)).rendered
    path = GOLDENS / f"{name}.cu"
    if os.environ.get("FAGEN_UPDATE_GOLDENS"):
        path.write_text(text)
    assert text == path.read_text()


def test_disagreement_with_python_is_a_compile_error() -> None:
    problem, where = Problem(head_dim=64), target.known("sm_80")
    config = FAMILY.default(problem, where)
    job = make_job(KernelSpec(FAMILY, problem, where, config))
    wrong = job.source.replace(f"smem_bytes = {sm80_forward.smem_bytes(problem, config)}", "smem_bytes = 1024")
    assert wrong != job.source
    with pytest.raises(cache.BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))
