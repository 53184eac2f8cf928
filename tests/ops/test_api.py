"""`fagen.attention` on the CPU: right for every shape, stride, mask and sharing of heads; and clear when it refuses."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fagen
from fagen.dispatch import warmup
from fagen.errors import InvalidArgument
from fagen.ops.attention import fallback, masks, reference
from fagen.ops.attention.problem import Problem
from fagen.runtime import binding
from fagen.target import host
from tests.support.calls import Case, example, run

ROOT = Path(__file__).parents[2]
IMPORT_SHARE = 0.1  # of the CPU time of importing torch


@pytest.fixture(autouse=True)
def _quiet_fallbacks() -> None:
    """No kernel is replaced by PyTorch unnoticed."""
    warnings.simplefilter("error", fallback.FallbackWarning)


# Static keys are few, so that few kernels are compiled: two pairs of head dims, four masks.
HEAD_DIMS = ((20, 12), (13, 7))
MASKS = ("none", "causal", "window", "both2")


def strided(sizes: tuple[int, ...], order: tuple[int, ...], pad: int, generator: torch.Generator) -> torch.Tensor:
    """A tensor of these sizes whose dimensions lie in memory in `order`, `pad` elements between rows."""
    stored = torch.randn([sizes[i] for i in order] + [sizes[3] + pad], generator=generator)
    return stored[..., : sizes[3]].permute(*(order.index(i) for i in range(3)), 3)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    b, group, hk = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8])), draw(st.integers(1, 3))
    sq, sk = draw(st.integers(1, 140)), draw(st.integers(1, 300))
    d, dv = draw(st.sampled_from(HEAD_DIMS))
    layout, mask = draw(st.sampled_from(["bshd", "bhsd"])), draw(st.sampled_from(MASKS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    tensors = []
    for rows, heads, size in ((sq, group * hk, d), (sk, hk, d), (sk, hk, dv)):
        order = draw(st.permutations([0, 1, 2]))
        sizes = (b, rows, heads, size) if layout == "bshd" else (b, heads, rows, size)
        tensors.append(strided(sizes, tuple(order), draw(st.sampled_from([0, 4, 32])), generator))
    options: dict = {"layout": layout, "causal": mask == "causal", "scale": draw(st.sampled_from([None, 0.1]))}
    if mask == "window":
        options["window"] = (draw(st.integers(0, 80)), draw(st.none() | st.integers(1, 80)))
    if mask == "both2":
        mask_heads = draw(st.sampled_from([1, hk]))
        bounds = torch.randint(0, sq + 1, (draw(st.sampled_from([1, b])), mask_heads, sk, 2), generator=generator)
        options["intervals"] = bounds.int()
    return Case(*tensors, options)


@pytest.fixture(scope="module", autouse=True)
def _built_side_by_side() -> None:
    """The kernels that most tests need, on all cores."""
    masks_ = [{"mask": m} for m in ("none", "causal", "window")] + [{"mask": "intervals", "intervals": "both2"}]
    wanted = [
        Problem(dtype="fp32", head_dim=d, head_dim_v=dv, aligned=d % 4 == 0, **fields)
        for (d, dv), fields in itertools.product((*HEAD_DIMS, (16, 16)), masks_)
    ]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(binding.make), *(pool.submit(warmup.warmup, [problem], host()) for problem in wanted)]
        for job in jobs:
            job.result()


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_shape_and_stride(case: Case) -> None:
    before = [t.clone() for t in (case.q, case.k, case.v)]
    out, lse = fagen.attention(case.q, case.k, case.v, return_lse=True, **case.options)
    verdict = case.check(out, lse)
    assert verdict, verdict.message
    assert out.is_contiguous() and lse.dtype == torch.float32
    assert torch.equal(out, fagen.attention(case.q, case.k, case.v, **case.options))
    assert all(torch.equal(a, b) for a, b in zip(before, (case.q, case.k, case.v), strict=True))


@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_every_kind_of_intervals(columns: int, causal: bool) -> None:
    bounds = torch.randint(0, 34, (2, 2, 47, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(5))
    assert run(example(intervals=bounds, causal=causal))


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 1.0])},
        {"alibi_slopes": torch.rand(2, 4), "causal": True, "softcap": 5.0},
        {"causal": True, "window": (9, 3)},
        {"window": (0, 0)},
        {"window": (-1, 5)},
    ],
)
def test_features(options: dict) -> None:
    assert run(example(**options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype: torch.dtype) -> None:
    case = example(causal=True)
    case.q, case.k, case.v = (t.to(dtype) for t in (case.q, case.k, case.v))
    if dtype == torch.float16:
        warnings.simplefilter("ignore", fallback.FallbackWarning)
    assert run(case)


def test_rows_that_see_nothing() -> None:
    case = example(sq=50, sk=20, causal=True)
    out, lse = fagen.attention(case.q, case.k, case.v, return_lse=True, causal=True)
    assert (out[:, :30] == 0).all() and (lse[:, :, :30] == -math.inf).all() and lse[:, :, 30:].isfinite().all()


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_out_is_filled_whatever_its_strides(layout: str, return_lse: bool) -> None:
    case = example(layout=layout)
    if layout == "bhsd":
        case.q, case.k, case.v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
    out = torch.full((*case.q.shape[:3], 32), math.nan)[..., :16]
    got = fagen.attention(case.q, case.k, case.v, layout=layout, return_lse=return_lse, out=out)
    assert (got[0] if return_lse else got) is out
    assert case.check(out, got[1] if return_lse else None)


def test_parameters_are_tensors_too() -> None:
    case = example()
    case.q = torch.nn.Parameter(case.q, requires_grad=False)
    assert run(case)


# ---- what PyTorch computes ----------------------------------------------------------------------------------------


def falls_back(words: str, case: Case) -> None:
    with pytest.warns(fallback.FallbackWarning, match=words):
        assert run(case)
    assert run(case), "and only the first call warns"


def test_float64() -> None:
    case = example(causal=True)
    case.q, case.k, case.v = (t.double() for t in (case.q, case.k, case.v))
    with pytest.warns(fallback.FallbackWarning, match="no kernels for torch.float64"):
        out, lse = fagen.attention(case.q, case.k, case.v, causal=True, return_lse=True)
    want, want_lse = reference.attend(case.call(), case.call().bhsd(), masks.dense(33, 47, window=(-1, 0)))
    assert (out.transpose(1, 2) - want).abs().max() < 1e-12 and (lse - want_lse).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims_beyond_256_have_a_kernel(dtype: torch.dtype) -> None:
    case = example(d=1000, causal=True)
    case.q, case.k, case.v = (t.to(dtype) for t in (case.q, case.k, case.v))
    with warnings.catch_warnings():
        warnings.simplefilter("error", fallback.FallbackWarning)
        assert run(case)


def test_large_head_dim() -> None:
    falls_back("head_dim 1025 is larger than 1024", example(d=1025, window=(5, 5)))


def test_a_last_dimension_that_is_not_contiguous() -> None:
    case = example(softcap=2.0)
    case.k = case.k.transpose(1, 3).contiguous().transpose(1, 3)
    falls_back("last dimension of k is not contiguous", case)


def test_gradients_are_right_and_announced() -> None:
    options = {"causal": True, "window": (7, None), "softcap": 3.0}
    shapes = ((1, 6, 2, 4), (1, 8, 1, 4), (1, 8, 1, 4))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with pytest.warns(fallback.FallbackWarning, match="no kernels for torch.float64"):
        fagen.attention(*leaves, **options)
    assert torch.autograd.gradcheck(lambda *t: fagen.attention(*t, **options), leaves)
    intervals = masks.from_prefix([3], 6, 8)
    assert torch.autograd.gradcheck(lambda *t: fagen.attention(*t, intervals=intervals), leaves)
    assert torch.autograd.gradcheck(lambda *t: fagen.attention(*t), leaves)  # by SDPA


def test_no_gradient_no_fallback() -> None:
    case = example()
    case.q.requires_grad_()
    with torch.no_grad():
        assert run(case)
    with torch.inference_mode():
        assert run(case)


@pytest.mark.parametrize(("sq", "sk", "b"), [(0, 5, 2), (5, 0, 2), (5, 5, 0)])
def test_nothing_to_compute(sq: int, sk: int, b: int) -> None:
    case = example(b=b, sq=sq, sk=sk)
    out, lse = fagen.attention(case.q, case.k, case.v, causal=True, return_lse=True)
    assert out.shape == (b, sq, 4, 16) and lse.shape == (b, 4, sq)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_other_devices() -> None:
    q = torch.empty(1, 8, 2, 16, device="meta")
    with pytest.warns(fallback.FallbackWarning, match="no kernels for device meta"):
        assert fagen.attention(q, q, q).shape == q.shape


# ---- refusals -----------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, Callable[[Case], object]]] = [
    ("layout 'sbhd' is unknown", lambda c: c.options.update(layout="sbhd")),
    ("q has 3 dimensions", lambda c: setattr(c, "q", c.q[0])),
    ("same floating-point dtype", lambda c: setattr(c, "k", c.k.half())),
    ("same floating-point dtype", lambda c: [setattr(c, n, getattr(c, n).int()) for n in "qkv"]),
    ("must be on the same device", lambda c: setattr(c, "v", c.v.to("meta"))),
    ("k must have shape (batch_size, seqlen_k, num_heads_k, head_size)", lambda c: setattr(c, "k", c.k[..., :8])),
    ("v must have shape", lambda c: setattr(c, "v", c.v[:, :9])),
    ("k must have shape", lambda c: setattr(c, "k", c.k[:1])),
    ("Number of heads in key/value must divide", lambda c: setattr(c, "q", c.q[:, :, :3])),
    ("heads and head_dim must be at least 1", lambda c: [setattr(c, n, getattr(c, n)[..., :0]) for n in "qk"]),
    ("window=(1, 2, 3) is not (left, right)", lambda c: c.options.update(window=(1, 2, 3))),
    ("window=3 is not (left, right)", lambda c: c.options.update(window=3)),
    ("bounds are integers of at least 0", lambda c: c.options.update(window=(-2, 0))),
    ("bounds are integers of at least 0", lambda c: c.options.update(window=(0.5, 0))),
    ("softcap=-1.0 must be positive", lambda c: c.options.update(softcap=-1.0)),
    ("softcap=nan must be positive", lambda c: c.options.update(softcap=math.nan)),
    ("intervals must be int32", lambda c: c.options.update(intervals=torch.zeros(2, 1, 47, 1))),
    ("intervals must have shape", lambda c: c.options.update(intervals=torch.zeros(2, 1, 46, 1, dtype=torch.int32))),
    ("intervals must have shape", lambda c: c.options.update(intervals=torch.zeros(2, 4, 47, 1, dtype=torch.int32))),
    ("intervals must have shape", lambda c: c.options.update(intervals=torch.zeros(2, 47, 1, dtype=torch.int32))),
    ("intervals have 3 columns", lambda c: c.options.update(intervals=torch.zeros(2, 1, 47, 3, dtype=torch.int32))),
    ("ALiBi slopes must have dtype fp32", lambda c: c.options.update(alibi_slopes=torch.zeros(4).double())),
    ("alibi_slopes must have shape", lambda c: c.options.update(alibi_slopes=torch.zeros(3))),
    ("out must be torch.float32", lambda c: c.options.update(out=torch.empty(2, 33, 4, 15))),
    ("out must be torch.float32", lambda c: c.options.update(out=torch.empty(2, 33, 4, 16).half())),
]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("words", "spoil"), REFUSED)
def test_refusals(words: str, spoil: Callable, warm: bool) -> None:
    """By the first call, and by the C++ road as well."""
    case = example()
    if warm:
        fagen.attention(case.q, case.k, case.v)
    spoil(case)
    with pytest.raises(InvalidArgument) as caught:
        fagen.attention(case.q, case.k, case.v, **case.options)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    with pytest.raises(InvalidArgument):
        case.call()


def test_a_mistake_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="layout"):
        fagen.attention(*[torch.zeros(1, 1, 1, 16)] * 3, layout="x")


def import_share(extra: str = "", most: int = 6) -> float:
    """CPU time of importing fagen as a share of torch's, both in one process. Load only adds to either, so the least
    of several runs counts, for each by itself."""
    code = (
        "from time import process_time as now\nbegin = now()\nimport torch\nbetween = now()\n"
        f"import fagen\nfrom fagen import attention\n{extra}\nprint(between - begin, now() - between)"
    )
    # as where it is installed: bytecode is kept
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    theirs, ours = [], []
    while len(ours) < 2 or (
        min(ours) > IMPORT_SHARE * min(theirs) and len(ours) < most
    ):  # the first may write bytecode
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        for spent, word in zip((theirs, ours), done.stdout.split(), strict=True):
            spent.append(float(word))
    return min(ours) / min(theirs)


def test_importing_costs_little_beside_torch() -> None:
    assert import_share() <= IMPORT_SHARE


@pytest.mark.slow
def test_a_heavy_import_would_be_seen() -> None:
    assert import_share("import torch._dynamo", most=2) > IMPORT_SHARE


def test_importing_does_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, fagen\n"
        "heavy = {'torch', 'jinja2', 'optuna'} & set(sys.modules)\n"
        "assert not heavy and not hasattr(fagen, 'nothing') and 'attention' in dir(fagen), heavy\n"
        "fagen.Problem, fagen.Target, fagen.masks\n"
        "assert 'torch' not in sys.modules\n"
        "import fagen.api\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
