"""Weights in half precision for one step: each is cast once, however many micro-batches and recomputations use it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from aimv2.models.decoder import TextHead
from aimv2.models.layers import Block


def linears(model: nn.Module) -> list[nn.Linear]:
    """The linears that run under autocast whatever the task: those of our blocks, and of the vocabulary."""
    homes = [module for module in model.modules() if isinstance(module, Block | TextHead)]
    return [part for home in homes for part in home.modules() if isinstance(part, nn.Linear)]


@contextlib.contextmanager
def half_weights(model: nn.Module, half: torch.dtype) -> Iterator[None]:
    """The linears hold casts of their weights meanwhile, through which gradients reach the weights.

    Autocast casts them again after its cache is emptied at the end of a forward pass: for each micro-batch, for each block that is
    recomputed, and in compiled graphs for the backward pass.
    """
    found = [part for part in linears(model) if part.weight.dtype == torch.float32]
    kept = [cast(nn.Parameter, part.weight) for part in found]
    try:
        for part, weight in zip(found, kept):
            part._parameters["weight"] = cast(nn.Parameter, weight.to(half))
        yield
    finally:
        for part, weight in zip(found, kept):
            part._parameters["weight"] = weight
