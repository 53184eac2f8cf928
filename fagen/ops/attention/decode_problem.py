"""The problem of the decode op: few query rows a sequence on a cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fagen.errors import InvalidArgument
from fagen.ops.attention.problem import DTYPES, Problem
from fagen.schema import shown

KV_DTYPES = {"": 0, "fp8_e4m3": 1}  # bytes of an element of the cache; "": it has the dtype of q
KV_TORCH_DTYPES = {"fp8_e4m3": "float8_e4m3fn"}
PAGES = (0, 1, 16, 32, 64, 128, 256)  # rows of a page; 0: the cache is not paged
DECODE_MASKS = ("none", "causal", "window")
_ABSENT = ("intervals", "alibi", "dropout", "tf32")  # fields of a forward problem


@dataclass(frozen=True)
class DecodeProblem(Problem):
    """The fields of a forward problem without intervals, ALiBi, dropout and TF32, and what the cache is.

    `seqlen_q` and `seqlen_k` are the most rows and keys that a sequence has.
    """

    most_head_dim: ClassVar[int] = 576

    op: str = "decode"
    seqlen_q: int = 1
    seqlen_k: int = 1024
    kv_dtype: str = ""  # a key of KV_DTYPES
    sinks: bool = False
    page: int = 0  # one of PAGES
    shared_kv: bool = False  # v is the first head_dim_v columns of k, in the same memory

    def _check(self) -> None:
        super()._check()
        for name in _ABSENT:
            if getattr(self, name):
                raise InvalidArgument(f"decode has no {name}", f"{name}={shown(getattr(self, name))}")
        if self.kv_dtype not in KV_DTYPES:
            known = ", ".join(filter(None, KV_DTYPES))
            raise InvalidArgument(f"kv_dtype {shown(self.kv_dtype)} is not supported", f"supported: {known}, or none")
        if self.shared_kv and self.head_dim_v > self.head_dim:
            have = f"head_dim_v={self.head_dim_v} head_dim={self.head_dim}"
            raise InvalidArgument("shared_kv: v cannot have more columns than k", have)
        if self.page not in PAGES:
            known = ", ".join(map(str, PAGES[1:]))
            raise InvalidArgument(f"page={shown(self.page)} is not supported", f"rows of a page: {known}; 0: no pages")

    @property
    def static_key(self) -> str:
        """decode/bf16/d128/causal/softcap/kv-fp8_e4m3/sinks/page16."""
        parts = [f"kv-{self.kv_dtype}"] if self.kv_dtype else []
        parts += ["sinks"] if self.sinks else []
        parts += [f"page{self.page}"] if self.page else []
        parts += ["shared-kv"] if self.shared_kv else []
        return "/".join([super().static_key, *parts])

    @property
    def kv_itemsize(self) -> int:
        return KV_DTYPES[self.kv_dtype] or DTYPES[self.dtype]

    def bytes(self) -> int:
        """Memory of a call's inputs and outputs: q, O, the LSE, the keys and values of all sequences, their pages."""
        p = self
        of_rows = p.batch * p.heads * p.seqlen_q * ((p.head_dim + p.head_dim_v) * p.itemsize + 4)
        dims = p.head_dim + (0 if p.shared_kv else p.head_dim_v)
        of_keys = p.batch * p.seqlen_k * p.kv_heads * dims * p.kv_itemsize
        pages = p.batch * -(-p.seqlen_k // p.page) if p.page else 0
        return of_rows + of_keys + 4 * (pages + p.batch)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in _ABSENT}
