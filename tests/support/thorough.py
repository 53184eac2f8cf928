"""Parameters of a test that are many and alike: `make test` runs some, `make thorough` the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def sample(values: Sequence[Any], every: int) -> list[Any]:
    """All of them; each but the first of `every` is marked as thorough."""
    thorough = pytest.mark.thorough

    def marked(value: Any) -> Any:
        return pytest.param(*value, marks=thorough) if isinstance(value, tuple) else pytest.param(value, marks=thorough)

    return [value if i % every == 0 else marked(value) for i, value in enumerate(values)]
