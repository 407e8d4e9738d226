"""AdamW's moments out of the state folder of another run, without running a pickle.

The folder may be anybody's: see :mod:`aimv2.train.plain_reader`; only tensors are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from aimv2.distributed import World
from aimv2.train.checkpoint import any_failed

PREFIX = "optim.state."


def take_moments(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> str | None:
    """Fills the optimizer with the moments and step counts of a checkpoint; all ranks or none.

    Args:
        folder: ``state`` of a checkpoint.
        model, optimizer: sharded or not, before the first step.
        world: the ranks.

    Returns:
        None, or why it could not be; the optimizer is as new then.
    """
    from aimv2.train.plain_reader import PlainReader

    state = get_optimizer_state_dict(model, optimizer)
    wanted = {"optim": {"state": state["state"]}}
    why = misfit(folder, state["state"])
    if not any_failed(why, world):
        try:
            dcp.load(wanted, storage_reader=PlainReader(folder, PREFIX))
        except (Exception, CheckpointException):  # whatever a file that is none of ours makes of it
            why = "it can't be read"
    if any_failed(why, world):
        optimizer.state.clear()
        return why or "another rank could not read it"
    filled = {"state": wanted["optim"]["state"], "param_groups": state["param_groups"]}
    set_optimizer_state_dict(model, optimizer, filled)
    return None


def misfit(folder: Path, state: Any) -> str | None:
    """Why a state folder can't serve an optimizer's state {parameter: {name: tensor}}; None where it can."""
    from aimv2.train.plain_reader import PlainReader

    if not (folder / ".metadata").is_file():
        return "there is no state folder"
    try:
        known = PlainReader(folder, PREFIX).read_metadata().state_dict_metadata
        sizes = {key: tuple(value.size) for key, value in known.items()}  # type: ignore[union-attr]
    except Exception as error:  # a file that is none of ours may hold anything
        return f"its metadata are not DCP's: {' '.join(str(error).split())[:120]}"
    for parameter, values in state.items():
        for name, value in values.items():
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if sizes.get(f"{PREFIX}{parameter}.{name}") != shape:
                return f"it has no {name} of {parameter} with shape {list(shape)}"
    return None
