"""One function makes a model ready for the machine: checkpointing, compile, sharding, in this order.

torchrun starts the ranks; tensor parallelism would enter in :func:`parallelize`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from aimv2.config.schema import Config, ParallelConfig
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.models.encoder import VisionEncoder


class Trainable(Protocol):
    """What the loop needs of a model (an ``nn.Module``)."""

    @property
    def encoder(self) -> VisionEncoder: ...

    def block_lists(self) -> list[nn.ModuleList]:
        """Its blocks, trunk by trunk: what is compiled, sharded and recomputed one by one."""
        ...

    def config_dict(self) -> dict[str, Any]:
        """What ``config.json`` of its model folder keeps."""
        ...


def blocks_of(model: Trainable) -> list[tuple[nn.ModuleList, int]]:
    """Where each block sits: (list, index)."""
    return [(blocks, index) for blocks in model.block_lists() for index in range(len(blocks))]


def layout_of(config: ParallelConfig, ranks: int) -> tuple[int, int]:
    """Copies of the weights, and the ranks that each copy is divided over.

    Raises:
        UsageError: they are not as many as there are ranks.
    """
    replicate, shard = config.replicate, config.shard
    if replicate == -1 and shard > 0:
        replicate = ranks // shard
    elif shard == -1 and replicate > 0:
        shard = ranks // replicate
    if replicate < 1 or shard < 1 or replicate * shard != ranks:
        raise UsageError(
            f"parallel.replicate {config.replicate} x parallel.shard {config.shard} does not make {ranks} "
            f"rank{'s' * (ranks != 1)}: their product must (one of them may be -1, what the other leaves), or torchrun must start as many "
            "processes",
            option="parallel.shard",
            code="mismatch",
        )
    return replicate, shard


def parallelize(model: Trainable, config: Config, world: World, compiled: bool) -> None:
    """Checkpointing, then compile, then FSDP2, each by block, in place.

    Args:
        model: with real weights, equal on every rank.
        config: of the run.
        world: more than one rank spread weights, gradients and optimizer as the section ``parallel`` says.
        compiled: compile each block.
    """
    layout = layout_of(config.parallel, world.size)
    if config.train.checkpointing != "off":
        from aimv2.train.recompute import recompute_blocks

        recompute_blocks(model, config.train.checkpointing)
    if compiled:
        from aimv2.train.compiling import compile_blocks

        compile_blocks(model)
    if world.size > 1:
        from aimv2.train.sharding import shard_model

        shard_model(model, layout, config, world.device)
