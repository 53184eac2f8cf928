"""benchmarks/disassembly.py on listings: which part of them counts. tests/compile runs it on a kernel."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "disassembly.py"
LISTING = """
//--------------------- .text.{name} --------------------------
	.section	.text.{name},"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=24"
{name}:
.text.{name}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
.L_x_{label}:
        /*0010*/                   UMOV UR4, 32@lo({name}) ;               /* 0x0000000000047882 */
                                                                           /* 0x000fca0000000000 */
        /*0020*/              @!P0 FADD.FTZ R2, R2, R{register} ;          /* 0x{encoding} */
                                                                           /* 0x000fca0000000000 */
        /*0030*/                   BRA `(.L_x_{label});                    /* 0xfffffff000007947 */
                                                                           /* 0x000fc0000383ffff */
	.section	.nv.info,"",@"SHT_CUDA_INFO"
        /*0000*/ 	.byte	0x04, 0x2f, 0x08, 0x00
"""  # noqa: E101, W191 - as nvdisasm writes it


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("disassembly", SCRIPT)
    assert spec is not None and spec.loader is not None
    made = sys.modules["disassembly"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def listing(name: str = "_Z3oneiPf", label: int = 7, register: int = 3, encoding: str = "0000000302027221") -> str:
    return LISTING.format(name=name, label=label, register=register, encoding=encoding)


def snapshot(script: types.ModuleType, *listings: str) -> dict:
    functions = [script.summary(*item) for text in listings for item in script.normalised(text).items()]
    return {"kernel": [vars(f) for f in functions]}


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_Z14forward_kernel12fagen_params6Launch", "forward_kernel"),
        ("_ZN5fagen14forward_kernelE12fagen_paramsNS_6LaunchE", "forward_kernel"),
        ("_ZN5fagen4sm904planEi", "plan"),
        ("plain", "plain"),
    ],
)
def test_a_function_is_known_by_its_own_name(script: types.ModuleType, symbol: str, name: str) -> None:
    assert script.plain_name(symbol) == name


def test_names_labels_and_addresses_do_not_count(script: types.ModuleType) -> None:
    ((name, code),) = script.normalised(listing()).items()
    assert name == "one" and [text for text, _ in code] == [
        "LDC R1, c[0x0][0x28]",
        "UMOV UR4, 32@lo(<symbol>)",
        "@!P0 FADD.FTZ R2, R2, R3",
        "BRA `(<label 0>)",
    ]
    assert code[0][1] == "0x00000a00ff017b82 0x000fe20000000800"
    function = script.summary(name, code)
    assert function.instructions == 4 and function.opcodes == {"BRA": 1, "FADD": 1, "LDC": 1, "UMOV": 1}
    renamed = script.normalised(listing("_ZN5fagen5otherEiPf", label=40))
    assert script.summary("other", renamed["other"]).hash == function.hash


def test_registers_encodings_and_order_count(script: types.ModuleType, capsys: pytest.CaptureFixture) -> None:
    before = snapshot(script, listing())
    assert script.compare(before, snapshot(script, listing("_ZN1n3twoEv", label=1)), True) == 0
    assert "identical  kernel: one -> two" in capsys.readouterr().out
    lines = listing().splitlines()
    first = next(i for i, line in enumerate(lines) if "/*0000*/" in line)
    moved = "\n".join([*lines[:first], *lines[first + 3 : first + 5], *lines[first : first + 3], *lines[first + 5 :]])
    extra = listing().replace("\t.section\t.nv", "/*0040*/ NOP; /* 0x0000000000007918 */\n\t.section\t.nv")
    for text, said in (
        (listing(register=5), "different"),
        (listing(encoding="0000000302027321"), "reordered"),  # its scheduling
        (moved, "reordered"),
        (extra, "different  kernel: one 4 -> 5 instructions (+1), NOP +1"),
    ):
        assert script.compare(before, snapshot(script, text), False) == 1
        assert said in capsys.readouterr().out


def test_resources_count_and_functions_may_move(script: types.ModuleType, capsys: pytest.CaptureFixture) -> None:
    one, two = listing(), listing("_Z3twov", register=9)
    assert script.compare(snapshot(script, one, two), snapshot(script, two, one), False) == 0
    before, after = snapshot(script, one), snapshot(script, one)
    after["kernel"][0]["spill_bytes"] = 8
    assert script.compare(before, after, False) == 1 and "8 spilled" in capsys.readouterr().out
    assert script.compare(before, snapshot(script, one, two), False) == 1
    assert script.compare(before, {}, False) == 1 and "only before" in capsys.readouterr().out


def test_what_ptxas_says(script: types.ModuleType) -> None:
    log = """ptxas info    : Compiling entry function '_Z3onei' for 'sm_90a'
ptxas info    : Function properties for _Z3onei
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 28 bytes smem, 604 bytes cmem[0]
ptxas info    : Compile time = 2.702 ms
ptxas info    : Compiling entry function '_Z3twoi' for 'sm_90a'
ptxas info    : Used 4 registers, used 0 barriers
"""
    expected = {
        "one": ("168 registers, used 16 barriers, 28 bytes smem", 12),
        "two": ("4 registers, used 0 barriers", 0),
    }
    assert script.resources(log) == expected
