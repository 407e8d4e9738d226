"""Uploaded pictures are decoded in processes of their own, within limits of time and memory: a bomb costs itself and the page nothing.

``python -m aimv2.explorer.decoder`` is such a process: pictures on standard input, pixels on standard output, each part with its length.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple

from PIL import Image

from aimv2.explorer.album import RequestError, decode_upload, small_png

WORKERS = 2
WAITING = 16  # uploads at a time; further ones are refused
SECONDS = 5  # of processor time for a picture
WALL = 60.0  # seconds for a picture, however busy the machine is
MEMORY = 2_000_000_000  # bytes of a process
LENGTH = struct.Struct("<Q")
SLOW = f"This image takes more than {SECONDS} seconds or {MEMORY / 1e9:.0f} GB to decode."
LIMITS = (-9, -24)  # SIGKILL of the system, SIGXCPU
UNSTARTED = "The process that decodes images can't be started"
CRASHED = "The process that decodes images ended on this one"
BUSY = "Other images are being decoded; try again in a few seconds."


def ending(code: int) -> str:
    """How a process ended."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


class Decoded(NamedTuple):
    """An upright RGB image and a small PNG of it."""

    image: Image.Image
    thumbnail: bytes


class DecoderProcess:
    """One process, started for its first picture, and again after one that went beyond the limits."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def decode(self, content: bytes) -> Decoded:
        """
        Raises:
            RequestError: no picture, or one beyond the limits.
        """
        process = self.process
        if process is None or process.poll() is not None:
            process = self.start()
        to, back = process.stdin, process.stdout
        assert to is not None
        assert back is not None
        late = threading.Timer(WALL, process.kill)
        late.start()
        try:
            write_part(to, content)
            about = json.loads(read_part(back))
            parts = [] if "error" in about else [read_part(back), read_part(back)]
        except (OSError, EOFError):  # it was ended, by a limit or by its own fault
            if (code := self.close(1)) in LIMITS or late.finished.is_set():
                raise RequestError(413, SLOW) from None
            raise RequestError(422, f"{CRASHED} ({ending(code)}).") from None
        finally:
            late.cancel()
        if "error" in about:
            raise RequestError(about["status"], about["error"])
        return Decoded(Image.frombytes("RGB", tuple(about["size"]), parts[0]), parts[1])

    def start(self) -> subprocess.Popen[bytes]:
        """
        Raises:
            RequestError: no process can be started, or it ends at once.
        """
        words = [sys.executable, "-P", "-m", "aimv2.explorer.decoder", str(SECONDS), str(MEMORY)]
        few = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # threads of numpy would take room of MEMORY on many cores
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.close()
        try:
            process = self.process = subprocess.Popen(words, **pipes, start_new_session=True, env=few)
        except OSError as error:
            raise RequestError(503, f"{UNSTARTED} ({error.strerror or error}).") from None
        assert process.stdout is not None
        late = threading.Timer(WALL, process.kill)
        late.start()
        try:
            read_part(process.stdout)
        except (OSError, EOFError):
            raise RequestError(503, f"{UNSTARTED} ({ending(self.close(1))}; see the terminal).") from None
        finally:
            late.cancel()
        return process

    def close(self, wait: float = 0) -> int:
        """End the process, in ``wait`` seconds if it does not by itself; its exit code, negative after a signal."""
        if self.process is None:
            return 0
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(wait)
        self.process.kill()
        self.process.communicate()
        code, self.process = self.process.returncode, None
        return code


class Decoders:
    """A few workers, and a limit on those that wait for one."""

    def __init__(self) -> None:
        self.idle = queue.SimpleQueue[DecoderProcess]()
        self.workers = [DecoderProcess() for _ in range(WORKERS)]
        self.waiting = 0  # changed only in the server's event loop
        for worker in self.workers:
            self.idle.put(worker)

    @contextmanager
    def place(self) -> Any:
        """A place in the queue.

        Raises:
            RequestError: there is none.
        """
        if self.waiting >= WAITING:
            raise RequestError(503, BUSY)
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def decode(self, content: bytes) -> Decoded:
        """As :meth:`DecoderProcess.decode`, by the next worker that is idle."""
        worker = self.idle.get()
        try:
            return worker.decode(content)
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.close()


def write_part(to: IO[bytes], content: bytes) -> None:
    """A part after its length."""
    to.write(LENGTH.pack(len(content)))
    to.write(content)
    to.flush()


def read_part(source: IO[bytes]) -> bytes:
    """
    Raises:
        EOFError: the other side has ended.
    """
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size or len(content := source.read(size := LENGTH.unpack(head)[0])) < size:
        raise EOFError
    return content


def limit(seconds: int, memory: int | None = None) -> None:
    """Limits processor time from here on, and the memory of the process, as far as the system lets it."""
    try:
        import resource
    except ImportError:  # Windows; the limit of wall time holds there
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    with suppress(ValueError, OSError):  # it has lower ones
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))
    if memory is not None:
        with suppress(ValueError, OSError):  # macOS refuses limits below what a process has mapped
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def serve(seconds: int, memory: int) -> None:
    """Decode what comes on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit(seconds, memory)
    write_part(sys.stdout.buffer, b"ready")
    while True:
        try:
            content = read_part(sys.stdin.buffer)
        except EOFError:
            return
        limit(seconds)
        try:
            image = decode_upload(content)
            parts = [image.tobytes(), small_png(image)]
            about: dict[str, Any] = {"size": image.size}
        except RequestError as error:
            parts, about = [], {"status": error.status, "error": str(error)}
        except MemoryError:
            parts, about = [], {"status": 413, "error": SLOW}
        for part in (json.dumps(about).encode(), *parts):
            write_part(sys.stdout.buffer, part)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
