"""Cooldowns: any checkpoint of a run becomes a finished model (AIMV2, section 3.1).

The learning rate falls linearly from its value to 1e-6 over 20% of the steps done so far; AdamW state is kept. The
data are the run's, drawn with another seed: in another order, with other crops, captions and prefixes. Weights are those that
the run saved, its moving average where ``train.ema`` is on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aimv2.config.load import parse, read_recipe
from aimv2.config.objective import find_task, foreign_options
from aimv2.config.schema import Config
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.interop.model_folder import STEP, find_model, split_step
from aimv2.train.log import say
from aimv2.train.moments import take_moments
from aimv2.train.prepare import CONFIG
from aimv2.train.schedule import learning_rate

SHARE, END = 0.2, 1e-6  # of the steps done; the last rate
WARMUP = 0.05  # of the cooldown, where AdamW state starts from zero
OWN = (
    "run",
    "init",
    "resume",
    "overwrite",
    "take_over",
    "accept_data",
    "train.stop_at",
    "train.max_hours",
)  # of the run itself, not of what it does


@dataclass(frozen=True)
class Point:
    """A checkpoint of a run: the run's folder, steps done, the checkpoint's folder."""

    run: Path
    step: int
    folder: Path


def point_of(init: str) -> Point | None:
    """The checkpoint of RUN (its newest) or RUN@STEP; None where ``init`` is no run of ours.

    Raises:
        UsageError: a run without that checkpoint.
    """
    if not Path(init).expanduser().is_dir() and split_step(init) is None:
        return None
    folder = find_model(Path(init).expanduser()).parent
    found = STEP.search(folder.name)
    home = folder.parent.parent
    return Point(home, int(found[1]), folder) if found and (home / CONFIG).is_file() else None


def cooldown_of(init: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a cooldown's values come from, and the values: the run's own, but for what makes it a cooldown.

    Args:
        init: RUN or RUN@STEP.
        given: options of the command line, which win.

    Raises:
        UsageError: ``init`` is no run, or one that is no pre-training.
    """
    point = point_of(init)
    if point is None:
        raise UsageError(
            f"optim.schedule=cooldown without --config or data.train continues a run: --init RUN or RUN@STEP expected, "
            f"got {init}"
        )
    stored = {key: value for key, value in read_recipe(point.run / CONFIG).items() if key not in OWN}
    before = parse(stored | {"init": init}, stored=True)
    for option in foreign_options(before):  # earlier versions let them pass
        del stored[f"objective.{option}"]
    name = given.get("objective.name", before.objective.name)
    task = find_task(name)
    if task is None or not task.cools:
        raise UsageError(
            f"init {init}: a cooldown continues pre-training, got objective.name={name}; --config says what else to do"
        )
    rate = learning_rate(point.step, before.train.steps, before.optim)
    if not rate and "optim.lr" not in given:
        raise UsageError(
            f"init {init}: the run's learning rate is 0 at step {point.step}, which leaves nothing to cool down; start from an earlier "
            "checkpoint, or give optim.lr"
        )
    changed = {
        "seed": (before.seed + 1) % 2**32,
        "train.steps": max(1, round(SHARE * point.step)),
        "optim.schedule": "cooldown",
        "optim.lr": rate,
        "optim.min_lr": min(END, rate),
        "optim.warmup": 0,
        "optim.freeze_encoder": 0,
        "optim.fresh_decoder": False,
        "data.tokenizer": "auto",  # the one saved with the weights
    }
    if before.optim.decay == "full":  # proportional to lr / peak, and the peak changes
        changed["optim.weight_decay"] = before.optim.weight_decay * rate / before.optim.lr
    return str(point.run / CONFIG), {**stored, **changed}


def carry_on(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, keep_warmup: bool
) -> None:
    """Loads the AdamW state of the run that a cooldown starts from; without it, adds a warmup.

    Args:
        config: of the cooldown; gets its warm-up. Anything else than a cooldown from a run is left as it is.
        model, optimizer: sharded or not.
        world: the ranks.
        keep_warmup: the user has given optim.warmup.
    """
    point = point_of(config.init) if config.init and config.optim.schedule == "cooldown" else None
    if point is None:
        return
    if config.optim.lora:
        why: str | None = "optim.lora makes new updates"
    elif config.optim.fresh_decoder:
        why = "optim.fresh_decoder makes a new decoder"
    else:
        why = take_moments(point.folder / "state", model, optimizer, world)
    if why is None:
        say(f"the optimizer's moments go on from {point.run} step {point.step}")
        return
    if not keep_warmup and not config.optim.warmup:
        config.optim.warmup = math.ceil(WARMUP * config.train.steps)
    say(f"init {config.init}: the optimizer's moments start anew ({why}); optim.warmup {config.optim.warmup}")
