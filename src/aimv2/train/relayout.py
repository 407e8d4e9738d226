"""A run that goes on over other ranks and data workers than it had, in the same number of parts.

Each part, one data worker or a rank without any, reads its own slice of the data, and a step takes as much from each. So the same
product of ranks and workers gives the same global batches, whoever holds which part; the parts are numbered rank by rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from aimv2.config.schema import Config
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.train.checkpoint import RANK, read_about
from aimv2.train.log import say


def take_layout(config: Config, given: bool, folder: Path, world: World) -> None:
    """Sets ``data.workers`` so that the ranks of this start hold the parts of a checkpoint; a line says where they are others.

    Args:
        config: of the resumed run, changed in place.
        given: whether the user gives ``data.workers``, which then stays.
        folder: of the checkpoint.
        world: the ranks of this start.

    Raises:
        UsageError: no number of workers gives as many parts.
    """
    ranks, workers = read_about(folder)["layout"]
    if config.data.features is not None:
        return  # cached features are drawn by number, whatever the ranks
    parts = ranks * max(workers, 1)
    if not given:
        config.data.workers = parts // world.size if workers else 0
    got = config.data.workers
    if world.size * max(got, 1) != parts or (got == 0) != (workers == 0):
        now = f"{world.size} ranks x {got} (data.workers)" if given else f"{world.size} ranks"
        raise UsageError(
            f"--resume: the run used {ranks} ranks x {workers} data workers, got {now}; its position in the data goes on over as many "
            f"parts: {layouts(parts, workers)}{'; leave data.workers out, and it follows' if given else ''}",
            code="mismatch",
        )
    if [ranks, workers] != [world.size, got]:
        say(f"{world.size} ranks x {got} data workers instead of {ranks} x {workers}: the same batches")


def layouts(parts: int, workers: int) -> str:
    """The layouts of as many parts, in words."""
    if workers == 0:
        return f"{parts} ranks x 0"
    return ", ".join(f"{ranks} x {parts // ranks}" for ranks in range(1, parts + 1) if parts % ranks == 0)


def own_state(folder: Path, world: World, workers: int) -> Any:
    """This rank's private state, put together from those of the ranks that wrote a checkpoint.

    Args:
        folder: of the checkpoint.
        world: the ranks of this start.
        workers: data workers of a rank of this start.

    Raises:
        ValueError, OSError: files that can't be read, or hold something else.
    """
    from aimv2.train.plain_state import read_state

    ranks, before = read_about(folder)["layout"]
    own = folder / "state" / RANK.format(world.rank)
    if [ranks, before] == [world.size, workers]:
        return read_state(own)
    states = [read_state(own.with_name(RANK.format(rank))) for rank in range(ranks)]
    mine = states[min(world.rank, ranks - 1)]  # its generator draws nothing that a loss depends on
    if isinstance(mine["data"], dict):  # cached features: one position for all ranks
        return mine
    every = [part for state in states for part in state["data"].worker_states]
    if any(state["data"].next_worker_id for state in states) or len(every) != world.size * max(workers, 1):
        raise ValueError(f"the data positions of {ranks} x {before} are none of {world.size} x {workers}")
    size = max(workers, 1)
    taken = every[world.rank * size : (world.rank + 1) * size]
    return {**mine, "data": replace(mine["data"], worker_states=taken)}
