"""Fixtures of the tuner's tests: folders of their own, and a family that misbehaves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fagen import db

HERE = str(Path(__file__).parent)
if HERE not in sys.path:  # workers import the fake family from here, too
    sys.path.insert(0, HERE)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path / "db"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(db, "default_paths", lambda: (tmp_path / "db",))  # nothing ships
    return tmp_path


@pytest.fixture
def fake(folders, monkeypatch):
    import fake_family

    fake_family.install(monkeypatch.setattr)
    return folders


@pytest.fixture
def calm(fake, monkeypatch):
    """The fake family with styles that cost little time: 8 legal configs."""
    import fake_family

    chosen = "plain,slow,wrong,broken"
    monkeypatch.setenv("FAKE_STYLES", chosen)  # of processes started from here
    monkeypatch.setattr(fake_family, "CHOSEN", tuple(chosen.split(",")))
    return fake
