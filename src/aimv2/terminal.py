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

    def _check_buffer(self) -> None:
        """What standard error can't take, on a full disk or a terminal that is gone, ends no command."""
        try:
            super()._check_buffer()
        except OSError:
            if not self.stderr:
                raise
            del self._buffer[:]

    def on_broken_pipe(self) -> None:
        if not self.stderr:
            super().on_broken_pipe()
        self.quiet = True

    def render(self, renderable: Any, options: Any = None) -> Any:
        if isinstance(renderable, Text) and (plain := visible(renderable.plain)) != renderable.plain:
            whole = Text(plain, style=renderable.style, justify=renderable.justify, overflow=renderable.overflow)
            whole.no_wrap = renderable.no_wrap
            renderable = whole
        return super().render(renderable, options)
