"""One writer of a run folder: a lock that its process holds, with a heartbeat where file systems have no locks.

``RUN/.lock`` is locked by rank 0 with POSIX's ``lockf``, which a child of the process does not inherit and the system releases when
the process ends, however it ends. The file says who holds it. Between machines locks may not be
shared, so its time is renewed while the run lasts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.io import parse_json, say
from aimv2.train.together import on_first

LOCK = ".lock"
BEAT = 20.0  # seconds between heartbeats
SILENT = 120.0  # a holder on another machine that was silent for so long is gone
BUSY = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """The lock of one run folder, held from its creation to :meth:`release`."""

    def __init__(self, run: Path, take_over: bool = False) -> None:
        """
        Args:
            run: the run folder, which is created.
            take_over: hold it although a process on another machine seems to.

        Raises:
            UsageError: another process holds it.
        """
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / LOCK
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self.locks = self.lock(run)
            self.check_holder(run, take_over)
            self.write()
        except BaseException:
            os.close(self.descriptor)
            raise
        self.over = threading.Event()
        self.heart = threading.Thread(target=self.beat, name="run lock", daemon=True)
        self.heart.start()

    def lock(self, run: Path) -> bool:
        """Whether the file system has locks; UsageError where the lock is taken."""
        try:
            import fcntl

            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            return False
        except OSError as error:
            if error.errno not in BUSY:
                say(f"{run}: its file system has no locks; two runs in it are noticed by the time of {LOCK} only")
                return False
            raise self.taken(run, self.holder()) from None
        return True

    def check_holder(self, run: Path, take_over: bool) -> None:
        """UsageError where somebody holds it whom no lock of this machine shows."""
        holder = self.holder()
        here = holder.get("host") == socket.gethostname()
        if not holder or take_over or (here and (self.locks or not alive(holder.get("pid")))):
            return
        if here or time.time() - self.path.stat().st_mtime < SILENT:
            raise self.taken(run, holder)

    def holder(self) -> dict[str, Any]:
        """Host, pid and start of the process that holds it, or {}."""
        try:
            found = parse_json(os.pread(self.descriptor, 4096, 0).decode())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def taken(self, run: Path, holder: dict[str, Any]) -> UsageError:
        """The line that names who writes the run."""
        known = {key: str(holder.get(key, "unknown"))[:100] for key in ("pid", "host", "started")}
        who = "process {pid} on {host}, since {started}".format(**known)
        advice = f"wait for its end, or for {SILENT:.0f} s if that machine is gone; --take-over writes all the same"
        if holder.get("host") == socket.gethostname():
            advice = "wait for its end, or end it"
        return UsageError(f"--run {run} is written by {who}; {advice}", option="--run", code="exists")

    def write(self) -> None:
        """Notes this process."""
        about = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(about).encode(), 0)

    def beat(self) -> None:
        """Renews the file's time until the lock is released."""
        while not self.over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Gives it up; the file stays, empty."""
        self.over.set()
        self.heart.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)  # which releases the lock


def alive(pid: Any) -> bool:
    """Whether a process of this machine lives."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def one_writer(run: Path, world: World, take_over: bool = False) -> Iterator[None]:
    """Holds the lock of a run folder on rank 0; collective.

    Raises:
        UsageError: on all ranks, where another process writes the run.
    """
    lock = on_first(world, lambda: RunLock(run, take_over), run / LOCK)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
