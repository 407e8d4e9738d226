"""A moving average of the trained weights, kept beside them: what is validated and saved where it is on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from aimv2.distributed import World, local

WRAPPED = "_checkpoint_wrapped_module."  # recomputation wraps blocks; names are those of the model without it


class Ema:
    """``average += (1 - decay) * (weights - average)`` after each step, in fp32; it starts from the weights.

    Attributes:
        average: by parameter name, sharded as the parameters are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        trained = {name.replace(WRAPPED, ""): p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone().float() for name, p in trained.items()}
        self.own = [local(p) for p in trained.values()]
        self.kept = [local(average) for average in self.average.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights; nothing waits for the device."""
        torch._foreach_lerp_(self.kept, self.own, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average meanwhile."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what is gathered already would not be read again
        for weights, average in zip(self.own, self.kept):
            before = weights.clone()
            weights.copy_(average)
            average.copy_(before)

    def full(self, world: World) -> dict[str, Tensor]:
        """The whole average on the CPU of rank 0, tensor by tensor; {} on the other ranks, which take part."""
        found = {}
        for name, average in self.average.items():
            whole = average.full_tensor() if isinstance(average, DTensor) else average
            if world.main:
                found[name] = whole.cpu()
        return found
