"""sm90_backward run on the CPU: right gradients, and nobody waits for ever, whatever comes first.

What a GPU has beyond the emulator (tests/emulator) is left to tests/gpu: rounding, fences, registers, time.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fagen.bench.suites import suite
from fagen.families import Config, sm90_backward
from fagen.families.sm90_backward_cost import splits
from fagen.ops.attention import gradients, masks, reference
from fagen.ops.attention.backward import BackwardProblem
from fagen.ops.attention.backward_call import BackwardCall
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.params import BackwardParams, make_backward_params
from fagen.runtime.kernel import Library
from fagen.target import known
from tests.support import emulated
from tests.support.cases import DTYPES, random_intervals, rng_of
from tests.support.thorough import sample

FAMILY, TARGET = sm90_backward.FAMILY, known("sm_90")
BASE: dict[str, Any] = {
    "tile_m": 64, "tile_n": 128, "warpgroups": 2, "operands": "registers", "v_source": "shared",
    "q_stages": 2, "dout_stages": 2, "ds_stages": 1, "dv_start": "after_ds", "dq_sink": "bulk",
    "dq_rounding": "own_kernel", "dq_owner": "all", "row_order": "ascending", "block_order": "ascending",
    "section_mb": 32, "seeds": "none", "exp_on_fma": 0,
}  # fmt: skip


def config(**changes: Any) -> Config:
    return FAMILY.config({**BASE, **changes})


SCHEMES: Mapping[str, Config] = {
    "base": config(),
    "held_v": config(v_source="registers", dv_start="before_ds"),
    "held_v_long_tiles": config(v_source="registers", tile_m=128, tile_n=64, warpgroups=1, dv_start="after_store"),
    "red": config(dq_sink="red", dv_start="before_ds"),
    "one_group": config(tile_n=64, warpgroups=1, q_stages=1, dout_stages=1),
    "three_groups": config(tile_n=192, warpgroups=3, q_stages=1, ds_stages=2, dv_start="after_store"),
    "long_tiles": config(tile_m=128, ds_stages=1, dv_start="after_store"),
    "long_tiles_one_group": config(
        tile_m=128, tile_n=64, warpgroups=1, ds_stages=2, row_order="shifted", dv_start="after_store"
    ),
    "three_stages": config(tile_n=64, warpgroups=1, q_stages=3, dout_stages=3, dq_sink="red"),
    "first_owner": config(dq_owner="first", ds_stages=2),
    "first_owner_red": config(
        dq_owner="first", dq_sink="red", tile_m=128, row_order="descending", dv_start="after_store"
    ),
    "descending": config(row_order="descending", block_order="descending"),
    "longest_first": config(block_order="longest_first", row_order="shifted", ds_stages=2),
    "sectioned": config(block_order="sectioned", section_mb=16),
    "shared": config(operands="shared"),
    "shared_weights_first": config(operands="shared", dv_start="before_ds", ds_stages=2),
    "shared_red": config(operands="shared", tile_n=80, dq_sink="red", q_stages=1, dout_stages=1),
    "shared_three_groups": config(operands="shared", tile_n=96, warpgroups=3, ds_stages=2, row_order="shifted"),
    "shared_first_owner": config(operands="shared", tile_n=96, dq_owner="first", block_order="longest_first"),
    "last_block": config(dq_rounding="last_block"),
    "last_block_long_tiles": config(dq_rounding="last_block", tile_m=128, dq_owner="first", dv_start="after_store"),
    "last_block_one_group": config(dq_rounding="last_block", tile_n=64, warpgroups=1, row_order="shifted"),
    "last_block_three_groups": config(
        dq_rounding="last_block", tile_n=192, warpgroups=3, q_stages=1, dv_start="after_store"
    ),
    "last_block_shared": config(dq_rounding="last_block", operands="shared", tile_n=96, block_order="longest_first"),
    "seeded": config(seeds="delta", dv_start="after_store", exp_on_fma=2),
    "seeded_long_tiles": config(seeds="delta", tile_m=128, exp_on_fma=1, dv_start="after_store"),
    "seeded_held_v": config(seeds="delta", v_source="registers", dv_start="after_store", ds_stages=2, dq_sink="red"),
    "stored_first_shared": config(operands="shared", tile_n=80, dv_start="after_store", dq_sink="red"),
    "stored_first_shared_three_groups": config(
        operands="shared", tile_n=96, warpgroups=3, dv_start="after_store", ds_stages=2, seeds="delta", exp_on_fma=1
    ),
    "stored_first_shared_one_owner": config(operands="shared", tile_n=96, dv_start="after_store", dq_owner="first"),
    "seeded_shared": config(seeds="delta", operands="shared", tile_n=96, warpgroups=3, exp_on_fma=2),
    "loader": config(dq_owner="loader", dq_sink="red", ds_stages=2, dv_start="after_store"),
    "loader_ahead": config(
        dq_owner="loader", dq_sink="red", q_stages=3, dout_stages=3, dv_start="after_store", seeds="delta", exp_on_fma=1
    ),
    "loader_long_tiles": config(
        dq_owner="loader",
        dq_sink="red",
        tile_m=128,
        dout_stages=3,
        ds_stages=2,
        row_order="shifted",
        dv_start="after_store",
    ),  # fmt: skip
    "loader_held_v": config(
        dq_owner="loader", dq_sink="red", v_source="registers", q_stages=3, dout_stages=3, dv_start="after_store"
    ),
    "stored_first": config(dv_start="after_store"),
    "sectioned_red": config(
        block_order="sectioned", section_mb=64, dq_sink="red", tile_n=192, warpgroups=3, dv_start="after_store"
    ),
}
ONE_STAGE = (("q_stages", 1), ("dout_stages", 1), ("ds_stages", 1))
BANDS = {"none": (-1, -1), "causal": (-1, 0), "window": (70, 20), "intervals": (-1, -1)}
KINDS = ("lower1", "lower2", "both2", "both4")


@dataclass(frozen=True)
class Case:
    scheme: str
    mask: str = "causal"
    intervals: str = ""
    dtype: str = "bf16"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int = 0
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    deterministic: bool = False
    dropout: float = 0.0
    changes: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def problem(self) -> BackwardProblem:
        return BackwardProblem(
            dtype=self.dtype, head_dim=self.head_dim, head_dim_v=self.head_dim_v, mask=self.mask,
            intervals=self.intervals, softcap=bool(self.softcap), alibi=self.alibi, deterministic=self.deterministic,
            dropout=self.dropout > 0,
        )  # fmt: skip

    @property
    def config(self) -> Config:
        return SCHEMES[self.scheme].replace(**dict(self.changes))

    def __str__(self) -> str:
        d = f"d{self.head_dim}" + (f"-{self.head_dim_v}" if self.head_dim_v else "")
        extra = [name for name in ("softcap", "alibi", "deterministic", "dropout") if getattr(self, name)]
        parts = [self.scheme, self.mask, self.intervals, self.dtype, d, f"h{self.heads}-{self.kv_heads}", *extra]
        return "-".join(filter(None, parts))


def _case(number: int, scheme: str) -> Case | None:
    """Masks turn from scheme to scheme, past those that a scheme cannot serve."""
    for turn in range(4):
        mask = list(BANDS)[(number + turn) % 4]
        kind = KINDS[number % 4] if mask == "intervals" else ""
        dtype = ("bf16", "fp16")[number % 2]
        case = Case(scheme, mask=mask, intervals=kind, window=BANDS[mask], dtype=dtype)
        if not FAMILY.rejects(case.problem, TARGET, case.config):
            return case
    return None


CASES = [case for number, scheme in enumerate(SCHEMES) if (case := _case(number, scheme))]
CASES += [Case("base", head_dim=d, head_dim_v=dv, heads=2) for d, dv in ((40, 0), (96, 0), (64, 128))]
CASES += [Case("seeded_held_v", head_dim=d, head_dim_v=dv, heads=2) for d, dv in ((96, 0), (64, 128))]
CASES += [Case("stored_first", mask=mask, head_dim=128, heads=2) for mask in ("causal", "none")]
CASES += [Case("red", head_dim=96, heads=3, kv_heads=1)]
CASES += [Case("base", softcap=2.0), Case("base", alibi=True), Case("red", softcap=2.0, alibi=True, dtype="fp16")]
CASES += [Case("base", mask="window", window=(40, 0), heads=2)]
CASES += [Case("seeded_held_v", softcap=2.0, alibi=True), Case("seeded", head_dim=128, heads=2, dtype="fp16")]
CASES += [Case("last_block", head_dim=80, heads=2), Case("last_block", mask="window", window=(10, -1), kv_heads=1)]
CASES += [Case("long_tiles", mask="intervals", intervals=kind, window=(-1, 0)) for kind in ("lower1", "lower2")]
CASES += [Case("loader", head_dim=d, head_dim_v=dv, heads=2) for d, dv in ((40, 0), (128, 0), (64, 128))]
CASES += [Case("loader_held_v", head_dim=96, heads=3, kv_heads=1), Case("loader_ahead", softcap=2.0, alibi=True)]
CASES += [
    Case(scheme, mask="intervals", intervals=kind, window=(-1, 0))
    for scheme, kind in (("loader_ahead", "both4"), ("loader_long_tiles", "lower1"))
]
SHARED = [("shared", 64, 256, 0), ("shared_red", 80, 256, 0), ("shared_red", 96, 96, 208), ("shared", 64, 64, 192)]
SHARED += [("shared_three_groups", 96, 192, 128), ("shared_three_groups", 96, 160, 0)]
CASES += [
    Case(scheme, head_dim=d, head_dim_v=dv, heads=2, kv_heads=1, changes=(("tile_n", n), *ONE_STAGE))
    for scheme, n, d, dv in SHARED
]
CASES += [
    Case("stored_first_shared", head_dim=d, heads=2, kv_heads=1, changes=(("tile_n", n), *ONE_STAGE))
    for d, n in ((256, 64), (192, 80))
]
CASES += [Case("shared", mask="intervals", intervals=kind, window=(-1, 0)) for kind in ("lower1", "both4")]
CASES += [Case("shared_red", softcap=2.0, alibi=True), Case("shared_three_groups", mask="window", window=(40, 9))]
DETERMINISTIC = [
    Case("shared_three_groups", deterministic=True),
    Case("base", deterministic=True, kv_heads=4),
    Case("descending", deterministic=True),
    Case("longest_first", mask="window", window=(70, 20), deterministic=True),
    Case("long_tiles_one_group", mask="intervals", intervals="both2", deterministic=True),
    Case("descending", mask="intervals", intervals="lower1", window=(-1, 0), deterministic=True),
    Case("first_owner", mask="none", deterministic=True),
    Case("last_block", deterministic=True),
    Case("last_block_shared", mask="window", window=(70, 20), deterministic=True, kv_heads=4),
    Case("shared_red", deterministic=True),
    Case("red", mask="none", deterministic=True, kv_heads=4),
    Case("first_owner_red", mask="intervals", intervals="both2", deterministic=True),
    Case("sectioned_red", mask="window", window=(70, 20), deterministic=True),
]


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    return cache_folder / "emulated"


@functools.cache
def _source(case: Case) -> str:
    return emulated.source(FAMILY, case.problem, TARGET, case.config)


def make_call(
    case: Case, rows: int, keys: int, g: torch.Generator, *, batch: int = 1, layout: str = "bshd",
    magnitude: float = 1.0, scale: float | None = None, dlse: bool = False, intervals: torch.Tensor | None = None,
) -> BackwardCall:  # fmt: skip
    """Random tensors, and what forward makes of them in float32."""

    def tensor(length: int, heads: int, size: int) -> torch.Tensor:
        shape = (batch, length, heads, size) if layout == "bshd" else (batch, heads, length, size)
        return (torch.randn(shape, device=g.device, generator=g) * magnitude).to(DTYPES[case.dtype])

    d, dv = case.head_dim, case.head_dim_v or case.head_dim
    q, k, v = tensor(rows, case.heads, d), tensor(keys, case.kv_heads, d), tensor(keys, case.kv_heads, dv)
    if case.intervals and intervals is None:
        intervals = random_intervals(case.intervals, batch, case.kv_heads, rows, keys, g)
    slopes = torch.rand(case.heads, device=g.device, generator=g) if case.alibi else None
    window = (-1, 0) if case.mask == "causal" else case.window
    call = AttentionCall(
        q, k, v, layout, window, intervals, case.intervals, scale=scale, softcap=case.softcap, alibi_slopes=slopes,
        deterministic=case.deterministic, dropout=case.dropout, rng=rng_of(g.device) if case.dropout else None,
    )  # fmt: skip
    out, lse = reference.attend(call, reference.cast(call.bhsd(), torch.float32), reference.visible(call))
    out = (out.transpose(1, 2) if layout == "bshd" else out).to(q.dtype).contiguous()
    dout = torch.randn(out.shape, device=g.device, generator=g).to(q.dtype)
    of_lse = torch.randn(lse.shape, device=g.device, generator=g) if dlse else None
    return BackwardCall.after(call, out, lse.contiguous(), dout, of_lse)


def poisoned(call: BackwardCall) -> dict[str, torch.Tensor]:
    return {name: t.fill_(torch.nan) for name, t in call.new_outputs().items()}


def load(text: str, folder: Path) -> Library:
    return emulated.build(text, folder, BackwardParams)


def check(
    case: Case, folder: Path, rows: int, keys: int, *, seed: int = 0, chance: int = 0, units: int = 2, text: str = "",
    **more: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """`seed` is of the inputs; together with `chance` it decides what comes first."""
    call = make_call(case, rows, keys, torch.Generator().manual_seed(seed), **more)
    outputs = poisoned(call)
    library = load(text or _source(case), folder)
    emulated.launch(library, call, outputs, seed=seed + chance, units=units, fill=make_backward_params)
    verdict = gradients.check(call, outputs)
    assert verdict, verdict.message
    return outputs


SIZES = ((150, 150), (70, 210), (210, 90))


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(CASES, every=4), ids=str)
def test_right_whatever_comes_first(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(SIZES):
        layout = ("bshd", "bhsd")[seed % 2]
        check(case, folder, rows, keys, seed=seed, units=(3, 2, 5)[seed], dlse=seed == 1, layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(DETERMINISTIC, every=4), ids=str)
def test_the_order_of_blocks_changes_no_bit(case: Case, folder: Path) -> None:
    for rows, keys in SIZES:
        intervals = None
        if case.intervals:
            g = torch.Generator().manual_seed(5)
            intervals = random_intervals(case.intervals, 1, case.kv_heads, rows, keys, g)
        # how many blocks share the visits of a key tile follows from the units
        runs = [check(case, folder, rows, keys, chance=chance, intervals=intervals) for chance in range(3)]
        for other in runs[1:]:
            for name, t in runs[0].items():
                assert torch.equal(t, other[name]), name


def test_sums_from_registers_wait_for_their_turn(folder: Path) -> None:
    """Else their order, and so the bits, follow from what comes first."""
    case = Case("shared_red", deterministic=True)
    text, wait = _source(case), "        ptx::wait_for_turn(before, mine);\n"
    assert text.count(wait) == 1
    for broken in (False, True):
        here = text.replace(wait, "") if broken else text
        runs = [check(case, folder, 300, 400, chance=chance, units=4, text=here)["dq"] for chance in range(8)]
        assert broken != all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.slow
def test_packed_documents(folder: Path) -> None:
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor((150, 17, 100, 60)))
    for case in [*CASES, *DETERMINISTIC]:
        causal = case.window == (-1, 0)
        if case.intervals == ("lower1" if causal else "both2"):
            bounds = masks.from_documents(ids[None], causal=causal).to(torch.int32)
            check(case, folder, 327, 327, intervals=bounds)


def test_a_document_that_all_see_between_others(folder: Path) -> None:
    """Rows of the last document see the first one and their own: the tiles between have no turn."""
    case = next(case for case in DETERMINISTIC if case.intervals == "both2")
    bounds = torch.zeros(1, 1, 700, 2, dtype=torch.int32)
    bounds[..., 0] = 700  # the first 130 keys are hidden from nobody, the next from who comes after row 250
    bounds[:, :, 130:500, 0] = 250
    check(case, folder, 700, 700, intervals=bounds)


@pytest.mark.parametrize("scheme", ["base", "last_block"])
def test_rows_and_keys_that_see_nothing(folder: Path, scheme: str) -> None:
    case = Case(scheme)
    for rows, keys in ((300, 1), (1, 300), (130, 64)):
        filled = check(case, folder, rows, keys, dlse=True)
        if rows > keys:
            assert (filled["dq"][:, : rows - keys] == 0).all()
    for rows, keys in ((0, 70), (70, 0)):
        q, k = (torch.randn(1, n, 2, 64, dtype=torch.bfloat16) for n in (rows, keys))
        call: Any = AttentionCall.of(q, k, k, causal=True)
        call = BackwardCall.after(call, q, torch.full((1, 2, rows), -torch.inf), q)
        outputs = poisoned(call)
        emulated.launch(load(_source(case), folder), call, outputs, fill=make_backward_params)
        assert all((t == 0).all() for t in outputs.values())


@pytest.mark.parametrize("scheme", ["base", "seeded"])
def test_large_scores_stay_finite(folder: Path, scheme: str) -> None:
    check(Case(scheme, mask="none"), folder, 70, 70, magnitude=30.0)


# ---- what is wrong is found ------------------------------------------------------------------------------------------

_BROKEN, _BROKEN_LOADER = Case("base", mask="none"), Case("loader", mask="none")


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        (_BROKEN, "    pipelines.q.acquire();\n", ""),  # q is overwritten while it is read
        (_BROKEN, "    pipelines.dout.wait();\n", ""),  # dO is read before it is there
        (_BROKEN, "    pipelines.dq.acquire();\n", ""),  # dQ is overwritten before it is added
        # dS is read before all have stored theirs, or overwritten while it is read
        (_BROKEN, "      ptx::barrier_sync(kBarrier, L::kGroups * 128);\n", "      ;\n"),
        (_BROKEN, "      ptx::barrier_sync(kBarrier + 1, L::kGroups * 128);\n", "      ;\n"),
        (_BROKEN_LOADER, "    pipelines.handed_ds.wait();\n", ""),
        (_BROKEN_LOADER, "      pipelines.handed_ds.acquire();\n", "      ;\n"),
    ],
)
def test_who_does_not_wait_is_wrong(folder: Path, case: Case, old: str, new: str) -> None:
    text = _source(case)
    assert old in text
    text = text.replace(old, new)
    assert any(_is_wrong(text, folder, seed, case=case) for seed in range(40))


_CHOSEN = "choose_splits<C>(p, gpu)"


def _sharing(case: Case, blocks: int) -> str:
    """The kernel where so many blocks share the visits of a key tile, whatever the host would choose."""
    text = _source(case)
    assert text.count(_CHOSEN) == 1
    return text.replace(_CHOSEN, f"(sizeof(char[kMostSplits<C> >= {blocks} ? 1 : -1]) ? {blocks} : 0)")


_LARGE = (("dout_stages", 1), ("dq_sink", "red"))
_SHARED = Case("shared_three_groups", head_dim=192, heads=3, kv_heads=1, changes=_LARGE)
_SHARING = {
    2: [Case("base"), Case("loader", mask="none"), Case("base", deterministic=True), _SHARED],
    4: [
        Case("three_groups", heads=3, kv_heads=1),
        Case("stored_first_shared", head_dim=256, kv_heads=4, changes=(*ONE_STAGE, ("q_stages", 1))),
    ],
    8: [
        Case("long_tiles", mask="none", kv_heads=1),
        Case("held_v", head_dim=72, head_dim_v=96, heads=3, kv_heads=1),
        Case("shared_three_groups", mask="window", window=(70, 20), head_dim=136, kv_heads=1, changes=_LARGE),
        Case("base", mask="intervals", intervals="lower2", deterministic=True),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("blocks", "case"), [(n, case) for n, cases in _SHARING.items() for case in cases], ids=str)
def test_blocks_share_the_visits_of_a_key_tile(folder: Path, blocks: int, case: Case) -> None:
    """Those of one head or of several; some blocks may have none. Sequences end anywhere."""
    text = _sharing(case, blocks)
    for seed, (rows, keys) in enumerate(((70, 130), (300, 200))):
        check(case, folder, rows, keys, units=5, seed=seed, batch=2 - seed, text=text)


@pytest.mark.parametrize("case", [Case("base", kv_heads=1), _SHARED], ids=str)
def test_sums_of_a_cluster_are_of_all_parts_when_they_are_there(folder: Path, case: Case) -> None:
    text = _sharing(case, 4)
    for old, new in (
        ("i < splits; ++i", "i < 1; ++i"),  # only one block's part
        ("    ptx::cluster_sync();\n#pragma unroll 1", "#pragma unroll 1"),  # before it is there
    ):
        assert text.count(old) == 1
        broken = text.replace(old, new)
        assert any(_is_wrong(broken, folder, seed, case=case, rows=300, keys=70, units=5) for seed in range(10))


_MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks" / "h200_backward_splits.json").read_text())["rows"]
# Blocks at once: those that the model was fitted with.
_ASKED = """
extern "C" int chosen_splits(const fagen_backward_params* p) {
  const fagen::ResidentBlocks h200 = {132, {132, 132, 124, 112}};
  return fagen::choose_splits<fagen::Config>(*p, h200);
}
extern "C" int most_splits() { return fagen::kMostSplits<fagen::Config>; }
"""


@pytest.mark.slow
@pytest.mark.parametrize("static", ["d128/causal", "d128/none", "d80/none", "d64/causal", "d144/none", "d224/causal"])
def test_as_many_blocks_share_as_were_fastest(folder: Path, static: str) -> None:
    """On an H200, of 1, 2, 4 and 8 blocks."""
    rows = {
        f"backward {row.name}": row.problem
        for name in ("peers", "random")
        for row in suite(name, TARGET, 1, "backward")
    }
    held = {name: p for name, p in rows.items() if f"/{static}/" in p.key and len(_MEASURED.get(name, {})) > 2}
    assert held
    for name, problem in held.items():
        text = emulated.source(FAMILY, problem, TARGET, FAMILY.default(problem, TARGET)) + _ASKED
        params = BackwardParams()
        for size in ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "window_left", "window_right"):
            setattr(params, size, getattr(problem, size))
        library = load(text, folder)._library
        chosen = library.chosen_splits(ctypes.byref(params))
        assert library.most_splits() == max(
            splits(problem, FAMILY.default(problem, TARGET))
        )  # as the cost model has it
        times = {blocks: seconds for blocks, seconds in _MEASURED[name].items() if blocks != "before"}
        assert times[str(chosen)] <= 1.04 * min(times.values()), (name, chosen, times)


@pytest.mark.parametrize("scheme", sample(["base", "first_owner_red", "last_block"], every=2))
def test_one_tile_has_all_keys(folder: Path, scheme: str) -> None:
    """What a block has of dQ is stored as it is. Rows that see none of the keys get zeros."""
    for case in (Case(scheme), Case(scheme, mask="window", window=(70, 20), kv_heads=4)):
        for rows, keys in ((300, 100), (90, 128)):
            check(case, folder, rows, keys, dlse=True)


def _is_wrong(
    text: str, folder: Path, seed: int, *, case: Case = _BROKEN, rows: int = 200, keys: int = 200, **more: Any
) -> bool:
    try:
        check(case, folder, rows, keys, seed=seed, text=text, **more)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(
    "old", ["    pipelines.dout.release();\n", "      if (leads()) ptx::mbarrier_arrive(pipelines.dq.empty());\n"]
)
def test_who_waits_for_ever_is_told(folder: Path, old: str) -> None:
    text = _source(_BROKEN)
    assert old in text
    with pytest.raises(AssertionError, match="(?s)nothing can go on.*waits for barrier at"):
        check(_BROKEN, folder, 300, 200, text=text.replace(old, ""))


def test_every_value_of_every_knob_is_run() -> None:
    for knob in FAMILY.knobs:
        assert {scheme[knob.name] for scheme in SCHEMES.values()} == set(knob.choices), knob.name
