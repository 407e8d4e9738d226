"""Progress of long work, on standard error: a bar on a terminal, elsewhere a line every so often and none for what is quick."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from aimv2.io import is_first, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Item = TypeVar("Item")
EVERY = 10.0  # seconds between lines
BARS: weakref.WeakSet[Progress] = weakref.WeakSet()  # of this process
PATIENCE = 3  # of which this many pass before a heartbeat says the same again


def duration(seconds: float) -> str:
    """``HH:MM:SS``; from a day on with the days."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d " * (days > 0) + f"{hours:02}:{minutes:02}:{rest:02}"


def open_bar(console: Console, total: int | None, completed: int = 0, transient: bool = True) -> Progress:
    """A bar with one task: what is done and the time left come first, so that narrow terminals lose the rest, not these."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    done = MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=len(f"{total}/{total}")))
    left = TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=8))
    text = TextColumn(
        "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
    )
    # over an hour: what takes longer than rich's 30 seconds has an estimate too
    bar = Progress(
        done, left, BarColumn(10), text,
        console=console, expand=True, transient=transient, speed_estimate_period=3600,
    )  # fmt: skip
    bar.add_task("", total=total, completed=completed)
    BARS.add(bar)
    return bar


def taken() -> bool:
    """Whether a bar is on the terminal: a second one would break its lines."""
    return any(bar.live.is_started for bar in BARS)


class ProgressLines:
    """Progress where there is no terminal: a line every EVERY seconds with what is done and the time left."""

    def __init__(self, title: str, total: int | None, completed: int = 0) -> None:
        self.title, self.total, self.done, self.first = title, total, completed, completed
        self.began = self.said = time.monotonic()

    def advance(self, done: int = 1) -> None:
        """Counts ``done`` more."""
        self.done += done
        now = time.monotonic()
        finished = self.done == self.total and self.said > self.began  # of what was shown the end too
        if now - self.said < EVERY and not finished:
            return
        self.said = now
        line = f"{self.title}: {self.done}"
        if self.total is not None:
            left = (now - self.began) / max(self.done - self.first, 1) * (self.total - self.done)
            line += f"/{self.total}, " + (f"took {duration(now - self.began)}" if finished else f"eta {duration(left)}")
        say(line)


@contextlib.contextmanager
def progress_bar(
    title: str, total: int | None, completed: int = 0, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Shows how far the work in a block is; yields a function that advances it.

    Args:
        title: of the work.
        total: of what is counted; None: not known.
        completed: done before.
        shown: False: nothing is printed.
    """
    from aimv2.terminal import VisibleConsole

    console = VisibleConsole(file=sys.stderr)
    if not shown or not is_first() or taken():
        yield lambda done: None
    elif not console.is_terminal:
        yield ProgressLines(title, total, completed).advance
    else:
        with open_bar(console, total, completed) as bar:
            (task,) = bar.task_ids
            bar.update(task, description=title)
            yield lambda done: bar.advance(task, done)


def tracked(items: Iterable[Item], title: str, total: int | None, shown: bool = True) -> Iterator[Item]:
    """The same items; see :func:`progress_bar`."""
    with progress_bar(title, total, shown=shown) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def heartbeat(line: Callable[[], str], shown: bool = True) -> Iterator[None]:
    """While a block runs that can't say how far it is, shows ``line()`` and the time since its beginning: in place on a terminal,
    elsewhere every EVERY seconds. ``line`` is called from another thread.
    """
    from rich.live import Live
    from rich.text import Text

    from aimv2.terminal import VisibleConsole

    console, began = VisibleConsole(file=sys.stderr), time.monotonic()

    def words() -> str:
        return f"{line()}, {duration(time.monotonic() - began)}"

    if not shown or not is_first() or taken():
        yield
    elif console.is_terminal:
        with Live(
            get_renderable=lambda: Text(words(), overflow="ellipsis", no_wrap=True),
            console=console, refresh_per_second=1, transient=True,
        ):  # fmt: skip
            yield
    else:
        ended = threading.Event()

        def beat() -> None:
            last, silent = "", 0
            while not ended.wait(EVERY):
                now, silent = line(), silent + 1
                if now != last or silent == PATIENCE:
                    say(words())
                    last, silent = now, 0

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
