"""Gradients through `fagen.attention` on a GPU: by our kernels, right by the rule, in all ways people ask for them.

The kernels themselves are tested in test_sm90_backward.py and test_sm80_backward.py. Here is the road to them:
autograd, streams, graphs, compilers, memory.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fagen
from fagen import api
from fagen.db import store
from fagen.dispatch import choose, resolve
from fagen.errors import InvalidArgument, LaunchError
from fagen.ops.attention import fallback, gradients, reference
from fagen.ops.attention.backward_call import GRADIENTS, BackwardCall
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.call import AttentionCall
from fagen.runtime import python_ops
from tests.support.cases import build_specs, present

Tensors = list[torch.Tensor]
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (100, 30)},
    "documents": {"causal": True},  # with intervals of one column
    "prefix": {},  # with intervals of two
    "softcap and alibi": {"causal": True, "softcap": 20.0},  # with slopes
}


@dataclass(frozen=True)
class Case:
    """What of a call decides its kernels."""

    mask: str = "causal"
    heads: tuple[int, int] = (4, 4)
    sizes: tuple[int, int] = (333, 333)
    dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    layout: str = "bshd"
    batch: int = 2
    aligned: bool = True
    deterministic: bool = False

    def tensors(self, device: str = "cuda", seed: int = 0) -> Tensors:
        """q, k and v, without values on the CPU."""
        g = torch.Generator(device).manual_seed(seed)
        held = self.dim if self.aligned else self.dim + 1

        def make(length: int, heads: int) -> torch.Tensor:
            order = (length, heads) if self.layout == "bshd" else (heads, length)
            t = torch.empty(self.batch, *order, held, dtype=self.dtype, device=device)
            return (t if device == "cpu" else t.normal_(generator=g))[..., : self.dim]

        (rows, keys), (heads, kv_heads) = self.sizes, self.heads
        return [make(rows, heads), make(keys, kv_heads), make(keys, kv_heads)]

    def leaves(self, seed: int = 0) -> Tensors:
        return [t.requires_grad_() for t in self.tensors(seed=seed)]

    def options(self, device: str = "cuda") -> dict[str, Any]:
        options = {**OPTIONS[self.mask], "layout": self.layout, "deterministic": self.deterministic}
        if self.mask == "documents":
            ids = torch.arange(self.sizes[1], device=device) // 90
            options["intervals"] = fagen.masks.from_documents(ids.expand(self.batch, -1))
        if self.mask == "prefix":
            prefix = torch.full((self.batch,), 100, device=device)
            options["intervals"] = fagen.masks.from_prefix(prefix, *self.sizes)
        if self.mask == "softcap and alibi":
            options["alibi_slopes"] = torch.linspace(0.05, 0.5, self.heads[0], device=device)
        return options

    def specs(self) -> Iterator[Any]:
        forward = AttentionCall.of(*self.tensors("cpu"), **self.options("cpu")).problem
        for problem in (forward, BackwardProblem.of(forward, deterministic=self.deterministic)):
            yield choose.choose(problem, present(), ours=True).spec

    def __str__(self) -> str:
        words = [self.mask, f"h{self.heads[0]}-{self.heads[1]}", f"d{self.dim}", self.layout, str(self.dtype)[6:]]
        flags = [name for name, on in (("deterministic", self.deterministic), ("unaligned", not self.aligned)) if on]
        return "-".join([*words, f"{self.sizes[0]}x{self.sizes[1]}", *flags])


SAME_BITS = Case(heads=(8, 4), sizes=(1000, 1000), deterministic=True)
LONG = Case(heads=(16, 16), sizes=(16384, 16384), dim=128, batch=1)
CASES = [
    *(
        Case(mask, heads, layout=layout)
        for mask in OPTIONS
        for heads in ((4, 4), (6, 2))
        for layout in ("bshd", "bhsd")
    ),
    *(Case(mask, sizes=sizes) for mask in OPTIONS if mask != "documents" for sizes in ((200, 391), (391, 200))),
    Case(heads=(4, 1)),
    Case(dtype=torch.float16),
    Case(dim=128, heads=(4, 2)),
    Case(aligned=False),
    Case(aligned=False, layout="bhsd", sizes=(200, 391)),
    Case(deterministic=True),
    Case(deterministic=True, aligned=False),
]
BASE = Case()
REPEATED = replace(BASE, deterministic=True)


@pytest.fixture(scope="module", autouse=True)
def _built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Defaults alone, so that few kernels serve all sizes; and the ops, so that no call is PyTorch's until they are."""
    with pytest.MonkeyPatch.context() as patch:
        empty = tmp_path_factory.mktemp("db")
        patch.setattr(store, "default_paths", lambda: (empty,))
        resolve.forget()
        cases = [*CASES, SAME_BITS, replace(SAME_BITS, aligned=False), LONG, replace(LONG, sizes=(8192, 8192))]
        build_specs(spec for case in cases for spec in case.specs())
        assert api._ops_registered()
        yield
    resolve.forget()


@pytest.fixture(autouse=True)
def _only_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch may not compute in our place, unless a test says so."""
    if "by_torch" in request.keywords:
        resolve.renew()
        return
    warnings.simplefilter("error", fallback.FallbackWarning)
    refused = SimpleNamespace(
        attend=lambda *_: pytest.fail("PyTorch computed the output"),
        gradients=lambda *_: pytest.fail("PyTorch computed the gradients"),
        warn=fallback.warn,
    )
    monkeypatch.setattr(api, "fallback", refused)
    monkeypatch.setattr(python_ops, "fallback", refused)


def random_like(t: torch.Tensor, seed: int = 9) -> torch.Tensor:
    g = torch.Generator(t.device).manual_seed(seed)
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).normal_(generator=g)


def by_the_rule(
    leaves: Tensors, out: torch.Tensor, lse: torch.Tensor, grads: Any, dout: torch.Tensor,
    dlse: torch.Tensor | None = None, **options: Any,
) -> None:  # fmt: skip
    """Output and gradients of a call against PyTorch's."""
    with torch.no_grad():
        call = AttentionCall.of(*(t.detach() for t in leaves), **options)
        verdict = reference.check(call, {"out": out.detach(), "lse": lse.detach()})
        assert verdict, verdict.message
        backward = BackwardCall.after(call, out.detach(), lse.detach(), dout, dlse)
        verdict = gradients.check(backward, dict(zip(GRADIENTS, grads, strict=True)))
    assert verdict, verdict.message


def step(leaves: Tensors, dout: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    """The output and the gradients."""
    out = fagen.attention(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- right ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: Case) -> None:
    """With a gradient of the LSE in one of the layouts."""
    leaves, options = case.leaves(), case.options()
    out, lse = fagen.attention(*leaves, return_lse=True, **options)
    dout, dlse = random_like(out), random_like(lse) if case.layout == "bhsd" else None
    made, wanted = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    grads = torch.autograd.grad(made, leaves, wanted)
    by_the_rule(leaves, out, lse, grads, dout, dlse, **options)


@pytest.mark.parametrize("case", [BASE, REPEATED, replace(BASE, aligned=False)], ids=str)
def test_explain_names_the_kernel_that_serves(case: Case) -> None:
    told = fagen.explain(*case.leaves(), **case.options()).gradients
    assert told is not None and told.choice.family is not None and told.built
    hopper = torch.cuda.get_device_capability() == (9, 0) and case.aligned
    assert told.choice.family.name == ("sm90_backward" if hopper else "sm80_backward")


def test_into_views_of_one_projection() -> None:
    packed = torch.randn(2, 333, 3, 4, 64, device="cuda").bfloat16().requires_grad_()
    out, lse = fagen.attention(*packed.unbind(2), causal=True, return_lse=True)
    dout = random_like(out)
    out.backward(dout)
    assert packed.grad is not None
    by_the_rule(list(packed.unbind(2)), out, lse, packed.grad.unbind(2), dout, causal=True)


@pytest.mark.parametrize("how", ["sum", "expanded heads", "transposed", "every other", "unaligned"])
@pytest.mark.parametrize("case", [BASE, replace(BASE, aligned=False)], ids=str)
def test_an_upstream_gradient_of_any_strides(how: str, case: Case) -> None:
    leaves = case.leaves()
    out, lse = fagen.attention(*leaves, causal=True, return_lse=True)
    make = {
        "sum": lambda: torch.ones((), device="cuda", dtype=out.dtype).expand(out.shape),
        "expanded heads": lambda: random_like(out)[:, :, :1].expand(out.shape),
        "transposed": lambda: random_like(out).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "every other": lambda: random_like(out).repeat_interleave(2, dim=-1)[..., ::2],
        "unaligned": lambda: torch.nn.functional.pad(random_like(out), (1, 0))[..., 1:],
    }
    dout = make[how]()
    grads = torch.autograd.grad(out, leaves, dout)
    by_the_rule(leaves, out, lse, grads, dout.contiguous(), causal=True)


@pytest.mark.parametrize("expanded", [False, True])
def test_a_gradient_of_the_lse_alone(expanded: bool) -> None:
    leaves = BASE.leaves()
    out, lse = fagen.attention(*leaves, causal=True, return_lse=True)
    dlse = torch.ones((), device="cuda").expand(lse.shape) if expanded else random_like(lse)
    grads = torch.autograd.grad(lse, leaves, dlse)
    by_the_rule(leaves, out, lse, grads, torch.zeros_like(out), dlse.contiguous(), causal=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_want_no_gradient(wanted: tuple[int, ...]) -> None:
    tensors, leaves = BASE.tensors(), REPEATED.leaves()
    mine = [t.requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    out = fagen.attention(*mine, **REPEATED.options())
    dout = random_like(out)
    out.backward(dout)
    exact = step(leaves, dout, **REPEATED.options())[1:]
    for i, t in enumerate(mine):
        assert (t.grad is not None) == (i in wanted)
        assert t.grad is None or torch.equal(t.grad, exact[i])


@pytest.mark.parametrize("same_lengths", [True, False])
def test_packed_sequences(same_lengths: bool) -> None:
    """Each by the rule, as if it were alone; some have no rows, some more rows than keys."""
    of_q = [0, 70, 70, 199, 200, 333]
    of_k = of_q if same_lengths else [0, 60, 100, 229, 300, 420]
    q, k, v = (t[0] for t in replace(BASE, heads=(4, 2), sizes=(of_q[-1], of_k[-1]), batch=1).tensors())
    leaves = [t.requires_grad_() for t in (q, k, v)]
    cu_q = torch.tensor(of_q, dtype=torch.int32, device="cuda")
    cu_k = cu_q if same_lengths else torch.tensor(of_k, dtype=torch.int32, device="cuda")
    result = fagen.flash_attn_varlen_func(*leaves, cu_q, cu_k, 140, 140, causal=True, return_attn_probs=True)
    out, lse, _ = result
    dout = random_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    for rows, keys in zip(zip(of_q, of_q[1:], strict=False), zip(of_k, of_k[1:], strict=False), strict=True):
        of_rows, of_keys = slice(*rows), slice(*keys)
        cut = (of_rows, of_keys, of_keys)
        if rows[0] == rows[1]:
            assert not any(g[of_keys].any() for g in grads[1:])
            continue
        parts = [t.detach()[None, at] for t, at in zip(leaves, cut, strict=True)]
        of_part = [g[None, at] for g, at in zip(grads, cut, strict=True)]
        by_the_rule(parts, out[None, of_rows], lse[None, :, of_rows], of_part, dout[None, of_rows], causal=True)


def test_sinks() -> None:
    """As near to float64 as PyTorch in the same dtype is, times three."""
    leaves, sinks = BASE.leaves(), torch.linspace(-2, 2, 4, device="cuda").requires_grad_()
    inputs = [*leaves, sinks]
    out = fagen.attention(*leaves, causal=True, sinks=sinks)
    dout = random_like(out)
    grads = torch.autograd.grad(out, inputs, dout)

    def by_definition(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        tensors = [t.detach().to(dtype).requires_grad_() for t in inputs]
        call = AttentionCall.of(*(t.detach() for t in leaves), causal=True)
        call = dataclasses.replace(call, sinks=tensors[3])
        q, k, v = (t.transpose(1, 2) for t in tensors[:3])
        made, _ = reference.attend(call, (q, k, v), reference.visible(call))
        return torch.autograd.grad(made.transpose(1, 2), tensors, dout.to(dtype))

    for mine, peer, want in zip(grads, by_definition(torch.bfloat16), by_definition(torch.float64), strict=True):
        error, allowed = (mine - want).abs().max(), (peer - want).abs().max()
        assert error <= 3 * allowed + 1e-3, (error, allowed)


def test_the_calls_of_other_libraries() -> None:
    leaves = REPEATED.leaves()
    dout = random_like(leaves[0])
    want = step(leaves, dout, **REPEATED.options())
    torch.use_deterministic_algorithms(True)
    try:
        for call in (
            lambda q, k, v: fagen.flash_attn_func(q, k, v, causal=True, deterministic=True),
            lambda q, k, v: fagen.sdpa(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2),
        ):
            out = call(*leaves)
            assert same(want, (out.detach(), *torch.autograd.grad(out, leaves, dout)))
    finally:
        torch.use_deterministic_algorithms(False)


# ---- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["argument", "global"])
@pytest.mark.parametrize("aligned", [True, False])
def test_a_thousand_runs_agree_in_every_bit(aligned: bool, way: str) -> None:
    """By sm90_backward and, where rows are not aligned, by sm80_backward. The GPU counts what differs."""
    case = replace(SAME_BITS, aligned=aligned, deterministic=way == "argument")
    leaves, options = case.leaves(), case.options()
    dout, differ = random_like(leaves[0]), torch.zeros((), dtype=torch.int64, device="cuda")
    torch.use_deterministic_algorithms(way == "global")
    try:
        first = step(leaves, dout, **options)
        for _ in range(1000):
            for a, b in zip(first, step(leaves, dout, **options), strict=True):
                differ += (a.view(torch.int16) != b.view(torch.int16)).sum()
    finally:
        torch.use_deterministic_algorithms(False)
    assert int(differ) == 0


def test_checkpointing_gives_the_same() -> None:
    leaves = REPEATED.leaves()
    dout = random_like(leaves[0])
    want = step(leaves, dout, **REPEATED.options())
    out = checkpoint(lambda *t: fagen.attention(*t, **REPEATED.options()), *leaves, use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    assert same(want, (out.detach(), *torch.autograd.grad(out, leaves, dout)))


# ---- compilers and tracers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fagen.attention(q * 2, k, v, causal=True, deterministic=True)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for rows in (333, 300) if dynamic else (333,):
        leaves = replace(REPEATED, sizes=(rows, rows)).leaves()
        dout, results = random_like(leaves[0]), []
        for call in (compiled, layer):
            out = call(*leaves)
            results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
        assert same(*results), rows


def test_opcheck() -> None:
    q, k, v = REPEATED.leaves()
    how = (None, None, False, True, -1, 0, 0.0, None, True, 0.0, None)
    torch.library.opcheck(torch.ops.fagen.forward.default, (q, k, v, *how))
    torch.library.opcheck(torch.ops.fagen.forward_lse.default, (q, k, v, *how))
    inputs = [t.detach() for t in (q, k, v)]
    out, lse = torch.ops.fagen.forward_lse(*inputs, *how)
    torch.library.opcheck(torch.ops.fagen.backward.default, (*inputs, *how, out, lse, random_like(out), None))
    torch.library.opcheck(
        torch.ops.fagen.backward.default, (*inputs, *how, out, lse, random_like(out), random_like(lse))
    )


def test_a_second_derivative_is_refused_in_words() -> None:
    q, k, v = BASE.leaves()
    out = fagen.attention(q, k, v, causal=True)
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(InvalidArgument, match="differentiated once"):
        dq.float().sum().backward()


def test_under_autocast() -> None:
    inputs = [t.detach().float().requires_grad_() for t in BASE.tensors()]
    with torch.autocast("cuda", torch.bfloat16):
        out = fagen.attention(*(torch.nn.functional.linear(t, torch.eye(64, device="cuda")) for t in inputs))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in inputs)


# ---- graphs, streams, devices ---------------------------------------------------------------------------------------


def test_a_cuda_graph_of_a_whole_step_takes_new_values() -> None:
    leaves, options = REPEATED.leaves(), REPEATED.options()
    dout = random_like(leaves[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(leaves, dout, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(leaves, dout, **options)
    for seed in (1, 2, 3):
        with torch.no_grad():
            for t, new in zip(leaves, REPEATED.tensors(seed=seed), strict=True):
                t.copy_(new)
            dout.copy_(random_like(dout, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert same(found, step(leaves, dout, **options)), seed


def test_nothing_is_compiled_during_a_capture() -> None:
    """Deterministic gradients without a mask are those of no case here."""
    leaves = replace(BASE, mask="none").leaves()
    message = "make the same call once before capturing"
    with pytest.raises(LaunchError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fagen.attention(*leaves, deterministic=True)
    torch.cuda.synchronize()


def test_two_streams_at_once() -> None:
    """Workspaces and outputs are each stream's own."""
    inputs = [REPEATED.leaves(seed=seed) for seed in (1, 2)]
    dout = random_like(inputs[0][0])
    want = [step(leaves, dout, **REPEATED.options()) for leaves in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    found: list[list[tuple[torch.Tensor, ...]]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(20):
        for leaves, stream, results in zip(inputs, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(leaves, dout, **REPEATED.options()))
    torch.cuda.synchronize()
    for first, results in zip(want, found, strict=True):
        assert all(same(first, result) for result in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    here = REPEATED.leaves()
    there = [t.detach().to("cuda:1").requires_grad_() for t in here]
    dout, results = random_like(here[0]), []
    for leaves in (here, there):
        results.append(step(leaves, dout.to(leaves[0].device), **REPEATED.options()))
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in results[1])
    assert same(results[0], [t.to("cuda:0") for t in results[1]])


# ---- memory ---------------------------------------------------------------------------------------------------------


_ROUNDING = 8 << 20  # of the allocator: up to 1 MiB a large tensor


def test_memory_is_linear_in_length() -> None:
    """At the peak: O, the LSE, three gradients, dQ in float32 while blocks add to it, two numbers a row."""
    peaks = []
    for length in (8192, 16384):
        leaves = replace(LONG, sizes=(length, length)).leaves()
        dout = random_like(leaves[0])
        step(leaves, dout, causal=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(leaves, dout, causal=True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        elements, rows = dout.numel(), length * LONG.heads[0]
        assert peaks[-1] <= elements * (4 * 2 + 4) + rows * 4 * 4 + _ROUNDING, (length, peaks)
    assert peaks[1] <= 2 * peaks[0] + _ROUNDING, peaks


# ---- what is PyTorch's ----------------------------------------------------------------------------------------------


@pytest.mark.by_torch
def test_what_no_kernel_serves() -> None:
    leaves = replace(BASE, dim=1032, sizes=(40, 40)).leaves()
    assert "no backward kernel takes head_dim 1032" in str(fagen.explain(*leaves, causal=True))
    with pytest.warns(fallback.FallbackWarning):
        out, lse = fagen.attention(*leaves, causal=True, return_lse=True)
    dout = random_like(out)
    by_the_rule(leaves, out, lse, torch.autograd.grad(out, leaves, dout), dout, causal=True)


@pytest.mark.by_torch
def test_what_no_kernel_serves_keeps_pytorchs_own_attention_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    leaves = replace(BASE, dim=1032, sizes=(40, 40)).leaves()
    seen: list[str] = []

    def look(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module

    out = torch.compile(lambda *t: fagen.attention(*t, causal=True), fullgraph=True, backend=look)(*leaves)
    assert out.requires_grad and any("scaled_dot_product" in name for name in seen), seen


@pytest.mark.by_torch
def test_an_empty_batch_has_gradients() -> None:
    leaves = replace(BASE, batch=0).leaves()
    fagen.attention(*leaves, causal=True).sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves)
