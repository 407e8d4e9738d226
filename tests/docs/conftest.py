"""A reader's folder and what the pages left in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doc_runs import make_home

from aimv2.train import launch
from runs import light_collections


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`doc_runs.make_home`."""
    return make_home(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def done() -> dict[str, dict[str, Any]]:
    """What the Python of each page that has been run left behind."""
    return {}


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch, forked_stages: None) -> Iterator[None]:
    """The demo draws few scenes."""
    monkeypatch.setattr(launch, "DEMO_SCENES", 500)
    with light_collections():
        yield
