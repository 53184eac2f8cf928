"""Kernels of a traced graph: they are compiled while the graph is, those of its gradients too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fagen
from fagen import api, target
from fagen.build import cache, toolchain
from fagen.db import store
from fagen.dispatch import attention, kernels, resolve
from fagen.ops.attention import fallback, traced
from fagen.ops.attention.call import AttentionCall
from fagen.runtime import background

pytestmark = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
HERE = target.host()


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path / "db",))
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path / "db"))
    resolve.forget()
    assert api._ops_registered()
    yield tmp_path
    background.wait()
    resolve.forget()
    torch.compiler.reset()


def leaves(rows: int = 40, dim: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(1, rows, 2, dim, generator=generator).requires_grad_() for _ in range(3)]


def in_memory() -> list[str]:
    return sorted(key[1] for key in kernels.in_memory)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return fagen.attention(q * 1.5, k, v, causal=True)


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    cu = torch.tensor([0, 13, 40], dtype=torch.int32)
    out = fagen.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 27, 27, causal=True)
    assert isinstance(out, torch.Tensor)
    return out


def dropping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return fagen.attention(q, k, v, dropout_p=0.1)


@pytest.mark.parametrize("mode", ["wait", "background"])
@pytest.mark.parametrize(
    ("function", "dynamic", "kind"),
    [
        (attend, False, "causal"),
        (attend, True, "causal"),
        (packed, False, "intervals-lower1"),
        (dropping, False, "none/dropout"),
    ],
)
def test_gradients_are_compiled_with_the_graph(
    function: Callable[..., torch.Tensor], dynamic: bool, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAGEN_BUILD", mode)
    inputs = leaves()
    out = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)(*inputs)
    background.wait()
    assert [key.split("/")[0] for key in in_memory()] == ["backward", "forward"]
    assert all(kind in key for key in in_memory())
    monkeypatch.setattr(cache, "make", lambda job, **_: pytest.fail(f"{job.name} was compiled late"))
    monkeypatch.setattr(fallback, "gradients", lambda *_: pytest.fail("PyTorch computed"))
    out.sum().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in inputs)


def test_inference_compiles_no_gradients() -> None:
    with torch.no_grad():
        torch.compile(attend, backend="aot_eager", fullgraph=True)(*leaves())
    background.wait()
    assert [key.split("/")[0] for key in in_memory()] == ["forward"]


def test_nothing_is_compiled_where_it_may_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAGEN_BUILD", "never")
    begun: list[Any] = []
    monkeypatch.setattr(background, "submit", lambda *work, **_: begun.append(work))
    call = AttentionCall.of(*leaves())
    attention.build_ahead(call, gradients=True)
    assert not begun
    monkeypatch.setenv("FAGEN_BUILD", "wait")
    attention.build_ahead(call, gradients=True)
    assert len(begun) == 1
    monkeypatch.setitem(kernels.in_memory, begun[0][0], None)
    attention.build_ahead(call, gradients=True)
    assert len(begun) == 1, "it is there"


def test_a_kernel_that_cannot_be_built_is_told_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from fagen.errors import BuildError

    def make(job: Any, **_: Any) -> Any:
        raise BuildError("no luck with it", "")

    monkeypatch.setattr(cache, "make", make)
    monkeypatch.setattr(cache, "find", lambda job: None)
    attention.build_ahead(AttentionCall.of(*leaves()), gradients=False)
    background.wait()
    assert not in_memory() and not background._told


# ---- the problem of tensors without memory -------------------------------------------------------------------------


def test_the_problem_is_that_of_real_tensors() -> None:
    q, k, v = (t.detach() for t in leaves())
    odd = [t[..., 1:] for t in (q, k, v)]
    expanded = q, k[:, :, :1].expand(-1, -1, 2, -1), v
    intervals = torch.zeros(1, 1, 40, 2, dtype=torch.int32)
    for tensors, how in (
        ((q, k, v), {}),
        ((q, k, v), {"causal": True, "window": (5, None), "layout": "bhsd"}),
        ((q, k, v), {"intervals": intervals, "softcap": 3.0}),
        ((q, k, v), {"alibi_slopes": torch.ones(2), "deterministic": True}),
        (odd, {}),
        (expanded, {}),
    ):
        call = AttentionCall.of(*tensors, **how)
        found = traced.described(call)
        assert found is not None
        assert (found.problem, found.target, found.unreadable) == (call.problem, call.target, call.unreadable)


def test_symbols_count_by_their_hints_and_get_no_guard() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment, want = ShapeEnv(), AttentionCall(*leaves()).problem
    with FakeTensorMode(shape_env=environment) as mode:
        q, k, v = (mode.from_tensor(t.detach(), static_shapes=False) for t in leaves())
        known = traced.described(AttentionCall(q, k, v))
        assert known is not None and known.problem == want
        assert not environment.guards
        unknown = torch.empty(1, environment.create_unbacked_symint(), 2, 24)
        assert traced.described(AttentionCall(unknown, k, v)) is None


@pytest.mark.parametrize("device", ["meta", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_here_is_traced_all_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "submit", lambda *work, **_: pytest.fail("nothing is to be built"))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 32, 2, 64, device=device, dtype=torch.bfloat16)
        out = torch.ops.fagen.forward(q, q, q, None, None, False, True, -1, 0, 0.0, None, False, 0.0, None)
    assert out.shape == q.shape and out.device.type == device
