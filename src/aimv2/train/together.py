"""What only the first rank does and may fail at, such as writing: all ranks learn of it, and none waits for another."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from aimv2.distributed import World
from aimv2.errors import UsageError, first_line

T = TypeVar("T")


def on_first(world: World, work: Callable[[], T], place: Path, then: str = "make room and start again") -> T | None:
    """Calls ``work`` on the first rank; collective.

    Args:
        world: the ranks.
        work: what to do.
        place: file or folder that it writes, for errors that name none.
        then: what the user does after making room.

    Returns:
        what ``work`` returns, on the first rank; None on others.

    Raises:
        UsageError: on all ranks, where it raised one, or the disk refused; on the others whatever else it raised.
    """
    problem, found, own = None, None, None
    if world.main:
        try:
            found = work()
        except UsageError as error:
            problem = (str(error), error.option, error.code)
        except OSError as error:
            problem = (refused(error, place, then), "", "invalid")
        except Exception as error:  # of a library; the others would wait
            own, problem = error, (f"the first rank ended: {type(error).__name__}: {first_line(error)}", "", "invalid")
    problem = world.broadcast(problem)
    if own is not None:
        raise own
    if problem is not None:
        raise UsageError(problem[0], option=problem[1], code=problem[2])
    return found


@contextlib.contextmanager
def said(place: Path, then: str) -> Iterator[None]:
    """What the disk refuses in a block of code is a UsageError; arguments as in :func:`on_first`."""
    try:
        yield
    except OSError as error:
        raise UsageError(refused(error, place, then)) from error


def refused(error: OSError, place: Path, then: str) -> str:
    """The line for a file that the disk refused; ``place`` where the error names none."""
    why = os.strerror(error.errno) if error.errno else str(error)
    return f"{error.filename or place}: {why}; {then}"
