"""This process among all: rank, device, sums over ranks. torchrun starts the ranks."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from aimv2.errors import UsageError
from aimv2.io import machine_memory

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Largest over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """The objects of all ranks, everywhere."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: Any) -> Any:
        """Rank 0's object, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def join_world() -> World:
    """Joins torchrun's process group (nccl with CUDA, else gloo); a world of one without torchrun.

    Raises:
        UsageError: more processes on this machine than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise UsageError(
                f"LOCAL_RANK {local} (torchrun sets it), but this machine shows {gpus} GPU(s); at most --nproc-per-node {gpus}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves by itself
    if size > 1 and not dist.is_initialized():
        launcher = importlib.import_module("aimv2.launcher")
        launcher.end_with_launcher()
        # ranks wait for the first one while it trains a tokenizer or draws the demo's scenes
        kind, wait = "nccl" if device.type == "cuda" else "gloo", timedelta(hours=2)
        if (store := launcher.store_of_restart(rank)) is not None:
            dist.init_process_group(kind, timeout=wait, store=store, rank=rank, world_size=size)
        else:
            dist.init_process_group(kind, timeout=wait)
    return World(rank, size, device)


def gather_rows(rows: Tensor, world: World) -> Tensor:
    """Rows [n, D] of every rank, rank by rank; n may differ."""
    if world.size == 1:
        return rows
    counts = torch.zeros(world.size, device=world.device)
    counts[world.rank] = len(rows)
    sizes = [int(count) for count in world.sum(counts).tolist()]
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharded or not, over the same memory."""
    to_local = getattr(tensor, "to_local", None)
    return (tensor if to_local is None else to_local()).detach()


def leave_world() -> None:
    """Leaves the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def usable_device(device: str | int | torch.device | None) -> torch.device:
    """A device, after putting an empty tensor there; None is the CPU, a number a GPU.

    Raises:
        UsageError: an unknown name, or no such device here.
    """
    if isinstance(device, str) and device.isdecimal():
        device = int(device)
    try:
        found = torch.device("cpu" if device is None else device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise UsageError(
            f"device {device}: can't be used here ({why}); cpu, or cuda where there is a GPU", code="unsupported"
        ) from None
    return found


def default_device(given: str | int | None = None) -> str:
    """The device that a user named, or this process's GPU where there is one, else cpu.

    Raises:
        UsageError: a device that torch does not have here.
    """
    if given is None and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return str(usable_device(given))


def free_memory(device: torch.device) -> float | None:
    """GB that are free on a device, or on a CPU in this machine; None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    return machine_memory()[1]
