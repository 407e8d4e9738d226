"""TensorBoard's events of a run. A disk that refuses them costs the events, never the run."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Events:
    """Writes figures for TensorBoard until the disk refuses, which a line says."""

    def __init__(self, folder: Path, start: int, tell: Callable[[str], None]) -> None:
        """
        Args:
            folder: of the events.
            start: last step before this start of the run; later ones there are hidden.
            tell: gets the line.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.tell, self.writer = folder, tell, None
        self.hook = threading.excepthook
        threading.excepthook = self.in_thread  # the writer has a thread; its errors come up at the next write
        try:
            self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        except OSError as error:
            self.give_up(error)

    def in_thread(self, about: Any) -> None:
        """Leaves out the traceback of a writer's thread that met a full disk."""
        of_writer = type(about.thread).__module__.startswith("tensorboard")
        if not (of_writer and isinstance(about.exc_value, OSError)):
            self.hook(about)

    def give_up(self, error: OSError) -> None:
        """From now on there are no events."""
        why = os.strerror(error.errno) if error.errno else str(error)
        self.tell(f"{self.folder} can't be written ({why}): the run goes on without TensorBoard's events")
        self.close()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """The figures of a step."""
        if self.writer is None:
            return
        try:
            for key, value in numbers.items():
                self.writer.add_scalar(key, value, step)
        except OSError as error:
            self.give_up(error)

    def close(self) -> None:
        """Writes what is left, where that is possible."""
        if self.writer is not None:
            with contextlib.suppress(OSError):
                self.writer.close()
        self.writer = None
        if threading.excepthook == self.in_thread:
            threading.excepthook = self.hook
