"""Whether two compilations of a device function differ only in where the fields of its params lie.

Nothing else may differ: the instructions are the same one by one, with the same registers and scheduling. An operand in
the constant bank must be the same bytes of the same field, by the layouts of the two sources' params, or of the same
later argument, by the two binaries' tables of arguments. An immediate may differ only where it is the offset of the
same byte of the same later argument: so a kernel finds what it takes the address of. An operand at a register's place
in the constant bank must lie equally far from it, by a few bytes, and the register must have got such an offset. Any
other difference counts.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fagen.ops import abi

Code = Sequence[tuple[str, str]]  # text and encoding of each instruction
Byte = tuple[str, int]  # a field or an argument, and which byte of it

_STRUCT = re.compile(r"typedef struct (fagen_\w+) \{[^{}]*\} \1;")
_OPERAND = re.compile(r"c\[0x0\]\[(?P<place>[^\]]*)\]|\b(?P<number>0x[0-9a-f]+)\b")
_PLACE = re.compile(r"(?:(?P<register>U?R\d+)\+)?(?P<offset>0x[0-9a-f]+)")
_WRITTEN = re.compile(r"(?:@!?\w+ )?\S+ (?P<register>U?R\d+)\b")  # by an instruction
_NEAR = 16  # bytes from the first that a register points to: what is further away may be an array's index in it
_PLACE_BITS = ((1 << 16) - 1) << 38  # of an encoding: where an operand in the constant bank lies
_NUMBER_BITS = ((1 << 32) - 1) << 32  # an immediate
_PARAM_CBANK, _KPARAM_INFO, _SIZED = 0x0A, 0x17, 4  # of .nv.info


@dataclass(frozen=True)
class Arguments:
    """The arguments of a device function: where they begin in the constant bank, each one's offset and size."""

    begin: int
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """Every byte that a device function is passed, by its offset."""

    begin: int
    bytes: Mapping[int, Byte]

    @classmethod
    def of(cls, source: str, arguments: Arguments, renamed: Mapping[str, str]) -> Layout:
        """Fields of the first argument, the source's params, by their names, `renamed` ones by the new name."""
        code = re.sub(r"//[^\n]*", "", source)
        structs = abi.parse(" ".join(match[0] for match in _STRUCT.finditer(code)), {}, "the source")
        (params,) = (kind for name, kind in structs.items() if name.endswith("params"))
        fields = list(abi.leaves(params))
        first, *others = arguments.places
        if first != (0, ctypes.sizeof(params)):
            raise ValueError(f"the first argument is not {params.__name__}: {first}")
        found = {at + i: (renamed.get(name, name), i) for name, at, size in fields for i in range(size)}
        found |= {at + i: (f"argument {n}", i) for n, (at, size) in enumerate(others, 1) for i in range(size)}
        return cls(arguments.begin, found)

    def operand(self, place: str, width: int, addresses: set[str]) -> tuple[Byte | None, ...]:
        """The bytes that an operand of the constant bank reads; below the arguments is what the driver puts there.

        `addresses` are the registers that were given the offset of a byte of a later argument.
        """
        match = _PLACE.fullmatch("0x0" if place in ("RZ", "URZ") else place)
        if not match:
            return (None,)
        at = int(match["offset"], 16)
        if match["register"]:
            known = match["register"] in addresses and 0 <= at - self.begin < _NEAR
            return ((match["register"], at - self.begin) if known else None,)
        if at < self.begin:
            return (("driver", at),)
        return tuple(self.bytes.get(at - self.begin + i) for i in range(width))


def width_of(text: str) -> int:
    """Bytes that an instruction reads of an operand: no less than it does."""
    opcode = text.split()[1 if text.startswith("@") else 0]
    if ".128" in opcode:
        return 16
    return 8 if re.search(r"\.64|\.WIDE|^D(ADD|MUL|FMA|SETP|MNMX)", opcode) else 4


def difference(one: Code, other: Code, before: Layout, after: Layout) -> str:
    """The first instruction that differs by more than moved params; empty where none does."""
    if len(one) != len(other):
        return f"{len(one)} -> {len(other)} instructions"
    addresses: set[str] = set()
    for (text, encoding), (text_after, encoding_after) in zip(one, other, strict=True):
        bits = _moved_bits(text, text_after, before, after, addresses)
        if bits is None or (_number(encoding) ^ _number(encoding_after)) & ~bits:
            return f"{text} -> {text_after}"
        if (written := _WRITTEN.match(text)) and bits & _NUMBER_BITS & ~_PLACE_BITS:
            addresses.add(written["register"])
    return ""


def _moved_bits(text: str, text_after: str, before: Layout, after: Layout, addresses: set[str]) -> int | None:
    """The bits of the encoding that moved params may change; None where the texts differ by more."""
    if _OPERAND.sub("#", text) != _OPERAND.sub("#", text_after):
        return None
    bits, width = 0, width_of(text)
    for one, other in zip(_OPERAND.finditer(text), _OPERAND.finditer(text_after), strict=True):
        if (one["place"] is None) != (other["place"] is None):
            return None
        if one["place"] is not None:
            reads = before.operand(one["place"], width, addresses)
            if None in reads or reads != after.operand(other["place"], width, addresses):
                return None
            bits |= _PLACE_BITS
        elif one["number"] != other["number"]:
            of = before.bytes.get(int(one["number"], 16))
            if of is None or not of[0].startswith("argument ") or of != after.bytes.get(int(other["number"], 16)):
                return None
            bits |= _NUMBER_BITS
    return bits


def _number(encoding: str) -> int:
    """Its 64-bit words, the first one lowest."""
    return sum(int(word, 16) << 64 * i for i, word in enumerate(encoding.split()))


def arguments_of(cubin: bytes) -> dict[str, Arguments]:
    """The arguments of every device function, by its symbol."""
    begin, count, names = *struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<HH", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, begin + 64 * i) for i in range(count)]
    words = cubin[headers[names][4] :]
    found = {}
    for name, *_, offset, size, _, _, _, _ in headers:
        section = words[name : words.index(b"\0", name)].decode()
        if section.startswith(".nv.info."):
            found[section.removeprefix(".nv.info.")] = _arguments(cubin[offset : offset + size])
    return found


def _arguments(info: bytes) -> Arguments:
    at, begin, places = 0, 0, {}
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != _SIZED:
            continue
        if attribute == _PARAM_CBANK:
            _, begin, _ = struct.unpack_from("<IHH", info, at)
        elif attribute == _KPARAM_INFO:
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", info, at)
            places[ordinal] = offset, flags >> 18
        at += size
    return Arguments(begin, tuple(place for _, place in sorted(places.items())))
