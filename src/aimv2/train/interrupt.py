"""SIGTERM and Ctrl-C only raise a flag; the loop saves and leaves at the next step's end."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupted(Exception):
    """The run was asked to stop and has saved.

    Attributes:
        code: exit code, 130 after Ctrl-C and 143 after SIGTERM.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class StopFlag:
    """Installs the handlers; ``code`` is 0 until a signal came. A second Ctrl-C ends at once, as it always did."""

    def __init__(self) -> None:
        self.code = 0
        self.before = {number: signal.signal(number, self._note) for number in EXIT_CODES}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.code = EXIT_CODES[signal.Signals(number)]
        signal.signal(number, self.before[signal.Signals(number)])

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
