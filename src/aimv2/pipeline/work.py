"""Running a chain: each stage a process of its own, so that memory is freed and its command can be typed by hand."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from aimv2.errors import LOST, UsageError, nearest
from aimv2.io import parse_json, say, write_aside
from aimv2.pipeline import report
from aimv2.pipeline.read import Chain, Job, read_chain
from aimv2.pipeline.state import (
    DONE,
    RECORD,
    STALE,
    TO_DO,
    Status,
    look,
    make_record,
    output_hash,
    outside,
    started_file,
)
from aimv2.train.interrupt import Interrupted

# commands that resume in a folder where they were interrupted; others start again in an empty one
GO_ON = ("pretrain", "data_import", "data_teach", "embed", "probe", "knn", "linear", "fewshot")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def run_chain(
    path: str, out: str | None, data: str | None, only: str | None, redo: bool, status: bool
) -> dict[str, Any]:
    """See :func:`aimv2.api.run`."""
    if redo and status:
        raise UsageError("--status runs nothing and --redo runs stages again; give one of them", code="conflict")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("run: a chain is one process; start it without torchrun", code="unsupported")
    chain = read_chain(path, out, data)
    jobs = chosen(chain, only)
    names = {job.name for job in jobs}
    outside.cache_clear()
    found = look(chain, chain.jobs)  # mistakes come before anything is written
    if status:
        return report.make_report(chain, [one for one in found if one.job.name in names])
    again = " ".join(["aimv2 run", *(shlex.quote(word) for word in _words(path, out, data, only))])
    with locked(chain.out) as lock:
        stale = [one for one in look(chain, chain.jobs) if one.state == STALE and one.job.name in names]
        if stale and not redo:
            first = stale[0]
            raise UsageError(
                f"stage '{first.job.name}' is stale: {first.why}; --redo clears it"
                f"{' and what follows' if len(stale) > 1 else ''} and runs it again: "
                f"{', '.join(one.job.name for one in stale)}"
            )
        for one in stale:
            clear(one.job)
        worker = Worker(lock, again)
        try:
            with worker.listening():
                run_jobs(chain, jobs, worker)
        finally:
            made = report.make_report(chain, look(chain, chain.jobs))
            report.write(made, chain.out)
    return made


def _words(path: str, out: str | None, data: str | None, only: str | None) -> Iterator[str]:
    yield path
    for option, value in (("--out", out), ("--data", data), ("--only", only)):
        if value is not None:
            yield from (option, value)


def chosen(chain: Chain, only: str | None) -> list[Job]:
    """The jobs of the named stages and of what they need, in order; all without names."""
    if only is None:
        return chain.jobs
    by_name = {job.name: job for job in chain.jobs}
    wanted = set[str]()
    for word in (part.strip() for part in only.split(",")):
        named = [job.name for job in chain.jobs if word in (job.name, job.stage.name)]
        if not named:
            known = dict.fromkeys([job.stage.name for job in chain.jobs])
            raise UsageError(
                f"--only {word}: no such stage{nearest(word, known)} (there: {', '.join(known)})", code="not-found"
            )
        wanted |= set(named)
    for job in reversed(chain.jobs):
        if job.name in wanted:
            wanted |= set(job.needs.values())
    return [by_name[name] for name in by_name if name in wanted]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """The chain's folder, made, for this process only; a stage that outlives its chain keeps the lock."""
    import fcntl

    try:
        (out / ".started").mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UsageError(f"--out {out} can't be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UsageError(
            f"--out {out}: another `aimv2 run` is at work there; wait for it, or stop it", code="exists"
        ) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def clear(job: Job) -> None:
    """Empties the folder of a stage that a chain wrote."""
    assert (job.folder / RECORD).is_file() or started_file(job).is_file(), job.folder
    # the note that the folder is the chain's goes last: stopped in between, it is cleared the next time
    if (job.folder / RECORD).is_file():
        os.replace(job.folder / RECORD, started_file(job))
    empty(job.folder)
    started_file(job).unlink()


def empty(folder: Path) -> None:
    """Removes what lies in a folder; the folder itself may be a link to another disk."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def run_jobs(chain: Chain, jobs: list[Job], worker: Worker) -> None:
    """What is not done yet, in order.

    Raises:
        UsageError: a stage failed.
        Interrupted: a signal came.
    """
    ran = 0
    for number, job in enumerate(jobs, 1):
        worker.leave_if_asked()
        one = look(chain, jobs[:number])[-1]
        if one.state == DONE:
            continue
        if one.state == STALE:  # what came before gave another result than the time before
            raise UsageError(f"stage '{job.name}' is stale: {one.why}; --redo clears it and runs it again")
        ran += 1
        how = "starts" if one.state == TO_DO else "goes on"
        say(f"stage {number} of {len(jobs)}, {job.name} ({job.stage.verb}): {how}")
        seconds = run_job(job, one, worker)
        say(f"stage {number} of {len(jobs)}, {job.name}: done, {seconds:.0f} s")
    if not ran:
        say("all stages are done")


def run_job(job: Job, status: Status, worker: Worker) -> float:
    """One stage, from its start or from where it was stopped; returns its seconds, over all starts."""
    record = make_record(job, status.inputs)
    before = status.record.get("seconds", 0.0)
    words = job.command
    if started_file(job).is_file() and (status.state == TO_DO or job.stage.verb not in GO_ON):
        empty(job.folder)
    if job.stage.verb == "pretrain" and (job.folder / "config.yaml").is_file():
        words = ["pretrain", f"--run={job.folder}", "--resume"]
    note(job, {**record, "seconds": before})
    began = time.perf_counter()
    try:
        record["result"] = worker.run(job, words)
    except (UsageError, Interrupted) as error:
        seconds = before + time.perf_counter() - began
        note(job, {**record, "seconds": seconds, "failed": isinstance(error, UsageError)})
        raise
    record["seconds"] = before + time.perf_counter() - began
    record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record["output"] = output_hash(job, record)
    job.folder.mkdir(parents=True, exist_ok=True)
    write_aside(job.folder / RECORD, json.dumps(record, indent=1, default=str) + "\n")
    started_file(job).unlink()
    return record["seconds"]


def note(job: Job, record: dict[str, Any]) -> None:
    """Writes what an unfinished stage began with."""
    write_aside(started_file(job), json.dumps(record, default=str))


class Worker:
    """Starts the process of a stage and hands signals on to it.

    Attributes:
        code: exit code that a signal asks for, 0 before one came.
    """

    def __init__(self, lock: int, again: str) -> None:
        self.lock, self.again, self.code = lock, again, 0
        self.child: subprocess.Popen[str] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are passed on to the stage, which saves; a terminal's Ctrl-C reaches it through us only."""
        before = {number: signal.signal(number, self._note) for number in CODES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.code = self.code or CODES[signal.Signals(number)]
        if self.child is not None:
            self._hand_on()

    def _hand_on(self) -> None:
        assert self.child is not None
        self.child.send_signal(signal.SIGINT if self.code == 130 else signal.SIGTERM)

    def leave_if_asked(self, during: str = "") -> None:
        """Raises Interrupted where a signal came."""
        if self.code:
            where = f"in stage '{during}'" if during else "between stages"
            raise Interrupted(f"stopped {where}; go on with: {self.again}", self.code)

    def run(self, job: Job, words: list[str]) -> dict[str, Any]:
        """The stage's JSON result; what it says on standard error is shown with its name in front.

        Raises:
            UsageError: it failed.
            Interrupted: it was stopped.
        """
        command = [sys.executable, "-P", "-m", "aimv2", *words, "--json"]
        self.child = child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True, pass_fds=(self.lock,),
        )  # fmt: skip
        if self.code:
            self._hand_on()
        relay = StderrRelay(child, job.name)
        try:
            assert child.stdout is not None
            printed = child.stdout.read()
            code = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
            relay.join()
            self.child = None
        if code:
            self.leave_if_asked(job.name)
            last = relay.last.removeprefix("error: ")
            failed = UsageError(
                f"stage '{job.name}' failed ({shlex.join(['aimv2', *words])}): {last or f'exit code {code}'}"
            )
            failed.exit_code = LOST if code == LOST else 2
            raise failed
        try:
            return parse_json(printed)
        except ValueError:
            raise UsageError(f"stage '{job.name}' gave no result: {printed[:200]!r}") from None


class StderrRelay(threading.Thread):
    """Shows what a process says on standard error as it says it; its error line is kept for the end.

    Attributes:
        last: its last line.
    """

    def __init__(self, child: subprocess.Popen[str], name: str) -> None:
        super().__init__(daemon=True)
        assert child.stderr is not None
        self.stream, self.label, self.last = child.stderr, name, ""
        self.start()

    def run(self) -> None:
        for line in self.stream:
            line = line.rstrip()
            self.last = line or self.last
            if line and not line.startswith("error: "):
                say(f"{self.label} | {line}")
