"""A built kernel through ctypes: its struct is C's, it computes, and it refuses what would read or write astray."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fagen
from fagen import families, ops, target
from fagen.build import cache
from fagen.build.job import Job
from fagen.codegen import render
from fagen.codegen.spec import KernelSpec
from fagen.dispatch import plan, resolve
from fagen.errors import InvalidArgument, LaunchError
from fagen.ops import abi
from fagen.ops.attention.arguments import is_aligned
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.params import Params, make_params
from fagen.ops.attention.problem import Problem
from fagen.runtime import binding, kernel
from tests.support.calls import right

FAMILY = families.get("cpu_forward")
HERE = target.host()


def made(**fields: object) -> kernel.Kernel:
    problem = Problem(**{"dtype": "fp32", "head_dim": 16, **fields})  # type: ignore[arg-type]
    return kernel.get(KernelSpec(FAMILY, problem, HERE, FAMILY.default(problem, HERE)))


def bhsd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> AttentionCall:
    return AttentionCall.of(q, k, v, layout="bhsd", **options)  # type: ignore[arg-type]


def tensors(b: int = 2, sq: int = 20, sk: int = 30, h: int = 4, hk: int = 2, d: int = 16, dv: int = 16) -> list:
    return [torch.randn(b, h, sq, d), torch.randn(b, hk, sk, d), torch.randn(b, hk, sk, dv), torch.empty(b, h, sq, dv)]


def plain() -> tuple[AttentionCall, dict[str, torch.Tensor]]:
    q, k, v, out = tensors()
    return bhsd(q, k, v), {"out": out}


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_launches(layout: str) -> None:
    q, k, v, out = (t.transpose(1, 2) if layout == "bshd" else t for t in tensors())
    lse = torch.empty(2, 4, 20)
    made().launch(AttentionCall.of(q, k, v, layout=layout), {"out": out, "lse": lse})
    assert right((out, lse), q, k, v, layout=layout)


def test_bound_once_launched_often() -> None:
    q, k, v, out = tensors()
    call = made(mask="causal").bind(bhsd(q, k, v, causal=True), {"out": out})
    for _ in range(2):
        q.normal_()
        call()
        assert right(out, q, k, v, layout="bhsd", causal=True)


def test_facts_and_repetition() -> None:
    first, second = made(), made()
    assert first.facts["compile_seconds"] > 0
    assert first.library is second.library and first.artifact == second.artifact


def _half(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.bfloat16)


ANOTHER = "the kernel is for forward/fp32/d16/none"
REFUSED: list[tuple[str, Callable[[list], tuple[list, dict]]]] = [
    (ANOTHER, lambda t: ([_half(x) for x in t], {})),
    ("no kernels for torch.float64", lambda t: ([x.double() for x in t], {})),
    ("the last dimension of k is not contiguous", lambda t: ([t[0], t[1].mT.contiguous().mT, *t[2:]], {})),
    (ANOTHER, lambda t: ([torch.randn(2, 4, 20, 32), torch.randn(2, 2, 30, 32), *t[2:]], {})),
    ("head_dim 1100 is larger", lambda t: ([torch.randn(2, 4, 20, 1100), torch.randn(2, 2, 30, 1100), *t[2:]], {})),
    (ANOTHER, lambda t: ([torch.randn(2, 4, 20, 17)[..., :16], *t[1:]], {})),
    (ANOTHER, lambda t: ([*t[:2], t[2][:, :1].expand(2, 2, 30, 16), t[3]], {})),
    (ANOTHER, lambda t: (t, {"intervals": torch.zeros(2, 1, 30, 1, dtype=torch.int32)})),
    (ANOTHER, lambda t: (t, {"alibi_slopes": torch.zeros(4)})),
    (ANOTHER, lambda t: (t, {"softcap": 3.0})),
    (ANOTHER, lambda t: (t, {"causal": True})),
    (ANOTHER, lambda t: (t, {"window": (3, 0)})),
    ("out must be torch.float32 (2, 4, 20, 16)", lambda t: ([*t[:3], t[3].double()], {})),
    ("out must be torch.float32 (2, 4, 20, 16)", lambda t: ([*t[:3], t[3][:, :, :-1]], {})),
    ("its last dimension contiguous", lambda t: ([*t[:3], t[3].mT.contiguous().mT], {})),
    ("out is not aligned", lambda t: ([*t[:3], torch.empty(2, 4, 20, 17)[..., :16]], {})),
    ("lse must be torch.float32 (2, 4, 20)", lambda t: ([*t, torch.empty(2, 20, 4)], {})),
    ("lse must be torch.float32 (2, 4, 20)", lambda t: ([*t, torch.empty(2, 4, 20).double()], {})),
    ("lse must be contiguous", lambda t: ([*t, torch.empty(2, 4, 40)[..., :20]], {})),
]


@pytest.mark.parametrize(("words", "change"), REFUSED, ids=range(len(REFUSED)))
def test_refuses(words: str, change: Callable) -> None:
    """A valid call, but not this kernel's; or outputs that are not the call's."""
    (q, k, v, *outputs), options = change(tensors())
    call = bhsd(q, k, v, **options)
    with pytest.raises(InvalidArgument) as caught:
        made().launch(call, dict(zip(("out", "lse"), outputs, strict=False)))
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


ASTRAY = [
    ("v must have shape", lambda q, k, v: {"v": v[:, :, :-1]}),
    ("k must have shape", lambda q, k, v: {"k": k[..., :12]}),
    ("must divide number of heads", lambda q, k, v: {"q": q[:, :3]}),
    ("4: ", lambda q, k, v: {"q": q[0]}),
    ("same floating-point dtype", lambda q, k, v: {"q": _half(q)}),
    ("layout 'sbhd' is unknown", lambda q, k, v: {"layout": "sbhd"}),
    ("alibi_slopes must have shape", lambda q, k, v: {"alibi_slopes": torch.zeros(5)}),
    ("dtype fp32", lambda q, k, v: {"alibi_slopes": torch.zeros(4, dtype=torch.float64)}),
    ("the call says they are ''", lambda q, k, v: {"intervals": torch.zeros(2, 1, 30, 1, dtype=torch.int32)}),
    ("have 0 columns", lambda q, k, v: {"kind": "lower1"}),
    ("have 2 columns", lambda q, k, v: {"intervals": torch.zeros(2, 1, 30, 2, dtype=torch.int32), "kind": "lower1"}),
    ("have 1 columns", lambda q, k, v: {"intervals": torch.zeros(2, 1, 30, 1, dtype=torch.int32), "kind": "none such"}),
    *[
        (words, lambda q, k, v, t=t: {"intervals": t, "kind": "lower1"})
        for words, t in (
            ("must be int32", torch.zeros(2, 1, 30, 1, dtype=torch.int64)),
            ("intervals must have shape", torch.zeros(2, 1, 29, 1, dtype=torch.int32)),
            ("intervals must have shape", torch.zeros(2, 4, 30, 1, dtype=torch.int32)),
            ("intervals must have shape", torch.zeros(3, 1, 30, 1, dtype=torch.int32)),
        )
    ],
]


@pytest.mark.parametrize(("words", "change"), ASTRAY, ids=range(len(ASTRAY)))
def test_refuses_a_call_that_nobody_validated(words: str, change) -> None:
    """One put together by hand, whose tensors contradict each other: a kernel would read beyond them."""
    q, k, v, out = tensors()
    call = AttentionCall(**{"q": q, "k": k, "v": v, "layout": "bhsd", **change(q, k, v)})
    with pytest.raises(InvalidArgument) as caught:
        made().launch(call, {"out": out})
    assert words in str(caught.value)


def test_a_size_that_32_bits_do_not_hold_is_not_cut() -> None:
    q, k = torch.zeros(16).expand(1, 1, 2**31, 16), torch.zeros(1, 1, 3, 16)
    for first, second in ((q, k), (k, q)):
        with pytest.raises(InvalidArgument, match="2147483648"):
            made().launch(AttentionCall(first, second, second, layout="bhsd"), {"out": first})


def test_a_kernel_may_serve_more_than_its_own_problem() -> None:
    """Any band by that of a window; aligned rows by that which does not count on it."""
    q, k, v, out = tensors()
    wide, any_rows = made(mask="window"), made(aligned=False)
    for options in ({}, {"causal": True}, {"window": (3, 5)}):
        wide.launch(bhsd(q, k, v, **options), {"out": out})
        assert right(out, q, k, v, layout="bhsd", **options)
    any_rows.launch(bhsd(q, k, v), {"out": out})
    assert right(out, q, k, v, layout="bhsd")
    with pytest.raises(InvalidArgument, match="the call is forward/fp32/d16/intervals-lower1"):
        wide.launch(bhsd(q, k, v, intervals=torch.zeros(2, 1, 30, 1, dtype=torch.int32)), {"out": out})


@pytest.mark.parametrize("intervals", [torch.zeros(2, 1, 30, 2, dtype=torch.int32), None])
def test_refuses_intervals_of_another_kind(intervals: torch.Tensor | None) -> None:
    q, k, v, out = tensors()
    with pytest.raises(InvalidArgument, match="the kernel is for forward/fp32/d16/intervals-lower1"):
        made(mask="intervals", intervals="lower1").launch(bhsd(q, k, v, intervals=intervals), {"out": out})


def test_a_kernel_of_another_machine_is_refused() -> None:
    there = dataclasses.replace(made(), artifact=dataclasses.replace(made().artifact, arch="sm_90"))
    with pytest.raises(InvalidArgument, match="q is on cpu"):
        there.launch(*plain())


# ---- libraries that are not what they should be -------------------------------------------------------------------

HEADER = ops.get("forward").header
TAIL = 'extern "C" uint64_t fagen_workspace_bytes(const fagen_forward_params*) { return NEED; }\n'


def library(body: str, layout: str = "", need: int = 0) -> kernel.Kernel:
    """A kernel of this body; with a `layout` that is not the one of its params, if one is given."""
    told = f'extern "C" const char* fagen_params_layout(void) {{ return "{layout}"; }}\n'
    ends = TAIL.replace("NEED", str(need)) + (told if layout else abi.layout_function(HEADER))
    source = render.fold(f'#include "{HEADER}"\n{body}{ends}')
    artifact = cache.make(Job("odd", source, ".cpp", ("-O1",), (), "cpu"))
    problem = Problem(dtype="fp32", head_dim=16)
    return kernel.load(artifact, KernelSpec(FAMILY, problem, HERE, FAMILY.default(problem, HERE)))


FAILS = (
    'extern "C" int fagen_launch(const fagen_forward_params*, void*) { return 7; }\n'
    'extern "C" const char* fagen_error(int e) { return "out of luck"; }\n'
)


def test_a_failed_launch_says_why() -> None:
    with pytest.raises(LaunchError, match="out of luck") as caught:
        library(FAILS).launch(*plain())
    assert len(str(caught.value).splitlines()) <= 3


OURS = abi.layout(Params)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (OURS.replace("softcap 252 4", "sink 252 4"), "there: sink 252 4; here: softcap 252 4"),
        (OURS.replace("scale 248 4", "scale 248 8"), "there: scale 248 8; here: scale 248 4"),
        (OURS.replace("batch 208 4; heads 212 4", "heads 208 4; batch 212 4"), "there: heads 208 4; here: batch 208 4"),
        (OURS.rpartition("; ")[0], f"there: nothing; here: sizeof {ctypes.sizeof(Params)}"),
        (f"{OURS}; and more", "there: and more; here: nothing"),
    ],
)
def test_another_struct_is_refused(layout: str, words: str) -> None:
    with pytest.raises(LaunchError, match="another fagen_forward_params") as caught:
        library(FAILS, layout)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_a_library_without_our_functions_is_refused() -> None:
    artifact = cache.make(Job("empty", "int x;\n", ".cpp", (), (), "cpu"))
    with pytest.raises(LaunchError, match="cannot be loaded"):
        kernel.load(artifact, made().spec)


def test_workspace_is_aligned_and_large_enough() -> None:
    body = (
        'extern "C" int fagen_launch(const fagen_forward_params* p, void*) { char* w = (char*)p->workspace;\n'
        "  if ((uintptr_t)w % 256) return 1; for (int i = 0; i < 5000; i++) w[i] = 1; return 0; }\n"
        'extern "C" const char* fagen_error(int) { return "not aligned"; }\n'
    )
    needy = library(body, need=5000)
    needy.launch(*plain())
    with pytest.raises(InvalidArgument, match="5000 bytes"):
        needy.launch(*plain(), workspace=torch.empty(4999, dtype=torch.uint8))


# The params are copied into this library's own memory. The output cannot hold them where the outputs are small.
COPIES = """
static unsigned char copied[sizeof(fagen_forward_params)];
extern "C" int fagen_launch(const fagen_forward_params* p, void*) { __builtin_memcpy(copied, p, sizeof *p); return 0; }
extern "C" const unsigned char* copied_params(void) { return copied; }
extern "C" const char* fagen_error(int) { return ""; }
"""


def _copied(kernel: kernel.Kernel) -> bytes:
    """The bytes of the params that the last launch was given."""
    where = ctypes.CFUNCTYPE(ctypes.c_void_p)(kernel.library.address("copied_params"))
    return ctypes.string_at(where(), ctypes.sizeof(Params))


@st.composite
def filler_calls(draw: st.DrawFn) -> dict[str, object]:
    b, hk, group, sq, sk = (draw(st.integers(1, 3)) for _ in range(5))
    layout = draw(st.sampled_from(["bshd", "bhsd"]))

    def tensor(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Padded, permuted or expanded, the last dimension contiguous."""
        order = draw(st.permutations(range(len(sizes) - 1)))
        stored = [sizes[i] + draw(st.integers(0, 2)) for i in order]
        base = torch.zeros([*stored, sizes[-1] + draw(st.integers(0, 4))], dtype=dtype)
        t = base.permute(*(order.index(i) for i in range(len(order))), len(order))
        t = t[tuple(slice(0, size) for size in sizes)]
        expanded = [i for i in range(len(order)) if draw(st.integers(0, 4)) == 0]
        for i in expanded:
            t = t.narrow(i, 0, 1)
        return t.expand(sizes)

    def rows(length: int, heads: int, d: int) -> torch.Tensor:
        return tensor(*((b, length, heads, d) if layout == "bshd" else (b, heads, length, d)))

    bound = st.sampled_from([-1, 0, 1, 2, 3, 4, 2**31 - 1])
    call: dict[str, object] = {"layout": layout, "window": (draw(bound), draw(bound))}
    call |= {"q": rows(sq, group * hk, 16), "k": rows(sk, hk, 16), "v": rows(sk, hk, 24)}
    call["scale"] = draw(st.none() | st.floats(1e-3, 10))
    call["softcap"] = draw(st.just(0.0) | st.floats(0.1, 50))
    slopes = draw(st.sampled_from([None, (group * hk,), (1, group * hk), (b, group * hk)]))
    call["alibi_slopes"] = slopes and tensor(*slopes)
    if draw(st.booleans()):
        call["intervals"] = tensor(
            draw(st.sampled_from([1, b])), draw(st.sampled_from([1, hk])), sk, 2, dtype=torch.int32
        )
    return call


@pytest.mark.parametrize("want_lse", [False, True])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=filler_calls())
def test_both_roads_fill_the_same_params(call: dict, want_lse: bool) -> None:
    """The op's own, in C++, and that of ctypes: the same bytes, whatever sizes and strides."""
    assert binding.load(), "calls would go through ctypes"
    copies = library(COPIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "answer", lambda *args, **named: plan.Answer(True, copies))
        resolve.forget()
        made = fagen.attention(return_lse=want_lse, **call)
        resolve.forget()
    theirs, outputs = _copied(copies), dict(zip(("out", "lse"), made if want_lse else (made,), strict=False))
    mine = make_params(AttentionCall.of(**call), outputs)
    assert bytes(mine) == theirs
    assert mine.window_left <= mine.seqlen_k and mine.window_right <= mine.seqlen_q


def test_one_set_of_slopes_serves_all_batches() -> None:
    """(1, heads), of any stride: nothing behind it is read."""
    q, k, v, out = tensors(b=3)
    memory = torch.full((3, 4), 100.0)
    memory[0] = torch.tensor([0.5, 0.25, 1.0, 2.0])
    made(alibi=True).launch(bhsd(q, k, v, alibi_slopes=memory[:1]), {"out": out})
    assert right(out, q, k, v, layout="bhsd", alibi_slopes=memory[:1])


def test_what_counts_as_aligned() -> None:
    t = torch.zeros(2, 8, 4, 16, dtype=torch.bfloat16)
    assert is_aligned(t) and is_aligned(t.transpose(1, 2)) and is_aligned(t[:, ::2])
    assert not is_aligned(t[..., :12]) and not is_aligned(t[..., 1:9])
    assert not is_aligned(t[:, :, :1].expand(2, 8, 4, 16))
    assert is_aligned(t[:1, :, :1].as_strided((1, 8, 1, 16), (0, 64, 3, 1)))  # dimensions of one never step
