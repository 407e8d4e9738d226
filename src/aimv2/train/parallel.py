"""One function makes a model ready for the machine: checkpointing, compile, sharding, in this order.

torchrun starts the ranks; hybrid sharding and tensor parallelism would enter in :func:`parallelize`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aimv2.config.schema import TrainConfig
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.models.encoder import VisionEncoder
from aimv2.models.layers import Cache, Packed

RECOMPILE_LIMIT = 256  # above the number of buckets, so that kernels never depend on the history of shapes


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


def can_compile(device: torch.device) -> str | None:
    """None where torch.compile works here, else the reason in a line."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        return None
    except Exception as error:  # whatever the back end lacks: compiler, headers, Triton
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        return lines[0][:120] if lines else type(error).__name__


def blocks_of(model: Trainable) -> list[tuple[nn.ModuleList, int]]:
    """Where each block sits: (list, index)."""
    return [(blocks, index) for blocks in model.block_lists() for index in range(len(blocks))]


def compile_blocks(model: Trainable) -> None:
    """torch.compile of each block. Shapes are static, but for the decoder's packed rows, which are marked dynamic.

    Nothing turns dynamic by itself: kernels that depend on the history of shapes would make a resumed run differ.
    """
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = 4 * RECOMPILE_LIMIT
    for blocks, index in blocks_of(model):
        block = getattr(blocks[index], "_checkpoint_wrapped_module", blocks[index])
        # the forward, not the call: FSDP2's hooks stay outside, and what they return is marked again
        block.forward = partial(run_compiled, torch.compile(block.forward))
    model.encoder.compiled = True


def run_compiled(
    forward: Callable[..., Tensor],
    x: Tensor,
    mask: Any = None,
    packed: Packed | None = None,
    keep: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """A compiled block. Packed rows differ from batch to batch: marked dynamic, one kernel serves them all."""
    if packed is not None and torch.is_grad_enabled():
        for rows in (x, packed.token_rows, keep, packed.spans and packed.spans.slots):
            if rows is not None:
                torch._dynamo.mark_dynamic(rows, 0)
    return forward(x, mask=mask, packed=packed, keep=keep, cache=cache)


def parallelize(model: Trainable, config: TrainConfig, world: World, compiled: bool) -> None:
    """Checkpointing, then compile, then FSDP2, each by block, in place.

    Args:
        model: with real weights, equal on every rank.
        config: of the loop.
        world: more than one rank shards weights, gradients and optimizer over all of them.
        compiled: compile each block.
    """
    if config.checkpointing:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for blocks, index in blocks_of(model):
            blocks[index] = checkpoint_wrapper(blocks[index], preserve_rng_state=False)
    if compiled:
        compile_blocks(model)
    if world.size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(world.device.type, (world.size,))
        for blocks, index in blocks_of(model):
            fully_shard(blocks[index], mesh=mesh)
        fully_shard(model, mesh=mesh)  # type: ignore[call-overload]


def want_compile(config: TrainConfig, world: World) -> tuple[bool, str | None]:
    """Whether to compile, and a line for the user where the answer is not what ``auto`` hopes for."""
    if config.compile == "off":
        return False, None
    reason = can_compile(world.device)
    if reason is None:
        return True, None
    if config.compile == "on":
        raise UsageError(
            f"train.compile=on, but torch.compile does not work here ({reason}); use auto or off", code="unsupported"
        )
    return False, f"running eager: torch.compile does not work here ({reason})"
