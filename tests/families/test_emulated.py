"""The CUDA kernels run on the CPU: right by the oracle, and nobody waits for ever, whatever comes first.

What a GPU has beyond the emulator (tests/emulator) is left to tests/gpu: rounding, fences, registers, time.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fagen import env
from fagen.build import toolchain
from fagen.families import Config
from fagen.ops.attention import fallback, masks
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.problem import Problem
from fagen.target import Target, known
from tests.support import emulated
from tests.support.cases import HOPPER, SCHEMES, SCHEMES_90, Case, config_90, run
from tests.support.thorough import sample

BANDS = {"none": (-1, -1), "causal": (-1, -1), "window": (70, 20), "intervals": (-1, -1)}
KINDS = ("lower1", "lower2", "both2", "both4")
SIZES = ((230, 230), (70, 300), (300, 130))


def _target(case: Case) -> Target:
    return known("sm_90" if case.family is HOPPER else "sm_80")


def _case(number: int, scheme: str) -> Case | None:
    """Masks turn from scheme to scheme, past those that a scheme cannot serve."""
    for turn in range(4):
        mask = list(BANDS)[(number + turn) % 4]
        kind = KINDS[number % 4] if mask == "intervals" else ""
        dtype = ("bf16", "fp16")[number % 2]
        case = Case(scheme, mask=mask, intervals=kind, window=BANDS[mask], dtype=dtype, heads=4, kv_heads=2)
        if not case.family.rejects(case.problem, _target(case), case.config):
            return case
    return None


def _shape(scheme: str, head_dim: int, head_dim_v: int = 0, **more) -> Case:
    changes = (("stages", 1),) if head_dim > 128 else ()
    return Case(scheme, head_dim=head_dim, head_dim_v=head_dim_v, heads=2, kv_heads=1, changes=changes, **more)


CASES = [case for number, scheme in enumerate((*SCHEMES_90, *SCHEMES)) if (case := _case(number, scheme))]
CASES += [_shape("tma", d, dv) for d, dv in ((40, 0), (96, 0), (128, 0), (192, 128), (256, 0))]
CASES += [_shape("tma_pair", 128, mask="none"), _shape("tma_shared_weights", 96)]
CASES += [_shape("tma", 64, softcap=15.0), _shape("tma_turns", 64, alibi=True), _shape("base", 80, alibi=True)]
CASES += [  # every other head begins in the middle of a sector, and is loaded early
    Case("tma", mask="none", head_dim=d, head_dim_v=dv, heads=heads, kv_heads=heads)
    for d, dv, heads in ((72, 0, 2), (104, 40, 2), (40, 0, 3))  # of three, rows of keys begin unlike: they are not
]
CASES += [
    Case("tma_packed", mask=mask, window=BANDS[mask], heads=heads, kv_heads=kv_heads)
    for mask, heads, kv_heads in (("causal", 7, 1), ("window", 6, 2), ("none", 12, 1))  # no power of two
]
DOCUMENTS = [
    Case(name, mask="intervals", intervals=kind, window=window, heads=4, kv_heads=2)
    for name, kind, window in (("tma_dynamic", "lower1", (-1, 0)), ("tma_three_groups", "both2", (-1, -1)))
]


@functools.cache
def _source(case: Case) -> str:
    return emulated.source(case.family, case.problem, _target(case), case.config)


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    """Each test compiles the kernel that it runs, unless some test has."""
    return cache_folder / "emulated"


def check(case: Case, folder: Path, rows: int, keys: int, *, seed: int = 0, units: int = 3, text: str = "", **more):
    library = emulated.build(text or _source(case), folder)
    launch = functools.partial(emulated.launch, library, seed=seed, units=units)
    return run(case, rows, keys, seed=seed, batch=1, device="cpu", launch=launch, **more)


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(CASES, every=4), ids=str)
def test_right_whatever_comes_first(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(SIZES):
        verdict = check(case, folder, rows, keys, seed=seed, units=(3, 2, 5)[seed])
        assert verdict, verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("case", DOCUMENTS, ids=str)
def test_packed_documents(case: Case, folder: Path) -> None:
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor((150, 17, 210, 90)))
    bounds = masks.from_documents(ids[None], causal=case.window == (-1, 0)).to(torch.int32)
    verdict = check(case, folder, 467, 467, intervals=bounds)
    assert verdict, verdict.message


def test_rows_that_see_no_keys(folder: Path) -> None:
    case = next(case for case in CASES if case.scheme.startswith("tma") and case.mask == "causal")
    for rows, keys in ((300, 1), (1, 300)):
        verdict = check(case, folder, rows, keys)
        assert verdict, verdict.message
    q, k = torch.randn(1, 70, 4, 64, dtype=torch.bfloat16), torch.empty(1, 0, 2, 64, dtype=torch.bfloat16)
    out, lse = torch.full_like(q, torch.nan), torch.full((1, 4, 70), torch.nan)
    call = AttentionCall.of(q, k, k, causal=True)
    emulated.launch(emulated.build(_source(case), folder), call, {"out": out, "lse": lse})
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("begin", [0, 8])
def test_heads_that_begin_in_the_middle_of_a_sector(folder: Path, begin: int) -> None:
    """As parts of wider tensors: by their first element, their step to the next head, or both."""
    generator = torch.Generator().manual_seed(begin)
    wide = [torch.randn(2, 150, 4, 88, generator=generator).to(torch.bfloat16) for _ in range(3)]
    q, k, v = (t[..., at : at + 72] for t, at in zip(wide, (0, begin, 8 - begin), strict=True))
    call = AttentionCall.of(q, k[:, :, ::2], v[:, :, 1:3], causal=True)
    out, lse = torch.full((2, 150, 4, 72), torch.nan, dtype=torch.bfloat16), torch.full((2, 4, 150), torch.nan)
    case = Case("tma", mask="causal", head_dim=72, heads=4, kv_heads=2)
    emulated.launch(emulated.build(_source(case), folder), call, {"out": out, "lse": lse})
    exact, exact_lse = fallback.attend(replace(call, want_lse=True))
    assert (out.float() - exact.float()).abs().max() < 0.02 and (lse - exact_lse).abs().max() < 1e-3


_LOADS = "          ptx::tma_load(to, &map, pipe.full(), slab * 64 - early, row, head, batch);\n"


@pytest.mark.parametrize(
    ("head_dim", "heads", "early"),
    [(72, 2, True), (104, 4, True), (72, 3, False), (80, 2, False), (56, 2, False)],  # 56 is loaded by the kernel of 64
)
def test_which_heads_are_loaded_early(folder: Path, head_dim: int, heads: int, early: bool) -> None:
    """Every other one, if all rows begin alike in sectors and the kernel is none for a power of two."""
    case = Case("tma", mask="none", head_dim=head_dim, heads=heads, kv_heads=heads)
    text = _source(case)
    assert text.count(_LOADS) == 1
    counted = text.replace(_LOADS, "{ if (early) ++emulator_early; " + _LOADS.strip() + " }\n")
    library = emulated.build(f'extern "C" int emulator_early;\nint emulator_early;\n{counted}', folder)
    count = ctypes.c_int.in_dll(library._library, "emulator_early")
    count.value = 0  # sizes share a kernel
    q = torch.randn(1, 70, heads, head_dim).to(torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(1, heads, 70)
    emulated.launch(library, AttentionCall.of(q, q, q), {"out": out, "lse": lse})
    assert (count.value > 0) is early


# ---- what is wrong is found ------------------------------------------------------------------------------------------

_BROKEN = Case("tma", mask="none", heads=4, kv_heads=2)
_WAIT, _FREE = "    ptx::wgmma_wait<kPending>();\n    pin(s_acc[0]);\n", "    pipelines.k.release();\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    pipelines.v.release();\n", ""),  # the producer waits for an empty stage
        ("        pipe.expect_bytes();\n", "        ;\n"),  # the consumers wait for a tile
        ("    pipe.advance();\n", ""),  # the assignments are read out of turn
    ],
)
def test_who_waits_for_ever_is_told(folder, old, new):
    text = _source(_BROKEN)
    assert old in text
    with pytest.raises(AssertionError, match="(?s)nothing can go on.*waits for barrier at|more arrive at a barrier"):
        check(_BROKEN, folder, 300, 300, text=text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("      pipe.acquire();\n", ""),  # tiles are overwritten while they are read
        ("    pipelines.k.wait();\n", ""),  # or read before they are there
        (_WAIT + _FREE, _FREE + _WAIT),  # or freed before they are read
    ],
)
def test_who_does_not_wait_is_wrong(folder, old, new):
    text = _source(_BROKEN)
    assert old in text
    text, found = text.replace(old, new), []
    for seed in range(6):
        try:
            found.append(bool(check(_BROKEN, folder, 300, 300, seed=seed, text=text)))
        except AssertionError:
            found.append(False)
    assert not all(found)


def test_lanes_at_different_places_are_told(folder):
    text = _source(_BROKEN)
    old = "  ptx::start_next_kernel();\n"
    assert old in text
    new = "  if (threadIdx.x % 2) __syncwarp(); else __any_sync(~0u, true);\n"
    with pytest.raises(AssertionError, match="the lanes of a warp are at different places"):
        check(_BROKEN, folder, 70, 0, text=text.replace(old, new))


def test_extents_may_promise_what_no_key_shows(folder: Path) -> None:
    """Keys that nobody sees, for two reasons in turn: their tiles look as if some rows saw them."""
    rows = keys = 330
    # hidden: rows from the first bound on, and below the second
    bounds = torch.tensor([rows, 0], dtype=torch.int32).repeat(1, 1, keys, 1)
    for first, end in ((0, 150), (300, 330)):
        bounds[0, 0, first:end:2], bounds[0, 0, first + 1 : end : 2] = 0, rows
    for case in DOCUMENTS[1:]:
        verdict = check(case, folder, rows, keys, intervals=bounds)
        assert verdict, verdict.message


# ---- what the schemes here and in tests/gpu cover --------------------------------------------------------------------


def test_every_value_of_every_knob_is_run() -> None:
    for knob in HOPPER.knobs:
        assert {scheme[knob.name] for scheme in SCHEMES_90.values()} == set(knob.choices), knob.name


_PAIRED = (
    "tile_m", "q_stages", "overlap", "rescale", "ping_pong", "blocks_per_sm", "schedule", "block_order", "cluster",
    "shared_weights", "pack_heads",
)  # fmt: skip


def _pairs(config: Config) -> Iterator[tuple[tuple[str, object], ...]]:
    return itertools.combinations([(name, config[name]) for name in _PAIRED], 2)


def test_every_legal_pair_of_values_is_run() -> None:
    """Of all knobs but those of sizes."""
    problems, where = [Problem(head_dim=64, mask=mask) for mask in ("causal", "none")], known("sm_90")
    choices = (knob.choices for knob in HOPPER.knobs if knob.name in _PAIRED)
    names = [knob.name for knob in HOPPER.knobs if knob.name in _PAIRED]
    small = config_90(tile_n=32, stages=1)
    wanted: set[tuple[tuple[str, object], ...]] = set()
    for values in itertools.product(*choices):
        config = small.replace(**dict(zip(names, values, strict=True)))
        if not all(HOPPER.rejects(problem, where, config) for problem in problems):
            wanted.update(_pairs(config))
    ran = {pair for scheme in SCHEMES_90.values() for pair in _pairs(scheme)}
    assert not wanted - ran, sorted(map(str, wanted - ran))


ORDER = """
#include <algorithm>
#include <cstdint>
#define __device__
#define __forceinline__ inline
using std::min;
namespace fagen {
enum class BlockOrder { ascending, descending, longest_first, sectioned };
}
#include "fagen/schedule/tile_order.cuh"
using namespace fagen;

static int divisors() {
  const uint32_t most = (1u << 31) - 1, some[] = {1, 2, 3, 7, 64, 127, 132, 641, 65535, 65536, 1000003, most - 1, most};
  for (uint32_t by : some)
    for (uint32_t n : some)
      for (int64_t off = -3; off <= 3; ++off) {
        const int64_t near = int64_t(n) / by * by + off, at[] = {near, most - 3 + off, off};
        for (int64_t x : at)
          if (x >= 0 && x <= most && Divisor(by).quotient(uint32_t(x)) != x / by) return 1;
      }
  return 0;
}

// every tile of every head once: head by head, or the longest rows of a section first
template <BlockOrder kOrder>
static int orders() {
  for (int row_tiles : {1, 3, 8})
    for (int heads : {1, 4, 6})
      for (int batch : {1, 3})
        for (int at_once = 1; at_once <= heads * batch; ++at_once) {
          const TileOrder order = TileOrder::of<kOrder>(row_tiles, heads, batch, at_once);
          static bool seen[8 * 6 * 3];
          for (bool& one : seen) one = false;
          int last_row = -1, last_section = -1;
          for (int index = 0; index < row_tiles * heads * batch; ++index) {
            const TileCoord tile = order.tile_at<kOrder>(index);
            const int head = tile.batch * heads + tile.head;
            const int section = kOrder == BlockOrder::sectioned ? head / at_once : 0;
            if (tile.row_tile < 0 || tile.row_tile >= row_tiles || tile.head >= heads || tile.batch >= batch) return 2;
            bool& one = seen[head * row_tiles + tile.row_tile];
            if (one) return 3;
            one = true;
            if (kOrder == BlockOrder::ascending || kOrder == BlockOrder::descending) {
              const int place = index % row_tiles;
              if (tile.row_tile != (kOrder == BlockOrder::ascending ? place : row_tiles - 1 - place)) return 5;
              if (head != index / row_tiles) return 6;
              continue;
            }
            if (section < last_section || (section == last_section && tile.row_tile > last_row)) return 4;
            last_row = tile.row_tile, last_section = section;
          }
        }
  return 0;
}

int main() {
  if (const int wrong = divisors()) return wrong;
  if (const int wrong = orders<BlockOrder::ascending>()) return 10 + wrong;
  if (const int wrong = orders<BlockOrder::descending>()) return 20 + wrong;
  if (const int wrong = orders<BlockOrder::longest_first>()) return 30 + wrong;
  return orders<BlockOrder::sectioned>() ? 40 : 0;
}
"""


def test_division_is_exact_and_orders_are_permutations(tmp_path):
    """What a launch knows is divided by as a product and a shift, up to the last number below 2^31."""
    source, program = tmp_path / "order.cpp", tmp_path / "order"
    source.write_text(ORDER)
    headers = str(env.data_dir("templates") / "include")
    command = [str(toolchain.require_cxx()), "-std=c++17", "-O1", "-w", "-I", headers, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    assert subprocess.run([str(program)]).returncode == 0
