"""sm80_backward through nvcc, no GPU needed: five architectures, no spills in defaults."""

from __future__ import annotations

import dataclasses

import pytest

from fagen import target
from fagen.build import cache
from fagen.build.job import make_job
from fagen.codegen.spec import KernelSpec
from fagen.families import sm80_backward
from fagen.ops.attention.backward import BackwardProblem
from tests.compile.conftest import Facts
from tests.support.thorough import sample

FAMILY = sm80_backward.FAMILY

PROBLEMS = {
    "d128-causal": BackwardProblem(head_dim=128, mask="causal"),
    "d64-none": BackwardProblem(head_dim=64),
    "d64-causal-fp16": BackwardProblem(head_dim=64, mask="causal", dtype="fp16"),
    "d128-window": BackwardProblem(head_dim=128, mask="window", window_left=100, window_right=0),
    "d64-lower1": BackwardProblem(head_dim=64, mask="intervals", intervals="lower1"),
    "d128-both4": BackwardProblem(head_dim=128, mask="intervals", intervals="both4"),
    "d96-softcap-alibi": BackwardProblem(head_dim=96, softcap=True, alibi=True),
    "d80-unaligned": BackwardProblem(head_dim=80, aligned=False),
    "d128-deterministic": BackwardProblem(head_dim=128, mask="causal", deterministic=True),
    "d192-128-none": BackwardProblem(head_dim=192, head_dim_v=128),
    "d256-none": BackwardProblem(head_dim=256),
}
ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
NAMES = tuple(PROBLEMS)
# each problem somewhere, the most common ones everywhere
SETS = [(arch, name) for i, arch in enumerate(ARCHS) for j, name in enumerate(NAMES) if (i + j) % 5 == 0 or j < 2]
# large head dims may keep some words of loop state in local memory (docs/notes/sm80_backward.md)
_LOOSE = {"d192-128-none": 128, "d256-none": 128}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), sample(SETS, every=5))
def test_defaults_compile_without_spills(arch: str, name: str, device_facts: Facts) -> None:
    problem, where = PROBLEMS[name], target.known(arch)
    config = FAMILY.require(problem, where, FAMILY.default(problem, where))
    functions = device_facts(KernelSpec(FAMILY, problem, where, config), whole=(arch, name) == SETS[0])["functions"]
    assert {"prologue_kernel", "main_kernel", "dq_kernel"} <= set(functions)
    for function, facts in functions.items():
        assert facts["spill_bytes"] <= _LOOSE.get(name, 0), (function, facts, config)
    threads = FAMILY.derive(problem, where, config)["threads"]
    assert functions["main_kernel"]["registers"] * threads * config.blocks_per_sm <= 65536
    assert functions["main_kernel"]["registers"] > sm80_backward.fragment_registers(problem, config)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"v_source": "registers"}, {"gqa": "atomics"}], ids=str)
def test_other_routes_compile(changes: dict[str, str], device_facts: Facts) -> None:
    problem, where = BackwardProblem(head_dim=64), target.known("sm_80")
    config = FAMILY.default(problem, where).replace(**changes)
    functions = device_facts(KernelSpec(FAMILY, problem, where, config))["functions"]
    assert functions["dkv_kernel"]["registers"] > 8 or "gqa" not in changes, "dkv_kernel has work to do"


@pytest.mark.parametrize(
    ("fact", "route"), [("smem_bytes", "atomics"), ("threads", "atomics"), ("dq_smem_bytes", "own_kernel")]
)
def test_disagreement_with_python_is_a_compile_error(fact: str, route: str) -> None:
    problem, where = BackwardProblem(head_dim=64, deterministic=route == "own_kernel"), target.known("sm_80")
    spec = KernelSpec(FAMILY, problem, where, FAMILY.default(problem, where))
    job = make_job(spec)
    wrong = job.source.replace(f" {fact} = {spec.derived[fact]};", f" {fact} = 1024;")
    assert wrong != job.source
    with pytest.raises(cache.BuildError, match="Python and CUDA disagree"):
        cache.make(dataclasses.replace(job, source=wrong))
