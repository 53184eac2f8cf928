"""compute-sanitizer over a small set: no byte out of bounds, no shared-memory hazard.

racecheck does not follow two ways of waiting: a lane that arrives for its warp behind `__syncwarp()`, and `bar.arrive`.
It reports kernels of `racecheck.cu` that are right. Of our kernels that wait so, it may report the accesses that
`UNFOLLOWED` names, and no others.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
MMA_SYNC = """
from tests.support.cases import Case, run
for name in "base one_stage q_in_registers overlap kv_outer split_k split_k_kv_outer pairs pairs_one_stage".split():
    for mask in ("causal", "none"):
        assert run(Case(name, mask=mask), 70, 99)
assert run(Case("base", mask="window", window=(20, 10)), 99, 70)
assert run(Case("base", mask="intervals", intervals="both4"), 70, 99)
assert run(Case("base", mask="none", aligned=False, head_dim=50), 70, 99)
assert run(Case("base", head_dim=80), 70, 99)
print("all right")
"""
WGMMA = """
from tests.support.cases import Case, run
for name in ("tma", "tma_one_group", "tma_three_groups", "tma_serial", "tma_shared_weights", "tma_packed"):
    assert run(Case(name), 270, 299)
assert run(Case("tma_packed", heads=6), 270, 299) and run(Case("tma_split_packed", heads=14), 70, 299)
assert run(Case("tma_three_stages"), 270, 299) and run(Case("tma_pair", mask="none", head_dim=128), 270, 299)
assert run(Case("tma", head_dim=80, mask="none"), 70, 99)
print("all right")
"""
LARGE = """
from tests.support.cases import Case, run
for name in ("large", "large_pair", "large_split", "large_serial"):
    assert run(Case(name, mask="window", window=(90, 20), head_dim=512), 70, 299)
assert run(Case("large_rows", head_dim=320), 270, 299)
assert run(Case("large_peers", head_dim=384), 270, 299)
print("all right")
"""
INTERVALS = """
from tests.support.cases import Case, run
assert run(Case("tma", mask="intervals", intervals="both4"), 70, 299)
print("all right")
"""
SIMT = """
from tests.support.cases import run
from tests.support.simt import HEAD_DIMS, Case
for name in "base small wide three_stages registers whole_tiles streamed many_lanes".split():
    assert run(Case(name, head_dim=HEAD_DIMS.get(name, 64)), 70, 99)
assert run(Case("base", mask="intervals", intervals="both4"), 70, 99)
assert run(Case("base", mask="none", aligned=False, head_dim=50), 70, 99)
print("all right")
"""
BACKWARD = """
from tests.gpu.test_sm80_backward import check
from tests.support.backward import Case
for name in ("base", "held", "own_dq", "held_own_dq", "one_stage", "held_one_stage", "v_held", "gqa_sums"):
    check(Case(name, sizes=((70, 99),)))
check(Case("base", mask="intervals", intervals="both4", sizes=((99, 70),)))
check(Case("own_dq", mask="intervals", intervals="both4", sizes=((99, 70),)))
check(Case("base", mask="none", aligned=False, head_dim=50, sizes=((70, 99),)))
print("all right")
"""
SIMT_BACKWARD = """
from tests.gpu.test_simt_backward import HERE
from tests.support.simt_backward import HEAD_DIMS, Case
for name in "base small wide three_stages registers many_lanes".split():
    HERE.check(Case(name, head_dim=HEAD_DIMS.get(name, 64), sizes=((70, 99),)))
HERE.check(Case("base", mask="intervals", intervals="both4", sizes=((99, 70),)))
HERE.check(Case("base", mask="none", aligned=False, head_dim=50, sizes=((70, 99),)))
print("all right")
"""
FP32_BACKWARD = """
from tests.gpu.test_sm80_backward_fp32 import HERE
from tests.support.fp32_backward import HEAD_DIMS, Case
for name in "base small two_passes two_slabs one_stage eight".split():
    HERE.check(Case(name, head_dim=HEAD_DIMS.get(name, 64), sizes=((70, 99),)))
HERE.check(Case("base", mask="intervals", intervals="both4", sizes=((99, 70),)))
HERE.check(Case("base", mask="none", aligned=False, head_dim=50, sizes=((70, 99),)))
print("all right")
"""
SM90_BACKWARD = """
from tests.families.test_emulated_sm90_backward import Case, ONE_STAGE
from tests.gpu.test_sm90_backward import check
for name in ("base", "held_v", "red", "three_groups", "first_owner", "loader", "shared", "shared_red", "last_block"):
    check(Case(name), 150, 199)
check(Case("base", mask="intervals", intervals="both4"), 199, 150)
check(Case("base", deterministic=True), 150, 199)
check(Case("shared_red", head_dim=256, changes=(("tile_n", 80), *ONE_STAGE)), 70, 99)
print("all right")
"""
DECODE = """
from tests.gpu.test_sm80_decode import FP8, sanitize
from tests.support.decode import Case
for name in ("base", "last_block", "one_warp", "columns", "columns_64", "eight_warps"):
    sanitize(Case(name, page=16, mask="window", sinks=True))
sanitize(Case("base", page=1, **FP8))
sanitize(Case("columns", page=64, head_dim=192, head_dim_v=128, shared_kv=True))
sanitize(Case("base", aligned=False, head_dim=50))
print("all right")
"""
HOPPER_DECODE = """
from tests.gpu import test_sm90_decode, test_sm90_decode_mla
from tests.support import decode90, mla
test_sm90_decode_mla.sanitize(mla.Case(cluster=2, prefetch=1))
test_sm90_decode_mla.sanitize(mla.Case(page=16, mask="causal", rescale="each"))
test_sm90_decode.sanitize(decode90.Case(tile_m=128))
test_sm90_decode.sanitize(decode90.Case(page=64, mask="window", head_dim=128, stages=3, sinks=True))
print("all right")
"""
LARGE_BACKWARD = """
from tests.gpu.test_sm90_backward_large import check
from tests.support.large_backward import Case
for name in ("base", "pair", "streamed", "peers"):
    assert check(Case(name, head_dim=768 if name == "peers" else 384, heads=4, kv_heads=2), 70, 199)
assert check(Case("default", head_dim=320, mask="intervals", intervals="both4"), 70, 99)
print("all right")
"""
FP8 = """
from tests.gpu.test_sm90_forward_fp8 import kernel_of
from tests.support.fp8 import Case, run
for case in map(Case, ("base", "turns", "two_tiles")):
    assert run(case, 150, 199, kernel_of(case).launch)
print("all right")
"""
IDS = {
    MMA_SYNC: "sm80", BACKWARD: "sm80-backward", WGMMA: "sm90", INTERVALS: "sm90-intervals",
    SM90_BACKWARD: "sm90-backward", SIMT: "simt", SIMT_BACKWARD: "simt-backward", DECODE: "sm80-decode",
    FP32_BACKWARD: "fp32-backward",
    HOPPER_DECODE: "sm90-decode",
    LARGE: "sm90-large",
    LARGE_BACKWARD: "sm90-large-backward",
    FP8: "sm90-fp8",
}  # fmt: skip

# Pairs of functions whose accesses are ordered in a way that racecheck does not follow.
_COPIES = ("bulk_load", "backward_kernel")  # rows' stats, parts of dQ: stages that a warp's first lane frees or fills
UNFOLLOWED = {
    SM90_BACKWARD: {
        *((copy, read) for copy in _COPIES for read in ("ld_shared_8", "ld_shared_4", "st_shared_16")),
        ("ld_shared_16", "st_shared_16"),
    },
    LARGE_BACKWARD: {("bulk_load", "ld_shared_8")},
    HOPPER_DECODE: {("st_shared_4", "ld_shared_4")},  # references of one warpgroup for the other, by bar.arrive
}


def reported(report: str) -> set[tuple[str, str]]:
    """The pairs of functions of which racecheck reports accesses."""
    found = set()
    for block in report.split("Race reported between ")[1:]:
        first, *others = re.findall(r"(?:Read|Write) access at (?:\w+::)*(\w+)", block)
        found |= {(first, other) for other in others}
    return found


def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not Path(TOOL).exists(), reason="compute-sanitizer is not found")
@pytest.mark.parametrize(
    ("check", "kernels"),
    [
        ("memcheck", MMA_SYNC),
        ("racecheck", MMA_SYNC),
        ("memcheck", SIMT),
        ("racecheck", SIMT),
        ("memcheck", BACKWARD),
        ("racecheck", BACKWARD),
        ("memcheck", DECODE),
        ("racecheck", DECODE),
        ("memcheck", SIMT_BACKWARD),
        ("racecheck", SIMT_BACKWARD),
        ("memcheck", FP32_BACKWARD),
        ("racecheck", FP32_BACKWARD),
        ("memcheck", SM90_BACKWARD),
        ("racecheck", SM90_BACKWARD),
        ("memcheck", WGMMA),
        ("racecheck", WGMMA),
        ("memcheck", LARGE),
        ("racecheck", LARGE),
        ("memcheck", HOPPER_DECODE),
        ("racecheck", HOPPER_DECODE),
        ("memcheck", LARGE_BACKWARD),
        ("racecheck", LARGE_BACKWARD),
        ("memcheck", FP8),
        ("racecheck", FP8),
        ("memcheck", INTERVALS),
        ("racecheck", INTERVALS),
    ],
    ids=lambda x: IDS.get(x, x),
)
def test_sanitizer(check: str, kernels: str) -> None:
    if kernels not in (MMA_SYNC, SIMT, BACKWARD, SIMT_BACKWARD, FP32_BACKWARD, DECODE) and not _hopper():
        pytest.skip("needs Hopper")
    # With intervals all kernels: racecheck fails of itself where of two that overlap it follows the second only.
    ours = (
        "fagen"
        if kernels in (BACKWARD, SIMT_BACKWARD, FP32_BACKWARD, SM90_BACKWARD, LARGE_BACKWARD, DECODE, HOPPER_DECODE)
        else "forward_kernel"
    )
    only = "" if kernels is INTERVALS else f"--kernel-regex kns={ours}"
    options = f"--tool {check} --error-exitcode 9 {only}"
    if check == "racecheck":
        options += " --racecheck-report analysis --print-limit 100000"
    command = [TOOL, *options.split(), sys.executable, "-c", kernels]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=Path(__file__).parents[2])
    pairs = reported(done.stdout) if check == "racecheck" else set()
    assert pairs <= UNFOLLOWED.get(kernels, set()), pairs
    assert (done.returncode == 0 or pairs) and "all right" in done.stdout, (done.stdout + done.stderr)[-3000:]


@pytest.mark.skipif(not Path(TOOL).exists(), reason="compute-sanitizer is not found")
def test_what_racecheck_does_not_follow(tmp_path: Path) -> None:
    """Were it to follow more, `UNFOLLOWED` could shrink."""
    if not _hopper():
        pytest.skip("needs Hopper")
    source, program = Path(__file__).with_name("racecheck.cu"), tmp_path / "racecheck"
    subprocess.run(["nvcc", "-arch=sm_90a", "-std=c++17", "-o", program, source], check=True)
    followed = {}
    for name in ("copies_each", "copies_lane", "stores_each", "stores_lane", "box_sync", "box_arrive", "raced"):
        command = [TOOL, "--tool", "racecheck", "--error-exitcode", "9", "--kernel-regex", f"kns={name}", program]
        followed[name] = subprocess.run(command, capture_output=True).returncode == 0
    assert followed == {
        "copies_each": True, "copies_lane": False, "stores_each": True, "stores_lane": False,
        "box_sync": True, "box_arrive": False, "raced": False,
    }  # fmt: skip
