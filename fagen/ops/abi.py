"""The params of a launch for ctypes, read from the C header that the kernels include; and their layout in words.

The headers of templates/include/fagen/abi/ are the one place where a params struct is written. They are plain C of a
small subset. Anything outside of it is refused.
"""

from __future__ import annotations

import ctypes
import functools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from fagen import extensions
from fagen.errors import FagenError

Struct = type[ctypes.Structure]

_NUMBERS: dict[str, Any] = {
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
}
_LAYOUT_FUNCTION = """
// Name, offset and size of every field of the params, as this compiler laid them out.
#include <stddef.h>
#include <stdio.h>

extern "C" const char* fagen_params_layout(void) {{
  static char text[{room}];
  static const char* const told = [] {{
    char* end = text;
#define FAGEN_FIELD(field) \\
  end += snprintf(end, text + sizeof text - end, "%s %zu %zu; ", #field, offsetof({struct}, field), \\
                  sizeof({struct}::field))
    {fields}
#undef FAGEN_FIELD
    snprintf(end, text + sizeof text - end, "sizeof %zu", sizeof({struct}));
    return text;
  }}();
  return told;
}}
"""
_INCLUDE = re.compile(r'#include ("fagen/abi/(?P<own>\w+\.h)"|<stdint\.h>)')
_STRUCT = re.compile(r"typedef struct (?P<name>\w+) \{(?P<fields>[^{}]*)\} (?P=name);")
_FIELD = re.compile(r"(?P<type>(?:const )?\w+)(?P<pointer>\*)? (?P<names>.*)", re.DOTALL)
_DECLARED = re.compile(r"(?P<name>[a-z]\w*)(?:\[(?P<count>[1-9]\d?)\])?")


def params(header: str) -> Struct:
    """The struct `fagen_<op>_params` of the header `fagen/abi/<op>.h`."""
    return _structs(header)[name_of(header)]


def name_of(header: str) -> str:
    return f"fagen_{Path(header).stem}_params"


def layout(struct: Struct) -> str:
    """Name, offset and size of every field, as ctypes lays them out; then the size of the whole."""
    fields = [f"{name} {offset} {size}" for name, offset, size in leaves(struct)]
    return "; ".join([*fields, f"sizeof {ctypes.sizeof(struct)}"])


def difference(built: str, ours: str) -> str:
    """The first field in which two layouts differ, in words."""
    theirs, mine = built.split("; "), ours.split("; ")
    pairs = zip([*theirs, *["nothing"] * len(mine)], [*mine, *["nothing"] * len(theirs)], strict=False)
    there, here = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    return f"field, offset and size there: {there[:80]}; here: {here[:80]}"


def layout_function(header: str) -> str:
    """The C++ function by which a kernel tells the layout that its compiler made; the same words as `layout`."""
    struct = params(header)
    names = [name for name, *_ in leaves(struct)]
    fields = " ".join(f"FAGEN_FIELD({name});" for name in names)
    return _LAYOUT_FUNCTION.format(
        struct=struct.__name__,
        room=sum(len(name) + 24 for name in [*names, "sizeof"]),  # both numbers are shorter than that
        fields=textwrap.fill(fields, 114, subsequent_indent="    "),
    )


def leaves(struct: Struct, prefix: str = "", begin: int = 0) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every field, those of a tensor one by one."""
    for name, kind in struct._fields_:  # type: ignore[misc]
        offset = begin + getattr(struct, name).offset
        if issubclass(kind, ctypes.Structure):
            yield from leaves(cast(Struct, kind), f"{prefix}{name}.", offset)
        else:
            yield f"{prefix}{name}", offset, ctypes.sizeof(kind)


# ---- the parser -----------------------------------------------------------------------------------------------------


@functools.cache
def _structs(header: str) -> dict[str, Struct]:
    """All structs of a header and of those that it includes."""
    try:
        text = extensions.read_header(header)
    except OSError as error:
        raise FagenError(f"header {header} cannot be read", str(error)) from error
    found: dict[str, Struct] = {}
    code = []
    for line in re.sub(r"//[^\n]*", "", text).splitlines():
        if included := _INCLUDE.fullmatch(line.strip()):
            if included["own"]:
                found |= _structs(f"fagen/abi/{included['own']}")
        elif line.strip() != "#pragma once":
            code.append(line)
    return parse("\n".join(code), found, header)


def parse(code: str, known: dict[str, Struct], where: str) -> dict[str, Struct]:
    """The structs of C without comments and directives, behind those that are known already."""
    found = dict(known)
    rest = " ".join(code.split())
    while rest:
        match = _STRUCT.match(rest)
        if not match or match["name"] in found:
            raise _refusal(where, rest, "a struct must be `typedef struct name { fields } name;`, each of its own name")
        fields: list[tuple[str, Any]] = []
        *declarations, last = match["fields"].split(";")
        if last.strip() or not declarations:
            raise _refusal(where, last, "a field must end in a semicolon")
        for declaration in declarations:
            fields += _fields(declaration.strip(), found, where)
        names = [name for name, _ in fields]
        if len(set(names)) < len(names):
            raise _refusal(where, match["name"], "two of its fields have one name")
        found[match["name"]] = type(match["name"], (ctypes.Structure,), {"_fields_": fields})
        rest = rest[match.end() :].strip()
    return found


def _fields(declaration: str, known: dict[str, Struct], where: str) -> list[tuple[str, Any]]:
    match = _FIELD.fullmatch(declaration)
    declared = [_DECLARED.fullmatch(part.strip()) for part in match["names"].split(",")] if match else []
    if not match or not all(declared) or (match["pointer"] and len(declared) > 1):
        raise _refusal(where, declaration, "a field must be `type name`, `type name[count]` or `type* name`")
    plain = match["type"].removeprefix("const ")
    if match["pointer"] and (plain == "void" or plain in _NUMBERS):
        kind = ctypes.c_void_p
    elif not match["pointer"] and plain == match["type"] and plain in _NUMBERS | known:
        kind = (_NUMBERS | known)[plain]
    else:
        raise _refusal(where, declaration, f"types: {', '.join(_NUMBERS | known)}, and pointers to void and numbers")
    if issubclass(kind, ctypes.Structure) and any(d and d["count"] for d in declared):
        raise _refusal(where, declaration, "arrays are of numbers or pointers")
    return [(d["name"], kind * int(d["count"]) if d["count"] else kind) for d in declared if d]


def _refusal(where: str, what: str, remedy: str) -> FagenError:
    return FagenError(f"{where} is not understood", what[:120], remedy)
