"""cpu_forward against the oracle: every knob value, ragged sizes, every mask, every dtype, what a row may see."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from fagen.codegen import render
from fagen.codegen.spec import KernelSpec
from fagen.errors import BuildError, InvalidConfig, LaunchError
from fagen.families import cpu_forward
from fagen.families.space import enumerate_space
from fagen.ops.attention import reference
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.params import make_params
from fagen.ops.attention.problem import INTERVAL_KINDS, Problem
from fagen.runtime import kernel
from fagen.runtime.kernel import Kernel
from fagen.target import Target, host, known

FAMILY = cpu_forward.FAMILY
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AVX512 = Target("cpu", "test", 2, simd="avx512")
AVX2 = Target("cpu", "test", 2, simd="avx2")
# around the edges of vectors (16), of groups (32, 48, 64) and of tiles (64 to 256), in both directions
SIZES = [(1, 1), (1, 300), (63, 64), (65, 63), (64, 129), (130, 257), (257, 130), (200, 1)]


@functools.cache
def build(mask: str = "none", changes: tuple[tuple[str, Any], ...] = (), **static: Any) -> Kernel:
    """One compilation for all sizes; many tiles of keys unless asked otherwise."""
    problem = Problem(mask=mask, **{"dtype": "fp32", "head_dim": 64, "aligned": False, **static})
    config = FAMILY.default(problem, AVX512).replace(**{"tile_n": 64, **dict(changes)})
    return kernel.get(KernelSpec(FAMILY, problem, AVX512, config))


def inputs(k: Kernel, sq: int, sk: int, *, batch: int = 1, heads: int = 2, kv_heads: int = 0, d: int = 0, dv: int = 0):
    """bhsd tensors, as many heads as asked for; true head_dims below the padded ones on request."""
    dtype, kv_heads = DTYPES[k.spec.problem.dtype], kv_heads or heads
    d, dv = d or k.spec.problem.head_dim, dv or k.spec.problem.head_dim_v
    random = torch.Generator().manual_seed(sq * 1009 + sk)
    shapes = ((batch, heads, sq, d), (batch, kv_heads, sk, d), (batch, kv_heads, sk, dv))
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def launched(k: Kernel, q, key, v, *, window=(-1, -1), softcap=0.0, scale=None, intervals=None, alibi=None):
    """The call and its outputs, poisoned before."""
    if k.spec.problem.mask == "causal":
        window = (-1, 0)
    call = AttentionCall(
        q, key, v, "bhsd", window, intervals, k.spec.problem.intervals, softcap, alibi, scale, want_lse=True
    )  # fmt: skip
    outputs = {name: t.fill_(math.nan) for name, t in call.new_outputs().items()}
    k.launch(call, outputs)
    return call, outputs


def run(k: Kernel, *tensors, **options):
    """Output and LSE."""
    return tuple(launched(k, *tensors, **options)[1].values())


def verify(k: Kernel, q, key, v, **options):
    call, outputs = launched(k, q, key, v, **options)
    verdict = reference.check(call, outputs)
    assert verdict, f"{verdict.message} ({tuple(q.shape)} {tuple(key.shape)} {k.config})"
    return tuple(outputs.values())


def random_intervals(kind: str, batch: int, heads: int, sq: int, sk: int) -> torch.Tensor:
    """Any bounds at all, within which some tiles are hidden whole, some in part, some not."""
    random = torch.Generator().manual_seed(sq + sk)
    columns = len(INTERVAL_KINDS[kind])
    cuts = torch.randint(0, sq + 1, (batch, heads, sk, columns), generator=random, dtype=torch.int32)
    cuts[:, :, : sk // 3, 0] = 0  # of the first keys, all later rows are hidden, or a whole interval
    if kind == "both2":
        return torch.stack([cuts.amax(-1), cuts.amin(-1)], dim=-1)
    return cuts.reshape(batch, heads, sk, -1, min(columns, 2)).sort(dim=-1).values.reshape(cuts.shape).contiguous()


# ---- knobs ---------------------------------------------------------------------------

CONFIGS = [
    {"tile_m": 64, "tile_n": 128, "schedule": "longest", "block_rows": 6, "block_vectors": 4},
    {"tile_m": 32, "tile_n": 64, "schedule": "blocked", "block_rows": 12, "block_vectors": 2},
    {"tile_m": 96, "tile_n": 256, "schedule": "dynamic", "block_rows": 8, "block_vectors": 3, "packing": "head"},
    {"tile_m": 128, "tile_n": 64, "schedule": "longest", "block_rows": 4, "block_vectors": 4, "packing": "tile"},
    {"tile_m": 48, "loop_order": "kv_outer", "schedule": "blocked", "block_vectors": 3, "packing": "tile"},
    {"tile_m": 64, "loop_order": "kv_outer", "schedule": "dynamic", "tile_n": 64},
]


def test_the_configs_hold_every_knob_value():
    default = FAMILY.default(Problem(dtype="fp32", mask="causal"), AVX512)
    for knob in FAMILY.knobs:
        assert {default.replace(**c)[knob.name] for c in CONFIGS} == set(knob.choices), knob.name


@pytest.mark.slow
@pytest.mark.parametrize("changes", CONFIGS, ids=lambda c: " ".join(map(str, c.values())))
def test_every_knob_value_at_ragged_sizes(changes):
    k = build("causal", tuple(changes.items()))
    for sq, sk in SIZES:
        verify(k, *inputs(k, sq, sk, d=60, dv=50))
    verify(k, *inputs(k, 130, 257, batch=2, heads=4, kv_heads=2))


def test_every_schedule_and_loop_order_gives_the_same():
    """Threads and orders only divide the work: same tiles, same bits."""
    shared = {"tile_m": 64, "tile_n": 64, "block_rows": 4, "block_vectors": 4}
    tensors = None
    results = []
    for changes in (CONFIGS[3] | {"tile_m": 128}, shared | CONFIGS[5] | {"block_rows": 4}):
        k = build("causal", tuple(changes.items()))
        tensors = tensors or inputs(k, 257, 300, heads=3)
        for threads in (1, 2):
            with_threads(threads)
            results.append(verify(k, *tensors))
    with_threads(2)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def with_threads(count: int) -> None:
    torch.set_num_threads(count)


# ---- masks, heads, head_dims ---------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "causal", "window"])
def test_bands(mask):
    k = build(mask)
    windows = [(20, 0), (0, 0), (-1, 40), (70, 5), (300, 300)] if mask == "window" else [(-1, -1)]
    for window in windows:
        for sq, sk in SIZES:
            for heads, kv_heads in ((4, 4), (4, 2), (3, 1)):
                verify(k, *inputs(k, sq, sk, batch=2, heads=heads, kv_heads=kv_heads, d=64, dv=50), window=window)


@pytest.mark.slow
@pytest.mark.parametrize("kind", INTERVAL_KINDS)
def test_intervals(kind):
    k = build("intervals", intervals=kind)
    for sq, sk in SIZES:
        tensors = inputs(k, sq, sk, batch=2, heads=4, kv_heads=2)
        for mask_heads in (1, 2):
            bounds = random_intervals(kind, 2, mask_heads, sq, sk)
            for window in ((-1, -1), (-1, 0), (30, 10)):
                verify(k, *tensors, intervals=bounds, window=window)
    broadcast = random_intervals(kind, 1, 1, 130, 257)
    q, key, v = inputs(k, 130, 257, batch=2)
    verify(k, q, key, v, intervals=broadcast)


def test_intervals_with_keys_outside():
    k = build("intervals", (("loop_order", "kv_outer"), ("schedule", "dynamic")), intervals="both4")
    for sq, sk in SIZES:
        tensors = inputs(k, sq, sk, heads=4, kv_heads=2)
        verify(k, *tensors, intervals=random_intervals("both4", 1, 2, sq, sk), window=(-1, 0))


@pytest.mark.parametrize(("d", "dv"), [(16, 16), (128, 128), (192, 128), (80, 256)])
def test_head_dims(d, dv):
    k = build("causal", head_dim=d, head_dim_v=dv)
    for less in (0, 1, 13):
        verify(k, *inputs(k, 70, 150, d=d - less, dv=dv - less))


@pytest.mark.parametrize(("softcap", "alibi"), [(True, False), (False, True), (True, True)])
def test_softcap_and_alibi(softcap, alibi):
    k = build("causal", softcap=softcap, alibi=alibi)
    slopes = torch.rand(2, 4, generator=torch.Generator().manual_seed(0)) if alibi else None
    for sq, sk in ((130, 257), (257, 130)):
        for cap in (5.0, 50.0) if softcap else (0.0,):
            tensors = inputs(k, sq, sk, batch=2, heads=4, kv_heads=2)
            verify(k, *tensors, softcap=cap, alibi=slopes)
            verify(k, *tensors, softcap=cap, alibi=None if slopes is None else slopes[0], scale=-0.1)


# ---- dtypes, layouts, numbers ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["tile", "head"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(dtype, packing):
    k = build("causal", (("packing", packing),), dtype=dtype)
    for sq, sk in SIZES:
        verify(k, *inputs(k, sq, sk, heads=4, kv_heads=2, d=60, dv=50))
    q, key, v = inputs(k, 130, 130)
    verify(k, q * 8, key * 8, v)
    verify(k, q * 1e-6, key, v * 1e-6)  # subnormal halves


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_any_strides(dtype):
    k = build("causal", dtype=dtype)
    wide = [torch.randn(2, 90, 4, 211).to(DTYPES[dtype]) for _ in range(3)]
    q, key, v = (t.transpose(1, 2)[..., i : i + 50] for i, t in enumerate(wide))
    out = torch.full((2, 90, 4, 131), math.nan, dtype=DTYPES[dtype])
    view = out[..., 3:53].transpose(1, 2)
    call = AttentionCall.of(q, key, v, layout="bhsd", causal=True)
    k.launch(call, {"out": view})
    assert reference.check(call, {"out": view})
    outside = torch.cat([out[..., :3], out[..., 53:]], dim=-1)
    assert outside.isnan().all(), "wrote outside of the output"


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_layouts(layout):
    k = build("none")
    q, key, v = (torch.randn(2, 70, 70, 64) for _ in range(3))
    out = torch.full_like(q, math.nan)
    call = AttentionCall.of(q, key, v, layout=layout)
    k.launch(call, {"out": out})
    assert reference.check(call, {"out": out})


def test_rows_that_see_nothing():
    k = build("causal")
    q, key, v = inputs(k, 200, 70)
    out, lse = verify(k, q, key, v)
    assert (out[:, :, :130] == 0).all()
    assert (lse[:, :, :130] == -math.inf).all()
    assert lse[:, :, 130:].isfinite().all()


def test_what_is_not_seen_is_not_read():
    """Keys outside of every row's window, and tiles that intervals hide, may hold anything."""
    k = build("window")
    q, key, v = inputs(k, 64, 600)
    want, _ = verify(k, q, key, v, window=(10, 0))
    key[:, :, :512], v[:, :, :512] = math.nan, math.nan
    assert torch.equal(run(k, q, key, v, window=(10, 0))[0], want)

    k = build("intervals", intervals="lower1")
    q, key, v = inputs(k, 100, 640)
    hidden = torch.full((1, 1, 640, 1), 100, dtype=torch.int32)
    hidden[:, :, 128:384] = 0  # two tiles
    hidden[:, :, 400:500] = 0
    want, _ = verify(k, q, key, v, intervals=hidden)
    key[:, :, 128:384], v[:, :, 128:384] = math.nan, math.nan
    assert torch.equal(run(k, q, key, v, intervals=hidden)[0], want)


def test_large_and_odd_numbers():
    k = build("causal")
    q, key, v = inputs(k, 130, 257)
    verify(k, q * 4, key * 4, v * 1e4)
    verify(k, q * 1e16, key * 1e16, v)  # the softmax is one-hot
    verify(k, q, key, v, scale=-0.125)
    verify(k, q, key, v, scale=0.0)
    rising = key * torch.arange(257.0)[:, None] / 8  # the maximum grows from tile to tile: O is rescaled
    verify(k, q, rising, v)


def test_a_nan_stays_in_its_row():
    k = build("causal")
    q, key, v = inputs(k, 130, 257)
    want, _ = run(k, q, key, v)
    q[0, 1, 77, 5] = math.nan
    out, lse = run(k, q, key, v)
    assert out[0, 1, 77].isnan().all()
    assert lse[0, 1, 77].isnan()
    out[0, 1, 77] = want[0, 1, 77]
    assert torch.equal(out, want)


# ---- the family ---------------------------------------------------------------------------


def test_errors_of_a_launch():
    k = build("none")
    q, key, v = inputs(k, 10, 10)
    packed = build("causal", tuple(CONFIGS[2].items()))
    out = torch.empty_like(q)
    params = make_params(AttentionCall.of(q, key, v, layout="bhsd"), {"out": out})
    assert packed.library.launch(params, None) != 0
    assert b"workspace" in packed.library.error(packed.library.launch(params, None))
    params.head_dim = 65
    assert b"head_dim" in k.library.error(k.library.launch(params, None))
    params.head_dim, params.kv_heads = 64, 3
    assert b"multiple" in k.library.error(k.library.launch(params, None))
    params.kv_heads, params.q.data = 2, None
    assert b"null" in k.library.error(k.library.launch(params, None))
    assert k.library.error(99) == b"unknown error"
    assert issubclass(LaunchError, Exception)


@pytest.mark.parametrize("target", [AVX512, AVX2], ids=lambda t: t.simd)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_default_and_seeds_are_legal_and_the_space_is_searchable(target, dtype, mask):
    for d in range(16, 257, 16):
        for dv in {16, 64, 128, d, 256}:
            problem = Problem(dtype=dtype, head_dim=d, head_dim_v=dv, mask=mask)
            FAMILY.require(problem, target, FAMILY.config(FAMILY.default(problem, target)))
            for seed in FAMILY.first_configs(problem, target):
                FAMILY.require(problem, target, seed)
    space = enumerate_space(FAMILY, Problem(dtype=dtype, head_dim=128, mask=mask), target)
    assert 50 <= len(space.legal) <= 520


BREAKS = {
    "whole_groups": ({}, {"tile_m": 96}),
    "block_fits": ({}, {"block_rows": 12}),
    "direct_floats": ({"dtype": "bf16"}, {"packing": "direct"}),
    "order_matters": ({"mask": "none"}, {"schedule": "longest"}),
    "one_scheme": ({}, {"loop_order": "kv_outer", "tile_m": 128}),
    "scratch_fits": ({"head_dim": 256}, {"tile_n": 256, "packing": "tile"}),
}


@pytest.mark.parametrize("constraint", FAMILY.constraints, ids=lambda c: c.name)
def test_constraints_accept_and_reject_with_numbers(constraint):
    static, changes = BREAKS[constraint.name]
    problem = Problem(**{"dtype": "fp32", "mask": "causal", **static})
    config = FAMILY.default(problem, AVX512)
    assert constraint.check(problem, AVX512, config) is None
    broken = config.replace(**changes)
    assert FAMILY.rejects(problem, AVX512, broken)[0] == constraint.name
    with pytest.raises(InvalidConfig, match=constraint.name):
        FAMILY.require(problem, AVX512, broken)


def test_no_gpu():
    assert "needs a CPU" in FAMILY.supports(Problem(), known("sm_90"))
    assert FAMILY.supports(Problem(dtype="fp32"), host()) is None


@pytest.mark.parametrize("name", ["tile_bytes", "scratch_bytes"])
def test_a_derived_value_that_drifts_is_a_compile_error(name, monkeypatch):
    problem = Problem(dtype="fp32", head_dim=16)
    config = FAMILY.default(problem, AVX512)
    derived = FAMILY.derive(problem, AVX512, config)
    text = KernelSpec(FAMILY, problem, AVX512, config).source
    drifted = text.replace(f"{name} = {derived[name]}", f"{name} = {derived[name] - 64}")
    assert drifted != text
    monkeypatch.setattr(render, "fold", lambda *args: drifted)
    with pytest.raises(BuildError):
        kernel.get(KernelSpec(FAMILY, problem, AVX512, config))
