"""A built kernel through ctypes: its struct is C's, it computes, and it refuses what would read or write astray."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fagen import build, env, families, kernel, target, toolchain, verify
from fagen.errors import InvalidArgument, LaunchError
from fagen.problem import Problem
from fagen.verify import Semantics

FAMILY = families.get("cpu_forward")
HERE = target.host()


def made(**fields: object) -> kernel.Kernel:
    problem = Problem(**{"dtype": "fp32", "head_dim": 16, **fields})  # type: ignore[arg-type]
    return kernel.get(FAMILY, problem, HERE, FAMILY.default(problem, HERE))


def tensors(b: int = 2, sq: int = 20, sk: int = 30, h: int = 4, hk: int = 2, d: int = 16, dv: int = 16) -> list:
    return [torch.randn(b, h, sq, d), torch.randn(b, hk, sk, d), torch.randn(b, hk, sk, dv), torch.empty(b, h, sq, dv)]


def test_params_is_the_struct_of_the_header(tmp_path: Path) -> None:
    names = [name for name, *_ in kernel.Params._fields_]
    lines = "".join(f'  printf("{n} %zu\\n", offsetof(fagen_params, {n}));\n' for n in names)
    source = f'#include "fagen/params.h"\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{\n{lines}'
    (tmp_path / "p.cpp").write_text(source + '  printf("size %zu\\n", sizeof(fagen_params));\n}\n')
    include = f"-I{env.data_dir('templates') / 'include'}"
    command = [str(toolchain.require_cxx()), include, str(tmp_path / "p.cpp"), "-o", str(tmp_path / "p")]
    subprocess.run(command, check=True)
    out = subprocess.run([tmp_path / "p"], capture_output=True, text=True, check=True).stdout
    theirs = dict(line.split() for line in out.splitlines())
    ours = {name: str(getattr(kernel.Params, name).offset) for name in names}
    assert theirs == ours | {"size": str(ctypes.sizeof(kernel.Params))}
    header = (env.data_dir("templates") / "include/fagen/params.h").read_text()
    fields = re.sub(r"//[^\n]*", "", header).partition("{")[2].partition("}")[0]
    assert re.findall(r"(\w+)(?:\[3\])?[,;]", fields) == names


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_launches(layout: str) -> None:
    q, k, v, out = tensors()
    lse = torch.empty(2, 4, 20)
    given = [t.transpose(1, 2) if layout == "bshd" else t for t in (q, k, v, out)]
    assert made().launch(*given, lse, layout=layout) is given[3]
    assert verify.check(out, lse, q, k, v, Semantics())


def test_bound_once_launched_often() -> None:
    q, k, v, out = tensors()
    call = made(mask="causal").bind(q, k, v, out)
    for _ in range(2):
        q.normal_()
        call()
        assert verify.check(out, None, q, k, v, Semantics((-1, 0)))


def test_facts_and_repetition() -> None:
    first, second = made(), made()
    assert first.facts["compile_seconds"] > 0
    assert first.library is second.library and first.artifact == second.artifact


def _half(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.bfloat16)


REFUSED: list[tuple[str, Callable[[list], tuple[list, dict]]]] = [
    ("q is torch.bfloat16", lambda t: ([_half(t[0]), *t[1:]], {})),
    ("out is torch.float64", lambda t: ([*t[:3], t[3].double()], {})),
    ("4 dimensions", lambda t: ([t[0][0], *t[1:]], {})),
    ("last one contiguous", lambda t: ([t[0], t[1].mT.contiguous().mT, *t[2:]], {})),
    ("v has the wrong shape", lambda t: ([t[0], t[1][:, :, :-1], *t[2:]], {})),
    ("k has the wrong shape", lambda t: ([t[0], t[1][..., :12], *t[2:]], {})),
    ("out has the wrong shape", lambda t: ([*t[:3], t[3][:, :, :-1]], {})),
    ("multiple of kv_heads", lambda t: ([t[0][:, :3], t[1], t[2], t[3][:, :3]], {})),
    ("head_dim", lambda t: ([torch.randn(2, 4, 20, 32), torch.randn(2, 2, 30, 32), *t[2:]], {})),
    ("not aligned", lambda t: ([torch.randn(2, 4, 20, 17)[..., :16], *t[1:]], {})),
    ("lse must have shape (2, 4, 20)", lambda t: ([*t, torch.empty(2, 20, 4)], {})),
    ("intervals", lambda t: (t, {"intervals": torch.zeros(2, 1, 30, 1, dtype=torch.int32)})),
    ("alibi_slopes", lambda t: (t, {"alibi_slopes": torch.zeros(4)})),
    ("softcap=3.0", lambda t: (t, {"softcap": 3.0})),
    ("window=(3, 0)", lambda t: (t, {"window": (3, 0)})),
    ("layout 'sbhd'", lambda t: (t, {"layout": "sbhd"})),
]


@pytest.mark.parametrize(("words", "change"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refuses(words: str, change: Callable) -> None:
    arguments, options = change(tensors())
    with pytest.raises(InvalidArgument) as caught:
        made().launch(*arguments, **options)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "intervals",
    [
        torch.zeros(2, 1, 30, 1, dtype=torch.int64),
        torch.zeros(2, 1, 30, 2, dtype=torch.int32),
        torch.zeros(2, 1, 29, 1, dtype=torch.int32),
        torch.zeros(2, 4, 30, 1, dtype=torch.int32),
        torch.zeros(3, 1, 30, 1, dtype=torch.int32),
        None,
    ],
)
def test_refuses_intervals_that_do_not_fit(intervals: torch.Tensor | None) -> None:
    masked = made(mask="intervals", intervals="lower1")
    with pytest.raises(InvalidArgument, match="intervals"):
        masked.launch(*tensors(), intervals=intervals)


def test_a_kernel_of_another_machine_is_refused() -> None:
    there = dataclasses.replace(made(), artifact=dataclasses.replace(made().artifact, arch="sm_90"))
    with pytest.raises(InvalidArgument, match="q is on cpu"):
        there.launch(*tensors())


# ---- libraries that are not what they should be -------------------------------------------------------------------

HEAD = '#include <stdint.h>\nstruct fagen_params;\nextern "C" {\n'
TAIL = (
    "uint64_t fagen_workspace_bytes(const fagen_params*) { return NEED; }\n"
    "uint32_t fagen_params_size(void) { return SIZE; }\n}\n"
)


def library(body: str, size: int = ctypes.sizeof(kernel.Params), need: int = 0) -> kernel.Kernel:
    source = HEAD + body + TAIL.replace("SIZE", str(size)).replace("NEED", str(need))
    artifact = build.make(build.Job("odd", source, ".cpp", ("-O1",), (), "cpu"))
    problem = Problem(dtype="fp32", head_dim=16)
    return kernel.load(artifact, FAMILY, problem, FAMILY.default(problem, HERE))


FAILS = (
    "int fagen_launch(const fagen_params*, void*) { return 7; }\n"
    'const char* fagen_error(int e) { return "out of luck"; }\n'
)


def test_a_failed_launch_says_why() -> None:
    with pytest.raises(LaunchError, match="out of luck") as caught:
        library(FAILS).launch(*tensors())
    assert len(str(caught.value).splitlines()) <= 3


def test_another_struct_is_refused() -> None:
    with pytest.raises(LaunchError, match="another fagen_params"):
        library(FAILS, size=8)


def test_a_library_without_our_functions_is_refused() -> None:
    artifact = build.make(build.Job("empty", "int x;\n", ".cpp", (), (), "cpu"))
    with pytest.raises(LaunchError, match="cannot be loaded"):
        kernel.load(artifact, FAMILY, Problem(dtype="fp32", head_dim=16), made().config)


def test_workspace_is_aligned_and_large_enough() -> None:
    body = (
        "int fagen_launch(const fagen_params* p, void*) { char* w = ((char* const*)p)[7];\n"
        "  if ((uintptr_t)w % 256) return 1; for (int i = 0; i < 5000; i++) w[i] = 1; return 0; }\n"
        'const char* fagen_error(int) { return "not aligned"; }\n'
    )
    needy = library(body, need=5000)
    needy.launch(*tensors())
    with pytest.raises(InvalidArgument, match="5000 bytes"):
        needy.launch(*tensors(), workspace=torch.empty(4999, dtype=torch.uint8))


def test_ptxas_facts_are_the_worst_of_all_kernels() -> None:
    log = """
ptxas info    : Compiling entry function '_Z1av' for 'sm_90'
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers
"""
    assert build.parse_ptxas(log) == {"stack": 16, "spill_bytes": 20, "registers": 168, "smem_bytes": 1024}
    assert build.parse_ptxas("nothing of the kind") == {}


def test_what_counts_as_aligned() -> None:
    t = torch.zeros(2, 8, 4, 16, dtype=torch.bfloat16)
    assert kernel.is_aligned(t) and kernel.is_aligned(t.transpose(1, 2)) and kernel.is_aligned(t[:, ::2])
    assert not kernel.is_aligned(t[..., :12]) and not kernel.is_aligned(t[..., 1:9])
    assert not kernel.is_aligned(t[:, :, :1].expand(2, 8, 4, 16))
    assert kernel.is_aligned(t[:1, :, :1].as_strided((1, 8, 1, 16), (0, 64, 3, 1)))  # dimensions of one never step
