"""A training step of one of many ranks without values and without the others: torch's memory tracker over the real program.

Tensors have shapes only (FakeTensorMode) and collectives answer at once (a process group that only pretends), so that a step of a 3B
model over 64 ranks runs on any machine, eagerly, through the same :class:`aimv2.train.step.TrainStep` as a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from aimv2.batch import Batch, make_batch, split_batch
from aimv2.config.schema import Config
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.models import layers
from aimv2.models.aimv2 import AIMv2
from aimv2.models.sizes import DecoderConfig, EncoderConfig

CPU = torch.device("cpu")
STEPS = 2  # the moments exist from the second on


def tracked_step(
    config: Config, encoder: EncoderConfig, decoder: DecoderConfig, ranks: int, tokens: int, fused: bool
) -> dict[str, float]:
    """Bytes at the peak of the second step of one rank, by what they are; ``total``: their sum.

    Args:
        config: of the run: batch, accumulation, precision, checkpointing, layout.
        encoder, decoder: its shapes.
        ranks: of the world.
        tokens: of every caption.
        fused: attention as one kernel, as on CUDA; else as the CPU runs it.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker

    from aimv2.train.step import TrainStep

    batch = blank_batch(encoder, config.train.batch_size // ranks, tokens)
    real = split_batch(batch, config.train.accumulate, encoder.patches)
    with fake_world(ranks), attention(fused), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model: Any = AIMv2(encoder, decoder)
        model.to = lambda device: model  # it is there, and tensors without values can't be exchanged
        step = TrainStep(model, config, World(0, ranks, CPU), False)
        parts = [without_values(part, mode) for part in real]
        tracker: Any
        if ranks > 1:
            tracker = FSDPMemTracker(model, step.optimizer)
        else:
            tracker = MemTracker()
            tracker.track_external(model, step.optimizer)
        once: Any = step.backward

        def backward(batch: Batch, counts: Tensor) -> Tensor:
            tracker.reset_mod_stats()  # it follows one forward pass at a time
            return once(batch, counts)

        setattr(step, "backward", backward)  # noqa: B010
        for number in range(STEPS):
            with tracker:  # its peak begins anew: in a first step shapes of whole tensors are tried, and counted
                step(parts, number)
        found = tracker.get_tracker_snapshot("peak")[CPU]
    names = {getattr(key, "value", key): value for key, value in found.items()}
    return {str(name).lower(): float(value) for name, value in names.items()}


def blank_batch(encoder: EncoderConfig, pairs: int, tokens: int) -> Batch:
    """Pairs whose prefix is half of the patches."""
    images = torch.zeros(pairs, 3, encoder.image_size or 0, encoder.image_size or 0, dtype=torch.uint8)
    return make_batch(images, [[0] * tokens] * pairs, [encoder.patches // 2] * pairs, encoder.patches)


def without_values(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The same batch as tensors of the mode."""
    tensors: dict[str, Any] = {
        name: mode.from_tensor(value) for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    return replace(batch, **tensors)


@contextlib.contextmanager
def fake_world(ranks: int) -> Iterator[None]:
    """A process group of so many ranks of which this process is the first, and the others only pretend.

    Raises:
        UsageError: this process is in a group already (torchrun).
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UsageError("a fake world plays every rank in one process: run it without torchrun", code="conflict")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def attention(fused: bool) -> Iterator[None]:
    """Attention by one kernel, whatever the length; else as the CPU prefers it."""
    before = dict(layers.MATMUL_LENGTH)
    layers.MATMUL_LENGTH.update({False: 0, True: 0} if fused else {})
    try:
        yield
    finally:
        layers.MATMUL_LENGTH.update(before)
