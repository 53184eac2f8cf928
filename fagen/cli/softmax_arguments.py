"""Problems of the op softmax as flags and TOML files spell them; `arguments` has the settings that all ops share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fagen import schema
from fagen.errors import UsageError
from fagen.ops.attention.parse import choices, sizes

if TYPE_CHECKING:
    from fagen.ops.softmax.problem import SoftmaxProblem

OP = "softmax"
SETTINGS = {
    "direction": "with op softmax: forward or backward (default: forward)",
    "along": "with op softmax: what sums to 1, row or column (default: row)",
    "rows": "with op softmax (default: 64)",
    "columns": "with op softmax (default: 1k)",
    "out_dtype": "with op softmax: what is written, where it is another dtype than what is read",
    "log": "with op softmax: its logarithm",
}
SWITCHES = ("log",)
_SHARED = ("op", "dtype", "batch")


def expand(settings: Mapping[str, Any], default_dtype: str) -> list[SoftmaxProblem]:
    """Every problem that the settings describe: lists multiply."""
    from fagen.ops.softmax.problem import ALONG, DIRECTIONS, ITEM_BYTES, SoftmaxProblem

    for name in settings:
        if name not in SETTINGS and name not in _SHARED:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is of attention, the op is softmax", f"its settings: {', '.join(SETTINGS)}")
    log = settings.get("log", False)
    if type(log) is not bool:
        raise UsageError(f"log is true or false, not {schema.shown(log)}")
    axes: dict[str, list[Any]] = {
        "direction": choices("direction", settings.get("direction", "forward"), DIRECTIONS),
        "dtype": choices("dtype", settings.get("dtype", default_dtype), ITEM_BYTES),
        "out_dtype": choices("dtype", settings["out_dtype"], ITEM_BYTES) if "out_dtype" in settings else [""],
        "along": choices("along", settings.get("along", "row"), ALONG),
        "batch": sizes(settings.get("batch", 1)),
        "rows": sizes(settings.get("rows", 64)),
        "columns": sizes(settings.get("columns", 1024)),
    }
    points = (dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values()))
    return list(dict.fromkeys(SoftmaxProblem(**point, log=log) for point in points))


def refuse(settings: Mapping[str, Any]) -> None:
    """Settings of a softmax where the op is another."""
    for name in settings:
        if name in SETTINGS:
            raise UsageError(f"--{name.replace('_', '-')} needs op softmax", remedy="add --op softmax")
