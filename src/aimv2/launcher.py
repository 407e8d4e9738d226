"""Ranks and their launcher, torchrun: they end with it, and find each other after it has started them again.

Two runs never write one folder because a launcher was killed.
A process that a shell, ``nohup`` or Slurm started outlives its parent, as ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from aimv2.io import say

if TYPE_CHECKING:
    from torch.distributed import Store

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


def store_of_restart(rank: int) -> Store | None:
    """Where ranks that a launcher has started again find each other; None: as it says itself.

    torchrun keeps one store over its restarts, in which the addresses of the ranks before are. On one machine all ranks count restarts
    alike, and the count keeps them apart; on several only a store for each start does.
    """
    import torch.distributed as dist

    around = os.environ
    shared = (
        around.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(around.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    )
    if not shared:
        return None
    if around.get("LOCAL_WORLD_SIZE") != around.get("WORLD_SIZE"):
        if rank == 0:
            say(
                "torchrun on several machines finds its ranks after a restart only with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
                "environment of every torchrun"
            )
        return None
    count = around.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.TCPStore(
        around["MASTER_ADDR"], int(around["MASTER_PORT"]), is_master=False, timeout=timedelta(minutes=5)
    )
    return dist.PrefixStore(f"start-{count}", store)
