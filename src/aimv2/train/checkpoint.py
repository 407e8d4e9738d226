"""Checkpoints: complete, written aside, then renamed.

``checkpoints/step-NNNNNNN/state/`` is what only ``--resume`` reads (sharded weights and optimizer, data position, RNG), ``model/`` what
all else reads (JSON, safetensors), ``files.json`` the list of both with hashes (:mod:`aimv2.train.sealing`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from aimv2.distributed import World
from aimv2.errors import UsageError, first_line
from aimv2.interop.model_folder import checkpoints, read_best
from aimv2.io import parse_json, read_file
from aimv2.train.ema import Ema

ASIDE = ".aside-"
RANK = "rank-{:05d}"


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07d}"


def remove_unfinished(run: Path) -> None:
    """Removes the leftovers of an interrupted save."""
    for folder in (run / "checkpoints").glob(ASIDE + "*"):
        shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    about: dict[str, Any],
    private: Any,
    write_model: Callable[[Path, dict[str, torch.Tensor]], None],
    world: World,
    keep: int,
    ema: Ema | None = None,
) -> Path:
    """Saves everything that resuming needs; called by all ranks.

    Args:
        run: the run folder.
        step: optimizer steps done.
        model, optimizer: sharded or not.
        about: JSON of the trainer, the same on every rank.
        private: state of this rank, of :mod:`aimv2.train.plain_state`'s types (data position, RNG).
        write_model: writes the model folder from full CPU weights; called on rank 0.
        world: the ranks.
        keep: newest checkpoints to keep, 0 for all; the best one stays too.
        ema: average that ``write_model`` gets in the place of the weights.

    Raises:
        UsageError: the disk refused; what was there before is untouched.
    """
    from aimv2.train.plain_state import write_state
    from aimv2.train.sealing import seal, seal_part, written_by

    final = step_folder(run, step)
    aside = final.with_name(ASIDE + final.name)
    # the weights are gathered by all ranks before any of them can fail on its disk
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if ema is not None:
        full |= ema.full(world)
    state = state_of(model, optimizer, ema)
    failure: str | None = None
    try:
        if world.main:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "state").mkdir(parents=True)
    except OSError as error:
        failure = _reason(error)
    if any_failed(failure, world):
        raise cannot_save(run, step, failure)
    try:
        dcp.save(state, checkpoint_id=aside / "state")
        write_state(aside / "state" / RANK.format(world.rank), private)
        if world.main:
            write_model(aside / "model", full)  # type: ignore[arg-type]  # every value is a tensor
            (aside / "state" / "trainer.json").write_text(json.dumps(about))
    except (Exception, CheckpointException) as error:  # DCP wraps what the disk said; its error is no Exception
        failure = _reason(error)
    # no rank lists files while another one writes: its writer's passing files would be listed
    failed = any_failed(failure, world)
    if not failed:
        try:
            seal_part(aside, world.rank, written_by(aside, world.rank))
        except OSError as error:
            failure = _reason(error)
        failed = any_failed(failure, world)
    if world.main and not failed:
        try:
            seal(aside, final, world.size)
        except OSError as error:
            failure = _reason(error)
    if failed or any_failed(failure, world):
        if world.main:
            shutil.rmtree(aside, ignore_errors=True)
        raise cannot_save(run, step, failure)
    if world.main:
        best = read_best(run).get("step")
        for number, folder in checkpoints(run)[: -keep or None] if keep else []:
            if number != best:
                shutil.rmtree(folder, ignore_errors=True)
    world.barrier()
    return final


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Any]:
    """What the sharded part of a checkpoint holds; loading fills it in place."""
    weights, moments = get_state_dict(model, optimizer)
    average = {} if ema is None else {"ema": ema.average}
    return {"model": weights, "optim": moments, **average}


def any_failed(failure: str | None, world: World) -> bool:
    """Whether any rank failed; collective."""
    return bool(world.max(torch.tensor(float(failure is not None), device=world.device)))


def cannot_save(run: Path, step: int, failure: str | None) -> UsageError:
    """The disk refused; what was there before is untouched."""
    last = checkpoints(run)
    where = f"step {last[-1][0]} stays" if last else "there is none before it"
    return UsageError(
        f"the checkpoint of step {step} could not be written to {run} ({failure or 'another rank failed'}); "
        f"the last good checkpoint: {where}; make room and use --resume"
    )


def _reason(error: BaseException) -> str:
    """The disk's own words, dug out of what wraps them."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno is not None:
            return os.strerror(chain.errno)
        failures = getattr(chain, "failures", None)
        if failures:
            return _reason(next(iter(failures.values()))[0])
        chain = chain.__cause__ or chain.__context__
    text = " ".join(str(error).split())
    for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS):
        if os.strerror(code) in text:
            return os.strerror(code)
    return text[:200] or type(error).__name__


def read_about(folder: Path) -> dict[str, Any]:
    """The trainer's JSON of a checkpoint.

    Raises:
        UsageError: it can't be read, or holds something else.
    """
    file, why = folder / "state" / "trainer.json", "layout is expected"
    try:
        about = parse_json(read_file(file))
        ranks, workers = about["layout"]
        if isinstance(about, dict) and isinstance(ranks, int) and isinstance(workers, int) and ranks > 0 <= workers:
            return about
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
    raise UsageError(
        f"--resume: {file} can't be read ({why}); remove {folder.name} to use the one before", code="unreadable"
    )


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    workers: int = 0,
    ema: Ema | None = None,
) -> Any:
    """Fills model, optimizer and average in place and returns this rank's private state; no pickle of the folder is run.

    ``workers``: data workers of a rank, which may be others than those that wrote, see :mod:`aimv2.train.relayout`.

    Raises:
        UsageError: files that can't be read, or hold something else.
    """
    from aimv2.train.plain_reader import PlainPlanner, PlainReader
    from aimv2.train.relayout import own_state

    state = state_of(model, optimizer, ema)
    private, failure = None, None
    try:
        private, reader = own_state(folder, world, workers), PlainReader(folder / "state")
        if world.main:
            reader.read_metadata()  # of damaged ones DCP would log a traceback
    except Exception as error:  # whatever a damaged file makes of it
        failure = _reason(error)
    failed = any_failed(failure, world)  # before DCP, in which the other ranks would wait
    if not failed:
        try:
            dcp.load(state, storage_reader=reader, planner=PlainPlanner())
        except (Exception, CheckpointException) as error:
            failure = _reason(error)
        failed = any_failed(failure, world)
    if failed:
        why = failure or "on another rank"
        raise UsageError(
            f"--resume: {folder} can't be read ({why}); remove it to use the one before", code="unreadable"
        )
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return private
