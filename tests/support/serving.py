"""Families that serve no calls yet, in tests of the road of a call to them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest

from fagen import families
from fagen.dispatch import resolve


@contextlib.contextmanager
def serves_calls(name: str) -> Iterator[None]:
    """Meanwhile the family serves all that it supports."""
    on = dataclasses.replace(families.get(name), serves_calls=lambda problem: True)
    every = tuple(on if family.name == name else family for family in families.all_families())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "all_families", lambda: every)
        resolve.forget()
        yield
    resolve.forget()
