"""What a machine must have before a run starts: shared memory, open files, room on the disk, a clock that goes forwards."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from aimv2.config.schema import Config
from aimv2.errors import UsageError
from aimv2.interop.model_folder import checkpoints
from aimv2.io import say
from aimv2.train.loop import Trainer
from aimv2.train.outlook import checkpoint_bytes, existing_folder
from aimv2.train.together import on_first

SHARED = Path("/dev/shm")
AHEAD, HELD = 2, 1  # batches that a worker prepares, and that a step holds
FILES = 256, 64  # open files of a rank, and for each of its data workers
TOKEN = 8  # bytes


def check_machine(trainer: Trainer) -> None:
    """Says what is short on this machine, from rank 0; collective.

    Raises:
        UsageError: on all ranks, where the run can't get far.
    """
    config = trainer.config
    files = open_files(config.data.workers)  # of every rank

    def look() -> None:
        side = trainer.view.image_size or getattr(getattr(trainer.stream, "make", None), "square", 0)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.world.size))
        for line in (
            *shared_memory(config, side, trainer.world.size, here),
            *files,
            *disk(trainer.run, checkpoint_bytes(config, trainer.model)),
            *clock(trainer.run),
        ):
            say(line)

    on_first(trainer.world, look, trainer.run)


def shared_memory(config: Config, side: int, ranks: int, here: int) -> Iterator[str]:
    """A line where data workers may run out of it, with images of ``side`` pixels; ``here``: ranks on this machine."""
    data, train = config.data, config.train
    if not data.workers or not side or not SHARED.is_dir():
        return
    what, number, size = "train.batch_size", train.batch_size, 3 * side * side + TOKEN * data.max_tokens
    if train.patch_budget is not None:
        what, number, size = "train.patch_budget", train.patch_budget, 3 * 32 * 32  # of patches, none larger
    one, free = number * size * here / ranks / 1e9, shutil.disk_usage(SHARED).free / 1e9
    if free > 1.1 * (AHEAD + HELD) * one:
        return
    text = (
        f"{what} {number:,}: data workers pass batches through {SHARED}, about {(AHEAD + HELD) * one:,.2f} GB at a time, and "
        f"{free:,.2f} GB are free there; lower {what}, set data.workers 0, or give the container more (docker run with shm-size)"
    )
    if free < AHEAD * one:
        raise UsageError(text, option=what, code="limit")
    yield text


def open_files(workers: int) -> list[str]:
    """Raises this process's own limit to what is allowed; a line where that is still low."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return []

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need, none = FILES[0] + FILES[1] * workers, resource.RLIM_INFINITY
    if soft == none or soft >= need:
        return []
    most = need if hard == none else min(need, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (ValueError, OSError):  # macOS allows less than it says
        most = soft
    if most >= need:
        return []
    return [
        f"data.workers {workers}: a rank needs about {need:,} open files and may have {most:,}; lower data.workers, or raise the limit "
        "(ulimit -n)"
    ]


def disk(run: Path, one: float) -> Iterator[str]:
    """A line where two checkpoints of ``one`` byte count do not fit: a save needs the one before until it is whole."""
    there = existing_folder(run)
    free = shutil.disk_usage(there).free
    need = one if checkpoints(run) else 2 * one
    if free >= need:
        return
    text = (
        f"--run {run}: a checkpoint takes about {one / 1e9:,.2f} GB and two must fit, {free / 1e9:,.2f} GB are free on that disk; make "
        "room, or choose another disk"
    )
    if free < 0.9 * one:
        raise UsageError(text, option="--run", code="limit")
    yield text


def clock(run: Path) -> Iterator[str]:
    """A line where this machine's clock is before the time of the last checkpoint."""
    found = checkpoints(run)
    late = found[-1][1].stat().st_mtime - time.time() if found else 0.0
    if late > 60:
        yield f"this machine's clock is {late / 3600:,.1f} h before the time of the last checkpoint: times in logs go backwards; set it"
