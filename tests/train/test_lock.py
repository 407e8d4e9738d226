"""One writer a run folder: another process is refused, a dead one is not, and a foreign host counts while its heart beats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aimv2.errors import UsageError
from aimv2.train import lock
from aimv2.train.lock import LOCK, SILENT, RunLock
from aimv2.train.sealing import faults, step_folders
from runs import need_ranks, options, resume, train

HOLD = """
import sys
import time
from collections.abc import Callable
from pathlib import Path
from aimv2.train.lock import RunLock
held = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


def holding(run: Path) -> subprocess.Popen[str]:
    """Another process that holds the run."""
    words = [sys.executable, "-c", HOLD, str(run)]
    made = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None and made.stdout.readline() == "held\n"
    return made


def test_a_run_that_is_written_is_refused_until_its_process_ends(world: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(world.scenes, run, train__stop_at=2)
    other = holding(run)
    stored = (run / "config.yaml").read_bytes()
    for again in (
        lambda: resume(run),
        lambda: resume(run, take_over=True),
        lambda: train(world.scenes, run, overwrite=True),
    ):
        with pytest.raises(UsageError, match=f"is written by process {other.pid} on ") as refused:
            again()
        assert (refused.value.option, refused.value.code) == ("--run", "exists")
    assert (run / "config.yaml").read_bytes() == stored  # --overwrite cleared nothing
    other.kill()  # without a chance to give it up
    other.wait()
    resume(run)
    assert (run / LOCK).read_bytes() == b""


def test_a_forked_child_does_not_hold_it(tmp_path: Path) -> None:
    """A forked data worker that outlives the run keeps no lock."""
    held = RunLock(tmp_path)
    child = os.fork()
    if child == 0:
        import signal

        signal.pause()
    try:
        held.release()
        again = RunLock(tmp_path)
        assert again.locks and again.holder()["pid"] == os.getpid()
        again.release()
        assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it lives, and held nothing
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def foreign(run: Path, age: float) -> None:
    """As a process on another machine left the file, ``age`` seconds ago."""
    run.mkdir(exist_ok=True)
    (run / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "today"}))
    then = (run / LOCK).stat().st_mtime - age
    os.utime(run / LOCK, (then, then))


def test_another_machine(tmp_path: Path) -> None:
    foreign(tmp_path, 5)
    with pytest.raises(UsageError, match=r"process 1 on elsewhere, since today; .*--take-over"):
        RunLock(tmp_path)
    RunLock(tmp_path, take_over=True).release()
    foreign(tmp_path, SILENT + 5)
    RunLock(tmp_path).release()
    (tmp_path / LOCK).write_bytes(b"\xff[" + b"[" * 5000)  # nonsense names nobody
    RunLock(tmp_path).release()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno
    import fcntl

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    monkeypatch.setattr(lock, "BEAT", 0.01)
    first = RunLock(tmp_path)
    assert "has no locks" in capsys.readouterr().err
    with pytest.raises(UsageError, match=f"process {os.getpid()} on "):
        RunLock(tmp_path)
    first.release()
    gone = {"host": lock.socket.gethostname(), "pid": 2**22 + 5, "started": "today"}
    (tmp_path / LOCK).write_text(json.dumps(gone))
    RunLock(tmp_path).release()


def test_ranks_end_with_a_killed_launcher(world: Any, tmp_path: Path) -> None:
    """They save, say how to go on, and give the run up; a second start is refused until then."""
    need_ranks(2)
    run, said = tmp_path / "run", tmp_path / "said.txt"
    words = options(world.scenes, run, train__steps=5000, eval__captions=0)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "aimv2", "--"]
    with said.open("w") as file:
        launcher = subprocess.Popen([*start, *words], stderr=file, stdout=file)
    try:
        wait_for(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size > 0)
        with pytest.raises(UsageError, match="is written by process"):
            RunLock(run)
    finally:
        launcher.kill()
        launcher.wait()
    wait_for(lambda: (run / LOCK).read_bytes() == b"")
    assert "stopping after this step, and saving" in said.read_text()
    (_, folder), *_ = step_folders(run)
    assert faults(folder) == []


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Until it holds; a machine under load may take long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)
