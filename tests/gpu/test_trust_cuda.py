"""A winner whose kernel source has changed, on a GPU: verified in a second on its first call, never in a capture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fagen
from fagen import env, families
from fagen.build import cache
from fagen.codegen.spec import KernelSpec
from fagen.db import merge, store
from fagen.db.record import Record
from fagen.dispatch import choose, freshness, kernels, resolve
from fagen.ops.attention.call import AttentionCall
from fagen.runtime import binding
from tests.support.calls import right


@pytest.fixture
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Inputs whose winner was tuned with another source; its kernel is compiled, nothing is verified."""
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path))
    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path / "shipped", tmp_path))
    monkeypatch.setattr(freshness, "_verdicts", {})
    tensors = [torch.randn(2, 4096, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    call = AttentionCall.of(*tensors, causal=True)
    family = families.candidates(call.problem, call.target)[0][0]
    config = family.default(call.problem, call.target)
    record = Record(
        problem=call.problem, arch=call.target.arch, device=call.target.device, family=family.name,
        config=dict(config), seconds=1e-3, spread=1e-5, default_seconds=0.0, error=0.0, source_hash="01d",
    )  # fmt: skip
    merge.put([record])
    kernels.built(KernelSpec(family, call.problem, call.target, config))
    binding.load()
    resolve.forget()
    yield tensors
    for path in (env.cache_dir() / "verified").glob("*"):
        path.unlink()
    resolve.forget()


def test_it_takes_less_than_a_compilation_once(stale: list[torch.Tensor]) -> None:
    q, k, v = stale
    torch.matmul(q[0, :, 0], k[0, :, 0].T)  # a process that has not computed anything yet pays for its libraries
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = fagen.attention(q, k, v, causal=True)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(f"the first call, verification and all: {seconds:.2f} s")
    call = AttentionCall.of(q, k, v, causal=True)
    choice = choose.choose(call.problem, call.target)
    built = cache.lookup(choice.spec)
    assert built and seconds < built.facts["compile_seconds"], "dearer than a compilation"
    assert right(out, q, k, v, causal=True)
    told = fagen.explain(q, k, v, causal=True)
    assert told.choice.trust is not None and told.choice.trust.state == "verified"
    before = torch.cuda.memory_allocated()
    resolve.forget()
    again = fagen.attention(q, k, v, causal=True)
    assert torch.cuda.memory_allocated() - before < again.numel() * 2 + (
        1 << 20
    )  # no inputs of the verification are kept
    assert torch.equal(out, again)


def test_never_in_a_capture(stale: list[torch.Tensor]) -> None:
    q, k, v = stale
    call = AttentionCall.of(q, k, v, causal=True)
    states = []
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(Exception, match="fagen build"):
            fagen.attention(q, k, v, causal=True)
        states.append(choose.choose(call.problem, call.target, check=True).trust.state)
        q.add(1)  # torch warns of a graph that captured nothing
    assert states == ["unverified"]
    assert not list((env.cache_dir() / "verified").glob("*.json"))
