"""Paths that take turns, each in a process of its own: seconds and peak memory that may be compared on a shared machine."""

from __future__ import annotations

import multiprocessing as mp
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Path = Callable[..., tuple[Callable[[Any], Any], list[Any]]]  # arguments -> (what to run, its inputs in turn)


def serve(path: Path, arguments: tuple[Any, ...], pipe: Connection) -> None:
    """A process: warms up on every input, then does the asked number of runs each time it is asked."""
    try:
        run, inputs = path(*arguments)
        for one in inputs:
            run(one)
        wait_for_device()
    except Exception as error:  # a path that this machine lacks says why
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
        return
    pipe.send(None)
    at = 0
    while (count := pipe.recv()) is not None:
        begin = time.perf_counter()
        for _ in range(count):
            run(inputs[at % len(inputs)])
            at += 1
        wait_for_device()
        pipe.send(time.perf_counter() - begin)
    pipe.send(peak_memory())


def wait_for_device() -> None:
    """Until a GPU that this process uses has done what it was given."""
    if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory() -> float:
    """1e9 bytes: most memory of the GPU where this process used one, else most resident memory (getrusage would count its
    parent's from before)."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def in_turns(
    paths: dict[str, tuple[Path, tuple[Any, ...]]], rounds: int, runs: int
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """Runs every path in turn, round after round.

    Args:
        paths: by name: a function of this module's users, and its arguments.
        rounds: turns of each.
        runs: in a turn.

    Returns:
        by name: seconds a run, round by round; peak memory in 1e9 bytes; why a path could not run.
    """
    context = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    workers, missing = [], {}
    for name, (path, arguments) in paths.items():
        near, far = context.Pipe()
        worker = context.Process(target=serve, args=(path, arguments, far), daemon=True)
        worker.start()
        why = near.recv()  # warm before the next one starts
        if why is None:
            pipes[name] = near
            workers.append(worker)
        else:
            missing[name] = why
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(runs)
            seconds[name].append(pipe.recv() / runs)
    memory = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        memory[name] = pipe.recv()
    for worker in workers:
        worker.join()
    return seconds, memory, missing
