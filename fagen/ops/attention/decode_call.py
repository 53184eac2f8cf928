"""One call of the decode op with all its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments
from fagen.ops.attention import sinks as sink_logits
from fagen.ops.attention.arguments import ALIGNMENT, LARGEST_SIZE, is_aligned
from fagen.ops.attention.decode_problem import KV_TORCH_DTYPES, PAGES, DecodeProblem
from fagen.ops.attention.problem import TORCH_DTYPES
from fagen.target import Target, target_of

_DTYPES = {getattr(torch, theirs): ours for ours, theirs in TORCH_DTYPES.items()}
_KV_DTYPES = {getattr(torch, theirs): ours for ours, theirs in KV_TORCH_DTYPES.items()}
_TENSORS = (
    "q", "k", "v", "seqlens_k", "page_table", "cu_seqlens_q", "cache_batch_idx", "k_scale", "v_scale", "sinks",
)  # fmt: skip
_MASKS = {(-1, -1): "none", (-1, 0): "causal"}  # of a window; another one is just that
EMPTY = "there is nothing to compute"
LARGEST_SPLIT = 1 << 20  # blocks that share a sequence's keys, or keys of a block


class Tensors(NamedTuple):
    """All tensors of a call, by its names."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seqlens_k: torch.Tensor
    page_table: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cache_batch_idx: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    sinks: torch.Tensor | None

    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in self._asdict().items() if t is not None}


@dataclass(frozen=True, eq=False)
class DecodeCall:
    """`seqlen_q` and `seqlen_k` of the problem are bounds: `most_rows` and `most_keys` where they are given."""

    q: torch.Tensor  # (batch, seqlen_q, heads, head_dim), or (rows, heads, head_dim) with cu_seqlens_q
    k: torch.Tensor  # cache (pages, rows of a page, kv_heads, head_dim); not paged: a page is a sequence's
    v: torch.Tensor  # cache (pages, rows of a page, kv_heads, head_dim_v)
    seqlens_k: torch.Tensor  # int32 (batch): keys of each sequence
    page_table: torch.Tensor | None = None  # int32 (batch, pages of a sequence)
    cu_seqlens_q: torch.Tensor | None = None  # int32 (batch + 1): first row of each sequence
    cache_batch_idx: torch.Tensor | None = None  # int32 (batch): which page is the sequence's, where k is not paged
    k_scale: torch.Tensor | None = None  # float32 (batch, kv_heads): multiplies k
    v_scale: torch.Tensor | None = None
    sinks: torch.Tensor | None = None  # float32 (heads)
    window: tuple[int, int] = (-1, -1)  # -1: unbounded; causal is folded in
    softcap: float = 0.0
    scale: float | None = None
    num_splits: int = 0  # of a sequence's keys; 0: by the kernel's rule; -n: n keys each
    most_rows: int = 0  # of a sequence, with cu_seqlens_q
    most_keys: int = 0  # of a sequence; 0: as many as there is room for

    @classmethod
    def of_fields(cls, **fields: Any) -> Self:
        """Of a call like others it costs little: a frozen dataclass sets its fields one by one."""
        made = object.__new__(cls)
        made.__dict__.update(fields)
        return made

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return self.seqlens_k.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def rows(self) -> int:
        """Of q in all."""
        return self.q.shape[0] if self.ragged else self.q.shape[0] * self.q.shape[1]

    @property
    def ragged(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def seqlen_q(self) -> int:
        return self.most_rows if self.ragged else self.q.shape[1]

    @property
    def page(self) -> int:
        return 0 if self.page_table is None else self.k.shape[1]

    @property
    def room(self) -> int:
        """Keys that a sequence can have in the cache."""
        return self.k.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    @property
    def seqlen_k(self) -> int:
        return self.most_keys or self.room

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: t for name in _TENSORS if (t := getattr(self, name)) is not None}

    def output_types(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        q, lse = self.q.shape, (self.heads, self.rows) if self.ragged else (self.batch, self.heads, self.seqlen_q)
        return {"out": ((*q[:-1], self.v.shape[3]), self.q.dtype), "lse": (lse, torch.float32)}

    def new_outputs(self) -> dict[str, torch.Tensor]:
        return {name: self.q.new_empty(shape, dtype=dtype) for name, (shape, dtype) in self.output_types().items()}

    def check_arguments(self) -> None:
        """Raise InvalidArgument for settings that no kernel could be given."""
        arguments.settings(False, self.window, self.softcap, self.scale)
        if not -LARGEST_SPLIT <= self.num_splits <= LARGEST_SPLIT:
            raise InvalidArgument(f"num_splits={self.num_splits} is out of range", f"at most {LARGEST_SPLIT}")

    def check_tensors(self) -> None:
        """Raise InvalidArgument for tensors that contradict each other. What device tensors hold is not looked at."""
        for name, t in self.inputs().items():
            arguments.dense(name, t)
            if t.device != self.q.device:
                raise InvalidArgument(f"{name} is on {t.device}", f"q is on {self.q.device}")
        for name in ("seqlens_k", "cu_seqlens_q", "cache_batch_idx", "sinks"):  # kernels are told no strides of them
            t = getattr(self, name)
            if t is not None and not t.is_contiguous():
                raise InvalidArgument(f"{name} must be contiguous", f"its strides are {t.stride()}")
        self._check_cache()
        self._check_indices()
        for name in ("k_scale", "v_scale"):
            t = getattr(self, name)
            if t is not None:
                _require(name, t, (self.batch, self.kv_heads), torch.float32, "float32")
        if self.sinks is not None:
            sink_logits.check(self.sinks, self.heads, self.q.device)
            _require("sinks", self.sinks, (self.heads,), torch.float32, "float32")

    def _check_cache(self) -> None:
        q, k, v = self.q, self.k, self.v
        if q.dim() != (3 if self.ragged else 4) or k.dim() != 4 or v.dim() != 4:
            want = "(rows, heads, head_dim) with cu_seqlens_q" if self.ragged else "(batch, seqlen_q, heads, head_dim)"
            have = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
            raise InvalidArgument(f"q must be {want}, the cache (pages, rows, kv_heads, head_dim)", have)
        if max(*q.shape, *k.shape, *v.shape) > LARGEST_SIZE:
            raise InvalidArgument(f"a size is beyond {LARGEST_SIZE}", f"q {tuple(q.shape)}, k {tuple(k.shape)}")
        if k.shape[:3] != v.shape[:3] or k.shape[3] != q.shape[-1] or 0 in k.shape or not v.shape[3]:
            have = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
            raise InvalidArgument("k and v must have the same pages, rows and heads, k the head_dim of q", have)
        if self.heads % self.kv_heads:
            have = f"heads={self.heads} kv_heads={self.kv_heads}"
            raise InvalidArgument("Number of heads in key/value must divide number of heads in query", have)
        if k.dtype != v.dtype or (k.dtype != q.dtype and k.dtype not in _KV_DTYPES):
            have = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
            raise InvalidArgument("the cache must have the dtype of q, or float8_e4m3fn", have)
        if self.page_table is not None and self.page not in PAGES:
            raise InvalidArgument(f"pages of {self.page} rows are not supported", f"supported: {PAGES[1:]}")

    def _check_indices(self) -> None:
        _require("seqlens_k", self.seqlens_k, (self.batch,), torch.int32, "int32")
        if not self.ragged and self.q.shape[0] != self.batch:
            raise InvalidArgument(f"seqlens_k has {self.batch} sequences", f"q has {self.q.shape[0]}")
        if self.page_table is not None:
            _require("page_table", self.page_table, (self.batch, self.page_table.shape[-1]), torch.int32, "int32")
            if not self.page_table.shape[1]:
                raise InvalidArgument("page_table has no pages", f"its shape is {tuple(self.page_table.shape)}")
        if self.cu_seqlens_q is not None:
            _require("cu_seqlens_q", self.cu_seqlens_q, (self.batch + 1,), torch.int32, "int32")
            if not 0 < self.most_rows <= LARGEST_SIZE:
                raise InvalidArgument(f"most_rows={self.most_rows} of a sequence", "with cu_seqlens_q at least 1")
        if self.cache_batch_idx is not None:
            _require("cache_batch_idx", self.cache_batch_idx, (self.batch,), torch.int32, "int32")
            if self.page_table is not None:
                raise InvalidArgument("cache_batch_idx does not go with a page table", "", "give one of both")
        elif self.page_table is None and self.k.shape[0] < self.batch:
            raise InvalidArgument(f"the cache has {self.k.shape[0]} sequences", f"there are {self.batch}")
        if not 0 <= self.most_keys <= self.room:
            raise InvalidArgument(f"most_keys={self.most_keys}", f"the cache has room for {self.room} a sequence")

    # ---- what can serve it ------------------------------------------------------------------------------------------

    @property
    def unreadable(self) -> str:
        """Why no family could take the tensors as they are; "" if one might."""
        q, k, v = self.q, self.k, self.v
        if q.dtype not in _DTYPES:
            return f"no kernels for {q.dtype}"
        if max(k.shape[3], v.shape[3]) > DecodeProblem.most_head_dim:
            return f"head_dim {max(k.shape[3], v.shape[3])} is larger than {DecodeProblem.most_head_dim}"
        for name, t in self.inputs().items():
            if t.stride(-1) != 1 and t.shape[-1] > 1:
                return f"the last dimension of {name} is not contiguous"
        if 0 in q.shape or self.seqlen_k < 1:
            return EMPTY
        if self.scale is not None and not self.scale >= arguments.LEAST_NUMBER:
            return f"scale={self.scale} is not positive"
        return ""

    @property
    def target(self) -> Target | None:
        return target_of(self.q.device)

    @property
    def shared_kv(self) -> bool:
        """Whether v is the first columns of k."""
        k, v = self.k, self.v
        return k.data_ptr() == v.data_ptr() and k.stride() == v.stride() and v.shape[3] <= k.shape[3]

    def static_facts(self) -> tuple[Any, ...]:
        """All that the checks look at, and that a problem says, but the sizes that differ between calls."""
        others = (
            self.seqlens_k, self.page_table, self.cu_seqlens_q, self.cache_batch_idx, self.k_scale, self.v_scale,
            self.sinks,
        )  # fmt: skip
        return (
            *[(t.dtype, t.device, t.layout, t.dim(), t.shape[-2:], t.stride(-1)) for t in (self.q, self.k, self.v)],
            *[
                None if t is None else (t.dtype, t.device, t.layout, t.dim(), t.is_contiguous(), t.stride()[-1:])
                for t in others
            ],
            self.page, self.window, self.softcap, self.scale, self.num_splits, self._aligned, self.shared_kv,
        )  # fmt: skip

    def sizes_agree(self) -> bool:
        """Whether a call passes the checks whose static facts are those of one that did, and has something to compute.

        Where it does not, the checks find the words.
        """
        q, k, v, table, starts, index = self.q, self.k, self.v, self.page_table, self.cu_seqlens_q, self.cache_batch_idx
        batch, sizes, (pages, page, kv_heads, _) = self.seqlens_k.shape[0], (*q.shape, *v.shape), k.shape
        if starts is not None:
            most, good = self.most_rows, starts.shape[0] == batch + 1
        else:
            most, good = sizes[1], sizes[0] == batch
        good = good and sizes[-4:-1] == (pages, page, kv_heads)  # so that k's are looked at with v's
        good = good and min(most, *sizes) > 0 and max(most, *sizes) <= LARGEST_SIZE
        if table is not None:
            good = good and table.shape[0] == batch and table.shape[1] > 0 and index is None
        else:
            good = good and (pages >= batch if index is None else index.shape[0] == batch)
        for scale in (self.k_scale, self.v_scale):
            good = good and (scale is None or scale.shape == (batch, kv_heads))
        good = good and (self.sinks is None or self.sinks.shape[0] == q.shape[-2])
        return good and 0 <= self.most_keys <= self.room and batch > 0

    @property
    def _aligned(self) -> bool:
        """A fresh output starts at an aligned address."""
        q, k, v = self.q, self.k, self.v
        return is_aligned(q) and is_aligned(k) and is_aligned(v) and not v.shape[3] * q.element_size() % ALIGNMENT

    @property
    def problem(self) -> DecodeProblem:
        """The problem that the call is, unless it is unreadable."""
        q, k, v = self.q, self.k, self.v
        left, right = self.window
        return DecodeProblem(
            dtype=_DTYPES[q.dtype],
            kv_dtype=_KV_DTYPES.get(k.dtype, ""),
            head_dim=k.shape[3],
            head_dim_v=v.shape[3],
            mask=_MASKS.get(self.window, "window"),
            softcap=bool(self.softcap),
            sinks=self.sinks is not None,
            page=self.page,
            shared_kv=self.shared_kv,
            aligned=self._aligned,
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            window_left=left,
            window_right=right,
        )


def _require(name: str, t: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, spelled: str) -> None:
    if tuple(t.shape) != shape or t.dtype != dtype:
        raise InvalidArgument(f"{name} must be {spelled} {shape}", f"it is {t.dtype} {tuple(t.shape)}")
