"""Whether a loader starves the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from aimv2.io import say

if TYPE_CHECKING:
    from aimv2.train.loop import Trainer

STARVED = {True: 0.3, False: 0.5}  # parts of the time that are worth a line: with data workers, and without
STARTING = 20  # steps, while buffers of the loader fill


def data_wait(trainer: Trainer, fraction: float) -> float:
    """The largest fraction of the time that a rank spent waiting for data; a line, once, where it is large. Collective."""
    world = trainer.world
    every = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    every[world.rank] = fraction
    worst, rank = world.sum(every).max(0)
    log = trainer.log
    starved = worst > STARVED[trainer.config.data.workers > 0]
    if log and log.active and starved and not trainer.starved and trainer.step > log.first + STARTING:
        trainer.starved = True
        who = f"rank {int(rank)}" if world.size > 1 else "the step"
        say(
            f"{who} waits for data {100 * float(worst):.0f}% of the time: raise data.workers ({trainer.config.data.workers}), store "
            "smaller images (data import with max-side), or use a faster disk"
        )
    return float(worst)
