"""Ctrl-C, SIGTERM and SIGHUP only raise a flag; the loop saves and leaves at the next step's end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
PATIENCE = 10.0  # seconds in which another Ctrl-C is taken for impatience


class Interrupted(Exception):
    """A signal stopped the run, which has saved.

    Attributes:
        code: exit code, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 75 where another rank has lost a data worker.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class StopFlag:
    """Installs the handlers; ``code`` is 0 until a signal came.

    Further signals are held while the run saves, and for PATIENCE seconds after the first; one after that ends at once.
    """

    def __init__(self) -> None:
        self.code, self.since, self.saving, self.abrupt = 0, 0.0, False, False
        stay = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # ignored by `nohup`
        self.before = {number: signal.signal(number, self._note) for number in EXIT_CODES if number not in stay}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.code:
            self.code, self.since = EXIT_CODES[signal.Signals(number)], now
            if self.abrupt:
                raise KeyboardInterrupt
            self._say("stopping after this step, and saving")
        elif self.saving or now - self.since < PATIENCE:
            self._say("saving, a moment")
        else:
            self.restore()
            os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """The first signal ends what is within, of which nothing is to be saved; raises Interrupted."""
        self.abrupt = True
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(f"stopped {where}", self.code) from None
        finally:
            self.abrupt = False

    def impatient(self) -> bool:
        """Whether a signal came longer ago than a step should take."""
        return bool(self.code) and time.monotonic() - self.since > PATIENCE

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While a checkpoint is written no signal ends the process."""
        self.saving = True
        try:
            yield
        finally:
            self.saving = False

    def _say(self, line: str) -> None:
        """From a handler: no buffered stream, and only from the first rank."""
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"{line}\n".encode())

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
