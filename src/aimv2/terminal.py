"""The console of everything that is printed: controls in names, keys and captions are shown, never sent to the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from aimv2.errors import visible


class VisibleConsole(Console):
    """A console of rich; its own colours and movements are not part of any text, and stay."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Any:
        if isinstance(renderable, Text) and (plain := visible(renderable.plain)) != renderable.plain:
            whole = Text(plain, style=renderable.style, justify=renderable.justify, overflow=renderable.overflow)
            whole.no_wrap = renderable.no_wrap
            renderable = whole
        return super().render(renderable, options)
