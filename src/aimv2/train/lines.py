"""A file of lines that a full disk neither cuts nor loses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


class Lines:
    """Appends whole lines. Those that could not be written wait in memory, and are tried again with the next one.

    Attributes:
        path: of the file.
        failure: why lines wait; None where none does.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        """
        Args:
            path: of the file, which is created.
            tell: gets a line where writing fails, and where it works again.

        Raises:
            OSError: it can't be opened.
        """
        self.path, self.tell = path, tell
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.size, self.waiting = os.fstat(self.descriptor).st_size, b""
        self.failure: OSError | None = None

    def write(self, line: str) -> None:
        """A line, now or later."""
        self.waiting += line.encode() + b"\n"
        self.try_again()

    def try_again(self) -> None:
        """Writes what waits, whole or not at all."""
        before = self.failure
        try:
            done = 0
            while done < len(self.waiting):
                done += os.write(self.descriptor, self.waiting[done:])
            self.size, self.waiting, self.failure = self.size + done, b"", None
        except OSError as error:
            self.failure = error
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, self.size)  # no half line
        if self.failure is not None and before is None:
            why = os.strerror(self.failure.errno or 0)
            self.tell(f"{self.path} can't be written ({why}): its lines wait until the next checkpoint; make room")
        if self.failure is None and before is not None:
            self.tell(f"{self.path} is written again, with the lines that waited")

    def settle(self) -> None:
        """Makes sure that all lines are on the disk.

        Raises:
            OSError: they are not, with the name of the file.
        """
        self.try_again()
        try:
            if self.failure is not None:
                raise self.failure
            os.fsync(self.descriptor)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from None

    def close(self) -> None:
        """Tries once more what waits."""
        self.try_again()
        with contextlib.suppress(OSError):
            os.close(self.descriptor)
