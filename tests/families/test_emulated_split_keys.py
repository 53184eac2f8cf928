"""Forward kernels with splits=keys on the CPU (tests/emulator): right for any number of parts, whatever they hold."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import pytest
import torch

from fagen.ops.attention import reference
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.params import make_params
from fagen.runtime.kernel import Library
from fagen.target import known
from tests.support import emulated
from tests.support.cases import HOPPER, Case, run

# window bounds, rows and keys: rows that see no key, keys that no row sees, a ragged end of both
CASES = {
    Case("tma_split", mask="none"): ((70, 300), (130, 65)),
    Case("tma_split", mask="causal", dtype="fp16", heads=3, kv_heads=1): ((70, 300), (200, 70)),
    Case("tma_split", mask="window", window=(90, 10), heads=2, kv_heads=2): ((150, 420), (100, 70)),
    Case("tma_split_packed", mask="causal", head_dim=40, heads=8, kv_heads=2): ((9, 310), (21, 5)),
    Case("tma_split_packed", mask="causal", heads=6, kv_heads=2): ((30, 310),),
    Case("tma_split_packed", mask="none", head_dim=96, head_dim_v=64, heads=4, kv_heads=1): ((5, 290),),
    Case("tma_split_groups", mask="causal", softcap=15.0, alibi=True, heads=2, kv_heads=1): ((200, 330),),
    Case("tma_split_groups", mask="none", dropout=0.2, heads=2, kv_heads=1): ((70, 200),),
    Case("split", mask="none", dtype="fp16"): ((70, 300), (130, 33)),
    Case("split", mask="window", window=(90, 10), aligned=False, head_dim=50, heads=2): ((150, 420), (100, 70)),
    Case("split", mask="intervals", intervals="both4", window=(100, 30), head_dim=32, heads=2): ((150, 300),),
    Case("split_overlap", mask="causal", head_dim=96, heads=2): ((100, 330), (100, 40)),
    Case("split_overlap", mask="intervals", intervals="lower2", window=(-1, 0), heads=2): ((100, 300),),
    Case("split_one_stage", mask="causal", head_dim=16, softcap=15.0, alibi=True, dropout=0.2, heads=2): ((200, 200),),
}
PARTS = (1, 2, 3, 7, 100)
_RULE = "  if (row_tiles >= sms) return 1;\n"
_FORCED = "  if (emulator_parts) return std::min(emulator_parts, key_tiles);\n"


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    """Each test compiles the kernel that it runs, unless some test has."""
    return cache_folder / "emulated"


@functools.cache
def _text(case: Case) -> str:
    """The kernel, with a number of parts that a test can set. 0 leaves it to the kernel's rule."""
    text = emulated.source(case.family, case.problem, known("sm_90" if case.family is HOPPER else "sm_80"), case.config)
    assert text.count(_RULE) == 1
    return f'extern "C" int emulator_parts;\nint emulator_parts;\n{text.replace(_RULE, _FORCED + _RULE)}'


@functools.cache
def _library(case: Case, folder: Path) -> Library:
    return emulated.build(_text(case), folder)


def _parts(library: Library) -> ctypes.c_int:
    return ctypes.c_int.in_dll(library._library, "emulator_parts")


def check(case: Case, folder: Path, rows: int, keys: int, parts: int, **more) -> reference.Verdict:
    library = _library(case, folder)
    _parts(library).value = parts
    launch = functools.partial(emulated.launch, library, seed=parts, units=more.pop("units", 3))
    return run(case, rows, keys, seed=parts, batch=1, device="cpu", launch=launch, **more)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_for_any_number_of_parts(case: Case, folder: Path) -> None:
    for rows, keys in CASES[case]:
        for parts in PARTS:
            verdict = check(case, folder, rows, keys, parts)
            assert verdict, f"{rows}x{keys} in {parts} parts: {verdict.message}"


@pytest.mark.parametrize(("batch", "rows", "keys"), [(1, 70, 0), (1, 0, 300), (0, 70, 300)])
def test_no_keys_or_no_rows(batch: int, rows: int, keys: int, folder: Path) -> None:
    case = next(case for case in CASES if case.mask == "causal")
    q, k = torch.randn(batch, rows, 3, 64).half(), torch.randn(batch, keys, 1, 64).half()
    out, lse = torch.full_like(q, torch.nan), torch.full((batch, 3, rows), torch.nan)
    emulated.launch(_library(case, folder), AttentionCall.of(q, k, k, causal=True), {"out": out, "lse": lse})
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_the_same_bits_whatever_comes_first(folder: Path) -> None:
    """Parts are merged in their order, not in that in which they end. O without an LSE is the same."""
    case = next(iter(CASES))
    library = _library(case, folder)
    q, k, v = (torch.randn(1, n, h, 64).bfloat16() for n, h in ((70, 4), (300, 2), (300, 2)))
    _parts(library).value, found = 5, []
    for seed in range(4):
        outputs = {"out": torch.full_like(q, torch.nan), "lse": torch.full((1, 4, 70), torch.nan)}
        outputs = outputs if seed % 2 else {"out": outputs["out"]}
        emulated.launch(library, AttentionCall.of(q, k, v), outputs, seed=seed, units=2 + seed)
        found.append(outputs)
    assert all(torch.equal(outputs["out"], found[0]["out"]) for outputs in found)
    assert torch.equal(found[1]["lse"], found[3]["lse"])


@pytest.mark.parametrize(
    ("rows", "keys", "least", "most"),
    [
        (64, 4096, 8, 15),  # 4 tiles of rows on 60 SMs: as many parts as fill them
        (64, 64, 1, 1),  # a merge costs more than the second tile of keys
        (15 * 64, 4096, 1, 1),  # 60 tiles of rows: no SM is idle
        (16 * 64, 4096, 1, 1),
    ],
)
def test_the_kernels_own_rule(rows: int, keys: int, least: int, most: int, folder: Path) -> None:
    """By what the launch asks of the workspace: for a part of a row, O and two numbers in float32."""
    library = _library(next(iter(CASES)), folder)
    _parts(library).value = 0
    library._library.emulator_begin(ctypes.c_uint64(0), ctypes.c_int(60))
    q, k = torch.empty(1, rows, 4, 64).bfloat16(), torch.empty(1, keys, 2, 64).bfloat16()
    params = make_params(AttentionCall.of(q, k, k), {"out": torch.empty_like(q)})
    of_part = -(-rows // 64) * 4 * 64 * (64 + 2) * 4
    parts, rest = divmod(library.workspace_bytes(ctypes.byref(params)), of_part)
    assert rest == 0 and least <= max(parts, 1) <= most


# ---- what is wrong is found ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["tma_split", "split"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("part_of(range.end - 1)", "part_of(range.end)"),  # a part that nobody wrote is read
        ("mine.full_end = min(max(all.full_end, mine.begin), mine.end)", "mine.full_end = mine.end"),  # no mask
        ("begin + tiles_of_part;", "begin + tiles_of_part + 1;"),  # a key tile is in two parts
    ],
)
def test_what_is_wrong_is_found(old: str, new: str, scheme: str, folder: Path) -> None:
    if scheme == "split" and old.startswith("mine.full_end"):
        old = "this->valid() && this->tile >= range.full_begin"  # its walk asks the whole range
        new = old.removeprefix("this->valid() && ")
    case = Case(scheme, mask="causal", heads=1, kv_heads=1)
    assert _text(case).count(old) == 1
    library = emulated.build(_text(case).replace(old, new), folder)
    verdicts = []
    for parts in PARTS[1:]:
        _parts(library).value = parts
        launch = functools.partial(emulated.launch, library, seed=parts)
        verdicts.append(bool(run(case, 150, 200, batch=1, device="cpu", launch=launch)))
    assert not all(verdicts)
