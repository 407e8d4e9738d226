"""A rank of torchrun ends with its launcher: two runs never write one folder because a launcher was killed.

A process that a shell, ``nohup`` or Slurm started outlives its parent, as ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1
POLL = 2.0  # seconds, where the system sends no signal
watching: list[int] = []  # parents that are watched


def end_with_launcher() -> None:
    """Asks for SIGTERM at the death of torchrun, after which a run saves and leaves; without torchrun nothing happens.

    Linux sends it; elsewhere a thread looks every two seconds.
    """
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ or watching or threading.current_thread() is not threading.main_thread():
        return
    watching.append(parent)
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) == 0:
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGTERM)
        return
    threading.Thread(target=watch, args=(parent,), name="launcher", daemon=True).start()


def watch(parent: int) -> None:
    """Sends SIGTERM to this process once its parent is another one."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)
