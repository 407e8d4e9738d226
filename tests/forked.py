"""Commands without the seconds of their imports: a process that has imported everything forks for each request.

It has no thread, no gloo and no CUDA when it forks. What tests signals, exit codes, start-up or the launcher itself takes a fresh
process instead (``runs.command``).
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import functools
import importlib
import io
import json
import os
import pickle
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Ended = subprocess.CompletedProcess[str]
PRELOADED = (
    "ftfy",
    "fsspec",
    "tensorboard.summary",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
)


# ---- for tests ----


def forked(*words: str, ranks: int = 1, timeout: float = 180, env: dict[str, str] | None = None) -> Ended:
    """Runs the command line in a forked process, or as ``ranks`` of them with the environment that torchrun sets.

    Returns:
        The first code that is not 0, and what all ranks wrote.
    """
    return request({"words": list(words)}, ranks, timeout, env or {})


def call_on_ranks(ranks: int, function: Callable[..., None], *args: Any, timeout: float = 180) -> None:
    """Calls ``function(*args)``, a function of a module, in ``ranks`` forked processes with torchrun's environment.

    Raises:
        AssertionError: a process failed; its traceback is the message.
    """
    pickled = base64.b64encode(pickle.dumps((function, args))).decode()
    done = request({"call": pickled, "path": sys.path}, ranks, timeout, {})
    assert done.returncode == 0, done.stderr


class ForkedChild:
    """What ``aimv2 run`` needs of the ``subprocess.Popen`` of a stage; the stage has ended before anyone reads."""

    def __init__(self, command: list[str], **how: Any) -> None:
        assert command[:4] == [sys.executable, "-P", "-m", "aimv2"], command
        done = forked(*command[4:])
        self.stdout, self.stderr, self.returncode = io.StringIO(done.stdout), io.StringIO(done.stderr), done.returncode

    def wait(self) -> int:
        return self.returncode

    poll = wait


def fork_stages(patch: pytest.MonkeyPatch) -> None:
    """Lets ``aimv2 run`` in this process fork its stages."""
    from aimv2.pipeline import work

    patch.setattr(work, "subprocess", SimpleNamespace(Popen=ForkedChild, DEVNULL=None, PIPE=None))


def request(what: dict[str, Any], ranks: int, timeout: float, env: dict[str, str]) -> Ended:
    """Sends one request and waits for its answer."""
    child = server()
    assert child.stdin and child.stdout
    with tempfile.TemporaryDirectory() as folder:
        given = {"cwd": os.getcwd(), "env": {**os.environ, **env}, "out": folder, "ranks": ranks, "timeout": timeout}
        child.stdin.write(json.dumps({**what, **given}) + "\n")
        child.stdin.flush()
        answer = json.loads(child.stdout.readline())
        out, err = ((Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    done = subprocess.CompletedProcess(what.get("words", []), answer["code"], out, err)
    if answer["late"]:
        raise subprocess.TimeoutExpired(done.args, timeout, out, err)
    return done


@functools.cache
def server() -> subprocess.Popen[str]:
    """The process that forks, started at the first request; it ends with this one."""
    child = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(stop, child)
    return child


def stop(child: subprocess.Popen[str]) -> None:
    assert child.stdin
    child.stdin.close()
    child.wait()


# ---- the process that forks ----


def serve() -> None:
    """Answers requests, a line of JSON each, until the input ends."""
    import aimv2

    for module in pkgutil.walk_packages(aimv2.__path__, "aimv2."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ModuleNotFoundError):  # of an optional package, which the commands then name
                importlib.import_module(module.name)
    for name in PRELOADED:
        importlib.import_module(name)
    threads = Path("/proc/self/task")  # those of libraries too (Linux)
    assert threading.active_count() == 1 and (not threads.exists() or len(list(threads.iterdir())) == 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Forks the ranks and waits; where one fails the others are ended, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {fork(asked, rank, port) for rank in range(asked["ranks"])}
    code, end = 0, time.monotonic() + asked["timeout"]
    while running and time.monotonic() < end:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.005)
            continue
        running.discard(pid)
        code = code or os.waitstatus_to_exitcode(status)
        if code:
            end_all(running, signal.SIGTERM)
    late = bool(running)
    end_all(running, signal.SIGKILL)
    for pid in running:
        os.waitpid(pid, 0)
    return {"code": code, "late": late}


def end_all(running: set[int], number: signal.Signals) -> None:
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def fork(asked: dict[str, Any], rank: int, port: int) -> int:
    """A process that does what is asked; never returns in it."""
    if pid := os.fork():
        with contextlib.suppress(PermissionError, ProcessLookupError):  # both set it: whoever is first
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        redirect(Path(asked["out"]))
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        if asked["ranks"] > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": asked["ranks"], "LOCAL_WORLD_SIZE": asked["ranks"]}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            os.environ.update({key: str(value) for key, value in {**ranks, **where}.items()})
        code = work(asked)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def redirect(folder: Path) -> None:
    """Nothing on standard input; what ranks write goes to one file each of standard output and error."""
    for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
        opened = os.open(folder / name, mode | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def work(asked: dict[str, Any]) -> int:
    """The command, or the call; its exit code."""
    if "call" in asked:
        sys.path[:] = asked["path"]
        function, args = pickle.loads(base64.b64decode(asked["call"]))
        function(*args)
        return 0
    sys.argv = ["aimv2", *asked["words"]]
    try:
        runpy.run_module("aimv2", run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    finally:
        atexit._run_exitfuncs()
    return 0


if __name__ == "__main__":
    serve()
