"""cpu_backward against autograd: every knob value, ragged sizes, every mask, every dtype, what a row may see."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch

from fagen.codegen import render
from fagen.codegen.spec import KernelSpec
from fagen.errors import BuildError, InvalidArgument, InvalidConfig
from fagen.families import cpu_backward
from fagen.families.space import enumerate_space
from fagen.ops.attention import gradients, reference
from fagen.ops.attention.backward import BackwardProblem
from fagen.ops.attention.backward_call import BackwardCall
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.problem import INTERVAL_KINDS
from fagen.runtime import kernel
from fagen.runtime.kernel import Kernel
from fagen.target import Target, host, known
from tests.families.test_cpu_forward import random_intervals, with_threads
from tests.support.thorough import sample

FAMILY = cpu_backward.FAMILY
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AVX512 = Target("cpu", "test", 2, simd="avx512")
AVX2 = Target("cpu", "test", 2, simd="avx2")
# around the edges of vectors (16), of groups (32, 48, 64) and of tiles, in both directions
ORDERS = ["q_outer", pytest.param("kv_outer", marks=pytest.mark.slow)]
SIZES = [(1, 1), (1, 300), (63, 64), (65, 63), (130, 257), (200, 1)]


@functools.cache
def build(mask: str = "none", changes: tuple[tuple[str, Any], ...] = (), **static: Any) -> Kernel:
    """One compilation for all sizes; many small tiles unless asked otherwise."""
    problem = BackwardProblem(mask=mask, **{"dtype": "fp32", "head_dim": 32, "aligned": False, **static})
    config = FAMILY.default(problem, AVX512).replace(**{"tile_m": 64, "tile_n": 64, **dict(changes)})
    return kernel.get(KernelSpec(FAMILY, problem, AVX512, config))


def call_of(
    k: Kernel, sq: int, sk: int, *, batch: int = 1, heads: int = 2, kv_heads: int = 0, d: int = 0, dv: int = 0,
    window: tuple[int, int] = (-1, -1), dlse: bool = True, layout: str = "bhsd", size: float = 1.0, **options: Any,
) -> BackwardCall:  # fmt: skip
    """Random tensors for a kernel, and what forward gives for them; true head_dims below the padded ones on request."""
    p, kv_heads = k.spec.problem, kv_heads or heads
    d, dv = d or p.head_dim, dv or p.head_dim_v
    random = torch.Generator().manual_seed(sq * 1009 + sk)

    def tensor(length: int, heads: int, dim: int) -> torch.Tensor:
        shape = (batch, heads, length, dim) if layout == "bhsd" else (batch, length, heads, dim)
        return torch.randn(shape, generator=random).to(DTYPES[p.dtype])

    q, key, v = tensor(sq, heads, d) * size, tensor(sk, kv_heads, d) * size, tensor(sk, kv_heads, dv) * size
    window = (-1, 0) if p.mask == "causal" else window
    forward = AttentionCall(q, key, v, layout, window, kind=p.intervals, **options)
    random_dlse = torch.randn(batch, heads, sq, generator=random) if dlse else None
    return after(forward, tensor(sq, heads, dv), random_dlse)


def after(forward: AttentionCall, dout: torch.Tensor, dlse: torch.Tensor | None = None) -> BackwardCall:
    """The call that differentiates a forward call: its results exact, then rounded."""
    exact = reference.cast(forward.bhsd(), torch.float64)
    out, lse = reference.attend(forward, exact, reference.visible(forward))
    out = out if forward.layout == "bhsd" else out.transpose(1, 2)
    return BackwardCall.after(forward, out.to(dout.dtype).contiguous(), lse.float().contiguous(), dout, dlse)


def run(k: Kernel, call: BackwardCall) -> dict[str, torch.Tensor]:
    """The gradients by name, poisoned before."""
    outputs = {name: t.fill_(math.nan) for name, t in call.new_outputs().items()}
    k.launch(call, outputs)
    return outputs


def verify(k: Kernel, call: BackwardCall) -> dict[str, torch.Tensor]:
    outputs = run(k, call)
    verdict = gradients.check(call, outputs)
    assert verdict, f"{verdict.message} ({tuple(call.q.shape)} {tuple(call.k.shape)} {k.spec.config})"
    return outputs


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- knobs ---------------------------------------------------------------------------

CONFIGS = [
    {"tile_m": 64, "tile_n": 128, "parts": 1, "schedule": "blocked", "block_rows": 6, "block_vectors": 4},
    {"tile_m": 32, "tile_n": 32, "parts": 256, "schedule": "dynamic", "block_rows": 12, "block_vectors": 2},
    {"tile_m": 96, "tile_n": 128, "parts": 16, "block_rows": 8, "block_vectors": 3, "packing": "head"},
    {"tile_m": 128, "tile_n": 64, "parts": 4, "block_rows": 4, "block_vectors": 4, "packing": "tile"},
    {"tile_m": 48, "tile_n": 256, "loop_order": "kv_outer", "parts": 64, "block_vectors": 3, "packing": "tile"},
    {"tile_m": 64, "tile_n": 32, "loop_order": "kv_outer", "parts": 4, "schedule": "blocked", "packing": "direct"},
]


def test_the_configs_hold_every_knob_value():
    default = FAMILY.default(BackwardProblem(dtype="fp32", mask="causal"), AVX512)
    for knob in FAMILY.knobs:
        assert {default.replace(**c)[knob.name] for c in CONFIGS} == set(knob.choices), knob.name


@pytest.mark.slow
@pytest.mark.parametrize("changes", sample(CONFIGS, every=2), ids=lambda c: " ".join(map(str, c.values())))
def test_every_knob_value_at_ragged_sizes(changes):
    k = build("causal", tuple(changes.items()))
    for sq, sk in SIZES:
        verify(k, call_of(k, sq, sk, d=28, dv=18))
    verify(k, call_of(k, 130, 257, batch=2, heads=4, kv_heads=2))


@pytest.mark.parametrize("order", ["q_outer", "kv_outer"])
def test_the_same_bits_whatever_the_threads_do(order):
    k = build("causal", (("loop_order", order), ("parts", 16)))
    call = call_of(k, 257, 300, heads=4, kv_heads=2)
    results = []
    try:
        for threads in (1, 2, 3, 2):
            with_threads(threads)
            results.append(run(k, call))
    finally:
        with_threads(2)
    assert all(same(result, results[0]) for result in results[1:])


# ---- masks, heads, head_dims ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask", ["none", "causal", "window"])
def test_bands(mask, order):
    k = build(mask, (("loop_order", order),))
    windows = [(20, 0), (0, 0), (-1, 40), (70, 5), (300, 300)] if mask == "window" else [(-1, -1)]
    groups = itertools.cycle([(4, 2), (2, 2), (3, 1), (4, 4)])
    for window in windows:
        for (sq, sk), (heads, kv_heads) in zip(SIZES, groups, strict=False):
            verify(k, call_of(k, sq, sk, batch=2, heads=heads, kv_heads=kv_heads, dv=18, window=window))


@pytest.mark.slow
@pytest.mark.parametrize("order", sample(["q_outer", "kv_outer"], every=2))
@pytest.mark.parametrize("kind", INTERVAL_KINDS)
def test_intervals(kind, order):
    k = build("intervals", (("loop_order", order), ("tile_n", 32), ("tile_m", 64)), intervals=kind)
    windows = itertools.cycle([(-1, -1), (-1, 0), (30, 10)])
    for (sq, sk), mask_heads in itertools.product(SIZES, (1, 2)):
        bounds = random_intervals(kind, 2, mask_heads, sq, sk)
        verify(k, call_of(k, sq, sk, batch=2, heads=4, kv_heads=2, window=next(windows), intervals=bounds))
    verify(k, call_of(k, 130, 257, batch=2, intervals=random_intervals(kind, 1, 1, 130, 257)))


@pytest.mark.parametrize(("d", "dv"), [(16, 16), (128, 128), (192, 128), (80, 256)])
def test_head_dims(d, dv):
    k = build("causal", (("tile_m", 64),), head_dim=d, head_dim_v=dv)
    for less in (0, 1, 13):
        verify(k, call_of(k, 70, 150, d=d - less, dv=dv - less))


@pytest.mark.parametrize(("softcap", "alibi"), [(True, False), (False, True), (True, True)])
def test_softcap_and_alibi(softcap, alibi):
    k = build("causal", softcap=softcap, alibi=alibi)
    slopes = torch.rand(2, 4, generator=torch.Generator().manual_seed(0)) if alibi else None
    for sq, sk in ((130, 257), (257, 130)):
        for cap in (0.5, 5.0, 50.0) if softcap else (0.0,):
            sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "softcap": cap}
            verify(k, call_of(k, sq, sk, **sizes, alibi_slopes=slopes))
            verify(k, call_of(k, sq, sk, **sizes, alibi_slopes=slopes[0] if alibi else None, scale=-0.1))


# ---- dtypes, layouts, numbers ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["tile", "head"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(dtype, packing):
    k = build("causal", (("packing", packing),), dtype=dtype)
    for sq, sk in SIZES:
        verify(k, call_of(k, sq, sk, heads=4, kv_heads=2, d=28, dv=18))
    for size in (4.0, 1e-3):
        verify(k, call_of(k, 130, 130, size=size))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_any_strides(dtype):
    k = build("causal", (("packing", "tile"),), dtype=dtype)
    made = call_of(k, 90, 90, batch=2, heads=4, d=30, dv=30)
    wide = {name: torch.randn(2, 90, 4, 71).to(DTYPES[dtype]) for name in ("q", "k", "v", "o", "dout")}
    views = {name: t.transpose(1, 2)[..., i : i + 30] for i, (name, t) in enumerate(wide.items())}
    for name, view in views.items():
        view.copy_(getattr(made, name))
    call = dataclasses.replace(made, **views)
    rooms = {name: torch.full((2, 90, 4, 51), math.nan, dtype=DTYPES[dtype]) for name in ("dq", "dk", "dv")}
    outputs = {name: t[..., 3:33].transpose(1, 2) for name, t in rooms.items()}
    k.launch(call, outputs)
    assert gradients.check(call, outputs)
    assert same(outputs, run(k, made))
    for name, t in rooms.items():
        assert torch.cat([t[..., :3], t[..., 33:]], dim=-1).isnan().all(), f"wrote outside of {name}"


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_layouts(layout):
    k = build("none")
    verify(k, call_of(k, 70, 50, batch=2, heads=4, kv_heads=2, layout=layout))


def test_the_gradient_of_the_lse_counts():
    k = build("causal")
    call = call_of(k, 130, 130)
    without = verify(k, dataclasses.replace(call, dlse=None))
    zeros = run(k, dataclasses.replace(call, dlse=torch.zeros_like(call.lse)))
    assert same(without, zeros)
    assert not torch.allclose(without["dq"], verify(k, call)["dq"], atol=1e-2)


def test_gradients_are_exact_to_float32():
    """Against float64, without a peer: the bound is one that float32 sums of some hundred terms keep."""
    k = build("causal", softcap=True, alibi=True)
    call = call_of(k, 130, 257, heads=4, kv_heads=2, softcap=2.0, alibi_slopes=torch.rand(4))
    exact = gradients.gradients(call, torch.float64)
    for name, mine in run(k, call).items():
        assert torch.allclose(mine.double(), exact[name], rtol=2e-5, atol=2e-5), name


def test_rows_that_see_nothing_have_no_part():
    k = build("causal")
    call = call_of(k, 200, 70)
    want = verify(k, call)
    assert (want["dq"][:, :, :130] == 0).all()
    for t in (call.q, call.o, call.dout):  # whatever lies there
        t[:, :, :130] = math.nan
    assert call.dlse is not None
    call.dlse[:, :, :130] = math.nan
    assert same(run(k, call), want)


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_not_seen_is_not_read(order):
    """Keys outside of every row's window, and tiles that intervals hide, may hold anything; their gradient is 0."""
    k = build("window", (("loop_order", order),))
    call = call_of(k, 64, 600, window=(10, 0))
    want = verify(k, call)
    call.k[:, :, :512], call.v[:, :, :512] = math.nan, math.nan
    assert same(run(k, call), want)
    assert (want["dk"][:, :, :512] == 0).all()

    k = build("intervals", (("loop_order", order),), intervals="lower1")
    hidden = torch.full((1, 1, 640, 1), 100, dtype=torch.int32)
    hidden[:, :, 128:384] = 0  # four tiles
    hidden[:, :, 400:500] = 0
    call = call_of(k, 100, 640, intervals=hidden)
    want = verify(k, call)
    call.k[:, :, 128:384], call.v[:, :, 128:384] = math.nan, math.nan
    assert same(run(k, call), want)


def test_large_and_odd_numbers():
    k = build("causal")
    verify(k, call_of(k, 130, 257, size=4.0))
    verify(k, call_of(k, 130, 257, scale=-0.125))
    verify(k, call_of(k, 130, 257, scale=0.0))
    verify(k, call_of(k, 130, 257, scale=1.2e-38))
    call = call_of(k, 130, 257, size=30.0)  # the softmax is nearly one-hot, scores go into the thousands
    verify(k, call)
    huge = run(k, after(dataclasses.replace(call.forward, q=call.q * 1e8, k=call.k * 1e8), call.dout))
    assert all(t.isfinite().all() for t in huge.values())


def test_a_nan_stays_in_its_row_and_the_keys_that_it_sees():
    k = build("causal")
    call = call_of(k, 130, 257)
    want = run(k, call)
    call.q[0, 1, 77, 5] = math.nan
    call.o[0, 1, 77], call.lse[0, 1, 77] = math.nan, math.nan
    found = run(k, call)
    assert found["dq"][0, 1, 77].isnan().all()
    found["dq"][0, 1, 77] = want["dq"][0, 1, 77]
    assert torch.equal(found["dq"], want["dq"])
    assert found["dk"][0, 1, :204].isnan().all()  # row 77 sees up to its diagonal
    assert torch.equal(found["dk"][0, 0], want["dk"][0, 0])


# ---- the family ---------------------------------------------------------------------------


def test_errors_of_a_launch():
    k = build("none", (("loop_order", "kv_outer"),))
    call = call_of(k, 10, 10)
    outputs = call.new_outputs()
    library, params = k.library, k.calls.params(call, outputs)
    assert b"workspace" in library.error(library.launch(params, None))
    params.head_dim = 33
    assert b"head_dim" in library.error(library.launch(params, None))
    params.head_dim, params.kv_heads = 32, 3
    assert b"multiple" in library.error(library.launch(params, None))
    params.kv_heads, params.dk.data = 2, None
    assert b"null" in library.error(library.launch(params, None))
    assert library.error(99) == b"unknown error"


def test_a_call_that_contradicts_itself_is_refused():
    k = build("none")
    call = call_of(k, 40, 40)
    outputs = call.new_outputs()
    for name, wrong in (("lse", call.lse[..., :-1]), ("dout", call.dout.double()), ("o", call.o[:, :1])):
        with pytest.raises(InvalidArgument, match=name):
            k.launch(dataclasses.replace(call, **{name: wrong}), outputs)
    with pytest.raises(InvalidArgument, match="outputs"):
        k.launch(call, {"dq": outputs["dq"]})
    with pytest.raises(InvalidArgument, match="kernel is for"):
        k.launch(dataclasses.replace(call, window=(-1, 0)), outputs)


@pytest.mark.parametrize("target", [AVX512, AVX2], ids=lambda t: t.simd)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_default_and_seeds_are_legal_and_the_space_is_searchable(target, dtype, mask):
    for d in range(16, 257, 16):
        for dv in {16, 64, 128, d, 256}:
            problem = BackwardProblem(dtype=dtype, head_dim=d, head_dim_v=dv, mask=mask)
            FAMILY.require(problem, target, FAMILY.config(FAMILY.default(problem, target)))
            for seed in FAMILY.first_configs(problem, target):
                FAMILY.require(problem, target, seed)
    space = enumerate_space(FAMILY, BackwardProblem(dtype=dtype, head_dim=128, mask=mask), target)
    assert 50 <= len(space.legal) <= 3000


def test_cost_tells_the_good_from_the_bad():
    problem = BackwardProblem(dtype="fp32", heads=1, seqlen_q=4096)
    default = FAMILY.default(problem, AVX2)
    of = lambda **changes: cpu_backward.cost(problem, AVX2, default.replace(**changes))  # noqa: E731
    assert of() < of(parts=1)  # one thread idles
    assert of() < of(parts=256)  # sums
    assert of() < of(block_rows=4)  # a block too small


BREAKS = {
    "whole_groups": ({}, {"tile_m": 96}),
    "block_fits": ({}, {"block_rows": 12}),
    "direct_floats": ({"dtype": "bf16"}, {"packing": "direct"}),
    "packed_once": ({}, {"loop_order": "kv_outer", "packing": "head", "tile_n": 32}),
    "scratch_fits": ({"head_dim": 256}, {"tile_m": 128}),
}


@pytest.mark.parametrize("constraint", FAMILY.constraints, ids=lambda c: c.name)
def test_constraints_accept_and_reject_with_numbers(constraint):
    static, changes = BREAKS[constraint.name]
    problem = BackwardProblem(**{"dtype": "fp32", "mask": "causal", **static})
    config = FAMILY.default(problem, AVX512)
    assert constraint.check(problem, AVX512, config) is None
    broken = config.replace(**changes)
    assert FAMILY.rejects(problem, AVX512, broken)[0] == constraint.name
    with pytest.raises(InvalidConfig, match=constraint.name):
        FAMILY.require(problem, AVX512, broken)


def test_no_gpu():
    assert "needs a CPU" in FAMILY.supports(BackwardProblem(), known("sm_90"))
    assert FAMILY.supports(BackwardProblem(dtype="fp32"), host()) is None


@pytest.mark.parametrize("name", ["rows_bytes", "scratch_bytes"])
def test_a_derived_value_that_drifts_is_a_compile_error(name, monkeypatch):
    problem = BackwardProblem(dtype="fp32", head_dim=16)
    config = FAMILY.default(problem, AVX512)
    derived = FAMILY.derive(problem, AVX512, config)
    text = KernelSpec(FAMILY, problem, AVX512, config).source
    drifted = text.replace(f"{name} = {derived[name]}", f"{name} = {derived[name] - 64}")
    assert drifted != text
    monkeypatch.setattr(render, "fold", lambda *args: drifted)
    with pytest.raises(BuildError):
        kernel.get(KernelSpec(FAMILY, problem, AVX512, config))
