"""benchmarks/moved_params.py: a field may lie elsewhere. Every other change of an instruction is a difference."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fagen.errors import FagenError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "moved_params.py"
BEFORE = (
    "typedef struct fagen_params {\n"
    "  const void* q;  // the rows\n  int64_t q_stride;\n  int32_t n, m;\n} fagen_params;\n"
)
AFTER = (
    "typedef struct fagen_tensor {\n  void* data;\n  int64_t stride[3];\n} fagen_tensor;\n"
    "typedef struct fagen_forward_params {\n  fagen_tensor q;\n  int32_t n, m;\n} fagen_forward_params;\n"
)
RENAMED = {"q": "q.data", "q_stride": "q.stride"}
# field: q 210 -> 210, stride 218 -> 218, n 220 -> 230, m 224 -> 234; the second argument: 0x80 -> 0x100
BEGIN, SIZES = 0x210, (24, 40)


def encoded(place: int = 0, number: int = 0, opcode: int = 0xB82) -> str:
    word = opcode | place << 38 | number << 32
    return f"{word & (1 << 64) - 1:#018x} 0x000fe20000000800"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("moved_params", SCRIPT)
    assert spec is not None and spec.loader is not None
    made = sys.modules["moved_params"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def compared(script: ModuleType, one: list, other: list) -> str:
    before = script.Layout.of(BEFORE, script.Arguments(BEGIN, ((0, SIZES[0]), (0x80, 64))), RENAMED)
    after = script.Layout.of(AFTER, script.Arguments(BEGIN, ((0, SIZES[1]), (0x100, 64))), {})
    return script.difference(one, other, before, after)


def load(place: int, width: str = "") -> tuple[str, str]:
    return f"LDC{width} R2, c[0x0][{place:#x}]", encoded(place=place)


def number(value: int, opcode: str = "UMOV UR4,") -> tuple[str, str]:
    return f"{opcode} {value:#x}", encoded(number=value)


def at(register: str, displacement: int) -> tuple[str, str]:
    return f"LDC R2, c[0x0][{register}+{displacement:#x}]", encoded(place=displacement)


SAME = {
    "a field elsewhere": ([load(0x220)], [load(0x230)]),
    "a field where it was": ([load(0x218, ".64")], [load(0x218, ".64")]),
    "half of a field": ([load(0x21C)], [load(0x21C)]),
    "two fields that stay neighbours": ([load(0x220, ".64")], [load(0x230, ".64")]),
    "what the driver puts there": ([load(0x28)], [load(0x28)]),
    "a later argument": ([load(0x210 + 0x84)], [load(0x210 + 0x104)]),
    "the address of a later argument": ([number(0x88)], [number(0x108)]),
    "any other number": ([number(0x220)], [number(0x220)]),
    "behind an address": ([number(0x88), at("UR4", 0x218)], [number(0x108), at("UR4", 0x218)]),
    "the zero register": ([("LDC R9, c[0x0][RZ]", encoded())], [("LDC R9, c[0x0][RZ]", encoded())]),
}
OTHER = {
    "another field": ([load(0x220)], [load(0x234)]),
    "the old place of a field that moved": ([load(0x220)], [load(0x220)]),
    "neighbours that were parted": ([load(0x218, ".128")], [load(0x218, ".128")]),
    "a place behind all arguments": ([load(0x210 + 0x200)], [load(0x210 + 0x200)]),
    "a gap between arguments": ([load(0x210 + 0x40)], [load(0x210 + 0x40)]),
    "another part of a later argument": ([load(0x210 + 0x84)], [load(0x210 + 0x108)]),
    "what the driver puts there": ([load(0x28)], [load(0x2C)]),
    "a number that is no address": ([number(0x20)], [number(0x30)]),
    "a number for another part": ([number(0x88)], [number(0x10C)]),
    "another register": ([("MOV R1, R2", encoded())], [("MOV R1, R3", encoded())]),
    "another encoding": ([("MOV R1, R2", encoded())], [("MOV R1, R2", encoded(opcode=0xB83))]),
    "another encoding beside a moved field": ([load(0x220)], [(load(0x230)[0], encoded(0x230, opcode=0xB83))]),
    "another opcode": ([load(0x220)], [load(0x230, ".64")]),
    "one more": ([load(0x220)], [load(0x230), load(0x230)]),
    "another order": ([load(0x220), number(1)], [number(1), load(0x230)]),
    "by a register that is no address": ([number(7), at("UR4", 0x218)], [number(7), at("UR4", 0x218)]),
    "far behind an address": ([number(0x88), at("UR4", 0x240)], [number(0x108), at("UR4", 0x240)]),
    "elsewhere behind an address": ([number(0x88), at("UR4", 0x218)], [number(0x108), at("UR4", 0x21C)]),
}


@pytest.mark.parametrize("name", SAME)
def test_moved_params_are_the_same_code(script: ModuleType, name: str) -> None:
    assert compared(script, *SAME[name]) == ""


@pytest.mark.parametrize("name", OTHER)
def test_anything_else_is_a_difference(script: ModuleType, name: str) -> None:
    assert compared(script, *OTHER[name])


def test_a_field_that_got_another_name_must_be_told(script: ModuleType) -> None:
    before = script.Layout.of(BEFORE, script.Arguments(BEGIN, ((0, 24),)), {})
    after = script.Layout.of(AFTER, script.Arguments(BEGIN, ((0, 40),)), {})
    assert script.difference([load(0x210, ".64")], [load(0x210, ".64")], before, after)


def test_an_argument_that_is_not_the_params_is_refused(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="is not fagen_params"):
        script.Layout.of(BEFORE, script.Arguments(BEGIN, ((0, 32),)), {})
    with pytest.raises(FagenError, match="not understood"):
        script.Layout.of(BEFORE.replace("int32_t n", "int n"), script.Arguments(BEGIN, ((0, 24),)), {})


def test_arguments_are_read_from_the_binary(script: ModuleType) -> None:
    """An ELF file with the one section that counts, beside its table of names."""

    def sized(attribute: int, payload: bytes) -> bytes:
        return struct.pack("<BBH", 4, attribute, len(payload)) + payload

    info = struct.pack("<BBH", 3, 0x1B, 0xFF)  # another attribute, without a payload
    info += sized(0x17, struct.pack("<IHHI", 0, 1, 0x80, 64 << 18 | 0x1F000))
    info += sized(0x17, struct.pack("<IHHI", 0, 0, 0, 40 << 18 | 0x1F000))
    info += sized(0x0A, struct.pack("<IHH", 5, 0x210, 0xC0))
    names = b"\0.shstrtab\0.nv.info\0.nv.info.one\0"
    parts, table, place = [names, b"junk", info], [], 64
    for text, part in zip((".shstrtab", ".nv.info", ".nv.info.one"), parts, strict=True):
        name = names.index(b"\0" + text.encode() + b"\0") + 1
        table.append(struct.pack("<IIQQQQIIQQ", name, 0, 0, 0, place, len(part), 0, 0, 0, 0))
        place += len(part)
    head = bytearray(64)
    struct.pack_into("<Q", head, 40, place)
    struct.pack_into("<HH", head, 60, len(table), 0)
    assert script.arguments_of(bytes(head) + b"".join([*parts, *table])) == {
        "one": script.Arguments(0x210, ((0, 40), (0x80, 64)))
    }
