"""Data workers: what they do as they start, and a watchdog that notices within seconds when one of them ends or hangs.

The process that trains takes batches in a thread of its own, so that it can look after the workers, and take Ctrl-C, whatever that thread
waits for: a batch, the rest of a message of a killed worker, the descriptor of a stopped one.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import multiprocessing.queues
import os
import queue
import shutil
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint

from aimv2.data.stream.tar_reader import read_by_our_rules
from aimv2.errors import WorkerLost

TIMEOUT = 300.0  # seconds without progress, where no option says it
POLL = 0.5  # seconds between two looks at the workers
SLOT = 512  # bytes a worker has for the name of what it reads
HEAD = struct.Struct("<QH")  # how many notes it has made, bytes of the last
NO_ROOM = 97  # exit code of a worker that can't hand on a batch: no shared memory
NO_FILES = 98  # or no more open files
LEFT = (EOFError, ConnectionError)  # in a thread that hands on files, where the process that trains is gone
FEWER = "lower data.workers or train.batch_size"
LESS = "lower train.batch_size, set data.workers 0, or give the container more (docker run with shm-size)"
SHARED = Path("/dev/shm")


# ---- in a worker ----


class ReadNotes:
    """Memory that workers and the process that trains have in common: what each worker reads.

    A worker notes a sample's name as it begins with it, and nothing as it is done.
    """

    def __init__(self, workers: int) -> None:
        self.memory, self.own, self.count = mmap.mmap(-1, max(workers, 1) * SLOT), -1, 0

    def write(self, name: str) -> None:
        """Notes what this worker reads; "" between two samples."""
        if self.own >= 0:
            text = name.encode(errors="replace")[: SLOT - HEAD.size]
            self.count, at = self.count + 1, self.own * SLOT
            self.memory[at + HEAD.size : at + HEAD.size + len(text)] = text
            HEAD.pack_into(self.memory, at, self.count, len(text))

    def read(self, worker: int) -> tuple[int, str]:
        """How many notes a worker has made, and its last one."""
        count, length = HEAD.unpack_from(self.memory, worker * SLOT)
        start = worker * SLOT + HEAD.size
        return count, self.memory[start : start + length].decode(errors="replace")


def start_worker(init: Callable[[int], None] | None, notes: ReadNotes, number: int) -> None:
    """Ignore signals in a worker: Ctrl-C reaches it too, but it must live until the position is saved.

    It ends where a batch can't be handed on.
    """
    for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(caught, signal.SIG_IGN)
    notes.own = number
    read_by_our_rules()  # a worker that is spawned has not inherited it
    setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", staticmethod(_cannot_hand_on))  # noqa: B010
    show = sys.excepthook
    sys.excepthook = lambda *error: None if issubclass(error[0], LEFT) else show(*error)
    if init is not None:
        init(number)


def _cannot_hand_on(error: Exception, batch: Any) -> None:
    """The queue would drop the batch, and the process that trains wait for it for ever."""
    os._exit(NO_FILES if "Too many open files" in str(error) else NO_ROOM)


# ---- in the process that trains ----


def _no_start(error: OSError) -> str:
    """Why workers can't start: their locks lie in shared memory, their pipes are open files."""
    if error.errno == errno.ENOSPC:
        return f"have no room in {SHARED} to start ({room()}): {LESS}"
    if error.errno == errno.EMFILE:
        return f"can't start, too many open files: {FEWER}, or raise the limit (ulimit -n)"
    return f"can't start ({error.strerror or error}): lower data.workers, or set it to 0"


class Watched:
    """Batches of a loader with worker processes.

    Attributes:
        hurry: whether to wait no longer than for the next look, as after Ctrl-C.
        failed: what became of a worker, once that is known.
    """

    def __init__(self, loader: Any, workers: int, timeout: float = TIMEOUT) -> None:
        """``loader``: torch's, whose workers are not started yet; ``timeout``: seconds without progress; 0: no end."""
        self.loader, self.workers, self.timeout = loader, workers, timeout
        self.notes = ReadNotes(workers)
        loader.worker_init_fn = partial(start_worker, loader.worker_init_fn, self.notes)
        self.iterator: Iterator[Any] | None = None
        self.hurry: Callable[[], bool] = lambda: False
        self.failed: WorkerLost | None = None
        self.busy = False
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.calls, self.results = queue.SimpleQueue[Callable[[], Any] | None](), queue.SimpleQueue[tuple[Any, Any]]()
        threading.Thread(target=self._take, name="batches", daemon=True).start()

    def _take(self) -> None:
        """Calls what it is given, in its thread."""
        if self.device is not None:  # the current device is one of the thread; batches are pinned for it
            torch.cuda.set_device(self.device)
        while (call := self.calls.get()) is not None:
            try:
                self.results.put((call(), None))
            except BaseException as error:
                self.results.put((None, error))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next batch.

        Raises:
            WorkerLost: a worker ended or hangs.
        """
        return self.call(self._next)

    def _next(self) -> Any:
        try:
            if self.iterator is None:
                self.iterator = iter(self.loader)
            batch = next(self.iterator)
        except OSError as error:
            if self.processes():
                raise
            for frame, _ in traceback.walk_tb(error.__traceback__):
                if isinstance(
                    own := frame.f_locals.get("self"), torch.utils.data.dataloader._MultiProcessingDataLoaderIter
                ):
                    own._shutdown = True
                    for process in own.__dict__.get("_workers", ()):  # they ignore the signal that Python sends at exit
                        process.kill()
            # what torch made of its iterator so far lacks this, and its end would print a traceback
            setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_shutdown", True)  # noqa: B010
            self.failed = WorkerLost(f"data workers {_no_start(error)}")
            raise self.failed from None
        inner = self.inner()
        if getattr(inner, "_worker_pids_set", False):  # torch's SIGCHLD handler would raise amid a step
            torch.utils.data._utils.signal_handling._remove_worker_pids(id(inner))
            inner._worker_pids_set = False
        return batch

    def inner(self) -> Any:
        """Torch's iterator, which has the processes."""
        kept = getattr(self.loader, "_iterator", None)
        return self.iterator if kept is None else kept

    def processes(self) -> Sequence[Any]:
        return getattr(self.inner(), "_workers", ())

    def call(self, function: Callable[[], Any]) -> Any:
        """What a function that needs the workers returns.

        Raises:
            WorkerLost: a worker ended or hangs.
        """
        if self.failed is not None:
            raise self.failed
        self.busy = True
        self.calls.put(function)
        try:
            value, error = self.wait()
        except RuntimeError:  # of torch's SIGCHLD handler, which knows of the workers until their first batch is there
            self.look(wait=True)
            raise
        self.busy = False
        if error is not None:
            if not isinstance(error, StopIteration):
                self.look(wait=isinstance(error, OSError | EOFError | RuntimeError))
            raise error
        return value

    def wait(self) -> tuple[Any, Any]:
        """What the thread answers, and its error.

        Raises:
            WorkerLost: a worker ended or hangs.
        """
        waited, before = 0.0, self.progress()
        while True:
            try:
                return self.results.get(timeout=POLL)
            except queue.Empty:
                pass
            self.look()
            last, before = before, self.progress()
            waited = waited + POLL if before == last else 0.0  # looks, no clock: a suspended job has not waited
            if self.hurry() or 0 < self.timeout <= waited:
                self.failed = self.hangs(waited)
                raise self.failed

    def lost(self) -> WorkerLost | None:
        """What became of a worker that has ended, looked at in passing."""
        with contextlib.suppress(WorkerLost):
            self.look()
        return self.failed

    def look(self, wait: bool = False) -> None:
        """Raises WorkerLost where a worker has ended; ``wait``: one may be about to."""
        for process in self.processes():
            if wait:
                process.join(POLL / max(self.workers, 1))
            if not process.is_alive():
                self.failed = self.ended(process)
                raise self.failed

    def progress(self) -> list[int]:
        """Notes of the worker whose turn it is, or of all."""
        numbers = range(self.workers) if (turn := self.turn()) is None else [turn]
        return [self.notes.read(number)[0] for number in numbers]

    def turn(self) -> int | None:
        """The worker that gives the next batch, where that is known."""
        inner = self.inner()
        info = getattr(inner, "_task_info", {}).get(getattr(inner, "_rcvd_idx", None))
        return info[0] if info else None

    def name(self, number: int) -> str:
        processes = self.processes()
        pid = f" (process {processes[number].pid})" if number < len(processes) else ""
        return f"data worker {number + 1} of {self.workers}{pid}"

    def ended(self, process: Any) -> WorkerLost:
        """The line about a worker that has ended."""
        number, code = self.processes().index(process), process.exitcode
        reads = self.notes.read(number)[1]
        where = f" at {reads}" if reads else ""
        if code in (-signal.SIGBUS, NO_ROOM):
            why = f"has no room in {SHARED} for a batch ({room()}): {LESS}"
        elif code == NO_FILES:
            why = f"can't open more files: {FEWER}, or raise the limit (ulimit -n)"
        elif code == -signal.SIGKILL:
            why = f"was killed (SIGKILL){where}, as systems do where memory runs out: {FEWER}, or give the job more memory"
        elif code is not None and code < 0:
            why = f"crashed ({signal.Signals(-code).name}){where}: leave that sample out where it crashes again"
        else:
            why = f"ended with code {code}{where}: data.workers 0 reads in the training process and shows why"
        return WorkerLost(f"{self.name(number)} {why}")

    def hangs(self, waited: float) -> WorkerLost:
        """The line about a worker that gives nothing."""
        turn = self.turn()
        busy = [number for number in range(self.workers) if self.notes.read(number)[1]]
        number = turn if turn is not None else next(iter(busy), 0)
        reads = self.notes.read(number)[1]
        limit = f"data.timeout ({self.timeout:g} s; 0 waits for ever)"
        return WorkerLost(
            f"{self.name(number)} hangs: nothing for {waited:.0f} s {'at ' + reads if reads else 'between two samples'}"
            f"{state_of(self.processes(), number)}; look at that file and its disk, or raise {limit}"
        )

    def close(self) -> None:
        """Ends the workers (they ignore the signal that Python sends at exit)."""
        inner = self.inner()
        end = getattr(inner, "_shutdown_workers", None)
        lost = self.busy or self.failed is not None
        if lost:  # a worker that hangs ends by nothing else
            for process in self.processes():
                process.kill()
        self.calls.put(None)
        if end is not None:
            closing = threading.Thread(target=end, name="workers end", daemon=True)
            closing.start()
            closing.join(10 if lost else None)
        self.iterator = None


def state_of(processes: Sequence[Any], number: int) -> str:
    """Where a process is stopped or waits for a disk, in brackets (Linux); else ""."""
    try:
        state = Path(f"/proc/{processes[number].pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return {"T": " (it is stopped)", "D": " (it waits for a disk or a network file system)"}.get(state, "")


def room() -> str:
    """Free and total shared memory."""
    try:
        usage = shutil.disk_usage(SHARED)
    except OSError:
        return "it is not there"
    return f"{usage.free / 1e6:,.0f} of {usage.total / 1e6:,.0f} MB free"


def position(watched: Watched, loader: Any, known: Any, taken: tuple[list[int], int] | None) -> Any:
    """The data position after the batches taken so far, from the workers; without them, one that reads again from the last known.

    Args:
        watched: the workers.
        loader: energon's.
        known: the last position that the workers gave, or that was restored.
        taken: of the last complete step: samples of each worker, and whose turn is next.
    """
    try:
        return watched.call(loader.save_state_rank)
    except WorkerLost:
        if taken is None:
            return known
    counters, turn = taken
    before = (
        known.worker_states if known is not None else [SavableDatasetCheckpoint(state=None, offset=0)] * len(counters)
    )
    states = []
    for own, last in zip(before, counters):
        first = 0 if own.state is None else own.state.sample_index
        states.append(SavableDatasetCheckpoint(state=own.state, offset=max(own.offset, last + 1 - first)))
    return SavableDataLoaderState(worker_states=states, next_worker_id=turn, micro_batch_size=loader._get_batch_size())
