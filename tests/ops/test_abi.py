"""The params of a launch as ctypes reads them from the C headers: the compiler's own layout, and nothing guessed."""

from __future__ import annotations

import ctypes

import pytest

from fagen import ops
from fagen.build import cache, toolchain
from fagen.build.job import Job
from fagen.codegen import render
from fagen.errors import FagenError
from fagen.ops import abi

needs_cxx = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
HEADERS = [ops.get(name).header for name in ("forward", "backward")]


@needs_cxx
@pytest.mark.parametrize("header", HEADERS)
def test_the_compiler_lays_the_params_out_as_ctypes_does(header: str) -> None:
    source = render.fold(f'#include "{header}"\n') + abi.layout_function(header)
    library = ctypes.CDLL(str(cache.make(Job("layout", source, ".cpp", ("-O1",), (), "cpu")).path))
    library.fagen_params_layout.restype = ctypes.c_char_p
    told = library.fagen_params_layout().decode()
    assert told == abi.layout(abi.params(header)) == library.fagen_params_layout().decode()
    assert told.startswith("q.data 0 8; q.stride 8 24; k.data 32 8;") and "; lse " in told


def parsed(fields: str) -> abi.Struct:
    return abi.parse(f"typedef struct t {{ {fields} }} t;", {}, "a header")["t"]


def test_every_type_of_a_field() -> None:
    kinds = "void* a; const void* b; const float* c; int32_t* d; int32_t e, f; int64_t g[3]; float h; uint64_t i;"
    assert abi.layout(parsed(kinds)) == (
        "a 0 8; b 8 8; c 16 8; d 24 8; e 32 4; f 36 4; g 40 24; h 64 4; i 72 8; sizeof 80"
    )


@pytest.mark.parametrize(
    "fields",
    [
        "int e;",
        "double e;",
        "unsigned int e;",
        "const int32_t e;",
        "int32_t* a, b;",
        "int32_t *a;",
        "int32_t** a;",
        "fagen_tensor* a;",
        "other a;",
        "int32_t a[0];",
        "int32_t a[N];",
        "int32_t a[2][2];",
        "int32_t a : 3;",
        "int32_t a = 1;",
        "int32_t a; float a;",
        "int32_t a",
        "int32_t;",
        "/* how many */ int32_t a;",
        "struct { int32_t b; } a;",
        "union { int32_t b; } a;",
        "",
    ],
)
def test_what_is_not_understood_is_refused(fields: str) -> None:
    with pytest.raises(FagenError, match="a header is not understood") as caught:
        parsed(fields)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "code",
    [
        "struct t { int32_t a; };",
        "typedef struct t { int32_t a; } u;",
        "typedef struct t { int32_t a; } t; int32_t more;",
        "typedef struct t { int32_t a; } t; typedef struct t { int32_t b; } t;",
        "#define N 3",
        "typedef struct __attribute__((packed)) t { int32_t a; } t;",
    ],
)
def test_other_code_than_structs_is_refused(code: str) -> None:
    with pytest.raises(FagenError, match="is not understood"):
        abi.parse(code, {}, "a header")


def test_a_struct_of_another_header_is_a_field() -> None:
    both = abi.parse("typedef struct t { void* p; int64_t s[3]; } t; typedef struct u { int32_t n; t a; } u;", {}, "it")
    assert abi.layout(both["u"]) == "n 0 4; a.p 8 8; a.s 16 24; sizeof 40"
    with pytest.raises(FagenError, match="not understood"):
        abi.parse("typedef struct t { void* p; } t; typedef struct u { t a[2]; } u;", {}, "it")


def test_a_header_that_is_not_there() -> None:
    with pytest.raises(FagenError, match="fagen/abi/none.h cannot be read"):
        abi.params("fagen/abi/none.h")
