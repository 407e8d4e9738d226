"""A browser for the explorer's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from explored import Screen


@pytest.fixture
def open_screen(browser: Any) -> Iterator[Any]:
    opened = []

    def make(**options: Any) -> Screen:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        screen = Screen(context.new_page())
        opened.append((context, screen))
        return screen

    yield make
    for context, screen in opened:
        context.close()
        assert screen.mistakes == []
