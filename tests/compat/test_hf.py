"""transformers' models with `attn_implementation="fagen"`, against their own eager attention; masks one by one."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fagen
from fagen.errors import InvalidArgument, MissingTool, UnsupportedProblem
from fagen.ops.attention import fallback

transformers = pytest.importorskip("transformers", minversion="5")

from transformers import masking_utils as theirs  # noqa: E402

from fagen.compat import hf_attention, hf_masks  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "max_position_embeddings": 128,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 9}),
    "gpt_oss": ("GptOss", {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 4}),
}
LENGTH = 13


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    fagen.hf.register()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fallback.FallbackWarning)
        yield


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mask has become arguments of `fagen.attention`."""
    monkeypatch.setattr(hf_attention, "_by_torch", lambda *_: pytest.fail("a dense mask"))


def small(name: str, **more: Any) -> Any:
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options, **more})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):  # they begin as nothing much
            torch.nn.init.normal_(parameter)
    return model


def tokens(padding: str = "none") -> tuple[torch.Tensor, torch.Tensor | None]:
    ids = torch.randint(2, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    if padding == "none":
        return ids, None
    seen = torch.ones(2, LENGTH, dtype=torch.long)
    seen[0, slice(0, 4) if padding == "left" else slice(-4, None)] = 0
    return ids * seen, seen


def both(model: Any, ask: Callable[[Any], Any]) -> tuple[Any, Any]:
    """By fagen, and by eager."""
    answers = []
    for name in ("fagen", "eager"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        answers.append(ask(model))
    return answers[0], answers[1]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients by kernels of ours, with them as `fagen.attention` gives them."""
    ids, seen = tokens(padding)
    rows = slice(None) if seen is None else seen.bool()

    def ask(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(fallback, "attend", lambda *_: pytest.fail("PyTorch computed"))
            quiet = model(ids, attention_mask=seen).logits[rows]
        logits = model(ids, attention_mask=seen).logits[rows]
        close(quiet, logits.detach())
        weight = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
        return logits.detach(), list(torch.autograd.grad((logits * weight).sum(), [*model.parameters()]))

    (logits, grads), (want, want_grads) = both(small(name), ask)
    close(logits, want)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str, cache: str) -> None:
    """From a left-padded batch; windows are passed. The scores of every step are eager's."""
    ids, seen = tokens("left")

    def ask(model: Any) -> tuple[torch.Tensor, ...]:
        made = model.generate(
            ids, attention_mask=seen, max_new_tokens=7, do_sample=False, cache_implementation=cache,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return made.sequences, torch.stack(made.logits)

    (got, scores), (want, want_scores) = both(small(name), ask)
    assert torch.equal(got, want)
    close(scores, want_scores)


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_packed_sequences(name: str) -> None:
    ids, _ = tokens()
    positions = torch.cat([torch.arange(6), torch.arange(LENGTH - 6)])[None].expand(2, -1)
    model = small(name)
    with torch.no_grad():
        got, want = both(model, lambda m: m(ids, position_ids=positions, use_cache=False).logits)
        close(got, want)
        alone = both(model, lambda m: m(ids[:, 6:]).logits)[0]
    close(got[:, 6:], alone)


def test_bfloat16() -> None:
    ids, seen = tokens("left")
    assert seen is not None
    model = small("llama")
    with torch.no_grad():
        exact = both(model, lambda m: m(ids, attention_mask=seen).logits[seen.bool()])[1]
        got, eager = both(model.bfloat16(), lambda m: m(ids, attention_mask=seen).logits[seen.bool()])
    assert got.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + torch.finfo(torch.bfloat16).eps


def test_autocast() -> None:
    ids, _ = tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = both(small("llama"), lambda m: m(ids).logits)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("no_torch")
def test_an_encoder_with_padding() -> None:
    config = transformers.BertConfig(**{**SMALL, "num_key_value_heads": None})
    torch.manual_seed(0)
    model, (ids, seen) = transformers.BertModel(config).eval(), tokens("right")
    assert seen is not None
    with torch.no_grad():
        got, want = both(model, lambda m: m(ids, attention_mask=seen).last_hidden_state[seen.bool()])
        close(got, want)
        close(*both(model, lambda m: m(ids).last_hidden_state))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_ones_own(kind: str) -> None:
    """Four dimensions are handed on as they are: PyTorch computes."""
    ids, _ = tokens()
    mask = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.3
    mask |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for name in ("llama", "gpt_oss"):
        model = small(name)
        model.set_attn_implementation("fagen")
        with torch.no_grad():
            got = model(ids, attention_mask={"bool": mask, "float": additive}[kind]).logits
            model.set_attn_implementation("eager")
            close(got, model(ids, attention_mask=additive).logits)


@pytest.mark.slow
@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(("name", "padding"), [("llama", "none"), ("mistral", "none"), ("mistral", "left")])
def test_compiled_without_a_break(name: str, padding: str) -> None:
    torch._dynamo.reset()
    ids, seen = tokens(padding)
    model = small(name)
    model.set_attn_implementation("fagen")
    rows = slice(None) if seen is None else seen.bool()
    with torch.no_grad():
        want = model(ids, attention_mask=seen, use_cache=False).logits[rows]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(compiled(ids, attention_mask=seen, use_cache=False).logits[rows], want)


# ---- masks ----------------------------------------------------------------------------------------------------------

CONFIG = types.SimpleNamespace(sliding_window=4)
BLOCKS = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1, -1], [0, 0, -1, -1, -1, 1, 1, 1, 1, -1]])
GAPS = torch.tensor([[0, 0, -1, 0, 0, -1, 1, -1, 1, 1]]).expand(2, -1)
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]).expand(2, -1)
PACKED = theirs.and_masks(
    theirs.remap_positions_for_packed_sequence(theirs.causal_mask_function, POSITIONS),
    theirs.packed_sequence_mask_function(theirs.find_packed_sequence_indices(POSITIONS)),
)
# the function, what else the mask is asked with, whether columns can say it
KINDS: dict[str, tuple[Callable, dict, bool]] = {
    "causal": (theirs.causal_mask_function, {}, True),
    "causal, always made": (theirs.causal_mask_function, {"allow_is_causal_skip": False}, True),
    "sliding": (theirs.sliding_window_causal_mask_function(4), {"local_size": 4, "config": CONFIG}, True),
    "chunked": (
        theirs.chunked_causal_mask_function(4, torch.tensor([0, 2])), {
            "local_size": 4, "config": types.SimpleNamespace(sliding_window=4, attention_chunk_size=4),
        }, True,
    ),
    "bidirectional": (theirs.bidirectional_mask_function, {"allow_is_causal_skip": False}, True),
    "bidirectional, sliding": (
        theirs.sliding_window_bidirectional_mask_function(4),
        {"local_size": 4, "config": CONFIG, "allow_is_causal_skip": False}, True,
    ),
    "blocks": (
        theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(BLOCKS)),
        {"allow_is_causal_skip": False}, True,
    ),
    "packed": (PACKED, {"allow_is_causal_skip": False}, True),
    "blocks with gaps": (
        theirs.or_masks(theirs.sliding_window_causal_mask_function(2), theirs.blockwise_overlay(GAPS)),
        {"allow_is_causal_skip": False, "local_size": 4, "config": CONFIG}, False,
    ),
    "one's own": (
        theirs.and_masks(theirs.causal_mask_function, lambda b, h, q, k: (q + k) % 2 == 0),
        {"allow_is_causal_skip": False, "use_vmap": True}, False,
    ),
}  # fmt: skip
# rows, keys, first row, first key
PLACES = {"whole": (10, 10, 0, 0), "decode": (1, 8, 7, 0), "static": (6, 10, 0, 0), "more": (3, 9, 5, 0),
          "more, static": (3, 10, 2, 0), "rolled": (2, 5, 6, 3), "behind": (4, 3, 6, 0)}  # fmt: skip
PADDINGS: dict[str, torch.Tensor | None] = {
    "no mask": None,
    "nothing": torch.ones(2, 10, dtype=torch.bool),
    "left": torch.arange(10) >= torch.tensor([[0], [3]]),
    "right": torch.arange(10) < torch.tensor([[10], [6]]),
    "short": torch.arange(8) >= torch.tensor([[1], [0]]),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_theirs(kind: str, place: str, padding: str, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_masks, "_CELLS", 64)  # several blocks of keys
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)  # as a tracer goes, with real values
    function, options, said = KINDS[kind]
    rows, keys, at, first = PLACES[place]
    mask = PADDINGS[padding]
    offset = torch.tensor(at) if "static" in place else at
    made = hf_masks.make_mask(2, rows, keys, offset, first, function, mask, device="cpu", dtype=None, **options)
    want = theirs.sdpa_mask(
        2, rows, keys, at, first, function, mask, allow_is_causal_skip=False,
        use_vmap=options.get("use_vmap", False),
    )  # fmt: skip
    columns = isinstance(made, hf_masks.ColumnMask)
    assert tuple(made.shape) == tuple(want.shape)
    assert torch.equal((made.dense() if columns else made).expand(want.shape), want)
    if said and (not traced or rows == 1 or kind != "blocks"):
        assert columns
    if place == "whole" and not said:
        assert not columns
    if columns:  # and so does attention read it
        q, k = torch.randn(2, 2, rows, 16), torch.randn(2, 2, keys, 16)
        out = hf_attention.attend(torch.nn.Module(), q, k, k, made)[0]
        full = hf_attention._by_hand(q, k, k, want, hf_attention._Scores(None, 0.0, None, None, 0.0))
        close(out, full.transpose(1, 2))


def test_usual_masks_are_said_without_intervals() -> None:
    """For those the fastest kernels are tuned."""
    full = torch.ones(2, 10, dtype=torch.bool)
    causal = hf_masks.make_mask(2, 10, 10, attention_mask=full)
    sliding = hf_masks.make_mask(
        2, 10, 10, mask_function=theirs.sliding_window_causal_mask_function(4), local_size=4, config=CONFIG
    )
    decode = hf_masks.make_mask(2, 1, 10, 9)
    assert all(isinstance(mask, hf_masks.ColumnMask) and mask.intervals is None for mask in (causal, sliding, decode))
    assert (causal.causal, causal.window, sliding.causal, sliding.window) == (True, None, True, 3)
    assert decode.everything and not decode.causal


@pytest.mark.parametrize("window", [None, 4])
def test_decoding_with_a_static_cache_is_one_graph(window: int | None) -> None:
    """As `generate` goes: masks are made before each step, outside of what is compiled."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(graph)
        return graph.forward

    q, k, v = tensors(1, 10)
    options: dict = {} if window is None else {
        "mask_function": theirs.sliding_window_causal_mask_function(window), "local_size": window, "config": CONFIG,
    }  # fmt: skip
    compiled = torch.compile(hf_attention.attend, fullgraph=True, backend=backend)
    for at in (2, 5, 8):
        mask = hf_masks.make_mask(2, 1, 10, torch.tensor(at), attention_mask=PADDINGS["left"], **options)
        want = hf_attention._by_hand(q, k, v, mask.dense(), hf_attention._Scores(None, 0.0, None, None, 0.0))
        close(compiled(torch.nn.Module(), q, k, v, mask)[0], want.transpose(1, 2))
    assert len(graphs) == 1


def test_a_mask_that_is_cut_or_moved_stays_right() -> None:
    mask = hf_masks.make_mask(2, 10, 10, attention_mask=PADDINGS["left"])
    assert torch.equal(mask[:, :, 2:5, :7], mask.dense()[:, :, 2:5, :7])
    assert torch.equal(mask.to("cpu").dense(), mask.dense()) and "ColumnMask" in f"{mask} {mask!r}"
    with pytest.raises(TypeError):
        mask + torch.zeros(10)


# ---- the function ---------------------------------------------------------------------------------------------------


def tensors(rows: int = 6, keys: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    shapes = ((2, 4, rows, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def attend(*given: torch.Tensor, mask: Any = None, module: Any = None, **options: Any) -> torch.Tensor:
    return hf_attention.attend(module or torch.nn.Module(), *given, mask, **options)[0]


def test_without_a_mask_the_module_says_what_is_causal() -> None:
    q, k, v = tensors()
    wants = {causal: fagen.sdpa(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2) for causal in (True, False)}
    module = types.SimpleNamespace(is_causal=False)
    close(attend(q, k, v), wants[True])
    close(attend(q, k, v, module=module), wants[False])
    close(attend(q, k, v, module=module, is_causal=True), wants[True])
    close(attend(q, k, v, is_causal=False), wants[False])
    one = attend(q[:, :, -1:], k, v)
    close(one, wants[True][:, -1:])
    windowed = fagen.attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, window=(2, None))
    close(attend(q, k, v, sliding_window=3), windowed)
    close(attend(q[:, :, -1:], k, v, sliding_window=3), windowed[:, -1:])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("with_bias", [False, True])
def test_everything_at_once(softcap: float | None, sinks: torch.Tensor | None, with_bias: bool) -> None:
    """A dense mask, a bias, a softcap and sinks, by PyTorch; a row that sees nothing gives 0."""
    q, k, v = tensors()
    bias = torch.randn(1, 4, 6, 6) if with_bias else None
    mask = torch.rand(2, 1, 6, 6) > 0.5
    mask[0, 0, 2] = False
    got = attend(q, k, v, mask=mask, scaling=0.3, softcap=softcap, s_aux=sinks, position_bias=bias)
    assert (got[0, 2] == 0).all()
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double().repeat_interleave(2, 1)) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = (scores if bias is None else scores + bias).masked_fill(~mask, -1e30)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().reshape(-1, 1, 1).expand(2, 4, 6, 1)], -1)
    weights = scores.softmax(-1)[..., :6].masked_fill(~mask, 0)
    want = torch.einsum("bhqk,bhkd->bqhd", weights, v.double().repeat_interleave(2, 1))
    close(got, want.float())


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_dropout(softcap: float | None) -> None:
    q, k, _ = tensors(64, 64)
    mask = hf_masks.make_mask(2, 64, 64)
    torch.manual_seed(0)
    got = attend(q, k, torch.ones_like(k), mask=mask, dropout=0.25, softcap=softcap)
    assert got.std() > 0.05 and abs(got.mean() - 1) < 0.05
    again = attend(q, k, torch.ones_like(k), mask=mask, dropout=0.25, softcap=softcap)
    assert not torch.equal(got, again)
    late = attend(q, k, torch.cat([torch.zeros(2, 2, 32, 16), torch.ones(2, 2, 32, 16)], 2), mask=mask, dropout=0.25)
    assert (late[:, :32] == 0).all()  # still causal


def test_sequences_told_by_where_they_begin() -> None:
    q, k, v = (t[:1] for t in tensors(10, 10))
    begins = torch.tensor([0, 3, 7, 10], dtype=torch.int32)
    padded = hf_masks.make_mask(1, 10, 10, attention_mask=torch.arange(10)[None] != 4)
    for mask, causal in ((None, True), (None, False), (padded, True)):
        got = attend(q, k, v, mask=mask, is_causal=causal, cu_seq_lens_q=begins, cu_seq_lens_k=begins.clone())
        for first, last in ((0, 3), (3, 7), (7, 10)):
            inside = (t[:, :, first:last] for t in (q, k, v))
            part = None if mask is None else mask[:, :, first:last, first:last]
            close(got[:, first:last], attend(*inside, mask=part, is_causal=causal))


REFUSED: list[tuple[type[Exception], str, dict]] = [
    (UnsupportedProblem, "output_attentions", {"output_attentions": True}),
    (UnsupportedProblem, "block_table", {"block_table": torch.zeros(1)}),
    (UnsupportedProblem, "came without a mask", {"rows": 3}),
    (UnsupportedProblem, "came without a mask", {"is_causal": False, "sliding_window": 3}),
    (UnsupportedProblem, "cu_seq_lens", {"cu_seq_lens_q": torch.tensor([0, 3, 6])}),
    (UnsupportedProblem, "cu_seq_lens", {"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 6])}),
    (InvalidArgument, "mask has shape", {"mask": torch.ones(2, 6, dtype=torch.bool)}),
    (InvalidArgument, "mask has shape", {"mask": torch.ones(2, 1, 6, 5, dtype=torch.bool)}),
    (InvalidArgument, "sinks must have shape", {"s_aux": torch.zeros(3)}),
]


@pytest.mark.parametrize(("kind", "words", "options"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(kind: type[Exception], words: str, options: dict) -> None:
    options = dict(options)
    q, k, v = tensors(options.pop("rows", 6))
    with pytest.raises(kind, match=words) as caught:
        attend(q, k, v, **options)
    assert len(str(caught.value).splitlines()) <= 3


def test_transformers_is_imported_by_register_alone() -> None:
    code = "import sys, fagen\nfagen.hf.NAME\nassert 'transformers' not in sys.modules\nfagen.hf.register()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", f"{code}\nassert 'transformers' in sys.modules"], env=environment, check=True)


def test_another_way_of_asking_for_masks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(MissingTool, match="asks for masks in another way"):
        fagen.hf.register()
